"""Reads clouds written as text, one point per line, however programs separate columns and write numbers.

A `Dialect` is a delimiter, a decimal mark and a thousands separator. A file with only blanks and decimal points is read
directly; if commas, semicolons or tabs occur, every dialect is tried, and numbers that can be read in two ways are an
error that names the choices, never a guess. An empty field is a missing number and does not shift columns.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from slimray.data.points.clouds import Table, named
from slimray.data.points.columns import DECIMALS, DELIMITERS, Columns, meaning, plain
from slimray.data.samples import BadSample

SAMPLE_BYTES = 100_000  # of the beginning, the middle and the end, from which the dialect is inferred
MAX_NAMES = 20_000  # limit on the characters of a line that names the columns
USUAL = {".xyzn": ("x", "y", "z", "nx", "ny", "nz"), ".xyzrgb": ("x", "y", "z", "r", "g", "b")}
MISSING = re.compile(r"|n/?a|null|none|[+-]?nan|[+-]?nan\(.*\)|[+-]?\d\.#\w*|[+-]?inf(inity)?", re.IGNORECASE)
NUMBERS = {  # (decimal mark, thousands separator)
    (".", ""): re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"),
    (",", ""): re.compile(r"[+-]?\d+(,\d+)?([eE][+-]?\d+)?"),
    (".", ","): re.compile(r"[+-]?(0|[1-9]\d{0,2}(,\d{3})*)(\.\d*)?"),
    (",", "."): re.compile(r"[+-]?(0|[1-9]\d{0,2}(\.\d{3})*)(,\d+)?"),
}


@dataclass(frozen=True)
class Dialect:
    """The notation of the numbers in a line: `delimiter` " " is any white space, `thousands` "" means no separator."""

    delimiter: str = " "
    decimal: str = "."
    thousands: str = ""

    def split(self, line: str) -> list[str]:
        """Return the fields of a line, without surrounding blanks."""
        if self.delimiter == " ":
            return line.split()
        if '"' in line:
            return [one.strip() for one in next(csv.reader([line], delimiter=self.delimiter, skipinitialspace=True))]
        return [one.strip() for one in line.split(self.delimiter)]

    def fits(self, word: str) -> bool:
        """Return whether a field is a number in this dialect, or stands for a missing one."""
        return bool(NUMBERS[self.decimal, self.thousands].fullmatch(word) or MISSING.fullmatch(word))

    def value(self, word: str) -> float:
        """Return the number in a field that fits; NaN for a missing one."""
        if MISSING.fullmatch(word):
            return float("nan")
        return float(word.replace(self.thousands, "").replace(self.decimal, ".") if word else "nan")

    def words(self) -> str:
        """Return the dialect as a user would write it in a list of columns."""
        names = [f"delimiter={name}" for name, mark in DELIMITERS.items() if mark == self.delimiter]
        return " ".join(names + [f"decimal={name}" for name, mark in DECIMALS.items() if mark == self.decimal])


def read_text(data: bytes, suffix: str, columns: Columns) -> Table:
    """Read lines of numbers. The first lines may be comments, column names or a number of points. Raises BadSample."""
    text = _decode(data)
    header, declared, start = _head(text, columns)
    body = text[start:]
    if not body.strip():
        raise BadSample("has no points")
    dialect = Dialect()
    if columns.delimiter or columns.decimal or any(mark in body for mark in ',;\t"'):
        dialect = _dialect(body, columns, header)
    array, lost = _numbers(body, dialect, columns)
    if declared is not None and declared != len(array):
        raise BadSample(f"{len(array)} of {declared} declared points are there")
    if not text.endswith("\n") and not _ends_whole(text, dialect):
        raise BadSample("the last line has no line break, so its last number may be truncated")
    names = _names(header, columns, array.shape[1])
    if names is not None:
        named_columns = [(name or f"column_{at + 1}", array[:, at]) for at, name in enumerate(names) if name != "-"]
        return [one for at, one in enumerate(named_columns) if at not in lost or names[at]]
    kept = [at for at in range(array.shape[1]) if at < 3 or at not in lost or columns.names]
    return named(array[:, kept], columns, USUAL.get(suffix, ()))


def _decode(data: bytes) -> str:
    """Decode text as UTF-16 by its byte order mark, else UTF-8, else Latin-1; lines end in \\n. Raises BadSample."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = data.decode("utf-16", "replace")
    else:
        data = data.removeprefix(b"\xef\xbb\xbf")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
    if "\0" in text[:4096]:
        raise BadSample("is not text: it contains zero bytes")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _lines(text: str, start: int = 0) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, each with the start of the next one."""
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        line = text[start:end].strip()
        start = end + 1
        if line:
            yield start, line


def _head(text: str, columns: Columns) -> tuple[list[str], int | None, int]:
    """Return the names of the columns ([] for none), the declared number of points or None, and where numbers start."""
    names, declared, start = [], None, 0
    for end, line in _lines(text):
        if line.startswith(("#", "//")):
            found = _split_names(line.lstrip("#/ "))
            names = found or names
        elif re.fullmatch(r"\d{1,18}", line) and declared is None:
            declared = int(line)
        elif found := _split_names(line):
            names = found
        elif not (start == 0 and columns.names and re.match(r"[\"']?(?!nan|inf)[A-Za-z_]", line)):
            break  # not a header line that the user's column names replace
        start = end
    return names, declared, min(start, len(text))


def _split_names(line: str) -> list[str]:
    """Return the names in a line that names x, y and z, split at whatever separates them; else []."""
    for mark in (";", "\t", ",", " ") if len(line) < MAX_NAMES else ():
        if mark in line:
            words = next(csv.reader([line], delimiter=mark)) if mark != " " else line.split()
            words = [word.strip() for word in words]
            if words and words[-1] == "":
                words.pop()
            return words if {"x", "y", "z"} <= {meaning(word) for word in words} else []
    return []


def _names(header: Sequence[str], columns: Columns, width: int) -> list[str] | None:
    """Return the name of each column from the header; None if the user's names, or none, apply. Raises BadSample."""
    if header and columns.names and len(columns.names) != width:
        there = {plain(name) for name in header} | {meaning(name) for name in header}
        if len(header) == width and all(plain(name) in there for name in columns.names if name != "-"):
            return list(header)
    if columns.names or not header:
        return None
    if len(header) != width:
        raise BadSample(f"has {width} columns, but its header names {len(header)}: name the columns yourself")
    return list(header)


