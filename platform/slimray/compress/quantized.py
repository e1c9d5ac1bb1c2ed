"""Layers with few bits, as modules: `FakeQuantized` learns, `Quantized` holds whole numbers and is what a run stores.

Each stands in the place of a convolution or linear layer and rounds its own input, so that any module, also one that no
tracer reads, is quantized layer by layer; both compute the same floats in eval mode, and the same bits in every
process. `Quantized` keeps its weights as `codes`, packed to their bits, with `scale` per channel or for the tensor, or
with a `book` of values (k-means). Surprising: the input of a shifted layer (TSM) is rounded behind the shift, which is
the same as in front of it: the shift copies, and fills in zeros, which every grid here holds. So the tensors around a
shift have one scale.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimray.compress import bitstreams
from slimray.compress import fake_quant as fq
from slimray.compress.fold import LAYERS, fold, replace
from slimray.spec import UserError

Bits = tuple[int, int | None]  # of the weights, of the inputs (None: they stay floats)
FORMS = ("whole", "trained")
TABLES = (nn.Embedding,)  # whose rows may be whole numbers too


@dataclass(frozen=True)
class Geometry:
    """How a convolution or linear layer computes, without its numbers: `shape` is that of its weights."""

    shape: tuple[int, ...]
    options: dict[str, Any]
    padding_mode: str
    padding: tuple[int, ...]

    @classmethod
    def of(cls, layer: nn.Module) -> "Geometry":
        """The geometry of one of LAYERS."""
        shape = tuple(layer.weight.shape)  # type: ignore[union-attr, arg-type]
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return cls(shape, {}, "zeros", ())
        padding = layer.padding if layer.padding_mode == "zeros" else 0
        options = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups, "padding": padding}
        return cls(shape, options, layer.padding_mode, tuple(layer._reversed_padding_repeated_twice))

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output for `x`, with `weight` in its shape."""
        if len(self.shape) == 2:
            return functional.linear(x, weight, bias)
        if self.padding_mode != "zeros":
            x = functional.pad(x, self.padding, mode=self.padding_mode)
        run = (functional.conv1d, functional.conv2d, functional.conv3d)[len(self.shape) - 3]
        return run(x, weight, bias, **self.options)


class _Layer(nn.Module):
    """What both forms share."""

    input_range: Tensor

    def __init__(self, geometry: Geometry, bias: Tensor | None, bits: Bits, scheme: fq.Scheme):
        super().__init__()
        self.geometry, self.bits = geometry, bits
        self.scheme: fq.Scheme = scheme
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    @property
    def rows(self) -> int:
        """The number of ranges of the weights: one per output channel, or one."""
        return self.geometry.shape[0] if self.scheme == "int8" else 1

    def rounded(self, x: Tensor) -> Tensor:
        """The input as the layer takes it."""
        bits = self.bits[1]
        return x if bits is None else fq.round_inputs(x, self.input_range, bits, self.scheme)

    def extra_repr(self) -> str:
        weights, inputs = self.bits
        return f"{list(self.geometry.shape)}, {self.scheme}, weights {weights} bits, inputs {inputs or 32}"


class FakeQuantized(_Layer):
    """A layer whose float weights and inputs are rounded in every pass, with gradients straight through.

    Weights of the scheme `int8` have the range that they have; those of `linear` the one found before training. The
    range of the input is learned.
    """

    weight_range: Tensor

    def __init__(self, geometry: Geometry, bias: Tensor | None, bits: Bits, scheme: fq.Scheme, weight: Tensor):
        super().__init__(geometry, bias, bits, scheme)
        self.weight = nn.Parameter(weight.detach())
        self.input_range = nn.Parameter(torch.zeros(2, device=weight.device))
        self.register_buffer("weight_range", torch.zeros(self.rows, device=weight.device))

    def span(self) -> Tensor:
        """The range of the weights, `[out]` or `[1]`."""
        return fq.weight_range(self.weight, self.bits[0], "int8") if self.scheme == "int8" else self.weight_range

    def forward(self, x: Tensor) -> Tensor:
        weight = fq.round_weights(self.weight, self.span(), self.bits[0])
        return self.geometry.compute(self.rounded(x), weight, self.bias)


