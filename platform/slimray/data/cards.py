"""Dataset cards and indexes: what a dataset is, which samples its splits hold, the bytes of one sample.

A `Card` is YAML that says where the lists of a dataset are and how to read them. `complete` adds the classes that only
the dataset knows, `read_split` makes an index of a split: an Arrow table, a row per sample. `read_whole` and
`read_sample` fetch the bytes of a row: a video or point file, the numbered pictures of a folder
(`clip/{00001..00300}.jpg`, one path for all of them) or all its files (`room/{*}.txt`) as a stored ZIP, or one clip of
a packed shard. A shard holds one clip per row group, so that a clip is one range read. A new list format is one
function of READERS.
"""

import csv
import functools
import hashlib
import io
import json
import posixpath
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from slimray import storage
from slimray.data.images import image_sets
from slimray.data.points import point_sets
from slimray.data.video.clips import ClipRecipe, frame_indices, generators
from slimray.data.video.decoder import MAX_FRAMES, BadSample, zip_frames
from slimray.spec import Spec, UserError, did_you_mean, parse, parse_yaml, read_yaml
from slimray.storage import join

MAX_CLASSES = 100_000
SYNSETS = "synsetoffset2category.txt"
NUM_FOOTERS = 4096  # kept per process as written, some 11 kB for 64 clips; parsed they would take 170 kB

