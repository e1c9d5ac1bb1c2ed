"""Progressive shrinking: a step trains a few subnets of a supernet, the same ones on every rank.

Once-for-All (arXiv 1908.09791): the gradients of all subnets of a step are *summed*; each subnet learns from the labels
and from a frozen teacher, whose BatchNorm uses batch statistics as published. The choice of subnets is a function of
(seed, step). A backward pass follows each forward pass, and the gradients are reduced once, without DDP: its buckets
expect one backward pass over all parameters, and most steps here leave some out.
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimray.arch import Arch, Space
from slimray.train import learn
from slimray.train.batchnorm import guard_lone_values
from slimray.train.methods.method import OnDevice, Replica, Setup


@dataclass(frozen=True)
class Supernet:
    """Subnets that a step trains: `count` archs of `space`, redrawn each step. With `sandwich` (1903.05134), the first
    is the largest and the last the smallest. `teacher` is the URI of a run, `distill_weight` the weight of its outputs.
    """

    space: Space
    count: int = 1
    sandwich: bool = False
    distill_weight: float = 1.0
    teacher: str | None = None

    def replica(self, net: nn.Module, build: Callable[[], nn.Module], setup: Setup) -> "SupernetReplica":
        """Build the replica of one rank around the supernet `net`, with the teacher's network if there is one."""
        teacher = None if self.teacher is None else setup.load(self.teacher)
        return SupernetReplica(net, self, teacher, setup)

    def held(self, epoch: int) -> tuple[int, int]:
        """Hold nothing out."""
        return 0, 0

    def draw(self, seed: tuple[int, int]) -> list[Arch]:
        """Return the archs of step `seed` = (run seed, number of the step), the same on every rank."""
        archs = [self.space.sample(random.Random(f"{seed[0]}-{seed[1]}-{number}")) for number in range(self.count)]
        shared = {name: archs[0][name] for name in self.space.input_names}  # all subnets share one input
        if self.sandwich:
            archs[0] = self.space.largest()
            archs[-1] = self.space.smallest() if self.count > 1 else archs[-1]
        return [arch.replace(**shared) for arch in archs]


class SupernetReplica(Replica):
    """A replica whose network is called with an arch; `teacher` is a network of the same inputs, or None."""

    def __init__(self, net: nn.Module, method: Supernet, teacher: nn.Module | None, setup: Setup):
        super().__init__(net, setup)
        self.method = method
        self.teacher = None if teacher is None else _frozen(copy.deepcopy(teacher)).to(self.device)
        if self.teacher is not None:
            guard_lone_values(self.teacher)

    def _draw(self, seed: tuple[int, int]) -> list[Arch]:
        return self.method.draw(seed)

    def _passes(self, batch: OnDevice, choice: Sequence[Arch]) -> Iterator[Tensor]:
        x = learn.fit_input(batch.x, self.method.space, choice[0])
        given = None if batch.labels is None else self._teach(x)
        for arch in choice:
            with self._autocast():
                logits = self.net(x, arch)
            losses = self._losses(logits, batch)
            if given is not None and batch.labels is not None:
                losses = losses + self.method.distill_weight * self._taught(given, logits, batch.labels)
            yield losses

    @torch.no_grad()
    def _teach(self, x: Tensor) -> Tensor | None:
        """Return the outputs of the teacher, the largest subnet as it was, for `x`, with batch statistics."""
        if self.teacher is None or not self.method.distill_weight:
            return None
        with self._autocast():
            frames = self.method.space.input_name("frames")
            if frames is not None:
                largest = self.teacher.space.largest()  # type: ignore[union-attr]
                return self.teacher(x, largest.replace(**{frames: x.shape[1]}))
            return self.teacher(x)


def _frozen(net: nn.Module) -> nn.Module:
    """Freeze `net`: no gradients, no dropout; its BatchNorm uses batch statistics."""
    net.requires_grad_(False).train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return net
