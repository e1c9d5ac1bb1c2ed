"""From the `data:` section of a job to splits and recipes: the indexes that jobs read, and how samples are prepared.

`DataSpec` is the section as a user writes it. `embed` puts the dataset card into it, so that the resolved job is
complete and workers read no card; `open_splits` reads the indexes; `make_recipe` returns the recipe by which a file
becomes a sample. `packaged` locates the examples that come with slimray. No Ray here.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import slimray
from slimray import runs
from slimray.data import cache
from slimray.data.bytes import read_whole
from slimray.data.cards import Card, load_card
from slimray.data.index import fingerprint, notes_of
from slimray.data.lists import complete, read_split, unused_labels
from slimray.data.modalities import MODALITIES, read_recipe
from slimray.data.samples import BadSample
from slimray.data.spec import DataSpec
from slimray.data.text.spec import PreparedText
from slimray.spec import UserError, did_you_mean, located, parse
from slimray.storage import absolute, exists, join, open_uri, read_bytes, retry


@dataclass(frozen=True)
class Splits:
    """The dataset of a job: the root of its files, its card, and an index per split name."""

    root: str
    card: Card
    tables: dict[str, pa.Table]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of all indexes, in the order of the split names."""
        return "-".join(fingerprint(self.tables[name])[:16] for name in sorted(self.tables))


def packaged(folder: str) -> Path:
    """Return the folder `jobs`, `datasets` or `cluster` that comes with slimray, in the package or its checkout."""
    package = Path(slimray.__file__).resolve().parent
    inside = package / "examples" / folder
    return inside if inside.is_dir() else package.parents[1] / folder


def embed(data: DataSpec, where: str, search: Sequence[Path], prepared: Mapping[str, dict[str, Any]]) -> DataSpec:
    """Return `data` with its card embedded; UserError for no source, two sources, or a missing card.

    `prepared` maps the names of `prepare` documents earlier in the same file to their cards. A section that is already
    resolved, a run with its card, is returned unchanged.
    """
    if data.run is not None and (data.card is None or isinstance(data.card, dict)):
        return data.model_copy(update={"card": prepared[data.run]}) if data.run in prepared else data
    if data.card is None or data.run is not None:
        raise UserError(f"{where}: data: give either card (a dataset card) or run (a prepare run)")
    card = embed_card(data.card, data.root, where, search)
    return data.model_copy(update={"card": card.model_dump(mode="json", exclude_defaults=True)})


def embed_card(card: str | dict[str, Any], root: str | None, where: str, search: Sequence[Path]) -> Card:
    """Return the dataset card that a job names or holds, with classes read from the dataset if only that lists them."""
    try:
        found = load_card(card, search) if isinstance(card, str) else parse(Card, card, f"{where}: data.card")
    except UserError as error:
        raise UserError(located(str(error), f"{where}: data.card")) from None
    try:
        return complete(found, root or found.root)
    except UserError as error:
        raise UserError(located(str(error), f"{where}: data.root")) from None


def open_splits(data: DataSpec, where: str, storage: str, names: Sequence[str]) -> Splits:
    """Read the indexes of the splits `names`; UserError with the field if the dataset or the run is missing."""
    if data.run is not None:
        folder = join(finished_run(data.run, storage, ("dataset",), f"{where}: data.run").uri, "data")
        card = _with_vocabulary(load_card(join(folder, "card.yaml"), []), folder)
        root = card.root or folder  # files that were probed, but not packed, lie elsewhere
    else:
        assert isinstance(data.card, dict)  # embedded when the job was loaded
        card = parse(Card, data.card, f"{where}: data.card")
        root = folder = absolute(data.root or card.root or "")
        if card.layout != "generated" and not (data.root or card.root):
            raise UserError(f"{where}: data.root: is required, the folder where {card.name} lies")
        if MODALITIES[card.sample].stored and card.layout not in ("generated", "index"):
            raise UserError(
                f"{where}: data.card: {MODALITIES[card.sample].plural} need a prepare job first: write data: "
                "{run: NAME} with its name"
            )
    try:
        require_splits(card.name, list(card.splits), names)
        return Splits(root, card, {name: read_split(card, name, folder) for name in names})
    except UserError as error:
        raise UserError(located(str(error), f"{where}: data")) from None


