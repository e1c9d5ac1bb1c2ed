"""A cloud of points as a value (coordinates, features, labels), its columns named and checked, and how it is stored.

Readers return a `Table` of columns; `to_cloud` names them by their meaning and leaves out points for which a required
number is not finite. Two columns with the same meaning are an error that names both. Coordinates for which float32 is
too coarse are stored relative to an origin.
"""

import io
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from slimray.data.points.columns import GROUPS, Columns, meaning, plain
from slimray.data.samples import BadSample

MIN_POINTS = 2
MAX_POINTS = 100_000_000  # a larger declared count is refused before anything is allocated
FAR = 10_000.0  # from here on float32 steps are about a millimetre (in metres), and the cloud gets an origin
HUGE = 1e18  # larger numbers are refused, as float32 squares and sums of them overflow

WIDTHS = {"colors": 3, "normals": 3, "place": 3}  # channels of these features; others have one

Table = list[tuple[str, np.ndarray]]  # column name, [N] or [N, k]; a name may occur twice


@dataclass(frozen=True, eq=False)
class Cloud:
    """Points as read: `coords` float32 `[N, 3]`, `features` name -> float32 `[N, k]`, `labels` int64 `[N]` or None.

    Colors are 0 to 1. `rows` int64 `[N]` maps each point to its row in the file or room (None: all, in order); `origin`
    float64 `[3]` was subtracted from coords. `removed` counts the points left out, by the column that was not finite.
    `unclear` maps data that the file may hold ("label") to the reason why it is ambiguous.
    """

    coords: np.ndarray
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    labels: np.ndarray | None = None
    rows: np.ndarray | None = None
    origin: np.ndarray = field(default_factory=lambda: np.zeros(3))
    removed: Mapping[str, int] = field(default_factory=dict)
    unclear: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def num_removed(self) -> int:
        """Number of points that were left out."""
        return sum(self.removed.values())


def removal_note(removed: Mapping[str, int], num_points: int) -> str:
    """Describe in words which of `num_points` points were left out; "" for none."""
    if not removed:
        return ""
    named = ", ".join(f"{count} by {name}" for name, count in removed.items())
    return f"{sum(removed.values())} of {num_points} points left out, not finite numbers: {named}"


def write_cloud(cloud: Cloud) -> bytes:
    """Return the cloud as an uncompressed .npz that `read_cloud` reads back; the same cloud gives the same bytes."""
    arrays = {"coords": cloud.coords, "labels": cloud.labels, "rows": cloud.rows, "origin": cloud.origin}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in (arrays | dict(cloud.features)).items():
            if array is not None:
                body = io.BytesIO()
                np.lib.format.write_array(body, np.ascontiguousarray(array), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), body.getvalue())
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ from a table


