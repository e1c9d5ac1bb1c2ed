"""Reads point files from bytes: PCD, PLY, LAS/LAZ, text, npy/npz, KITTI .bin and meshes, also gzipped.

`read_cloud` uses libraries, and checks what they do not: Open3D fills up a truncated PCD with whatever is in memory and
reads invalid numbers as 0, laspy returns fewer points than declared, trimesh an empty mesh. A file that does not hold
what it declares is a `BadSample` with the reason. Untrusted files are parsed in a child process (reader.py), which
calls the functions here. A new format is one reader and its row in READERS.
"""

import io
import zlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from slimray.data.paths import GZIP, without_gzip
from slimray.data.points.arrays import npy_array, read_bin, read_npy, read_npz
from slimray.data.points.clouds import Cloud, Table, first_line, to_cloud, whole_numbers
from slimray.data.points.columns import Columns, parse_columns
from slimray.data.points.las import read_las
from slimray.data.points.meshes import read_surface
from slimray.data.points.pcd import read_pcd
from slimray.data.points.ply import read_ply
from slimray.data.points.text import read_text
from slimray.data.samples import MAX_BYTES, BadSample

READERS: dict[str, Callable[[bytes, str, Columns], Table]] = {
    ".pcd": read_pcd,
    ".ply": read_ply,
    ".las": read_las,
    ".laz": read_las,
    ".npy": read_npy,
    ".npz": read_npz,
    ".bin": read_bin,
    ".off": read_surface,
    ".obj": read_surface,
    ".stl": read_surface,
    **dict.fromkeys((".xyz", ".txt", ".pts", ".csv", ".asc", ".xyzn", ".xyzrgb"), read_text),
}
MAGIC = ((b"ply", ".ply"), (b"LASF", ".las"), (b"\x93NUMPY", ".npy"), (b"PK\x03\x04", ".npz"), (b"# .PCD", ".pcd"))


def read_cloud(
    path: str,
    data: bytes,
    columns: Sequence[str] = (),
    labels: tuple[str, bytes] | None = None,
    needs: Collection[str] | None = None,
) -> Cloud:
    """Read a point file from its bytes; its format is recognized by its first bytes, else by the extension of `path`.

    `columns` are those of `parse_columns`: the columns of text, .npy and .bin files in order, and choices between
    columns with the same meaning. `labels` is the (path, bytes) of a file with one label per point. `needs` are the
    features, and "label", required besides the coordinates (None: all that exist): points where one of them is not
    finite are left out and counted. A mesh gives MESH_POINTS points on its surface. Raises BadSample.
    """
    if not data:
        raise BadSample("the file is empty")
    try:
        asked = parse_columns(columns)
    except ValueError as error:
        raise BadSample(f"the list of its columns is invalid: {error}") from None
    if data[:2] == GZIP:
        path, data = without_gzip(path), _unzipped(data)
    kind = _kind(path, data)
    rows = origin = None
    try:
        table = READERS[kind](data, kind, asked)
        if kind == ".npz":
            table, rows, origin = _stored(table)
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  (libraries raise anything on bytes that they cannot read)
        raise BadSample(f"cannot be read as {kind[1:].upper()}: {first_line(error)}") from None
    return to_cloud(table, asked, needs, partial(read_labels, *labels) if labels else None, rows, origin)


def read_labels(path: str, data: bytes, num_points: int) -> np.ndarray:
    """Read one label per point, int64 `[N]`: SemanticKITTI .label (its lower 16 bits), .npy, or text.

    Raises BadSample if there are more or fewer than `num_points`.
    """
    suffix = PurePosixPath(path).suffix.lower()
    if suffix == ".label":
        if len(data) % 4:
            raise BadSample(f"the label file has {len(data)} bytes, not a multiple of 4")
        values = np.frombuffer(data, "<u4") & 0xFFFF
    else:
        try:
            values = npy_array(data) if suffix == ".npy" else np.loadtxt(io.BytesIO(data), ndmin=1)
        except (ValueError, EOFError) as error:
            raise BadSample(f"the label file cannot be read: {first_line(error)}") from None
    if values.size != num_points:
        raise BadSample(f"{values.size} labels for {num_points} points")
    return whole_numbers(values.reshape(-1))


def _kind(path: str, data: bytes) -> str:
    suffix = PurePosixPath(path).suffix.lower()
    magic = next((kind for start, kind in MAGIC if data.startswith(start)), suffix)
    kind = suffix if suffix == ".laz" and magic == ".las" else magic
    if kind not in READERS:
        raise BadSample(f"is not a point file by its extension or first bytes (known: {', '.join(sorted(READERS))})")
    return kind


def _unzipped(data: bytes) -> bytes:
    """Unpack all members of a gzip file; raise BadSample if it is truncated, or unpacks to more than MAX_BYTES."""
    whole = bytearray()
    try:
        while data[:2] == GZIP:
            stream = zlib.decompressobj(31)
            whole += stream.decompress(data, MAX_BYTES + 1 - len(whole))
            if len(whole) > MAX_BYTES:
                raise BadSample(f"unpacks to more than {MAX_BYTES:,} bytes")
            if not stream.eof:
                raise BadSample("its gzip stream is truncated")
            data = stream.unused_data
    except zlib.error as error:
        raise BadSample(f"does not unpack: {first_line(error)}") from None
    return bytes(whole)


def _stored(table: Table) -> tuple[Table, np.ndarray | None, np.ndarray | None]:
    """Separate `rows` and `origin` from the table of a stored cloud; raise BadSample if one has a wrong shape."""
    own = {name: array for name, array in table if name in ("rows", "origin")}
    rows, origin = own.get("rows"), own.get("origin")
    if origin is not None and (origin.shape != (3,) or not np.isfinite(origin.astype(np.float64)).all()):
        raise BadSample(f"its origin has shape {list(origin.shape)}, not three finite numbers")
    if rows is not None and (rows.ndim != 1 or rows.dtype.kind not in "iu" or (rows.size and rows.min() < 0)):
        raise BadSample("its rows are not non-negative integers, one per point")
    kept = [(name, array) for name, array in table if name not in own]
    return (
        kept,
        rows if rows is None else rows.astype(np.int64),
        origin if origin is None else origin.astype(np.float64),
    )
