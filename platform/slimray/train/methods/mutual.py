"""Deep mutual learning (arXiv 1706.00384): two networks of the same form learn from the labels and from each other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimray.tasks.task import Outputs
from slimray.train import learn
from slimray.train.methods.method import Setup
from slimray.train.methods.plain import PlainReplica


@dataclass(frozen=True)
class Mutual:
    """Two networks; `weight` is that of the other's outputs, besides the labels. The first network is kept."""

    weight: float = 1.0

    def replica(self, net: nn.Module, build: Callable[[], nn.Module], setup: Setup) -> "MutualReplica":
        """Build the replica of one rank around `net` and a second network."""
        return MutualReplica(Pair(net, build()), self.weight, setup)

    def held(self, epoch: int) -> tuple[int, int]:
        """Hold nothing out."""
        return 0, 0


class Pair(nn.Module):
    """Two networks of the same form that learn from each other: outputs `[B, 2, classes, ...]`. The first is kept."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.first(x), self.second(x)], 1)


class MutualReplica(PlainReplica):
    """A replica of two networks."""

    def __init__(self, net: Pair, weight: float, setup: Setup):
        self.weight = weight
        super().__init__(net, setup)

    def _sample_losses(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return the losses `[n]` of both networks, outputs `[n, 2, C, ...]`: for each, its own loss plus weight x
        KL(other || own), with the other as a constant."""
        assert isinstance(outputs, Tensor)
        total, weights = torch.zeros(len(labels), device=outputs.device), self.weight * self._weights(labels)
        for own, other in ((0, 1), (1, 0)):
            logits, given = outputs[:, own], outputs[:, other].detach()
            total = total + super()._sample_losses(logits, labels) + weights * learn.divergences(given, logits)
        return total

    def averaged(self) -> nn.Module:
        """Return the first network of `Replica.averaged`. A collective."""
        return super().averaged().first  # type: ignore[return-value]
