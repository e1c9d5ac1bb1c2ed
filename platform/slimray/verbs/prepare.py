"""`kind: prepare`: probe, quarantine and pack a dataset for training, as a resumable Ray Data job.

Every file is decoded once from end to end: files that do not decode go to the run's quarantine with the reason, the
others enter the index with their true frame count, rate and size. `pack` re-encodes clips as short-GOP H.264 or JPEG
frames into parquet shards (one clip per row group: large sequential objects that can still be read clip by clip), so
that training decodes cheaply. Point clouds are always packed, as .npz; a scene may become several clouds (an S3DIS room
its windows, `room#zero-0007`; the tiles of a scan; the frustums of the objects in a scan), whose array `rows` maps back
to it. Images are packed unchanged, or as smaller JPEGs if too large. Generated datasets are made here. Work is cut into
shards; a shard whose part file exists is done, so a killed job continues where it stopped.
"""

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import yaml
from pydantic import Field, model_validator

from slimray import runs, storage
from slimray.data.bytes import write_shard
from slimray.data.cards import Card
from slimray.data.conversion import BY_LAYOUT, Bad, Raw, scan_objects
from slimray.data.index import fingerprint, notes_of
from slimray.data.lists import read_split, unused_labels
from slimray.data.modalities import MODALITIES
from slimray.data.open import filesystem
from slimray.data.samples import BadSample
from slimray.data.synthetic import Sizes
from slimray.data.text.spec import TRAIN, PreparedText, TextSpec
from slimray.data.text.vocabulary import vocabulary_of
from slimray.data.video.decoder import Decoder
from slimray.data.video.repack import Pack
from slimray.spec import RunFailed, Spec, UserError, parse
from slimray.verbs import inputs
from slimray.verbs.context import CheckContext, Context, Made
from slimray.verbs.prepare_parts import Split, note_places, read_parts, shard_of

TOKENIZER = "tokenizer.txt"  # file beside the card: the vocabulary of texts
MAX_NOTES = 10  # notes to print, about files with points that are left out


class PrepareData(Spec):
    """The raw dataset."""

    card: str | dict[str, Any]
    """Dataset card: its name, the path of its YAML, or the card itself."""
    run: None = None
    root: str | None = None
    """Folder of the raw files: a path, s3:// or gs://; not for generated datasets."""
    splits: tuple[str, ...] | None = None
    """Splits to prepare; default: all splits of the card."""
    clips: int = Field(480, ge=16)
    """Total number of clips, images or clouds to generate, a fifth of them for validation (generated datasets only)."""
    size: int = Field(64, ge=16, le=512)
    """Side of generated frames and images in pixels."""
    frames: int = Field(16, ge=2, le=1000)
    """Frames of a generated clip."""
    points: int = Field(1024, ge=16, le=1_000_000)
    """Points of a generated cloud."""
    copies: int = Field(5, ge=1, le=100)
    """Frustums to make of each object of split `train`, with its 2D box moved and resized by up to a tenth; 1: one,
    with the box unchanged (KITTI only)."""
    seed: int = Field(0, ge=0)
    """Seed of generated clips or clouds."""


class PackSpec(Spec):
    """Format of clips and images for training; without this section only the index is written.

    Whatever the `format`, an image stays unchanged, or becomes a smaller JPEG if its short side is too long.
    """

    format: Literal["h264", "jpeg"] = "h264"
    """Short-GOP H.264, or every frame as a JPEG (9 to 28 times cheaper to decode, 10 to 18 times the bytes)."""
    short_side: int | None = Field(256, ge=16)
    """Short side in pixels, never enlarged; null keeps the size."""
    gop: int = Field(12, ge=1)
    """Frames from one key frame to the next (H.264); fewer frames make seeking cheaper."""
    crf: int = Field(23, ge=0, le=51)
    """Quality of H.264, lower is better."""
    quality: int = Field(90, ge=1, le=100)
    """Quality of JPEG, higher is better."""