# ------------------------------------------------------------------------------------------------ the dialect


def _dialect(body: str, columns: Columns, header: Sequence[str]) -> Dialect:
    """Return the only dialect that fits all lines of a sample; raise BadSample if there is none, or several."""
    lines = _sample(body)
    known = len(header or columns.names)
    left_out = {at for at, name in enumerate(columns.names) if name == "-"}
    readings: dict[tuple, Dialect] = {}
    for dialect in _dialects(columns, "".join(lines)):
        rows = [dialect.split(line) for line in lines]
        if dialect.delimiter != " " and all(row[-1] == "" for row in rows):
            rows = [row[:-1] for row in rows]
        width = len(rows[0])
        if width < 3 or any(len(row) != width for row in rows) or (known and width != known):
            continue
        if all(dialect.fits(word) for row in rows for at, word in enumerate(row) if at not in left_out):
            values = tuple(repr(dialect.value(w)) for row in rows for at, w in enumerate(row) if at not in left_out)
            empty = {at for at in range(3, width) if not known and all(row[at] == "" for row in rows)}
            values = tuple(one for at, one in enumerate(values) if at % width not in empty) if empty else values
            readings.setdefault((width - len(empty), values), dialect)
    found = list(readings.values())
    if not found:
        raise BadSample(_reason(lines, columns, header))
    if len(found) > 1:
        raise BadSample(_question(lines, found))
    if not known and not columns.decimal and found[0].delimiter == ",":
        _require_plain(lines)
    return found[0]


