"""A sample as its list names it, and the reading of lists: text in lines and columns, JSON.

Errors name file and line.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs as pafs

from slimray import storage
from slimray.data.cards import Card
from slimray.data.paths import inside
from slimray.spec import UserError
from slimray.storage import join


@dataclass(frozen=True)
class Entry:
    """A sample as its list names it: where it says so, the columns that fill `file`, the class by number or name.

    `place` are further columns of the index.
    """

    where: str
    columns: dict[str, str]
    label: int | str
    place: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A file in the folders of a dataset that is none of its samples."""

    path: str


class NotThere(UserError):
    """The list of a split is not there."""


def place_of(card: Card, split: str) -> str:
    """Return the one place at which the card finds a split."""
    return card.places(split)[0]


def split_of(card: Card, split: str) -> str:
    return f"split {split!r} of {card.name}"


def read_text(fs: pafs.FileSystem, root: str, name: str, what: str) -> str:
    path = join(root, inside(name, what))
    try:
        return storage.read_bytes(fs, path).decode("utf-8-sig")
    except FileNotFoundError:
        raise NotThere(f"{path}: there is no such file ({what}): fix data.root or the card") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({what}; byte {error.start})") from None


def lines(text: str, path: str) -> Iterator[tuple[str, str]]:
    """`path line N` and each line that is not blank, without the white space around it."""
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.strip(" \t\r"):
            yield f"{path} line {number}", line


def rows(text: str, path: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """`path line N` and the fields of each line that is not empty, between delimiters, with quotes as in CSV.

    Blanks belong to a field, but for one that stands behind each delimiter of a column.
    """
    reader, found = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), []
    try:
        for fields in reader:
            if any(fields):
                found.append((f"{path} line {reader.line_num}", fields))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}") from None
    widest = max((len(fields) for _, fields in found), default=0)
    padded = {n for n in range(1, widest) if all(fields[n].startswith(" ") for _, fields in found if n < len(fields))}
    for where, fields in found:
        yield where, [field.lstrip() if n in padded else field for n, field in enumerate(fields)]


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error})") from None
