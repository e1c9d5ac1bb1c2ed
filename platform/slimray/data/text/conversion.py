"""Converts text files to tokens as `prepare` stores them: the vocabulary of a dataset, then pairs or windows.

Lines that are not valid text are yielded as `Bad` with their line number; blank lines of plain text are skipped. Pairs
for training a translation network are limited in length, as published; longer pairs of other splits are cut, not left
out.
"""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs

from slimray import storage
from slimray.data.conversion import Bad, Made, Raw
from slimray.data.paths import GZIP_ENDING, inside, without_gzip
from slimray.data.text.lines import EMPTY, Line, format_of, read_texts
from slimray.data.text.spec import TRAIN, TextSpec
from slimray.data.text.vocabulary import EOS, Vocabulary, train_vocabulary, vocabulary_of
from slimray.spec import RunFailed, UserError

if TYPE_CHECKING:
    from slimray.data.cards import Card
    from slimray.data.video.decoder import Decoder

COLUMNS = {1: ("1",), 2: ("1", "2")}  # of a .tsv file if the card names none
PARQUET_COLUMNS = {1: ("text",), 2: ("source", "target")}
AT_ONCE = 1000  # lines encoded in one call


def files_of(card: "Card", split: str) -> list[tuple[str, ...]]:
    """Return the files of a split of texts: single files, or pairs if the two sides are in separate files.

    Raises UserError if a file has no partner.
    """
    places = [inside(place, f"{card.name}: splits.{split}") for place in card.places(split)]
    alone: list[tuple[str, ...]] = []
    while places:
        first = places.pop(0)
        if card.sides == 1 or format_of(first) != "lines":
            alone.append((first,))
        elif not places or format_of(places[0]) != "lines":
            raise UserError(f"{card.name}: splits.{split}: {first} has no partner: write [SOURCE, TRANSLATION]")
        else:
            alone.append((first, places.pop(0)))
    return alone


def found_files(card: "Card", split: str, fs: pafs.FileSystem, folder: str) -> list[tuple[str, ...]]:
    """Return the files of a split under the names they have in a folder of a filesystem: gzipped (NAME.gz) or not.

    Raises FileNotFoundError for a file that exists in neither form, UserError for one that exists in both.
    """
    return [tuple(_found(card, split, name, fs, folder) for name in names) for names in files_of(card, split)]


def _found(card: "Card", split: str, name: str, fs: pafs.FileSystem, folder: str) -> str:
    """Return the name under which one file of a split exists; raises like `found_files`."""
    plain = without_gzip(name)
    there = [one for one in (plain, f"{plain}{GZIP_ENDING}") if storage.exists(fs, storage.join(folder, one))]
    if len(there) > 1:
        raise UserError(f"{card.name}: splits.{split}: {' and '.join(there)} both exist: move one of them away")
    if not there:
        raise FileNotFoundError(storage.join(folder, name))
    return there[0]


def read_files(card: "Card", root: str, names: Sequence[str]) -> Iterator[Line]:
    """Yield the lines of a file or a pair of files under `root`; raise FileNotFoundError for a missing one."""
    fs, folder = storage.open_uri(root)
    paths = [storage.join(folder, name) for name in names]
    data = []
    for path in paths:
        try:
            data.append(storage.read_bytes(fs, path))
        except FileNotFoundError:
            raise FileNotFoundError(path) from None
    default = PARQUET_COLUMNS if format_of(names[0]) == "parquet" else COLUMNS
    yield from read_texts(paths, data, card.text_columns or default[card.sides])


def learn_vocabulary(card: "Card", root: str, spec: TextSpec) -> str:
    """Return the vocabulary of split `train`, both of its sides, as text; raise RunFailed if it cannot be trained."""
    if TRAIN not in card.splits:
        raise RunFailed(
            f"{card.name} has no split {TRAIN!r}, on which the tokenizer is trained: name a split so in the card"
        )

    def texts() -> Iterator[str]:
        for names in found_files(card, TRAIN, *storage.open_uri(root)):
            for line in read_files(card, root, names):
                if not line.reason:
                    yield from (_cased(text, spec) for text in line.texts)

    try:
        return train_vocabulary(texts(), spec.tokenizer, spec.vocab_size).to_text()
    except FileNotFoundError as error:
        raise RunFailed(f"{error}: no such file: fix data.root or the card") from None


