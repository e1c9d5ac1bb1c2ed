"""Training that preserves compression: pruned weights stay zero, shared weights stay equal.

A wrapper around another method, plain or distilled, with the same steps, except that the gradient is masked before it
is clipped and the constraint is restored after the step. Momentum follows the masked gradient, so it is masked too, and
weight decay acts only on the weights kept. The masks are derived from the weights that training starts from.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from slimray.compress import sharing, sparsity
from slimray.train.methods.method import Method, Replica, Setup


@dataclass(frozen=True)
class Constrained:
    """Steps of `method` on a network whose zeros stay zero. `dropout`: lower dropout with the density of its layer.

    In the layers `shared`, equal weights are one centroid, whose gradient is the sum of theirs (arXiv 1510.00149).
    """

    method: Method
    dropout: bool = True
    shared: tuple[str, ...] = ()

    def replica(self, net: nn.Module, build: Callable[[], nn.Module], setup: Setup) -> Replica:
        """Build the replica of `method` around `net`, which already has its starting weights."""
        if self.dropout:
            sparsity.scale_dropout(net)
        replica = self.method.replica(net, build, setup)
        tied = sharing.Tied(replica.net, self.shared) if self.shared else None
        replica.constraint = tied or sparsity.Masks(replica.net)
        return replica

    def held(self, epoch: int) -> tuple[int, int]:
        """Hold out the same rows as `method`."""
        return self.method.held(epoch)
