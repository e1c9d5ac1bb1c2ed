"""Plain training of a language model whose words also move by Hebb's rule, after each step of the optimizer.

Fast Parametric Learning (arXiv 1803.10049) on an adaptive softmax, as the MicroNet language model (2005.07877) meant
it: the weights of a word that was to be predicted are drawn to the hidden vectors that preceded it, in a tail of the
softmax to what its projection makes of them. Sums are those of all ranks, and how often words were seen is part of the
training state. Surprising: the released code lost the result of the update, so that nothing shows what it is worth.
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
    """Return whether `net` has words that move by the rule: those of an adaptive softmax."""
    return isinstance(getattr(net, "softmax", None), AdaptiveSoftmax)


@dataclass(frozen=True)
class Hebbian:
    """Words that were seen fewer than `most` times move by the rule."""

    most: int

    def replica(self, net: nn.Module, build: Callable[[], nn.Module], setup: Setup) -> "HebbianReplica":
        """Build the replica of one rank around `net`."""
        return HebbianReplica(net, setup, self.most)

    def held(self, epoch: int) -> tuple[int, int]:
        """Hold nothing out."""
        return 0, 0


class HebbianReplica(PlainReplica):
    """A replica of a network for which `applies`. `counts` `[words]` of each bin begin with 1."""

    def __init__(self, net: Any, setup: Setup, most: int):
        super().__init__(net, setup)
        self.words: Any = self.net
        self.most, self.edges = most, self.words.softmax.edges
        self.counts = [torch.ones(high - low, device=self.device) for low, high in pairwise(self.edges)]
        self.chunks: list[Tensor] = []  # hidden vectors `[n, L, C]` of a pass
        self.heard: list[tuple[Tensor, Tensor]] = []  # of a step: hidden vectors `[m, C]`, the words `[m]` behind them
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
        """Move the weights by the gradients, and words by what preceded them. A collective."""
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
        """The training state, with how often words were seen. A collective."""
        return super().tensors() | {f"words.{number}": counts for number, counts in enumerate(self.counts)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        super().load(tensors)
        for number, counts in part(tensors, "words.").items():
            self.counts[int(number)].copy_(counts)
