"""Converts the raw releases of point-cloud datasets to training data: bytes and arrays in, arrays out.

S3DIS rooms become 1.5 m blocks and windows of at most 8192 points, as published for PVCNN (arXiv 1907.03739; after
PointCNN, 1801.07791); KITTI scans, calibration, labels and 2D boxes become frustums (1711.08488; the ready-made ones
are no longer available for download); ShapeNet part files and SemanticKITTI labels are parsed. No files are opened
here. Errors in a release (unreadable S3DIS objects) are left out and reported, never guessed.
"""

import dataclasses
import json
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slimray.data.points.arrays import read_npz
from slimray.data.points.clouds import Cloud, write_cloud
from slimray.data.points.columns import Columns
from slimray.data.samples import BadSample

# ------------------------------------------------------------------------------------------------------ S3DIS

S3DIS_CLASSES = (
    "clutter", "ceiling", "floor", "wall", "beam", "column", "door", "window", "table", "chair", "sofa", "bookcase",
    "board",
)  # fmt: skip
S3DIS_OFFSETS = {"zero": 0.0, "half": 0.75}  # metres; a room is prepared once with each
BLOCK_M = 1.5
GRID_M = 0.03
WINDOW_POINTS = 8192
SPARSE_SHARE = 10  # blocks with less than a tenth of a window's points are merged into a neighbour
NEIGHBOURS = ((0, 1), (1, 0), (0, -1), (-1, 0), (-1, 1), (1, 1), (1, -1), (-1, -1))


