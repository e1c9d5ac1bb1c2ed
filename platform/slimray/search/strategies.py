"""How a search looks for archs: random, evolution, predictor-guided evolution, NSGA-II; fronts and limits.

A strategy is a function of the past: what generation g proposes depends on the seed, on g and on what the generations
before it scored, sorted by index, never on the order in which trials finished. So `generation` is pure, a resumed
search is the same search, and the strategies are frozen settings without state. Evolution has the settings published
with Once-for-All (arXiv 1908.09791), NSGA-II is that of Deb et al. (IEEE TEC 6(2), 2002). Surprising: inside, archs are
rows of whole numbers (`GeneTable`), and scores and costs are functions of a whole matrix of them, because a search on a
predictor asks for 50,000. No torch here: a predictor comes as a function.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from slimray.arch import Arch
from slimray.search.encoding import Codes, Costs, Floats, GeneTable
from slimray.spec import Spec, UserError, did_you_mean

Score = Callable[[Codes], Floats]  # [n], higher is better

TRIES = 10  # rows drawn for every child that is to keep the limits and to be new, before another way is tried
NEARER = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # chance of a gene to be the anchor's, in draws from the whole space
CLIMBS = 200  # steps of the search for the cheapest arch


# ----------------------------------------------------------------------------------------------- what is searched


class Fitted(Protocol):
    """A predictor of the metric; `report` has at least `held_out_mae`, `spearman` and `num_train`."""

    report: Mapping[str, float]

    def predict(self, codes: Codes) -> Floats:
        """The metric expected of every row."""
        ...


@dataclass(frozen=True, eq=False)
class Problem:
    """What is searched: the archs of `table` whose `costs` are at most `limits`.

    `fit(codes, metrics, seed)` makes a predictor, which only the strategy `predictor_guided` asks for.
    """

    table: GeneTable
    costs: Costs = lambda codes: {}
    limits: Mapping[str, float] = field(default_factory=dict)
    fit: Callable[[Codes, Floats, int], Fitted] | None = None

    def keeps(self, codes: Codes) -> NDArray[np.bool_]:
        """Whether each row keeps all limits, `[n]`."""
        kept = np.ones(len(codes), bool)
        if self.limits:
            costs = self.costs(codes)
            for name, limit in self.limits.items():
                kept &= costs[name] <= limit
        return kept

    @cached_property
    def anchor(self) -> Codes:
        """A row that keeps the limits, `[genes]`: the smallest arch, or one found from it by changing single genes.

        UserError, with the smallest value found, if there seems to be none; the search for it is bounded.
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
                    "raise the limit or search a space with smaller archs"
                )
            nearest = min(
                nearest, self._descend(cheapest, self._excess, enough=0.0), key=lambda r: self._excess(r[None])[0]
            )
            if self.keeps(nearest[None])[0]:
                return nearest
        found = ", ".join(f"{n} {_rounded_up(self.costs(nearest[None])[n][0])}" for n in self.limits)
        raise UserError(f"limits: no arch found that keeps all of them, the nearest has {found}: raise one of them")

    def _excess(self, codes: Codes) -> Floats:
        """By how much rows break the limits, 0 where they keep them all."""
        costs = self.costs(codes)
        over = [np.maximum(costs[n] - limit, 0) / (abs(limit) or 1.0) for n, limit in self.limits.items()]
        return np.sum(over, axis=0)

    def _descend(self, row: Codes, value: Score, enough: float = -np.inf) -> Codes:
        """The end of the steepest way down from `row` in steps of one gene, or where `value` is `enough`."""
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
    """`value` for reading, in six digits: as a limit it is not below `value`."""
    unit = 10.0 ** (np.floor(np.log10(abs(value) or 1.0)) - 5)
    return f"{value:.0f}" if float(value).is_integer() else f"{np.ceil(value / unit) * unit:.10g}"


