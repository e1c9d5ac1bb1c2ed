"""Rounding to few bits: ranges, scales, rounding with a straight-through gradient, codebooks, bit packing.

There are three schemes. `int8` is that of edge runtimes (arXiv 1712.05877): weights symmetric per output channel,
inputs from `low` to `high` with an integer zero point, so that 0 stays 0. `linear` is HAQ's (1811.08886): everything
symmetric per tensor, non-negative inputs unsigned from 0, ranges below 5 bits clipped where the divergence of the
cumulative histogram is smallest. `kmeans` is Deep Compression's, also used by HAQ: a codebook of 2^bits values, inputs
unchanged. The first two divide by the scale and round half to even, as ONNX does. Surprising: `linear` refuses 1 bit,
because its scale would divide by zero.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from slimray.compress import bitstreams, codebooks

Scheme = Literal["int8", "linear", "kmeans"]
MAX_ACTIVATION = 6.0  # largest range of an input in the scheme `linear`
KL_BITS = 5  # below this number of bits, the range is clipped
SMALLEST = 1e-12  # range of an all-zero tensor


# ------------------------------------------------------------------------------------------------------- ranges


def kl_threshold(values: Tensor, levels: int) -> float:
    """Return the range that `levels` steps of |values| should span, where clipping least changes the cumulative
    histogram.

    The number of bins is the root of the number of values. The share of values up to each bin, set to 1 from a bin on
    and interpolated linearly between `levels` points, is compared with the unclipped one by the sum of
    (p - q) log2(p / q). With too few bins, the result is the largest value. As in HAQ, the range may exceed the largest
    value by half a bin.
    """
    sizes = values.detach().abs().flatten().float().cpu().numpy()
    largest = sizes.max()
    counts, _ = np.histogram(sizes, bins="sqrt")
    bins = len(counts)
    share = np.cumsum(counts) / len(sizes)
    best, place = math.inf, bins
    for end in range(levels + 1, bins + 1):
        cut = np.concatenate([share[: end - 1], [1.0]])
        points = np.interp(np.linspace(0, end - 1, levels), np.arange(end), cut)
        drawn = np.ones(bins)
        drawn[:end] = np.interp(np.linspace(0, levels - 1, end), np.arange(levels), points)
        cost = float(((share - drawn) * np.log2(share / drawn)).sum())
        if cost < best:
            best, place = cost, end
    return float(np.float32(place + 0.5) * (largest / np.float32(bins)) if best < math.inf else largest)


def weight_range(weight: Tensor, bits: int, scheme: Scheme) -> Tensor:
    """Return the range of a weight: its largest absolute values per output channel `[out]` (`int8`), or one `[1]`
    (`linear`)."""
    if scheme == "int8":
        return weight.detach().abs().flatten(1).amax(1).clamp(min=SMALLEST)
    largest = weight.detach().abs().max()
    if bits < KL_BITS:
        largest = largest.new_tensor(kl_threshold(weight, 2 ** (bits - 1)))
    return largest.clamp(min=SMALLEST).reshape(1)


def input_range(values: Tensor, bits: int, scheme: Scheme, half: bool | None = None) -> Tensor:
    """Return the range of a layer's inputs, `[2]`: from `low` <= 0 to `high` >= 0.

    `linear`: unsigned (low = 0) if nothing is negative (or `half` is True), otherwise symmetric (-r, r).
    """
    values = values.detach()
    low, high = float(values.min().clamp(max=0)), float(values.max().clamp(min=0))
    if scheme == "linear":
        half = low >= 0 if half is None else half
        largest = min(MAX_ACTIVATION, float(values.abs().max()))
        if bits < KL_BITS:
            largest = min(largest, kl_threshold(values, 2 ** (bits - 1 if half else bits - 2)))
        low, high = (0.0 if half else -largest), largest
    if high - low < SMALLEST:
        high = low + SMALLEST
    return torch.tensor([low, high])


# ----------------------------------------------------------------------------------------------------- rounding


def weight_scale(span: Tensor, bits: int) -> Tensor:
    """Return the scale of weights within +-`span` in `bits` (at least 2): integers up to 2^(bits-1) - 1."""
    return span / (2 ** (bits - 1) - 1)


def whole_weights(weight: Tensor, span: Tensor, bits: int) -> Tensor:
    """Return the integers, as floats, that represent `weight` `[out, ...]`; `span` is `[out]` or `[1]`."""
    span = _per_channel(span, weight)
    return torch.round(torch.clamp(weight, -span, span) / weight_scale(span, bits))


def round_weights(weight: Tensor, span: Tensor, bits: int) -> Tensor:
    """Return `weight` `[out, ...]` rounded to `bits`; values beyond +-`span` get no gradient, the others all of it."""
    return _StraightThrough.apply(weight, _per_channel(span, weight), bits)  # type: ignore[no-any-return]


def round_inputs(x: Tensor, span: Tensor, bits: int, scheme: Scheme) -> Tensor:
    """Return `x` rounded to `bits` within `span` `[2]` (low, high); gradients of values beyond it go to the bounds.

    The gradient of a bound is divided by the root of the number of values times levels (arXiv 1902.08153).
    """
    if torch.is_grad_enabled() and (x.requires_grad or span.requires_grad):
        return _StraightThroughInputs.apply(x, span, bits, scheme)  # type: ignore[no-any-return]
    return _on_grid(x, span, bits, scheme)


def input_grid(span: Tensor, bits: int, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of inputs within `span` `[2]` in `bits`; with `int8` the integers start at 0."""
    low, high = span[0], span[1]
    if scheme == "linear":
        return high / torch.where(low < 0, 2.0 ** (bits - 1) - 1, 2.0**bits - 1), torch.zeros_like(low)
    scale = (high - low).clamp(min=SMALLEST) / (2**bits - 1)
    return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)


