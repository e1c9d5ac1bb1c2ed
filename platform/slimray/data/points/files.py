"""From the bytes of a point file to a cloud: PCD, PLY, LAS/LAZ, text, npy/npz, KITTI .bin and meshes.

`read_cloud` reads them by libraries, and checks what those let pass: Open3D fills up a cut PCD with whatever is in
memory and reads unreadable numbers as 0, laspy returns fewer points than declared, trimesh an empty mesh. A file that
is not what it says is a `BadSample` with the reason. A new format is one reader and its row in READERS.
"""

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from slimray.data.points.arrays import npy_array, read_bin, read_npy, read_npz
from slimray.data.points.clouds import Cloud, Table, first_line, to_cloud, whole_numbers
from slimray.data.points.las import read_las
from slimray.data.points.meshes import read_surface
from slimray.data.points.pcd import read_pcd
from slimray.data.points.ply import read_ply
from slimray.data.points.text import read_text
from slimray.data.samples import BadSample

READERS: dict[str, Callable[[bytes, str, Sequence[str]], Table]] = {
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


def read_cloud(
    path: str,
    data: bytes,
    columns: Sequence[str] = (),
    labels: tuple[str, bytes] | None = None,
    keep_finite: bool = False,
) -> Cloud:
    """Read a point file from its bytes; its first bytes, else the extension of `path`, tell its kind.

    `columns` names the columns of text, .npy and .bin files (x y z, nx ny nz, r g b, label; "-" leaves one out);
    `labels` is a (path, bytes) of one label per point. A PCD point with NaN means "nothing measured" and is left out
    and counted; in other formats NaN is damage unless `keep_finite`. A mesh gives MESH_POINTS points of its surface.
    Raises BadSample.
    """
    if not data:
        raise BadSample("the file is empty")
    suffix = _kind(path, data)
    try:
        table = READERS[suffix](data, suffix, columns)
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  (libraries raise anything on bytes that they cannot read)
        raise BadSample(f"does not read as {suffix[1:].upper()}: {first_line(error)}") from None
    return to_cloud(table, keep_finite or suffix == ".pcd", partial(read_labels, *labels) if labels else None)


def read_labels(path: str, data: bytes, num_points: int) -> np.ndarray:
    """Read one label per point, int64 `[N]`: SemanticKITTI .label (its lower 16 bits), .npy, or text.

    Raises BadSample if there are more or fewer than `num_points`.
    """
    suffix = PurePosixPath(path).suffix.lower()
    if suffix == ".label":
        if len(data) % 4:
            raise BadSample(f"the label file has {len(data)} bytes, no multiple of 4")
        values = np.frombuffer(data, "<u4") & 0xFFFF
    else:
        try:
            values = npy_array(data) if suffix == ".npy" else np.loadtxt(io.BytesIO(data), ndmin=1)
        except (ValueError, EOFError) as error:
            raise BadSample(f"the label file does not read: {first_line(error)}") from None
    if values.size != num_points:
        raise BadSample(f"{values.size} labels for {num_points} points")
    return whole_numbers(values.reshape(-1))


_MAGIC = ((b"ply", ".ply"), (b"LASF", ".las"), (b"\x93NUMPY", ".npy"), (b"PK\x03\x04", ".npz"), (b"# .PCD", ".pcd"))


def _kind(path: str, data: bytes) -> str:
    suffix = PurePosixPath(path).suffix.lower()
    magic = next((kind for start, kind in _MAGIC if data.startswith(start)), suffix)
    kind = suffix if suffix == ".laz" and magic == ".las" else magic
    if kind not in READERS:
        raise BadSample(f"no point file by its name or first bytes (known: {', '.join(sorted(READERS))})")
    return kind
