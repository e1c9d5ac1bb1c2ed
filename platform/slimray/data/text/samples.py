"""Samples of text as arrays of tokens, and the shards in which `prepare` stores them.

A pair is int32 `[1, 2, L]`: the source with eos, and the input of the decoder (eos, then the target); its target, int64
`[L]`, is the target with eos. A window of plain text is int32 `[1, L + 1]`, of which the last L tokens are the target.
Samples are padded with PAD on the right; L is the length of the longest sample of a block, so that short ones are
cheap. Shards are Parquet files of a few thousand samples, which a process keeps as a whole after reading one, because
single samples of a hundred bytes would cost a request each. A window of split `train` is stored with the one that
follows it, because a sample begins anywhere in it, as a function of (seed, epoch), so that an epoch has each token
once; windows of other splits are read as they were cut. No torch, no Ray.
"""

import functools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from slimray import objects, storage
from slimray.data.bytes import Place
from slimray.data.open import filesystem
from slimray.data.text.spec import TRAIN
from slimray.data.text.vocabulary import EOS, PAD, Vocabulary, vocabulary_of
from slimray.spec import RunFailed
from slimray.storage import join

if TYPE_CHECKING:
    from slimray.data.cards import Card
    from slimray.data.spec import DataSpec

ROWS_PER_SHARD = 8192
NUM_SHARDS = 64  # kept per process, a few MB each
TYPICAL = 32  # tokens per side for which the MACs of a translation are counted
SHARD = pa.schema([("path", pa.string()), ("tokens", pa.list_(pa.int32())), ("target", pa.list_(pa.int32())),
                   ("text", pa.string()), ("translation", pa.string())])  # fmt: skip


@dataclass(frozen=True)
class TextRecipe:
    """Recipe of a sample: a pair (`sides` 2) of at most `length` tokens per side, or a window (1) of `length` tokens.

    `tokenizer` is the text of a vocabulary (vocabulary.py) of `vocab_size` tokens, `lower` if it was trained on
    lower-case text. `limit` is the length of the longest sample of the dataset, 0 if unknown. `beam`, `length_penalty`
    and `max_length` control the search for a translation, `max_tokens` limits a continuation. Windows of mode "train"
    begin anywhere and have `length` tokens, others are those of the index.
    """

    sides: int = 2
    length: int = 250
    vocab_size: int = 0
    tokenizer: str = ""
    lower: bool = False
    limit: int = 0
    beam: int = 4
    length_penalty: float = 0.6
    max_length: int = 200
    max_tokens: int = 50
    mode: str = "train"
    kind: str = "text"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "TextRecipe":
        """Return the recipe that `to_dict` stored, without fields added by a task."""
        return cls(**{key: value for key, value in plain.items() if key in cls.__dataclass_fields__})

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary; raises UserError if the recipe has none."""
        return vocabulary_of(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a user's text, without eos."""
        return self.vocabulary.encode(text.lower() if self.lower else text)


def text_recipe(data: "DataSpec", card: "Card", _: int, mode: str) -> dict[str, Any]:
    """Return the fields of a recipe for the `data` section of a job and a card."""
    given = ("beam", "length_penalty", "max_length", "max_tokens")
    split = data.train if mode == "train" else data.val or data.train
    mode = mode if split == TRAIN else "val"  # windows of other splits are not stored with the next one
    fields = {"sides": card.sides, "mode": mode} | {name: data.task[name] for name in given if name in data.task}
    if card.text is None:  # not prepared yet
        return fields
    longest = card.text.lengths.get(split) or max(card.text.lengths.values())
    known = {"vocab_size": card.text.vocab_size, "tokenizer": card.text.tokenizer, "lower": card.text.lower}
    limit = max(card.text.lengths.values()) if card.sides == 2 else 0
    return fields | known | {"length": longest, "limit": limit}


def text_shape(recipe: TextRecipe) -> tuple[int, ...]:
    """Return the shape of the longest sample; the first axis is its one view."""
    return (1, 2, recipe.length) if recipe.sides == 2 else (1, recipe.length + 1)


def text_input(recipe: TextRecipe) -> tuple[int, ...]:
    """Return the shape of a typical sample as the input of a network."""
    return (2, min(TYPICAL, recipe.length)) if recipe.sides == 2 else (recipe.length + 1,)


