"""Reads LAS and LAZ files: scaled coordinates, classification, intensity, colors, and extra dimensions by name."""

import io
import struct

import numpy as np

from slimray.data.points.clouds import MAX_POINTS, Table
from slimray.data.points.columns import Columns
from slimray.data.samples import BadSample

VARIABLE_CHUNKS = 0xFFFFFFFF


def read_las(data: bytes, _: str, __: Columns) -> Table:
    """Read all points. laspy returns as many as it finds, so their number is compared with the header.

    Raises BadSample if the file does not hold the points it declares.
    """
    import laspy

    _check_header(data)
    with laspy.open(io.BytesIO(data)) as reader:
        header = reader.header
        declared, start, size = header.point_count, header.offset_to_point_data, header.point_format.size
        if declared > MAX_POINTS:
            raise BadSample(f"declares {declared} points")
        if header.are_points_compressed:
            low, high = _chunk_bounds(data, header)
            if not low <= declared <= high:
                raise BadSample(f"{declared} points are declared, but {low} to {high} are there")
        else:
            end = _end_of_points(data, header, start + declared * size)
            if end - start < declared * size or end - start >= (declared + 1) * size:
                raise BadSample(f"{max(0, end - start) // size} of {declared} declared points are there")
        if declared == 0:
            raise BadSample("has 0 usable points of 0")
        las = reader.read()
    if len(las.points) != declared:
        raise BadSample(f"{len(las.points)} of {declared} declared points are there")
    known, extra = set(las.point_format.dimension_names), list(las.point_format.extra_dimension_names)
    names = [name for name in ("intensity", "red", "green", "blue") if name in known and name not in extra]
    table: Table = [("coords", np.asarray(las.xyz)), ("classification", np.asarray(las.classification))]
    for name in [*names, *extra]:
        array = np.asarray(las[name])
        if array.dtype.kind in "fiu":
            table.append((name, array))
    return table


def _check_header(data: bytes) -> None:
    """Check counts that laspy and lazrs trust: too many records take minutes, too many chunks crash the process."""
    if len(data) < 227:
        raise BadSample(f"has {len(data)} bytes, less than a LAS header")
    minor, compressed = data[25], data[104] >= 128
    start, records = struct.unpack_from("<2I", data, 96)
    extended = struct.unpack_from("<I", data, 243)[0] if minor >= 4 and len(data) >= 375 else 0
    if start > len(data) or 54 * records + 60 * extended > len(data):
        raise BadSample(f"declares {records + extended} records and points from byte {start} in {len(data)} bytes")
    if compressed and _num_chunks(data, start) > len(data):
        raise BadSample("its table of chunks is truncated or damaged")


def _num_chunks(data: bytes, start: int) -> int:
    """Return the number of chunks that a LAZ file declares, or more than its bytes if the table is outside the file."""
    table = struct.unpack_from("<q", data, start)[0] if len(data) >= start + 8 else len(data)
    table = struct.unpack_from("<q", data, len(data) - 8)[0] if table == -1 else table
    return struct.unpack_from("<I", data, table + 4)[0] if 0 <= table <= len(data) - 8 else len(data) + 1


def _chunk_bounds(data: bytes, header) -> tuple[int, int]:
    """Return the minimum and maximum number of points that the chunks of a LAZ file may hold."""
    records = [one for one in header.vlrs if getattr(one, "record_id", 0) == 22204]
    raw = bytes(records[0].record_data_bytes()) if records else b""
    size = struct.unpack_from("<I", raw, 12)[0] if len(raw) >= 16 else VARIABLE_CHUNKS
    chunks = _num_chunks(data, header.offset_to_point_data)
    if size in (0, VARIABLE_CHUNKS):
        return 0, MAX_POINTS
    return max(0, chunks - 1) * size + min(chunks, 1), chunks * size


def _end_of_points(data: bytes, header, expected: int) -> int:
    """Return the end of the points of a LAS file: the start of the records behind them, or the end of the file."""
    starts = [len(data)]
    if header.version.minor >= 4 and len(data) >= 375 and struct.unpack_from("<I", data, 243)[0]:
        starts.append(struct.unpack_from("<Q", data, 235)[0])
    if header.version.minor >= 3 and len(data) >= 235:
        waves = struct.unpack_from("<Q", data, 227)[0]
        starts += [waves] if waves else []
    return min([one for one in starts if one >= expected], default=min(starts))
