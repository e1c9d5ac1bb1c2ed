"""Dataset cards: descriptions of datasets, with their splits and classes.

A `Card` is YAML that states where the lists of a dataset are and how to read them (lists.py). `load_card` finds one.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from slimray import storage
from slimray.data.images.image_sets import IDX_ENDINGS
from slimray.data.labels import LABELS, Labelling
from slimray.data.modalities import MODALITIES
from slimray.data.paths import CLASS, COLUMN, LABELS_OF
from slimray.data.text.spec import PreparedText
from slimray.spec import Spec, UserError, did_you_mean, parse, parse_yaml, read_yaml

MAX_CLASSES = 100_000
# layouts whose splits may consist of several places
_PATTERNS = ("files", "s3dis", "shapenet_part", "cifar10", "cifar100", "texts")


class Card(Spec):
    """Description of a dataset: its source, its splits and its classes."""

    name: str = Field(min_length=1)
    """Name of the dataset."""
    description: str = ""
    """Content of the dataset, and what a user should know before trusting it."""
    source: str = ""
    """Origin of the dataset: address and citation."""
    licence: str = ""
    """Terms of use, as far as they are known."""
    layout: Literal[
        "list", "folders", "files", "something_v2", "hmdb51", "s3dis", "shapenet_part", "kitti", "cifar10", "cifar100",
        "idx", "visual_wake_words", "texts", "generated", "index",
    ]  # fmt: skip
    """`list`: text or CSV; `folders`: a folder per class; `files`: path patterns; `something_v2`: JSON lists;
    `hmdb51`: a list per class; `s3dis`: rooms, a file per object; `shapenet_part`: JSON lists of shapes; `kitti`: lists
    of scans of the object benchmark; `cifar10`, `cifar100`: the binary releases; `idx`: MNIST's files, gzipped or not;
    `visual_wake_words`: instance annotations of COCO; `texts`: text files with a sample per line, gzipped or not;
    `generated`: made by a `prepare` job; `index`: written by a `prepare` job."""
    root: str | None = None
    """Folder of the dataset, if it is always the same; `data.root` of a job overrides it."""
    splits: dict[str, str | tuple[str | int, ...]] = Field(min_length=1)
    """Location of each split under the root: its list (`list`, `something_v2`, `index`) or lists (`shapenet_part`), its
    annotations (`visual_wake_words`), the folder with its class folders (`folders`; `.` is the root), `[pattern of the
    lists, mark of its lines]` (`hmdb51`), its text files, in pairs if translations are in separate files (`texts`:
    `[train.en.gz, train.de.gz]`; a .tsv or .parquet file holds both), `[pictures, labels]` (`idx`), or one or several
    patterns of its files (`files`, `s3dis`, `cifar10`). In a pattern, `*` and `[0-7]` match characters within one
    component of a path, the component `{class}` matches any name and makes it the class, and `{*}` in the last
    component makes all files of a folder one sample: `{class}/train/*.off`, `Area_[12346]/*/Annotations/{*}.txt`."""
    delimiter: str | None = Field(None, min_length=1, max_length=1)
    """Character between the columns of a list; default: white space. A path may then contain blanks only if it is the
    first column and has the extension of a sample's file (`my clip.mp4 3`)."""
    columns: tuple[str, ...] | Literal["header"] = ("path", "label")
    """Columns of a list; `header`: its first line names them. Known columns are `path`, `label` (a number from 0, or a
    name), `frames` (their number), `first` and `last` (picture numbers); others can be used in `file`, and `*` at the
    end stands for any further columns. Without `label`, the folder that contains the file names the class."""
    file: str = "{path}"
    """File of a sample under the root, filled in from the columns and `{split}`; `{start:06d}` is column `start` padded
    with zeros to six digits. `{00001..}` makes the sample a folder of pictures numbered from there."""
    classes: tuple[str, ...] | str | None = None
    """Names of the classes in the order of their numbers, or the file under the root that holds them: one name per line
    (numbered or not), or JSON. Default: the names in the lists, sorted, or as many numbers as the lists use."""
    num_classes: int = Field(0, ge=0, le=MAX_CLASSES)
    """Number of classes; 0 means as many as are named or found in the lists."""
    flip: Literal["always", "labels", "never"] = "always"
    """Mirroring of clips and images in training: `always`; with the `labels` of `flip_pairs` exchanged; or `never`,
    because left and right distinguish classes."""
    flip_pairs: tuple[tuple[int | str, int | str], ...] = ()
    """Pairs of classes, by number or name, that mirroring turns into each other."""

    sample: str = Field("clip", json_schema_extra={"enum": list(MODALITIES)})
    """Modality of a sample: a clip of a video, an image, a cloud of points, the points behind a 2D box, or text."""
    channels: Literal[1, 3] = 3
    """Channels of images as networks take them: 3 for red, green and blue, or 1 for grayscale."""
    labels: Literal["sample", "point", "none"] = "sample"
    """Unit that has a label: each sample, or each of its points (the label in a list is then its shape, from 0)."""
    task: str | None = None
    """Task, the prediction to learn: `classify`, `segment`, `translate`, ...; `slimray explain tasks` lists them.
    Default: follows from `sample`, `labels` and `parts`."""
    point_columns: tuple[str, ...] = ()
    """Columns of text, .npy and .bin point files: x y z, nx ny nz, r g b, intensity, label; `-` skips one. If files
    name their columns, `label=NAME` chooses between two with the same meaning. `decimal=comma` (or point) and
    `delimiter=semicolon` (or comma, tab, blank) state how numbers are written, if the text leaves that open."""
    point_labels: str | None = None
    """File under the root with a label for each point; `{name}` is the cloud's path without its extension, `{folder}`
    and `{stem}` are its two halves: `{folder}/../labels/{stem}.label`."""
    label_map: dict[int, int] = {}
    """Class of each point label in the files; labels that are not listed do not count. Empty: labels are classes."""
    tile: float | None = Field(None, gt=0)
    """Side, in the unit of the coordinates, of the x-y squares into which `prepare` cuts each cloud, each of them one
    sample; for scenes that are larger than a sample. null keeps clouds whole."""

    sides: Literal[1, 2] = 1
    """Texts per sample: 1, or 2 for a sentence and its translation (`sample: text`)."""
    text_columns: tuple[str, ...] = ()
    """Columns of .tsv and .parquet files that hold the texts: names, or numbers from 1 for a .tsv without a header
    line. Default: the first ones; for .parquet `source` and `target`, or `text`."""
    text: PreparedText | None = None
    """Tokens that a `prepare` job made of the texts."""

    parts: dict[str, int] = {}
    """Shapes whose parts are the classes, in order, with the number of parts of each (ShapeNet: `Airplane: 4, Bag: 2,
    ...`); evaluation by votes then chooses among a shape's own parts, and computes IoU per shape."""
    detections: dict[str, str] = {}
    """File under the root with 2D boxes that a detector found in the images of a split, used instead of those in the
    labels: lines `path type score x1 y1 x2 y2`, type 1 pedestrian, 2 car, 3 cyclist (layout `kitti`)."""

    @model_validator(mode="before")
    @classmethod
    def _count_classes(cls, document: Any) -> Any:
        named = document.get("classes") if isinstance(document, dict) else None
        if isinstance(named, list | tuple) and not document.get("num_classes"):
            return {**document, "num_classes": len(named)}
        return document

    @model_validator(mode="after")
    def _fields_fit(self) -> "Card":
        for split, place in self.splits.items():
            several = isinstance(place, tuple)
            if self.layout == "hmdb51":
                form, fits = "[pattern, mark]", several and [type(one) for one in place] == [str, int]
            elif self.layout == "idx":
                form, fits = "[pictures, labels], names that end in ubyte", self._is_idx(place)
            elif self.layout in _PATTERNS:
                form, fits = "a path or several", all(isinstance(one, str) for one in place) and len(place) > 0
            else:
                form, fits = "one path", not several
            if not fits:
                raise ValueError(f"splits.{split}: must be {form} for layout {self.layout}")
            if self.layout == "files":
                self._require_class(split)
        if isinstance(self.classes, tuple):
            twice = [name for name, count in Counter(self.classes).items() if count > 1 or not name]
            if twice:
                raise ValueError(f"classes: {twice[0]!r} is empty or named twice")
            if len(self.classes) != self.num_classes:
                raise ValueError(f"num_classes: {self.num_classes}, but classes names {len(self.classes)}")
        if (self.flip == "labels") != bool(self.flip_pairs):
            raise ValueError("flip_pairs: require flip: labels, and flip: labels requires flip_pairs")
        if self.sample not in MODALITIES:
            raise ValueError(f"sample: unknown kind of sample {self.sample!r}{did_you_mean(self.sample, MODALITIES)}")
        owner = next((name for name, row in MODALITIES.items() if self.layout in row.layouts), self.sample)
        if owner != self.sample:
            raise ValueError(f"sample: must be {owner} for layout {self.layout}")
        MODALITIES[self.sample].require(self)
        for split in self.detections:
            if self.layout != "kitti" or split not in self.splits:
                raise ValueError(f"detections: {split!r} is not a split of a card of layout kitti")
        if self.parts and (not self.labelling.per_point or sum(self.parts.values()) != self.num_classes):
            raise ValueError(f"parts: {sum(self.parts.values())} in total, but the card has {self.num_classes} classes")
        if self.layout == "visual_wake_words" and not (isinstance(self.classes, tuple) and len(self.classes) == 2):
            raise ValueError("classes: must be two: a name for images without the object, and its category in COCO")
        if self.layout in ("s3dis", "shapenet_part") and not self.labelling.per_point:
            raise ValueError(f"labels: must be point for layout {self.layout}")
        for name in COLUMN.findall(self.point_labels or ""):
            if name[0] not in LABELS_OF:
                raise ValueError(f"point_labels: {name[0]!r} is not known{did_you_mean(name[0], LABELS_OF)}")
        if self.labelling.per_point and not (self.classes or self.num_classes):
            raise ValueError("classes: must be named, or num_classes given, where labels belong to points")
        mirrored = [one for pair in self.flip_pairs for one in pair]
        if len(set(mirrored)) != len(mirrored):
            raise ValueError("flip_pairs: a class is in more than one pair")
        return self

    @staticmethod
    def _is_idx(place: str | tuple[str | int, ...]) -> bool:
        names = place if isinstance(place, tuple) else ()
        return len(names) == 2 and all(isinstance(one, str) and one.endswith(IDX_ENDINGS) for one in names)

    @property
    def labelling(self) -> Labelling:
        """The row of LABELS that `labels` names."""
        return LABELS[self.labels]

    def _require_class(self, split: str) -> None:
        for pattern in self.places(split):
            if (CLASS in pattern.split("/")) != self.labelling.per_sample:
                reason = f"must have a component {CLASS}, which names the class of a file"
                if not self.labelling.per_sample:
                    reason = f"must not have a component {CLASS}, files have no class (labels: {self.labels})"
                raise ValueError(f"splits.{split}: {pattern!r}: {reason}")

    def places(self, split: str) -> list[str]:
        """Return the lists or patterns of a split."""
        place = self.splits[split]
        return [place] if isinstance(place, str) else [one for one in place if isinstance(one, str)]

    def class_names(self) -> list[str]:
        """Return the classes in the order of their numbers, or the numbers as text if the names are not known."""
        return list(self.classes) if isinstance(self.classes, tuple) else [str(i) for i in range(self.num_classes)]

    def flip_labels(self) -> tuple[tuple[int, int], ...]:
        """Return the pairs of labels that mirroring a clip exchanges; raise UserError for an unknown class."""
        return tuple((self._number(a), self._number(b)) for a, b in self.flip_pairs)

    def prepared(self, splits: Sequence[str], root: str | None) -> "Card":
        """Return the card that a `prepare` job writes: with an index `SPLIT.parquet` per split beside the card.

        `root` is the folder of the files themselves if it is another one (they were probed, not packed).
        """
        kept = {
            "name",
            "description",
            "source",
            "licence",
            "num_classes",
            "flip",
            "flip_pairs",
            "sample",
            "channels",
            "labels",
            "parts",
            "task",
            "sides",
        }
        document = self.model_dump(include=kept | ({"classes"} if isinstance(self.classes, tuple) else set()))
        if root is not None and "://" not in root:
            root = str(Path(root).expanduser().absolute())
        places = {split: f"{split}.parquet" for split in splits}
        return Card.model_validate(document | {"layout": "index", "root": root, "splits": places})

    def _number(self, name: int | str) -> int:
        names = self.class_names()
        if isinstance(name, str):
            if not isinstance(self.classes, tuple):
                raise UserError(
                    f"{self.name}: flip_pairs: the number of {name!r} is not known without the dataset: set data.root"
                )
            if name in names:
                return names.index(name)
        elif 0 <= name < (self.num_classes or MAX_CLASSES):
            return name
        raise UserError(f"{self.name}: flip_pairs: {name!r} is not a class{closest(str(name), names)}")