class Quantized(_Layer):
    """A layer whose weights are whole numbers of few bits; inference only.

    State: `codes` uint8, the numbers packed (`fq.pack`) from the smallest one, `scale` `[out]` or `[1]` or `book`
    `[2^bits]`, `input_range` `[2]`, `bias`. The float weights are made of them when they are loaded.
    """

    codes: Tensor
    weight: Tensor

    def __init__(self, geometry: Geometry, bias: Tensor | None, bits: Bits, scheme: fq.Scheme, device: torch.device):
        super().__init__(geometry, bias, bits, scheme)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.num_weights = math.prod(geometry.shape)
        self.table = "book" if scheme == "kmeans" else "scale"
        packed = torch.zeros(bitstreams.packed_bytes(self.num_weights, bits[0]), dtype=torch.uint8, device=device)
        self.register_buffer("codes", packed)
        entries = 2 ** bits[0] if scheme == "kmeans" else self.rows
        self.register_buffer(self.table, torch.zeros(entries, device=device))
        self.register_buffer("input_range", torch.zeros(2, device=device))
        self.register_buffer("weight", torch.zeros(geometry.shape, device=device), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: module.restore())

    @torch.no_grad()
    def store(self, weight: Tensor, span: Tensor | None) -> None:
        """Take float weights: rounded within `span`, or gathered into a book without it."""
        if span is None:
            table, codes = fq.codebook(weight, self.bits[0])
        else:
            codes = fq.whole_weights(weight, span, self.bits[0]) + 2 ** (self.bits[0] - 1) - 1
            table = fq.weight_scale(span, self.bits[0])
        self.get_buffer(self.table).copy_(table)
        self.codes.copy_(fq.pack(codes, self.bits[0]))
        self.restore()

    def whole(self) -> Tensor:
        """The weights as whole numbers in the layer's shape, int64: multiples of `scale`, or places in `book`."""
        codes = fq.unpack(self.codes, self.bits[0], self.num_weights).view(self.geometry.shape)
        return codes if self.table == "book" else codes - (2 ** (self.bits[0] - 1) - 1)

    @torch.no_grad()
    def restore(self) -> None:
        """Make the float weights of the whole numbers."""
        if self.codes.is_meta:
            return
        table = self.get_buffer(self.table)
        if self.table == "book":
            self.weight.copy_(table[self.whole()])
        else:
            self.weight.copy_(self.whole() * table.view(-1, *[1] * (len(self.geometry.shape) - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.geometry.compute(self.rounded(x), self.weight, self.bias)


class QuantizedTable(Quantized):
    """A table of embeddings whose rows are whole numbers: tokens int `[...]` to `[..., C]`.

    Where it is the output as well, that takes its `weight`.
    """

    @property
    def embedding_dim(self) -> int:
        """Numbers in a row."""
        return self.geometry.shape[1]

    @property
    def num_embeddings(self) -> int:
        """Rows."""
        return self.geometry.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return functional.embedding(x, self.weight)


def rebuild(net: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Return `net` with the layers of a record of the step `quantize` in their form, without values, in place.

    UserError for a record of a version that this one does not know, or of bits that there are not.
    """
    scheme, form = record["scheme"], record["form"]
    if scheme not in ("int8", "linear", "kmeans") or form not in FORMS:
        raise UserError(f"quantize: unknown scheme {scheme!r} or form {form!r}: written by a later version of slimray?")
    if scheme == "kmeans" and form == "trained":
        raise UserError("quantize: the scheme kmeans has no trained form")
    fold(net, record["folded"])
    for name, bits in record["layers"].items():
        layer = net.get_submodule(name)
        if type(layer) not in (*LAYERS, *TABLES):
            raise TypeError(f"{name} is no convolution, linear layer or table of embeddings")
        replace(net, layer, make_layer(layer, check_bits(name, bits, scheme), scheme, form))
    return net


def make_layer(layer: nn.Module, bits: Bits, scheme: fq.Scheme, form: str) -> "FakeQuantized | Quantized":
    """The stand-in for `layer` in `form`, ranges and whole numbers not set."""
    geometry, weight, bias = Geometry.of(layer), layer.weight, getattr(layer, "bias", None)
    made: FakeQuantized | Quantized
    if form == "whole":
        kind = QuantizedTable if isinstance(layer, TABLES) else Quantized
        made = kind(geometry, bias, bits, scheme, weight.device)  # type: ignore[arg-type, union-attr]
    else:
        made = FakeQuantized(geometry, bias, bits, scheme, weight)  # type: ignore[arg-type]
    return made.train(layer.training)


def check_bits(name: str, bits: Any, scheme: fq.Scheme) -> Bits:
    """`bits` of the layer `name` as a pair; UserError out of range (2 to 8, k-means 1 to 8; inputs 2 to 8 or None)."""
    low = 1 if scheme == "kmeans" else 2
    pair: tuple[Any, ...] = tuple(bits) if isinstance(bits, list | tuple) else ()
    fits = len(pair) == 2 and all(isinstance(one, int) and not isinstance(one, bool) for one in pair if one is not None)
    if not fits or pair[0] is None or not low <= pair[0] <= 8 or (pair[1] is not None and not 2 <= pair[1] <= 8):
        raise UserError(f"quantize: {name}: bits must be [weights {low} to 8, inputs 2 to 8 or null] (got {bits!r})")
    return pair[0], None if scheme == "kmeans" else pair[1]


def to_whole(net: nn.Module) -> nn.Module:
    """Turn every `FakeQuantized` layer of `net` into the `Quantized` one that computes the same; in place."""
    for layer in [m for m in net.modules() if isinstance(m, FakeQuantized)]:
        new = Quantized(layer.geometry, layer.bias, layer.bits, layer.scheme, layer.weight.device)
        new.input_range.copy_(layer.input_range.detach())
        new.store(layer.weight.detach(), layer.span().detach())
        replace(net, layer, new.train(layer.training))
    return net


def with_float_inputs(net: nn.Module) -> nn.Module:
    """Let the `Quantized` layers of `net` take inputs as they are, in place: for what finds ranges of its own."""
    for layer in net.modules():
        if isinstance(layer, Quantized):
            layer.bits = (layer.bits[0], None)
    return net


def float_layers(net: nn.Module) -> list[str]:
    """The layers that a policy left float, by name; none of a network in which no layer is `Quantized`."""
    if not any(isinstance(module, Quantized) for module in net.modules()):
        return []
    return [name for name, module in net.named_modules() if type(module) in LAYERS]


def rounds_inputs(net: nn.Module) -> bool:
    """Whether a layer of `net` rounds its input, so that a last bit may decide which way."""
    return any(isinstance(layer, Quantized) and layer.bits[1] is not None for layer in net.modules())
