"""Turns a card into indexes: the classes that only the dataset defines, and a row for each sample of a split.

`complete` adds the classes, `read_split` makes the index of a split. No sample is opened here.
"""

import re
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
from pyarrow.compute import call_function

from slimray import storage
from slimray.data import index_file
from slimray.data.cards import MAX_CLASSES, Card, closest
from slimray.data.entries import Entry, NotThere, Skipped, parse_json, place_of, read_text, split_of
from slimray.data.index import index_table, with_notes
from slimray.data.layouts import READERS
from slimray.data.modalities import MODALITIES
from slimray.data.paths import COLUMN, NUMBERED, inside
from slimray.data.samples import MAX_FRAMES
from slimray.spec import UserError, did_you_mean, parse
from slimray.storage import StorageError, join


def complete(card: Card, root: str | None) -> Card:
    """Return `card` with the names of its classes, read from the dataset at `root` if the card does not list them.

    They come from the card's file of classes, else from the lists of all existing splits: the names in them, sorted, or
    the numbers from 0 to the largest. Without a root the card is returned unchanged. Raises UserError if the classes
    cannot be read, or are not as many as the card's `num_classes`.
    """
    if root is None or isinstance(card.classes, tuple) or card.layout in ("generated", "index"):
        return card
    if card.classes is None and not card.labelling.per_sample:
        return card
    fs, folder = storage.open_uri(root)
    if card.classes is not None:
        where = join(folder, card.classes)
        names = _parse_classes(read_text(fs, folder, card.classes, f"the classes of {card.name}"), where)
    else:
        where = join(folder, "the lists")
        names = _list_classes(card, fs, folder)
    if card.num_classes and len(names) != card.num_classes:
        raise UserError(f"{where}: {len(names)} classes, but the card {card.name} has num_classes: {card.num_classes}")
    return parse(Card, card.model_dump() | {"classes": names, "num_classes": len(names)}, where)


def read_split(card: Card, split: str, root: str) -> pa.Table:
    """Return the index of a split (columns of INDEX) in the order of its list; no sample is opened.

    Raises UserError, with file and line, for an unknown split, a missing or malformed list, a path that is listed twice
    or leads out of the root, a label that is not a class, and a list without samples.
    """
    if split not in card.splits:
        raise UserError(f"{card.name}: unknown split {split!r}{did_you_mean(split, card.splits)}")
    if card.layout == "generated":
        raise UserError(f"{card.name}: is generated: set data.run to the prepare job that makes its samples")
    fs, folder = storage.open_uri(root)
    if card.layout == "index":
        return read_index(card, split, fs, folder)
    card = complete(card, root)
    names = {name: number for number, name in enumerate(card.class_names())}
    rows: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    skipped: list[str] = []
    for entry in READERS[card.layout](card, split, fs, folder):
        if isinstance(entry, Skipped):
            skipped.append(entry.path)
            continue
        path, frames = _path_of(entry, card.file, split)
        if path in seen:
            raise UserError(f"{entry.where}: {path} is listed twice, first in {seen[path]}")
        seen[path] = entry.where
        label = _label_of(entry, names, card.name) if card.labelling.per_sample else _shape_of(entry)
        rows.append({"path": path, "label": label, "frames": frames} | entry.place)
    if not rows:
        raise UserError(f"{join(folder, place_of(card, split))}: lists no samples for split {split!r} of {card.name}")
    return with_notes(index_table(rows), _left_out(skipped, MODALITIES[card.sample].plural))


def _left_out(paths: list[str], plural: str) -> list[str]:
    if not paths:
        return []
    some = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
    files = f"file{'s' * (len(paths) > 1)}"
    return [f"left out {len(paths):,} {files} that are not {plural}, judging by their extension ({some})"]


def read_index(card: Card, split: str, fs: pafs.FileSystem, root: str) -> pa.Table:
    """Return an index that `prepare` wrote, checked like a list; raise UserError if it is missing or invalid."""
    where = join(root, place_of(card, split))
    try:
        table = index_file.read_parquet(fs, join(root, inside(place_of(card, split), card.name)))
    except FileNotFoundError:
        raise UserError(f"{where}: no such index ({split_of(card, split)}): run prepare again") from None
    except StorageError:
        raise
    except (pa.ArrowException, KeyError, OSError) as error:
        raise UserError(f"{where}: is not an index ({str(error).splitlines()[0][:100]}): run prepare again") from None
    index_file.require_sound(table, where)
    lowest, highest = call_function("min_max", [table.column("label")]).as_py().values()
    if card.labelling.per_sample and (lowest < 0 or highest >= card.num_classes):
        raise UserError(f"{where}: labels from {lowest} to {highest}, but {card.name} has {card.num_classes} classes")
    return table