class PrepareJob(Spec):
    """Probe, quarantine and pack a dataset, or generate one."""

    kind: Literal["prepare"]
    name: str
    """Name of the run, a folder of the storage; training reads it by `data: {run: NAME}`."""
    data: PrepareData
    pack: PackSpec | None = None
    text: TextSpec | None = None
    """Tokenization of texts (`sample: text`)."""
    clips_per_shard: int = Field(64, ge=1)
    """Clips per unit of work, and per parquet shard."""
    tasks: int = Field(0, ge=0)
    """Files decoded at once, one CPU each; 0: all CPUs."""
    decode_timeout_s: float = Field(120, gt=0)
    """Longest time for a file, in seconds; after that its decoder is killed and the file is quarantined."""
    max_bad_fraction: float = Field(0.5, ge=0, le=1)
    """Largest share of a split's files that may fail before the job fails."""

    @property
    def local_cpus(self) -> int:
        """Logical CPUs that a local cluster needs for the job."""
        return self.tasks or os.cpu_count() or 1

    @model_validator(mode="after")
    def _generated_is_not_packed(self) -> "PrepareJob":
        if isinstance(self.data.card, dict) and self.data.card.get("layout") == "generated" and self.data.root:
            raise ValueError("data.root: a generated dataset has none")
        return self


@dataclass(frozen=True)
class _Chunk:
    """A unit of work: rows `lo` to `hi` of a split, written as shard `number`."""

    split: str
    number: int
    lo: int
    hi: int


@dataclass(frozen=True)
class _Work:
    """Settings shared by all tasks."""

    run_uri: str
    root: str
    card: Card
    data: PrepareData
    pack: PackSpec | None
    timeout_s: float
    text: TextSpec | None = None
    vocabulary: str = ""


Job = PrepareJob
CHUNK = "chunk of prepare"  # name of a column added to those of the list
MIN_AT_ONCE = 2000  # least chunks per execution of Ray Data, which needs two seconds to plan one
TURNS = 20  # chunks per slot and execution: with fewer, most slots idle while the last chunks finish
SEVERAL = ("s3dis", "kitti")  # layouts in which a listed file becomes several samples; tiled files do so too


def check(job: PrepareJob, ctx: CheckContext) -> dict[str, Any]:
    """Return the dataset, its classes and splits, and the number of listed files in each."""
    out: dict[str, Any] = {}
    with ctx.noting():
        card = parse(Card, _card(job), "data.card")
        generated, root = card.layout == "generated", job.data.root or card.root or ""
        if generated and (job.data.root or job.pack):
            raise UserError(f"{'pack' if job.pack else 'data.root'}: {card.name} is generated: leave it out")
        out |= {"dataset": card.name, "classes": card.num_classes, "splits": _splits(job, card)}
        if generated:
            out["clips"] = job.data.clips
        elif not root:
            raise UserError(f"data.root: is required, the folder where {card.name} lies")
        _require_sections(job, card)
        like = None if job.text is None else job.text.like
        if like is not None and ctx.require(like, ("dataset",), "text.like") is None:
            inputs.texts_of(like, ctx.storage, "text.like")
        if generated:  # without a table: making one imports pandas
            return out | {"samples": {split: len(to_generate(job, split)) for split in out["splits"]}}
        tables = {split: _table(job, card, split, root) for split in out["splits"]}
        out["samples"] = {split: table.num_rows for split, table in tables.items()}
        notes = [] if generated else _notes(card, tables)
        out |= {"notes": notes} if notes else {}
        for split, table in tables.items() if ctx.look else ():
            absent = inputs.absent_samples(table, root)
            if len(absent) == min(3, table.num_rows):
                raise UserError(
                    f"data.root: the files of split {split!r} are missing ({absent[0]}): fix data.root or the list"
                )
    return out


