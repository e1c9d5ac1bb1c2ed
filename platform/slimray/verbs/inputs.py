"""From the `data:` section of a job to splits and recipes: what train and evaluate read, and how samples are prepared.

`DataSpec` is what a user writes. `embed` puts the dataset card into the section, so that the resolved job says all and
workers read no folder; `open_splits` reads the indexes; `make_recipe` says how a file becomes a sample. `packaged` is
where the examples are that came with slimray. No Ray here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

import slimray
from slimray import runs
from slimray.data.bytes import read_whole
from slimray.data.cards import Card, load_card
from slimray.data.images.pictures import ImageRecipe
from slimray.data.index import fingerprint
from slimray.data.lists import complete, read_split
from slimray.data.points.recipe import PointRecipe
from slimray.data.samples import BadSample
from slimray.data.video.clips import ClipRecipe
from slimray.spec import Spec, UserError, did_you_mean, located, parse
from slimray.storage import absolute, join, open_uri


class PointsSpec(Spec):
    """How a sample is made of a cloud of points (arXiv 1907.03739; augmentation as in 2206.04670)."""

    num_points: int = Field(1024, ge=4, le=1_000_000)
    """Points of a sample, drawn anew each epoch."""
    channels: tuple[str, ...] = ()
    """Features beside x y z: `normals` (estimated where the files have none), `colors`, `intensity`, ..."""
    one_hot: int = Field(0, ge=0)
    """Number of shapes whose one-hot is appended to the channels (16 for ShapeNet part); 0 appends none."""
    normalize: Literal["sphere", "block", "none"] = "sphere"
    """`sphere`: centred, largest radius 1; `block`: middle of x and y and lowest z to 0, in metres; or as it is."""
    replace: bool = False
    """Draw points with replacement always, not only where they are too few."""
    rotate_z: float = Field(0.0, ge=0, le=180)
    """Training clouds are turned about z by up to so many degrees to either side."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of the factor by which training clouds are scaled."""
    flip: bool = False
    """Mirror x of half of the training clouds."""
    jitter: float = Field(0.0, ge=0)
    """Standard deviation of noise on training coordinates."""
    jitter_clip: float = Field(0.05, ge=0)
    """Largest noise."""
    color_drop: float = Field(0.0, ge=0, le=1)
    """Chance that a training cloud loses its colors."""
    published_shift: bool = False
    """Move training frustums by 0.8 times their distance from the axis: a slip in KITTI's published numbers."""


class ImagesSpec(Spec):
    """How training images are varied, beside `flip` (arXiv 1908.09791)."""

    area: tuple[float, float] = ImageRecipe.scale
    """Range of the training crop's share of the picture's area; `[1, 1]` takes all of it."""
    ratio: tuple[float, float] = ImageRecipe.ratio
    """Range of the training crop's width over its height, before it is made square."""
    brightness: float = Field(ImageRecipe.brightness, ge=0, le=1)
    """Largest relative change of brightness."""
    saturation: float = Field(ImageRecipe.saturation, ge=0, le=1)
    """Largest relative change of saturation."""

    @model_validator(mode="after")
    def _ranges_fit(self) -> "ImagesSpec":
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area: must be a range above 0 and up to 1, got {list(self.area)}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio: must be a range above 0, got {list(self.ratio)}")
        return self


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
    resize: int | None = Field(None, ge=16)
    """Short side that frames and images get before a centre or test crop; default 8/7 of `size` (256 for 224)."""
    sampling: Literal["uniform", "dense"] = "uniform"
    """Frames: one per segment of the clip (TSN), or `num_segments` out of a window of 64 (I3D)."""
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """Sides of the training crop as parts of the short side."""
    flip: bool = True
    """Mirror half of the training clips or images, as far as the card allows it; labels follow the card's map."""
    reader: Literal["pyav", "decord"] = "pyav"
    """What decodes videos. PyAV gives the frame that was asked for, or none; decord 0.6 at times another one."""
    images: ImagesSpec = ImagesSpec.model_validate({})
    """How training images are varied, in place of `scales`."""
    points: PointsSpec = PointsSpec.model_validate({})
    """How samples of clouds are made, in place of the fields about frames above."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Largest part of the training files that may fail to decode before the run ends."""
    decode_timeout_s: float = Field(30, gt=0)
    """Longest time a file may take to decode; then its decoder is killed and the file is quarantined."""
    record_samples: bool = False
    """Write which samples each step consumed to `samples/` of the run, to audit that each is seen once per epoch."""

    @model_validator(mode="after")
    def _pixels_fit(self) -> "DataSpec":
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize: must be at least size ({self.size}), got {self.resize}")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError(f"scales: must be numbers above 0 and at most 1, got {list(self.scales)}")
        return self


@dataclass(frozen=True)
class Splits:
    """The dataset of a job: where its files lie, its card, and an index per split name."""

    root: str
    card: Card
    tables: dict[str, pa.Table]

    @property
    def fingerprint(self) -> str:
        """A digest of all indexes, in the order of the split names."""
        return "-".join(fingerprint(self.tables[name])[:16] for name in sorted(self.tables))


def packaged(folder: str) -> Path:
    """The folder `jobs`, `datasets` or `cluster` that came with slimray: within the package, else of its checkout."""
    package = Path(slimray.__file__).resolve().parent
    inside = package / "examples" / folder
    return inside if inside.is_dir() else package.parents[1] / folder


