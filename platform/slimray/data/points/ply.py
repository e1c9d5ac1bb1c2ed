"""Reads the vertices of PLY files, text and binary of either byte order, after counting all elements."""

import io
import re

import numpy as np

from slimray.data.points.clouds import MAX_POINTS, Table
from slimray.data.points.columns import Columns
from slimray.data.samples import BadSample

MAX_HEADER = 1 << 20
SIZES = {"char": 1, "short": 2, "int": 4, "float": 4, "double": 8, "uchar": 1, "ushort": 2, "uint": 4} | {
    f"{kind}{bits}": bits // 8 for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)
}
_FORMAT = re.compile(r"format (ascii|binary_little_endian|binary_big_endian) 1\.0")
_ELEMENT = re.compile(r"element (\S+) (\d{1,18})")
_PROPERTY = re.compile(r"property (\w+) (\S+)|property list (\w+) (\w+) (\S+)")


def read_ply(data: bytes, _: str, __: Columns) -> Table:
    """Read the properties of the vertices of a PLY file, except lists. Raises BadSample."""
    import plyfile

    clean = checked_ply(data)
    stream = io.BytesIO(clean)
    elements = plyfile.PlyData.read(stream)
    if not elements.text and clean[stream.tell() :].strip(b" \t\r\n\0"):
        raise BadSample(f"{len(clean) - stream.tell()} bytes follow the declared elements")
    if "vertex" not in elements:
        raise BadSample("has no vertices")
    vertices = elements["vertex"].data
    names = [name for name in vertices.dtype.names or () if vertices.dtype[name].kind in "fiu"]
    return [(name, np.ascontiguousarray(vertices[name])) for name in names]


def checked_ply(data: bytes) -> bytes:
    """Return the file without its comments, which may be long and need not be ASCII. Raises BadSample.

    Declared counts are compared with the bytes or lines of the file.
    """
    end = re.search(rb"^end_header[ \t]*(\r\n|\n|\r)", data[:MAX_HEADER].replace(b"\r", b"\n"), re.MULTILINE)
    if end is None:
        raise BadSample("has no PLY header with an end")
    head = data[: end.start()].decode("latin-1").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    start = end.end()
    if data[start - 1 : start + 1] == b"\r\n" and data[3:5] == b"\r\n":
        start += 1
    kept, elements, form = ["ply"], list[tuple[str, int, int]](), None
    for line in (" ".join(line.split()) for line in head[1:]):
        if not line or line.partition(" ")[0] in ("comment", "obj_info"):
            continue
        if found := _FORMAT.fullmatch(line):
            form = found[1]
        elif found := _ELEMENT.fullmatch(line):
            elements.append((found[1], int(found[2]), 0))
        elif (found := _PROPERTY.fullmatch(line)) and elements and (found[1] or found[3]) in SIZES:
            name, count, size = elements[-1]
            elements[-1] = (name, count, size + SIZES[found[1] or found[3]])
        else:
            raise BadSample(f"its header has a line that is not valid PLY: {line[:80]!r}")
        kept.append(line)
    if form is None:
        raise BadSample("its header does not name a format")
    _check_counts(data[start:] if form == "ascii" else len(data) - start, elements)
    return "\n".join([*kept, "end_header", ""]).encode("latin-1") + data[start:]


def _check_counts(body: bytes | int, elements: list[tuple[str, int, int]]) -> None:
    """Compare the declared elements (name, count, minimum size of a row) with a text, or with a number of bytes."""
    declared = sum(count for _, count, _ in elements)
    vertices = next((count for name, count, _ in elements if name == "vertex"), 0)
    if vertices > MAX_POINTS:
        raise BadSample(f"declares {vertices} points")
    if isinstance(body, bytes):
        there = sum(1 for line in body.replace(b"\r", b"\n").split(b"\n") if line.strip())
        if there != declared:
            raise BadSample(f"{there} of {declared} declared points and faces are there")
        return
    least = sum(count * size for _, count, size in elements)
    if least > body or declared > body:
        raise BadSample(f"declares {declared} points and faces of at least {least} bytes, but {body} bytes are there")
