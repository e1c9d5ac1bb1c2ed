"""Vocabularies: text to tokens and back; a SentencePiece model, or words by frequency.

A vocabulary is trained by `prepare` on the training split and travels as text in a plain recipe, so that predict and
exports, which have a run's `model/input.json`, encode text as training did. Ids 0 to 3 are bos, pad, eos, unk (the
order of the published translation networks). Words are split at white space only, because benchmarks such as the Penn
Treebank are already tokenized. `sentencepiece` (extra `text`) is imported only here, and only for its models. No torch,
no Ray.
"""

import base64
import binascii
import functools
import io
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slimray.spec import RunFailed, UserError

BOS, PAD, EOS, UNK = range(4)
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
SPACE = "\u2581"  # first character of a piece that begins a word
SENTENCES = 2_000_000  # maximum that SentencePiece learns from
MAX_BYTES = 64 << 20  # of an unpacked vocabulary
THREADS = 4  # for training; fixed, because a SentencePiece model depends on it
Kind = Literal["unigram", "bpe", "words"]
WORDS, PIECES = "words", "sentencepiece"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens by number. `kind` is WORDS or PIECES, `data` holds the words, one per line, or a SentencePiece model."""

    kind: str
    data: bytes

    @functools.cached_property
    def _words(self) -> tuple[str, ...]:
        return SPECIAL + tuple(self.data.decode().split("\n"))

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self._words) if number >= UNK}  # others do not occur in text

    @functools.cached_property
    def _pieces(self) -> Any:
        try:
            return _sentencepiece().SentencePieceProcessor(model_proto=self.data)
        except RuntimeError:
            raise UserError("the tokenizer is damaged: prepare the dataset, or train the run, again") from None

    @property
    def size(self) -> int:
        """Number of tokens, including the special ones."""
        return len(self._words) if self.kind == WORDS else self._pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without bos and eos."""
        if self.kind == WORDS:
            return [self._numbers.get(word, UNK) for word in text.split()]
        return self._pieces.encode(text)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, as `encode` does."""
        return [self.encode(text) for text in texts] if self.kind == WORDS else self._pieces.encode(list(texts))

    def decode(self, tokens: Iterable[int]) -> str:
        """Return tokens as text without bos, pad and eos; raise ValueError for a number that is not a token."""
        kept = [int(token) for token in tokens if token not in (BOS, PAD, EOS)]
        if any(not 0 <= token < self.size for token in kept):
            raise ValueError(f"tokens must be below {self.size}")
        return " ".join(self._words[token] for token in kept) if self.kind == WORDS else self._pieces.decode(kept)

    def begins_word(self, token: int) -> bool:
        """Return whether a token begins a word; the space before an unknown token is a piece of its own."""
        if self.kind == WORDS:
            return token >= UNK
        return token > UNK and self._pieces.id_to_piece(token)[:1] == SPACE

    def to_text(self) -> str:
        """Return the vocabulary for a plain recipe: the kind, and the compressed data in base64."""
        return f"{self.kind}:{base64.b64encode(zlib.compress(self.data, 9)).decode('ascii')}"


@functools.lru_cache(maxsize=8)
def vocabulary_of(text: str) -> Vocabulary:
    """Return the vocabulary that `to_text` wrote; raise UserError if the text is not one."""
    kind, _, packed = text.partition(":")
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(packed, validate=True), MAX_BYTES)
        if kind not in (WORDS, PIECES) or not unpacker.eof:
            raise ValueError
        if kind == WORDS:
            data.decode()
    except (binascii.Error, zlib.error, ValueError):
        raise UserError("the tokenizer is damaged: prepare the dataset, or train the run, again") from None
    return Vocabulary(kind, data)


def train_vocabulary(texts: Iterable[str], kind: Kind, size: int) -> Vocabulary:
    """Return a vocabulary of at most `size` tokens, trained on `texts`; the same for the same texts.

    Words are counted in all texts; SentencePiece learns from at most SENTENCES of them, drawn uniformly.

    Raises RunFailed if the texts are not enough for a vocabulary of that size.
    """
    if kind == "words":
        counts = Counter(word for text in texts for word in text.split())
        ranked = sorted((word for word in counts if word not in SPECIAL), key=lambda word: (-counts[word], word))
        if not ranked:
            raise RunFailed("the training split has no words")
        return Vocabulary(WORDS, "\n".join(ranked[: size - len(SPECIAL)]).encode())
    model = io.BytesIO()
    try:
        _sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=iter(_drawn(texts, SENTENCES)), model_writer=model, vocab_size=size, model_type=kind,
            num_threads=THREADS, bos_id=BOS, pad_id=PAD, eos_id=EOS, unk_id=UNK, unk_surface=" \u2047 ", minloglevel=2,
            normalization_rule_name="identity", hard_vocab_limit=False, input_sentence_size=SENTENCES,
            shuffle_input_sentence=False,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][-160:]
        raise RunFailed(f"text.vocab_size: cannot train a tokenizer of {size} tokens ({reason}): lower it") from None
    return Vocabulary(PIECES, model.getvalue())


def _drawn(texts: Iterable[str], most: int) -> list[str]:
    """Return `most` of the texts, drawn uniformly (reservoir sampling); all if there are fewer.

    The result is the same for the same texts.
    """
    rng, kept = random.Random(0), list[str]()
    for number, text in enumerate(texts):
        if number < most:
            kept.append(text)
        elif (place := rng.randrange(number + 1)) < most:
            kept[place] = text
    return kept


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise UserError("sentencepiece is not installed: pip install 'slimray[text]'") from None
    return sentencepiece
