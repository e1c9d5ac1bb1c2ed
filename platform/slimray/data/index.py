"""The index of a split: an Arrow table, a row per sample, that says where its bytes are and what it is."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.compute import call_function  # its other functions are made when it is imported: no checker knows them

INDEX = pa.schema(
    [
        ("path", pa.string()),  # relative to the root; unique in a split
        ("label", pa.int64()),
        ("frames", pa.int32()),  # of a clip, points of a cloud; 0 = unknown, also below
        ("fps", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("shard", pa.string()),  # "" = a file, or a folder of pictures, of its own
        ("row", pa.int32()),  # row group in the shard, in a .bin or idx file the byte where the pixels begin; else -1
        ("offset", pa.int64()),  # of the column chunk with its data in the shard, whose bytes are one request; else -1
        ("length", pa.int32()),  # of that chunk; 0 = unknown
    ]
)
FOUND_LATER = ("offset", "length")  # not in indexes of before 2026-11-30; they follow from shard and row
PIECE = 1 << 20  # rows looked at at a time, where there may be a hundred million
NOTES = b"notes"  # in the metadata of its schema
UNKNOWN = {"frames": 0, "fps": 0.0, "width": 0, "height": 0, "shard": "", "row": -1, "offset": -1, "length": 0}


def index_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows with at least path and label as a table with the columns of INDEX."""
    return pa.Table.from_pylist([UNKNOWN | row for row in rows], schema=INDEX)


def with_notes(table: pa.Table, notes: list[str]) -> pa.Table:
    """Return an index that carries sentences for its user: what of a split was left out."""
    return table.replace_schema_metadata({NOTES: json.dumps(notes)} if notes else None)


def notes_of(table: pa.Table) -> list[str]:
    """Return the sentences that an index carries for its user."""
    return json.loads((table.schema.metadata or {}).get(NOTES, b"[]"))


def pieces_of(column: pa.ChunkedArray) -> Iterator[pa.Array]:
    """Yield a column in arrays of at most PIECE values."""
    for chunk in column.chunks:
        for start in range(0, len(chunk), PIECE):
            yield chunk.slice(start, PIECE)


def fingerprint(table: pa.Table) -> str:
    """A digest of an index, 64 hexadecimal digits: equal content in equal order, equal digest, FOUND_LATER left out."""
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
