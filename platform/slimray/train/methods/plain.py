"""One rank's replica of the network: weights, optimizer, averaged weights, BatchNorm statistics, one step.

The step is exact whatever the number of ranks: gradients are those of the mean loss over the valid samples of the
*global* batch (arXiv 1706.02677), because each rank's sum is scaled by world / (all-reduced valid count) before DDP
averages. A rank without samples takes part with zero gradients and leaves its statistics alone; BatchNorm never sees a
single value per channel. `tensors` is the whole training state by name, so that a resumed run ends in the same bits.
torch only: it runs under Ray Train (loop.py), under torchrun, or alone.
"""

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from slimray import models
from slimray.tasks.predict import Input, to_input
from slimray.train import learn
from slimray.train.spec import OptimSpec


@dataclass(frozen=True)
class Piece:
    """A microbatch of one rank, valid samples only: `[n, V, ...]` and labels `[n]`, `[n, N]` or as the kind of sample
    has them; n may be 0."""

    data: np.ndarray
    labels: np.ndarray


class Peers(nn.Module):
    """Two networks of the same form that learn from each other: outputs `[B, 2, classes, ...]`. The first is kept."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.first(x), self.second(x)], 1)


@dataclass(frozen=True)
class StepReport:
    """What one step did: loss summed over this rank's samples, whether the gradient was finite, seconds spent.

    `communication_s` is the exposed part of the all-reduce: from the last gradient to the end of the backward pass. On
    GPUs, where work is queued, it is 0 and part of `compute_s`.
    """

    loss_sum: float
    finite: bool
    transfer_s: float
    compute_s: float
    communication_s: float


class Replica:
    """A network with its optimizer on one rank of `world`; wrapped in DDP when `world` > 1."""

    def __init__(
        self,
        net: nn.Module,
        optim: OptimSpec,
        pixels: Input,
        sample_shape: Sequence[int],
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        repeat_single: bool = True,
        bucket_mb: float = 25,
        compress: str = "none",
    ):
        """`sample_shape`: one input, (T, C, H, W) or (C, N); `repeat_single`: see `breaks_on_one_sample`.

        Gradients are all-reduced `bucket_mb` at a time, as bfloat16 with `compress` "bf16", else as they are.
        """
        self.bucket_mb, self.compress = bucket_mb, compress
        self.optim, self.pixels, self.device, self.rank, self.world = optim, pixels, device, rank, world
        self.sample_shape, self.repeat_single = tuple(sample_shape), repeat_single
        learn.set_norm_policy(net, optim.norm)
        layout = torch.channels_last if device.type == "cuda" and not _has_3d(net) else torch.preserve_format
        self.net = net.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = learn.make_optimizer(self.net, optim)
        self.ema = learn.Ema(self.net, optim.ema) if optim.ema else None
        self.last_bucket_at = 0.0  # when the last bucket of gradients was ready
        self.stepped_at = 0.0  # when the last step was over
        self.ddp = self._wrap()

    def _wrap(self) -> nn.Module:
        """The network whose backward pass averages the gradients over ranks."""
        if self.world == 1:
            return self.net
        ids = [self.device] if self.device.type == "cuda" else None
        ddp = DistributedDataParallel(
            self.net,
            device_ids=ids,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
            bucket_cap_mb=self.bucket_mb,  # type: ignore[arg-type]
        )
        ddp.register_comm_hook(self, _timed_allreduce)
        return ddp

    # --------------------------------------------------------------------------------------------- one step

    def step(
        self,
        pieces: Sequence[Piece],
        num_valid: int,
        lr: float,
        seed: tuple[int, int],
        still: frozenset[int] = frozenset(),
    ) -> StepReport:
        """Take one optimizer step; a collective. `num_valid` > 0 counts the samples of all ranks.

        `seed` is (run seed, number of the step): dropout is a function of it and the rank. All ranks must pass equally
        many pieces. A gradient that is not finite is dropped by all ranks alike (it is all-reduced). In the pieces
        `still` BatchNorm uses its running statistics: with `norm: sync` those in which some rank has no samples, which
        would else be missed where the others gather statistics.
        """
        learn.seed_step(*seed, self.rank)
        learn.train_mode(self.net, self.optim.norm)
        learn.set_learning_rate(self.optimizer, lr)
        norms = learn.norm_state(self.net)  # a step that is dropped must leave no trace in them either
        start = time.perf_counter()
        loss_sum, transfer_s, exposed_s = self._gradients(pieces, num_valid, seed, still)
        finite = self._apply()
        self.stepped_at = time.perf_counter()
        if not finite:
            learn.load_norm_state(self.net, norms)
        compute_s = time.perf_counter() - start - transfer_s - exposed_s
        return StepReport(loss_sum, finite, transfer_s, compute_s, exposed_s)

    def _gradients(
        self, pieces: Sequence[Piece], num_valid: int, seed: tuple[int, int], still: frozenset[int]
    ) -> tuple[float, float, float]:
        """Leave the gradients of the global batch in the parameters: loss sum, seconds of transfer and all-reduce."""
        loss_sum, transfer_s, exposed_s = 0.0, 0.0, 0.0
        for i, piece in enumerate(pieces):
            quiet = contextlib.nullcontext() if self.world == 1 or i + 1 == len(pieces) else self.ddp.no_sync()  # type: ignore[operator]
            with quiet:
                loss, seconds = self._loss(piece, i in still)
                (loss * (self.world / num_valid)).backward()
            if self.world > 1 and self.device.type == "cpu" and i + 1 == len(pieces):
                exposed_s = time.perf_counter() - self.last_bucket_at
            loss_sum += float(loss.detach())
            transfer_s += seconds
        return loss_sum, transfer_s, exposed_s

    def _loss(self, piece: Piece, still: bool) -> tuple[Tensor, float]:
        """The summed loss of a microbatch, and the seconds its transfer took."""
        if not len(piece.data):
            with norms_in_eval(self.net), learn.autocast(self.device):
                outputs = self.ddp(torch.zeros(1, *self.sample_shape, device=self.device))
            parts = outputs.values() if isinstance(outputs, Mapping) else [outputs]
            return sum((part.float().sum() * 0.0 for part in parts), torch.zeros((), device=self.device)), 0.0
        start = time.perf_counter()
        clips = to_input(piece.data, self.pixels, self.device)
        labels = torch.from_numpy(piece.labels).to(self.device)
        seconds = time.perf_counter() - start
        if len(clips) == 1 and self.repeat_single:  # a second, unweighted copy gives BatchNorm its two values
            clips = clips.expand(2, *clips.shape[1:])
        with norms_in_eval(self.net) if still else contextlib.nullcontext(), learn.autocast(self.device):
            logits = self.ddp(clips)
        return sample_losses(self.net, first_rows(logits, len(labels)), labels, self.optim).sum(), seconds

    def _apply(self) -> bool:
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.optim.clip_norm or float("inf"))
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.net)
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    def reduces_since(self) -> float:
        """For how many seconds the all-reduce of a step has been going on, 0 between steps and before it."""
        return time.perf_counter() - self.last_bucket_at if self.last_bucket_at > self.stepped_at else 0.0

    # ------------------------------------------------------------------------------------------------ state

    def tensors(self) -> dict[str, Tensor]:
        """The whole training state by name, the BatchNorm statistics of every rank included. A collective."""
        out = {f"model.{k}": v for k, v in self.net.state_dict().items()}
        out |= {f"optim.{k}": v for k, v in learn.optimizer_tensors(self.optimizer).items()}
        if self.ema:
            out |= {f"ema.{k}": v for k, v in self.ema.tensors().items()}
        return out | {f"norms.{rank}": vector for rank, vector in enumerate(self._all_norms())}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a state from `tensors`; statistics are the rank's own if the world is the same, else merged."""
        self.net.load_state_dict(part(tensors, "model."))
        learn.load_optimizer_tensors(self.optimizer, part(tensors, "optim."))
        if self.ema:
            self.ema.load(part(tensors, "ema."))
        norms = part(tensors, "norms.")
        if len(norms) == self.world:
            learn.load_norm_state(self.net, norms[str(self.rank)].to(self.device))
        elif norms:
            merged = learn.merge_norm_states(torch.stack([norms[k] for k in sorted(norms, key=int)]), self.net)
            learn.load_norm_state(self.net, merged.to(self.device))

    def averaged(self) -> nn.Module:
        """A copy to evaluate and to ship: averaged weights if kept, all ranks' BatchNorm statistics merged.

        A collective; training state is not touched.
        """
        net = copy.deepcopy(self.net).eval()
        if self.ema:
            self.ema.copy_to(net)
        norms = self._all_norms()
        if len(norms):
            learn.load_norm_state(net, learn.merge_norm_states(norms, net))
        return net.first if isinstance(net, Peers) else net

    def _all_norms(self) -> Tensor:
        """The running statistics of every rank, `[world, K]`; `[0]` for a network without BatchNorm."""
        mine = learn.norm_state(self.net)
        if not mine.numel():
            return mine
        if self.world == 1:
            return mine[None]
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(everyone, mine)
        return torch.stack(everyone)


