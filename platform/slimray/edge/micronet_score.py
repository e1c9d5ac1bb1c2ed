"""Score of the MicroNet challenge (2019) for language models: storage and operations per word, as a table of terms.

score = storage / 159e6 + operations / 318e6, both in words of 32 bits. Storage: the bits of nonzeros, one mask bit per
number of every tensor if zeros are left out (`masked`), and a scale per quantizer of activations. Operations: products
in proportion to their bits, sums and all others with 32; the whole vocabulary is evaluated for every word. A LayerNorm
counts 6 operations per channel, a softmax 3 n - 1, a ReLU 1. Surprising: as published (arXiv 2005.07877), the terms of
the relative positions and of the attention's softmax are those of a single head; `all_heads` counts all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from torch import Tensor, nn

from slimray.compress.quantized import Quantized

STORAGE_UNIT, OPERATION_UNIT = 159e6, 318e6


class Sizes(Protocol):
    """Sizes of a language model, as in `models.text.micronet.Shape`."""

    @property
    def widths(self) -> tuple[int, ...]: ...
    @property
    def cutoffs(self) -> tuple[int, ...]: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def key(self) -> int: ...
    @property
    def value(self) -> int: ...
    @property
    def ffn(self) -> int: ...
    @property
    def context(self) -> int: ...


@dataclass(frozen=True)
class Term:
    """A term of the score, for one part of a network: stored numbers, nonzeros, and operations per word.

    `bits` are those of its numbers and its products.
    """

    name: str
    bits: int
    stored: int = 0
    nonzero: float = 0.0
    products: float = 0.0
    sums: float = 0.0
    others: float = 0.0


@dataclass(frozen=True)
class Counting:
    """Rules by which a network is counted: `bits` of weights and products, and `bits_of` tensors with other bits;
    `density` of tensors by name (default 1), `shares` of words in the tails, number of `quantizers` of activations,
    each of which is stored in 1 + (32 - `bits`) / 32 words."""

    bits: int = 32
    bits_of: Mapping[str, int] = field(default_factory=dict)
    density: Mapping[str, float] = field(default_factory=dict)
    masked: bool = False
    quantizers: int = 0
    shares: Sequence[float] = ()
    all_heads: bool = False


@dataclass(frozen=True)
class MicroNetScore:
    """Storage and operations in words of 32 bits, and the terms that make them up."""

    terms: tuple[Term, ...]
    counting: Counting

    def total(self, what: str) -> float:
        """Return the sum of a field over all terms."""
        return sum(getattr(term, what) for term in self.terms)

    @property
    def storage(self) -> float:
        """Storage in words of 32 bits."""
        counting = self.counting
        mask = self.total("stored") / 32 if counting.masked else 0.0
        scales = counting.quantizers * (1 + (32 - counting.bits) / 32)
        return sum(term.nonzero * term.bits for term in self.terms) / 32 + mask + scales

    @property
    def operations(self) -> float:
        """Operations per word of text."""
        products = sum(term.products * term.bits for term in self.terms) / 32
        return products + self.total("sums") + self.total("others")

    @property
    def score(self) -> float:
        """The score; lower is better."""
        return self.storage / STORAGE_UNIT + self.operations / OPERATION_UNIT


def micronet_score(sizes: Sizes, vocab_size: int, cache: int, counting: Counting) -> MicroNetScore:
    """Return the score of a language model; tensors are named as in `MicroNetLM.state_dict()`.

    `counting.shares` are the shares of words whose embeddings are projected, by bin of `sizes.cutoffs` without the
    first; ValueError unless there is one for each.
    """
    width, edges = sizes.widths[0], (0, *sizes.cutoffs, vocab_size)
    if len(counting.shares) != len(sizes.cutoffs):
        raise ValueError(f"{len(counting.shares)} shares of words, but {len(sizes.cutoffs)} tails")
    bins = [high - low for low, high in pairwise(edges)]
    density = counting.density
    terms: list[Term] = []

    def bits_of(name: str) -> int:
        return counting.bits_of.get(f"{name}.weight", counting.bits)

    def matrix(name: str, inputs: int, outputs: int, bias: bool, often: float = 1.0) -> None:
        """Add the term of a linear layer that is used `often` times per word."""
        dense, products = density.get(f"{name}.weight", 1.0), inputs * outputs
        added = outputs * density.get(f"{name}.bias", 1.0) if bias else 0
        sums = (inputs - 1) * outputs * dense + added
        stored = products + (outputs if bias else 0)
        terms.append(
            Term(name, bits_of(name), stored, products * dense + added, often * products * dense, often * sums)
        )

    for number, share in enumerate(counting.shares):
        matrix(f"embed.projections.{number}", sizes.widths[number + 1], width, False, share)
    for number in range(sizes.layers):
        terms += _layer(sizes, f"layers.{number}", counting, matrix)
    for number, (words, narrow) in enumerate(zip(bins, sizes.widths, strict=True)):
        if number:
            matrix(f"softmax.projections.{number - 1}", width, narrow, False)
        dense = density.get(f"embed.layers.{number}.weight", 1.0)
        added, products = words * density.get(f"softmax.biases.{number}", 1.0), words * narrow * dense
        sums, stored = (narrow - 1) * words * dense + added, words * narrow + words
        others = 3 * (words + (0 if number else len(sizes.cutoffs))) - 1
        bits = bits_of(f"embed.layers.{number}")
        terms.append(Term(f"words.{number}", bits, stored, products + added, products, sums, others))
    if sizes.cutoffs:
        matrix("softmax.clusters", width, len(sizes.cutoffs), True)
    if cache:
        terms.append(
            Term("cache", counting.bits, products=width * cache, sums=(width - 1) * cache, others=3 * cache - 1)
        )
    return MicroNetScore(tuple(terms), counting)


def _layer(sizes: Sizes, name: str, counting: Counting, matrix: Callable[..., None]) -> list[Term]:
    """Add the matrices of a layer with `matrix`, and return the terms of its other computations."""
    width, heads, window = sizes.widths[0], sizes.heads, sizes.context
    counted, bits = heads if counting.all_heads else 1, counting.bits
    matrix(f"{name}.attention.qkv", width, heads * (2 * sizes.key + sizes.value), True)
    matrix(f"{name}.attention.out", heads * sizes.value, width, False)
    matrix(f"{name}.fc1", width, sizes.ffn, True)
    matrix(f"{name}.fc2", sizes.ffn, width, True)
    products = heads * window * (sizes.key + sizes.value)
    sums = heads * ((sizes.key - 1) * window + (window - 1) * sizes.value)
    positions = sizes.key * window
    return [
        Term(f"{name}.attention", bits, products=products, sums=sums, others=counted * (3 * window - 1)),
        Term(
            f"{name}.attention.positions", bits, positions, positions, counted * positions,
            counted * ((sizes.key - 1) * window + window),
        ),
        Term(f"{name}.norms", bits, sums=2 * width, others=2 * 6 * width),  # and the two sums around the layer
        Term(f"{name}.relu", bits, others=sizes.ffn),
    ]  # fmt: skip


def counting_of(net: nn.Module, shares: Sequence[float], bits: int = 32, all_heads: bool = False) -> Counting:
    """Return the counting rules of a network from its tensors: their zeros, and the bits of quantized layers and
    inputs.

    `bits` are those of all other layers.
    """
    density, bits_of, quantizers = {}, {}, 0
    for name, module in net.named_modules():
        if isinstance(module, Quantized):
            bits_of[f"{name}.weight"] = module.bits[0]
            density[f"{name}.weight"] = _density(module.weight)
            quantizers += module.bits[1] is not None
    density |= {name: _density(value) for name, value in net.named_parameters()}
    sparse = {name: share for name, share in density.items() if share < 1}
    return Counting(bits, bits_of, sparse, bool(sparse), quantizers, tuple(shares), all_heads)


def _density(value: Tensor) -> float:
    return float((value != 0).sum()) / max(1, value.numel())


# ------------------------------------------------------------------------------------------------ the submission

SUBMITTED_CACHE, SUBMITTED_SHARES = 3000, (35479 / 245569, 11858 / 245569)  # of the words in WikiText-103's test split
_SPARSITY = {
    "embed.layers.0.weight": 0.165, "embed.layers.1.weight": 0.3, "embed.layers.2.weight": 0.3375,
    "embed.projections.0.weight": 0.4425, "softmax.projections.0.weight": 0.3375,
    "softmax.biases.1": 0.75, "softmax.biases.2": 0.75,
}  # fmt: skip
_LAYERS = {
    "attention.qkv": (0.3375, 0.4125, 0.3375, 0.4425, 0.4125, 0.4125, 0.4425, 0.3375),
    "attention.out": (0.4425, 0.6, 0.5325, 0.5775, 0.555, 0.5325, 0.6, 0.4425),
    "fc1": (0.3, 0.375, 0.4125, 0.4125, 0.4125, 0.4125, 0.375, 0.255),
    "fc2": (0.255, 0.375, 0.4725, 0.5025, 0.4425, 0.4125, 0.375, 0.3),
}


def submitted() -> Counting:
    """Return the rules of the best submission: 9 bits, 57 quantizers, the sparsities that its pruning aimed at."""
    sparsity = _SPARSITY | {
        f"layers.{number}.{name}.weight": share for name, row in _LAYERS.items() for number, share in enumerate(row)
    }
    density = {name: 1 - share for name, share in sparsity.items()}
    return Counting(9, {}, density, True, 57, SUBMITTED_SHARES)
