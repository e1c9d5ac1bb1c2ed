"""Training that keeps what compression made of the weights: pruned ones stay zero (arXiv 1506.02626).

A wrapper around another method, plain or distilled: its steps are theirs, but the gradient is masked before it is
clipped, and the weights are put right after the step. Momentum follows the masked gradient, so it is masked too, and
weight decay acts on what is kept alone. The masks are read off the weights that training starts from.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from slimray.compress import sparsity
from slimray.train.methods.method import Method, Replica, Setup


@dataclass(frozen=True)
class Constrained:
    """The steps of `method` on a network whose zeros stay zero. `dropout`: lower it with the density of its layer."""

    method: Method
    dropout: bool = True

    def replica(self, net: nn.Module, build: Callable[[], nn.Module], setup: Setup) -> Replica:
        """Build the replica of `method` around `net`, which has its starting weights already."""
        if self.dropout:
            sparsity.scale_dropout(net)
        replica = self.method.replica(net, build, setup)
        replica.constraint = sparsity.Masks(replica.net)
        return replica

    def held(self, epoch: int) -> tuple[int, int]:
        """Return what `method` holds out."""
        return self.method.held(epoch)
