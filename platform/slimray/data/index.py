"""The index of a split: an Arrow table, a row per sample, that says where its bytes are and what it is."""

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa

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
    ]
)
NOTES = b"notes"  # in the metadata of its schema
UNKNOWN = {"frames": 0, "fps": 0.0, "width": 0, "height": 0, "shard": "", "row": -1}


def index_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows with at least path and label as a table with the columns of INDEX."""
    return pa.Table.from_pylist([UNKNOWN | row for row in rows], schema=INDEX)


def with_notes(table: pa.Table, notes: list[str]) -> pa.Table:
    """Return an index that carries sentences for its user: what of a split was left out."""
    return table.replace_schema_metadata({NOTES: json.dumps(notes)} if notes else None)


def notes_of(table: pa.Table) -> list[str]:
    """Return the sentences that an index carries for its user."""
    return json.loads((table.schema.metadata or {}).get(NOTES, b"[]"))


def fingerprint(table: pa.Table) -> str:
    """A digest of an index, 64 hexadecimal digits: equal content in equal order, equal digest."""
    digest = hashlib.sha256()
    for column in INDEX:
        values = table.column(column.name)
        if pa.types.is_string(column.type):
            content = "\n".join(values.to_pylist()).encode()
        else:
            kind = np.dtype(column.type.to_pandas_dtype()).newbyteorder("<")
            content = values.to_numpy().astype(kind).tobytes()
        digest.update(f"{column.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