@dataclass(frozen=True)
class Trial:
    """An arch that was tried, its number in the search, what it scored (higher is better) and what it costs.

    The metric of a trial that failed is nan: it counts as finished and is never a parent.
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
        """The arrays of `trials`, in their order."""
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
        """The rows that `rows` (numbers or a mask) chooses."""
        costs = {name: values[rows] for name, values in self.costs.items()}
        return Pool(self.index[rows], self.codes[rows], self.metric[rows], costs)

    def top(self, count: int) -> "Pool":
        """The `count` rows of highest metric, best first, of equal ones those proposed first; none that failed."""
        order = np.argsort(-self.metric, kind="stable")[:count]
        return self.take(order[~np.isnan(self.metric[order])])

    def trials(self, table: GeneTable) -> list[Trial]:
        """The rows as trials."""
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
    """The rows of all `pools` in a row; at least one pool."""
    names = pools[0].costs
    return Pool(
        np.concatenate([pool.index for pool in pools]),
        np.concatenate([pool.codes for pool in pools]),
        np.concatenate([pool.metric for pool in pools]),
        {name: np.concatenate([pool.costs[name] for pool in pools]) for name in names},
    )


# ----------------------------------------------------------------------------------------------------- strategies
# A strategy says how many trials are a generation (`population`), whether a generation waits for the scores of the one
# before (`waits`), who stays when a new generation joins those kept so far (`survivors`), and who is tried next
# (`children`, given those kept and the keys of all archs ever tried).


class Random(Spec):
    """Archs drawn evenly, none twice."""

    name: Literal["random"] = "random"
    """Which strategy."""
    evaluations: int = Field(default=1000, ge=1)
    """Archs to try."""
    population: ClassVar[int] = 50
    waits: ClassVar[bool] = False

    @property
    def num_evaluations(self) -> int:
        """Archs that the whole search tries."""
        return self.evaluations

    def survivors(self, pool: Pool) -> Pool:
        """Nobody: what was scored does not matter."""
        return pool.take(slice(0))

    def children(self, problem: Problem, parents: Pool, seen: set[bytes], rng: np.random.Generator) -> Codes:
        """The next rows to try."""
        return _draw(problem, seen, rng, (self.population, []))


class Evolution(Spec):
    """Evolution with the settings of Once-for-All: the best of all so far are parents of mutants and of crossings."""

    name: Literal["evolution"] = "evolution"
    """Which strategy."""
    population: int = Field(default=100, ge=2)
    """Archs tried in a generation."""
    iterations: int = Field(default=500, ge=0)
    """Generations after the first, which is random."""
    parent_ratio: float = Field(default=0.25, gt=0, le=1)
    """How many of the best so far are parents, as a share of the population."""
    mutation_ratio: float = Field(default=0.5, ge=0, le=1)
    """Mutants in a generation; the others have two parents."""
    mutate_prob: float = Field(default=0.1, gt=0, le=1)
    """Chance of a block, and of each gene of no block, to be drawn anew in a mutant."""
    resolution_prob: float = Field(default=0.5, ge=0, le=1)
    """The same for single numbers: resolution, frames."""
    waits: ClassVar[bool] = True

    @property
    def num_evaluations(self) -> int:
        """Archs that the whole search tries."""
        return self.population * (1 + self.iterations)

    def survivors(self, pool: Pool) -> Pool:
        """The best of all so far, best first."""
        return pool.top(max(2, round(self.parent_ratio * self.population)))

    def children(self, problem: Problem, parents: Pool, seen: set[bytes], rng: np.random.Generator) -> Codes:
        """The next rows to try."""
        if not len(parents):
            return _draw(problem, seen, rng, (self.population, []))
        table, num_mutants = problem.table, round(self.mutation_ratio * self.population)
        num_crossed = self.population - num_mutants

        def pick(count: int) -> Codes:
            return parents.codes[rng.integers(len(parents), size=count)]

        def mutants(count: int) -> Codes:
            return table.mutate(pick(count), rng, self.mutate_prob, self.resolution_prob)

        def crossed(count: int) -> Codes:
            return table.cross(pick(count), pick(count), rng)

        return _draw(problem, seen, rng, (num_mutants, [mutants]), (num_crossed, [crossed, mutants]))


class PredictorGuided(Spec):
    """Few archs are measured: a predictor learns from them, and the best of an evolution on what it says are next.

    It repeats as exactly as `problem.fit` does.
    """

    name: Literal["predictor_guided"] = "predictor_guided"
    """Which strategy."""
    population: int = Field(default=50, ge=2)
    """Archs measured in a generation."""
    iterations: int = Field(default=5, ge=0)
    """Generations after the first, which is random; the predictor is trained anew before each."""
    explore: float = Field(default=0.2, ge=0, le=1)
    """Share of each generation that stays random, so that the predictor also learns where it is wrong."""
    search: Evolution = Evolution()
    """The evolution on the predictor."""
    waits: ClassVar[bool] = True

    @property
    def num_evaluations(self) -> int:
        """Archs that the whole search measures."""
        return self.population * (1 + self.iterations)

    def survivors(self, pool: Pool) -> Pool:
        """All that were measured: the predictor learns from every one."""
        return pool.top(len(pool))

    def children(self, problem: Problem, parents: Pool, seen: set[bytes], rng: np.random.Generator) -> Codes:
        """The next rows to try."""
        if len(parents) < 10:  # most have failed, or the first generation
            return _draw(problem, seen, rng, (self.population, []))
        predictor = self.fitted(problem, parents, rng)
        found = search(problem, self.search, predictor.predict, int(rng.integers(2**31)))
        best = found.top(len(found)).codes
        num_best, start = self.population - round(self.explore * self.population), 0

        def next_best(count: int) -> Codes:
            nonlocal start
            start += count
            return best[start - count : start]

        return _draw(problem, seen, rng, (num_best, [next_best]), (self.population - num_best, []))

    def fitted(self, problem: Problem, parents: Pool, rng: np.random.Generator) -> Fitted:
        """The predictor that proposes after `parents`; the first thing that is drawn from the generation's `rng`."""
        if problem.fit is None:
            raise ValueError("predictor_guided needs a problem with fit")
        return problem.fit(parents.codes, parents.metric, int(rng.integers(2**31)))


