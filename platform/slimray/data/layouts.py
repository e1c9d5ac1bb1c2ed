"""Layouts of datasets: from the lists, folders and releases of a split to its entries. The rows of READERS.

A new list format is one function of READERS.
"""

import functools
import posixpath
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

import pyarrow.fs as pafs

from slimray import storage
from slimray.data.cards import Card
from slimray.data.entries import Entry, NotThere, lines, parse_json, place_of, read_text, split_of
from slimray.data.images import image_sets
from slimray.data.paths import ALL_FILES, CLASS, NUMBERED, inside, is_plain, matching
from slimray.data.points import point_sets
from slimray.data.samples import BadSample
from slimray.spec import UserError
from slimray.storage import join

SYNSETS = "synsetoffset2category.txt"


def _read_list(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """A sample per line."""
    place, columns = place_of(card, split), None if card.columns == "header" else card.columns
    for where, fields in lines(read_text(fs, root, place, split_of(card, split)), join(root, place), card.delimiter):
        if columns is None:
            columns = tuple(fields)
            continue
        open_end = columns[-1:] == ("*",)
        if len(fields) < len(columns) - open_end or (len(fields) > len(columns) and not open_end):
            raise UserError(f"{where}: {len(fields)} columns in place of {len(columns)} ({', '.join(columns)})")
        found = dict(zip(columns, fields, strict=False))
        label = found.get("label")
        if label is None:
            label = posixpath.basename(posixpath.dirname(found.get("path", "")))
        elif re.fullmatch(r"-?\d{1,18}", label):
            label = int(label)
        if label == "":
            raise UserError(
                f"{where}: has no label" + ("" if "label" in found else ", nor a folder that names the class")
            )
        yield Entry(where, found, label)


def _read_folders(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """A folder per class; in it a file per sample, or a folder of pictures. Names with a dot in front are left out."""
    place = inside(place_of(card, split), card.name)
    base, pictures = posixpath.normpath(join(root, place)), NUMBERED.search(card.file)
    classes = [name for name in storage.list_folders(fs, base) if not name.startswith(".")]
    if not classes:
        raise NotThere(f"{base}: holds no folder per class ({split_of(card, split)}): mend data.root or the card")
    for name in classes:
        folder = join(base, name)
        found = storage.list_folders(fs, folder) if pictures else [i.base_name for i in storage.list_files(fs, folder)]
        found = [one for one in found if not one.startswith(".")]
        if not found:
            raise UserError(f"{folder}: holds no sample of class {name!r}: remove the folder, or fill it")
        for one in found:
            yield Entry(folder, {"path": posixpath.normpath(join(place, name, one))}, name)


def _read_files(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """Files that match the patterns of a split, part for part. Names with a dot in front are left out."""
    for pattern in card.places(split):
        where = join(root, pattern)
        *parts, last = inside(pattern, card.name).split("/")
        folders = [("", "")]  # path, class
        for part in parts:
            if is_plain(part):
                folders = [(posixpath.join(folder, part), label) for folder, label in folders]
                continue
            folders = [
                (posixpath.join(folder, name), name if part == CLASS else label)
                for folder, label in folders
                for name in matching(storage.list_folders(fs, join(root, folder).rstrip("/")), part)
            ]
        found = 0
        for folder, label in folders:
            names = [last]
            if ALL_FILES not in last and not is_plain(last):
                files = storage.list_files(fs, join(root, folder).rstrip("/"))
                names = matching([info.base_name for info in files], last)
            found += len(names)
            for name in names:
                yield Entry(where, {"path": posixpath.join(folder, name)}, label)
        if not found:
            raise NotThere(f"{where}: there are no such files ({split_of(card, split)}): mend data.root or the card")


def _read_shapenet_part(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """JSON lists of "shape_data/FOLDER/NAME"; synsetoffset2category.txt says which shape a folder holds."""
    try:
        text = read_text(fs, root, SYNSETS, f"the shapes of {card.name}")
        shapes = point_sets.shapenet_synsets(text.encode())
    except BadSample as error:
        raise UserError(f"{join(root, SYNSETS)}: {error}") from None
    for place in card.places(split):
        where = join(root, place)
        try:
            listed = point_sets.shapenet_split(read_text(fs, root, place, split_of(card, split)).encode())
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{where}: must be a JSON list of shapes") from None
        for number, path in enumerate(listed, 1):
            shape = shapes.get(path.partition("/")[0])
            if shape is None:
                raise UserError(f"{where} entry {number}: {path!r} lies in none of the folders of {SYNSETS}")
            yield Entry(f"{where} entry {number}", {"path": path, "label": str(shape)}, shape)


def _read_kitti(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """Numbers of scans, one a line, of files `training/velodyne/NUMBER.bin`."""
    place = place_of(card, split)
    for where, fields in lines(read_text(fs, root, place, split_of(card, split)), join(root, place), None):
        if len(fields) != 1:
            raise UserError(f"{where}: must be the number of a scan alone, as in 000123")
        yield Entry(where, {"path": f"training/velodyne/{fields[0]}.bin", "number": fields[0]}, 0)


def _read_something_v2(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """A JSON list of objects with `id` and `template`, which is the class with its objects in brackets."""
    place = place_of(card, split)
    entries = parse_json(read_text(fs, root, place, split_of(card, split)), join(root, place))
    if not isinstance(entries, list):
        raise UserError(f"{join(root, place)}: must be a JSON list of samples")
    for number, entry in enumerate(entries, 1):
        where = f"{join(root, place)} entry {number}"
        name, template = (entry.get("id"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str | int) or not isinstance(template, str):
            raise UserError(f"{where}: must have an id and a template")
        yield Entry(where, {"id": str(name)}, template.replace("[", "").replace("]", ""))


def _read_hmdb51(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """A list per class, `CLASS_test_split1.txt`, with lines `file mark`: 1 trains, 2 tests, 0 is left out."""
    pattern, mark = place_of(card, split), card.splits[split][1]
    folder, _, form = inside(pattern, card.name).rpartition("/")
    lists = [info.base_name for info in storage.list_files(fs, join(root, folder) if folder else root)]
    lists = [name for name in lists if fnmatchcase(name, form)]
    if not lists:
        raise NotThere(f"{join(root, pattern)}: no such lists ({split_of(card, split)}): mend data.root or the card")
    for name in lists:
        place, label = join(folder, name) if folder else name, name.removesuffix(form.lstrip("*"))
        for where, fields in lines(read_text(fs, root, place, split_of(card, split)), join(root, place), None):
            if len(fields) != 2 or fields[1] not in ("0", "1", "2"):
                raise UserError(f"{where}: must be a file and 0, 1 or 2")
            if int(fields[1]) == mark:
                yield Entry(where, {"path": f"{label}/{fields[0]}"}, label)


def _read_cifar(num_labels: int, card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """The pictures of .bin files, `data_batch_1.bin#00017`; a picture is read where its pixels begin."""
    side = image_sets.CIFAR_SIDE
    for file in _read_files(card, split, fs, root):
        path = file.columns["path"]
        where = join(root, path)
        try:
            classes, offsets = image_sets.cifar_records(storage.read_bytes(fs, where), num_labels)
        except FileNotFoundError:
            raise NotThere(f"{where}: there is no such file ({split_of(card, split)}): mend data.root") from None
        except ValueError as error:
            raise UserError(f"{where}: is no file of {card.layout}: {error}") from None
        for number, (label, offset) in enumerate(zip(classes.tolist(), offsets.tolist(), strict=True)):
            place = {"shard": path, "row": offset, "width": side, "height": side}
            yield Entry(f"{where} picture {number}", {"path": f"{path}#{number:05d}"}, label, place)


def _read_visual_wake_words(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """Instance annotations of COCO: is the category that is the second class in an image, yes or no."""
    place = place_of(card, split)
    where = join(root, place)
    text = read_text(fs, root, place, split_of(card, split))
    try:
        found = image_sets.coco_presence(text, card.class_names()[1])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}") from None
    for number, (name, there) in enumerate(found, 1):
        yield Entry(f"{where} image {number}", {"path": name}, int(there))


READERS: dict[str, Callable[[Card, str, pafs.FileSystem, str], Iterator[Entry]]] = {
    "list": _read_list,
    "folders": _read_folders,
    "files": _read_files,
    "something_v2": _read_something_v2,
    "hmdb51": _read_hmdb51,
    "cifar10": functools.partial(_read_cifar, 1),
    "cifar100": functools.partial(_read_cifar, 2),
    "visual_wake_words": _read_visual_wake_words,
    "s3dis": _read_files,
    "shapenet_part": _read_shapenet_part,
    "kitti": _read_kitti,
}
