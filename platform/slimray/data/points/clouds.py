"""A cloud of points as a value: coordinates, features, labels; its columns named and checked, and its one stored form.

What a reader finds in a file is a `Table` of columns; `to_cloud` names them by what they mean, groups them and checks
that they are finite. Coordinates that float32 is too coarse for get an origin of their own.
"""

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from slimray.data.samples import BadSample

MIN_POINTS = 2
MAX_POINTS = 100_000_000  # a declared count larger than this is refused before anything is allocated
FAR = 10_000.0  # from here on float32 steps are about a millimetre of a metre: the cloud gets an origin of its own
HUGE = 1e30  # no number of a point cloud; sums and squares of such numbers overflow

GROUPS = {"coords": ("x", "y", "z"), "normals": ("nx", "ny", "nz"), "colors": ("r", "g", "b")}
ALIASES = {
    "normal_x": "nx", "normal_y": "ny", "normal_z": "nz", "normal": "normals",
    "red": "r", "green": "g", "blue": "b", "color": "colors", "rgb": "colors",
    "labels": "label", "class": "label", "classification": "label", "scalar_label": "label",
    "points": "coords", "xyz": "coords", "pos": "coords", "positions": "coords",
    "reflectance": "intensity", "scalar_intensity": "intensity",
}  # fmt: skip

WIDTHS = {"colors": 3, "normals": 3, "place": 3}  # channels of a feature, others have one

Table = dict[str, np.ndarray]  # column name -> [N] or [N, k]


@dataclass(frozen=True, eq=False)
class Cloud:
    """Points as read: `coords` float32 `[N, 3]`, `features` name -> float32 `[N, k]`, `labels` int64 `[N]` or None.

    Colors are 0 to 1. `rows` int64 `[N]` says which point of its file or room each one is (None: all, in order);
    `origin` float64 `[3]` was subtracted from coords; `num_removed` points were left out for want of finite numbers.
    """

    coords: np.ndarray
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    labels: np.ndarray | None = None
    rows: np.ndarray | None = None
    origin: np.ndarray = field(default_factory=lambda: np.zeros(3))
    num_removed: int = 0

    def __len__(self) -> int:
        return len(self.coords)


def write_cloud(cloud: Cloud) -> bytes:
    """The cloud as an uncompressed .npz that `read_cloud` reads back; the same cloud gives the same bytes."""
    arrays = {"coords": cloud.coords, "labels": cloud.labels, "rows": cloud.rows, "origin": cloud.origin}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in (arrays | dict(cloud.features)).items():
            if array is not None:
                body = io.BytesIO()
                np.lib.format.write_array(body, np.ascontiguousarray(array), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), body.getvalue())
    return buffer.getvalue()


def to_cloud(table: Table, drop: bool, labels: Callable[[int], np.ndarray] | None) -> Cloud:
    """Name, group and check what a reader found."""
    table = {ALIASES.get(name.lower(), name.lower()): array for name, array in table.items()}
    for group, names in GROUPS.items():
        if group not in table and all(name in table for name in names):
            table[group] = np.stack([table.pop(name) for name in names], 1)
    if "coords" not in table:
        raise BadSample(f"has no x, y, z (it has: {', '.join(table) or 'nothing'})")
    with np.errstate(all="ignore"):
        coords = np.asarray(table.pop("coords"), np.float64)
    if coords.ndim != 2 or coords.shape[1] != 3:
        raise BadSample(f"coordinates of shape {list(coords.shape)}, not [points, 3]")
    label, rows, origin = table.pop("label", None), table.pop("rows", None), table.pop("origin", np.zeros(3))
    if labels is not None:
        label = labels(len(coords))
    for name, array in (table | {"labels": label, "rows": rows}).items():
        if array is not None and len(array) != len(coords):
            raise BadSample(f"{len(array)} {name} for {len(coords)} points")
    with np.errstate(all="ignore"):  # what does not fit float32 becomes infinite, and is found so
        features = {name: _feature(name, array) for name, array in table.items()}
        finite = (np.abs(np.concatenate([coords, *features.values()], 1, dtype=np.float32)) < HUGE).min(1)  # not NaN
    removed = len(finite) - int(finite.sum())
    if removed and not drop:
        raise BadSample(f"{removed} of {len(finite)} points are not finite numbers")
    if removed:
        rows = np.flatnonzero(finite) if rows is None else rows[finite]
        coords, features = coords[finite], {name: array[finite] for name, array in features.items()}
        label = None if label is None else label[finite]
    if len(coords) < MIN_POINTS:
        raise BadSample(f"has {len(coords)} usable point{'' if len(coords) == 1 else 's'} of {len(finite)}")
    if not np.ptp(coords, 0).any():
        raise BadSample(f"all {len(coords)} points lie at one place")
    if np.abs(coords).max() > FAR:
        step = np.floor(coords.min(0))
        coords, origin = coords - step, origin + step
    label = None if label is None else whole_numbers(label)
    return Cloud(coords.astype(np.float32), features, label, rows, np.asarray(origin, np.float64), removed)


def _feature(name: str, array: np.ndarray) -> np.ndarray:
    """A float32 `[N, k]`; colors as bytes or 16-bit words become 0 to 1."""
    wide = array.reshape(len(array), -1)
    if name != "colors":
        return wide.astype(np.float32)
    top = float(np.nanmax(wide)) if wide.size else 0.0
    whole = array.dtype.kind in "iu"
    return (wide / (1 if top <= 1 and not whole else 255 if top <= 255 else 65535)).astype(np.float32)


def whole_numbers(values: np.ndarray) -> np.ndarray:
    if not ((np.abs(values) < 2**31) & (values == np.floor(values))).all():  # NaN is not below
        raise BadSample("a label is no whole number of 32 bits")
    return values.astype(np.int64)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].split(";")[0][:160]


def named(array: np.ndarray, columns: Sequence[str], default: Sequence[str]) -> Table:
    """Columns of `[N, C]` by name; without names x y z, and the rest together as "extra"."""
    names = [name.strip("\"'") for name in columns or default]
    if array.ndim != 2 or array.shape[1] < 3:
        raise BadSample(f"holds an array of shape {list(array.shape)}, not [points, 3 or more]")
    if columns and len(columns) != array.shape[1]:
        raise BadSample(f"has {array.shape[1]} columns, the card names {len(columns)}")
    if len(names) != array.shape[1]:
        extra = {"extra": array[:, 3:]} if array.shape[1] > 3 else {}
        return {"coords": array[:, :3], **extra}
    return {name: array[:, i] for i, name in enumerate(names) if name != "-"}
