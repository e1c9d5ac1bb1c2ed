"""Adaptive embedding and softmax: words in bins by frequency, with narrow vectors for rare ones.

Adaptive Input Representations (arXiv 1809.10853) over Efficient softmax (1609.04309), as in the MicroNet language model
(2005.07877): the rows of a bin are shared by input and output, its projection is not. Words are numbered by frequency.
Surprising: the clusters of the head are in reverse order, its last column is the first tail, as in released weights.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class AdaptiveEmbedding(nn.Module):
    """Words int `[...]` to `[..., widths[0]]`; the bin from `cutoffs[i]` on has vectors of width `widths[i + 1]`."""

    def __init__(self, vocab_size: int, widths: Sequence[int], cutoffs: Sequence[int]):
        super().__init__()
        self.edges = (0, *cutoffs, vocab_size)
        self.width = widths[0]
        sizes = [high - low for low, high in pairwise(self.edges)]
        self.layers = nn.ModuleList(nn.Embedding(size, width) for size, width in zip(sizes, widths, strict=True))
        self.projections = nn.ModuleList(nn.Linear(width, self.width, bias=False) for width in widths[1:])
        for table in self.layers:
            nn.init.normal_(table.weight, 0, self.width**-0.5)  # type: ignore[arg-type]
        for projection in self.projections:
            nn.init.normal_(projection.weight, 0, self.width**-0.5)  # type: ignore[arg-type]

    def forward(self, words: Tensor) -> Tensor:
        out = None
        for number, (low, high) in enumerate(pairwise(self.edges)):
            rows = self.layers[number]((words - low).clamp(0, high - low - 1))
            if number:
                rows = self.projections[number - 1](rows)
            inside = ((words >= low) & (words < high)).unsqueeze(-1)
            out = rows * inside if out is None else out + rows * inside
        assert out is not None
        return out * self.width**0.5


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities of the next word; the weights of the words are those of `embed`, passed to each call."""

    def __init__(self, vocab_size: int, widths: Sequence[int], cutoffs: Sequence[int]):
        super().__init__()
        self.edges, width = (0, *cutoffs, vocab_size), widths[0]
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(high - low)) for low, high in pairwise(self.edges))
        self.projections = nn.ModuleList(nn.Linear(width, narrow, bias=False) for narrow in widths[1:])
        self.clusters = nn.Linear(width, len(cutoffs)) if cutoffs else None
        for projection in self.projections:
            nn.init.normal_(projection.weight, 0, width**-0.5)  # type: ignore[arg-type]

    def _head(self, hidden: Tensor, embed: AdaptiveEmbedding) -> Tensor:
        """Return log-probabilities `[..., words of the first bin + tails]`."""
        logits = functional.linear(hidden, embed.layers[0].weight, self.biases[0])  # type: ignore[arg-type]
        if self.clusters is not None:
            logits = torch.cat([logits, self.clusters(hidden)], -1)
        return logits.log_softmax(-1)

    def _tail(self, number: int, hidden: Tensor, embed: AdaptiveEmbedding) -> Tensor:
        """Return log-probabilities `[..., words]` within the bin `number`, 1 or above."""
        weight = embed.layers[number].weight
        narrow = self.projections[number - 1](hidden)
        return functional.linear(narrow, weight, self.biases[number]).log_softmax(-1)  # type: ignore[arg-type]

    def forward(self, hidden: Tensor, embed: AdaptiveEmbedding) -> Tensor:
        """Return log-probabilities of all words `[..., V]`."""
        head, first = self._head(hidden, embed), self.edges[1]
        tails = len(self.edges) - 2
        parts = [head[..., :first]]
        for number in range(1, tails + 1):
            column = first + tails - number
            parts.append(head[..., column : column + 1] + self._tail(number, hidden, embed))
        return torch.cat(parts, -1)

    def log_probs_of(self, hidden: Tensor, words: Tensor, embed: AdaptiveEmbedding) -> Tensor:
        """Return log-probabilities `[n]` of `words` `[n]` after `hidden` `[n, C]`; tails are only computed if needed.

        On the meta device and in an export everything is computed, which is also how costs are counted.
        """
        if hidden.is_meta or torch.compiler.is_exporting():
            return self(hidden, embed).gather(-1, words[:, None])[:, 0]
        head, first = self._head(hidden, embed), self.edges[1]
        tails = len(self.edges) - 2
        column = torch.where(words < first, words, first)
        for number in range(1, tails + 1):
            column = torch.where(words >= self.edges[number], first + tails - number, column)
        out = head.gather(-1, column[:, None])[:, 0]
        for number, (low, high) in list(enumerate(pairwise(self.edges)))[1:]:
            rows = ((words >= low) & (words < high)).nonzero()[:, 0]
            inside = self._tail(number, hidden[rows], embed).gather(-1, (words[rows] - low)[:, None])[:, 0]
            out = out.index_add(0, rows, inside)
        return out


@torch.no_grad()
def hebbian_sums(weight: Tensor, hidden: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums `[V, C]` of the vectors `hidden` `[n, C]` that preceded `words` `[n]`, each scaled to the length of
    the word's `weight` `[V, C]`, and the counts of each word `[V]`. Results for parts of a batch may be added."""
    scaled = hidden * (weight[words].norm(dim=1) / hidden.norm(dim=1))[:, None]
    seen = weight.new_zeros(len(weight)).index_add(0, words, torch.ones_like(words, dtype=weight.dtype))
    return torch.zeros_like(weight).index_add(0, words, scaled), seen


@torch.no_grad()
def hebbian_update(
    weight: Tensor, sums: Tensor, seen: Tensor, counts: Tensor, most: int = 500, least: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Move the weights `[V, C]` of words towards what preceded them (Fast Parametric Learning, arXiv 1803.10049).

    Returns new weights and counts. `sums` and `seen` come from `hebbian_sums`, `counts` `[V]` start at 1. A word seen
    `c` times so far, less than `most`, moves by the fraction max(1 / c, `least`) towards the mean of its hidden
    vectors. This is the rule as intended; the released code computed it but discarded the result.
    """
    share = torch.where(counts < most, (1 / counts).clamp(min=least), 0.0)
    mean = sums / seen.clamp(min=1)[:, None]
    moved = torch.where((seen > 0)[:, None], weight + share[:, None] * (mean - weight), weight)
    return moved, counts + seen
