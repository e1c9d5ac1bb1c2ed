"""Scores of texts: BLEU and chrF by sacrebleu, counted sentence by sentence, a paired bootstrap, perplexity.

`counts` returns integers per sentence; from their sum, also over ranks, `score` computes the score of a corpus, the
same as sacrebleu's for all sentences at once. A score means little without its `signature`, so every `TextScore` has
one. sacrebleu is in the extra `text` and is imported only here. Perplexity is exp of the mean NLL in nats: per token,
and per word, which alone is comparable across tokenizers (the same NLL over fewer units).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slimray.spec import UserError

Counts = NDArray[np.int64]
DRAWS = 1000  # resamples of a bootstrap


@dataclass(frozen=True)
class TextScore:
    """A score 0-100 and sacrebleu's signature, which describes how it was computed."""

    value: float
    signature: str


@dataclass(frozen=True)
class CorpusMetric:
    """BLEU or chrF against one reference per sentence; `tokenize` (13a, intl, none, zh, ja-mecab, ...) is BLEU's."""

    name: Literal["bleu", "chrf"] = "bleu"
    lower: bool = False
    tokenize: str = "13a"
    smooth: str = "exp"

    @cached_property
    def _metric(self) -> Any:
        try:
            from sacrebleu.metrics.bleu import BLEU
            from sacrebleu.metrics.chrf import CHRF
        except ImportError:
            raise UserError("sacrebleu is not installed: pip install 'slimray[text]'") from None
        if self.name == "chrf":
            return CHRF(lowercase=self.lower)
        return BLEU(lowercase=self.lower, tokenize=self.tokenize, smooth_method=self.smooth, force=True)

    def counts(self, hypotheses: Sequence[str], references: Sequence[str]) -> Counts:
        """Return the counts to be summed, int64 `[n, k]`; ValueError unless there is a reference per hypothesis."""
        if len(hypotheses) != len(references):
            raise ValueError(f"{len(hypotheses)} hypotheses, but {len(references)} references")
        if not hypotheses:
            return np.zeros((0, len(self.counts(["a"], ["a"])[0])), np.int64)
        return np.array(self._metric._extract_corpus_statistics(hypotheses, [references]), np.int64)

    def score(self, total: Counts | Sequence[int]) -> TextScore:
        """Return the score of a corpus from the sum of its counts `[k]`."""
        self.counts(["a"], ["a"])  # a metric knows its signature only once it has seen a reference
        found = self._metric._aggregate_and_compute([[int(one) for one in total]])
        return TextScore(float(found.score), str(self._metric.get_signature()))

    def of(self, hypotheses: Sequence[str], references: Sequence[str]) -> TextScore:
        """Return the score of a corpus."""
        return self.score(self.counts(hypotheses, references).sum(0))


@dataclass(frozen=True)
class Comparison:
    """Comparison of two systems on the same sentences: the lead of the first, and its 95 % interval."""

    difference: float
    low: float
    high: float


def paired_bootstrap(metric: CorpusMetric, first: Counts, second: Counts, seed: int = 0) -> Comparison:
    """Compare two systems by their `counts` `[n, k]` on the same sentences, which are resampled (Koehn 2004).

    Raises ValueError for different numbers of sentences, or none.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} sentences of one system, {len(second)} of the other")
    rng, gains = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        rows = rng.integers(0, len(first), len(first))
        gains.append(metric.score(first[rows].sum(0)).value - metric.score(second[rows].sum(0)).value)
    whole = metric.score(first.sum(0)).value - metric.score(second.sum(0)).value
    low, high = np.quantile(gains, [0.025, 0.975])
    return Comparison(whole, float(low), float(high))


def perplexity(nll: float, units: float) -> float:
    """Return exp(`nll` / `units`): `nll` in nats is summed over a text, units are tokens, or words to compare
    tokenizers.

    nan without units, inf if the exponential overflows.
    """
    if units <= 0 or math.isnan(nll):
        return math.nan
    try:
        return math.exp(nll / units)
    except OverflowError:
        return math.inf
