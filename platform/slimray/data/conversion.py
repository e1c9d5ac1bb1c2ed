"""Converts raw files to samples as `prepare` stores them: probed, re-encoded, cut into tiles, windows or frustums.

A conversion takes a row of an index and yields the samples made from it. Clouds of points become .npz files; a scene
may become several samples (the windows of an S3DIS room, `room#zero-0007`; the tiles of a scan; the frustums of the
objects in a scan), whose array `rows` maps their points to those of the scene. Raises BadSample for a file that does
not decode, FileNotFoundError for a missing one.
"""

import dataclasses
import functools
import posixpath
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from slimray import storage
from slimray.data.bytes import read_files, read_whole
from slimray.data.open import filesystem
from slimray.data.paths import COLUMN, inside
from slimray.data.points import clouds, point_sets
from slimray.data.points.arrays import KITTI_SCAN
from slimray.data.points.reader import cloud_reader
from slimray.data.samples import BadSample
from slimray.spec import RunFailed

if TYPE_CHECKING:
    from slimray.data.cards import Card
    from slimray.data.text.spec import TextSpec
    from slimray.data.video.decoder import Decoder
    from slimray.data.video.repack import Pack

MIN_TILE_POINTS = 100  # tiles with fewer points are skipped


@dataclass(frozen=True)
class Raw:
    """A raw dataset, and how its samples are to be stored.

    `pack` None keeps clips and images as they are. Each object of split "train" becomes `copies` frustums, drawn with
    `seed`. Reading a cloud may take `timeout_s` seconds. Texts become tokens of `vocabulary`, as `text` specifies.
    """

    root: str
    card: "Card"
    pack: "Pack | None"
    copies: int
    seed: int
    timeout_s: float = 30.0
    text: "TextSpec | None" = None
    vocabulary: str = ""


@dataclass(frozen=True)
class Made:
    """A sample as stored: its path in the index, columns of the index that describe it (`shape`), bytes read for it.

    `psnr` (dB) measures the loss by re-encoding; `left_out` maps files missing from the sample to the reason; `notes`
    describes in words which points of the file were left out; `label` is its class, if that differs from the file's.
    """

    path: str
    data: bytes
    shape: dict[str, Any]
    bytes_in: int
    psnr: float | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    label: int | None = None
    notes: str = ""


@dataclass(frozen=True)
class Bad:
    """A sample left out of a file with many: its path in the index, and the reason. With `fails` it counts as a sample
    that does not decode."""

    path: str
    reason: str
    fails: bool = True


def convert_clip(raw: Raw, row: dict[str, Any], decoder: "Decoder") -> Iterator[Made]:
    """Probe a video, and re-encode it if it is to be packed."""
    source, root = filesystem(raw.root)
    data = read_whole(source, root, row)
    if raw.pack is None:
        found, encoded, psnr = decoder.probe(row["path"], data), b"", None
    else:
        encoded, found, psnr = decoder.repack(row["path"], data, raw.pack)
    shape = {"frames": found.frames, "fps": found.fps, "width": found.width, "height": found.height}
    yield Made(row["path"], encoded, shape, len(data), psnr)


def convert_image(raw: Raw, row: dict[str, Any], decoder: "Decoder") -> Iterator[Made]:
    """Decode an image, and make it smaller if it is to be packed and its short side is too long."""
    source, root = filesystem(raw.root)
    data = read_whole(source, root, row)
    short_side, quality = (None, 90) if raw.pack is None else (raw.pack.short_side, raw.pack.quality)
    encoded, found, psnr = decoder.shrink(row["path"], data, short_side, quality)
    yield Made(row["path"], encoded, {"width": found.width, "height": found.height}, len(data), psnr)


