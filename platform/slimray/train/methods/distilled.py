"""Distillation (arXiv 1503.02531): one network learns from the labels and from an already trained teacher."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimray.spec import RunFailed
from slimray.train.methods.method import OnDevice, Outputs, Setup
from slimray.train.methods.plain import PlainReplica


@dataclass(frozen=True)
class Distilled:
    """Plain training with the network of the run at `teacher` as teacher, in eval mode.

    The loss is `labels` x loss of the labels + `weight` x T^2 x cross-entropy of both outputs softened by `temperature`
    T, averaged over the outputs of a sample if there are several (one per point).
    """

    teacher: str
    weight: float = 1.0
    labels: float = 1.0
    temperature: float = 1.0

    def replica(self, net: nn.Module, build: Callable[[], nn.Module], setup: Setup) -> "DistilledReplica":
        """Build the replica of one rank around `net`, with the teacher's network."""
        return DistilledReplica(net, setup.load(self.teacher), self, setup)

    def held(self, epoch: int) -> tuple[int, int]:
        """Hold nothing out."""
        return 0, 0


class DistilledReplica(PlainReplica):
    """A replica with a frozen teacher."""

    def __init__(self, net: nn.Module, teacher: nn.Module, method: Distilled, setup: Setup):
        super().__init__(net, setup)
        self.method = method
        self.teacher = copy.deepcopy(teacher).requires_grad_(False).eval().to(self.device)

    def _passes(self, batch: OnDevice, choice: Any) -> Iterator[Tensor]:
        with self._autocast():
            outputs = self.forward(batch.x, **self.setup.task.in_full)
        losses = self._losses(outputs, batch)
        if batch.labels is None:
            yield losses
            return
        given = self._teach(batch.x)
        own = _single(outputs)
        if own.shape != given.shape:
            raise RunFailed(
                f"teacher.run: its outputs have shape {list(given.shape[1:])}, the network's {list(own.shape[1:])}"
            )
        heat = self.method.temperature
        taught = heat**2 * self._taught(given / heat, own / heat, batch.labels)
        yield self.method.labels * losses + self.method.weight * taught

    @torch.no_grad()
    def _teach(self, x: Tensor) -> Tensor:
        with self._autocast():
            return _single(self.teacher(x, **self.setup.task.in_full)).float()


def _single(outputs: Outputs) -> Tensor:
    if isinstance(outputs, Mapping):
        raise RunFailed("teacher: works only for networks with a single output: leave it out")
    return outputs
