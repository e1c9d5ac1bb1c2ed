"""PCD files, ascii, binary and compressed: every count of the header is checked against the bytes first."""

import io
import re
import struct
from collections.abc import Sequence

import numpy as np

from slimray.data.points.clouds import MAX_POINTS, Table
from slimray.data.points.geometry import unpack_pcd
from slimray.data.samples import BadSample


def read_pcd(data: bytes, _: str, __: Sequence[str]) -> Table:
    """Every count of the header is checked against the bytes first. Fields of several numbers a point are left out."""
    start = re.search(rb"^DATA[ \t]+(\w+)[ \t]*\r?\n", data[:65536], re.MULTILINE)
    if start is None:
        raise BadSample("has no PCD header with a DATA line")
    lines = (line.split() for line in data[: start.end()].decode("latin-1").splitlines() if not line.startswith("#"))
    header = {line[0]: line[1:] for line in lines if line}
    names, kinds = header.get("FIELDS", header.get("COLUMNS", [])), header.get("TYPE", [])
    sizes = [int(size) for size in header.get("SIZE", [])]
    counts = [int(count) for count in header.get("COUNT", ["1"] * len(names))]
    if not len(names) == len(kinds) == len(sizes) == len(counts) or min(counts, default=0) < 1:
        raise BadSample("its header does not give a type, size and count for each field")
    if not {"x", "y", "z"} <= set(names):
        raise BadSample(f"has no x, y, z (it has: {', '.join(names)})")
    width, height = (int(header.get(key, ["1"])[0]) for key in ("WIDTH", "HEIGHT"))
    points = int(header.get("POINTS", [width * height])[0])
    if points != width * height or not 0 < points <= MAX_POINTS:
        raise BadSample(f"declares {points} points in {width} x {height}")
    layout = np.dtype(
        [(f"f{i}", _PCD_TYPES[kind, size], (n,)) for i, (kind, size, n) in enumerate(zip(kinds, sizes, counts))]
    )
    body, words = data[start.end() :], start[1].decode()
    if words == "ascii":
        columns = _pcd_text(body, points, counts)
    elif words == "binary":
        if len(body) < points * layout.itemsize:
            raise BadSample(f"{len(body) // layout.itemsize} of {points} declared points are there")
        array = np.frombuffer(body, layout, points)
        columns = [array[name][:, 0] for name in layout.names or ()]
    elif words == "binary_compressed":
        columns = _pcd_packed(body, points, layout)
    else:
        raise BadSample(f"its points are stored as {words!r}, not ascii, binary or binary_compressed")
    table: Table = {name: column for name, column, n in zip(names, columns, counts) if n == 1 and name != "_"}
    for packed in {"rgb", "rgba"} & set(table):
        values = table.pop(packed)
        bits = values.astype("<f4").view("<u4") if kinds[names.index(packed)] == "F" else values.astype(np.uint32)
        table["colors"] = np.stack([bits >> 16 & 255, bits >> 8 & 255, bits & 255], 1).astype(np.uint8)
    return table


_PCD_TYPES = {(kind, size): f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)} | {
    ("F", 4): "<f4",
    ("F", 8): "<f8",
}


def _pcd_text(body: bytes, points: int, counts: list[int]) -> list[np.ndarray]:
    """By numpy: Open3D reads an unreadable number as 0 and a short line as none."""
    array = np.loadtxt(io.BytesIO(body), dtype=np.float64, comments=None, ndmin=2) if body.strip() else np.zeros((0, 0))
    if len(array) != points:
        raise BadSample(f"{len(array)} of {points} declared points are there")
    if array.shape[1] != sum(counts):
        raise BadSample(f"has {array.shape[1]} numbers a point, the header declares {sum(counts)}")
    return [array[:, at] for at in np.cumsum([0, *counts[:-1]])]


def _pcd_packed(body: bytes, points: int, layout: np.dtype) -> list[np.ndarray]:
    """Unpacked by Open3D, field after field, as columns of single bytes: some headers, so read, end the process."""
    packed, unpacked = struct.unpack_from("<2I", body) if len(body) >= 8 else (1, 0)
    if packed > len(body) - 8 or unpacked != points * layout.itemsize:
        raise BadSample(f"{max(0, len(body) - 8)} of {packed} declared bytes of packed points are there")
    flat = unpack_pcd(body, points, layout.itemsize)
    columns, at = [], 0
    for name in layout.names or ():
        columns.append(np.frombuffer(flat, layout[name].base, points, at))
        at += points * layout[name].itemsize
    return columns