def convert_cloud(raw: Raw, row: dict[str, Any], _: "Decoder") -> Iterator[Made]:
    """Read a cloud from any point file, with the labels of its points as classes; yield it whole, or in tiles."""
    card, (source, root) = raw.card, filesystem(raw.root)
    data, labels = read_whole(source, root, row), None
    if card.point_labels:
        path = labels_path(card, row["path"])
        labels = (path, read_whole(source, root, {**row, "path": path}))
    needs = ("label",) if card.labelling.per_point else ()
    cloud = cloud_reader(raw.timeout_s).cloud(row["path"], data, card.point_columns, labels, needs)
    if card.labelling.per_point:
        cloud = _with_classes(cloud, card)
    for name, reason in cloud.unclear.items():
        if name != "label":  # all features are stored, whichever are used later
            raise BadSample(reason)
    size, notes = len(data) + len(labels[1] if labels else b""), _notes(cloud)
    if card.tile is None:
        yield _stored(row["path"], cloud, size, notes=notes)
        return
    tiles = _tiles(cloud, card.tile)
    if not tiles:
        raise BadSample(f"none of its tiles has {MIN_TILE_POINTS} points and a label that counts")
    for number, tile in enumerate(tiles):
        yield _stored(f"{row['path']}#{number:04d}", tile, 0 if number else size, notes="" if number else notes)


def convert_room(raw: Raw, row: dict[str, Any], _: "Decoder") -> Iterator[Made]:
    """Yield the windows of an S3DIS room, first those of offset "zero", then those of "half"."""
    source, root = filesystem(raw.root)
    objects = read_files(source, root, row["path"])
    folder, room = row["path"].rpartition("/")[0], row["path"].partition("/Annotations/")[0]
    xyzrgb, labels, skipped = cloud_reader(raw.timeout_s).room(row["path"], objects)
    size, left_out = sum(map(len, objects.values())), {f"{folder}/{name}": why for name, why in skipped.items()}
    for key, (name, offset) in enumerate(point_sets.S3DIS_OFFSETS.items()):
        windows = point_sets.s3dis_windows(xyzrgb, labels, offset, (zlib.crc32(room.encode()), key))
        for number, window in enumerate(windows):
            if not np.ptp(window.coords, 0).any():
                continue  # a lone point, far from all others, is not a cloud
            features = dict(window.features)
            window = dataclasses.replace(window, features=features)
            yield _stored(f"{room}#{name}-{number:04d}", window, size, left_out)
            size, left_out = 0, {}


def convert_shape(raw: Raw, row: dict[str, Any], _: "Decoder") -> Iterator[Made]:
    """Convert a shape of ShapeNet part; its parts must belong to its class."""
    source, root = filesystem(raw.root)
    data = read_whole(source, root, row)
    cloud = cloud_reader(raw.timeout_s).cloud(row["path"], data, point_sets.SHAPENET_COLUMNS)
    point_sets.check_shapenet_parts(cloud, row["label"])
    yield _stored(row["path"], cloud, len(data), notes=_notes(cloud))


def convert_scan(raw: Raw, row: dict[str, Any], _: "Decoder") -> Iterator[Made]:
    """Yield the frustums of a KITTI scan: behind the 2D boxes of its labels, or of a detector if the card names one."""
    path, split, (source, root) = row["path"], row["split"], filesystem(raw.root)
    data, number = read_whole(source, root, row), path.rpartition("/")[2].removesuffix(".bin")
    cloud = cloud_reader(raw.timeout_s).cloud(path, data, KITTI_SCAN)
    scan = np.concatenate([cloud.coords + cloud.origin, cloud.features["intensity"]], 1)
    calibration = point_sets.kitti_calibration(_beside(raw, path, "calib", ".txt"))
    image_size = point_sets.png_size(_beside(raw, path, "image_2", ".png", 32))
    objects = scan_objects(raw, path)
    if split in raw.card.detections:
        objects = _detections(raw.root, raw.card.detections[split]).get(number, [])
    training = split == "train"
    copies, shake = (raw.copies, 0.1) if training and raw.copies > 1 else (1, 0.0)
    key = (raw.seed, zlib.crc32(path.encode()))
    frustums = point_sets.kitti_frustums(scan, calibration, objects, image_size, key, copies, shake)
    for place, frustum in enumerate(frustums):
        stored = point_sets.write_frustum(frustum)
        label = point_sets.KITTI_CLASSES.index(frustum.kind)
        shape = {"frames": len(frustum.cloud)}
        size, notes = (0, "") if place else (len(data), _notes(cloud))
        yield Made(f"{path}#{place:04d}", stored, shape, size, label=label, notes=notes)


def scan_objects(raw: Raw, path: str) -> list[point_sets.KittiObject]:
    """Return all labelled objects in the image of a scan."""
    return point_sets.kitti_objects(_beside(raw, path, "label_2", ".txt"))