def _on_grid(x: Tensor, span: Tensor, bits: int, scheme: Scheme) -> Tensor:
    scale, zero = input_grid(span, bits, scheme)
    if scheme == "linear":
        return torch.round(torch.minimum(torch.maximum(x, span[0]), span[1]) / scale) * scale
    return (torch.clamp(torch.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def _per_channel(span: Tensor, weight: Tensor) -> Tensor:
    return span.view(-1, *[1] * (weight.ndim - 1))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, span: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(weight, span)
        return torch.round(torch.clamp(weight, -span, span) / weight_scale(span, bits)) * weight_scale(span, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, span = ctx.saved_tensors
        return grads[0] * (weight.abs() <= span), None, None


class _StraightThroughInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, span: Tensor, bits: int, scheme: Scheme) -> Tensor:
        ctx.save_for_backward(x, span)
        ctx.scale = 1 / math.sqrt(max(1, x.numel()) * (2**bits - 1))
        return _on_grid(x, span, bits, scheme)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x, span), grad = ctx.saved_tensors, grads[0]
        below, above = x < span[0], x > span[1]
        bounds = torch.stack([(grad * below).sum(), (grad * above).sum()]) * ctx.scale
        return grad * ~(below | above), bounds, None, None


# --------------------------------------------------------------------------------------------------- codebooks


def codebook(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the 2^bits values that represent `weight` best, ascending `[k]`, and the index of each weight's value,
    int64.

    The codebook has this length even if there are fewer distinct weights.
    """
    values = weight.numpy(force=True)
    book = codebooks.kmeans(values, 2**bits)
    codes = torch.from_numpy(codebooks.nearest(values, book))
    return torch.from_numpy(book).to(weight), codes.to(weight.device)


# ----------------------------------------------------------------------------------------------------- packing


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return integers 0 to 2^bits - 1 packed as by `bitstreams.pack`: uint8 `[ceil(n * bits / 8)]`."""
    data = bitstreams.pack(codes.flatten().numpy(force=True), bits)
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).to(codes.device)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the `count` integers of `pack`, int64; ValueError if the number of bytes does not match."""
    values = bitstreams.unpack(packed.numpy(force=True).tobytes(), bits, count)
    return torch.from_numpy(values.astype(np.int64)).to(packed.device)
