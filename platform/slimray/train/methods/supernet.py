"""One rank's replica of a supernet: a step trains a few of its subnets, and every rank the same ones.

Progressive shrinking (Once-for-All, arXiv 1908.09791): the gradients of all subnets of a step are *summed*, each learns
from the labels and from a frozen teacher, which looks at the batch in train mode (by its statistics) as published.
Which subnets is a function of (seed, step). A backward pass follows each forward pass, and the gradients are reduced
once, by ourselves: DDP's buckets expect one backward pass over all parameters, and here most steps leave some out.
"""

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimray.arch import Arch, Space
from slimray.tasks.predict import to_input
from slimray.train import learn
from slimray.train.methods.plain import Piece, Replica, norms_in_eval

BUCKET = 2**22  # numbers all-reduced at a time
INPUTS = ("resolution", "frames")  # dimensions of the input, one value for all subnets of a step


@dataclass(frozen=True)
class SubnetPlan:
    """Which subnets a step trains: `count` archs of `space`, drawn anew each step. With `sandwich` (1903.05134) the
    first is the largest and the last the smallest. `distill_weight` is that of the teacher's answers."""

    space: Space
    count: int = 1
    sandwich: bool = False
    distill_weight: float = 1.0

    def draw(self, seed: tuple[int, int]) -> list[Arch]:
        """The archs of step `seed` = (run seed, number of the step), the same on every rank."""
        archs = [self.space.sample(random.Random(f"{seed[0]}-{seed[1]}-{number}")) for number in range(self.count)]
        shared = {name: archs[0][name] for name in INPUTS if name in self.space.dimensions}
        if self.sandwich:
            archs[0] = self.space.largest()
            archs[-1] = self.space.smallest() if self.count > 1 else archs[-1]
        return [arch.replace(**shared) for arch in archs]


class SupernetReplica(Replica):
    """A replica whose network is called with an arch; `teacher` is a network of the same inputs, or None."""

    def __init__(self, net: nn.Module, plan: SubnetPlan, teacher: nn.Module | None, *arguments: Any, **options: Any):
        self.plan = plan
        super().__init__(net, *arguments, **options)
        self.teacher = None if teacher is None else _frozen(copy.deepcopy(teacher)).to(self.device)

    def _wrap(self) -> nn.Module:
        return self.net

    def _gradients(
        self, pieces: Sequence[Piece], num_valid: int, seed: tuple[int, int], still: frozenset[int]
    ) -> tuple[float, float, float]:
        loss_sum, transfer_s = 0.0, 0.0
        archs = self.plan.draw(seed)
        for piece in pieces:
            if not len(piece.data):  # the same parameters get gradients on every rank, here zeros
                self._no_gradients(archs)
                continue
            start = time.perf_counter()
            whole = to_input(piece.data, self.pixels, self.device)
            labels = torch.from_numpy(piece.labels).to(self.device)
            transfer_s += time.perf_counter() - start
            x = learn.fit_input(whole, archs[0])
            if len(x) == 1 and self.repeat_single:
                x = x.expand(2, *x.shape[1:])
            given = self._teach(x)
            for arch in archs:
                with learn.autocast(self.device):
                    logits = self.net(x, arch)[: len(labels)]
                losses = learn.sample_losses(logits, labels, self.optim)
                if given is not None:
                    losses = losses + self.plan.distill_weight * learn.distill_losses(given[: len(labels)], logits)
                loss = losses.sum()
                (loss * (self.world / num_valid)).backward()
                loss_sum += float(loss.detach()) / len(archs)
        start = time.perf_counter()
        if self.world > 1:
            self._reduce()
        return loss_sum, transfer_s, time.perf_counter() - start

    def _no_gradients(self, archs: Sequence[Arch]) -> None:
        x = learn.fit_input(torch.zeros(1, *self.sample_shape, device=self.device), archs[0])
        with norms_in_eval(self.net):
            for arch in archs:
                (self.net(x, arch).float().sum() * 0.0).backward()

    @torch.no_grad()
    def _teach(self, x: Tensor) -> Tensor | None:
        """What the teacher, the largest subnet as it was, says of `x`, by the statistics of this batch."""
        if self.teacher is None or not self.plan.distill_weight:
            return None
        with learn.autocast(self.device):
            if "frames" in self.plan.space.dimensions:
                largest = self.teacher.space.largest()  # type: ignore[union-attr]
                return self.teacher(x, largest.replace(frames=x.shape[1]))
            return self.teacher(x)

    def _reduce(self) -> None:
        """Average the gradients over ranks, as DDP would, in large pieces. A collective."""
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        bucket: list[Tensor] = []
        for number, gradient in enumerate(gradients):
            bucket.append(gradient)
            if number + 1 == len(gradients) or sum(one.numel() for one in bucket) >= BUCKET:
                flat = torch.cat([one.reshape(-1) for one in bucket])
                if self.compress == "bf16":  # divided first, as DDP's hook does: the sum must not overflow
                    flat = (flat / self.world).bfloat16()
                dist.all_reduce(flat)
                flat = flat if self.compress == "bf16" else flat / self.world
                for one, part in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
                    one.copy_(part.view_as(one))
                bucket = []


def _frozen(net: nn.Module) -> nn.Module:
    """`net` without gradients and dropout; its BatchNorm goes by the batch."""
    net.requires_grad_(False).train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return net
