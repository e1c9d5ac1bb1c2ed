"""Training methods as values, and the code that all of them share: `Method`, `Setup`, `Replica`.

A `Method` (plain.py, mutual.py, supernet.py, paths.py) is a frozen value that is sent to the workers; it builds a
`Replica`: the network on one rank with its optimizer, averaged weights and BatchNorm statistics. A step does not depend
on the number of ranks: gradients are those of the mean loss over the samples of the *global* batch (arXiv 1706.02677).
A rank without samples takes part with zero gradients and keeps its statistics; all ranks drop a step that is not
finite. `tensors` is the whole training state by name, so that a resumed run ends with the same bits. Depends on torch
only: it runs under Ray Train (loop.py), under torchrun, or alone.
"""

import abc
import contextlib
import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimray import runs
from slimray.tasks.classify import CLASSIFY
from slimray.tasks.network import Input, load_network, to_input
from slimray.tasks.precision import arithmetic_of, computing, set_products
from slimray.tasks.task import Outputs, Task
from slimray.train import batchnorm, learn, optimizers
from slimray.train.averaging import LONG_AGO, Ema
from slimray.train.precision import LossScale
from slimray.train.spec import OptimSpec
from slimray.train.timing import Moment, timer_of

BUCKET = 2**22  # numbers all-reduced at a time
REDUCING_S = 1.0  # seconds in an all-reduce after which a rank counts as waiting for the others
GATHERED = 2**24  # limit of the numbers, over all ranks, gathered on a device at a time


@dataclass(frozen=True)
class Sent:
    """An array being copied to a GPU on a stream of its own; the event `done` marks the end of the copy."""

    tensor: Tensor
    done: Any

    def __len__(self) -> int:
        return len(self.tensor)

    def arrived(self) -> Tensor:
        """Return the tensor for use on the caller's stream. The stream waits for the copy, the caller does not."""
        stream = torch.cuda.current_stream(self.tensor.device)
        stream.wait_event(self.done)
        self.tensor.record_stream(stream)  # its memory is not reused before work on this stream is done
        return self.tensor


@dataclass(frozen=True)
class Piece:
    """A microbatch of one rank, valid samples only: data `[n, V, ...]`, and labels `[n]`, `[n, N]` or in the shape of
    the modality; n may be 0."""

    data: np.ndarray | Sent
    labels: np.ndarray | Sent


Span = tuple[str, Moment, Moment]
"""Name, first moment and last moment of a part of a step."""


@dataclass(frozen=True)
class StepReport:
    """Report of one step, on the device: `loss`, a float64 scalar summed over this rank's samples, and the flag `fits`,
    True if the gradient was finite (with fp16, also if it may be finite at a smaller scale of the loss).

    `spans` hold moments of the device's timer (timing.py): "work" from first to last, within it "transfer" of each
    piece and "reduce", the exposed part of the all-reduce, from the last gradient to the end of the backward pass.
    """

    loss: Tensor
    fits: Tensor
    spans: tuple[Span, ...]

    @property
    def loss_sum(self) -> float:
        """The loss as a number; waits for the device."""
        return float(self.loss)

    @property
    def finite(self) -> bool:
        """The flag `fits` as a bool; waits for the device."""
        return bool(self.fits)


def network_at(uri: str) -> nn.Module:
    """Return the network of the run at `uri`, in eval mode."""
    return load_network(runs.run_at(uri)).net


@dataclass(frozen=True)
class Setup:
    """Settings of a replica, whatever the method.

    `sample_shape` is the shape of one input, (T, C, H, W) or (C, N). Gradients are all-reduced `bucket_mb` at a time,
    as bfloat16 with `compress` "bf16", else unchanged. `batch_total` is the global batch, for optimizers that scale
    with it. `compile` compiles the network in methods that train a single one. `load` returns the network of a run, by
    its URI, in eval mode; with several ranks it is a collective. With `queued`, the device itself checks and drops
    steps, and nothing is read back; None: on GPUs only.
    """

    optim: OptimSpec
    pixels: Input
    sample_shape: tuple[int, ...]
    device: torch.device
    rank: int = 0
    world: int = 1
    bucket_mb: float = 25
    compress: str = "none"
    batch_total: int | None = None
    task: Task = CLASSIFY
    compile: bool = False
    queued: bool | None = None
    load: Callable[[str], nn.Module] = network_at


class Method(Protocol):
    """Interface between a training method and the loop; every method is a frozen dataclass."""

    def replica(self, net: nn.Module, build: Callable[[], nn.Module], setup: Setup) -> "Replica":
        """Build the replica of one rank around `net`; `build` makes further networks of the same model."""
        ...

    def held(self, epoch: int) -> tuple[int, int]:
        """Return the number of held-out rows at the end of the training index, on which weights are never trained, and
        the number of steps on the other rows after which one on these follows in `epoch` (0: none)."""
        ...


