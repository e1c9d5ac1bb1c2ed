"""The index of a split: an Arrow table with a row per sample that locates its bytes and describes it."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.compute import call_function  # type checkers do not know the functions pyarrow.compute creates at import

INDEX = pa.schema(
    [
        ("path", pa.string()),  # relative to the root; unique in a split
        ("label", pa.int64()),
        ("frames", pa.int32()),  # of a clip, or points of a cloud; here and below 0 means unknown
        ("fps", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("shard", pa.string()),  # "" if the sample is a file, or a folder of pictures, of its own
        ("row", pa.int32()),  # row group in the shard; in a .bin or idx file the byte where the pixels begin; else -1
        ("offset", pa.int64()),  # of the column chunk with its data in the shard, read with one request; else -1
        ("length", pa.int32()),  # of that chunk; 0 means unknown
    ]
)
FOUND_LATER = ("offset", "length")  # not in indexes from before 2026-11-30; they follow from shard and row
PIECE = 1 << 20  # rows processed at a time, as there may be a hundred million
NOTES = b"notes"  # key in the metadata of the schema
UNKNOWN = {"frames": 0, "fps": 0.0, "width": 0, "height": 0, "shard": "", "row": -1, "offset": -1, "length": 0}


def index_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return rows, which have at least path and label, as a table with the columns of INDEX."""
    return pa.Table.from_pylist([UNKNOWN | row for row in rows], schema=INDEX)


def with_notes(table: pa.Table, notes: list[str]) -> pa.Table:
    """Return the index with sentences for the user in its metadata, such as what was left out of a split."""
    return table.replace_schema_metadata({NOTES: json.dumps(notes)} if notes else None)


def notes_of(table: pa.Table) -> list[str]:
    """Return the sentences for the user in the metadata of an index."""
    return json.loads((table.schema.metadata or {}).get(NOTES, b"[]"))


def pieces_of(column: pa.ChunkedArray) -> Iterator[pa.Array]:
    """Yield a column in arrays of at most PIECE values."""
    for chunk in column.chunks:
        for start in range(0, len(chunk), PIECE):
            yield chunk.slice(start, PIECE)


def fingerprint(table: pa.Table) -> str:
    """Return the digest of an index, 64 hexadecimal digits: equal for equal rows in equal order, except FOUND_LATER."""
    digest = hashlib.sha256()
    for column in INDEX:
        if column.name in FOUND_LATER:
            continue
        values, between = table.column(column.name), b""
        if pa.types.is_string(column.type):
            length = call_function("sum", [call_function("binary_length", [values])]).as_py() or 0
            size = length + max(0, len(values) - 1)  # with the line breaks
        else:
            kind = np.dtype(column.type.to_pandas_dtype()).newbyteorder("<")
            size = len(values) * kind.itemsize
        digest.update(f"{column.name} {size}\n".encode())
        for piece in pieces_of(values):
            if pa.types.is_string(column.type):
                lines = call_function("binary_join_element_wise", [piece, "", "\n"])  # a line break at the end of each
                end = int(np.frombuffer(lines.buffers()[1], np.int32)[len(lines)])
                digest.update(between)
                digest.update(memoryview(lines.buffers()[2])[: end - 1])
                between = b"\n"
            else:
                digest.update(piece.to_numpy(zero_copy_only=False).astype(kind).tobytes())
    return digest.hexdigest()
