"""Quantization-aware training: every pass rounds weights and inputs, gradients pass straight through the rounding.

A wrapper around another method, plain, distilled or constrained, for a network whose layers are `FakeQuantized`
(compress/quantized.py; arXiv 1712.05877). The ranges of inputs are learned (as in HAQ, 1811.08886, with the gradient
scaled as in LSQ, 1902.08153) or stay as calibrated; those of int8 weights follow the weights. Surprising: BatchNorm is
already folded into the weights, so the learning rate must be lower than the one the network was trained with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from slimray.compress.fake_quant import SMALLEST
from slimray.compress.quantized import FakeQuantized
from slimray.train.methods.method import Constraint, Method, Replica, Setup

RangeRule = Literal["learned", "frozen"]


@dataclass(frozen=True)
class QuantizationAware:
    """Steps of `method` on a network that rounds; `ranges`: input ranges are learned or frozen."""

    method: Method
    ranges: RangeRule = "learned"

    def replica(self, net: nn.Module, build: Callable[[], nn.Module], setup: Setup) -> Replica:
        """Build the replica of `method` around `net`."""
        for layer in _rounding(net):
            layer.input_range.requires_grad_(self.ranges == "learned")
        replica = self.method.replica(net, build, setup)
        if self.ranges == "learned":
            replica.constraint = Ranges(replica.net, replica.constraint)
        return replica

    def held(self, epoch: int) -> tuple[int, int]:
        """Hold out the same rows as `method`."""
        return self.method.held(epoch)


class Ranges:
    """Constraint that keeps learned ranges valid: they include 0, and `linear` ones stay one-sided or symmetric. Wraps
    `inner`, if any."""

    def __init__(self, net: nn.Module, inner: Constraint | None):
        self.layers, self.inner = _rounding(net), inner
        self.half = [bool(layer.input_range[0] >= 0) for layer in self.layers]

    def before_clipping(self) -> None:
        """Do what `inner` does."""
        if self.inner:
            self.inner.before_clipping()

    def before_step(self) -> None:
        """Do what `inner` does."""
        if self.inner:
            self.inner.before_step()

    @torch.no_grad()
    def after_step(self) -> None:
        """Make the ranges valid again."""
        if self.inner:
            self.inner.after_step()
        for layer, half in zip(self.layers, self.half, strict=True):
            low, high = layer.input_range
            if layer.scheme == "linear":
                largest = (high if half else (high - low) / 2).clamp(min=SMALLEST)
                layer.input_range.copy_(torch.stack([0 * largest if half else -largest, largest]))
            else:
                low, high = low.clamp(max=0), high.clamp(min=0)
                layer.input_range.copy_(torch.stack([low, torch.maximum(high, low + SMALLEST)]))


def _rounding(net: nn.Module) -> list[FakeQuantized]:
    return [module for module in net.modules() if isinstance(module, FakeQuantized)]