def pair_arrays(source: np.ndarray, target: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return a pair of token arrays without eos as a sample int32 `[1, 2, L]` and its target int64 `[L]`.

    Without a target the input of the decoder is eos alone.
    """
    target = np.zeros(0, np.int32) if target is None else target
    length = max(len(source), len(target)) + 1
    sample, wanted = np.full((1, 2, length), PAD, np.int32), np.full(length, PAD, np.int64)
    sample[0, 0, : len(source)], sample[0, 0, len(source)] = source, EOS
    sample[0, 1, 0], sample[0, 1, 1 : len(target) + 1] = EOS, target
    wanted[: len(target)], wanted[len(target)] = target, EOS
    return sample, wanted


def window_arrays(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return L + 1 consecutive tokens as a sample int32 `[1, L + 1]` and its target int64 `[L]`; L is at least 1."""
    sample = np.full((1, max(2, len(tokens))), PAD, np.int32)
    sample[0, : len(tokens)] = tokens
    return sample, sample[0, 1:].astype(np.int64)


def load_text(
    row: dict[str, Any], root: str, recipe: TextRecipe, key: tuple[int, int, int], _: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pair or window of an index row, and its target."""
    fs, path = filesystem(root)
    shard = _shard(Place(join(path, row["shard"]), fs))
    if recipe.sides == 2:
        return pair_arrays(shard.tokens(row["row"]), shard.targets(row["row"]))
    start, length = 0, int(row["frames"])
    if recipe.mode == "train":
        start, length = random.Random(f"{key[0]}-{key[1]}-window").randrange(recipe.length), recipe.length
    return window_arrays(shard.tokens(row["row"])[start : start + length + 1])


# ---------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class _Shard:
    """The concatenated tokens of all samples, and the start of each sample."""

    values: np.ndarray
    starts: np.ndarray
    target_values: np.ndarray
    target_starts: np.ndarray

    def tokens(self, row: int) -> np.ndarray:
        """Return the tokens of a window, or of the source of a pair."""
        return self.values[self.starts[row] : self.starts[row + 1]]

    def targets(self, row: int) -> np.ndarray:
        """Return the tokens of the target of a pair."""
        return self.target_values[self.target_starts[row] : self.target_starts[row + 1]]


@functools.lru_cache(maxsize=NUM_SHARDS)
def _shard(at: Place) -> _Shard:
    def read() -> pa.Table:
        try:
            data = objects.read_range(at.fs, at.path)  # as a whole, with one request
            return pq.read_table(pa.BufferReader(data), columns=["tokens", "target"])
        except FileNotFoundError:
            raise FileNotFoundError(at.path) from None
        except pa.ArrowException as error:
            raise OSError(str(error)) from error

    table = storage.retry(read, "read", at.path).combine_chunks()
    arrays: list[np.ndarray] = []
    for name in ("tokens", "target"):
        column: Any = table.column(name).chunk(0)
        arrays += [column.values.to_numpy(), column.offsets.to_numpy()]
    return _Shard(*arrays)


def write_text_shard(fs: pafs.FileSystem, path: str, rows: Iterable[dict[str, Any]]) -> list[tuple[int, int]]:
    """Write rows of `path` and `data` (JSON of the other columns) as a shard, atomically.

    Returns no places of samples, because a shard is read as a whole.
    """
    table = pa.Table.from_pylist([{"path": row["path"], **json.loads(row["data"])} for row in rows], schema=SHARD)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    storage.write_atomic(fs, path, sink.getvalue().to_pybytes())
    return []


def raw_texts(root: str, rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the original text and translation of index rows; raise RunFailed for a missing or damaged shard."""
    fs, folder = filesystem(root)
    wanted = [(str(row["shard"]), int(row["row"])) for row in rows]
    held: dict[str, pa.Table] = {}
    for shard in {shard for shard, _ in wanted}:
        try:
            data = storage.read_bytes(fs, join(folder, shard))
            held[shard] = pq.read_table(pa.BufferReader(data), columns=["text", "translation"])
        except (FileNotFoundError, pa.ArrowException):
            raise RunFailed(f"{join(folder, shard)}: is missing or damaged: run prepare again") from None
    return [(held[s].column("text")[n].as_py(), held[s].column("translation")[n].as_py()) for s, n in wanted]


def index_rows(root: str, split: str, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Return rows of the index of a split that `prepare` wrote at `root`; raise RunFailed if missing or damaged."""
    fs, folder = filesystem(root)
    try:
        data = storage.read_bytes(fs, join(folder, f"{split}.parquet"))
        table = pq.read_table(pa.BufferReader(data), columns=["shard", "row"])
    except (FileNotFoundError, pa.ArrowException):
        raise RunFailed(f"{join(folder, split)}.parquet: is missing or damaged: run prepare again") from None
    return table.take(list(numbers)).to_pylist()