class Nsga2(Spec):
    """NSGA-II: archs that are best for some weighting of metric and costs, spread evenly."""

    name: Literal["nsga2"] = "nsga2"
    """Which strategy."""
    objectives: tuple[str, ...] = Field(default=("latency_ms",), min_length=1)
    """Costs to lower, beside the metric, which is raised."""
    population: int = Field(default=100, ge=2)
    """Archs tried in a generation, and archs kept."""
    iterations: int = Field(default=50, ge=0)
    """Generations after the first, which is random."""
    cross_prob: float = Field(default=0.9, ge=0, le=1)
    """Chance of a child to have two parents."""
    mutate_prob: float = Field(default=0.1, gt=0, le=1)
    """Chance of a block, and of each gene of no block, to be drawn anew in a child."""
    resolution_prob: float = Field(default=0.5, ge=0, le=1)
    """The same for single numbers: resolution, frames."""
    waits: ClassVar[bool] = True

    @property
    def num_evaluations(self) -> int:
        """Archs that the whole search tries."""
        return self.population * (1 + self.iterations)

    def survivors(self, pool: Pool) -> Pool:
        """The first fronts, the last of them where it is least crowded; best first."""
        pool = pool.take(~np.isnan(pool.metric))
        values = _objectives(pool, self.objectives)
        rank = _ranks(values)
        order = np.lexsort((-_crowding(values, rank), rank))
        return pool.take(order[: self.population])

    def children(self, problem: Problem, parents: Pool, seen: set[bytes], rng: np.random.Generator) -> Codes:
        """The next rows to try."""
        if not len(parents):
            known = problem.costs(problem.anchor[None])
            for name in self.objectives:
                if name not in known:
                    raise UserError(f"strategy: objectives: unknown cost {name!r}{did_you_mean(name, known)}")
            return _draw(problem, seen, rng, (self.population, []))
        table = problem.table

        def winners(count: int) -> Codes:
            # parents are in order of front and crowding, so that of two the first wins the tournament
            return parents.codes[rng.integers(len(parents), size=(2, count)).min(0)]

        def bred(count: int) -> Codes:
            mothers = winners(count)
            crossed = table.cross(mothers, winners(count), rng)
            children = np.where(rng.random((count, 1)) < self.cross_prob, crossed, mothers)
            return table.mutate(children, rng, self.mutate_prob, self.resolution_prob)

        return _draw(problem, seen, rng, (self.population, [bred]))


