"""The network that training evaluates and ships: averaged weights, and merged or recomputed BatchNorm statistics."""

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn

from slimray.data.pipeline import Batch
from slimray.spec import RunFailed
from slimray.tasks.network import Input, to_input
from slimray.train import batchnorm
from slimray.train.methods.method import Replica
from slimray.train.ranks import Ranks


class Shown:
    """Builds the network to evaluate and ship from a replica. `norms` `[K]` are recomputed statistics, or None."""

    def __init__(self, replica: Replica, ranks: Ranks, pixels: Input):
        self.replica, self.ranks, self.pixels = replica, ranks, pixels
        self.norms: Tensor | None = None
        self.sums: Tensor | None = None  # sums over the samples so far, while statistics are being recomputed

    def net(self) -> nn.Module:
        """Return a copy of the network with the current weights. A collective."""
        with self.ranks.waiting():
            net = self.replica.averaged()
        if self.norms is not None:
            batchnorm.load_norm_state(net, self.norms.to(self.ranks.device))
        return net

    def weights_changed(self) -> None:
        """Discard recomputed statistics, which belong to the previous weights."""
        self.norms = None

    def collect(self, net: nn.Module, batch: Batch | None) -> None:
        """Add a batch to the sums of new statistics for `net`; a single sample is left out, as it has no variance."""
        rows = np.zeros(0, int) if batch is None else np.flatnonzero(batch.valid)
        inputs = []
        if batch is not None and len(rows) > 1:
            inputs = [to_input(batch.data[rows], self.pixels, self.ranks.device)]
        found = batchnorm.norm_sums(net, inputs, pooled=True)
        self.sums = found if self.sums is None else self.sums + found

    def renew(self, net: nn.Module) -> None:
        """Set the statistics of `net`, and of later copies with these weights, from all ranks' sums. A collective.

        RunFailed if there were too few samples.
        """
        assert self.sums is not None
        sums, self.sums = self.sums.to(self.ranks.device), None
        with self.ranks.waiting():
            if self.ranks.world > 1:
                dist.all_reduce(sums)
        try:
            batchnorm.load_norm_sums(net, sums, pooled=True)
        except ValueError:
            fewest = 2 * self.ranks.world
            raise RunFailed(
                f"optim.precise_norm: no worker got two samples that decode: set at least {fewest} for "
                f"{self.ranks.world} workers"
            ) from None
        self.norms = batchnorm.norm_state(net)

    def tensors(self) -> dict[str, Tensor]:
        """Return the recomputed statistics, if any, for a checkpoint."""
        return {} if self.norms is None else {"precise": self.norms}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load what `tensors` returned."""
        self.norms = tensors.get("precise")
