"""Layers with few bits, as modules: `FakeQuantized` is trained, `Quantized` holds integers and is stored in a run.

Each replaces a convolution or linear layer and rounds its own input, so that any module, even one that cannot be
traced, is quantized layer by layer; both compute the same floats in eval mode, and the same bits in every process.
`Quantized` stores its weights as `codes`, packed to their bits, with a `scale` per channel or tensor, or with a `book`
of values (k-means). Surprising: the input of a shifted layer (TSM) is rounded after the shift, which is equivalent to
rounding before it, because the shift copies values and fills in zeros, which every grid here contains. So the tensors
around a shift share one scale.
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

Bits = tuple[int, int | None]  # of the weights, of the inputs (None: they stay float)
FORMS = ("whole", "trained")
TABLES = (nn.Embedding,)  # tables whose rows can be quantized too


@dataclass(frozen=True)
class Geometry:
    """Options of a convolution or linear layer without its values; `shape` is that of its weights."""

    shape: tuple[int, ...]
    options: dict[str, Any]
    padding_mode: str
    padding: tuple[int, ...]

    @classmethod
    def of(cls, layer: nn.Module) -> "Geometry":
        """Return the geometry of one of LAYERS."""
        shape = tuple(layer.weight.shape)  # type: ignore[union-attr, arg-type]
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return cls(shape, {}, "zeros", ())
        padding = layer.padding if layer.padding_mode == "zeros" else 0
        options = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups, "padding": padding}
        return cls(shape, options, layer.padding_mode, tuple(layer._reversed_padding_repeated_twice))

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output for `x` with these weights."""
        if len(self.shape) == 2:
            return functional.linear(x, weight, bias)
        if self.padding_mode != "zeros":
            x = functional.pad(x, self.padding, mode=self.padding_mode)
        run = (functional.conv1d, functional.conv2d, functional.conv3d)[len(self.shape) - 3]
        return run(x, weight, bias, **self.options)


class _Layer(nn.Module):
    """Common part of both forms."""

    input_range: Tensor

    def __init__(self, geometry: Geometry, bias: Tensor | None, bits: Bits, scheme: fq.Scheme):
        super().__init__()
        self.geometry, self.bits = geometry, bits
        self.scheme: fq.Scheme = scheme
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    @property
    def rows(self) -> int:
        """Number of weight ranges: one per output channel, or one in total."""
        return self.geometry.shape[0] if self.scheme == "int8" else 1

    def rounded(self, x: Tensor) -> Tensor:
        """Return the input, rounded unless it stays float."""
        bits = self.bits[1]
        return x if bits is None else fq.round_inputs(x, self.input_range, bits, self.scheme)

    def extra_repr(self) -> str:
        weights, inputs = self.bits
        return f"{list(self.geometry.shape)}, {self.scheme}, weights {weights} bits, inputs {inputs or 32}"


class FakeQuantized(_Layer):
    """A layer whose float weights and inputs are rounded in every pass, with straight-through gradients.

    With the scheme `int8` the weight range follows the weights; with `linear` it is the one found before training. The
    input range is learned.
    """

    weight_range: Tensor

    def __init__(self, geometry: Geometry, bias: Tensor | None, bits: Bits, scheme: fq.Scheme, weight: Tensor):
        super().__init__(geometry, bias, bits, scheme)
        self.weight = nn.Parameter(weight.detach())
        self.input_range = nn.Parameter(torch.zeros(2, device=weight.device))
        self.register_buffer("weight_range", torch.zeros(self.rows, device=weight.device))

    def span(self) -> Tensor:
        """Return the range of the weights, `[out]` or `[1]`."""
        return fq.weight_range(self.weight, self.bits[0], "int8") if self.scheme == "int8" else self.weight_range

    def forward(self, x: Tensor) -> Tensor:
        weight = fq.round_weights(self.weight, self.span(), self.bits[0])
        return self.geometry.compute(self.rounded(x), weight, self.bias)


