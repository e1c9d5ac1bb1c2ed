"""Batches by tokens: samples of similar length in bags of at most so many tokens, a pure function of (seed, epoch).

Sorted by length, the samples of a split are cut into bags whose longest sample times their number stays within
`tokens`; that needs only how many samples of each length there are, so that every process knows all windows without the
index. What changes from epoch to epoch is the order of the bags, and which samples of the same length stand for each
other (a permutation for each length, computed by position: permutation.py). The number of steps is the same in every
epoch. A bag is what a rank handles at once: a microbatch that is padded to its own longest sample. numpy only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from slimray.data.permutation import permuted

MULTIPLE = 8  # samples of a bag, where it holds more: shapes that kernels like


def ceil_div(a: int, b: int) -> int:
    """Return the smallest integer not below a / b."""
    return -(-a // b)


@dataclass(frozen=True)
class Bags:
    """The bags into which the samples of a split are cut.

    `counts` are (length in tokens, samples of that length), shortest first; a bag holds at most `tokens`, padding
    included. `seed` is that of the order.
    """

    counts: tuple[tuple[int, int], ...]
    tokens: int
    seed: int = 0

    @classmethod
    def of(cls, lengths: np.ndarray, tokens: int, seed: int = 0) -> "Bags":
        """Return the bags of samples of `lengths`; ValueError if one does not fit into a bag."""
        values, counts = np.unique(lengths, return_counts=True)
        if not len(values) or values[-1] > tokens:
            raise ValueError(f"the longest sample has {values[-1] if len(values) else 0} tokens, a bag {tokens}")
        return cls(tuple(zip(values.tolist(), counts.tolist(), strict=True)), tokens, seed)

    @property
    def count(self) -> int:
        """Return how many bags there are."""
        return len(_edges(self)) - 1

    @property
    def num_samples(self) -> int:
        """Return how many samples there are."""
        return sum(count for _, count in self.counts)


@lru_cache(maxsize=8)
def _edges(bags: Bags) -> np.ndarray:
    """Return where bags begin among the samples sorted by length, int64 `[bags + 1]`."""
    edges, start, end = [0], 0, 0
    for length, count in bags.counts:
        shorter, end, room = end, end + count, bags.tokens // length
        while end - start > room:
            size = max(room, shorter - start)  # the shorter ones alone, if none of these fits in
            start += size - size % MULTIPLE if size > MULTIPLE else size
            edges.append(start)
    edges.append(end)
    array = np.array(edges, np.int64)
    array.setflags(write=False)
    return array


@lru_cache(maxsize=4)
def _order(bags: Bags, epoch: int, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
    """The bags of an epoch in their order, and the position at which each begins `[bags + 1]`."""
    order = np.arange(bags.count)
    if shuffle:
        order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([bags.seed, epoch]))).permutation(bags.count)
    starts = np.concatenate([[0], np.cumsum(np.diff(_edges(bags))[order])])
    for array in (order, starts):
        array.setflags(write=False)
    return order, starts


@lru_cache(maxsize=1024)
def _members(seed: int, epoch: int, length: int, count: int) -> np.ndarray:
    """The order of the samples of one length in an epoch of a run that began before it was computed by position, int64
    `[count]`."""
    members = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, length]))).permutation(count)
    members.setflags(write=False)
    return members


@dataclass(frozen=True)
class TokenPlan:
    """Windows of `batch` bags; see `slimray.data.plan.Plan`, for `version` `Phase`."""

    bags: Bags
    batch: int
    epoch: int
    shuffle: bool
    drop_last: bool = False
    version: int = 1

    @property
    def num_steps(self) -> int:
        """Steps of the whole pass, a short last window included."""
        return self.bags.count // self.batch if self.drop_last else ceil_div(self.bags.count, self.batch)

    @property
    def num_positions(self) -> int:
        """Positions of the whole pass: samples."""
        return int(self._starts[min(self.num_steps * self.batch, self.bags.count)])

    @property
    def _starts(self) -> np.ndarray:
        return _order(self.bags, self.epoch, self.shuffle)[1]

    def _window(self, step: int) -> tuple[int, int]:
        return step * self.batch, min((step + 1) * self.batch, self.bags.count)

    def share(self, step: int) -> float:
        """Return the bags of the window of `step` as a share of a full one."""
        first, end = self._window(step)
        return (end - first) / self.batch

    def _bags_of(self, step: int, rank: int, world: int) -> tuple[int, int]:
        first, end = self._window(step)
        count = end - first
        return first + rank * count // world, first + (rank + 1) * count // world

    def rank_slice(self, step: int, rank: int, world: int) -> tuple[int, int]:
        """Return the positions [lo, hi) of the bags that `rank` of `world` consumes at `step`; may be empty."""
        first, end = self._bags_of(step, rank, world)
        return int(self._starts[first]), int(self._starts[end])

    def microbatches(self, step: int, rank: int, world: int, per_worker: int) -> list[tuple[int, int]]:
        """Return the positions of each bag of the rank; `per_worker`, which counts samples, plays no part."""
        first, end = self._bags_of(step, rank, world)
        begin, stop = self._window(step)
        pieces = [(int(self._starts[bag]), int(self._starts[bag + 1])) for bag in range(first, end)]
        last = int(self._starts[end])
        return pieces + [(last, last)] * (ceil_div(stop - begin, world) - len(pieces))

    def samples(self, lo: int, hi: int, seed: int, by_length: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the sample ids at positions [lo, hi); `by_length` gives the rows of the index, short to long."""
        order, starts = _order(self.bags, self.epoch, self.shuffle)
        positions = np.arange(lo, hi)
        bag = np.searchsorted(starts, positions, "right") - 1
        places = _edges(self.bags)[order[bag]] + positions - starts[bag]
        if self.shuffle:
            ends = np.cumsum([count for _, count in self.bags.counts])
            which = np.searchsorted(ends, places, "right")
            for number in np.unique(which):
                length, count = self.bags.counts[number]
                here, first, key = which == number, ends[number] - count, (self.bags.seed, self.epoch, length)
                inside = places[here] - first
                moved = permuted(inside, count, key) if self.version > 2 else _members(*key, count)[inside]
                places[here] = first + moved
        return by_length()[places].astype(np.int64)
