"""A sample as its list names it, and the reading of lists: text in lines and columns, JSON.

Errors name file and line.
"""

import csv
import io
import json
import re
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


class NotThere(UserError):
    """The list of a split is not there."""


def place_of(card: Card, split: str) -> str:
    """Where the card finds a split, as one word."""
    return card.places(split)[0]


def split_of(card: Card, split: str) -> str:
    return f"split {split!r} of {card.name}"


def read_text(fs: pafs.FileSystem, root: str, name: str, what: str) -> str:
    path = join(root, inside(name, what))
    try:
        return storage.read_bytes(fs, path).decode("utf-8-sig")
    except FileNotFoundError:
        raise NotThere(f"{path}: there is no such file ({what}): mend data.root or the card") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({what}; byte {error.start})") from None


def lines(text: str, path: str, delimiter: str | None) -> Iterator[tuple[str, list[str]]]:
    """`path line N` and the fields of each line that is not empty."""
    if delimiter is None:
        for number, line in enumerate(text.split("\n"), 1):
            if fields := re.findall(r"[^ \t\r]+", line):
                yield f"{path} line {number}", fields
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for fields in reader:
            if any(fields):
                yield f"{path} line {reader.line_num}", [one.strip() for one in fields]
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}") from None


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error})") from None
