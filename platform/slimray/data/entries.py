"""Entries of dataset lists, and readers for lists: lines and columns of text, JSON. Errors name file and line."""

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
    """A sample as listed: the place of its entry (`where`), the columns to fill in `file`, its class by number or name.

    `place` holds further columns of the index.
    """

    where: str
    columns: dict[str, str]
    label: int | str
    place: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A file in the folders of a dataset that is not one of its samples."""

    path: str


class NotThere(UserError):
    """The list, or the files, of a split do not exist."""


def place_of(card: Card, split: str) -> str:
    """Return the place of a split, the first one if the card has several."""
    return card.places(split)[0]


def split_of(card: Card, split: str) -> str:
    return f"split {split!r} of {card.name}"


def read_text(fs: pafs.FileSystem, root: str, name: str, what: str) -> str:
    path = join(root, inside(name, what))
    try:
        return storage.read_bytes(fs, path).decode("utf-8-sig")
    except FileNotFoundError:
        raise NotThere(f"{path}: no such file ({what}): fix data.root or the card") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({what}; byte {error.start})") from None


def lines(text: str, path: str) -> Iterator[tuple[str, str]]:
    """Yield `path line N` and the line for each line that is not blank, without surrounding white space."""
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.strip(" \t\r"):
            yield f"{path} line {number}", line


def rows(text: str, path: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield `path line N` and the delimited fields of each line that is not empty, with quotes as in CSV.

    Blanks are part of a field, unless every field of a column (not the first) begins with one.
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
