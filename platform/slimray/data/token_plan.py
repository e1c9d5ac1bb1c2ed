"""Batches by tokens: samples of similar length in bags with a maximum of tokens, a pure function of (seed, epoch).

Sorted by length, the samples of a split are cut into bags whose number of samples times the longest length stays within
`tokens`; this requires only the number of samples of each length, so that every process knows all windows without the
index. From epoch to epoch the order of the bags changes, and samples of the same length change places (a permutation
per length, computed by position: permutation.py). The number of steps is the same in every epoch. A bag is a microbatch
of one rank, padded to its own longest sample. numpy only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from slimray.data.permutation import permuted

MULTIPLE = 8  # larger bags hold a multiple of this many samples, for efficient kernels


def ceil_div(a: int, b: int) -> int:
    """Return the smallest integer not below a / b."""
    return -(-a // b)


@dataclass(frozen=True)
class Bags:
    """The bags into which the samples of a split are cut.

    `counts` are (length in tokens, samples of that length), shortest first; a bag holds at most `tokens`, including
    padding. `seed` determines the order.
    """

    counts: tuple[tuple[int, int], ...]
    tokens: int
    seed: int = 0

    @classmethod
    def of(cls, lengths: np.ndarray, tokens: int, seed: int = 0) -> "Bags":
        """Return the bags of samples of `lengths`; raise ValueError if one does not fit into a bag."""
        values, counts = np.unique(lengths, return_counts=True)
        if not len(values) or values[-1] > tokens:
            raise ValueError(f"the longest sample has {values[-1] if len(values) else 0} tokens, but a bag {tokens}")
        return cls(tuple(zip(values.tolist(), counts.tolist(), strict=True)), tokens, seed)

    @property
    def count(self) -> int:
        """Number of bags."""
        return len(_edges(self)) - 1

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return sum(count for _, count in self.counts)


@lru_cache(maxsize=8)
def _edges(bags: Bags) -> np.ndarray:
    """Return the index of the first sample of each bag, in the order of length, int64 `[bags + 1]`."""
    edges, start, end = [0], 0, 0
    for length, count in bags.counts:
        shorter, end, room = end, end + count, bags.tokens // length
        while end - start > room:
            size = max(room, shorter - start)  # only the shorter samples, if none of this length fits in
            start += size - size % MULTIPLE if size > MULTIPLE else size
            edges.append(start)
    edges.append(end)
    array = np.array(edges, np.int64)
    array.setflags(write=False)
    return array


@lru_cache(maxsize=4)
def _order(bags: Bags, epoch: int, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the bags of an epoch in order, and the position at which each begins `[bags + 1]`."""
    order = np.arange(bags.count)
    if shuffle:
        order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([bags.seed, epoch]))).permutation(bags.count)
    starts = np.concatenate([[0], np.cumsum(np.diff(_edges(bags))[order])])
    for array in (order, starts):
        array.setflags(write=False)
    return order, starts


@lru_cache(maxsize=1024)
def _members(seed: int, epoch: int, length: int, count: int) -> np.ndarray:
    """Return the order of the samples of one length in an epoch, int64 `[count]`, for runs that began with shuffling by
    arrays (`version` 1 or 2)."""
    members = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, length]))).permutation(count)
    members.setflags(write=False)
    return members


@dataclass(frozen=True)
class TokenPlan:
    """Windows of `batch` bags; see `slimray.data.plan.Plan`, and `Phase` for `version`."""

    bags: Bags
    batch: int
    epoch: int
    shuffle: bool
    drop_last: bool = False
    version: int = 1

    @property
    def num_steps(self) -> int:
        """Number of steps of the whole pass, including a short last window."""
        return self.bags.count // self.batch if self.drop_last else ceil_div(self.bags.count, self.batch)

    @property
    def num_positions(self) -> int:
        """Number of positions, that is samples, of the whole pass."""
        return int(self._starts[min(self.num_steps * self.batch, self.bags.count)])

    @property
    def _starts(self) -> np.ndarray:
        return _order(self.bags, self.epoch, self.shuffle)[1]

    def _window(self, step: int) -> tuple[int, int]:
        return step * self.batch, min((step + 1) * self.batch, self.bags.count)

    def share(self, step: int) -> float:
        """Return the number of bags in the window of `step` as a share of a full one."""
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
        """Return the positions of each bag of the rank; `per_worker`, which counts samples, is ignored."""
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