def _dialects(columns: Columns, text: str) -> Iterator[Dialect]:
    for delimiter in [columns.delimiter] if columns.delimiter else [mark for mark in ";\t, " if mark in text]:
        for decimal, thousands in NUMBERS:
            if columns.decimal not in (None, decimal) or (delimiter in (decimal, thousands) and '"' not in text):
                continue
            if "," not in text and "," in (decimal, thousands) and columns.decimal != ",":
                continue
            yield Dialect(delimiter, decimal, thousands)


def _sample(body: str) -> list[str]:
    """Return lines from the beginning, the middle and the end of a text; all of them if it is short."""
    if len(body) <= 3 * SAMPLE_BYTES:
        lines = body.split("\n")
    else:
        starts = (0, len(body) // 2, len(body) - SAMPLE_BYTES)
        lines = [line for at in starts for line in body[at : at + SAMPLE_BYTES].split("\n")[at > 0 : -1]]
    lines = [line.strip(" ") for line in lines if line.strip()]
    if not lines or max(map(len, lines)) > SAMPLE_BYTES:
        raise BadSample(f"has a line of more than {SAMPLE_BYTES:,} characters")
    return lines


def _require_plain(lines: Sequence[str]) -> None:
    """Raise BadSample for commas that may separate columns or be part of numbers: `2,739,-4,604,-9,181` is 3 or 6."""
    rows = [line.rstrip(",").split(",") for line in lines]
    pairs = [(row[at].strip(), row[at + 1].strip()) for row in rows for at in range(0, len(row) - 1, 2)]
    whole = len(rows[0]) % 2 == 0 and len(rows[0]) >= 6
    if whole and all(re.search(r",\s", line) and re.search(r",\S", line) for line in lines):
        raise BadSample(_comma_question(lines[0], len(rows[0]), len(rows[0]) // 2, "decimal commas"))
    places = {len(after) for _, after in pairs}
    even = whole and len(places) == 1 and len(lines) > (1 if max(places) > 1 else 20)
    if even and all(re.fullmatch(r"[+-]?\d+", a) and b.isdigit() for a, b in pairs):
        raise BadSample(_comma_question(lines[0], len(rows[0]), len(rows[0]) // 2, "decimal commas"))
    grouped = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})*\.\d+")
    counts = set()
    for line in lines:
        found = grouped.findall(line)
        if ",".join(found) != line.rstrip(","):
            return
        counts.add(len(found))
    if len(counts) == 1 and max(counts) >= 3 and max(counts) < len(rows[0]):
        raise BadSample(_comma_question(lines[0], len(rows[0]), max(counts), "thousands separators"))


def _comma_question(line: str, many: int, few: int, marks: str) -> str:
    return (
        f"its lines ({line[:60]}) are {many} columns, or {few} with {marks}: "
        "name its columns (point_columns of the card, --columns) or use another delimiter in the file"
    )


def _question(lines: Sequence[str], found: Sequence[Dialect]) -> str:
    ways = []
    for dialect in found[:3]:
        row = dialect.split(lines[0])[:3]
        values = " ".join(f"{dialect.value(word):.10g}" for word in row)
        marks = f", {dialect.thousands!r} for thousands" if dialect.thousands else ""
        ways.append(f"{values} ({dialect.words()}{marks})")
    return (
        f"its lines ({lines[0][:60]}) can be read in {len(found)} ways: {' or '.join(ways)}: "
        "add delimiter= and decimal= to its columns (point_columns of the card, --columns)"
    )


def _reason(lines: Sequence[str], columns: Columns, header: Sequence[str]) -> str:
    """Return why no dialect fits, judging by the most likely one."""
    text = "".join(lines)
    delimiter = columns.delimiter or next((mark for mark in ";\t," if mark in text), " ")
    dialect = Dialect(delimiter, columns.decimal or ".")
    rows = [dialect.split(line) for line in lines]
    left_out = {at for at, name in enumerate(columns.names) if name == "-"}
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            return f"the number of columns changed from {len(rows[0])} to {len(row)} at row {number}"
        for at, word in enumerate(row):
            if at not in left_out and not dialect.fits(word):
                return (
                    f"cannot be read as text: {word[:40]!r} at row {number}, column {at + 1}, is not a number "
                    f"({dialect.words()}): skip the column with -, or set delimiter= and decimal="
                )
    if header and len(header) != len(rows[0]):
        return f"has {len(rows[0])} columns, but its header names {len(header)}: name the columns yourself"
    if columns.names and len(columns.names) != len(rows[0]):
        return f"has {len(rows[0])} columns, but the card names {len(columns.names)}"
    return f"has {len(rows[0])} columns, not x, y, z and more"


# ------------------------------------------------------------------------------------------------ the numbers


def _numbers(body: str, dialect: Dialect, columns: Columns) -> tuple[np.ndarray, set[int]]:
    """Return the numbers of all lines, float64 `[N, C]` with NaN for missing ones, and the empty columns."""
    left_out = {at for at, name in enumerate(columns.names) if name == "-"}
    if '"' in body:
        return _numbers_by_line(body, dialect, left_out)
    text, mark = body, dialect.delimiter
    if mark != " ":
        if " " in text:
            text = "\n".join(line.strip(" ") for line in re.sub(rf" *{re.escape(mark)} *", mark, text).split("\n"))
        text = "\n".join(filter(None, text.split("\n")))
        if all(line.endswith(mark) for line in text.split("\n")):
            text = text.replace(f"{mark}\n", "\n").removesuffix(mark)
        framed = f"\n{text}\n"
        if any(gap in framed for gap in (mark * 2, f"\n{mark}", f"{mark}\n")):
            text = re.sub(rf"(?m)(?<={re.escape(mark)})(?={re.escape(mark)}|$)|^(?={re.escape(mark)})", "nan", text)
    if dialect.thousands:
        text = text.replace(dialect.thousands, "")
    if dialect.decimal == ",":
        text = text.replace(",", ".")
    try:
        separator = None if mark == " " else mark
        array = np.loadtxt(io.StringIO(text), dtype=np.float64, comments=None, ndmin=2, delimiter=separator)
    except ValueError:  # words for missing numbers, or an invalid line, which is then reported
        return _numbers_by_line(body, dialect, left_out)
    return array, set() if mark == " " else {int(at) for at in np.flatnonzero(np.isnan(array).all(0))}


def _numbers_by_line(body: str, dialect: Dialect, left_out: set[int]) -> tuple[np.ndarray, set[int]]:
    """Like `_numbers`, for text with quotes, or with words among the numbers. Raises BadSample."""
    rows = [dialect.split(line) for line in body.split("\n") if line.strip()]
    if dialect.delimiter != " " and all(row[-1] == "" for row in rows):
        rows = [row[:-1] for row in rows]
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise BadSample(f"the number of columns changed from {len(rows[0])} to {len(row)} at row {number}")
        for at, word in enumerate(row):
            if at not in left_out and not dialect.fits(word):
                raise BadSample(
                    f"cannot be read as text: {word[:40]!r} at row {number}, column {at + 1}, is not a number"
                )
    array = np.array(
        [[np.nan if at in left_out else dialect.value(word) for at, word in enumerate(row)] for row in rows]
    )
    return array, {at for at in range(len(rows[0])) if all(row[at] == "" for row in rows)}


def _ends_whole(text: str, dialect: Dialect) -> bool:
    """Return whether the last number has as many decimals as those above it, so that it cannot be truncated."""
    ends = [dialect.split(line)[-1] for line in text[-20_000:].split("\n")[-100:] if line.strip()]
    if MISSING.fullmatch(ends[-1]):
        return ends[-1] != ""
    places = {len(end.rpartition(dialect.decimal)[2]) for end in ends}
    return len(ends) > 1 and len(places) == 1