def _with_vocabulary(card: Card, folder: str) -> Card:
    """Return the card of prepared texts with its vocabulary in place of the file that holds it."""
    if card.text is None:
        return card
    fs, path = open_uri(join(folder, card.text.tokenizer))
    try:
        text = read_bytes(fs, path).decode("ascii")
    except (FileNotFoundError, UnicodeDecodeError):
        raise UserError(f"{folder}: its tokenizer is missing or damaged: run prepare again") from None
    return card.model_copy(update={"text": card.text.model_copy(update={"tokenizer": text})})


def texts_of(name: str, storage: str, field: str) -> PreparedText:
    """Return the section `text` of the dataset in the run `name`, with the vocabulary in place of the file's name.

    UserError, with `field`, if the run holds no texts.
    """
    folder = join(finished_run(name, storage, ("dataset",), field).uri, "data")
    card = _with_vocabulary(load_card(join(folder, "card.yaml"), []), folder)
    if card.text is None:
        raise UserError(f"{field}: {name!r} holds no texts: name another run")
    return card.text


def require_splits(dataset: str, known: Sequence[str], names: Sequence[str]) -> None:
    """Raise UserError for the first of `names` that is not a split of the dataset."""
    for name in names:
        if name not in known:
            raise UserError(f"{dataset} has no split {name!r}{did_you_mean(name, known)}")


def notes_of_splits(data: DataSpec, splits: Splits, num_segments: int) -> list[str]:
    """Return notes that may surprise users: samples that were left out, clips that are too short, unused labels."""
    modality, found = MODALITIES[splits.card.sample], []
    recipe = read_recipe(make_recipe(data, splits.card, num_segments, "val"))
    for split, table in splits.tables.items():
        short = modality.notes(table.column("frames").to_numpy(), recipe) if modality.notes else ""
        found += [f"{split}: {note}" for note in [*notes_of(table), *filter(None, [short])]]
    unused = unused_labels(splits.card, splits.tables.values())
    return found + ([unused] if unused else [])


def root_of(splits: Splits, data: DataSpec) -> str:
    """Return the root from which the samples of a dataset are read: through the cache of the job if it has one.

    A cache belongs to one version of the dataset: these indexes, and the modification times of its lists.
    """
    if data.cache is None:
        return splits.root
    fs, folder = open_uri(splits.root)
    lists = [join(folder, place) for name in splits.tables for place in splits.card.places(name)]
    written = [info.mtime_ns for info in retry(lambda: fs.get_file_info(lists), "check the lists of", folder)]
    version = hashlib.sha256(f"{splits.fingerprint} {written}".encode()).hexdigest()[:16]
    return cache.root(splits.root, data.cache.dir, data.cache.max_gb, version)


def absent_samples(table: pa.Table, root: str, count: int = 3) -> list[str]:
    """Return the paths of missing files among `count` samples that are spread evenly over an index."""
    fs, folder = open_uri(root)
    absent = []
    for place in np.unique(np.linspace(0, table.num_rows - 1, count).round().astype(int)):
        row = table.slice(int(place), 1).to_pylist()[0]
        try:
            if not row["shard"]:
                read_whole(fs, folder, row)
            elif not exists(fs, join(folder, row["shard"])):
                absent.append(join(folder, row["shard"]))
        except FileNotFoundError as error:
            absent.append(str(error))
        except BadSample:
            continue
    return absent


def finished_run(name: str, storage: str, what: Sequence[str], field: str) -> runs.Run:
    """Return the finished run `name`, which `field` (`x.yaml (name): data.run`) reads and which holds one of `what`.

    UserError, with the field, if it does not exist, has not finished, or holds something else.
    """
    try:
        run = runs.find_run(name, storage)
        status, held = runs.read_status(run), held_by(run)
    except UserError as error:
        raise UserError(located(str(error), field)) from None
    if status is None or status.state != "finished":
        raise UserError(f"{field}: {name!r} has not finished: run it first")
    if held not in what:
        raise UserError(f"{field}: {name!r} holds {in_words(held)}, not {' or '.join(map(in_words, what))}")
    return run