def _require_sections(job: PrepareJob, card: Card) -> None:
    """Raise UserError for a section that does not apply to the samples of a card, or that they need but lack."""
    modality = MODALITIES[card.sample]
    if job.text is not None and modality.learn is None:
        raise UserError(f"text: is for texts, {card.name} has {modality.plural}: leave it out")
    if job.pack is not None and modality.learn is not None:
        raise UserError(f"pack: is for clips and images, {card.name} has {modality.plural}: leave it out")
    if modality.learn is not None and (job.text is None or job.text.like is None) and TRAIN not in card.splits:
        raise UserError(f"data.card: {card.name} has no split {TRAIN!r} to train a tokenizer on: write text.like")


def makes(job: PrepareJob) -> dict[str, Made]:
    """Return the dataset; each listed file is one sample, except for scenes that are split up."""
    card = parse(Card, _card(job), "data.card")
    counted = card.layout not in SEVERAL and not card.tile and not MODALITIES[card.sample].rows_per_shard
    return {job.name: Made("dataset", job.data.card, splits=tuple(_splits(job, card)), counted=counted)}  # type: ignore[arg-type]


def run(job: PrepareJob, ctx: Context) -> None:
    """Prepare the dataset of `job` in the run folder `ctx.run`."""
    card = parse(Card, _card(job), f"{ctx.where}: data.card")
    generated = card.layout == "generated"
    root = "" if generated else job.data.root or card.root
    assert root is not None
    root = root and storage.absolute(root)
    tables = {split: _table(job, card, split, root) for split in _splits(job, card)}
    chunks = [
        _Chunk(split, number, lo, min(lo + job.clips_per_shard, table.num_rows))
        for split, table in tables.items()
        for number, lo in enumerate(range(0, table.num_rows, job.clips_per_shard))
    ]
    if not generated:
        _require_same_lists(ctx, tables)
        for note in _notes(card, tables):
            ctx.console.print(f"{job.name}: {note}", highlight=False, markup=False)
    _require_sections(job, card)
    job = _with_text(job, ctx, card)
    vocabulary = _learn(job, ctx, card, root)
    done = set(runs.list_names(ctx.run, "data/parts"))
    todo = tuple(chunk for chunk in chunks if _part_name(chunk) not in done)
    if todo:
        _process(job, ctx, card, root, tables, todo, vocabulary)
    _write_indexes(job, ctx, card, chunks, root, vocabulary)


def _with_text(job: PrepareJob, ctx: Context, card: Card) -> PrepareJob:
    """Return the job with a section `text` if its dataset holds texts; with `like`, `lower` is that of its dataset."""
    if MODALITIES[card.sample].learn is None:
        return job
    text = job.text or TextSpec.model_validate({})
    if text.like is not None:
        lower = inputs.texts_of(text.like, ctx.storage, f"{ctx.where}: text.like").lower
        text = text.model_copy(update={"lower": lower})
    return job.model_copy(update={"text": text})


def _learn(job: PrepareJob, ctx: Context, card: Card, root: str) -> str:
    """Return the vocabulary of a dataset of texts, learned in the first attempt; "" for other datasets."""
    learn = MODALITIES[card.sample].learn
    if learn is None or job.text is None:
        return ""
    with contextlib.suppress(FileNotFoundError):
        return runs.read_file(ctx.run, f"data/{TOKENIZER}").decode()
    if job.text.like is not None:
        vocabulary = inputs.texts_of(job.text.like, ctx.storage, f"{ctx.where}: text.like").tokenizer
    else:
        ctx.console.print(f"{job.name}: training the tokenizer", highlight=False, markup=False)
        vocabulary = learn(card, root, job.text)
    runs.write_file(ctx.run, f"data/{TOKENIZER}", vocabulary.encode())
    return vocabulary


def _notes(card: Card, tables: Mapping[str, pa.Table]) -> list[str]:
    """Return notes on the lists that may surprise users: files left out, classes without a sample."""
    unused = unused_labels(card, tables.values())
    listed = [f"{split}: {note}" for split, table in tables.items() for note in notes_of(table)]
    return listed + ([unused] if unused else [])


