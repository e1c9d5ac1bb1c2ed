"""Path sampling: some steps train the weights of one path of a mixed supernet, others train the alphas of its paths.

ProxylessNAS (arXiv 1812.00332). `step` draws a path (uniform in the warm-up, else by the softmax of the alphas) and
trains its weights. `search_step`, on samples held out of training, moves the alphas by Adam: along the gradient through
binary gates ("two" candidates of a block at a time, or all of them, "full_v2") or by REINFORCE. Paths are a function of
(seed, step), so all ranks draw the same ones, and the gradients of the alphas are averaged over ranks: alphas stay
equal bit by bit. As published, a skipped block keeps its alphas, and BatchNorm uses batch statistics in both kinds of
steps.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimray.models.supernets.mixed import Gates, MixedNet, Path
from slimray.train import optimizers
from slimray.train.methods.method import OnDevice, Piece, Replica, Setup, StepReport, mean_over_ranks, part

BASELINE_STEP = 0.99  # published: the baseline moves 99 % of the way to each new reward, so it is hardly an average
MUL_LOG_SCALE = 0.2  # alpha of the published mul#log


@dataclass(frozen=True)
class Goal:
    """Costs of paths, and their part in the loss; latencies in ms or MACs, all in one unit.

    `fixed` is the cost shared by all paths, `edges[i][k]` that of candidate k of mixed block i, 0 for a skipped block.
    `add_linear`: loss + weight x (E - ref) / ref. `mul_log`: 0.2 x loss x (log E / log ref)^weight, for which costs
    must be above 1. E is the expected cost, the sum of p x cost over blocks and candidates, plus `fixed`.
    """

    regulariser: Literal["add_linear", "mul_log"]
    weight: float
    ref: float
    fixed: float
    edges: tuple[tuple[float, ...], ...]

    def of(self, path: Sequence[int]) -> float:
        """Return the cost of a path."""
        return self.fixed + sum(costs[number] for costs, number in zip(self.edges, path, strict=True))

    def expected(self, alphas: Sequence[Tensor]) -> Tensor:
        """Return the expected cost under the softmax of `alphas`, a scalar with a gradient."""
        parts = [(one.softmax(0) * one.new_tensor(costs)).sum() for one, costs in zip(alphas, self.edges, strict=True)]
        return torch.stack(parts).sum() + self.fixed

    def joined(self, loss: Tensor, expected: Tensor) -> Tensor:
        """Return the loss of the task combined with the expected cost."""
        if self.regulariser == "mul_log":
            return MUL_LOG_SCALE * loss * (expected.log() / math.log(self.ref)) ** self.weight
        return loss + self.weight * (expected - self.ref) / self.ref

    def reward(self, accuracy: float, cost: float) -> float:
        """Return the reward that REINFORCE maximises: accuracy (0-1) x (ref / cost)^weight."""
        return accuracy * (self.ref / cost) ** self.weight


@dataclass(frozen=True)
class PathSampling:
    """Training of paths and of their alphas. Without a `goal` it is the warm-up: uniform paths, alphas unchanged.

    The last `num_held` rows of the training index train the alphas: a batch of them after every `every` steps on the
    others, from epoch `first_epoch` on. `nets` is the number of paths that REINFORCE tries per batch.
    """

    goal: Goal | None = None
    gradient: Literal["two", "full_v2", "reinforce"] = "two"
    lr: float = 1e-3
    nets: int = 10
    num_held: int = 0
    every: int = 5
    first_epoch: int = 1

    def replica(self, net: nn.Module, build: Callable[[], nn.Module], setup: Setup) -> "PathReplica":
        """Build the replica of one rank around the mixed supernet `net`."""
        return PathReplica(cast(MixedNet, net), self, setup)

    def held(self, epoch: int) -> tuple[int, int]:
        """Hold out `num_held` rows, on which alphas are trained once weights have trained for `first_epoch` epochs."""
        return self.num_held, self.every if epoch >= self.first_epoch else 0


class PathReplica(Replica):
    """A replica of a `MixedNet`, with its alphas and their Adam optimizer."""

    def __init__(self, net: MixedNet, method: PathSampling, setup: Setup):
        super().__init__(net, setup)
        self.method = method
        self.alphas = [block.alphas for block in net.mixed]
        self.adam = torch.optim.Adam(self.alphas, lr=method.lr, betas=(0.0, 0.999))
        self.baseline = torch.full((), float("nan"), device=self.device)  # of rewards; nan until there is one

    # ------------------------------------------------------------------------------------------- weights

    def step(
        self,
        pieces: Sequence[Piece],
        total: float,
        lr: float,
        seed: tuple[int, int],
        frozen: frozenset[int] = frozenset(),
        held: bool = False,
    ) -> StepReport:
        """Train the weights of one path, or the alphas on samples `held` out; arguments as in `Replica.step`."""
        if held:
            return self.search_step(pieces, total, seed)
        return super().step(pieces, total, lr, seed, frozen)

    def _draw(self, seed: tuple[int, int]) -> Path:
        return self._draw_path(random.Random(f"{seed[0]}-{seed[1]}-path"))

    def _draw_path(self, rng: random.Random) -> Path:
        """Draw a path by the alphas, or uniformly in the warm-up."""
        if self.method.goal is None:
            return tuple(rng.randrange(len(alphas)) for alphas in self.alphas)
        return tuple(rng.choices(range(len(one)), one)[0] for one in self.probabilities())

    def probabilities(self) -> list[list[float]]:
        """Return the probability of each candidate of each mixed block."""
        return [alphas.double().softmax(0).tolist() for alphas in self.alphas]

    def _passes(self, batch: OnDevice, choice: Path) -> Iterator[Tensor]:
        yield self._losses(self._logits(batch, choice), batch)

    def _logits(self, batch: OnDevice, path: Path, gates: Sequence[Gates] | None = None) -> Tensor:
        with self._autocast():
            return self.net(batch.x, path, gates)

    def _reduce(self, early: bool = True) -> None:
        """Reduce as `Replica._reduce`: all ranks have the same path, and so gradients for the same parameters."""
        super()._reduce(early)

    # -------------------------------------------------------------------------------------------- alphas

    def search_step(self, pieces: Sequence[Piece], total: float, seed: tuple[int, int]) -> StepReport:
        """Take a step of the alphas on held-out samples; a collective, arguments as in `step`. Weights do not change.

        All ranks drop a gradient that is not finite.
        """
        return self._attempt(seed, lambda: (*self._search(pieces, total, seed), []))

    def _search(self, pieces: Sequence[Piece], total: float, seed: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Move the alphas if the gradient is finite; return that flag, and the loss on this rank.

        Waits for the device: paths are drawn on the CPU from the current alphas.
        """
        rng = random.Random(f"{seed[0]}-{seed[1]}-search")
        pairs: list[tuple[int, ...]] = []
        if self.method.gradient == "reinforce":
            loss_sum, gradients = self._reinforce(pieces, rng)
        else:
            members = [tuple(range(len(one))) for one in self.alphas]
            if self.method.gradient == "two":
                pairs = members = [draw_two(one, rng) for one in self.probabilities()]
            loss_sum, gradients = self._through_gates(pieces, total, members, rng)
        finite = all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)
        for alphas, gradient in zip(self.alphas, gradients, strict=True):
            alphas.grad = gradient if finite else None
        before = [alphas.clone() for alphas in self.alphas]
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for number, pair in enumerate(pairs) if finite else ():
            rescale(self.alphas[number], before[number], pair)
        found = torch.tensor([float(finite), loss_sum], dtype=torch.float64, device=self.device)
        return found[0] > 0, found[1]

    def _through_gates(
        self, pieces: Sequence[Piece], total: float, members: Sequence[tuple[int, ...]], rng: random.Random
    ) -> tuple[float, list[Tensor | None]]:
        """Return the loss on this rank and the gradients of the joined loss; each block weighs its `members`."""
        goal = cast(Goal, self.method.goal)
        alphas = [one.detach().clone().requires_grad_() for one in self.alphas]
        chances = [one[list(which)].softmax(0) for one, which in zip(alphas, members, strict=True)]
        path = tuple(rng.choices(which, one.tolist())[0] for which, one in zip(members, chances, strict=True))
        gates = [Gates(which, one.detach().requires_grad_()) for which, one in zip(members, chances, strict=True)]
        opened = [gate.probabilities for gate in gates]
        summed, loss_sum = [torch.zeros_like(one) for one in opened], 0.0
        for piece in pieces:
            if not len(piece.data):
                continue
            batch = self._on_device(piece)
            loss = self._losses(self._logits(batch, path, gates), batch).sum()
            loss_sum += float(loss.detach())
            scale = self.scale.value
            found = torch.autograd.grad(loss * (scale * self.world / total), opened, allow_unused=True)
            for so_far, gradient in zip(summed, found, strict=True):
                so_far.add_(0 if gradient is None else gradient / scale)
        mean = summed[0].new_tensor(loss_sum * self.world / total)
        if self.world > 1:
            mean_over_ranks([*summed, mean], self.world, early=True)
        mean.requires_grad_()
        d_mean, *d_cost = torch.autograd.grad(goal.joined(mean, goal.expected(alphas)), [mean, *alphas])
        d_task = torch.autograd.grad(chances, alphas, [d_mean * one for one in summed])
        nothing = [block.is_nothing(number) for block, number in zip(self._net.mixed, path, strict=True)]
        found = zip(nothing, d_task, d_cost, strict=True)
        return loss_sum, [None if skipped else task + cost for skipped, task, cost in found]

    @torch.no_grad()
    def _reinforce(self, pieces: Sequence[Piece], rng: random.Random) -> tuple[float, list[Tensor | None]]:
        """Return the loss on this rank, and gradients that make paths with rewards above the baseline likelier."""
        goal, paths = cast(Goal, self.method.goal), [self._draw_path(rng) for _ in range(self.method.nets)]
        loss_sum, hits = 0.0, torch.zeros(len(paths), dtype=torch.float64, device=self.device)
        count, how_right = hits.new_tensor([sum(len(piece.data) for piece in pieces)]), self.setup.task.hits
        assert how_right is not None  # the job was refused otherwise
        for number, path in enumerate(paths):
            for piece in pieces:
                batch = self._on_device(piece)
                if batch.labels is not None:
                    logits = self._logits(batch, path)
                    loss_sum += float(self._losses(logits, batch).sum()) / len(paths)
                    hits[number] += how_right(logits, batch.labels).sum()
        if self.world > 1:
            dist.all_reduce(hits)
            dist.all_reduce(count)
        rates = (hits / count).tolist()
        rewards = [goal.reward(rate, goal.of(path)) for rate, path in zip(rates, paths, strict=True)]
        mean, before = sum(rewards) / len(rewards), float(self.baseline)
        baseline = mean if math.isnan(before) else before + BASELINE_STEP * (mean - before)
        self.baseline.fill_(baseline)
        gradients: list[Tensor | None] = []
        for place, alphas in enumerate(self.alphas):
            drawn = torch.zeros(len(paths), len(alphas), dtype=alphas.dtype, device=self.device)
            drawn[range(len(paths)), [path[place] for path in paths]] = 1
            likelier = drawn - alphas.softmax(0)  # gradient of the log probability, per path
            gradients.append(-(drawn.new_tensor(rewards) - baseline) @ likelier / len(paths))
        return loss_sum, gradients

    @property
    def _net(self) -> MixedNet:
        return cast(MixedNet, self.net)

    def numbers(self) -> dict[str, float]:
        """Return the state of the search for metrics: expected cost, and mean entropy of the choices (0-1 of its
        maximum)."""
        if self.method.goal is None:
            return super().numbers()
        with torch.no_grad():
            cost = float(self.method.goal.expected(self.alphas))
        found = {"search/expected_cost": cost, "search/entropy": entropy(self.probabilities())}
        return super().numbers() | found

    # --------------------------------------------------------------------------------------------- state

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole training state by name; the alphas are among the buffers of the model."""
        out = {f"adam.{name}": value for name, value in optimizers.optimizer_tensors(self.adam).items()}
        return super().tensors() | out | {"baseline": self.baseline}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load a state from `tensors`."""
        super().load(tensors)
        optimizers.load_optimizer_tensors(self.adam, part(tensors, "adam."))
        self.baseline.copy_(tensors["baseline"])


def draw_two(probabilities: Sequence[float], rng: random.Random) -> tuple[int, int]:
    """Draw two different numbers by `probabilities`, one after the other, without replacement."""
    first = rng.choices(range(len(probabilities)), probabilities)[0]
    rest = [0.0 if number == first else chance for number, chance in enumerate(probabilities)]
    if not sum(rest):  # all others have gone to 0 in floating point
        rest = [float(number != first) for number in range(len(probabilities))]
    return first, rng.choices(range(len(probabilities)), rest)[0]


@torch.no_grad()
def rescale(alphas: Tensor, before: Tensor, pair: Sequence[int]) -> None:
    """Shift the two alphas of `pair` in place so that their joint probability among all is the same as `before`."""
    which = list(pair)
    alphas[which] -= alphas[which].logsumexp(0) - before[which].logsumexp(0)


def entropy(probabilities: Sequence[Sequence[float]]) -> float:
    """Return the mean entropy of the choices over blocks, 0-1: 1 where all candidates are equally likely."""
    parts = [-sum(p * math.log(p) for p in one if p > 0) / math.log(len(one)) for one in probabilities]
    return sum(parts) / len(parts)