def load_card(name_or_path: str, search: Sequence[Path]) -> Card:
    """Return the card NAME.yaml of the folders `search`, or the one at a path or URI (with a "/" or ".yaml" in it).

    A path is also tried under the folders. Job files in the folders are ignored. Raises UserError if there is no card.
    """
    if "/" in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        places = [name_or_path] + ([] if "://" in name_or_path else [str(folder / name_or_path) for folder in search])
        for place in places:
            fs, path = storage.open_uri(place)
            try:
                text = storage.read_bytes(fs, path).decode("utf-8")
            except FileNotFoundError:
                continue
            except UnicodeDecodeError:
                raise UserError(f"{place}: is not UTF-8 text, so it is not a dataset card") from None
            return _one_card(parse_yaml(text, place), place)
        raise UserError(f"{name_or_path}: no such dataset card")
    for folder in search:
        path = folder / f"{name_or_path}.yaml"
        if path.is_file() and not _holds_jobs(path):
            return _one_card(read_yaml(path), str(path))
    known = {path.stem for folder in search for path in folder.glob("*.yaml") if not _holds_jobs(path)}
    raise UserError(f"there is no dataset card {name_or_path!r}{did_you_mean(name_or_path, known)}")


def _one_card(documents: list[dict[str, Any]], where: str) -> Card:
    if len(documents) != 1:
        raise UserError(f"{where}: holds {len(documents)} documents, but a dataset card is exactly one")
    return parse(Card, documents[0], where)


def _holds_jobs(path: Path) -> bool:
    try:
        return any("kind" in document for document in read_yaml(path))
    except UserError:  # reported when the file is loaded by name
        return False


def closest(name: str, names: Any) -> str:
    """Return the hint of `did_you_mean`, or "" if it is long because there are many `names`."""
    hint = did_you_mean(name, names)
    return hint if len(hint) < 200 else ""