def _require_same_lists(ctx: Context, tables: Mapping[str, pa.Table]) -> None:
    """Raise UserError if a list has changed since this run began: its shards are numbered by position in the list."""
    now = {split: fingerprint(table) for split, table in tables.items()}
    try:
        before = json.loads(runs.read_file(ctx.run, "data/lists.json"))
    except FileNotFoundError:
        runs.write_file(ctx.run, "data/lists.json", json.dumps(now).encode())
        return
    for split in now:
        if now[split] != before.get(split):
            raise UserError(
                f"{ctx.where}: the list of split {split!r} has changed since this run began: restore it, or --restart"
            )


def _card(job: PrepareJob) -> dict[str, Any]:
    assert isinstance(job.data.card, dict)  # embedded when the job was loaded
    return job.data.card


def _splits(job: PrepareJob, card: Card) -> list[str]:
    for split in job.data.splits or ():
        if split not in card.splits:
            raise UserError(f"data.splits: {split!r} is not a split of {card.name} ({', '.join(card.splits)})")
    return list(job.data.splits or card.splits)


def _table(job: PrepareJob, card: Card, split: str, root: str) -> pa.Table:
    """Return the list of a split, or the numbers of the samples to generate."""
    if card.layout == "generated":
        return pa.table({"number": np.array(to_generate(job, split))})
    return read_split(card, split, root)


def to_generate(job: PrepareJob, split: str) -> range:
    """Return the numbers of a split's generated samples: a fifth is for validation; no number is in two splits."""
    num_val = job.data.clips // 5
    first, count = (0, job.data.clips - num_val) if split == "train" else (job.data.clips - num_val, num_val)
    return range(first, first + count)


def _part_name(chunk: _Chunk) -> str:
    return f"{chunk.split}-{chunk.number:06d}.json"


def _process(
    job: PrepareJob, ctx: Context, card: Card, root: str, tables: dict, todo: tuple[_Chunk, ...], vocabulary: str
) -> None:
    """Run the chunks as Ray Data tasks, each with its own rows, and show the progress."""
    import ray
    from ray import exceptions

    from slimray.data.pipeline import failure_of, map_rows
    from slimray.train import workers
    from slimray.train.progress import make_bar

    slots = job.tasks or os.cpu_count() or 1
    workers.connect(ctx.cpus)
    slots = min(slots, max(1, int(workers.capacity().get("CPU", 1))))
    work = _Work(ctx.run.uri, root, card, job.data, job.pack, job.decode_timeout_s, job.text, vocabulary)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=slots)
    total, at_once = sum(chunk.hi - chunk.lo for chunk in todo), max(MIN_AT_ONCE, TURNS * slots)
    with make_bar(ctx.console) as bar:
        task = bar.add_task(f"{job.name}: clips", total=total, note="")
        try:
            for first in range(0, len(todo), at_once):
                given = [_given(chunk, tables[chunk.split]) for chunk in todo[first : first + at_once]]
                for row in map_rows(given, lambda rows: _do_chunk(work, rows)).iter_rows():
                    bar.update(task, advance=int(row["clips"]))
        except exceptions.RayTaskError as error:
            raise failure_of(error) from error


