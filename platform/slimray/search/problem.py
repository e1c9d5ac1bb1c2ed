"""The problem of a search: a space with costs and limits, the trials so far, and pools of archs as matrices.

`Problem` checks which archs keep the limits, `draw` draws such archs; a `Trial` is an arch that was scored; a `Pool`
holds many of them as rows. numpy only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slimray.arch import Arch
from slimray.encoding import Codes, Costs, Floats, GeneTable
from slimray.spec import UserError, did_you_mean

Score = Callable[[Codes], Floats]  # [n], higher is better
TRIES = 10  # rows drawn per child that must keep the limits and be new, before the next kind of draw is tried
NEARER = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # probability that a gene is the anchor's, in draws from the whole space
CLIMBS = 200  # most steps in the search for the cheapest arch


class Fitted(Protocol):
    """A predictor of the metric; `report` has at least `held_out_mae`, `spearman` and `num_train`."""

    report: Mapping[str, float]

    def predict(self, codes: Codes) -> Floats:
        """Return the expected metric of every row, `[n]`."""
        ...


@dataclass(frozen=True, eq=False)
class Problem:
    """Archs to search: those of `table` whose `costs` are at most `limits`.

    `fit(codes, metrics, seed)` returns a predictor, which only the strategy `predictor_guided` needs.
    """

    table: GeneTable
    costs: Costs = lambda codes: {}
    limits: Mapping[str, float] = field(default_factory=dict)
    fit: Callable[[Codes, Floats, int], Fitted] | None = None

    def keeps(self, codes: Codes) -> NDArray[np.bool_]:
        """Return a bool per row, `[n]`: True if it keeps all limits."""
        kept = np.ones(len(codes), bool)
        if self.limits:
            costs = self.costs(codes)
            for name, limit in self.limits.items():
                kept &= costs[name] <= limit
        return kept

    @cached_property
    def anchor(self) -> Codes:
        """A row that keeps the limits, `[genes]`: the smallest arch, or one found from it by changing single genes.

        UserError, with the smallest value found, if none is found; the length of the search is bounded.
        """
        row = self.table.smallest
        if not self.limits:
            return row
        known = self.costs(row[None])
        for name in self.limits:
            if name not in known:
                raise UserError(f"limits: unknown cost {name!r}{did_you_mean(name, known)}")
        nearest = self._descend(row, self._excess, enough=0.0)
        if self.keeps(nearest[None])[0]:
            return nearest
        for name, limit in self.limits.items():
            cheapest = self._descend(row, lambda codes, name=name: self.costs(codes)[name])
            lowest = float(self.costs(cheapest[None])[name][0])
            if lowest > limit:
                raise UserError(
                    f"limits: {name}: no arch is at most {limit:.12g}, the smallest found is {_rounded_up(lowest)}: "
                    "raise the limit, or search a space with smaller archs"
                )
            nearest = min(
                nearest, self._descend(cheapest, self._excess, enough=0.0), key=lambda r: self._excess(r[None])[0]
            )
            if self.keeps(nearest[None])[0]:
                return nearest
        found = ", ".join(f"{n} {_rounded_up(self.costs(nearest[None])[n][0])}" for n in self.limits)
        raise UserError(f"limits: no arch found that keeps all of them, the closest has {found}: raise one of them")

    def _excess(self, codes: Codes) -> Floats:
        """Return the total relative excess of each row over the limits, `[n]`; 0 if it keeps them all."""
        costs = self.costs(codes)
        over = [np.maximum(costs[n] - limit, 0) / (abs(limit) or 1.0) for n, limit in self.limits.items()]
        return np.sum(over, axis=0)

    def _descend(self, row: Codes, value: Score, enough: float = -np.inf) -> Codes:
        """Return the end of the steepest descent of `value` from `row`, one gene per step; stop once it is `enough`."""
        lowest = float(value(row[None])[0])
        for _ in range(CLIMBS):
            steps = self.table.neighbours(row)
            if lowest <= enough or not len(steps):
                break
            values = value(steps)
            if not values.min() < lowest:
                break
            row, lowest = steps[values.argmin()], float(values.min())
        return row


def _rounded_up(value: float) -> str:
    """Return `value` as text with six digits, rounded up so that it is sufficient as a limit."""
    unit = 10.0 ** (np.floor(np.log10(abs(value) or 1.0)) - 5)
    return f"{value:.0f}" if float(value).is_integer() else f"{np.ceil(value / unit) * unit:.10g}"


@dataclass(frozen=True)
class Trial:
    """An arch that was tried: its number in the search, its metric (higher is better) and its costs.

    The metric of a failed trial is nan: the trial counts as finished and is never a parent.
    """

    index: int
    arch: Arch
    metric: float
    costs: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Pool:
    """Trials as arrays: index `[n]`, codes `[n, genes]`, metric `[n]`, costs name -> `[n]`."""

    index: Codes
    codes: Codes
    metric: Floats
    costs: Mapping[str, Floats]

    @staticmethod
    def of(table: GeneTable, trials: Sequence[Trial]) -> "Pool":
        """Return the arrays of `trials`, in their order."""
        names = trials[0].costs if trials else {}
        return Pool(
            np.array([trial.index for trial in trials], np.intp),
            table.codes(trial.arch for trial in trials),
            np.array([trial.metric for trial in trials], float),
            {name: np.array([trial.costs[name] for trial in trials], float) for name in names},
        )

    def __len__(self) -> int:
        return len(self.index)

    def take(self, rows: Any) -> "Pool":
        """Return the rows selected by `rows` (numbers or a mask)."""
        costs = {name: values[rows] for name, values in self.costs.items()}
        return Pool(self.index[rows], self.codes[rows], self.metric[rows], costs)

    def top(self, count: int) -> "Pool":
        """Return the `count` rows with the highest metric, best first, equal ones by index; no failed ones."""
        order = np.argsort(-self.metric, kind="stable")[:count]
        return self.take(order[~np.isnan(self.metric[order])])

    def trials(self, table: GeneTable) -> list[Trial]:
        """Return the rows as trials."""
        costs = [dict(zip(self.costs, row, strict=True)) for row in zip(*(c.tolist() for c in self.costs.values()))]
        return [
            Trial(*trial)
            for trial in zip(
                self.index.tolist(),
                table.archs(self.codes),
                self.metric.tolist(),
                costs or [{} for _ in range(len(self))],
                strict=True,
            )
        ]


def join(pools: Sequence[Pool]) -> Pool:
    """Concatenate the rows of `pools`, at least one."""
    names = pools[0].costs
    return Pool(
        np.concatenate([pool.index for pool in pools]),
        np.concatenate([pool.codes for pool in pools]),
        np.concatenate([pool.metric for pool in pools]),
        {name: np.concatenate([pool.costs[name] for pool in pools]) for name in names},
    )


def draw(
    problem: Problem, seen: set[bytes], rng: np.random.Generator, *wanted: tuple[int, Sequence[Callable[[int], Codes]]]
) -> Codes:
    """Return, for each (count, draws) in `wanted`, `count` new rows that keep the limits, from the first draw that can.

    If none of `draws` finds more, rows come from the whole space, closer and closer to the anchor, so that the time is
    bounded even with tight limits. Rows repeat only if nothing new is found.
    """
    table, anchor = problem.table, problem.anchor
    taken: set[bytes] = set()
    kept: list[Codes] = []
    repeats = anchor[None]

    def pulled(share: float) -> Callable[[int], Codes]:
        return lambda n: np.where(rng.random((n, len(anchor))) < share, anchor, table.sample(n, rng))

    afar = [pulled(share) for share in NEARER]
    for count, draws in wanted:
        missing = count
        for draw in [*draws, *afar]:
            left, rate = TRIES * count, 0.8
            while missing and left > 0 and len(seen) + len(taken) < table.num_archs:
                asked = min(int(missing / rate) + 2, left)
                rows = draw(asked)
                if not len(rows):
                    break
                rows = rows[problem.keeps(rows)]
                new = []
                for row, key in enumerate(table.keys(rows)):
                    if key not in seen and key not in taken:
                        taken.add(key)
                        new.append(row)
                        if len(new) == missing:
                            break
                kept.append(rows[new])
                repeats = rows if len(rows) else repeats
                missing, left, rate = missing - len(new), left - asked, (len(new) + 1) / (asked + 1)
        if missing:
            kept.append(repeats[np.arange(missing) % len(repeats)])
    return np.concatenate(kept)
