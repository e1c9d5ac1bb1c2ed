"""Clouds as arrays: .npy, .npz and raw float32; sizes are checked against the bytes before anything is allocated."""

import io
import math
import zipfile

import numpy as np

from slimray.data.points.clouds import MAX_POINTS, Table, named
from slimray.data.points.columns import Columns
from slimray.data.samples import MAX_BYTES, BadSample

KITTI_SCAN = ("x", "y", "z", "intensity")
WIDTHS = range(3, 9)  # numbers per point that a file of raw float32 may have
CLEARLY = 0.7  # difference of mean log variances that distinguishes two widths; in real files it is 1 or more
MANY = 64  # more columns than any cloud has


def npy_array(data: bytes) -> np.ndarray:
    """Return the array of a .npy file of plain numbers, after checking its declared size against the bytes."""
    buffer = io.BytesIO(data)
    version = np.lib.format.read_magic(buffer)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(buffer)
    if dtype.kind not in "fiub":
        raise BadSample(f"holds {dtype}, not plain numbers")
    declared, there = math.prod(shape), len(data) - buffer.tell()
    if len(shape) > 1 and shape[0] > MAX_POINTS:
        raise BadSample(f"declares {shape[0]} points")
    if there != declared * dtype.itemsize:
        raise BadSample(f"{there // dtype.itemsize} of {declared} declared numbers are there")
    return np.load(io.BytesIO(data), allow_pickle=False)


def read_npy(data: bytes, _: str, columns: Columns) -> Table:
    """Read an array `[points, columns]`, or `[columns, points]` if that is clear from its shape."""
    array = npy_array(data)
    if array.ndim == 2 and array.dtype.kind == "b":
        raise BadSample("contains booleans, not coordinates")
    return named(_upright(array, columns), columns)


def _upright(array: np.ndarray, columns: Columns) -> np.ndarray:
    """Return the array with one point per row; raise BadSample if the orientation is not clear from its shape."""
    if array.ndim != 2:
        return array
    rows, width = array.shape
    if columns.names:
        lies = len(columns.names) == rows != width
    elif rows >= width or rows < 3:
        lies = False
    elif width > MANY:
        lies = True
    else:
        raise BadSample(f"holds an array of shape {[rows, width]}: name its columns to define its orientation")
    return array.T if lies else array


def read_npz(data: bytes, _: str, __: Columns) -> Table:
    """Read all arrays of an .npz file by name, except single numbers."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if sum(item.file_size for item in members) > MAX_BYTES:
            raise BadSample(f"unpacks to more than {MAX_BYTES:,} bytes")
        names = [item.filename.removesuffix(".npy") for item in members]
        if len(set(names)) < len(names):
            raise BadSample("holds two arrays with the same name")
        arrays = [npy_array(archive.read(item)) for item in members]
    table = [(name, array) for name, array in zip(names, arrays, strict=True) if array.ndim]
    lying = {array.shape[1] for name, array in table if array.ndim == 2 and len(array) == 3 < array.shape[1]}
    if len(lying) == 1 and not any(len(array) in lying for _, array in table if array.ndim == 2):
        (points,) = lying
        table = [(name, array.T if array.ndim == 2 and array.shape[1] == points else array) for name, array in table]
    return table


def read_bin(data: bytes, _: str, columns: Columns) -> Table:
    """Read rows of little-endian float32, as KITTI stores scans: x y z intensity unless the card names others.

    Raises BadSample if another number of columns suits the numbers better.
    """
    names = columns.names or KITTI_SCAN
    if len(names) < 3:
        raise BadSample(f"{len(names)} columns are named, but a point has at least 3")
    if len(data) % (4 * len(names)):
        raise BadSample(f"has {len(data)} bytes, not a multiple of {4 * len(names)} ({len(names)} float32 per point)")
    numbers = np.frombuffer(data, "<f4")
    _require_width(numbers, len(names), known=bool(columns.names))
    return named(numbers.reshape(-1, len(names)), columns, KITTI_SCAN)


def _require_width(numbers: np.ndarray, width: int, known: bool) -> None:
    """Raise BadSample if another number of columns separates the numbers better or, unless `known`, equally well.

    With the right width, each column has its own spread; with a wrong one each mixes several columns, so that the mean
    of their log variances is larger. Multiples of a width separate equally well.
    """
    here = _spread(numbers, width)
    better, equal = [], []
    for other in WIDTHS:
        if other == width or len(numbers) % other or len(numbers) < 8 * other:
            continue
        there = _spread(numbers, other)
        if there < here - CLEARLY:
            better.append(other)
        elif other % width and there < here + CLEARLY / 2:
            equal.append(other)
    if better or (equal and not known):
        points = ", ".join(f"{len(numbers) // one} points of {one}" for one in sorted({width, *better, *equal}))
        raise BadSample(
            f"its {len(numbers)} numbers do not look like rows of {width} (they could be {points}): "
            "name its columns (point_columns of the card, --columns)"
        )


def _spread(numbers: np.ndarray, width: int) -> float:
    """Return the mean of the log variances of the columns; numbers that are not finite or huge count as 0."""
    rows = numbers[: 200_000 * width].reshape(-1, width).astype(np.float64)
    with np.errstate(all="ignore"):
        rows = np.where(np.abs(rows) < 1e9, rows, 0)
        whole = rows.var() + 1e-12
        return float(np.log(rows.var(0) + 1e-6 * whole).mean())
