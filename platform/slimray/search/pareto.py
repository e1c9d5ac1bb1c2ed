"""Pareto fronts, the best trial under limits, and rank correlation."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from slimray.arch import Arch
from slimray.encoding import Codes, Floats
from slimray.search.problem import Pool, Trial


def best_under(trials: Iterable[Trial], limits: Mapping[str, float]) -> Trial | None:
    """Return the trial with the highest metric that keeps `limits`, the first of equal ones; None if none does."""
    kept = [
        trial
        for trial in trials
        if not np.isnan(trial.metric) and all(trial.costs[name] <= limit for name, limit in limits.items())
    ]
    return min(kept, key=lambda trial: (-trial.metric, trial.index), default=None)


def front(trials: Iterable[Trial], costs: Sequence[str]) -> list[Trial]:
    """Return the Pareto front of metric and `costs`: the trials that no other one dominates, by rising cost; each arch
    once."""
    once: dict[Arch, Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.index):
        if not np.isnan(trial.metric):
            once.setdefault(trial.arch, trial)
    found = list(once.values())
    values = np.array([[-trial.metric, *(trial.costs[name] for name in costs)] for trial in found])
    kept = [found[row] for row in _front(values)] if found else []
    return sorted(kept, key=lambda trial: (*(trial.costs[name] for name in costs), -trial.metric, trial.index))


def spearman(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """Return Spearman's rank correlation, -1 to 1; equal values share their mean rank; nan if one side is constant."""
    ranks = []
    for values in (np.asarray(a, float), np.asarray(b, float)):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        last = np.cumsum(count)
        ranks.append((last - (count - 1) / 2)[place])
    if any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def objectives(pool: Pool, costs: Sequence[str]) -> Floats:
    """Return the values to minimise, `[n, 1 + costs]`: the negated metric and `costs`."""
    return np.stack([-pool.metric, *(pool.costs[name] for name in costs)], axis=1)


def _front(values: Floats) -> Codes:
    """Return the numbers of the rows of `values` `[n, objectives]` that no other row dominates (lower is better)."""
    left = np.lexsort(values.T[::-1])  # a row is beaten only by rows before it
    out = []
    while len(left):
        first, left = left[0], left[1:]
        out.append(first)
        beaten = (values[left] >= values[first]).all(1) & (values[left] > values[first]).any(1)
        left = left[~beaten]
    return np.array(sorted(out), np.intp)


def ranks(values: Floats) -> Codes:
    """Return the front number of each row, `[n]`: 0 is dominated by none, 1 only by rows of front 0, and so on."""
    rank, left, number = np.zeros(len(values), np.intp), np.arange(len(values)), 0
    while len(left):
        first = _front(values[left])
        rank[left[first]] = number
        left, number = np.delete(left, first), number + 1
    return rank


def crowding(values: Floats, rank: Codes) -> Floats:
    """Return the distance between a row's neighbours in its front, summed over objectives, `[n]`; infinite at ends."""
    out = np.zeros(len(values))
    for number in range(int(rank.max(initial=-1)) + 1):
        rows = np.flatnonzero(rank == number)
        for column in values.T:
            order = rows[np.argsort(column[rows], kind="stable")]
            ends = column[order]
            out[order[[0, -1]]] = np.inf
            if ends[-1] > ends[0]:
                out[order[1:-1]] += (ends[2:] - ends[:-2]) / (ends[-1] - ends[0])
    return out