@dataclass(frozen=True)
class OnDevice:
    """A microbatch on the device: inputs `x`, and `labels`, None for the placeholder of a rank without samples."""

    x: Tensor
    labels: Tensor | None


class Constraint(Protocol):
    """Constraint on the weights of a compressed network, at every step."""

    def before_clipping(self) -> None:
        """Change the reduced gradients before they are checked and clipped."""
        ...

    def before_step(self) -> None:
        """Change the clipped gradients before the optimizer uses them."""
        ...

    def after_step(self) -> None:
        """Restore the constraint after the optimizer's step; weights that meet it (a dropped step) do not change."""
        ...


class Replica(abc.ABC):
    """A network with its optimizer on one rank. A method defines `_passes`, and overrides what else it needs."""

    constraint: Constraint | None = None

    def __init__(self, net: nn.Module, setup: Setup):
        self.setup, self.optim, self.device = setup, setup.optim, setup.device
        self.rank, self.world = setup.rank, setup.world
        self.queued = self.device.type == "cuda" if setup.queued is None else setup.queued
        batchnorm.set_norm_policy(net, self.optim.norm)
        batchnorm.guard_lone_values(net, self.world)
        set_products(self.optim.precision)
        self.scale = LossScale(arithmetic_of(self.optim.precision, self.device), self.device)
        layout = torch.channels_last if self.device.type == "cuda" and not _has_3d(net) else torch.preserve_format
        self.net = net.to(device=self.device, memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = optimizers.make_optimizer(self.net, self.optim, setup.batch_total, self.queued)
        self.ema = Ema(self.net, self.optim.ema) if self.optim.ema else None
        self.timer = timer_of(self.device)
        self.reducing: tuple[float, Moment] | None = None  # start of the current all-reduce, by the clock and device
        self.reduced: deque[tuple[float, Moment, Moment]] = deque(maxlen=4)  # start and end, of steps still queued

    # --------------------------------------------------------------------------------------------- one step

    def step(
        self,
        pieces: Sequence[Piece],
        total: float,
        lr: float,
        seed: tuple[int, int],
        frozen: frozenset[int] = frozenset(),
        held: bool = False,
    ) -> StepReport:
        """Take one optimizer step; a collective. The loss is the sum over the samples of all ranks, divided by `total`
        > 0: the sum of their weights, or more for a window that is smaller than the batch.

        `seed` is (run seed, number of the step): dropout is a function of it and the rank. All ranks must pass equally
        many pieces. In the pieces `frozen`, BatchNorm uses its running statistics: with `norm: sync`, those in which
        some rank has no samples, as it would not take part when the others gather statistics. `held`: the samples are
        those that the method holds out; a method that holds none out never gets such a step.
        """
        optimizers.set_learning_rate(self.optimizer, lr)

        def update() -> tuple[Tensor, Tensor, list[Span]]:
            losses, spans = self._gradients(pieces, total, seed, frozen)
            finite = self._apply()
            loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
            for found in losses:
                for loss in found:
                    loss_sum += loss.double() / len(found)
            return finite, loss_sum, spans

        return self._attempt(seed, update)

    def _attempt(self, seed: tuple[int, int], update: Callable[[], tuple[Tensor, Tensor, list[Span]]]) -> StepReport:
        """Run `update` in training mode; if it is not finite, BatchNorm statistics are restored as well.

        `update` returns the flag that it was finite (and applied), the loss sum, and the transfer and all-reduce spans.
        """
        learn.seed_step(*seed, self.rank)
        batchnorm.train_mode(self.net, self.optim.norm)
        norms = batchnorm.snapshot(self.net)
        start = self.timer.now()
        finite, loss_sum, spans = update()
        if self.queued or not finite:
            batchnorm.restore(self.net, norms, unless=finite)
        self.scale.update(finite)
        fits = finite | (self.scale.factor >= 1) if self.scale.used else finite  # the scale can still be halved
        return StepReport(loss_sum, fits, (("work", start, self.timer.now()), *spans))

    def _gradients(
        self, pieces: Sequence[Piece], total: float, seed: tuple[int, int], frozen: frozenset[int]
    ) -> tuple[list[list[Tensor]], list[Span]]:
        """Compute the gradients of the global batch in the parameters; return the losses of the passes of each piece,
        on the device, and the spans of transfer and all-reduce."""
        all_found, spans, choice = [], [], self._draw(seed)
        for number, piece in enumerate(pieces):
            start = self.timer.now()
            batch = self._on_device(piece)
            spans.append(("transfer", start, self.timer.now()))
            quiet = batch.labels is None or number in frozen
            found = []
            with (
                self._accumulating(number + 1 < len(pieces)),
                norms_in_eval(self.net) if quiet else contextlib.nullcontext(),
            ):
                for losses in self._passes(batch, choice):
                    loss = losses.sum()
                    (loss * (self.scale.factor * (self.world / total))).backward()
                    found.append(loss.detach())
            all_found.append(found)
        self._reduce()
        if self.reducing is not None:
            self.reduced.append((*self.reducing, self.timer.now()))
            self.reducing = None
            spans.append(("reduce", *self.reduced[-1][1:]))
        return all_found, spans

    def _draw(self, seed: tuple[int, int]) -> Any:
        """Return the random choice that all pieces of a step share, a function of `seed`: the same on every rank."""
        return None

    @abc.abstractmethod
    def _passes(self, batch: OnDevice, choice: Any) -> Iterator[Tensor]:
        """Yield the losses `[n]` of each forward pass over `batch`; its backward pass runs before the next one."""

    def _on_device(self, piece: Piece) -> OnDevice:
        if not len(piece.data):
            return OnDevice(torch.zeros(1, *self.setup.sample_shape, device=self.device), None)
        data = piece.data.arrived() if isinstance(piece.data, Sent) else torch.from_numpy(piece.data)
        x = to_input(data, self.setup.pixels, self.device)
        own = piece.labels.arrived() if isinstance(piece.labels, Sent) else torch.from_numpy(piece.labels)
        return OnDevice(x, own.to(self.device))

    def _losses(self, outputs: Outputs, batch: OnDevice) -> Tensor:
        """Return the loss of each sample of `batch`, `[n]`; without samples, a 0 that depends on all outputs."""
        if batch.labels is None:
            parts = outputs.values() if isinstance(outputs, Mapping) else [outputs]
            return sum((part.float().sum() * 0.0 for part in parts), torch.zeros((), device=self.device))
        return self._sample_losses(outputs, batch.labels)

    def _sample_losses(self, outputs: Outputs, labels: Tensor) -> Tensor:
        return self.setup.task.losses(outputs, labels, self.optim)

    def _weights(self, labels: Tensor) -> Tensor:
        """Return the weight of each sample `[n]`; the losses of the samples already include it."""
        return self.setup.task.weights(labels, self.optim)

    def _taught(self, given: Tensor, own: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of each sample `[n]` against the outputs `given` of a teacher, times its weight."""
        task = self.setup.task
        if task.taught is not None:
            return task.taught(given, own, labels)
        return learn.distill_losses(given, own) * self._weights(labels)

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        return computing(self.device, self.optim.precision)

    def _accumulating(self, more: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which a piece is computed; `more`: further pieces follow."""
        return contextlib.nullcontext()

    def _reduce(self, early: bool = False) -> None:
        """Average the gradients over ranks. A collective: all ranks must have gradients for the same parameters."""
        if self.world > 1:
            self.reduce_begins()
            gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
            mean_over_ranks(gradients, self.world, self.setup.compress, early)

    def reduce_begins(self) -> None:
        """Note that the gradients, or a bucket of them, are ready to be reduced."""
        self.reducing = time.perf_counter(), self.timer.now()

    def _apply(self) -> Tensor:
        """Move the weights by the gradients if these are finite, and return the flag `finite`, on the device.

        Where work is queued, the flag is not read here: the device makes optimizer and averages change nothing.
        """
        if self.scale.used:
            for parameter in self.net.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(self.scale.factor)
        if self.constraint:
            self.constraint.before_clipping()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.optim.clip_norm or float("inf"))
        finite = torch.isfinite(norm)
        if self.queued or finite:
            if self.constraint:
                self.constraint.before_step()
            if self.queued:
                optimizers.skip_unless(self.optimizer, finite)
            self.optimizer.step()
            if self.constraint:
                self.constraint.after_step()
            if self.ema:
                self.ema.update(self.net, finite)
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    def reduces(self) -> bool:
        """Return True if the device has been in the all-reduce of a step, waiting for other ranks, for REDUCING_S."""
        begun, before = self.reducing, time.perf_counter() - REDUCING_S
        if begun is not None and begun[0] < before and self.timer.has_passed(begun[1]):
            return True
        inside = self.timer.has_passed
        return any(at < before and inside(start) and not inside(end) for at, start, end in tuple(self.reduced))

    def numbers(self) -> dict[str, float]:
        """Return the method's additions to the metrics of a step, by name."""
        return {"train/loss_scale": self.scale.value} if self.scale.used else {}

    # ------------------------------------------------------------------------------------------------ state

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole training state by name, on rank 0 with all ranks' BatchNorm statistics. A collective."""
        out = {f"model.{k}": v for k, v in self.net.state_dict().items()}
        out |= {f"optim.{k}": v for k, v in optimizers.optimizer_tensors(self.optimizer).items()}
        if self.ema:
            out |= {f"ema.{k}": v for k, v in self.ema.tensors().items()}
            out |= {f"ema_norms.{rank}": vector for rank, vector in enumerate(self._kept(self.ema.norms))}
            out["ema_steps"] = self.ema.steps
        if self.scale.used:
            out["loss_scale"] = self.scale.state
        norms = self._kept(batchnorm.norm_state(self.net))
        return out | {f"norms.{rank}": vector for rank, vector in enumerate(norms)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load a state from `tensors`; statistics are the rank's own, or merged if the number of ranks has changed."""
        self.net.load_state_dict(part(tensors, "model."))
        optimizers.load_optimizer_tensors(self.optimizer, part(tensors, "optim."), self.queued)
        if "loss_scale" in tensors and self.scale.used:
            self.scale.state.copy_(tensors["loss_scale"])
        norms = self._own(part(tensors, "norms."))
        if norms is not None:
            batchnorm.load_norm_state(self.net, norms)
        if self.ema:
            averaged = self._own(part(tensors, "ema_norms."))  # missing in old checkpoints
            averaged = batchnorm.norm_state(self.net) if averaged is None else averaged
            steps = int(tensors["ema_steps"]) if "ema_steps" in tensors else LONG_AGO
            self.ema.load(part(tensors, "ema."), averaged, steps)

    def _own(self, norms: dict[str, Tensor]) -> Tensor | None:
        """Return this rank's vector of `norms`, or all of them merged if they are of another number of ranks."""
        if not norms:
            return None
        if len(norms) == self.world:
            return norms[str(self.rank)].to(self.device)
        merged = batchnorm.merge_norm_states(torch.stack([norms[k] for k in sorted(norms, key=int)]), self.net)
        return merged.to(self.device)

    def averaged(self) -> nn.Module:
        """Return a copy to evaluate and ship: averaged weights and statistics if kept, else the last ones, with the
        statistics of all ranks merged. A collective; training state does not change.
        """
        net = copy.deepcopy(self.net).eval()
        if self.ema:
            self.ema.copy_to(net)
        norms, at = self.ema.norms if self.ema else batchnorm.norm_state(net), 0
        for layers in batchnorm.layers_at_once(net, GATHERED // self.world):
            size = batchnorm.norm_state(layers).numel()
            everyone = self._of_all_ranks(norms[at : at + size])
            batchnorm.load_norm_state(layers, batchnorm.merge_norm_states(everyone, layers))
            at += size
        return net

    def _kept(self, mine: Tensor) -> Sequence[Tensor]:
        """Return the statistics `[K]` of every rank, in order of rank, on the CPU of rank 0, which writes them; an
        empty list on the other ranks, and for a network without BatchNorm. A collective."""
        if self.world == 1 or not mine.numel():
            return [mine] if mine.numel() else []
        everyone = mine.new_empty((self.world, mine.numel()), device="cpu") if self.rank == 0 else None
        width = max(1, GATHERED // self.world)
        for at in range(0, mine.numel(), width):
            found = self._of_all_ranks(mine[at : at + width])
            if everyone is not None:
                everyone[:, at : at + width] = found
        return [] if everyone is None else everyone.unbind()

    def _of_all_ranks(self, mine: Tensor) -> Tensor:
        """Return `mine` `[k]` of every rank, `[world, k]`. A collective.

        All ranks receive it, even if only one needs it: over a ring whose links are already open, this is as fast as
        sending to that one.
        """
        if self.world == 1:
            return mine[None]
        everyone = mine.new_empty((self.world, mine.numel()))
        dist.all_gather(list(everyone), mine.contiguous())
        return everyone


# ------------------------------------------------------------------------------------------------ helpers


def mean_over_ranks(tensors: Sequence[Tensor], world: int, compress: str = "none", early: bool = False) -> None:
    """Average `tensors` over ranks in place, about BUCKET numbers at a time. A collective.

    They are divided by `world` after the sum, or before it with `early` and as bfloat16, whose sum may overflow.
    """
    bucket: list[Tensor] = []
    for number, tensor in enumerate(tensors):
        bucket.append(tensor)
        if number + 1 < len(tensors) and sum(one.numel() for one in bucket) < BUCKET:
            continue
        flat = torch.cat([one.reshape(-1) for one in bucket])
        before = early or compress == "bf16"
        flat = flat / world if before else flat
        flat = flat.bfloat16() if compress == "bf16" else flat
        dist.all_reduce(flat)
        flat = flat if before else flat / world
        for one, mean in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
            one.copy_(mean.view_as(one))
        bucket = []


@contextlib.contextmanager
def norms_in_eval(net: nn.Module) -> Iterator[None]:
    """Make BatchNorm use its running statistics, and leave them unchanged, within the block."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries of `tensors` whose names start with `prefix`, with the prefix removed."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _has_3d(net: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv3d) for m in net.modules())
