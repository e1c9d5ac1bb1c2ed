"""The epoch plan: which sample is consumed at which step by which rank, as pure functions.

A `Plan` puts the samples of a pass at positions, in windows, one for each step; there are two. By count, an epoch is a
permutation of the split's index that depends on (seed, epoch) only, computed for the positions that are asked for
(permutation.py). Step s consumes the positions s*B to (s+1)*B, B the global batch; of a window of n positions rank r of
w takes floor(r*n/w) to floor((r+1)*n/w). By tokens (token_plan.py), samples of similar length lie in bags of at most so
many tokens, and a step consumes so many bags. Progress is therefore (epoch, step), and a resume on another number of
workers repeats and skips nothing. A `Phase` is one pass over one split (a training epoch, a validation, an evaluation);
the data pipeline streams a list of phases as numbered blocks, and this file alone knows the numbering. numpy only.
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
RANKS_AT_ONCE = 8  # of whose microbatches a block holds one: those of a node
BLOCK_BYTES = 512 << 20  # a decoding process holds a block twice
MIN_USED = 0.8  # of the free CPUs that executions are to get
SHUFFLE = 3  # how new runs shuffle: by position; one that began with arrays (1; of samples in bags 2) ends with them


class Plan(Protocol):
    """Which samples lie at which positions of a pass, and which positions a rank consumes at a step."""

    @property
    def num_steps(self) -> int:
        """Steps of the whole pass, a short last one included."""
        ...

    @property
    def num_positions(self) -> int:
        """Positions of the whole pass."""
        ...

    def share(self, step: int) -> float:
        """Return how much of a full window that of `step` is: below 1 for a short last one."""
        ...

    def rank_slice(self, step: int, rank: int, world: int) -> tuple[int, int]:
        """Return the positions [lo, hi) that `rank` of `world` consumes at `step`; may be empty."""
        ...

    def microbatches(self, step: int, rank: int, world: int, per_worker: int) -> list[tuple[int, int]]:
        """Return the rank's slice cut into pieces, equally many on every rank, empty ones at the end."""
        ...

    def samples(self, lo: int, hi: int, seed: int, by_length: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the sample ids at positions [lo, hi); `by_length` gives the rows of the index, short to long."""
        ...


@dataclass(frozen=True)
class Phase:
    """One pass over one split: `num_samples` rows in windows of `batch`, from `first_step` on.

    `shuffle` says whether the order is the epoch's permutation or the index as it stands; `recipe` is the plain dict
    of the per-sample recipe that the decoding side reads. `epoch` keys shuffling and augmentation.

    With `held` the last so many samples of the split are left out, but for a window of them after every `every` full
    windows of the others: what an architecture search learns from. Each is used equally often, over the epochs.

    `drop_last` leaves out a last window that is not full; `limit` ends the pass after so many positions (0: none).

    With `bags` a window is `batch` of them, none is held out and there is no limit. `steps` ends the pass after so many
    windows (0: none).

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
        """Where its samples lie."""
        if self.bags is None:
            return CountPlan(self)
        return TokenPlan(self.bags, self.batch, self.epoch, self.shuffle, self.drop_last, self.version)

    @property
    def num_steps(self) -> int:
        """Steps of the whole pass, a short last window included."""
        count = ceil_div(self.num_positions, self.batch) if self.bags is None else self.plan.num_steps
        return min(count, self.steps) if self.steps else count

    @property
    def num_positions(self) -> int:
        """Positions of the whole pass, those of held-out windows included."""
        if self.bags is not None:
            return self.plan.num_positions
        count = self.num_samples - self.held + self.num_held_windows * self.batch
        count = count // self.batch * self.batch if self.drop_last else count
        return min(count, self.limit) if self.limit else count

    @property
    def num_held_windows(self) -> int:
        """Windows of held-out samples in the pass."""
        return (self.num_samples - self.held) // (self.every * self.batch) if self.every else 0

    def is_held(self, step: int) -> bool:
        """Return whether the window of `step` is of held-out samples."""
        turn, place = divmod(step, self.every + 1)
        return turn < self.num_held_windows and place == self.every

    def share(self, step: int) -> float:
        """Return the positions of the window of `step` as a share of a full one: below 1 for a short last window."""
        if self.bags is not None:
            return self.plan.share(step)
        return min(self.batch, self.num_positions - step * self.batch) / self.batch

    def num_trained(self, step: int) -> int:
        """Samples, of those not held out, in the windows before `step`; with `bags` bags, as rates follow steps."""
        if self.bags is not None:
            return min(step * self.batch, self.bags.count)
        windows = min(step // (self.every + 1), self.num_held_windows) if self.every else 0
        return min((step - windows) * self.batch, self.num_samples - self.held)


@dataclass(frozen=True)
class Block:
    """Positions `lo` to `hi` of phase number `phase`, all for one rank within one step, and what `later` steps have for
    that rank, (step, lo, hi) each: one decoding task."""

    phase: int
    step: int
    rank: int
    lo: int
    hi: int
    later: tuple[tuple[int, int, int], ...] = ()

    @property
    def pieces(self) -> tuple[tuple[int, int, int], ...]:
        """Its microbatches in order: step, and the positions [lo, hi)."""
        return ((self.step, self.lo, self.hi), *self.later)

    @property
    def num_rows(self) -> int:
        """Samples of all its microbatches."""
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
        """Steps of the whole pass, a short last window included."""
        return self.phase.num_steps

    @property
    def num_positions(self) -> int:
        """Positions of the whole pass, those of held-out windows included."""
        return self.phase.num_positions

    def share(self, step: int) -> float:
        """Return the positions of the window of `step` as a share of a full one."""
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
        """Return the sample ids at positions [lo, hi); their lengths play no part."""
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
        row = (phase.epoch * phase.num_held_windows + turn) * phase.batch + place  # of permutations without an end
        for number in np.unique(row[is_held] // phase.held):
            here = is_held & (row // phase.held == number)
            ids[here] = num_trained + self._shuffled(row[here] % phase.held, phase.held, seed + 1, int(number), True)
        return ids

    def _shuffled(
        self, places: np.ndarray, count: int, seed: int, epoch: int, shuffle: bool | None = None
    ) -> np.ndarray:
        """Return what lies at `places` of the `count` numbers from 0, shuffled where the pass is."""
        if not (self.phase.shuffle if shuffle is None else shuffle):
            return places
        if self.phase.version == 1:
            return epoch_order(count, seed, epoch)[places]
        return permuted(places, count, (seed, epoch))


def rank_slice(phase: Phase, step: int, rank: int, world: int) -> tuple[int, int]:
    """Return the positions [lo, hi) of the plan that `rank` of `world` consumes at `step`; may be empty."""
    return phase.plan.rank_slice(step, rank, world)


def microbatches(phase: Phase, step: int, rank: int, world: int, per_worker: int) -> list[tuple[int, int]]:
    """Return the rank's slice cut into pieces of at most `per_worker` positions, or into bags; every rank gets equally
    many pieces.

    A rank whose slice is shorter gets empty pieces at its end, so that all ranks take part in every collective.
    """
    return phase.plan.microbatches(step, rank, world, per_worker)


def blocks(
    phases: Sequence[Phase], world: int, ranks: Sequence[int], max_rows: int, sizes: Sequence[int] = ()
) -> Iterator[Block]:
    """Yield all blocks of `phases` for `ranks`, step by step, the first pieces of all ranks first.

    A block of phase number i is of up to `sizes[i]` consecutive pieces of its rank, by default of one; it ends with the
    phase.
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
    """Return how many consecutive microbatches of a rank, of `num_bytes` each, are a block of a feeder of `num_ranks`.

    As many as it has times 8 ranks, so that what passes through its process at a step does not grow with them; but no
    more than BLOCK_BYTES, unless it is one.
    """
    return max(1, min(ceil_div(num_ranks, RANKS_AT_ONCE), BLOCK_BYTES // max(1, num_bytes)))


def num_feeders(world: int, free_cpus: Sequence[float]) -> int:
    """How many feeder actors serve `world` ranks: one per 64, as far as that leaves few CPUs idle.

    `free_cpus` are those of each node that no worker holds. Ray shares a node's CPUs out among all executions in whole
    numbers, and each feeder has two where one follows the other: from a node with fewer CPUs they get none.
    """
    free = [int(count) for count in free_cpus if count >= 1]
    for num in range(ceil_div(world, RANKS_OF_FEEDER), 1, -1):
        if 2 * num * sum(count // (2 * num) for count in free) >= MIN_USED * sum(free) > 0:
            return num
    return 1


def feeder_nodes(world: int, num: int, node_of: Mapping[int, str]) -> list[str]:
    """Return the node on which each of `num` feeders is to run: that of most of its ranks, "" where that is not known,
    and for the only one, which runs where rank 0 does.

    `node_of` are the nodes of ranks. So what a node has to do for feeders does not grow with the ranks.
    """
    if num == 1:
        return [""]
    groups = ([node_of.get(rank, "") for rank in feeder_ranks(world, num, group)] for group in range(num))
    return [max(dict.fromkeys(nodes), key=nodes.count) for nodes in groups]


def feeder_ranks(world: int, num: int, group: int) -> range:
    """Return the ranks that feeder `group` of `num` serves."""
    return range(group * world // num, (group + 1) * world // num)