def _list_classes(card: Card, fs: pafs.FileSystem, root: str) -> list[str]:
    """Return the classes used by the lists of all splits: names, sorted, or numbers up to the largest."""
    labels: dict[int | str, str] = {}
    absent: list[NotThere] = []
    for split in card.splits:
        try:
            for entry in READERS[card.layout](card, split, fs, root):
                if isinstance(entry, Entry):
                    labels.setdefault(entry.label, entry.where)
        except NotThere as error:
            absent.append(error)
    if len(absent) == len(card.splits):
        raise absent[0]
    names = sorted(label for label in labels if isinstance(label, str))
    numbers = [label for label in labels if isinstance(label, int)]
    if names and numbers:
        raise UserError(f"{labels[names[0]]}: label {names[0]!r} is a name, but others are numbers")
    if numbers and max(numbers) >= MAX_CLASSES:
        most = max(numbers)
        raise UserError(f"{labels[most]}: label {most} is not a class number, the limit is {MAX_CLASSES}")
    return [str(number) for number in range(card.num_classes or 1 + max(numbers))] if numbers else names


def unused_labels(card: Card, tables: Iterable[pa.Table]) -> str:
    """Return a sentence that names the classes of a card without a sample in `tables`; "" if there are none.

    Gaps in the labels may mean that the numbers are something else, such as counts of frames, or start at 1.
    """
    if card.labelling.per_point or not card.num_classes:
        return ""
    used = {label for table in tables for label in table.column("label").unique().to_pylist()}
    gaps = [name for number, name in enumerate(card.class_names()) if number not in used]
    some = ", ".join(gaps[:5]) + (", ..." if len(gaps) > 5 else "")
    return f"no sample is of {len(gaps):,} of the {card.num_classes:,} classes ({some})" if gaps else ""


def _parse_classes(text: str, where: str) -> list[str]:
    """Return the class names in order, from JSON (a list, or name -> number) or from lines, numbered or not."""
    if where.endswith(".json"):
        loaded = parse_json(text, where)
        if isinstance(loaded, dict):
            numbers = {str(number): name for name, number in loaded.items()}
            loaded = [numbers.get(str(number)) for number in range(len(loaded))]
        if not isinstance(loaded, list) or not all(isinstance(name, str) for name in loaded):
            raise UserError(f"{where}: must be a JSON list of names, or an object of names with numbers from 0")
        return [str(name) for name in loaded]
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    numbered = [re.fullmatch(r"(\d+)[ \t,;]+(\S.*)", line) for line in lines]
    pairs = [(int(match[1]), match[2]) for match in numbered if match is not None]
    if len(pairs) == len(lines) and [number - pairs[0][0] for number, _ in pairs] == list(range(len(pairs))):
        return [name for _, name in pairs]
    return lines


def _path_of(entry: Entry, form: str, split: str) -> tuple[str, int]:
    """Return the path of an entry, with `file` filled in, and its number of frames (0 if unknown)."""
    found = {**entry.columns, "split": split}

    def value(match: re.Match[str]) -> str:
        if match[1] not in found:
            raise UserError(f"{entry.where}: file: unknown column {match[1]!r}{did_you_mean(match[1], found)}")
        return found[match[1]].zfill(int(match[2] or 0))

    def number(name: str) -> int | None:
        if name not in entry.columns:
            return None
        if not re.fullmatch(r"\d{1,9}", found[name]):
            raise UserError(f"{entry.where}: {name} must be a number (got {found[name]!r})")
        return int(found[name])

    path, frames = inside(COLUMN.sub(value, form), entry.where), number("frames")
    match = NUMBERED.search(path)
    if match is None:
        return path, frames or 0
    first, last = number("first"), number("last")
    first = int(match[1]) if first is None else first
    if last is None:
        last = int(match[2]) if match[2] else None if frames is None else first + frames - 1
    count = 0 if last is None else last - first + 1
    if last is not None and not 0 < count <= MAX_FRAMES:
        raise UserError(f"{entry.where}: pictures {first} to {last} are not a valid clip")
    digits = len(match[1])
    end = "" if last is None else f"{last:0{digits}d}"
    return f"{path[: match.start()]}{{{first:0{digits}d}..{end}}}{path[match.end() :]}", count


def _label_of(entry: Entry, names: dict[str, int], dataset: str) -> int:
    if isinstance(entry.label, int):
        if not 0 <= entry.label < len(names):
            raise UserError(
                f"{entry.where}: label {entry.label} is not in 0 to {len(names) - 1}, the classes of {dataset}"
            )
        return entry.label
    if entry.label not in names:
        raise UserError(f"{entry.where}: {entry.label!r} is not a class of {dataset}{closest(entry.label, names)}")
    return names[entry.label]


def _shape_of(entry: Entry) -> int:
    """Return the shape of a cloud whose points have labels: its label in the list, 0 if the list has none."""
    if "label" not in entry.columns:
        return 0
    if isinstance(entry.label, int) and entry.label >= 0:
        return entry.label
    raise UserError(
        f"{entry.where}: {entry.label!r}: must be a number from 0, the shape of a cloud with a label per point"
    )