def _cased(text: str, spec: TextSpec) -> str:
    """Return a text in the case in which it becomes tokens; the text itself is stored unchanged."""
    return text.lower() if spec.lower else text


def convert_text(raw: Raw, row: dict[str, Any], _: "Decoder") -> Iterator[Made | Bad]:
    """Yield the pairs or windows of a file, or of a pair of files, and the lines that are left out."""
    assert raw.text is not None
    split, found = row["split"], row["path"]
    listed = next(names for names in files_of(raw.card, split) if without_gzip(names[0]) == without_gzip(found))
    names = (found, *(_found(raw.card, split, name, *storage.open_uri(raw.root)) for name in listed[1:]))
    lines = read_files(raw.card, raw.root, names)
    vocabulary = vocabulary_of(raw.vocabulary)
    if raw.card.sides == 2:
        yield from _pairs(names, lines, vocabulary, raw.text, split == TRAIN)
    else:
        spec, training = raw.text, split == TRAIN
        length = spec.length if training else spec.stream or spec.length
        yield from _windows(names[0], lines, vocabulary, spec, length, 2 * length if training else length)


def _pairs(
    names: Sequence[str], lines: Iterator[Line], vocabulary: Vocabulary, spec: TextSpec, training: bool
) -> Iterator[Made | Bad]:
    for some in _in_groups(lines):
        good = [line for line in some if not line.reason]
        yield from (Bad(f"{names[0]}#{line.number}", line.reason) for line in some if line.reason)
        sources, targets = (vocabulary.encode_all([_cased(line.texts[side], spec) for line in good]) for side in (0, 1))
        for line, source, target in zip(good, sources, targets, strict=True):
            length = max(len(source), len(target)) + 1
            path = f"{names[0]}#{line.number}"
            if not source or not target:
                yield Bad(path, EMPTY)
            elif training and length > spec.max_tokens:
                yield Bad(path, f"has {length} tokens, text.max_tokens is {spec.max_tokens}", fails=False)
            elif training and spec.max_ratio and length - 1 > spec.max_ratio * min(len(source), len(target)):
                yield Bad(path, f"one side is more than {spec.max_ratio:g} times as long as the other", fails=False)
            else:
                most = spec.max_tokens - 1
                stored = {"tokens": source[:most], "target": target[:most]}
                stored |= {"text": line.texts[0], "translation": line.texts[1]}
                data = json.dumps(stored).encode()
                yield Made(path, data, {"frames": min(length, spec.max_tokens)}, sum(map(len, line.texts)))


def _windows(
    name: str, lines: Iterator[Line], vocabulary: Vocabulary, spec: TextSpec, length: int, reach: int
) -> Iterator[Made | Bad]:
    """Yield windows of a stream that begins with eos, so that each token of the lines, and each end, is predicted once.

    Each window is stored with the tokens that follow it, `reach` in total.
    """
    stream, first = [EOS], 0

    def window() -> Made:
        shown = min(length, len(stream) - 1)
        stored = {"tokens": stream[: reach + 1], "target": [], "text": "", "translation": ""}
        return Made(f"{name}#{first}", json.dumps(stored).encode(), {"frames": shown}, 4 * shown)

    for some in _in_groups(line for line in lines if line.reason != EMPTY):
        yield from (Bad(f"{name}#line {line.number}", line.reason) for line in some if line.reason)
        for tokens in vocabulary.encode_all([_cased(line.texts[0], spec) for line in some if not line.reason]):
            stream += [*tokens, EOS]
            while len(stream) > reach:
                yield window()
                stream, first = stream[length:], first + length
    while len(stream) > 1:
        yield window()
        stream, first = stream[length:], first + length


def _in_groups(lines: Iterator[Line]) -> Iterator[list[Line]]:
    some: list[Line] = []
    for line in lines:
        some.append(line)
        if len(some) == AT_ONCE:
            yield some
            some = []
    if some:
        yield some
