"""Translation: bookkeeping of beam search, translation of lines of text, and the search over an export. numpy only.

The rules are those of the published results (HAT, arXiv 2005.14187): every step considers the 2 x beam best
continuations, an eos among the best `beam` ends a hypothesis, a sentence is done once `beam` hypotheses have ended, and
a score is the sum of log-probabilities over length ** penalty, eos included. PAD is never chosen, eos is not the first
token, and only eos may follow `max_length` tokens. `Beams` does the bookkeeping, whatever computes the tokens: torch
(models/text/decoding.py), or here an export, which is an encoder and a step of the decoder with its cache.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from slimray.data.samples import BadSample
from slimray.data.text.samples import TextRecipe
from slimray.data.text.vocabulary import EOS, PAD
from slimray.runtime.folder import Facts, Step
from slimray.spec import Spec, UserError

Arrays = Mapping[str, NDArray[Any]]
Run = Callable[[Arrays], Arrays]  # named arrays in, named arrays out
TOKEN, LOGITS, NEXT, PAST = "token", "logits", "next_{}", "past_"
MAX_WIDTH = 1 << 16  # channels that a layer caches per token


class TranslateOptions(Spec):
    """Options of beam search."""

    beam: int = Field(4, ge=1, le=64)
    """Number of hypotheses kept; 1 always takes the likeliest token."""
    length_penalty: float = Field(0.6, ge=0, le=5)
    """A hypothesis is scored by its log-probability over its length to this power: larger values favour longer ones."""
    max_length: int = Field(200, ge=1, le=10_000)
    """Largest number of tokens in a translation."""


@dataclass(frozen=True)
class Hypothesis:
    """A translation: its tokens without eos, and its score."""

    tokens: tuple[int, ...]
    score: float


class Beams:
    """The hypotheses of `count` sentences, `beam` of each, and those that have ended (`done`).

    `rows` are the unfinished sentences, `scores` `[rows, beam]` the scores of their hypotheses so far.
    """

    def __init__(self, count: int, beam: int, penalty: float, max_length: int):
        self.beam, self.penalty, self.max_length = beam, penalty, max_length
        self.done: list[list[Hypothesis]] = [[] for _ in range(count)]
        self.rows = np.arange(count)
        self.tokens = np.full((count, beam, 1), EOS, np.int64)
        self.scores = np.full((count, beam), -np.inf)
        self.scores[:, 0] = 0  # all are identical at first, so only one counts

    @property
    def length(self) -> int:
        """Number of tokens of the hypotheses so far."""
        return self.tokens.shape[-1] - 1

    @property
    def last(self) -> NDArray[np.int64]:
        """The last token of each hypothesis, `[rows * beam, 1]`; eos at first."""
        return self.tokens[..., -1].reshape(-1, 1)

    def go_on(self, best: NDArray[Any], place: NDArray[Any], vocab_size: int) -> NDArray[np.int64] | None:
        """Apply the best continuations of each sentence `[rows, k]`: descending scores, and hypothesis * V + token.

        Returns the cache rows `[rows * beam]` from which the continuing hypotheses come; None at the end.
        """
        parent, token = place // vocab_size, place % vocab_size
        for at, number in np.argwhere((token[:, : self.beam] == EOS) & np.isfinite(best[:, : self.beam])).tolist():
            found = self.done[self.rows[at]]
            if len(found) < self.beam:
                words = tuple(self.tokens[at, parent[at, number], 1:].tolist())
                found.append(Hypothesis(words, float(best[at, number]) / (len(words) + 1) ** self.penalty))
        keep = np.array([at for at, row in enumerate(self.rows) if len(self.done[row]) < self.beam], np.int64)
        if not len(keep) or self.length == self.max_length:
            return None
        order = np.argsort(token[keep] == EOS, axis=-1, kind="stable")[:, : self.beam]  # the best that continue
        parent, token, self.scores = (np.take_along_axis(one[keep], order, -1) for one in (parent, token, best))
        before = np.take_along_axis(self.tokens[keep], parent[..., None], 1)
        self.tokens = np.concatenate([before, token[..., None]], -1)
        self.rows = self.rows[keep]
        return (keep[:, None] * self.beam + parent).reshape(-1)

    @property
    def found(self) -> list[list[Hypothesis]]:
        """Up to `beam` translations of each sentence, the best first."""
        return [sorted(ended, key=lambda one: -one.score) for ended in self.done]


def translator(recipe: TextRecipe, search: Callable[[NDArray[np.int64]], Sequence[int]]) -> Callable[[str], str]:
    """Return a function from a line to its translation; `search` takes a sentence int64 `[1, S]` with its eos.

    The function raises BadSample for a line that is longer than the sentences of training.
    """

    def one(text: str) -> str:
        tokens = recipe.encode(text)
        if recipe.limit and len(tokens) >= recipe.limit:
            count = len(tokens) + 1
            raise BadSample(f"has {count} tokens, but the network was trained on at most {recipe.limit}: split it")
        return recipe.vocabulary.decode(search(np.array([[*tokens, EOS]], np.int64))) if tokens else ""

    return one


# --------------------------------------------------------------------------------------------------------- exports


@dataclass(frozen=True, eq=False)
class Speaker:
    """An encoder and a step of a decoder, in any runtime; `cached` are the cache inputs of the step, with their
    channels."""

    encode: Run
    step: Run
    cached: Mapping[str, int]

    def begin(self, count: int) -> dict[str, NDArray[Any]]:
        """Return the empty cache of `count` hypotheses."""
        return {name: np.zeros((count, 0, width), np.float32) for name, width in self.cached.items()}

    def next(self, token: NDArray[np.int64], source: Arrays, cached: Arrays) -> tuple[NDArray[Any], Arrays]:
        """Return logits `[B, V]` after tokens `[B, 1]` and the new cache; `source` is the output of `encode`."""
        out = self.step({TOKEN: token, **source, **cached})
        return np.asarray(out[LOGITS]), {name: np.asarray(out[NEXT.format(name)]) for name in self.cached}


def beam_search(
    speaker: Speaker, source: NDArray[np.int64], beam: int, penalty: float, max_length: int
) -> list[list[Hypothesis]]:
    """Return up to `beam` translations of each of the sentences `[B, S]` with eos, the best first."""
    beams = Beams(len(source), beam, penalty, max_length)
    given = {name: np.repeat(value, beam, 0) for name, value in speaker.encode({"source": source}).items()}
    cached: Arrays = speaker.begin(len(source) * beam)
    while True:
        logits, cached = speaker.next(beams.last, given, cached)
        log_probs = _log_softmax(logits.astype(np.float64))
        vocab_size = log_probs.shape[-1]
        log_probs[:, forbidden(beams.length, max_length, vocab_size)] = -np.inf
        totals = (beams.scores.reshape(-1, 1) + log_probs).reshape(len(beams.rows), -1)
        count = min(2 * beam, totals.shape[1])
        place = np.argpartition(-totals, count - 1, -1)[:, :count]
        best = np.take_along_axis(totals, place, -1)
        order = np.argsort(-best, axis=-1, kind="stable")
        rows = beams.go_on(np.take_along_axis(best, order, -1), np.take_along_axis(place, order, -1), vocab_size)
        if rows is None:
            return beams.found
        given, cached = ({name: value[rows] for name, value in part.items()} for part in (given, cached))


def forbidden(length: int, max_length: int, vocab_size: int) -> NDArray[np.bool_]:
    """Return a mask `[V]` of tokens that may not follow `length` others: PAD, eos at first, all but eos at the end."""
    out = np.full(vocab_size, length == max_length)
    out[EOS] = length == 0 and max_length > 0
    out[PAD] = True
    return out


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def cached_of(facts: Facts, step: Step, where: str) -> dict[str, int]:
    """Return the cache inputs of a step, with their channels; UserError if it does not match the encoder."""
    past = {one.name: one.shape for one in step.inputs if one.name.startswith(PAST)}
    widths = {name: int(shape[-1] or 0) for name, shape in past.items() if len(shape) == 3}
    inputs = {TOKEN, *widths, *(one.name for one in facts.outputs)}
    outputs = {LOGITS, *(NEXT.format(name) for name in widths)}
    if (
        [one.name for one in facts.inputs] != ["source"]
        or {one.name for one in step.inputs} != inputs
        or {one.name for one in step.outputs} != outputs
        or not all(0 < width <= MAX_WIDTH for width in widths.values())
    ):
        raise UserError(f"{where}/export.json: step: does not match the encoder, export the run again")
    return widths