def _write_indexes(job: PrepareJob, ctx: Context, card: Card, chunks: list[_Chunk], root: str, vocabulary: str) -> None:
    """Join the parts to one index per split, the quarantine, the card of the prepared dataset."""
    totals: dict[str, Any] = {"bytes_in": 0, "bytes_out": 0, "psnr": []}
    notes: list[str] = []
    metrics: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="slimray-") as scratch:
        names = dict.fromkeys(chunk.split for chunk in chunks)
        splits = {name: Split.at(Path(scratch) / f"{number}.parquet") for number, name in enumerate(names)}
        for chunk, part in zip(chunks, read_parts(ctx.run, list(map(_part_name, chunks))), strict=True):
            splits[chunk.split].add(part, chunk.hi - chunk.lo)
            notes += part.get("notes", [])
            for key in totals:
                totals[key] += part[key]
        with contextlib.closing(runs.PartWriter(ctx.run, "quarantine", ctx.attempt, 0)) as writer:
            for name, split in splits.items():
                for item in split.bad:
                    writer.write({"split": name, **item})
        for name, split in splits.items():
            if not split.index.num_rows:
                raise RunFailed(
                    f"split {name!r}: none of {split.files} files decodes, see quarantine/ in the run folder"
                )
            if split.failed > job.max_bad_fraction * split.files:
                raise RunFailed(
                    f"split {name!r}: {split.failed} of {split.files} files do not decode, more than max_bad_fraction "
                    f"({job.max_bad_fraction:g}): see quarantine/ in the run folder, or raise the bound"
                )
            runs.write_file(ctx.run, f"data/{name}.parquet", split.index.close())
            if split.objects:  # the objects to detect, including those in images without a frustum
                runs.write_file(ctx.run, f"data/{name}.objects.json", json.dumps(split.objects).encode())
            metrics[name] = {"clips": split.index.num_rows, "quarantined": len(split.bad)}
    here = job.pack is not None or card.layout == "generated" or MODALITIES[card.sample].stored
    prepared = card.prepared(list(splits), None if here else root)
    if job.text is not None:
        lengths = {name: int(split.lengths.max()) for name, split in splits.items()}
        known = {"tokenizer": TOKENIZER, "vocab_size": vocabulary_of(vocabulary).size, "lengths": lengths}
        prepared = prepared.model_copy(update={"text": PreparedText.model_validate(known | {"lower": job.text.lower})})
    text = yaml.safe_dump(prepared.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    runs.write_file(ctx.run, "data/card.yaml", text.encode())
    packed: dict[str, Any] = {key: totals[key] for key in ("bytes_in", "bytes_out")} if job.pack else {}
    if totals["psnr"]:
        packed["psnr_db"] = float(np.median(totals["psnr"]))
    ctx.finish({"metrics": metrics, "packed": packed, "dataset": {"name": card.name}})
    plural = "clips" if not vocabulary else MODALITIES[card.sample].plural
    summary = ", ".join(
        f"{split} {m['clips']} {plural} ({m['quarantined']} quarantined)" for split, m in metrics.items()
    )
    ctx.console.print(f"{job.name}: {summary}", highlight=False)
    for note in notes[:MAX_NOTES]:
        ctx.console.print(f"  {note}", highlight=False, markup=False)
    if len(notes) > MAX_NOTES:
        ctx.console.print(f"  and {len(notes) - MAX_NOTES} more files: see data/parts in the run folder")
    short = MODALITIES[card.sample].notes
    for name, split in splits.items():
        if short and (note := short(split.lengths, None)):
            ctx.console.print(f"{job.name}: {name}: {note}", highlight=False, markup=False)


# ------------------------------------------------------------------------------------------------ in the tasks


def _given(chunk: _Chunk, table: pa.Table) -> pa.Table:
    """Return the input of a chunk's task: its rows of the list of its split, with a column CHUNK that describes it."""
    own = table.slice(chunk.lo, chunk.hi - chunk.lo)
    return own.append_column(CHUNK, pa.array([vars(chunk)] * own.num_rows))


def _do_chunk(work: _Work, rows: pa.Table) -> dict[str, np.ndarray]:
    """Make a shard of the rows from `_given`, and last its part file, which marks the shard as complete."""
    fs, folder = filesystem(work.run_uri)
    chunk, table = _Chunk(**rows.column(CHUNK)[0].as_py()), rows.drop_columns([CHUNK])
    part: dict[str, Any] = {
        "rows": [],
        "bad": [],
        "left_out": [],
        "objects": [],
        "bytes_in": 0,
        "bytes_out": 0,
        "psnr": [],
    }
    make = _generate if work.card.layout == "generated" else _convert
    make(work, chunk, table.to_pylist(), part, fs, folder)
    storage.write_atomic(fs, f"{folder}/data/parts/{_part_name(chunk)}", json.dumps(part).encode())
    return {"clips": np.array([chunk.hi - chunk.lo])}


def _generate(work: _Work, chunk: _Chunk, rows: list[dict], part: dict[str, Any], fs: Any, folder: str) -> None:
    """Write generated clips as H.264 files under data/clips, clouds and images as a parquet shard."""
    sizes, packed = Sizes(work.data.size, work.data.frames, work.data.points), []
    generate = MODALITIES[work.card.sample].generate
    assert generate is not None  # a card of layout `generated` has a modality that can be generated
    shard = shard_of(chunk.split, chunk.number)
    for row in rows:
        made = generate(row["number"], work.data.seed, sizes)
        path, place = f"{chunk.split}/{row['number']:06d}{made.ending}", {}
        if made.alone:
            path = f"clips/{path}"
            storage.write_atomic(fs, f"{folder}/data/{path}", made.data)
        else:
            place = {"shard": shard, "row": len(packed)}
            packed.append({"path": path, "label": made.label, "data": made.data})
        part["rows"].append({"path": path, "label": made.label, **made.shape, **place})
        part["bytes_out"] += len(made.data)
    if packed:
        note_places(part, shard, write_shard(fs, f"{folder}/data/{shard}", packed))


def _convert(work: _Work, chunk: _Chunk, rows: list[dict], part: dict[str, Any], fs: Any, folder: str) -> None:
    """Read every file to its end, and pack the good ones into parquet shards."""
    packed_here = work.pack or MODALITIES[work.card.sample].stored
    shard = shard_of(chunk.split, chunk.number) if packed_here else ""
    rows = [{**row, "split": chunk.split} for row in rows]
    with Decoder(timeout_s=work.timeout_s) as decoder:
        for name, packed in itertools.groupby(_pack(work, rows, part, shard, decoder), lambda one: one[0]):
            places = MODALITIES[work.card.sample].write(fs, f"{folder}/data/{name}", (row for _, row in packed))
            note_places(part, name, places)


def _pack(
    work: _Work, rows: list[dict], part: dict[str, Any], shard: str, decoder: Decoder
) -> Iterator[tuple[str, dict]]:
    """Yield the rows of a chunk one by one (none without a shard), each with the name of its shard; there are several
    shards if the modality limits their rows. Samples and failures are recorded in `part`."""
    modality = MODALITIES[work.card.sample]
    convert, most = BY_LAYOUT.get(work.card.layout) or modality.convert, modality.rows_per_shard
    pack = None if work.pack is None else Pack(**work.pack.model_dump())
    raw = Raw(work.root, work.card, pack, work.data.copies, work.data.seed, work.timeout_s, work.text, work.vocabulary)
    packed, number, first = 0, 0, shard.removesuffix(".parquet")
    for row in rows:
        try:
            for made in convert(raw, row, decoder):
                if most:
                    part["tried"] = part.get("tried", 0) + 1
                if isinstance(made, Bad):
                    part["bad" if made.fails else "left_out"].append({"path": made.path, "reason": made.reason})
                    continue
                if most and packed == most:
                    number, packed = number + 1, 0
                    shard = f"{first}-{number:04d}.parquet"
                place = {"shard": shard, "row": packed} if shard else {"shard": row["shard"], "row": row["row"]}
                label = row["label"] if made.label is None else made.label
                part["rows"].append({"path": made.path, "label": label, **made.shape, **place})
                part["left_out"] += [{"path": path, "reason": reason} for path, reason in made.left_out.items()]
                if made.notes:
                    part.setdefault("notes", []).append(f"{row['path']}: {made.notes}")
                part["bytes_in"] += made.bytes_in
                if shard:
                    packed += 1
                    part["bytes_out"] += len(made.data)
                    part["psnr"] += [] if made.psnr is None else [made.psnr]
                    yield shard, {"path": made.path, "label": label, "data": made.data}
            if work.card.layout == "kitti":
                part["objects"].append(
                    {"image": row["path"], "objects": list(map(vars, scan_objects(raw, row["path"])))}
                )
        except (BadSample, FileNotFoundError) as error:
            reason = str(error) if isinstance(error, BadSample) else "no such file"
            part["bad"].append({"path": row["path"], "reason": reason})
