"""Plain training: one network learns from the labels, its gradients averaged by DDP while the backward pass runs."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from slimray.edge.compiler import compiled
from slimray.train.methods.method import OnDevice, Replica, Setup


@dataclass(frozen=True)
class Plain:
    """Each step trains the whole network on the labels of the batch."""

    def replica(self, net: nn.Module, build: Callable[[], nn.Module], setup: Setup) -> "PlainReplica":
        """Build the replica of one rank around `net`."""
        return PlainReplica(net, setup)

    def held(self, epoch: int) -> tuple[int, int]:
        """Hold nothing out."""
        return 0, 0


class PlainReplica(Replica):
    """A replica whose gradients DDP reduces if there are several ranks."""

    def __init__(self, net: nn.Module, setup: Setup):
        super().__init__(net, setup)
        self.forward: Callable[..., Any] = self.net
        if self.world > 1:
            self.shared = DistributedDataParallel(
                self.net,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                forward_sync_buffers=False,
                bucket_cap_mb=setup.bucket_mb,  # type: ignore[arg-type]
            )
            self.shared.register_comm_hook(self, _timed_allreduce)
            self.forward = self.shared
        if setup.compile:  # including DDP, which then still reduces a bucket while the next one is computed
            self.forward = compiled(self.forward, self.device)

    def _passes(self, batch: OnDevice, choice: Any) -> Iterator[Tensor]:
        with self._autocast():
            outputs = self.forward(batch.x)
        yield self._losses(outputs, batch)

    def _accumulating(self, more: bool) -> contextlib.AbstractContextManager[Any]:
        return self.shared.no_sync() if more and self.world > 1 else contextlib.nullcontext()

    def _reduce(self, early: bool = False) -> None:
        """Do nothing: DDP has reduced the gradients in the backward pass."""


def _timed_allreduce(replica: PlainReplica, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore
    """Note when the bucket was ready, then run DDP's own all-reduce, in bfloat16 on request."""
    replica.reduce_begins()
    reduce = bf16_compress_hook if replica.setup.compress == "bf16" else allreduce_hook
    return reduce(dist.group.WORLD, bucket)  # type: ignore[arg-type]