def to_cloud(
    table: Table,
    columns: Columns,
    needs: Collection[str] | None,
    labels: Callable[[int], np.ndarray] | None = None,
    rows: np.ndarray | None = None,
    origin: np.ndarray | None = None,
) -> Cloud:
    """Name, group and check the columns that a reader found.

    `needs` are the features, and "label", required besides the coordinates (None: all): points where one of them is not
    finite are left out and counted, and an ambiguous one raises BadSample. `labels` returns the labels of the given
    number of points from elsewhere; `rows` and `origin` are those of a Cloud.
    """
    found, unclear = _by_meaning(table, columns)
    for said in (found, unclear) if labels is not None else ():
        said.pop("label", None)
    needed = {"label", *found, *unclear} if needs is None else set(needs)
    for name in ("coords", *sorted(needed)):
        if name in unclear:
            raise BadSample(unclear[name])
    if "coords" not in found:
        raise BadSample(f"has no x, y, z (it has: {', '.join(name for name, _ in table) or 'nothing'})")
    with np.errstate(all="ignore"):
        coords = np.asarray(found.pop("coords"), np.float64)
    if coords.ndim != 2 or coords.shape[1] != 3:
        raise BadSample(f"coordinates of shape {list(coords.shape)}, not [points, 3]")
    if len(coords) == 0:
        raise BadSample("has 0 usable points of 0")
    label = found.pop("label", None) if labels is None else labels(len(coords))
    for name, array in (found | {"labels": label, "rows": rows}).items():
        if array is not None and len(array) != len(coords):
            raise BadSample(f"{len(array)} {name} for {len(coords)} points")
    with np.errstate(all="ignore"):  # numbers too large for float32 become infinite, and are detected as such
        features = {name: _feature(name, array) for name, array in found.items()}
    if label is not None:
        label = label.reshape(len(label), -1)
        if label.shape[1] != 1:
            unclear["label"], label = f"its labels have {label.shape[1]} numbers per point", None
    checked = {"x, y, z": coords} | {name: array for name, array in features.items() if name in needed}
    if label is not None and "label" in needed:
        checked["label"] = label
    kept, removed = _finite(checked)
    if removed:
        rows = np.flatnonzero(kept) if rows is None else rows[kept]
        coords, features = coords[kept], {name: array[kept] for name, array in features.items()}
        label = None if label is None else label[kept]
    if len(coords) < MIN_POINTS:
        why = f" ({removal_note(removed, len(kept))})" if removed else ""
        raise BadSample(f"has {len(coords)} usable point{'' if len(coords) == 1 else 's'} of {len(kept)}{why}")
    coords, start = _near(coords)
    if label is not None:
        try:
            label = whole_numbers(label[:, 0])
        except BadSample as bad:
            unclear["label"], label = str(bad), None
    if "label" in needed and "label" in unclear:
        raise BadSample(unclear["label"])
    return Cloud(coords, features, label, rows, start if origin is None else origin + start, removed, unclear)


def _by_meaning(table: Table, columns: Columns) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the columns by meaning, groups combined, and a question for each meaning that several columns share."""
    sources: dict[str, list[tuple[str, np.ndarray]]] = {}
    taken = set(columns.chosen.values())
    for name, array in table:
        if plain(name) in taken:
            for means, wanted in columns.chosen.items():
                if wanted == plain(name):
                    sources.setdefault(means, []).append((name, array))
        elif meaning(name) not in columns.chosen:
            sources.setdefault(meaning(name), []).append((name, array))
        else:  # another column is chosen for this meaning
            own = plain(name)
            sources.setdefault(f"column_{own}" if own in columns.chosen else own, []).append((name, array))
    for means, wanted in columns.chosen.items():
        if means not in sources or wanted not in (plain(name) for name, _ in sources[means]):
            raise BadSample(f"has no column {wanted} (it has: {', '.join(name for name, _ in table) or 'nothing'})")
    listed = {plain(name) for name in columns.names}
    unclear: dict[str, str] = {}
    found: dict[str, np.ndarray] = {}
    for means, several in sources.items():
        exact = [one for one in several if plain(one[0]) in listed]
        several = exact if len(exact) == 1 else several
        if len(several) == 1:
            found[means] = several[0][1]
        else:
            unclear[means] = _question(means, [name for name, _ in several])
            for name, array in several:
                if plain(name) != means and [plain(one) for one, _ in several].count(plain(name)) == 1:
                    found[plain(name)] = array
    for group, parts in GROUPS.items():
        doubtful = [part for part in parts if part in unclear]
        whole = all(part in found for part in parts)
        if group in found and whole and group not in columns.chosen:
            unclear[group] = _question(group, [group, " ".join(parts)])
            del found[group]
        elif group in found or group in unclear:
            continue
        elif doubtful and all(part in found or part in unclear for part in parts):
            unclear[group] = unclear[doubtful[0]]
        elif whole:
            if any(found[part].ndim > 1 and found[part][:1].size > 1 for part in parts):
                raise BadSample(f"{', '.join(parts)} are not single numbers")
            found[group] = np.stack([found.pop(part).reshape(-1) for part in parts], 1)
    return {f"column_{name}" if name in ("rows", "origin", "labels") else name: a for name, a in found.items()}, unclear


def _question(means: str, names: list[str]) -> str:
    names = sorted(names)
    ways = f"say which, {' or '.join(f'{means}={plain(name)}' for name in names)}"
    if len({plain(name) for name in names}) < len(names):
        ways = "name all columns in order, with - for those to skip"
    question = f"has {len(names)} columns for {means} ({', '.join(names)})"
    return f"{question}: {ways} (in point_columns of the card, or --columns)"


def _finite(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, int]]:
    """Return which points are finite in all `arrays`, bool `[N]`, and how many are not, by the first that fails."""
    kept, removed = np.ones(len(next(iter(arrays.values()))), bool), {}
    for name, array in arrays.items():
        with np.errstate(all="ignore"):
            good = (np.abs(array.reshape(len(array), -1)) < HUGE).all(1)  # False for NaN
        if not good.all():
            lost = int((kept & ~good).sum())
            kept &= good
            removed |= {name: lost} if lost else {}
    return kept, removed


def finite_rows(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, int]]:
    """Return the int64 rows that are finite in all `arrays` `[N, k]`, and how many are not, by the first that fails."""
    kept, removed = _finite(arrays)
    return np.flatnonzero(kept), removed


def _near(coords: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the coordinates as float32, and the origin subtracted if they are far out or float32 would merge them."""
    if not np.ptp(coords, 0).any():
        raise BadSample(f"all {len(coords)} points are at the same place")
    origin = np.zeros(3)
    if np.abs(coords).max() > FAR:
        origin = np.floor(coords.min(0))
    near = (coords - origin).astype(np.float32)
    if not np.ptp(near, 0).any():
        origin = coords.min(0)
        near = (coords - origin).astype(np.float32)
    if not np.ptp(near, 0).any():
        raise BadSample(f"all {len(coords)} points are at the same place within the precision of float32")
    return near, origin


