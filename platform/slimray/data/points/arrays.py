"""Clouds as arrays: .npy, .npz and bare float32; sizes are compared with the bytes before anything is allocated."""

import io
import zipfile
from collections.abc import Sequence

import numpy as np

from slimray.data.points.clouds import MAX_POINTS, Table, named
from slimray.data.samples import BadSample


def npy_array(data: bytes) -> np.ndarray:
    """A .npy of plain numbers; its declared size is compared with the bytes before anything is allocated."""
    buffer = io.BytesIO(data)
    version = np.lib.format.read_magic(buffer)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(buffer)
    if dtype.kind not in "fiub":
        raise BadSample(f"holds {dtype}, no plain numbers")
    count = int(np.prod(np.array(shape, dtype=object))) if shape else 1
    there = (len(data) - buffer.tell()) // dtype.itemsize
    if count != there:
        raise BadSample(f"{there} of {count} declared numbers are there")
    return np.load(io.BytesIO(data), allow_pickle=False)


def read_npy(data: bytes, _: str, columns: Sequence[str]) -> Table:
    return named(npy_array(data), columns, ())


def read_npz(data: bytes, _: str, __: Sequence[str]) -> Table:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(item.file_size for item in archive.infolist()) > 64 * MAX_POINTS:
            raise BadSample("unpacks to more than a point cloud can be")
        arrays = {item.filename.removesuffix(".npy"): npy_array(archive.read(item)) for item in archive.infolist()}
    return {name: array for name, array in arrays.items() if array.ndim}


def read_bin(data: bytes, _: str, columns: Sequence[str]) -> Table:
    """Rows of little-endian float32, as KITTI stores scans: x y z intensity unless the card names other columns."""
    names = columns or ("x", "y", "z", "intensity")
    if len(data) % (4 * len(names)):
        raise BadSample(f"has {len(data)} bytes, no multiple of {4 * len(names)} ({len(names)} float32 a point)")
    return named(np.frombuffer(data, "<f4").reshape(-1, len(names)), names, ())
