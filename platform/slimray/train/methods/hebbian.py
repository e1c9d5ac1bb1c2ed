"""Plain training of a language model whose word weights also move by Hebb's rule, after each step of the optimizer.

Fast Parametric Learning (arXiv 1803.10049) on an adaptive softmax, as intended in the MicroNet language model
(2005.07877): the weights of a target word move towards the hidden vectors that preceded it, in a tail of the softmax
towards their projections. Sums run over all ranks, and the counts of seen words are part of the training state.
Surprising: the released code discarded the result of the update, so that no published result shows its value.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimray.data.text.vocabulary import PAD
from slimray.models.text.adaptive import AdaptiveSoftmax, hebbian_sums, hebbian_update
from slimray.train.methods.method import OnDevice, Setup, part
from slimray.train.methods.plain import PlainReplica


def applies(net: nn.Module) -> bool:
    """Return True if the rule can be applied to `net`, which takes an adaptive softmax."""
    return isinstance(getattr(net, "softmax", None), AdaptiveSoftmax)


@dataclass(frozen=True)
class Hebbian:
    """Plain training in which words seen fewer than `most` times also move by Hebb's rule."""

    most: int

    def replica(self, net: nn.Module, build: Callable[[], nn.Module], setup: Setup) -> "HebbianReplica":
        """Build the replica of one rank around `net`."""
        return HebbianReplica(net, setup, self.most)

    def held(self, epoch: int) -> tuple[int, int]:
        """Hold nothing out."""
        return 0, 0


class HebbianReplica(PlainReplica):
    """A replica of a network for which `applies` is True. `counts`, one `[words]` per bin, start at 1."""

    def __init__(self, net: Any, setup: Setup, most: int):
        super().__init__(net, setup)
        self.words: Any = self.net
        self.most, self.edges = most, self.words.softmax.edges
        self.counts = [torch.ones(high - low, device=self.device) for low, high in pairwise(self.edges)]
        self.chunks: list[Tensor] = []  # hidden vectors `[n, L, C]` of a pass
        self.heard: list[tuple[Tensor, Tensor]] = []  # of a step: hidden vectors `[m, C]`, the words `[m]` that follow
        self.words.layers[-1].register_forward_hook(self._hear)

    def _hear(self, layer: nn.Module, given: Any, out: tuple[Tensor, Any]) -> None:
        if out[0].requires_grad:  # not in a validation
            self.chunks.append(out[0].detach())

    def _passes(self, batch: OnDevice, choice: Any) -> Iterator[Tensor]:
        self.chunks.clear()
        yield from super()._passes(batch, choice)
        if batch.labels is not None:
            kept = batch.labels != PAD
            self.heard.append((torch.cat(self.chunks, 1)[kept], batch.labels[kept]))

    def _apply(self) -> Tensor:
        """Move the weights by the gradients, and word weights towards the hidden vectors before them. A collective."""
        finite = super()._apply()
        if self.queued or finite:
            self._draw_words(finite)
        self.heard.clear()
        return finite

    @torch.no_grad()
    def _draw_words(self, finite: Tensor) -> None:
        for number, (low, high) in enumerate(pairwise(self.edges)):
            weight = self.words.embed.layers[number].weight
            sums, seen = torch.zeros_like(weight), torch.zeros_like(self.counts[number])
            for hidden, words in self.heard:
                inside = (words >= low) & (words < high)
                vectors = hidden[inside].to(weight.dtype)
                vectors = self.words.softmax.projections[number - 1](vectors) if number else vectors
                more = hebbian_sums(weight, vectors, words[inside] - low)
                sums, seen = sums + more[0], seen + more[1]
            if self.world > 1:
                dist.all_reduce(sums)
                dist.all_reduce(seen)
            moved, counts = hebbian_update(weight, sums, seen, self.counts[number], self.most)
            weight.copy_(torch.where(finite, moved, weight))
            self.counts[number].copy_(torch.where(finite, counts, self.counts[number]))

    def tensors(self) -> dict[str, Tensor]:
        """Return the training state, including the counts of seen words. A collective."""
        return super().tensors() | {f"words.{number}": counts for number, counts in enumerate(self.counts)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load what `tensors` returned."""
        super().load(tensors)
        for number, counts in part(tensors, "words.").items():
            self.counts[int(number)].copy_(counts)
