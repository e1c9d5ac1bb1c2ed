"""Reads the lines of text files, plain or gzipped, one by one with their numbers and any problems.

A line is left out, with its number, if it is not UTF-8, empty, or longer than MAX_LINE_BYTES; a file is refused if it
is UTF-16 or its gzip stream is damaged. Only "\\n" ends a line, so that line numbers agree with other tools; "\\r"
before it and a byte order mark at the start of a file are not part of the text. No torch, no Ray.
"""

import gzip
import io
import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slimray.data.paths import GZIP, without_gzip
from slimray.spec import RunFailed

MAX_LINE_BYTES = 100_000
EMPTY, NOT_UTF8, ZERO = "is empty", "is not UTF-8", "holds a zero byte"
TOO_LONG = f"is longer than {MAX_LINE_BYTES:,} bytes"
WIDE = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
FORMATS = {".tsv": "tsv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Line:
    """A line, or the same line of both files of a pair: its number from 1, its texts, and why it is left out or ""."""

    number: int
    texts: tuple[str, ...]
    reason: str = ""


def format_of(name: str) -> str:
    """Return the format of the file `name`: "tsv", "parquet", or "lines"."""
    plain = without_gzip(name.lower())
    return next((form for ending, form in FORMATS.items() if plain.endswith(ending)), "lines")


def read_lines(name: str, data: bytes) -> Iterator[Line]:
    """Yield the lines of a file; raise RunFailed, with file and line, for one that is not text or is truncated."""
    stream = io.BytesIO(data)
    return lines_of(name, gzip.GzipFile(fileobj=stream) if data[:2] == GZIP else stream)


def lines_of(name: str, unpacked: Any) -> Iterator[Line]:
    """Yield the lines of a binary stream while it is read; raises like `read_lines`."""
    for number in itertools.count(1):
        try:
            raw = _next_line(unpacked)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            what = "is truncated" if isinstance(error, EOFError) else "is damaged"
            raise RunFailed(f"{name}: the gzip file {what} after line {number - 1:,}: copy it again") from None
        if not raw:
            return
        if number == 1:
            if raw[:2] in WIDE:
                raise RunFailed(f"{name}: is {WIDE[raw[:2]]}: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        yield _line(number, raw)


def _next_line(stream: Any) -> bytes:
    """Return the next line with its end, at most its first MAX_LINE_BYTES + 2 bytes; the rest of it is skipped."""
    raw = rest = stream.readline(MAX_LINE_BYTES + 2)
    while rest and not rest.endswith(b"\n"):
        rest = stream.readline(1 << 20)
    return raw


def _line(number: int, raw: bytes) -> Line:
    raw = raw.removesuffix(b"\n").removesuffix(b"\r")
    if len(raw) > MAX_LINE_BYTES:
        return Line(number, ("",), TOO_LONG)
    if b"\0" in raw:
        return Line(number, ("",), ZERO)
    try:
        text = raw.decode().strip()
    except UnicodeDecodeError as error:
        return Line(number, ("",), f"{NOT_UTF8} (byte {error.start})")
    return Line(number, (text,), "" if text else EMPTY)


def read_pairs(names: tuple[str, str], data: tuple[bytes, bytes]) -> Iterator[Line]:
    """Yield the lines of two files side by side; raise RunFailed if one has more lines than the other."""
    readers = [read_lines(name, one) for name, one in zip(names, data, strict=True)]
    for number in itertools.count(1):
        found = [next(reader, None) for reader in readers]
        first, second = found
        if first is None and second is None:
            return
        if first is None or second is None:
            counts = [number - 1 + (one is not None) + sum(1 for _ in reader) for one, reader in zip(found, readers)]
            raise RunFailed(
                f"{names[0]} has {counts[0]:,} lines, but {names[1]} has {counts[1]:,}, and line N of one must be the "
                "translation of line N of the other: copy both again"
            )
        reasons = [f"{name}: {one.reason}" for name, one in zip(names, (first, second)) if one.reason]
        yield Line(number, first.texts + second.texts, "; ".join(reasons))


def read_tsv(name: str, data: bytes, columns: Sequence[str]) -> Iterator[Line]:
    """Yield `columns` of a tab-separated file, given by number from 1, or by name if its first line names them.

    Raises RunFailed like `read_lines`, and for a missing column.
    """
    places: list[int] = []
    named = not all(column.isdigit() for column in columns)
    for line in read_lines(name, data):
        fields = [field.strip() for field in line.texts[0].split("\t")]
        if not places:
            if named and line.reason:
                raise RunFailed(f"{name}: its first line {line.reason}, but must name the columns {', '.join(columns)}")
            places = [_column(name, column, fields if named else []) for column in columns]
            if named:
                continue
        if line.reason:
            yield Line(line.number, ("",) * len(columns), line.reason)
        elif len(fields) <= max(places):
            yield Line(line.number, ("",) * len(columns), f"has {len(fields)} columns, needs {max(places) + 1}")
        else:
            texts = tuple(fields[place] for place in places)
            yield Line(line.number, texts, "" if all(texts) else EMPTY)


def _column(name: str, column: str, header: Sequence[str]) -> int:
    if not header:
        return max(0, int(column) - 1)
    if column not in header:
        raise RunFailed(f"{name}: has no column {column!r} (it has: {', '.join(header)}): fix text_columns of the card")
    return header.index(column)


def read_parquet(name: str, data: bytes, columns: Sequence[str]) -> Iterator[Line]:
    """Yield `columns` of a Parquet file, by name; line numbers are those of rows, from 1. Raises RunFailed."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        header = list(file.schema_arrow.names)
        for column in columns:
            _column(name, column, header)
        number = 0
        for batch in file.iter_batches(batch_size=4096, columns=list(columns)):
            for values in zip(*(batch.column(column).to_pylist() for column in columns), strict=True):
                number += 1
                texts = tuple(value.strip() if isinstance(value, str) else "" for value in values)
                long = any(len(text.encode()) > MAX_LINE_BYTES for text in texts)
                yield Line(number, texts, TOO_LONG if long else "" if all(texts) else EMPTY)
    except (pa.ArrowException, OSError) as error:
        raise RunFailed(
            f"{name}: is not a complete Parquet file ({str(error).splitlines()[0][:100]}): copy it again"
        ) from None


def read_texts(names: Sequence[str], data: Sequence[bytes], columns: Sequence[str]) -> Iterator[Line]:
    """Yield the lines of one file, or of a pair, in the format given by the extension; `columns` are those of tables.

    Raises RunFailed for files that cannot be read.
    """
    form = format_of(names[0])
    if form == "tsv":
        return read_tsv(names[0], data[0], columns)
    if form == "parquet":
        return read_parquet(names[0], data[0], columns)
    return read_lines(names[0], data[0]) if len(names) == 1 else read_pairs((names[0], names[1]), (data[0], data[1]))
