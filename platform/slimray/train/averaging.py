"""Averaged weights: an exponential moving average that is evaluated and shipped in place of the last weights.

The statistics of BatchNorm are averaged with the weights they belong to: averaged weights with the statistics of the
raw ones can be far from either. The average warms up (after n steps its decay is at most (1 + n) / (10 + n)), so that
starting weights do not linger in it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slimray.train.batchnorm import norm_state

LONG_AGO = 2**40  # step count assumed for averages from checkpoints that do not store one


class Ema:
    """An exponential moving average of the parameters of a network, and of this rank's BatchNorm statistics.

    `norms` is a vector in the layout of `norm_state`; merging those of several ranks is up to the caller.
    """

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in net.named_parameters()}
        self.norms = norm_state(net).clone()
        self.steps = torch.zeros((), dtype=torch.int64, device=next(net.parameters()).device)

    @torch.no_grad()
    def update(self, net: nn.Module, finite: Tensor | None = None) -> None:
        """Move the average towards the parameters and statistics of `net`; where the flag `finite` is False, nothing
        moves. The flag stays on the device.
        """
        finite = torch.ones_like(self.steps, dtype=torch.bool) if finite is None else finite
        self.steps += finite
        share = 1 - ((1 + self.steps).double() / (10 + self.steps)).clamp(max=self.decay)
        for name, value in net.named_parameters():
            self._move(self.average[name], value, share, finite)
        if len(self.norms):
            self._move(self.norms, norm_state(net), share, finite)

    @staticmethod
    def _move(average: Tensor, value: Tensor, share: Tensor, finite: Tensor) -> None:
        average.copy_(torch.where(finite, average.lerp(value, share.to(value.dtype)), average))

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return dict(self.average)

    def load(self, tensors: Mapping[str, Tensor], norms: Tensor, steps: int = LONG_AGO) -> None:
        """Load the averages from `tensors` and the averaged statistics `norms`, as they were after `steps` steps."""
        for name, value in tensors.items():
            self.average[name].copy_(value)
        self.norms.copy_(norms)
        self.steps.fill_(steps)

    @torch.no_grad()
    def copy_to(self, net: nn.Module) -> None:
        """Give `net` the averaged parameters."""
        for name, value in net.named_parameters():
            value.copy_(self.average[name])
