"""Layouts of datasets: readers that turn the lists, folders or release files of a split into entries.

A new list format is one function and its row in READERS.
"""

import functools
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import numpy as np
import pyarrow.fs as pafs

from slimray import storage
from slimray.data.cards import Card
from slimray.data.entries import Entry, NotThere, Skipped, lines, parse_json, place_of, read_text, rows, split_of
from slimray.data.images import image_sets
from slimray.data.modalities import MODALITIES
from slimray.data.paths import ALL_FILES, CLASS, GZIP_ENDING, NUMBERED, inside, is_plain, matching, without_gzip
from slimray.data.points import point_sets
from slimray.data.samples import BadSample
from slimray.data.text.conversion import found_files
from slimray.spec import UserError
from slimray.storage import join

SYNSETS = "synsetoffset2category.txt"


def _read_list(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """Read a list with a sample per line."""
    place, columns = place_of(card, split), None if card.columns == "header" else card.columns
    text, path = read_text(fs, root, place, split_of(card, split)), join(root, place)
    endings = MODALITIES[card.sample].endings
    if card.delimiter:
        listed = list(rows(text, path, card.delimiter))
    else:
        listed = [(where, _split(line, columns or (), endings)) for where, line in lines(text, path)]
    if columns is None and listed:
        columns = tuple(field.strip() for field in listed.pop(0)[1])
    assert columns is not None or not listed
    if columns == ("path", "label", "*") and listed:
        _require_labels(listed)
    for where, fields in listed:
        _require_columns(columns or (), fields, where)
        named = zip(columns or (), fields, strict=False)
        found = {name: one if name == "path" else one.strip() for name, one in named}
        label = found.get("label")
        if label is None:
            label = posixpath.basename(posixpath.dirname(found.get("path", "")))
        elif re.fullmatch(r"-?\d{1,18}", label):
            label = int(label)
        if label == "":
            raise UserError(
                f"{where}: has no label" + ("" if "label" in found else ", and no folder that names the class")
            )
        yield Entry(where, found, label)


FRAMES_HINT = "if they are path, frames and label, write columns: [path, frames, label]"


def _require_labels(listed: Sequence[tuple[str, list[str]]]) -> None:
    """Raise UserError for a list with two numbers per line, if the first ones have gaps: they may count frames."""
    if all(len(fields) == 3 and fields[1].strip().isdigit() and fields[2].strip().isdigit() for _, fields in listed):
        numbers = {int(fields[1]): where for where, fields in listed}
        if len(numbers) < 1 + max(numbers):
            raise UserError(
                f"{numbers[max(numbers)]}: two numbers after the path: {FRAMES_HINT}, else name the second one instead "
                "of '*'"
            )


def _split(line: str, columns: Sequence[str], endings: frozenset[str]) -> list[str]:
    """Split a line at white space; a leading path with the extension of a sample may contain blanks itself."""
    spans = [match.span() for match in re.finditer(r"[^ \t]+", line)]
    if columns[:1] != ("path",):
        return [line[a:b] for a, b in spans]
    ends = [n for n, (a, b) in enumerate(spans) if posixpath.splitext(line[a:b])[1].lower() in endings]
    more = max(0, len(spans) - len(columns)) if columns[-1] != "*" else 0
    if not ends and not all(line[a:b].isdigit() for a, b in spans[1 : 1 + more]):
        ends = [more]  # a folder with blanks in its name
    last = ends[0] if ends else 0
    return [line[: spans[last][1]], *(line[a:b] for a, b in spans[last + 1 :])]


def _require_columns(columns: tuple[str, ...], fields: list[str], where: str) -> None:
    """Raise UserError if the number of fields of a line differs from that of its columns."""
    open_end = columns[-1:] == ("*",)
    if len(fields) < len(columns) - open_end or (len(fields) > len(columns) and not open_end):
        three = (
            columns == ("path", "label") and len(fields) == 3 and all(field.strip().isdigit() for field in fields[1:])
        )
        hint = f": {FRAMES_HINT}" if three else ""
        raise UserError(f"{where}: {len(fields)} columns instead of {len(columns)} ({', '.join(columns)}){hint}")


def _read_folders(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry | Skipped]:
    """Read a folder per class, which holds, at any depth, a file or a folder of pictures per sample.

    Names that begin with a dot are skipped, and so are files without the extension of a sample, unless all lack one.
    """
    place = inside(place_of(card, split), card.name)
    base, pictures = posixpath.normpath(join(root, place)), NUMBERED.search(card.file)
    classes = [name for name in storage.list_folders(fs, base) if not name.startswith(".")]
    if not classes:
        raise NotThere(f"{base}: has no folders of classes ({split_of(card, split)}): fix data.root or the card")
    found = {}
    for name in classes:
        folder = join(base, name)
        paths = _picture_folders(fs, folder) if pictures else _files_below(fs, folder)
        found[name] = [path for path in paths if not any(part.startswith(".") for part in path.split("/"))]
    endings = frozenset() if pictures else _known_endings(card, (path for paths in found.values() for path in paths))
    for name, paths in found.items():
        samples = [path for path in paths if not endings or posixpath.splitext(path)[1].lower() in endings]
        if not samples:
            raise UserError(f"{join(base, name)}: holds no sample of class {name!r}: remove the folder, or fill it")
        for path in samples:
            yield Entry(join(base, name), {"path": posixpath.normpath(join(place, name, path))}, name)
        yield from (Skipped(join(name, path)) for path in paths if path not in {*samples})


def _known_endings(card: Card, paths: Iterable[str]) -> frozenset[str]:
    """Return the extensions that distinguish samples from other files; none if no file has one of them."""
    endings = MODALITIES[card.sample].endings
    return endings if any(posixpath.splitext(path)[1].lower() in endings for path in paths) else frozenset()


def _files_below(fs: pafs.FileSystem, folder: str) -> list[str]:
    """Return the paths of all files below a folder, relative to it."""
    start = len(folder.rstrip("/")) + 1
    return [info.path[start:] for info in storage.list_files(fs, folder, recursive=True)]


def _picture_folders(fs: pafs.FileSystem, folder: str) -> list[str]:
    """Return the folders of pictures below a folder, relative to it; folders that hold only folders are descended."""
    names = storage.list_folders(fs, folder)
    shown = [name for name in names if not name.startswith(".")]
    if not shown or storage.list_files(fs, join(folder, shown[0])):  # only the first one is listed, to save requests
        return names
    below = [join(name, path) for name in shown for path in _picture_folders(fs, join(folder, name))]
    return below or names


def _read_files(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry | Skipped]:
    """Read files that match the patterns of a split, component by component; skip names that begin with a dot."""
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
        found = []
        for folder, label in folders:
            names = [last]
            if ALL_FILES not in last and not is_plain(last):
                files = storage.list_files(fs, join(root, folder).rstrip("/"))
                names = matching([info.base_name for info in files], last)
            found += [(posixpath.join(folder, name), label) for name in names]
        any_file = last.rpartition(".")[2] == "*" and ALL_FILES not in last  # otherwise the pattern selects files
        endings = _known_endings(card, (path for path, _ in found)) if any_file else frozenset()
        for path, label in found:
            known = not endings or posixpath.splitext(path)[1].lower() in endings
            yield Entry(where, {"path": path}, label) if known else Skipped(path)
        if not found:
            raise NotThere(f"{where}: no such files ({split_of(card, split)}): fix data.root or the card")


def _read_shapenet_part(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """Read JSON lists of "shape_data/FOLDER/NAME"; synsetoffset2category.txt maps folders to shapes."""
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
                raise UserError(f"{where} entry {number}: {path!r} is not in one of the folders of {SYNSETS}")
            yield Entry(f"{where} entry {number}", {"path": path, "label": str(shape)}, shape)


def _read_kitti(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """Read numbers of scans, one per line, of files `training/velodyne/NUMBER.bin`."""
    place = place_of(card, split)
    for where, number in lines(read_text(fs, root, place, split_of(card, split)), join(root, place)):
        if len(number.split()) != 1:
            raise UserError(f"{where}: must be just the number of a scan, such as 000123")
        yield Entry(where, {"path": f"training/velodyne/{number}.bin", "number": number}, 0)


def _read_something_v2(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """Read a JSON list of objects with `id` and `template`, which is the class with its objects in brackets."""
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
    """Read a list per class, `CLASS_test_split1.txt`, with lines `file mark`: 1 trains, 2 tests, 0 is unused."""
    pattern, mark = place_of(card, split), card.splits[split][1]
    folder, _, form = inside(pattern, card.name).rpartition("/")
    lists = [info.base_name for info in storage.list_files(fs, join(root, folder) if folder else root)]
    lists = [name for name in lists if fnmatchcase(name, form)]
    if not lists:
        raise NotThere(f"{join(root, pattern)}: no such lists ({split_of(card, split)}): fix data.root or the card")
    for name in lists:
        place, label = join(folder, name) if folder else name, name.removesuffix(form.lstrip("*"))
        for where, line in lines(read_text(fs, root, place, split_of(card, split)), join(root, place)):
            file, _, found = line.replace("\t", " ").rpartition(" ")
            if not file or found not in ("0", "1", "2"):
                raise UserError(f"{where}: must be a file and 0, 1 or 2")
            if int(found) == mark:
                yield Entry(where, {"path": f"{label}/{file.rstrip()}"}, label)


def _read_cifar(num_labels: int, card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """Read the pictures of .bin files, `data_batch_1.bin#00017`; their `row` is the byte where the pixels begin."""
    side = image_sets.CIFAR_SIDE
    for file in _read_files(card, split, fs, root):
        if isinstance(file, Skipped):
            continue
        path = file.columns["path"]
        where = join(root, path)
        try:
            classes, offsets = image_sets.cifar_records(storage.read_bytes(fs, where), num_labels)
        except FileNotFoundError:
            raise NotThere(f"{where}: no such file ({split_of(card, split)}): fix data.root") from None
        except ValueError as error:
            raise UserError(f"{where}: is not a file of {card.layout} ({error})") from None
        for number, (label, offset) in enumerate(zip(classes.tolist(), offsets.tolist(), strict=True)):
            place = {"shard": path, "row": offset, "width": side, "height": side}
            yield Entry(f"{where} picture {number}", {"path": f"{path}#{number:05d}"}, label, place)


def _read_texts(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """Read text files, each alone or with the file of its translations; all of their lines become samples."""
    try:
        there = found_files(card, split, fs, root)
    except FileNotFoundError as error:
        raise _neither(str(error), card, split) from None
    for names in there:
        yield Entry(join(root, names[0]), {"path": names[0]}, 0)


def _read_idx(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """Read the pictures of an idx file, `train-images-idx3-ubyte#00017`, and their labels from another."""
    (name, where, pictures), (_, where_labels, labels) = (
        _idx_file(card, split, fs, root, place, num_axes)
        for place, num_axes in zip(card.places(split), (3, 1), strict=True)
    )
    if len(pictures) != len(labels):
        raise UserError(f"{where}: holds {len(pictures):,} pictures, but {where_labels} {len(labels):,} labels")
    height, width = pictures.shape[1:]
    for number, label in enumerate(labels.tolist()):
        place = {"shard": name, "row": number * width * height, "width": width, "height": height}
        yield Entry(f"{where} picture {number}", {"path": f"{name}#{number:05d}"}, label, place)


def _idx_file(
    card: Card, split: str, fs: pafs.FileSystem, root: str, place: str, num_axes: int
) -> tuple[str, str, np.ndarray]:
    """Return name, path and array of the idx file at a place of a card, which may be gzipped: `place.gz`."""
    place = inside(place, split_of(card, split))
    for name in dict.fromkeys((place, f"{without_gzip(place)}{GZIP_ENDING}")):
        where = join(root, name)
        try:
            return name, where, image_sets.read_idx(storage.read_bytes(fs, where), num_axes)
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise UserError(f"{where}: is not an intact idx file: {error}") from None
    raise _neither(join(root, place), card, split)


def _neither(path: str, card: Card, split: str) -> NotThere:
    return NotThere(f"{path}: no such file, gzipped or not ({split_of(card, split)}): fix data.root")


def _read_visual_wake_words(card: Card, split: str, fs: pafs.FileSystem, root: str) -> Iterator[Entry]:
    """Read instance annotations of COCO; the label is 1 if the card's second class, a category, is in the image."""
    place = place_of(card, split)
    where = join(root, place)
    text = read_text(fs, root, place, split_of(card, split))
    try:
        found = image_sets.coco_presence(text, card.class_names()[1])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}") from None
    for number, (name, there) in enumerate(found, 1):
        yield Entry(f"{where} image {number}", {"path": name}, int(there))


READERS: dict[str, Callable[[Card, str, pafs.FileSystem, str], Iterator[Entry | Skipped]]] = {
    "list": _read_list,
    "folders": _read_folders,
    "files": _read_files,
    "something_v2": _read_something_v2,
    "hmdb51": _read_hmdb51,
    "cifar10": functools.partial(_read_cifar, 1),
    "cifar100": functools.partial(_read_cifar, 2),
    "idx": _read_idx,
    "visual_wake_words": _read_visual_wake_words,
    "s3dis": _read_files,
    "shapenet_part": _read_shapenet_part,
    "kitti": _read_kitti,
    "texts": _read_texts,
}