INDEX = pa.schema(
    [
        ("path", pa.string()),  # relative to the root; unique in a split
        ("label", pa.int64()),
        ("frames", pa.int32()),  # of a clip, points of a cloud; 0 = unknown, also below
        ("fps", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("shard", pa.string()),  # "" = a file, or a folder of pictures, of its own
        ("row", pa.int32()),  # row group in the shard, in a .bin the byte where the pixels begin; else -1
    ]
)
SHARD = pa.schema([("path", pa.string()), ("label", pa.int64()), ("data", pa.binary())])
UNKNOWN = {"frames": 0, "fps": 0.0, "width": 0, "height": 0, "shard": "", "row": -1}

_COLUMN = re.compile(r"\{([A-Za-z_]\w*)(?::0(\d\d?)d)?\}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PICTURES = re.compile(r"\{(\d{1,9})\.\.(\d{0,9})\}(?=[^/]*$)")
_ALL_FILES = "{*}"  # in the last part of a path
_CLASS = "{class}"  # a part of a pattern of layout `files`
_PATTERNS = ("files", "s3dis", "shapenet_part", "cifar10", "cifar100")  # a split may be found in several places
_LABELS_OF = ("name", "folder", "stem")  # what `point_labels` may say of a cloud's path


class Card(Spec):
    """A dataset: what it is, where its splits are listed, which classes it has."""

    name: str = Field(min_length=1)
    """Name of the dataset."""
    description: str = ""
    """What it shows, and what a user should know before trusting it."""
    source: str = ""
    """Where it comes from: address and citation."""
    licence: str = ""
    """Terms of use, as far as they are known."""
    layout: Literal[
        "list", "folders", "files", "something_v2", "hmdb51", "s3dis", "shapenet_part", "kitti", "cifar10", "cifar100",
        "visual_wake_words", "generated", "index",
    ]  # fmt: skip
    """`list`: text or CSV; `folders`: a folder per class; `files`: patterns of paths; `something_v2`: JSON lists;
    `hmdb51`: a list per class; `s3dis`: rooms, a file per object; `shapenet_part`: JSON lists of shapes; `kitti`: lists
    of scans of the object benchmark; `cifar10`, `cifar100`: the binary releases; `visual_wake_words`: instance
    annotations of COCO; `generated`: made by a `prepare` job; `index`: what a `prepare` job wrote."""
    root: str | None = None
    """Folder of the dataset, if it is always the same; `data.root` of a job goes before it."""
    splits: dict[str, str | tuple[str | int, ...]] = Field(min_length=1)
    """Where each split is found under the root: its list (`list`, `something_v2`, `index`) or lists (`shapenet_part`),
    its annotations (`visual_wake_words`), the folder of its class folders (`folders`; `.` = the root), `[pattern of the
    lists, mark of its lines]` (`hmdb51`), a pattern of its files or several (`files`, `s3dis`, `cifar10`). In a pattern
    `*` and `[0-7]` stand for characters of one part of a path, the part `{class}` for any name, which is the class, and
    `{*}` in the last part makes all files of a folder one sample: `{class}/train/*.off`,
    `Area_[12346]/*/Annotations/{*}.txt`."""
    delimiter: str | None = Field(None, min_length=1, max_length=1)
    """Character between the columns of a list; default white space, then paths have none."""
    columns: tuple[str, ...] | Literal["header"] = ("path", "label")
    """Columns of a list; `header`: its first line names them. Known are `path`, `label` (a number from 0, or a name),
    `frames` (how many), `first` and `last` (picture numbers); others serve `file`, and `*` at the end is whatever
    follows. Without `label` the folder that holds the file names the class."""
    file: str = "{path}"
    """File of a sample under the root, filled in from the columns and `{split}`; `{start:06d}` is column `start` with
    zeros up to six digits. `{00001..}` makes the sample a folder of pictures, numbered from there."""
    classes: tuple[str, ...] | str | None = None
    """Names of the classes in the order of their numbers, or the file under the root that holds them: a name a line
    (numbered or not) or JSON. Without it: the names in the lists, sorted, or as many numbers as the lists use."""
    num_classes: int = Field(0, ge=0, le=MAX_CLASSES)
    """Number of classes; 0 = as many as are named or found in the lists."""
    flip: Literal["always", "labels", "never"] = "always"
    """Whether training may mirror clips and images: always, with the labels of `flip_pairs` exchanged, or never: left
    and right tell classes apart."""
    flip_pairs: tuple[tuple[int | str, int | str], ...] = ()
    """Classes that become each other in a mirror, by number or name."""

    sample: Literal["clip", "image", "points", "frustum"] = "clip"
    """What a sample is: a clip of a video, an image, a cloud of points, or the points behind a 2D box."""
    labels: Literal["sample", "point"] = "sample"
    """Whether a label belongs to a sample, or to each of its points (the label of a list is then its shape, from 0)."""
    point_columns: tuple[str, ...] = ()
    """Columns of text, .npy and .bin point files: x y z, nx ny nz, r g b, intensity, label; `-` leaves one out."""
    point_labels: str | None = None
    """File under the root with a label for each point; `{name}` is the cloud's path without its extension, `{folder}`
    and `{stem}` are its two halves: `{folder}/../labels/{stem}.label`."""
    label_map: dict[int, int] = {}
    """Class of each label per point as the files have it; labels not named do not count. Empty: as they are."""
    tile: float | None = Field(None, gt=0)
    """Side, in the unit of the coordinates, of the squares of x and y into which `prepare` cuts each cloud, a sample
    each; for scenes that are larger than a sample. null keeps clouds whole."""

    parts: dict[str, int] = {}
    """Shapes whose parts are the classes, in order, and how many parts each has (ShapeNet: `Airplane: 4, Bag: 2, ...`);
    evaluation by votes then chooses among a shape's own parts, and counts IoU per shape."""
    detections: dict[str, str] = {}
    """File under the root with 2D boxes that a detector found in the images of a split, in place of those of the
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
            raise ValueError("flip_pairs: belong to flip: labels, neither goes without the other")
        of_points = self.labels == "point" or self.point_columns or self.point_labels or self.tile
        if self.sample in ("clip", "image") and of_points:
            raise ValueError("labels: point_columns, point_labels, tile and labels per point need sample: points")
        if (self.layout == "kitti") != (self.sample == "frustum") and self.layout != "index":
            raise ValueError("layout: kitti goes with sample: frustum, neither without the other")
        if self.sample == "frustum" and tuple(self.classes or ()) != point_sets.KITTI_CLASSES:
            raise ValueError(f"classes: frustums have [{', '.join(point_sets.KITTI_CLASSES)}], in this order")
        for split in self.detections:
            if self.layout != "kitti" or split not in self.splits:
                raise ValueError(f"detections: {split!r} is no split of a card of layout kitti")
        if self.parts and (self.labels == "sample" or sum(self.parts.values()) != self.num_classes):
            raise ValueError(f"parts: {sum(self.parts.values())} parts in all, the card has {self.num_classes} classes")
        if self.layout in ("cifar10", "cifar100", "visual_wake_words") and self.sample != "image":
            raise ValueError(f"sample: must be image for layout {self.layout}")
        if self.layout == "visual_wake_words" and not (isinstance(self.classes, tuple) and len(self.classes) == 2):
            raise ValueError("classes: must be two: a name for images without the object, and its category in COCO")
        if self.sample == "image" and (_PICTURES.search(self.file) or _ALL_FILES in str(self.splits)):
            raise ValueError("file: a sample is one image, no folder of them")
        if self.layout in ("s3dis", "shapenet_part") and self.labels == "sample":
            raise ValueError(f"labels: must be point for layout {self.layout}")
        for name in _COLUMN.findall(self.point_labels or ""):
            if name[0] not in _LABELS_OF:
                raise ValueError(f"point_labels: {name[0]!r} is not known{did_you_mean(name[0], _LABELS_OF)}")
        if self.labels == "point" and not (self.classes or self.num_classes):
            raise ValueError("classes: must be named, or num_classes given, where labels belong to points")
        mirrored = [one for pair in self.flip_pairs for one in pair]
        if len(set(mirrored)) != len(mirrored):
            raise ValueError("flip_pairs: a class stands in more than one pair")
        return self

    def _require_class(self, split: str) -> None:
        for pattern in self.places(split):
            if (_CLASS in pattern.split("/")) != (self.labels == "sample"):
                reason = f"{_CLASS} must be a part of it, it names the class of a file"
                if self.labels == "point":
                    reason = f"{_CLASS} has no place in it, labels belong to points"
                raise ValueError(f"splits.{split}: {pattern!r}: {reason}")

    def places(self, split: str) -> list[str]:
        """The lists or patterns of a split."""
        place = self.splits[split]
        return [place] if isinstance(place, str) else [one for one in place if isinstance(one, str)]

    def class_names(self) -> list[str]:
        """The classes in the order of their numbers; the numbers themselves where no names are known."""
        return list(self.classes) if isinstance(self.classes, tuple) else [str(i) for i in range(self.num_classes)]

    def flip_labels(self) -> tuple[tuple[int, int], ...]:
        """Pairs of labels that change places when a clip is mirrored; UserError for a class that there is not."""
        return tuple((self._number(a), self._number(b)) for a, b in self.flip_pairs)

    def prepared(self, splits: Sequence[str], root: str | None) -> "Card":
        """The card of this dataset as a `prepare` job leaves it: an index `SPLIT.parquet` per split, beside the card.

        `root` is where the files themselves lie if not there (they were probed, not packed).
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
            "labels",
            "parts",
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
                    f"{self.name}: flip_pairs: {name!r} has no number until the dataset is there (data.root)"
                )
            if name in names:
                return names.index(name)
        elif 0 <= name < (self.num_classes or MAX_CLASSES):
            return name
        raise UserError(f"{self.name}: flip_pairs: {name!r} is no class{_close(str(name), names)}")


# ---------------------------------------------------------------------------------------------- cards and indexes


def load_card(name_or_path: str, search: Sequence[Path]) -> Card:
    """Return the card NAME.yaml of the folders `search`, or the one at a path or URI (with a "/" or ".yaml" in it).

    A path is also tried under the folders. Job files that lie in the folders are passed over. UserError otherwise.
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
                raise UserError(f"{place}: is not UTF-8 text, so no dataset card") from None
            return _one_card(parse_yaml(text, place), place)
        raise UserError(f"{name_or_path}: there is no such dataset card")
    for folder in search:
        path = folder / f"{name_or_path}.yaml"
        if path.is_file() and not _holds_jobs(path):
            return _one_card(read_yaml(path), str(path))
    known = {path.stem for folder in search for path in folder.glob("*.yaml") if not _holds_jobs(path)}
    raise UserError(f"there is no dataset card {name_or_path!r}{did_you_mean(name_or_path, known)}")


def complete(card: Card, root: str | None) -> Card:
    """Return `card` with its classes as names, read from the dataset at `root` where the card does not list them.

    From its file of classes, else from the lists of all splits that are there: the names in them, sorted, or the
    numbers from 0 to the largest. Without a root the card is returned as it is.
    """
    if root is None or isinstance(card.classes, tuple) or card.layout in ("generated", "index"):
        return card
    if card.classes is None and card.labels == "point":
        return card
    fs, folder = storage.open_uri(root)
    if card.classes is not None:
        where = join(folder, card.classes)
        names = _parse_classes(_read_text(fs, folder, card.classes, f"the classes of {card.name}"), where)
    else:
        where = join(folder, "the lists")
        names = _list_classes(card, fs, folder)
    if card.num_classes and len(names) != card.num_classes:
        raise UserError(f"{where}: {len(names)} classes, the card {card.name} says num_classes: {card.num_classes}")
    return parse(Card, card.model_dump() | {"classes": names, "num_classes": len(names)}, where)


def read_split(card: Card, split: str, root: str) -> pa.Table:
    """Return the index of a split (columns of INDEX) in the order of its list; no sample is opened.

    UserError with file and line: an unknown split, a missing or malformed list, a path listed twice or leading out of
    the root, a label that is no class, a list without samples.
    """
    if split not in card.splits:
        raise UserError(f"{card.name}: unknown split {split!r}{did_you_mean(split, card.splits)}")
    if card.layout == "generated":
        raise UserError(f"{card.name}: is generated: write data: {{run: NAME}} of the prepare job that makes its clips")
    fs, folder = storage.open_uri(root)
    if card.layout == "index":
        return _read_index(card, split, fs, folder)
    card = complete(card, root)
    names = {name: number for number, name in enumerate(card.class_names())}
    rows: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for entry in READERS[card.layout](card, split, fs, folder):
        path, frames = _path_of(entry, card.file, split)
        if path in seen:
            raise UserError(f"{entry.where}: {path} is listed twice, before in {seen[path]}")
        seen[path] = entry.where
        label = _label_of(entry, names, card.name) if card.labels == "sample" else _shape_of(entry)
        rows.append({"path": path, "label": label, "frames": frames} | entry.place)
    if not rows:
        raise UserError(f"{join(folder, _place(card, split))}: lists no sample for split {split!r} of {card.name}")
    return index_table(rows)


def index_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows with at least path and label as a table with the columns of INDEX."""
    return pa.Table.from_pylist([UNKNOWN | row for row in rows], schema=INDEX)


def fingerprint(table: pa.Table) -> str:
    """A digest of an index, 64 hexadecimal digits: equal content in equal order, equal digest."""
    digest = hashlib.sha256()
    for column in INDEX:
        values = table.column(column.name)
        if pa.types.is_string(column.type):
            content = "\n".join(values.to_pylist()).encode()
        else:
            kind = np.dtype(column.type.to_pandas_dtype()).newbyteorder("<")
            content = values.to_numpy().astype(kind).tobytes()
        digest.update(f"{column.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ the bytes of a sample


def read_whole(fs: pafs.FileSystem, root: str, row: dict[str, Any]) -> bytes:
    """Return all bytes of the sample of an index row; pictures, or files of `{*}`, as a stored ZIP of all of them.

    FileNotFoundError: the file, folder or shard of the index is not there. BadSample: the folder is there, but a
    picture of it is missing; like a damaged file that costs this one sample, not the run. StorageError.
    """
    if row["shard"].endswith(".bin"):
        return image_sets.cifar_picture(_read_part(fs, join(root, row["shard"]), row["row"], image_sets.CIFAR_PIXELS))
    if row["shard"]:
        return _read_packed(fs, join(root, row["shard"]), row["row"])
    pictures = _pictures_of(fs, root, row)
    if pictures is not None:
        return _read_pictures(fs, pictures, range(pictures.count))
    if _ALL_FILES not in posixpath.basename(row["path"]):
        return _read_file(fs, join(root, row["path"]))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in read_files(fs, root, row["path"]).items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def read_files(fs: pafs.FileSystem, root: str, path: str) -> dict[str, bytes]:
    """Return the files that the path of a row with `{*}` stands for: name -> bytes, by name. Raises as `read_whole`."""
    folder, _, form = join(root, path).rpartition("/")
    names = _matching([info.base_name for info in storage.list_files(fs, folder)], form.replace(_ALL_FILES, "*"))
    if not names:
        raise FileNotFoundError(join(folder, form))
    return {name: _read_file(fs, join(folder, name)) for name in names}


def labels_path(card: Card, path: str) -> str:
    """The file with the labels of the points of the cloud at `path`; UserError where it could lead out of the root."""
    assert card.point_labels is not None
    name = path[: -len(posixpath.splitext(path)[1]) or None]
    known = {"name": name, "folder": posixpath.dirname(name) or ".", "stem": posixpath.basename(name)}
    filled = _COLUMN.sub(lambda match: known[match[1]], card.point_labels)
    return _inside(posixpath.normpath(filled), f"{card.name}: point_labels")


def read_sample(
    fs: pafs.FileSystem, root: str, row: dict[str, Any], recipe: ClipRecipe, key: tuple[int, int, int]
) -> bytes:
    """Return what a decoder needs to make the clip of `recipe` and `key` (seed, epoch, sample); raises as `read_whole`.

    Of a folder only the pictures that the decoder will draw with the same key.
    """
    pictures = None if row["shard"] else _pictures_of(fs, root, row)
    if pictures is None:
        return read_whole(fs, root, row)
    wanted = frame_indices(recipe, pictures.count, generators(key)[0])
    return _read_pictures(fs, pictures, sorted(set(wanted.tolist())))


def write_shard(fs: pafs.FileSystem, path: str, packed_rows: Iterable[dict[str, Any]]) -> None:
    """Write rows with path, label and data (bytes) as a parquet shard, a row group each, all at once or not at all.

    One row at a time is in memory. No compression, dictionary or statistics: videos do not shrink, and statistics would
    put them into the footer.
    """
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    options |= {"store_schema": False, "write_page_checksum": True}
    with tempfile.TemporaryDirectory(prefix="slimray-") as folder:
        local = Path(folder) / "shard.parquet"
        with pq.ParquetWriter(local, SHARD, **options) as writer:
            for row in packed_rows:
                writer.write_table(pa.Table.from_pylist([row], schema=SHARD))
        storage.write_atomic(fs, path, local)


@dataclass(frozen=True)
class _At:
    """A place on a filesystem as the key of a cache."""

    path: str
    fs: pafs.FileSystem = field(hash=False)  # compares, but cannot be hashed


@dataclass(frozen=True)
class _Pictures:
    """Numbered files: `head`, a number of at least `digits` digits from `first` on, `tail`."""

    head: str
    tail: str
    digits: int
    first: int
    count: int

    def path(self, index: int) -> str:
        return f"{self.head}{self.first + index:0{self.digits}d}{self.tail}"


def _read_file(fs: pafs.FileSystem, path: str) -> bytes:
    try:
        return storage.read_bytes(fs, path)
    except FileNotFoundError:
        raise FileNotFoundError(path) from None


def _read_part(fs: pafs.FileSystem, path: str, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start` on."""

    def read() -> bytes:
        try:
            with fs.open_input_file(path) as file:
                data = file.read_at(size, start)
        except FileNotFoundError:
            raise FileNotFoundError(path) from None
        if len(data) < size:
            raise OSError(f"it ends before byte {start + size}, where the index has a picture")
        return data

    return storage.retry(read, "read", path)


def _read_packed(fs: pafs.FileSystem, path: str, row: int) -> bytes:
    """The data of one row group; its checksum is verified, and a footer that no longer fits is read anew."""
    at = _At(path, fs)

    def read() -> bytes:
        try:
            footer = pq.read_metadata(pa.BufferReader(_footer(at)))
            if not 0 <= row < footer.num_row_groups:
                raise OSError(f"it holds {footer.num_row_groups} clips, the index asks for number {row}")
            with fs.open_input_file(path) as file:
                shard = pq.ParquetFile(file, metadata=footer, page_checksum_verification=True)
                return shard.read_row_group(row, columns=["data"], use_threads=False).column("data")[0].as_py()
        except FileNotFoundError:
            raise FileNotFoundError(path) from None
        except (OSError, pa.ArrowException) as error:
            _footer.cache_clear()
            raise error if isinstance(error, OSError) else OSError(str(error)) from error

    return storage.retry(read, "read", path)


@functools.lru_cache(maxsize=NUM_FOOTERS)
def _footer(at: _At) -> bytes:
    """The footer of a parquet file, as a file of its own."""
    with at.fs.open_input_file(at.path) as file:
        footer = pq.read_metadata(file)
    sink = pa.BufferOutputStream()
    footer.write_metadata_file(sink)
    return sink.getvalue().to_pybytes()


def _pictures_of(fs: pafs.FileSystem, root: str, row: dict[str, Any]) -> _Pictures | None:
    """The pictures that a row's path stands for, None if it is a file. BadSample for an empty folder."""
    path = join(root, row["path"])
    match = _PICTURES.search(path)
    if match is None:
        return None
    first = int(match[1])
    count = int(match[2]) - first + 1 if match[2] else row["frames"] or _count_pictures(_At(path, fs))
    if count < 1:
        raise BadSample("the folder holds no pictures")
    return _Pictures(path[: match.start()], path[match.end() :], len(match[1]), first, count)


@functools.lru_cache(maxsize=1 << 17)
def _count_pictures(at: _At) -> int:
    """Pictures from the first to the one with the highest number, for a path that leaves the last one open."""
    folder, _, name = at.path.rpartition("/")
    match = _PICTURES.search(name)
    assert match is not None
    form = re.compile(re.escape(name[: match.start()]) + r"(\d+)" + re.escape(name[match.end() :]))
    found = [form.fullmatch(info.base_name) for info in storage.list_files(at.fs, folder)]
    numbers = [int(one[1]) for one in found if one is not None]
    if not numbers and not storage.exists(at.fs, folder):
        raise FileNotFoundError(folder)
    return max(numbers, default=int(match[1]) - 1) - int(match[1]) + 1


def _read_pictures(fs: pafs.FileSystem, pictures: _Pictures, wanted: Sequence[int]) -> bytes:
    frames: dict[int, bytes] = {}
    for index in wanted:
        path = pictures.path(index)
        try:
            frames[index] = storage.read_bytes(fs, path)
        except FileNotFoundError:
            folder, _, name = path.rpartition("/")
            if not storage.exists(fs, folder):
                raise FileNotFoundError(folder) from None
            raise BadSample(f"frame {index} of {pictures.count} is missing ({name})") from None
    return zip_frames(frames, num_frames=pictures.count)


# -------------------------------------------------------------------------------------------------- list formats


@dataclass(frozen=True)
class _Entry:
    """A sample as its list names it: where it says so, the columns that fill `file`, the class by number or name.

    `place` are further columns of the index.
    """

    where: str
    columns: dict[str, str]
    label: int | str
    place: dict[str, Any] = field(default_factory=dict)


class _NotThere(UserError):
    """The list of a split is not there."""


def _read_list(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[_Entry]:
    """A sample per line."""
    place, columns = _place(card, split), None if card.columns == "header" else card.columns
    for where, fields in _lines(_read_text(fs, root, place, _split_of(card, split)), join(root, place), card.delimiter):
        if columns is None:
            columns = tuple(fields)
            continue
        open_end = columns[-1:] == ("*",)
        if len(fields) < len(columns) - open_end or (len(fields) > len(columns) and not open_end):
            raise UserError(f"{where}: {len(fields)} columns in place of {len(columns)} ({', '.join(columns)})")
        found = dict(zip(columns, fields, strict=False))
        label = found.get("label")
        if label is None:
            label = posixpath.basename(posixpath.dirname(found.get("path", "")))
        elif re.fullmatch(r"-?\d{1,18}", label):
            label = int(label)
        if label == "":
            raise UserError(
                f"{where}: has no label" + ("" if "label" in found else ", nor a folder that names the class")
            )
        yield _Entry(where, found, label)


def _read_folders(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[_Entry]:
    """A folder per class; in it a file per sample, or a folder of pictures. Names with a dot in front are left out."""
    place = _inside(_place(card, split), card.name)
    base, pictures = posixpath.normpath(join(root, place)), _PICTURES.search(card.file)
    classes = [name for name in storage.list_folders(fs, base) if not name.startswith(".")]
    if not classes:
        raise _NotThere(f"{base}: holds no folder per class ({_split_of(card, split)}): mend data.root or the card")
    for name in classes:
        inside = join(base, name)
        found = storage.list_folders(fs, inside) if pictures else [i.base_name for i in storage.list_files(fs, inside)]
        found = [one for one in found if not one.startswith(".")]
        if not found:
            raise UserError(f"{inside}: holds no sample of class {name!r}: remove the folder, or fill it")
        for one in found:
            yield _Entry(inside, {"path": posixpath.normpath(join(place, name, one))}, name)


def _read_files(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[_Entry]:
    """Files that match the patterns of a split, part for part. Names with a dot in front are left out."""
    for pattern in card.places(split):
        where = join(root, pattern)
        *parts, last = _inside(pattern, card.name).split("/")
        folders = [("", "")]  # path, class
        for part in parts:
            if _is_plain(part):
                folders = [(posixpath.join(folder, part), label) for folder, label in folders]
                continue
            folders = [
                (posixpath.join(folder, name), name if part == _CLASS else label)
                for folder, label in folders
                for name in _matching(storage.list_folders(fs, join(root, folder).rstrip("/")), part)
            ]
        found = 0
        for folder, label in folders:
            names = [last]
            if _ALL_FILES not in last and not _is_plain(last):
                files = storage.list_files(fs, join(root, folder).rstrip("/"))
                names = _matching([info.base_name for info in files], last)
            found += len(names)
            for name in names:
                yield _Entry(where, {"path": posixpath.join(folder, name)}, label)
        if not found:
            raise _NotThere(f"{where}: there are no such files ({_split_of(card, split)}): mend data.root or the card")


def _is_plain(part: str) -> bool:
    return part != _CLASS and not any(sign in part for sign in "*?[")


def _matching(names: Sequence[str], part: str) -> list[str]:
    form = "*" if part == _CLASS else part
    return [name for name in names if not name.startswith(".") and fnmatchcase(name, form)]


def _read_shapenet_part(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[_Entry]:
    """JSON lists of "shape_data/FOLDER/NAME"; synsetoffset2category.txt says which shape a folder holds."""
    try:
        text = _read_text(fs, root, SYNSETS, f"the shapes of {card.name}")
        shapes = point_sets.shapenet_synsets(text.encode())
    except BadSample as error:
        raise UserError(f"{join(root, SYNSETS)}: {error}") from None
    for place in card.places(split):
        where = join(root, place)
        try:
            listed = point_sets.shapenet_split(_read_text(fs, root, place, _split_of(card, split)).encode())
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{where}: must be a JSON list of shapes") from None
        for number, path in enumerate(listed, 1):
            shape = shapes.get(path.partition("/")[0])
            if shape is None:
                raise UserError(f"{where} entry {number}: {path!r} lies in none of the folders of {SYNSETS}")
            yield _Entry(f"{where} entry {number}", {"path": path, "label": str(shape)}, shape)


def _read_kitti(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[_Entry]:
    """Numbers of scans, one a line, of files `training/velodyne/NUMBER.bin`."""
    place = _place(card, split)
    for where, fields in _lines(_read_text(fs, root, place, _split_of(card, split)), join(root, place), None):
        if len(fields) != 1:
            raise UserError(f"{where}: must be the number of a scan alone, as in 000123")
        yield _Entry(where, {"path": f"training/velodyne/{fields[0]}.bin", "number": fields[0]}, 0)


def _read_something_v2(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[_Entry]:
    """A JSON list of objects with `id` and `template`, which is the class with its objects in brackets."""
    place = _place(card, split)
    entries = _parse_json(_read_text(fs, root, place, _split_of(card, split)), join(root, place))
    if not isinstance(entries, list):
        raise UserError(f"{join(root, place)}: must be a JSON list of samples")
    for number, entry in enumerate(entries, 1):
        where = f"{join(root, place)} entry {number}"
        name, template = (entry.get("id"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str | int) or not isinstance(template, str):
            raise UserError(f"{where}: must have an id and a template")
        yield _Entry(where, {"id": str(name)}, template.replace("[", "").replace("]", ""))


def _read_hmdb51(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[_Entry]:
    """A list per class, `CLASS_test_split1.txt`, with lines `file mark`: 1 trains, 2 tests, 0 is left out."""
    pattern, mark = _place(card, split), card.splits[split][1]
    folder, _, form = _inside(pattern, card.name).rpartition("/")
    lists = [info.base_name for info in storage.list_files(fs, join(root, folder) if folder else root)]
    lists = [name for name in lists if fnmatchcase(name, form)]
    if not lists:
        raise _NotThere(f"{join(root, pattern)}: no such lists ({_split_of(card, split)}): mend data.root or the card")
    for name in lists:
        place, label = join(folder, name) if folder else name, name.removesuffix(form.lstrip("*"))
        for where, fields in _lines(_read_text(fs, root, place, _split_of(card, split)), join(root, place), None):
            if len(fields) != 2 or fields[1] not in ("0", "1", "2"):
                raise UserError(f"{where}: must be a file and 0, 1 or 2")
            if int(fields[1]) == mark:
                yield _Entry(where, {"path": f"{label}/{fields[0]}"}, label)


def _read_cifar(num_labels: int, card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[_Entry]:
    """The pictures of .bin files, `data_batch_1.bin#00017`; a picture is read where its pixels begin."""
    side = image_sets.CIFAR_SIDE
    for file in _read_files(card, split, fs, root):
        path = file.columns["path"]
        where = join(root, path)
        try:
            classes, offsets = image_sets.cifar_records(storage.read_bytes(fs, where), num_labels)
        except FileNotFoundError:
            raise _NotThere(f"{where}: there is no such file ({_split_of(card, split)}): mend data.root") from None
        except ValueError as error:
            raise UserError(f"{where}: is no file of {card.layout}: {error}") from None
        for number, (label, offset) in enumerate(zip(classes.tolist(), offsets.tolist(), strict=True)):
            place = {"shard": path, "row": offset, "width": side, "height": side}
            yield _Entry(f"{where} picture {number}", {"path": f"{path}#{number:05d}"}, label, place)


def _read_visual_wake_words(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[_Entry]:
    """Instance annotations of COCO: is the category that is the second class in an image, yes or no."""
    place = _place(card, split)
    where = join(root, place)
    text = _read_text(fs, root, place, _split_of(card, split))
    try:
        found = image_sets.coco_presence(text, card.class_names()[1])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}") from None
    for number, (name, there) in enumerate(found, 1):
        yield _Entry(f"{where} image {number}", {"path": name}, int(there))


READERS: dict[str, Callable[[Card, str, pafs.FileSystem, str], Iterator[_Entry]]] = {
    "list": _read_list,
    "folders": _read_folders,
    "files": _read_files,
    "something_v2": _read_something_v2,
    "hmdb51": _read_hmdb51,
    "cifar10": functools.partial(_read_cifar, 1),
    "cifar100": functools.partial(_read_cifar, 2),
    "visual_wake_words": _read_visual_wake_words,
    "s3dis": _read_files,
    "shapenet_part": _read_shapenet_part,
    "kitti": _read_kitti,
}


def _read_index(card: Card, split: str, fs: pafs.FileSystem, root: str) -> pa.Table:
    """An index that `prepare` wrote, checked like a list."""
    where = join(root, _place(card, split))
    try:
        data = storage.read_bytes(fs, join(root, _inside(_place(card, split), card.name)))
        table = pq.read_table(pa.BufferReader(data)).select(INDEX.names).cast(INDEX).combine_chunks()
    except FileNotFoundError:
        raise UserError(f"{where}: there is no such index ({_split_of(card, split)}): run prepare again") from None
    except (pa.ArrowException, KeyError, OSError) as error:
        raise UserError(f"{where}: is no index ({str(error).splitlines()[0][:100]}): run prepare again") from None
    if table.num_rows == 0 or any(column.null_count for column in table.columns):
        raise UserError(f"{where}: is empty or has gaps: run prepare again")
    paths, labels = table.column("path").to_pylist(), table.column("label").to_numpy()
    if len(set(paths)) < len(paths):
        raise UserError(f"{where}: lists a path twice: run prepare again")
    if card.labels == "sample" and (labels.min() < 0 or labels.max() >= card.num_classes):
        raise UserError(
            f"{where}: labels from {labels.min()} to {labels.max()}, {card.name} has {card.num_classes} classes"
        )
    for path in {*paths, *table.column("shard").to_pylist()} - {""}:
        _inside(path, where)
    return table


def _list_classes(card: Card, fs: pafs.FileSystem, root: str) -> list[str]:
    """The classes that the lists of all splits use, where no file says: names sorted, or numbers up to the largest."""
    labels: dict[int | str, str] = {}
    absent: list[_NotThere] = []
    for split in card.splits:
        try:
            for entry in READERS[card.layout](card, split, fs, root):
                labels.setdefault(entry.label, entry.where)
        except _NotThere as error:
            absent.append(error)
    if len(absent) == len(card.splits):
        raise absent[0]
    names = sorted(label for label in labels if isinstance(label, str))
    numbers = [label for label in labels if isinstance(label, int)]
    if names and numbers:
        raise UserError(f"{labels[names[0]]}: label {names[0]!r} is a name, others are numbers")
    if numbers and max(numbers) >= MAX_CLASSES:
        raise UserError(f"{labels[max(numbers)]}: label {max(numbers)} is no class number, {MAX_CLASSES} is the most")
    return [str(number) for number in range(card.num_classes or 1 + max(numbers))] if numbers else names


def _parse_classes(text: str, where: str) -> list[str]:
    """Names in order: JSON (a list, or name to number), or a line each, with their numbers in front or without."""
    if where.endswith(".json"):
        loaded = _parse_json(text, where)
        if isinstance(loaded, dict):
            numbers = {str(number): name for name, number in loaded.items()}
            loaded = [numbers.get(str(number)) for number in range(len(loaded))]
        if not isinstance(loaded, list) or not all(isinstance(name, str) for name in loaded):
            raise UserError(f"{where}: must be a JSON list of names, or names with numbers from 0 on")
        return [str(name) for name in loaded]
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    numbered = [re.fullmatch(r"(\d+)[ \t,;]+(\S.*)", line) for line in lines]
    pairs = [(int(match[1]), match[2]) for match in numbered if match is not None]
    if len(pairs) == len(lines) and [number - pairs[0][0] for number, _ in pairs] == list(range(len(pairs))):
        return [name for _, name in pairs]
    return lines


def _path_of(entry: _Entry, form: str, split: str) -> tuple[str, int]:
    """The path of an entry, `file` filled in, and its number of frames (0 unknown)."""
    found = {**entry.columns, "split": split}

    def value(match: re.Match[str]) -> str:
        if match[1] not in found:
            raise UserError(f"{entry.where}: file: there is no column {match[1]!r}{did_you_mean(match[1], found)}")
        return found[match[1]].zfill(int(match[2] or 0))

    def number(name: str) -> int | None:
        if name not in entry.columns:
            return None
        if not re.fullmatch(r"\d{1,9}", found[name]):
            raise UserError(f"{entry.where}: {name} must be a number (got {found[name]!r})")
        return int(found[name])

    path, frames = _inside(_COLUMN.sub(value, form), entry.where), number("frames")
    match = _PICTURES.search(path)
    if match is None:
        return path, frames or 0
    first, last = number("first"), number("last")
    first = int(match[1]) if first is None else first
    if last is None:
        last = int(match[2]) if match[2] else None if frames is None else first + frames - 1
    count = 0 if last is None else last - first + 1
    if last is not None and not 0 < count <= MAX_FRAMES:
        raise UserError(f"{entry.where}: pictures {first} to {last} make no clip")
    digits = len(match[1])
    end = "" if last is None else f"{last:0{digits}d}"
    return f"{path[: match.start()]}{{{first:0{digits}d}..{end}}}{path[match.end() :]}", count


def _label_of(entry: _Entry, names: dict[str, int], dataset: str) -> int:
    if isinstance(entry.label, int):
        if not 0 <= entry.label < len(names):
            raise UserError(
                f"{entry.where}: label {entry.label} is not in 0 to {len(names) - 1}, the classes of {dataset}"
            )
        return entry.label
    if entry.label not in names:
        raise UserError(f"{entry.where}: {entry.label!r} is no class of {dataset}{_close(entry.label, names)}")
    return names[entry.label]


def _shape_of(entry: _Entry) -> int:
    """The shape of a cloud whose points have labels of their own: its label in the list, 0 where lists have none."""
    if "label" not in entry.columns:
        return 0
    if isinstance(entry.label, int) and entry.label >= 0:
        return entry.label
    raise UserError(
        f"{entry.where}: {entry.label!r}: the shape of a cloud with a label per point is a number from 0 on"
    )


# ------------------------------------------------------------------------------------------------------- helpers


def _place(card: Card, split: str) -> str:
    """Where the card finds a split, as one word."""
    return card.places(split)[0]


def _split_of(card: Card, split: str) -> str:
    return f"split {split!r} of {card.name}"


def _inside(path: str, where: str) -> str:
    """`path` in its plain form; UserError where it could lead out of the root."""
    if not path or path.startswith("/") or "://" in path or ".." in path.split("/") or _CONTROL.search(path):
        raise UserError(f"{where}: {path!r} must be a path relative to the root, without '..'")
    return posixpath.normpath(path)


def _read_text(fs: pafs.FileSystem, root: str, name: str, what: str) -> str:
    path = join(root, _inside(name, what))
    try:
        return storage.read_bytes(fs, path).decode("utf-8-sig")
    except FileNotFoundError:
        raise _NotThere(f"{path}: there is no such file ({what}): mend data.root or the card") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({what}; byte {error.start})") from None


def _lines(text: str, path: str, delimiter: str | None) -> Iterator[tuple[str, list[str]]]:
    """`path line N` and the fields of each line that is not empty."""
    if delimiter is None:
        for number, line in enumerate(text.split("\n"), 1):
            if fields := re.findall(r"[^ \t\r]+", line):
                yield f"{path} line {number}", fields
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for fields in reader:
            if any(fields):
                yield f"{path} line {reader.line_num}", [one.strip() for one in fields]
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}") from None


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error})") from None


def _one_card(documents: list[dict[str, Any]], where: str) -> Card:
    if len(documents) != 1:
        raise UserError(f"{where}: holds {len(documents)} documents, a dataset card is one")
    return parse(Card, documents[0], where)


def _holds_jobs(path: Path) -> bool:
    try:
        return any("kind" in document for document in read_yaml(path))
    except UserError:  # whoever asks for this file by name will hear of it
        return False


def _close(name: str, names: Any) -> str:
    """The closest of `names`, or all of them if they are few."""
    hint = did_you_mean(name, names)
    return hint if len(hint) < 200 else ""
