"""The epoch plan: which sample is consumed at which step by which rank, as pure functions.

A `Plan` puts the samples of a pass at positions, in windows, one per step; there are two kinds. By count, an epoch is a
permutation of the split's index that depends only on (seed, epoch), computed for the requested positions
(permutation.py). Step s consumes the positions s*B to (s+1)*B, where B is the global batch; of a window of n positions,
rank r of w takes floor(r*n/w) to floor((r+1)*n/w). By tokens (token_plan.py), samples of similar length are grouped in
bags with a maximum number of tokens, and a step consumes a number of bags. Progress is therefore (epoch, step), and a
resume on another number of workers repeats and skips nothing. A `Phase` is one pass over one split (a training epoch, a
validation, an evaluation); the data pipeline streams a list of phases as numbered blocks, and only this file knows the
numbering. numpy only.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from slimray.data.permutation import permuted
from slimray.data.token_plan import Bags, TokenPlan, ceil_div

RANKS_OF_FEEDER = 64
RANKS_AT_ONCE = 8  # a block holds one microbatch for every 8 ranks of its feeder, the ranks of a node
BLOCK_BYTES = 512 << 20  # limit on a block; a decoding process holds it twice
MIN_USED = 0.8  # minimum fraction of the free CPUs that executions must get
SHUFFLE = 3  # version of the shuffling of new runs, by position; runs that began with 1 or 2 (arrays) keep theirs


class Plan(Protocol):
    """The sample at each position of a pass, and the positions that each rank consumes at each step."""

    @property
    def num_steps(self) -> int:
        """Number of steps of the whole pass, including a short last one."""
        ...

    @property
    def num_positions(self) -> int:
        """Number of positions of the whole pass."""
        ...

    def share(self, step: int) -> float:
        """Return the size of the window of `step` as a share of a full one: below 1 for a short last window."""
        ...

    def rank_slice(self, step: int, rank: int, world: int) -> tuple[int, int]:
        """Return the positions [lo, hi) that `rank` of `world` consumes at `step`; may be empty."""
        ...

    def microbatches(self, step: int, rank: int, world: int, per_worker: int) -> list[tuple[int, int]]:
        """Return the rank's slice cut into pieces, the same number on every rank, with empty ones at the end."""
        ...

    def samples(self, lo: int, hi: int, seed: int, by_length: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the sample ids at positions [lo, hi); `by_length` gives the rows of the index, short to long."""
        ...


@dataclass(frozen=True)
class Phase:
    """One pass over one split: `num_samples` rows in windows of `batch`, from `first_step` on.

    With `shuffle` the order is the epoch's permutation, otherwise that of the index; `recipe` is the plain dict of the
    per-sample recipe that the decoding side reads. `epoch` keys shuffling and augmentation.

    With `held`, that many samples at the end of the split are held out, and a window of them follows every `every` full
    windows of the others: an architecture search learns from them. Over the epochs, all are used equally often.

    `drop_last` omits a last window that is not full; `limit` ends the pass after that many positions (0: no limit).

    With `bags`, a window consists of `batch` bags, nothing is held out and `limit` does not apply. `steps` ends the
    pass after that many windows (0: no limit).

    `version` is that of the shuffling: 1, 2 or SHUFFLE.
    """

    name: str
    split: str
    epoch: int
    num_samples: int
    batch: int
    shuffle: bool
    recipe: dict[str, Any]
    first_step: int = 0
    held: int = 0
    every: int = 0
    drop_last: bool = False
    limit: int = 0
    bags: Bags | None = None
    version: int = 1
    steps: int = 0

    @property
    def plan(self) -> Plan:
        """The plan that places its samples."""
        if self.bags is None:
            return CountPlan(self)
        return TokenPlan(self.bags, self.batch, self.epoch, self.shuffle, self.drop_last, self.version)

    @property
    def num_steps(self) -> int:
        """Number of steps of the whole pass, including a short last window."""
        count = ceil_div(self.num_positions, self.batch) if self.bags is None else self.plan.num_steps
        return min(count, self.steps) if self.steps else count

    @property
    def num_positions(self) -> int:
        """Number of positions of the whole pass, including those of held-out windows."""
        if self.bags is not None:
            return self.plan.num_positions
        count = self.num_samples - self.held + self.num_held_windows * self.batch
        count = count // self.batch * self.batch if self.drop_last else count
        return min(count, self.limit) if self.limit else count

    @property
    def num_held_windows(self) -> int:
        """Number of windows of held-out samples in the pass."""
        return (self.num_samples - self.held) // (self.every * self.batch) if self.every else 0

    def is_held(self, step: int) -> bool:
        """Return whether the window of `step` consists of held-out samples."""
        turn, place = divmod(step, self.every + 1)
        return turn < self.num_held_windows and place == self.every

    def share(self, step: int) -> float:
        """Return the size of the window of `step` as a share of a full one: below 1 for a short last window."""
        if self.bags is not None:
            return self.plan.share(step)
        return min(self.batch, self.num_positions - step * self.batch) / self.batch

    def num_trained(self, step: int) -> int:
        """Return the number of samples, held-out ones excluded, in the windows before `step`.

        With `bags`, return the number of bags instead, because learning rates then follow steps.
        """
        if self.bags is not None:
            return min(step * self.batch, self.bags.count)
        windows = min(step // (self.every + 1), self.num_held_windows) if self.every else 0
        return min((step - windows) * self.batch, self.num_samples - self.held)


@dataclass(frozen=True)
class Block:
    """The input of one decoding task: positions `lo` to `hi` of phase number `phase`, all for one rank within one step,
    and the same rank's positions of `later` steps, each (step, lo, hi)."""

    phase: int
    step: int
    rank: int
    lo: int
    hi: int
    later: tuple[tuple[int, int, int], ...] = ()

    @property
    def pieces(self) -> tuple[tuple[int, int, int], ...]:
        """Its microbatches in order, each (step, lo, hi) for the positions [lo, hi)."""
        return ((self.step, self.lo, self.hi), *self.later)

    @property
    def num_rows(self) -> int:
        """Number of samples of all its microbatches."""
        return sum(hi - lo for _, lo, hi in self.pieces)


@lru_cache(maxsize=4)
def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Return the sample ids of an epoch in order, int64 `[num_samples]`, read-only, a function of its arguments."""
    if shuffle:
        order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(num_samples)
    else:
        order = np.arange(num_samples)
    order.setflags(write=False)
    return order


def pass_order(phase: Phase, seed: int) -> np.ndarray:
    """Return the sample ids of a pass by position, int64 `[num_positions]`, a function of its arguments."""
    return CountPlan(phase).samples(0, phase.num_positions, seed)


@dataclass(frozen=True)
class CountPlan:
    """Windows of `phase.batch` samples."""

    phase: Phase

    @property
    def num_steps(self) -> int:
        """Number of steps of the whole pass, including a short last window."""
        return self.phase.num_steps

    @property
    def num_positions(self) -> int:
        """Number of positions of the whole pass, including those of held-out windows."""
        return self.phase.num_positions

    def share(self, step: int) -> float:
        """Return the size of the window of `step` as a share of a full one."""
        return self.phase.share(step)

    def rank_slice(self, step: int, rank: int, world: int) -> tuple[int, int]:
        """Return the positions [lo, hi) that `rank` of `world` consumes at `step`; may be empty."""
        start = step * self.phase.batch
        count = min(self.phase.batch, self.num_positions - start)
        return start + rank * count // world, start + (rank + 1) * count // world

    def microbatches(self, step: int, rank: int, world: int, per_worker: int) -> list[tuple[int, int]]:
        """Return the rank's slice cut into pieces of at most `per_worker` positions."""
        count = min(self.phase.batch, self.num_positions - step * self.phase.batch)
        pieces = ceil_div(ceil_div(count, world), per_worker)
        lo, hi = self.rank_slice(step, rank, world)
        return [(min(hi, lo + i * per_worker), min(hi, lo + (i + 1) * per_worker)) for i in range(pieces)]

    def samples(self, lo: int, hi: int, seed: int, by_length: Callable[[], np.ndarray] | None = None) -> np.ndarray:
        """Return the sample ids at positions [lo, hi); `by_length` is ignored."""
        phase, positions = self.phase, np.arange(lo, hi)
        num_trained, key = phase.num_samples - phase.held, (seed, phase.epoch)
        if not phase.num_held_windows:
            return self._shuffled(positions, num_trained, *key)
        mixed = (phase.every + 1) * phase.batch  # positions from one held-out window to the next
        turn, place = np.divmod(positions, mixed)
        place -= phase.every * phase.batch
        is_held = (turn < phase.num_held_windows) & (place >= 0)
        trained = positions - np.minimum(turn, phase.num_held_windows) * phase.batch
        ids = np.empty(len(positions), np.int64)
        ids[~is_held] = self._shuffled(trained[~is_held], num_trained, *key)
        row = (phase.epoch * phase.num_held_windows + turn) * phase.batch + place  # in an endless row of permutations
        for number in np.unique(row[is_held] // phase.held):
            here = is_held & (row // phase.held == number)
            ids[here] = num_trained + self._shuffled(row[here] % phase.held, phase.held, seed + 1, int(number), True)
        return ids

    def _shuffled(
        self, places: np.ndarray, count: int, seed: int, epoch: int, shuffle: bool | None = None
    ) -> np.ndarray:
        """Return the numbers at `places` of the `count` numbers from 0, shuffled if the pass is."""
        if not (self.phase.shuffle if shuffle is None else shuffle):
            return places
        if self.phase.version == 1:
            return epoch_order(count, seed, epoch)[places]
        return permuted(places, count, (seed, epoch))


def rank_slice(phase: Phase, step: int, rank: int, world: int) -> tuple[int, int]:
    """Return the positions [lo, hi) of the plan that `rank` of `world` consumes at `step`; may be empty."""
    return phase.plan.rank_slice(step, rank, world)


def microbatches(phase: Phase, step: int, rank: int, world: int, per_worker: int) -> list[tuple[int, int]]:
    """Return the rank's slice cut into pieces of at most `per_worker` positions, or into bags.

    All ranks get the same number of pieces, with empty ones at the end of a shorter slice, so that all ranks take part
    in every collective.
    """
    return phase.plan.microbatches(step, rank, world, per_worker)


def blocks(
    phases: Sequence[Phase], world: int, ranks: Sequence[int], max_rows: int, sizes: Sequence[int] = ()
) -> Iterator[Block]:
    """Yield all blocks of `phases` for `ranks`, step by step, the first pieces of all ranks first.

    A block of phase number i consists of up to `sizes[i]` consecutive pieces of its rank, by default one; it never
    extends beyond the phase.
    """
    for number, phase in enumerate(phases):
        turns = (
            (step, cuts)
            for step in range(phase.first_step, phase.num_steps)
            for cuts in zip(*(microbatches(phase, step, rank, world, max_rows) for rank in ranks), strict=True)
        )
        while some := list(itertools.islice(turns, sizes[number] if sizes else 1)):
            for place, rank in enumerate(ranks):
                pieces = [(step, *cuts[place]) for step, cuts in some if cuts[place][0] < cuts[place][1]]
                if pieces:
                    step, lo, hi = pieces[0]
                    yield Block(number, step, rank, lo, hi, tuple(pieces[1:]))


def block_size(num_ranks: int, num_bytes: int) -> int:
    """Return how many consecutive microbatches of a rank, of `num_bytes` each, a feeder of `num_ranks` gets per block.

    One for every 8 of its ranks, so that the load of its process per step does not grow with them, but several
    microbatches never exceed BLOCK_BYTES.
    """
    return max(1, min(ceil_div(num_ranks, RANKS_AT_ONCE), BLOCK_BYTES // max(1, num_bytes)))


def num_feeders(world: int, free_cpus: Sequence[float]) -> int:
    """Return how many feeder actors serve `world` ranks: one per 64 ranks, fewer if that left too many CPUs idle.

    `free_cpus` are those of each node that no worker holds. Ray divides a node's CPUs among all executions in whole
    numbers, and each feeder has two executions while one follows the other; a node with fewer CPUs gives them none.
    """
    free = [int(count) for count in free_cpus if count >= 1]
    for num in range(ceil_div(world, RANKS_OF_FEEDER), 1, -1):
        if 2 * num * sum(count // (2 * num) for count in free) >= MIN_USED * sum(free) > 0:
            return num
    return 1


def feeder_nodes(world: int, num: int, node_of: Mapping[int, str]) -> list[str]:
    """Return the node on which each of `num` feeders should run: that of most of its ranks.

    "" stands for a node that is not known, and for a single feeder, which runs on the node of rank 0. `node_of` maps
    ranks to nodes. Thus the load of a node by feeders does not grow with the number of ranks.
    """
    if num == 1:
        return [""]
    groups = ([node_of.get(rank, "") for rank in feeder_ranks(world, num, group)] for group in range(num))
    return [max(dict.fromkeys(nodes), key=nodes.count) for nodes in groups]


def feeder_ranks(world: int, num: int, group: int) -> range:
    """Return the ranks that feeder `group` of `num` serves."""
    return range(group * world // num, (group + 1) * world // num)
