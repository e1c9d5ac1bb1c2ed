"""Reads PCD files, ascii, binary and compressed, after checking every count of the header against the bytes."""

import io
import re
import struct

import numpy as np

from slimray.data.points.clouds import MAX_POINTS, Table
from slimray.data.points.columns import Columns
from slimray.data.points.geometry import unpack_lzf
from slimray.data.samples import BadSample

MAX_HEADER = 65_536
MAX_RATIO = 132  # of LZF: three bytes expand to at most 264, and a run has at least two
TYPES = {(kind, size): f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)} | {
    ("F", 4): "<f4",
    ("F", 8): "<f8",
}


def read_pcd(data: bytes, _: str, __: Columns) -> Table:
    """Read the fields of a PCD file, except those with several numbers per point. Raises BadSample."""
    start = re.search(rb"^DATA[ \t]+(\w+)[ \t]*\r?\n", data[:MAX_HEADER], re.MULTILINE)
    if start is None:
        raise BadSample("has no PCD header with a DATA line")
    names, kinds, counts, points, layout = _header(data[: start.end()].decode("latin-1"))
    body, words = data[start.end() :], start[1].decode()
    if words == "ascii":
        columns = _from_text(body, points, counts)
    elif words == "binary":
        there = len(body) // layout.itemsize
        if there < points or len(body) - points * layout.itemsize >= max(layout.itemsize, 2):
            raise BadSample(f"{there} of {points} declared points are there")
        array = np.frombuffer(body, layout, points)
        columns = [array[name][:, 0] for name in layout.names or ()]
    elif words == "binary_compressed":
        columns = _from_packed(body, points, layout)
    else:
        raise BadSample(f"its points are stored as {words!r}, not ascii, binary or binary_compressed")
    table: Table = []
    for name, column, kind, count in zip(names, columns, kinds, counts, strict=True):
        if name in ("rgb", "rgba") and count == 1:
            bits = column.astype("<f4").view("<u4") if kind == "F" else column.astype(np.uint32)
            table.append(("colors", np.stack([bits >> 16 & 255, bits >> 8 & 255, bits & 255], 1).astype(np.uint8)))
        elif count == 1 and name != "_":
            table.append((name, column))
    return table


def _header(text: str) -> tuple[list[str], list[str], list[int], int, np.dtype]:
    """Return names, types and counts of the fields, the number of points, and the layout of one point."""
    lines = (line.split() for line in text.splitlines() if not line.startswith("#"))
    header = {line[0]: line[1:] for line in lines if line}
    names, kinds = header.get("FIELDS", header.get("COLUMNS", [])), header.get("TYPE", [])
    sizes, counts = header.get("SIZE", []), header.get("COUNT", ["1"] * len(names))
    width, height = (header.get(key, ["1"]) for key in ("WIDTH", "HEIGHT"))
    for number in (*sizes, *counts, *width, *height, *header.get("POINTS", [])):
        if not re.fullmatch(r"\d{1,18}", number):
            raise BadSample(f"its header has {number[:40]!r} instead of a number")
    if not len(names) == len(kinds) == len(sizes) == len(counts) or "0" in counts or not width or not height:
        raise BadSample("its header does not give a type, size and count for each field")
    if not {"x", "y", "z"} <= set(names):
        raise BadSample(f"has no x, y, z (it has: {', '.join(names)})")
    points = int((header.get("POINTS") or [int(width[0]) * int(height[0])])[0])
    if points != int(width[0]) * int(height[0]) or not 0 < points <= MAX_POINTS:
        raise BadSample(f"declares {points} points in {width[0]} x {height[0]}")
    if sum(int(count) * int(size) for count, size in zip(counts, sizes, strict=True)) > MAX_HEADER:
        raise BadSample(f"declares more than {MAX_HEADER:,} bytes per point")
    for kind, size in zip(kinds, sizes, strict=True):
        if (kind, int(size)) not in TYPES:
            raise BadSample(f"has a field of type {kind} and {size} bytes, which PCD does not have")
    numbers = [int(count) for count in counts]
    fields = [(f"f{i}", TYPES[k, int(s)], (n,)) for i, (k, s, n) in enumerate(zip(kinds, sizes, numbers, strict=True))]
    return names, kinds, numbers, points, np.dtype(fields)


def _from_text(body: bytes, points: int, counts: list[int]) -> list[np.ndarray]:
    """Parse text with numpy, because Open3D reads an invalid number as 0 and skips a short line."""
    array = np.loadtxt(io.BytesIO(body), dtype=np.float64, comments=None, ndmin=2) if body.strip() else np.zeros((0, 0))
    if len(array) != points:
        raise BadSample(f"{len(array)} of {points} declared points are there")
    if array.shape[1] != sum(counts):
        raise BadSample(f"has {array.shape[1]} numbers per point, but the header declares {sum(counts)}")
    return [array[:, at] for at in np.cumsum([0, *counts[:-1]])]


def _from_packed(body: bytes, points: int, layout: np.dtype) -> list[np.ndarray]:
    """Unpack columns, which are stored one after the other and compressed together."""
    packed, unpacked = struct.unpack_from("<2I", body) if len(body) >= 8 else (1, 0)
    if packed > len(body) - 8 or unpacked != points * layout.itemsize or unpacked > packed * MAX_RATIO:
        raise BadSample(f"{max(0, len(body) - 8)} of {packed} declared bytes of packed points are there")
    flat = unpack_lzf(body[8 : 8 + packed], unpacked)
    columns, at = [], 0
    for name in layout.names or ():
        columns.append(np.frombuffer(flat, layout[name].base, points, at))
        at += points * layout[name].itemsize
    return columns
