"""Averaged weights: an exponential moving average that is evaluated and shipped in place of the last weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """An exponential moving average of the parameters of a network; buffers are not averaged."""

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in net.named_parameters()}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Move the average towards the parameters of `net`."""
        for name, value in net.named_parameters():
            self.average[name].lerp_(value, 1 - self.decay)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return dict(self.average)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over averages of `tensors`."""
        for name, value in tensors.items():
            self.average[name].copy_(value)

    @torch.no_grad()
    def copy_to(self, net: nn.Module) -> None:
        """Give `net` the averaged parameters."""
        for name, value in net.named_parameters():
            value.copy_(self.average[name])