def _feature(name: str, array: np.ndarray) -> np.ndarray:
    """Return a feature as float32 `[N, k]`; colors given in 8 or 16 bits are scaled to 0 to 1."""
    wide = array.reshape(len(array), -1)
    if name != "colors":
        return wide.astype(np.float32)
    top = float(np.nanmax(wide)) if wide.size and not np.isnan(wide).all() else 0.0
    whole = array.dtype.kind in "iu"
    return (wide / (1 if top <= 1 and not whole else 255 if top <= 255 else 65535)).astype(np.float32)


def whole_numbers(values: np.ndarray) -> np.ndarray:
    """Return labels as int64; raise BadSample for one that is not a 32-bit integer."""
    if not ((values > -(2**31)) & (values < 2**31) & (values == np.floor(values))).all():  # False for NaN
        raise BadSample("a label is not a 32-bit integer")
    return values.astype(np.int64)


def named(array: np.ndarray, columns: Columns, default: tuple[str, ...] = ()) -> Table:
    """Return the columns of `[N, C]` by name; without names, the first three as "coords" and the rest as "extra"."""
    names = columns.names or default
    if array.ndim != 2 or array.shape[1] < 3:
        raise BadSample(f"holds an array of shape {list(array.shape)}, not [points, 3 or more]")
    if columns.names and len(columns.names) != array.shape[1]:
        raise BadSample(f"has {array.shape[1]} columns, but the card names {len(columns.names)}")
    if len(names) != array.shape[1]:
        extra = [("extra", array[:, 3:])] if array.shape[1] > 3 else []
        return [("coords", array[:, :3]), *extra]
    return [(name, array[:, i]) for i, name in enumerate(names) if name != "-"]


def first_line(error: Exception) -> str:
    """Return the first line of an error, shortened."""
    return (str(error).splitlines() or [type(error).__name__])[0].split(";")[0][:160]