def _beside(raw: Raw, path: str, folder: str, suffix: str, num_bytes: int | None = None) -> bytes:
    """Return the file in another folder that belongs to a scan, `training/velodyne/000123.bin`: all or first bytes."""
    source, root = filesystem(raw.root)
    name = path.replace("/velodyne/", f"/{folder}/").removesuffix(".bin") + suffix
    try:
        return storage.read_bytes(source, storage.join(root, name), num_bytes)
    except FileNotFoundError:
        raise BadSample(f"{name} is missing") from None


@functools.lru_cache(maxsize=2)
def _detections(root: str, name: str) -> dict[str, list[point_sets.KittiObject]]:
    """Return the 2D boxes of a detector by image number; read once per process."""
    fs, folder = filesystem(root)
    try:
        return point_sets.rgb_detections(storage.read_bytes(fs, storage.join(folder, name)))
    except FileNotFoundError:
        raise RunFailed(f"{storage.join(root, name)}: no such file: fix `detections` of the card") from None
    except BadSample as bad:
        raise RunFailed(f"{storage.join(root, name)}: {bad}") from None


BY_LAYOUT: dict[str, Callable[[Raw, dict[str, Any], "Decoder"], Iterator[Made]]] = {
    "s3dis": convert_room,
    "shapenet_part": convert_shape,
    "kitti": convert_scan,
}  # releases whose files hold several samples, or need files beside them


def _stored(
    path: str, cloud: clouds.Cloud, bytes_in: int, left_out: Mapping[str, str] | None = None, notes: str = ""
) -> Made:
    encoded, shape = clouds.write_cloud(cloud), {"frames": len(cloud)}
    return Made(path, encoded, shape, bytes_in, left_out=left_out or {}, notes=notes)


def _notes(cloud: clouds.Cloud) -> str:
    """Describe what a file lacks because of numbers that are not finite: points left out, features with gaps."""
    there = len(cloud) + cloud.num_removed
    notes = [clouds.removal_note(cloud.removed, there)]
    for name, array in cloud.features.items():
        if gaps := len(array) - len(clouds.finite_rows({name: array})[0]):
            notes.append(f"{gaps} of {there} points have no finite {name}: networks that use it leave them out")
    return "; ".join(filter(None, notes))


def _tiles(cloud: clouds.Cloud, side: float) -> list[clouds.Cloud]:
    """Cut a cloud into x-y squares, in their order; `rows` map points to those of the file.

    Squares with too few points, or without a label that counts, are left out.
    """
    cells = np.floor((cloud.coords[:, :2] - cloud.coords[:, :2].min(0)) / side).astype(np.int64)
    inverse = np.unique(cells, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(inverse, kind="stable")
    tiles = []
    for taken in np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1):
        labels = None if cloud.labels is None else cloud.labels[taken]
        useless = labels is not None and labels.max() < 0
        if len(taken) < MIN_TILE_POINTS or useless or not np.ptp(cloud.coords[taken], 0).any():
            continue
        features = {name: array[taken] for name, array in cloud.features.items()}
        rows = taken if cloud.rows is None else cloud.rows[taken]
        tiles.append(clouds.Cloud(cloud.coords[taken], features, labels, rows, cloud.origin))
    return tiles


def _with_classes(cloud: clouds.Cloud, card: "Card") -> clouds.Cloud:
    """Return `cloud` with the class of each point instead of its label; -1 for labels that do not count."""
    if cloud.labels is None:
        raise BadSample("has no label per point")
    classes = cloud.labels
    if card.label_map:
        classes = np.full(len(cloud), -1, np.int64)
        for label, number in card.label_map.items():
            classes[cloud.labels == label] = number
    if classes.max() >= card.num_classes:
        raise BadSample(f"has label {int(classes.max())}, but there are {card.num_classes} classes")
    return dataclasses.replace(cloud, labels=classes)


def labels_path(card: "Card", path: str) -> str:
    """Return the file with the point labels of the cloud at `path`; raise UserError if it could leave the root."""
    assert card.point_labels is not None
    name = path[: -len(posixpath.splitext(path)[1]) or None]
    known = {"name": name, "folder": posixpath.dirname(name) or ".", "stem": posixpath.basename(name)}
    filled = COLUMN.sub(lambda match: known[match[1]], card.point_labels)
    return inside(posixpath.normpath(filled), f"{card.name}: point_labels")
