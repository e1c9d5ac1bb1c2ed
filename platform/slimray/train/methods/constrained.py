"""Training that keeps what compression made of the weights: pruned ones stay zero, shared ones stay equal.

A wrapper around another method, plain or distilled: its steps are theirs, but the gradient is masked before it is
clipped, and the weights are put right after the step. Momentum follows the masked gradient, so it is masked too, and
weight decay acts on what is kept alone. The masks are read off the weights that training starts from.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from slimray.compress import sharing, sparsity
from slimray.train.methods.method import Method, Replica, Setup


@dataclass(frozen=True)
class Constrained:
    """The steps of `method` on a network whose zeros stay zero. `dropout`: lower it with the density of its layer.

    In the layers `shared` equal weights are one centroid, whose gradient is the sum of theirs (arXiv 1510.00149).
    """

    method: Method
    dropout: bool = True
    shared: tuple[str, ...] = ()

    def replica(self, net: nn.Module, build: Callable[[], nn.Module], setup: Setup) -> Replica:
        """Build the replica of `method` around `net`, which has its starting weights already."""
        if self.dropout:
            sparsity.scale_dropout(net)
        replica = self.method.replica(net, build, setup)
        tied = sharing.Tied(replica.net, self.shared) if self.shared else None
        replica.constraint = tied or sparsity.Masks(replica.net)
        return replica

    def held(self, epoch: int) -> tuple[int, int]:
        """Return what `method` holds out."""
        return self.method.held(epoch)