def _timed_allreduce(replica: Replica, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore
    """DDP's own all-reduce, of bfloat16 on request, and a note of when the bucket was ready."""
    replica.last_bucket_at = time.perf_counter()
    reduce = bf16_compress_hook if replica.compress == "bf16" else allreduce_hook
    return reduce(dist.group.WORLD, bucket)  # type: ignore[arg-type]


Outputs = Tensor | Mapping[str, Tensor]


def first_rows(outputs: Outputs, count: int) -> Outputs:
    """The first `count` samples of what a network gives."""
    if isinstance(outputs, Mapping):
        return {name: value[:count] for name, value in outputs.items()}
    return outputs[:count]


def sample_losses(net: nn.Module, outputs: Outputs, labels: Tensor, optim: OptimSpec) -> Tensor:
    """The loss of each sample `[n]`: the network's own where it gives several things, peers' of peers, else that of
    `learn.sample_losses`."""
    if isinstance(outputs, Mapping):
        return net.losses(outputs, labels)  # type: ignore[operator]
    if isinstance(net, Peers):
        return mutual_losses(outputs, labels, optim)
    return learn.sample_losses(outputs, labels, optim)


def mutual_losses(outputs: Tensor, labels: Tensor, optim: OptimSpec) -> Tensor:
    """Deep mutual learning of two peers (arXiv 1706.00384), `[n]`: each learns from the labels and from the other.

    `outputs` `[n, 2, C, ...]`. The loss of each is its own plus `optim.mutual` x KL(other || own), the other taken as
    given; their sum is returned.
    """
    total = torch.zeros(len(labels), device=outputs.device)
    for own, other in ((0, 1), (1, 0)):
        logits, given = outputs[:, own], outputs[:, other].detach()
        total = total + learn.sample_losses(logits, labels, optim) + optim.mutual * learn.divergences(given, logits)
    return total


def breaks_on_one_sample(model: dict[str, Any], sample_shape: Sequence[int]) -> bool:
    """Whether a batch of one sample leaves some BatchNorm with one value per channel, which torch refuses.

    `model` is what `models.build` takes; runs on the meta device.
    """
    with torch.device("meta"):
        net = models.build(**model).train()
        try:
            net(torch.zeros(1, *sample_shape))
        except ValueError:
            return True
    return False


@contextlib.contextmanager
def norms_in_eval(net: nn.Module) -> Iterator[None]:
    """Inside the block BatchNorm uses, and does not touch, its running statistics."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of `tensors` under `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _has_3d(net: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv3d) for m in net.modules())
