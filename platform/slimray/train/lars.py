"""LARS: SGD whose step for each weight is a share of the weight itself ("Large Batch Training of Convolutional
Networks", You et al., arXiv 1708.03888), for global batches beyond some 8,000 samples.

The rate of a tensor is lr x trust x |w| / (|g| + decay x |w|), also where decay is 0. Groups with `adapt` False
(biases and BatchNorm, whose norms carry no information) learn at `lr` as with SGD.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

TRUST = 0.001  # eta of the paper


class Lars(torch.optim.Optimizer):
    """SGD with momentum and layer-wise rates; groups may have `lr`, `momentum`, `weight_decay`, `trust`, `adapt`."""

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9, trust: float = TRUST):
        defaults = {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0, "adapt": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step. Parameters without a gradient stay; all of them stay if the flag `found_inf` is set, not 0."""
        loss = None if closure is None else closure()
        found: Tensor | None = getattr(self, "found_inf", None)  # as in torch's own optimizers; stays on the device
        for group in self.param_groups:
            decay = group["weight_decay"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                step, state = weight.grad + decay * weight if decay else weight.grad, self.state[weight]
                if group["adapt"]:
                    size, slope = weight.norm(), weight.grad.norm()
                    share = group["trust"] * size / (slope + decay * size)
                    known = (size > 0) & (slope > 0)
                    step = step * torch.where(known, share, torch.ones_like(share))
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"]
                if found is None:
                    weight.sub_(buffer.mul_(group["momentum"]).add_(step, alpha=group["lr"]))
                else:
                    moved = buffer.mul(group["momentum"]).add_(step, alpha=group["lr"])
                    buffer.copy_(torch.where(found == 0, moved, buffer))
                    weight.sub_(torch.where(found == 0, moved, 0.0))
        return loss
