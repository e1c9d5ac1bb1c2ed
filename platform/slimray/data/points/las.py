"""LAS and LAZ files: scaled coordinates, classification, intensity, colors."""

import io
import struct
from collections.abc import Sequence

import numpy as np

from slimray.data.points.clouds import MAX_POINTS, Table
from slimray.data.samples import BadSample


def read_las(data: bytes, _: str, __: Sequence[str]) -> Table:
    """Scaled coordinates, the classification as label, intensity and colors. Points are counted: laspy does not."""
    import laspy

    _check_las(data)
    with laspy.open(io.BytesIO(data)) as reader:
        header = reader.header
        declared, there = header.point_count, (len(data) - header.offset_to_point_data) // header.point_format.size
        if declared > MAX_POINTS or (declared > there and not header.are_points_compressed):
            raise BadSample(f"{there} of {declared} declared points are there")
        las = reader.read()
    if len(las.points) != declared:
        raise BadSample(f"{len(las.points)} of {declared} declared points are there")
    table = {"coords": np.asarray(las.xyz), "label": np.asarray(las.classification)}
    known = set(las.point_format.dimension_names)
    return table | {name: np.asarray(las[name]) for name in ("intensity", "red", "green", "blue") if name in known}


def _check_las(data: bytes) -> None:
    """Counts that laspy and lazrs believe: too many records take minutes, too many chunks end the process."""
    if len(data) < 227:
        raise BadSample(f"has {len(data)} bytes, less than a LAS header")
    minor, compressed = data[25], data[104] >= 128
    start, records = struct.unpack_from("<2I", data, 96)
    extended = struct.unpack_from("<I", data, 243)[0] if minor >= 4 and len(data) >= 375 else 0
    if start > len(data) or 54 * records + 60 * extended > len(data):
        raise BadSample(f"declares {records + extended} records and points from byte {start} in {len(data)} bytes")
    if compressed:
        table = struct.unpack_from("<q", data, start)[0] if len(data) >= start + 8 else len(data)
        table = struct.unpack_from("<q", data, len(data) - 8)[0] if table == -1 else table
        chunks = struct.unpack_from("<I", data, table + 4)[0] if 0 <= table <= len(data) - 8 else len(data)
        if chunks > len(data):
            raise BadSample("its table of chunks is cut or broken")