def require_free(storage: str, name: str, search: str, field: str) -> None:
    """Raise UserError, with `field`, if there is already a run `name` that the search `search` did not make."""
    run = runs.open_run(storage, name)
    if runs.exists(run, "job.yaml") and runs.read_job(run).get("search") != search:
        raise UserError(f"{field}: there is a run {name!r} already: choose another name")


def held_by(run: runs.Run) -> str:
    """Return the content of a run, by its files: "dataset", "network", "supernet", "export", or "table" (numbers)."""
    if runs.exists(run, "data/card.yaml"):
        return "dataset"
    if runs.exists(run, "export"):
        return "export"
    if not runs.exists(run, "model/input.json"):
        return "table"
    from slimray import models

    return "supernet" if models.is_supernet(read_model(run, run.uri)) else "network"


def in_words(what: str) -> str:
    """Return the content of a run in words for messages."""
    words = {"table": "tables of numbers", "export": "an export"}
    return words.get(what, f"a {what}")


def read_model(run: runs.Run, field: str) -> dict[str, Any]:
    """Return the arguments of `compress.build` for the network of a run; UserError if the file is damaged."""
    from slimray import models

    return models.stored(_read_object(run, "model/model.json", ("name",), field))


def split_export(name: str) -> tuple[str, str | None]:
    """Return the run and the format that `RUN:FORMAT` names; the format is None for a run alone, URIs included."""
    run, colon, form = name.rpartition(":")
    return (run, form) if colon and run and "/" not in form else (name, None)


def read_input(run: runs.Run, field: str, form: str | None = None) -> dict[str, Any]:
    """Return the input.json (recipe, classes, ...) of the network of a run, or of its export; UserError if damaged."""
    if form is None:
        return _read_object(run, "model/input.json", ("recipe", "classes"), field)
    return dict(_read_object(run, f"export/{form}/export.json", ("input",), field)["input"])


def data_of(run: runs.Run, storage: str, field: str) -> DataSpec:
    """Return the `data` section that defines the samples of a run's network.

    A run made from the network of another run (`compress`, `recalibrate`) has that run's. UserError if there is none.
    """
    found, seen = run, {run.uri}
    while True:
        job = runs.read_job(found)
        if job.get("data"):
            return parse(DataSpec, job["data"], f"{field}: {found.uri}/job.yaml: data")
        model = job.get("model")
        source = job.get("run") or (model.get("run") if isinstance(model, dict) else None)
        if not isinstance(source, str):
            raise UserError(f"{field}: {found.uri}/job.yaml names no data: write a data section")
        found = runs.find_run(source, storage)
        if found.uri in seen:
            raise UserError(f"{field}: {found.uri}/job.yaml: takes its network from itself: the folder is damaged")
        seen.add(found.uri)


def _read_object(run: runs.Run, name: str, keys: Sequence[str], field: str) -> dict[str, Any]:
    try:
        found = json.loads(runs.read_file(run, name))
        return dict(found) | {key: found[key] for key in keys}
    except FileNotFoundError:
        raise UserError(f"{field}: {run.uri}/{name} is missing: train it again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{field}: {run.uri}/{name} is damaged ({error}): train it again") from None


def make_recipe(data: DataSpec, card: Card, num_segments: int, mode: str, **options: Any) -> dict[str, Any]:
    """Return the recipe of a split's samples in plain form; `mode` is "train", "val" or "test".

    `options` override its fields; `num_segments` is for clips only.
    """
    from slimray.tasks import task_of_card, task_options, with_target

    modality = MODALITIES[card.sample]
    data = data.model_copy(update={"task": task_options(card, data.task)})
    fields = modality.make_recipe(data, card, num_segments, mode)
    return with_target(task_of_card(card), modality.recipe(**(fields | options)).to_dict())
