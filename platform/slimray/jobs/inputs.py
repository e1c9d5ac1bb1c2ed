"""From the `data:` section of a job to splits and recipes: what train and evaluate read, and how samples are prepared.

`DataSpec` is what a user writes. `embed` puts the dataset card into the section, so that the resolved job says all and
workers read no folder; `open_splits` reads the indexes; `make_recipe` says how a sample becomes a clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from slimray import runs
from slimray.data import cards
from slimray.data.video import ClipRecipe
from slimray.spec import Spec, UserError, parse
from slimray.storage import absolute, join

AVERAGE_NUM_CROPS = Literal[1, 3, 5, 10]


class DataSpec(Spec):
    """Which dataset, and how a sample is prepared. Give `card` (with `root`) or `run` (a finished `prepare`)."""

    card: str | dict[str, Any] | None = None
    """Dataset card: its name, the path of its YAML, or the card itself."""
    run: str | None = None
    """A `prepare` run to read, by name or URI, in place of `card`."""
    root: str | None = None
    """Folder of the dataset: a path, s3:// or gs://."""
    train: str = "train"
    """Split to train on."""
    val: str | None = "val"
    """Split to validate on; null validates never."""
    size: int = Field(224, ge=16, le=1024)
    """Side of the square input in pixels."""
    resize: int | None = None
    """Short side that frames get before a centre or test crop; default 8/7 of `size` (256 for 224)."""
    sampling: Literal["uniform", "dense"] = "uniform"
    """Frames: one per segment of the clip (TSN), or `num_segments` out of a window of 64 (I3D)."""
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """Sides of the training crop as parts of the short side."""
    flip: bool = True
    """Mirror half of the training clips, as far as the card allows it; labels follow the card's map."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Largest part of the training files that may fail to decode before the run ends."""
    decode_timeout_s: float = Field(30, gt=0)
    """Longest time a file may take to decode; then its decoder is killed and the file is quarantined."""
    record_samples: bool = False
    """Write which samples each step consumed to `samples/` of the run, to audit that each is seen once per epoch."""


@dataclass(frozen=True)
class Splits:
    """The dataset of a job: where its files lie, its card, and an index per split name."""

    root: str
    card: cards.Card
    tables: dict[str, pa.Table]

    @property
    def fingerprint(self) -> str:
        """A digest of all indexes, in the order of the split names."""
        return "-".join(cards.fingerprint(self.tables[name])[:16] for name in sorted(self.tables))


def embed(data: DataSpec, where: str, search: Sequence[Path], prepared: dict[str, dict[str, Any]]) -> DataSpec:
    """Return `data` with its card embedded; UserError for none or two sources, or a card that is not there.

    `prepared` maps the names of `prepare` documents earlier in the same file to their cards.
    """
    if (data.card is None) == (data.run is None):
        raise UserError(f"{where}: data: give either card (a dataset card) or run (a prepare run)")
    if data.card is not None:
        card = embed_card(data.card, data.root, where, search)
        return data.model_copy(update={"card": card.model_dump(mode="json", exclude_defaults=True)})
    if data.run in prepared:
        return data.model_copy(update={"card": prepared[data.run]})
    return data


def embed_card(card: str | dict[str, Any], root: str | None, where: str, search: Sequence[Path]) -> cards.Card:
    """The dataset card that a job names or holds, its classes read from the dataset if they are known only there."""
    found = cards.load_card(card, search) if isinstance(card, str) else parse(cards.Card, card, f"{where}: data.card")
    return cards.complete(found, root or found.root)


def open_splits(data: DataSpec, where: str, storage: str, names: Sequence[str]) -> Splits:
    """Read the indexes of the splits `names`; UserError with the field when the dataset or the run is not there."""
    if data.run is not None:
        run = runs.find_run(data.run, storage)
        status = runs.read_status(run)
        if status is None or status.state != "finished":
            raise UserError(f"{where}: data.run: {data.run!r} has not finished: run it first")
        folder = join(run.uri, "data")
        card = cards.load_card(join(folder, "card.yaml"), [])
        tables = {name: cards.read_split(card, name, folder) for name in names}
        return Splits(card.root or folder, card, tables)  # an index of files that were probed, not packed, is elsewhere
    assert isinstance(data.card, dict)  # embedded when the job was loaded
    card = parse(cards.Card, data.card, f"{where}: data.card")
    root = data.root or card.root
    if not root:
        raise UserError(f"{where}: data.root: is required, the folder where {card.name} lies")
    root = absolute(root)
    return Splits(root, card, {name: cards.read_split(card, name, root) for name in names})


def make_recipe(data: DataSpec, card: cards.Card, num_segments: int, mode: str, **options: Any) -> dict[str, Any]:
    """The plain form of the ClipRecipe of a split: `mode` "train", "val" or "test"; `options` override its fields."""
    fields: dict[str, Any] = {
        "num_segments": num_segments,
        "size": data.size,
        "resize": data.resize or round(data.size * 8 / 7),
        "sampling": data.sampling,
        "mode": mode,
        "scales": data.scales,
        "flip": data.flip and mode == "train" and card.flip != "never",
        "flip_labels": card.flip_labels(),
    }
    return ClipRecipe(**(fields | options)).to_dict()