def embed(data: DataSpec, where: str, search: Sequence[Path], prepared: Mapping[str, dict[str, Any]]) -> DataSpec:
    """Return `data` with its card embedded; UserError for none or two sources, or a card that is not there.

    `prepared` maps the names of `prepare` documents earlier in the same file to their cards. A section that was
    resolved before, a run with its card, is taken as it is.
    """
    if data.run is not None and (data.card is None or isinstance(data.card, dict)):
        return data.model_copy(update={"card": prepared[data.run]}) if data.run in prepared else data
    if data.card is None or data.run is not None:
        raise UserError(f"{where}: data: give either card (a dataset card) or run (a prepare run)")
    card = embed_card(data.card, data.root, where, search)
    return data.model_copy(update={"card": card.model_dump(mode="json", exclude_defaults=True)})


def embed_card(card: str | dict[str, Any], root: str | None, where: str, search: Sequence[Path]) -> Card:
    """The dataset card that a job names or holds, its classes read from the dataset if they are known only there."""
    try:
        found = load_card(card, search) if isinstance(card, str) else parse(Card, card, f"{where}: data.card")
    except UserError as error:
        raise UserError(located(str(error), f"{where}: data.card")) from None
    try:
        return complete(found, root or found.root)
    except UserError as error:
        raise UserError(located(str(error), f"{where}: data.root")) from None


def open_splits(data: DataSpec, where: str, storage: str, names: Sequence[str]) -> Splits:
    """Read the indexes of the splits `names`; UserError with the field when the dataset or the run is not there."""
    if data.run is not None:
        folder = join(finished_run(data.run, storage, "prepare", "dataset", f"{where}: data.run").uri, "data")
        card = load_card(join(folder, "card.yaml"), [])
        root = card.root or folder  # an index of files that were probed, not packed, tells of files elsewhere
    else:
        assert isinstance(data.card, dict)  # embedded when the job was loaded
        card = parse(Card, data.card, f"{where}: data.card")
        root = folder = absolute(data.root or card.root or "")
        if card.layout != "generated" and not (data.root or card.root):
            raise UserError(f"{where}: data.root: is required, the folder where {card.name} lies")
        if card.sample in ("points", "frustum") and card.layout not in ("generated", "index"):
            raise UserError(
                f"{where}: data.card: clouds are read by a prepare job first: write data: {{run: NAME}} of it"
            )
    try:
        require_splits(card.name, list(card.splits), names)
        return Splits(root, card, {name: read_split(card, name, folder) for name in names})
    except UserError as error:
        raise UserError(located(str(error), f"{where}: data")) from None


def require_splits(dataset: str, known: Sequence[str], names: Sequence[str]) -> None:
    """Raise UserError for the first of `names` that is no split of the dataset."""
    for name in names:
        if name not in known:
            raise UserError(f"{dataset} has no split {name!r}{did_you_mean(name, known)}")


def absent_samples(table: pa.Table, root: str, count: int = 3) -> list[str]:
    """The paths of those of `count` samples, spread evenly over an index, whose files are not there."""
    fs, folder = open_uri(root)
    absent = []
    for place in np.unique(np.linspace(0, table.num_rows - 1, count).round().astype(int)):
        try:
            read_whole(fs, folder, table.slice(int(place), 1).to_pylist()[0])
        except FileNotFoundError as error:
            absent.append(str(error))
        except BadSample:
            continue
    return absent


def finished_run(name: str, storage: str, kind: str, holds: str, field: str) -> runs.Run:
    """The finished run of that `kind` that `field` names (`x.yaml (name): data.run`); it `holds` what is wanted.

    UserError, with the field, if it is not there, of another kind, or has not finished.
    """
    try:
        run = runs.find_run(name, storage)
        found, status = runs.read_job(run).get("kind"), runs.read_status(run)
    except UserError as error:
        raise UserError(located(str(error), field)) from None
    if found != kind:
        raise UserError(f"{field}: {name!r} is no {kind} run (kind: {found}), it holds no {holds}")
    if status is None or status.state != "finished":
        raise UserError(f"{field}: {name!r} has not finished: run it first")
    return run


def make_recipe(data: DataSpec, card: Card, num_segments: int, mode: str, **options: Any) -> dict[str, Any]:
    """The plain recipe of a split's samples: `mode` "train", "val" or "test"; `options` override its fields.

    `num_segments` is for clips only.
    """
    flip = data.flip and mode == "train" and card.flip != "never"
    if card.sample == "image":
        varied = data.images
        fields: dict[str, Any] = {"size": data.size, "resize": data.resize or 0, "mode": mode, "flip": flip}
        fields |= {"scale": varied.area, "ratio": varied.ratio, "flip_labels": card.flip_labels()}
        fields |= {"brightness": varied.brightness, "saturation": varied.saturation}
        return ImageRecipe(**(fields | options)).to_dict()
    if card.sample in ("points", "frustum"):
        given: dict[str, Any] = data.points.model_dump(exclude={"one_hot"})
        if card.sample == "frustum":
            given |= {"channels": ("intensity",), "num_shapes": card.num_classes, "normalize": "none"}
        else:
            given |= {"num_shapes": data.points.one_hot, "per_point": card.labels == "point"}
        given |= {"mode": mode, "kind": card.sample, **options}
        return PointRecipe(**given).to_dict()
    fields = {
        "num_segments": num_segments,
        "size": data.size,
        "resize": data.resize or round(data.size * 8 / 7),
        "sampling": data.sampling,
        "mode": mode,
        "scales": data.scales,
        "flip": flip,
        "flip_labels": card.flip_labels(),
        "reader": data.reader,
    }
    return ClipRecipe(**(fields | options)).to_dict()