class Quantized(_Layer):
    """A layer whose weights are integers of few bits; inference only.

    State: `codes` uint8, the packed integers (`fq.pack`) as offsets from the smallest, `scale` `[out]` or `[1]`, or
    `book` `[2^bits]`, `input_range` `[2]`, `bias`. The float weights are computed from them on loading.
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
        """Store float weights, rounded within `span`, or as a codebook if `span` is None."""
        if span is None:
            table, codes = fq.codebook(weight, self.bits[0])
        else:
            codes = fq.whole_weights(weight, span, self.bits[0]) + 2 ** (self.bits[0] - 1) - 1
            table = fq.weight_scale(span, self.bits[0])
        self.get_buffer(self.table).copy_(table)
        self.codes.copy_(fq.pack(codes, self.bits[0]))
        self.restore()

    def whole(self) -> Tensor:
        """Return the weights as int64 in the layer's shape: multiples of `scale`, or indices into `book`."""
        codes = fq.unpack(self.codes, self.bits[0], self.num_weights).view(self.geometry.shape)
        return codes if self.table == "book" else codes - (2 ** (self.bits[0] - 1) - 1)

    @torch.no_grad()
    def restore(self) -> None:
        """Compute the float weights from the integers."""
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
    """An embedding table whose rows are integers: tokens int `[...]` to `[..., C]`.

    An output layer that is tied to it uses its `weight`.
    """

    @property
    def embedding_dim(self) -> int:
        """Length of a row."""
        return self.geometry.shape[1]

    @property
    def num_embeddings(self) -> int:
        """Number of rows."""
        return self.geometry.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return functional.embedding(x, self.weight)


def rebuild(net: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Replace the layers of `net` in place by those of a record of the step `quantize`, without values, and return it.

    Raises UserError for a record with an unknown scheme or form, or bits out of range.
    """
    scheme, form = record["scheme"], record["form"]
    if scheme not in ("int8", "linear", "kmeans") or form not in FORMS:
        raise UserError(f"quantize: unknown scheme {scheme!r} or form {form!r}, perhaps of a later version of slimray")
    if scheme == "kmeans" and form == "trained":
        raise UserError("quantize: the scheme kmeans has no trained form")
    fold(net, record["folded"])
    for name, bits in record["layers"].items():
        layer = net.get_submodule(name)
        if type(layer) not in (*LAYERS, *TABLES):
            raise TypeError(f"{name} is not a convolution, linear layer or embedding table")
        replace(net, layer, make_layer(layer, check_bits(name, bits, scheme), scheme, form))
    return net


def make_layer(layer: nn.Module, bits: Bits, scheme: fq.Scheme, form: str) -> "FakeQuantized | Quantized":
    """Return the replacement of `layer` in `form`; ranges and integers are not set."""
    geometry, weight, bias = Geometry.of(layer), layer.weight, getattr(layer, "bias", None)
    made: FakeQuantized | Quantized
    if form == "whole":
        kind = QuantizedTable if isinstance(layer, TABLES) else Quantized
        made = kind(geometry, bias, bits, scheme, weight.device)  # type: ignore[arg-type, union-attr]
    else:
        made = FakeQuantized(geometry, bias, bits, scheme, weight)  # type: ignore[arg-type]
    return made.train(layer.training)


def check_bits(name: str, bits: Any, scheme: fq.Scheme) -> Bits:
    """Return `bits` of the layer `name` as a pair; UserError unless weights are 2 to 8 (k-means 1 to 8) and inputs 2 to
    8 or None."""
    low = 1 if scheme == "kmeans" else 2
    pair: tuple[Any, ...] = tuple(bits) if isinstance(bits, list | tuple) else ()
    fits = len(pair) == 2 and all(isinstance(one, int) and not isinstance(one, bool) for one in pair if one is not None)
    if not fits or pair[0] is None or not low <= pair[0] <= 8 or (pair[1] is not None and not 2 <= pair[1] <= 8):
        raise UserError(f"quantize: {name}: bits must be [weights {low} to 8, inputs 2 to 8 or null] (got {bits!r})")
    return pair[0], None if scheme == "kmeans" else pair[1]


def to_whole(net: nn.Module) -> nn.Module:
    """Replace every `FakeQuantized` layer of `net` in place by a `Quantized` one that computes the same."""
    for layer in [m for m in net.modules() if isinstance(m, FakeQuantized)]:
        new = Quantized(layer.geometry, layer.bias, layer.bits, layer.scheme, layer.weight.device)
        new.input_range.copy_(layer.input_range.detach())
        new.store(layer.weight.detach(), layer.span().detach())
        replace(net, layer, new.train(layer.training))
    return net


def with_float_inputs(net: nn.Module) -> nn.Module:
    """Make the `Quantized` layers of `net` take float inputs, in place, for quantizers that find ranges themselves."""
    for layer in net.modules():
        if isinstance(layer, Quantized):
            layer.bits = (layer.bits[0], None)
    return net


def float_layers(net: nn.Module) -> list[str]:
    """Return the names of the layers that a policy left float; [] if no layer of the network is `Quantized`."""
    if not any(isinstance(module, Quantized) for module in net.modules()):
        return []
    return [name for name, module in net.named_modules() if type(module) in LAYERS]


def rounds_inputs(net: nn.Module) -> bool:
    """Return True if a layer of `net` rounds its input, so that the last bit may change the result."""
    return any(isinstance(layer, Quantized) and layer.bits[1] is not None for layer in net.modules())