Strategy = Random | Evolution | PredictorGuided | Nsga2
StrategySpec = Annotated[Strategy, Field(discriminator="name")]
"""What a job YAML may say under `strategy`: `{name: evolution, population: 100}`."""

STRATEGIES: dict[str, type[Strategy]] = {
    "random": Random,
    "evolution": Evolution,
    "predictor_guided": PredictorGuided,
    "nsga2": Nsga2,
}


def _draw(
    problem: Problem, seen: set[bytes], rng: np.random.Generator, *wanted: tuple[int, Sequence[Callable[[int], Codes]]]
) -> Codes:
    """For each (count, draws) of `wanted`, `count` rows that keep the limits and are new, of the first draw that can.

    Where none of `draws` finds more, rows come from the whole space, nearer and nearer to the anchor, so that tight
    limits end in bounded time. Repeats only where nothing new is found.
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


# ------------------------------------------------------------------------------------------------------ searching


def generation(
    strategy: Strategy, problem: Problem, history: Iterable[Trial], seed: int, number: int
) -> list[Arch] | None:
    """The archs of generation `number`, trials number * population and on; None while one before it is not finished.

    A function of its arguments, and of `history` only of the trials of the generations before: their order and any
    trials of later ones do not matter. Who asks for single archs should keep the list. UserError for impossible limits.
    """
    past = _past(strategy, problem, history, seed, number)
    if past is None:
        return None
    return problem.table.archs(strategy.children(problem, *past, _rng(seed, number)))


def propose(strategy: Strategy, problem: Problem, history: Iterable[Trial], seed: int, index: int) -> Arch | None:
    """The arch of trial `index`; None while the generation before it is not finished (see `generation`)."""
    number, place = divmod(index, strategy.population)
    archs = generation(strategy, problem, history, seed, number)
    return None if archs is None else archs[place]


def search(problem: Problem, strategy: Strategy, score: Score, seed: int, max_evaluations: int | None = None) -> Pool:
    """Run `strategy` in this process and return all it tried, in order; `.top(1)` is the best.

    `score` takes rows of codes (`lambda codes: np.array([... for arch in table.archs(codes)])` for a score of archs).
    Proposes what `generation` would. Ends after `max_evaluations` (default: the strategy's), or when a generation
    brings nothing new.
    """
    left = max_evaluations or strategy.num_evaluations
    parents, seen, tried = _nobody(problem), set(), []
    for number in itertools.count():
        codes = strategy.children(problem, parents, seen, _rng(seed, number))[:left]
        new = _new(problem.table, codes, seen)
        if not new.any():
            break
        index = np.arange(len(codes)) + number * strategy.population
        pool = Pool(index, codes, np.asarray(score(codes), float), problem.costs(codes))
        tried.append(pool)
        left -= len(codes)
        if left <= 0:
            break
        parents = strategy.survivors(join([parents, pool.take(new)]) if len(parents) else pool.take(new))
    return join(tried) if tried else _nobody(problem)


def predictor_reports(
    strategy: PredictorGuided, problem: Problem, history: Sequence[Trial], seed: int
) -> list[dict[str, float]]:
    """How good the predictor was before each generation, a dict per generation after the first.

    `held_out_mae`, `spearman`, `num_train` are the predictor's own report; `next_mae` and `next_spearman` compare what
    it said with what the generation it proposed then scored, where that is finished.
    """
    out = []
    for number in range(1, strategy.iterations + 1):
        past = _past(strategy, problem, history, seed, number)
        if past is None:
            break
        if len(past[0]) < 10:
            continue
        predictor = strategy.fitted(problem, past[0], _rng(seed, number))
        report = {"generation": float(number), **predictor.report}
        first = number * strategy.population
        trials = [t for t in history if first <= t.index < first + strategy.population and not np.isnan(t.metric)]
        if len(trials) > 1:
            pool = Pool.of(problem.table, trials)
            said = predictor.predict(pool.codes)
            report |= {
                "next_mae": float(np.abs(said - pool.metric).mean()),
                "next_spearman": spearman(said, pool.metric),
            }
        out.append(report)
    return out


def _past(
    strategy: Strategy, problem: Problem, history: Iterable[Trial], seed: int, number: int
) -> tuple[Pool, set[bytes]] | None:
    """Parents and keys of all archs before generation `number`; None if a trial is missing."""
    by_index = {trial.index: trial for trial in history} if strategy.waits else {}
    parents, seen = _nobody(problem), set()
    for before in range(number):
        start = before * strategy.population
        if not strategy.waits:
            _new(problem.table, strategy.children(problem, parents, seen, _rng(seed, before)), seen)
            continue
        trials = [by_index.get(index) for index in range(start, start + strategy.population)]
        finished = [trial for trial in trials if trial is not None]
        if len(finished) < len(trials):
            return None
        scored = Pool.of(problem.table, [trial for trial in finished if not np.isnan(trial.metric)])
        scored = scored.take(_new(problem.table, scored.codes, seen))
        _new(problem.table, problem.table.codes(trial.arch for trial in finished), seen)  # failed: not again either
        if len(scored):
            parents = strategy.survivors(join([parents, scored]) if len(parents) else scored)
    return parents, seen


def _new(table: GeneTable, codes: Codes, seen: set[bytes]) -> NDArray[np.bool_]:
    """Which rows are not in `seen`, `[n]`; they are added to it."""
    new = np.zeros(len(codes), bool)
    for row, key in enumerate(table.keys(codes)):
        new[row] = key not in seen
        seen.add(key)
    return new


def _nobody(problem: Problem) -> Pool:
    return Pool(np.zeros(0, np.intp), np.zeros((0, len(problem.table.genes)), np.intp), np.zeros(0), {})


def _rng(seed: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number])))


# ------------------------------------------------------------------------------------------------ choosing the best


def best_under(trials: Iterable[Trial], limits: Mapping[str, float]) -> Trial | None:
    """The trial of highest metric among those that keep `limits`, of equal ones the first; None if none does."""
    kept = [
        trial
        for trial in trials
        if not np.isnan(trial.metric) and all(trial.costs[name] <= limit for name, limit in limits.items())
    ]
    return min(kept, key=lambda trial: (-trial.metric, trial.index), default=None)


def front(trials: Iterable[Trial], costs: Sequence[str]) -> list[Trial]:
    """The Pareto front: trials that no other beats in metric and all `costs` at once, by rising cost; archs once."""
    once: dict[Arch, Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.index):
        if not np.isnan(trial.metric):
            once.setdefault(trial.arch, trial)
    found = list(once.values())
    values = np.array([[-trial.metric, *(trial.costs[name] for name in costs)] for trial in found])
    kept = [found[row] for row in _front(values)] if found else []
    return sorted(kept, key=lambda trial: (*(trial.costs[name] for name in costs), -trial.metric, trial.index))


def spearman(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """Spearman's rank correlation, -1 to 1, equal values sharing their mean rank; nan if one side is constant."""
    ranks = []
    for values in (np.asarray(a, float), np.asarray(b, float)):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        last = np.cumsum(count)
        ranks.append((last - (count - 1) / 2)[place])
    if any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def _objectives(pool: Pool, costs: Sequence[str]) -> Floats:
    """What is to be lowered, `[n, 1 + costs]`."""
    return np.stack([-pool.metric, *(pool.costs[name] for name in costs)], axis=1)


def _front(values: Floats) -> Codes:
    """The rows of `values` `[n, objectives]` that no other is at least as low as everywhere and lower somewhere."""
    left = np.lexsort(values.T[::-1])  # a row is beaten only by rows before it
    out = []
    while len(left):
        first, left = left[0], left[1:]
        out.append(first)
        beaten = (values[left] >= values[first]).all(1) & (values[left] > values[first]).any(1)
        left = left[~beaten]
    return np.array(sorted(out), np.intp)


def _ranks(values: Floats) -> Codes:
    """The number of the front that each row is in, `[n]`: 0 is beaten by none, 1 only by rows of 0, and so on."""
    rank, left, number = np.zeros(len(values), np.intp), np.arange(len(values)), 0
    while len(left):
        first = _front(values[left])
        rank[left[first]] = number
        left, number = np.delete(left, first), number + 1
    return rank


def _crowding(values: Floats, rank: Codes) -> Floats:
    """How far apart a row's neighbours in its front are, summed over objectives, `[n]`; infinite at the ends."""
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
