"""The index of a split as written by `prepare`: a Parquet file, read and checked column by column.

A large index is not held in memory: it is copied piece by piece into a local Arrow file, which is memory-mapped and
already unlinked, so that it disappears with the last table that uses it. Checks work on a piece at a time, too; only
the search for duplicate paths needs all rows at once, and holds 8 bytes per row.
"""

import errno
import functools
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pyarrow.compute import MatchSubstringOptions, call_function

from slimray import storage
from slimray.data.index import FOUND_LATER, INDEX, PIECE, UNKNOWN, pieces_of
from slimray.data.paths import inside
from slimray.spec import UserError

MAPPED = 2_000_000  # from this many rows on, an index is mapped from a file in the temporary folder ($TMPDIR)
MANY = 8192  # small tables that are collected and written together
PART_BYTES = 64 << 20  # read at a time from a file in a bucket
OUTSIDE = r"^$|^/|://|(^|/)\.\.(/|$)|[\x00-\x1f\x7f]"  # what `inside` refuses


def read_parquet(fs: pafs.FileSystem, path: str) -> pa.Table:
    """Return the rows of a Parquet file as a table with the columns of INDEX.

    Raises FileNotFoundError if it is missing, pa.ArrowException or KeyError if it is not an index, StorageError, and
    UserError if the temporary folder is full.
    """
    with tempfile.TemporaryDirectory(prefix="slimray-index-") as scratch:
        try:
            with pq.ParquetFile(_file(fs, path, Path(scratch) / "index.parquet")) as source:
                there = [n for n in INDEX.names if n in source.schema_arrow.names or n not in FOUND_LATER]
                pieces = (
                    _completed(pa.Table.from_batches([batch])).select(INDEX.names).cast(INDEX)
                    for batch in source.iter_batches(PIECE, columns=there)
                )
                if source.metadata.num_rows < MAPPED:
                    return pa.concat_tables([INDEX.empty_table(), *pieces]).combine_chunks()
                local = str(Path(scratch) / "index.arrow")
                with pa.OSFile(local, "wb") as sink, pa.ipc.new_file(sink, INDEX) as writer:
                    for piece in pieces:
                        writer.write_table(piece.combine_chunks())
            return pa.ipc.open_file(pa.memory_map(local)).read_all()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(f"{scratch}: has no space for the index {path}: set TMPDIR to a larger folder") from None


def _completed(piece: pa.Table) -> pa.Table:
    """Return rows of an index with the columns added that older indexes lack."""
    for name in FOUND_LATER:
        if name not in piece.column_names:
            piece = piece.append_column(name, pa.repeat(UNKNOWN[name], piece.num_rows))
    return piece


def _file(fs: pafs.FileSystem, path: str, to: Path) -> pa.BufferReader | str:
    """Return the file in memory if it is small, else its local path; a file in a bucket is copied to `to` for that."""
    part = storage.read_bytes(fs, path, PART_BYTES)
    if len(part) < PART_BYTES:
        return pa.BufferReader(part)
    if isinstance(fs, pafs.LocalFileSystem):
        return path

    def read(start: int) -> bytes:
        with fs.open_input_file(path) as source:
            return source.read_at(PART_BYTES, start)

    with open(to, "wb") as file:
        while part:
            file.write(part)
            part = storage.retry(functools.partial(read, file.tell()), "read", path)
    return str(to)


class IndexWriter:
    """Writes the rows of an index to a Parquet file, PIECE of them at a time."""

    def __init__(self, path: Path):
        self.path, self.num_rows, self.num_waiting = path, 0, 0
        self.waiting: list[pa.Table] = []
        self.writer = pq.ParquetWriter(path, INDEX)

    def add(self, table: pa.Table) -> None:
        """Add rows with the columns of INDEX."""
        self.waiting.append(table)
        self.num_rows += table.num_rows
        self.num_waiting += table.num_rows
        if self.num_waiting >= PIECE or len(self.waiting) >= MANY:
            self._write()

    def _write(self) -> None:
        self.writer.write_table(pa.concat_tables([INDEX.empty_table(), *self.waiting]).combine_chunks())
        self.waiting, self.num_waiting = [], 0

    def close(self) -> Path:
        """Finish the file and return its path."""
        self._write()
        self.writer.close()
        return self.path


def require_sound(table: pa.Table, where: str) -> None:
    """Raise UserError for an index without rows, with gaps, with duplicate paths or with one that leaves the root."""
    if table.num_rows == 0 or any(column.null_count for column in table.columns):
        raise UserError(f"{where}: is empty or has gaps: run prepare again")
    if repeated(table.column("path")) is not None:
        raise UserError(f"{where}: lists a path twice: run prepare again")
    for piece in table.column("path").chunks:
        _require_inside(piece, where)
    for shard in pieces_of(table.column("shard")):
        names = shard.unique()
        _require_inside(names.filter(call_function("not_equal", [names, ""])), where)


def _require_inside(paths: pa.Array, where: str) -> None:
    outside = call_function("match_substring_regex", [paths], MatchSubstringOptions(OUTSIDE))
    if (found := np.flatnonzero(outside.to_numpy(zero_copy_only=False))).size:
        inside(paths[int(found[0])].as_py(), where)


def repeated(column: pa.ChunkedArray) -> str | None:
    """Return a string that occurs more than once in a column, None if there is none."""
    hashes = _hashes(column)
    hashes.sort()
    twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(twice):
        return None
    rows = np.flatnonzero(np.isin(_hashes(column), twice))
    found = Counter(column.take(pa.array(rows)).to_pylist())
    return next((value for value, count in found.items() if count > 1), None)


def _hashes(column: pa.ChunkedArray) -> np.ndarray:
    """Return Python's hash of each string, int64 `[n]`; that it differs between processes does not matter here."""
    out, start = np.empty(len(column), np.int64), 0
    for piece in pieces_of(column):
        out[start : start + len(piece)] = np.fromiter(map(hash, piece.to_pylist()), np.int64, len(piece))
        start += len(piece)
    return out