def s3dis_room(objects: Mapping[str, bytes]) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Join a room's annotation files (name -> "x y z r g b" lines) to float64 `[N, 6]` and labels `[N]`.

    Also returns the objects left out, with reasons. The class is the name up to "_"; other classes ("stairs") are
    dropped as published. An unreadable object (two are known: Area_5/hallway_6 and an auditorium) is left out as a
    whole, as published. Raises BadSample if nothing remains.
    """
    clouds, labels, skipped = [], [], {}
    for name in sorted(objects):
        kind = name.rpartition("/")[2].partition("_")[0]
        if kind not in S3DIS_CLASSES:
            continue
        try:
            array = _numbers(objects[name], 6)
        except BadSample as bad:
            skipped[name] = str(bad)
            continue
        clouds.append(array)
        labels.append(np.full(len(array), S3DIS_CLASSES.index(kind)))
    if not clouds:
        raise BadSample("the room has no readable object of a known class")
    return np.concatenate(clouds), np.concatenate(labels).astype(np.int64), skipped


def s3dis_windows(
    xyzrgb: np.ndarray,
    labels: np.ndarray,
    offset: float,
    key: Sequence[int],
    window_points: int = WINDOW_POINTS,
) -> list[Cloud]:
    """Cut a room (float64 `[N, 6]`, metres and 0..255) into windows; `offset` is a value of S3DIS_OFFSETS.

    A window's coords are x and y relative to the centre of its block and z above the room's floor; its features are
    "colors" 0..1 and "place", x y z as fractions of the room: nine channels in the published order. `rows` map points
    to those of the room. No point is left out; in a block, 3 cm cells with fewer points than its average cell are
    filled up with repeats. `key` determines the repeats, and the window that a point goes to if there are several.
    """
    rng = np.random.default_rng(np.random.SeedSequence(list(key)))
    xyz = xyzrgb[:, :3] - xyzrgb[:, :3].min(0)
    room = xyz.max(0)
    windows = []
    for block in _blocks(xyz, offset, window_points):
        middle = np.append(xyz[block, :2].min(0) + BLOCK_M / 2, 0.0)
        rows = rng.permutation(block[_evened(xyz[block], rng)])
        pieces = -(-len(rows) // window_points)
        size = -(-len(rows) // pieces)
        for start in range(0, len(rows), size):
            taken = rows[start : start + size]
            features = {
                "colors": (xyzrgb[taken, 3:] / 255).astype(np.float32),
                "place": (xyz[taken] / np.where(room > 0, room, 1)).astype(np.float32),
            }
            windows.append(Cloud((xyz[taken] - middle).astype(np.float32), features, labels[taken], taken))
    return windows


def _blocks(xyz: np.ndarray, offset: float, window_points: int) -> list[np.ndarray]:
    """Return the rows of each block, ordered by x and y; sparse blocks are merged into the first dense neighbour."""
    places = np.floor((xyz[:, :2] + offset) / BLOCK_M).astype(np.int64)
    cells, inverse, counts = np.unique(places, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    number = {tuple(cell): i for i, cell in enumerate(cells.tolist())}
    full = counts >= window_points / SPARSE_SHARE
    goes_to = np.arange(len(cells))
    for i in np.flatnonzero(~full):
        x, y = cells[i].tolist()
        near = (number.get((x + dx, y + dy)) for dx, dy in NEIGHBOURS)
        goes_to[i] = next((j for j in near if j is not None and full[j]), i)
    owner = goes_to[inverse]
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(owner[order])) + 1)


def _evened(xyz: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return rows with repeats, so that all occupied grid cells have at least the mean number of points (floor)."""
    cells = np.floor((xyz - xyz.min(0)) / GRID_M).astype(np.int64)
    _, inverse, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    mean = int(counts.mean())
    order = np.lexsort((rng.random(len(xyz)), inverse))  # cell by cell, in random order inside
    place = np.arange(len(xyz)) - np.repeat(np.cumsum(counts) - counts, counts)
    count = np.repeat(counts, counts)
    return np.repeat(order, np.where(count < mean, mean // count + (place < mean % count), 1))


# ---------------------------------------------------------------------------------------------- ShapeNet part

SHAPENET_COLUMNS = ("x", "y", "z", "nx", "ny", "nz", "label")
SHAPENET_PARTS = {
    "Airplane": 4,
    "Bag": 2,
    "Cap": 2,
    "Car": 4,
    "Chair": 4,
    "Earphone": 3,
    "Guitar": 3,
    "Knife": 2,
    "Lamp": 4,
    "Laptop": 2,
    "Motorbike": 6,
    "Mug": 2,
    "Pistol": 3,
    "Rocket": 3,
    "Skateboard": 3,
    "Table": 3,
}  # fmt: skip  (number of parts; the part numbers 0..49 run through all shapes in this order)
SHAPENET_SHAPES = tuple(SHAPENET_PARTS)


def shapenet_part_range(shape: int) -> range:
    """Return the part numbers of shape class `shape`."""
    start = sum(SHAPENET_PARTS[name] for name in SHAPENET_SHAPES[:shape])
    return range(start, start + SHAPENET_PARTS[SHAPENET_SHAPES[shape]])


def shapenet_synsets(data: bytes) -> dict[str, int]:
    """Return folder name -> shape class from the release's synsetoffset2category.txt. Raises BadSample."""
    pairs = [line.split() for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
    if not all(len(pair) == 2 and pair[0] in SHAPENET_PARTS for pair in pairs):
        raise BadSample("a line is not a known shape name and a folder name")
    return {folder: SHAPENET_SHAPES.index(name) for name, folder in pairs}


def shapenet_split(data: bytes) -> list[str]:
    """Return the paths "folder/shape.txt" of a split from the release's shuffled_..._file_list.json."""
    return [f"{name.removeprefix('shape_data/')}.txt" for name in json.loads(data)]


def check_shapenet_parts(cloud: Cloud, shape: int) -> None:
    """Raise BadSample if the cloud has a part that does not belong to its shape class."""
    if cloud.labels is None:
        raise BadSample("has no label per point")
    strange = np.setdiff1d(cloud.labels, shapenet_part_range(shape))
    if len(strange):
        raise BadSample(f"part {strange[0]} is not a part of {SHAPENET_SHAPES[shape]}")


# ------------------------------------------------------------------------------------------------------ KITTI

KITTI_CLASSES = ("Car", "Pedestrian", "Cyclist")
DETECTION_TYPES = {1: "Pedestrian", 2: "Car", 3: "Cyclist"}  # of frustum-pointnets' rgb_detection_*.txt
MIN_AHEAD_M = 2.0  # points less than this far in front of the scanner are not visible to the camera
MIN_HEIGHT_PX = 25.0


@dataclass(frozen=True, eq=False)
class Calibration:
    """Projections of KITTI: `p2` float64 `[3, 4]` from rectified coordinates to camera 2, `lidar` float64 `[3, 4]` from
    lidar to rectified coordinates. Rectified coordinates are x right, y down, z forward, in metres.
    """

    p2: np.ndarray
    lidar: np.ndarray


@dataclass(frozen=True)
class KittiObject:
    """One line of a KITTI label or result file; `box` is (x y z of the centre, l w h, heading) or None."""

    kind: str
    box_2d: tuple[float, float, float, float]
    box: tuple[float, ...] | None = None
    truncation: float = 0.0
    occlusion: int = 0
    score: float = 1.0


@dataclass(frozen=True, eq=False)
class Frustum:
    """The points behind a 2D box, rotated by `rotation` about the y axis so that the frustum points along z.

    `cloud` has "intensity" and, if the object is known, labels 1 on it and 0 elsewhere; `box` float64 `[7]` (centre x y
    z, l w h, heading) is rotated in the same way. In camera coordinates the heading is heading + rotation, and the
    centre is rotated back.
    """

    cloud: Cloud
    kind: str
    rotation: float
    box_2d: tuple[float, float, float, float]
    box: np.ndarray | None = None
    score: float = 1.0


def write_frustum(frustum: Frustum) -> bytes:
    """Return a frustum as an .npz that `read_frustum` reads back: a cloud with the other fields as a feature."""
    box = np.full(7, np.nan) if frustum.box is None else frustum.box
    number = KITTI_CLASSES.index(frustum.kind)
    facts = np.concatenate([[number, frustum.rotation, frustum.score], frustum.box_2d, box])
    cloud = frustum.cloud
    features = dict(cloud.features) | {"frustum": facts}
    return write_cloud(dataclasses.replace(cloud, features=features))


def read_frustum(path: str, data: bytes) -> Frustum:
    """Read what `write_frustum` wrote. Raises BadSample."""
    try:
        arrays = dict(read_npz(data, ".npz", Columns()))
        facts = arrays["frustum"].astype(np.float64)
        coords, intensity, rows, labels = (arrays.get(name) for name in ("coords", "intensity", "rows", "labels"))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise BadSample(f"is not a frustum: {error}") from None
    if coords is None or intensity is None or rows is None:
        raise BadSample("is not a frustum: its points, intensity or rows are missing")
    shapes = [array.shape for array in (coords, intensity, rows, labels) if array is not None]
    if shapes[0] != (len(rows), 3) or shapes[1] != (len(rows), 1) or not set(shapes[2:]) <= {(len(rows),)}:
        raise BadSample(f"is not a frustum: its arrays have shapes {', '.join(map(str, shapes))}")
    if facts.shape != (14,) or not 0 <= facts[0] < len(KITTI_CLASSES) or not np.isfinite(facts[:7]).all():
        raise BadSample("is not a frustum of this version: run prepare again")
    if len(coords) < 1 or not np.isfinite(coords).all():
        raise BadSample("has no points, or some that are not finite")
    cloud = Cloud(coords, {"intensity": intensity}, labels, rows)
    x1, y1, x2, y2 = facts[3:7].tolist()
    box = None if np.isnan(facts[7:]).all() else facts[7:]
    if box is not None and not np.isfinite(box).all():
        raise BadSample("has a box with numbers that are not finite")
    return Frustum(cloud, KITTI_CLASSES[int(facts[0])], facts[1].item(), (x1, y1, x2, y2), box, facts[2].item())


def kitti_calibration(data: bytes) -> Calibration:
    """Read a calib/NNNNNN.txt (P2, R0_rect, Tr_velo_to_cam). Raises BadSample."""
    found = dict(re.findall(r"^(\w+):\s*(.+)$", data.decode("ascii", "replace"), re.MULTILINE))
    try:
        p2, rect, to_camera = (
            np.array(found[name].split(), np.float64).reshape(3, -1) for name in ("P2", "R0_rect", "Tr_velo_to_cam")
        )
    except (KeyError, ValueError) as error:
        raise BadSample(f"the calibration cannot be read: {error}") from None
    if (p2.shape, rect.shape, to_camera.shape) != ((3, 4), (3, 3), (3, 4)):
        raise BadSample("a matrix of the calibration has the wrong size")
    for name, matrix in (("P2", p2), ("R0_rect", rect), ("Tr_velo_to_cam", to_camera)):
        if not np.isfinite(matrix).all():
            raise BadSample(f"{name} of the calibration holds numbers that are not finite")
    if min(p2[0, 0], p2[1, 1]) <= 0:
        raise BadSample("P2 of the calibration has a focal length that is not positive")
    return Calibration(p2, rect @ to_camera)


def png_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) from the first 24 bytes of a PNG. Raises BadSample."""
    if len(data) < 24 or not data.startswith(b"\x89PNG\r\n\x1a\n") or data[12:16] != b"IHDR":
        raise BadSample("the image of the scan is not a PNG")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def kitti_objects(data: bytes) -> list[KittiObject]:
    """Read a label_2/NNNNNN.txt, or a result file in the same format with scores. Raises BadSample."""
    objects = []
    for number, line in enumerate(data.decode("ascii", "replace").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            v = [float(word) for word in words[1:]]
        except ValueError:
            raise BadSample(f"line {number} of the labels holds words that are not numbers") from None
        if len(v) not in (14, 15):
            raise BadSample(f"line {number} of the labels has {len(words)} words, not 15 or 16")
        if not all(map(math.isfinite, v)):
            raise BadSample(f"line {number} of the labels holds numbers that are not finite")
        h, w, length = v[7:10]
        known = words[0] != "DontCare" and min(h, w, length) > 0
        box = (v[10], v[11] - h / 2, v[12], length, w, h, v[13]) if known else None  # a label's y is the bottom
        score = v[14] if len(v) == 15 else 1.0
        objects.append(KittiObject(words[0], (v[3], v[4], v[5], v[6]), box, v[0], int(v[1]), score))
    return objects


def rgb_detections(data: bytes) -> dict[str, list[KittiObject]]:
    """Return 2D detections by image name from "path type score x1 y1 x2 y2" lines (frustum-pointnets).

    Raises BadSample.
    """
    found: dict[str, list[KittiObject]] = {}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            kind, score, *edges = (float(word) for word in words[1:])
            x1, y1, x2, y2 = edges
            known = KittiObject(DETECTION_TYPES[int(kind)], (x1, y1, x2, y2), score=score)
        except (ValueError, KeyError, OverflowError):
            raise BadSample(f"line {number} of the detections cannot be read") from None
        if not all(map(math.isfinite, (score, x1, y1, x2, y2))):
            raise BadSample(f"line {number} of the detections holds numbers that are not finite")
        found.setdefault(words[0].rpartition("/")[2].partition(".")[0], []).append(known)
    return found


def rectified(coords: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Convert lidar coordinates `[N, 3]` to rectified camera coordinates, float64 `[N, 3]`."""
    return coords @ calibration.lidar[:, :3].T + calibration.lidar[:, 3]


def projected(coords: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Project rectified coordinates `[N, 3]` to pixels of camera 2, float64 `[N, 2]`."""
    flat = coords @ calibration.p2[:, :3].T + calibration.p2[:, 3]
    return flat[:, :2] / flat[:, 2:]


def turned(coords: np.ndarray, angle: float) -> np.ndarray:
    """Return `[N, 3+]` with x and z rotated about the y axis: x cos - z sin, x sin + z cos."""
    out = np.array(coords, np.float64)
    out[:, 0] = coords[:, 0] * np.cos(angle) - coords[:, 2] * np.sin(angle)
    out[:, 2] = coords[:, 0] * np.sin(angle) + coords[:, 2] * np.cos(angle)
    return out


def frustum_angle(box_2d: Sequence[float], calibration: Calibration) -> float:
    """Return -atan2(z, x) of the ray through the centre of a 2D box (x1 y1 x2 y2), at a depth of 20 m."""
    p2, depth = calibration.p2, 20.0
    u = (box_2d[0] + box_2d[2]) / 2
    x = (u - p2[0, 2]) * depth / p2[0, 0] - p2[0, 3] / p2[0, 0]
    return float(-np.arctan2(depth, x))


def inside_box(coords: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """Return which points of `[N, 3]` are inside the box (x y z, l w h, heading), bool `[N]`."""
    x, y, z, length, w, h, heading = box
    cos, sin = np.cos(heading), np.sin(heading)
    local = (coords[:, :3] - [x, y, z]) @ np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    return (np.abs(local) <= np.array([length, h, w]) / 2).min(1)


def kitti_frustums(
    scan: np.ndarray,
    calibration: Calibration,
    objects: Sequence[KittiObject],
    image_size: tuple[int, int],
    key: Sequence[int] = (0,),
    copies: int = 1,
    shake: float = 0.0,
    min_points: int = 1,
) -> list[Frustum]:
    """Return the frustums of a scan (`[N, 4]` lidar x y z intensity): `copies` of each Car, Pedestrian and Cyclist.

    `image_size` is (width, height). As published, training uses copies 5 with shake 0.1: the centre of the 2D box moves
    by up to this fraction of its size, and its size changes by as much; validation uses labels or detections as they
    are. Boxes of less than 25 pixels in height, with fewer than `min_points` points, or without a point on a known
    object are left out. `key` (seed, scan) determines the shaking.
    """
    rng = np.random.default_rng(np.random.SeedSequence(list(key)))
    coords = rectified(scan[:, :3].astype(np.float64), calibration)
    ahead = (scan[:, 0] > MIN_AHEAD_M) & (coords[:, 2] > 0)
    seen = np.flatnonzero(ahead)
    pixels = projected(coords[seen], calibration)
    on_image = ((pixels >= 0) & (pixels < image_size)).all(1)
    seen, pixels = seen[on_image], pixels[on_image]
    frustums = []
    for known in objects:
        if known.kind not in KITTI_CLASSES:
            continue
        on_object = None if known.box is None else inside_box(coords, known.box)
        for _ in range(copies):
            box_2d = _shaken(known.box_2d, shake, rng)
            low, high = np.array(box_2d[:2]), np.array(box_2d[2:])
            rows = seen[((pixels >= low) & (pixels < high)).all(1)]
            mask = None if on_object is None else on_object[rows].astype(np.int64)
            few = len(rows) < max(1, min_points) or (mask is not None and not mask.any())
            if few or box_2d[3] - box_2d[1] < MIN_HEIGHT_PX:
                continue
            rotation = np.pi / 2 + frustum_angle(box_2d, calibration)
            features = {"intensity": scan[rows, 3:4].astype(np.float32)}
            cloud = Cloud(turned(coords[rows], rotation).astype(np.float32), features, mask, rows)
            box = None if known.box is None else _turned_box(known.box, rotation)
            frustums.append(Frustum(cloud, known.kind, float(rotation), box_2d, box, known.score))
    return frustums


def _turned_box(box: Sequence[float], rotation: float) -> np.ndarray:
    centre = turned(np.array([box[:3]]), rotation)[0]
    return np.array([*centre, *box[3:6], box[6] - rotation])


def _shaken(box: tuple[float, float, float, float], share: float, rng: np.random.Generator):
    """Return the 2D box with its centre moved and its size changed by up to `share` of its size."""
    width, height = box[2] - box[0], box[3] - box[1]
    dx, dy, dw, dh = rng.uniform(-share, share, 4)
    x, y = (box[0] + box[2]) / 2 + dx * width, (box[1] + box[3]) / 2 + dy * height
    w, h = width * (1 + dw), height * (1 + dh)
    return (float(x - w / 2), float(y - h / 2), float(x + w / 2), float(y + h / 2))


def _numbers(data: bytes, columns: int) -> np.ndarray:
    """Parse lines of `columns` numbers to float64 `[N, columns]`; raise BadSample for anything else."""
    try:
        array = np.loadtxt(data.decode("ascii").splitlines(), dtype=np.float64, ndmin=2)
    except (ValueError, UnicodeDecodeError) as error:
        raise BadSample(f"cannot be read: {str(error).split(';')[0]}") from None
    if array.shape[1:] != (columns,) or not len(array) or not np.isfinite(array).all():
        raise BadSample(f"does not consist of lines of {columns} finite numbers")
    return array
