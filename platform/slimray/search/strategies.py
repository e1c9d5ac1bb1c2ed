"""Strategies of a search for archs: random, evolution, predictor-guided evolution, NSGA-II.

A strategy is a function of the past: the proposals of generation g depend on the seed, on g and on the scores of
earlier generations, sorted by index, never on the order in which trials finished. So `generation` is pure, a resumed
search is the same search, and strategies are frozen settings without state. Evolution has the settings published with
Once-for-All (arXiv 1908.09791); NSGA-II is that of Deb et al. (IEEE TEC 6(2), 2002). Surprising: internally, archs are
rows of integers (`GeneTable`), and scores and costs are functions of a whole matrix of them, because a search on a
predictor evaluates 50,000. No torch here: a predictor is passed in as a function.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from slimray.arch import Arch
from slimray.encoding import Codes, GeneTable
from slimray.search.pareto import crowding, objectives, ranks, spearman
from slimray.search.problem import Fitted, Pool, Problem, Score, Trial, draw, join
from slimray.spec import Spec, UserError, did_you_mean


# A strategy defines the size of a generation (`population`), whether a generation waits for the scores of the previous
# one (`waits`), which archs to keep after a new generation joins those kept so far (`survivors`), and which archs to
# try next (`children`, given those kept and the keys of all archs ever tried).
class Random(Spec):
    """Archs drawn uniformly, none twice."""

    name: Literal["random"] = "random"
    """Name of the strategy."""
    evaluations: int = Field(default=1000, ge=1)
    """Archs to try."""
    population: ClassVar[int] = 50
    waits: ClassVar[bool] = False

    @property
    def num_evaluations(self) -> int:
        """Archs that the whole search tries."""
        return self.evaluations

    def survivors(self, pool: Pool) -> Pool:
        """Keep none: scores do not matter."""
        return pool.take(slice(0))

    def children(self, problem: Problem, parents: Pool, seen: set[bytes], rng: np.random.Generator) -> Codes:
        """Return the next rows to try."""
        return draw(problem, seen, rng, (self.population, []))


class Evolution(Spec):
    """Evolution with the settings of Once-for-All: the best archs so far are parents for mutation and crossover."""

    name: Literal["evolution"] = "evolution"
    """Name of the strategy."""
    population: int = Field(default=100, ge=2)
    """Archs to try in a generation."""
    iterations: int = Field(default=500, ge=0)
    """Generations after the first, which is random."""
    parent_ratio: float = Field(default=0.25, gt=0, le=1)
    """Number of parents, the best archs so far, as a share of the population."""
    mutation_ratio: float = Field(default=0.5, ge=0, le=1)
    """Share of mutants in a generation; the others have two parents."""
    mutate_prob: float = Field(default=0.1, gt=0, le=1)
    """Probability that a block, or a gene outside all blocks, is redrawn in a mutant."""
    resolution_prob: float = Field(default=0.5, ge=0, le=1)
    """The same probability for single numbers: resolution, frames."""
    waits: ClassVar[bool] = True

    @property
    def num_evaluations(self) -> int:
        """Archs that the whole search tries."""
        return self.population * (1 + self.iterations)

    def survivors(self, pool: Pool) -> Pool:
        """Keep the best of all so far, best first."""
        return pool.top(max(2, round(self.parent_ratio * self.population)))

    def children(self, problem: Problem, parents: Pool, seen: set[bytes], rng: np.random.Generator) -> Codes:
        """Return the next rows to try."""
        if not len(parents):
            return draw(problem, seen, rng, (self.population, []))
        table, num_mutants = problem.table, round(self.mutation_ratio * self.population)
        num_crossed = self.population - num_mutants

        def pick(count: int) -> Codes:
            return parents.codes[rng.integers(len(parents), size=count)]

        def mutants(count: int) -> Codes:
            return table.mutate(pick(count), rng, self.mutate_prob, self.resolution_prob)

        def crossed(count: int) -> Codes:
            return table.cross(pick(count), pick(count), rng)

        return draw(problem, seen, rng, (num_mutants, [mutants]), (num_crossed, [crossed, mutants]))


class PredictorGuided(Spec):
    """Few archs are measured: a predictor learns from them, and the best archs of an evolution on it are tried next.

    It is as reproducible as `problem.fit`.
    """

    name: Literal["predictor_guided"] = "predictor_guided"
    """Name of the strategy."""
    population: int = Field(default=50, ge=2)
    """Archs to measure in a generation."""
    iterations: int = Field(default=5, ge=0)
    """Generations after the first, which is random; the predictor is retrained before each."""
    explore: float = Field(default=0.2, ge=0, le=1)
    """Share of each generation that is random, so that the predictor also learns where it is wrong."""
    search: Evolution = Evolution()
    """Settings of the evolution on the predictor."""
    waits: ClassVar[bool] = True

    @property
    def num_evaluations(self) -> int:
        """Archs that the whole search measures."""
        return self.population * (1 + self.iterations)

    def survivors(self, pool: Pool) -> Pool:
        """Keep all measured archs: the predictor learns from every one."""
        return pool.top(len(pool))

    def children(self, problem: Problem, parents: Pool, seen: set[bytes], rng: np.random.Generator) -> Codes:
        """Return the next rows to try."""
        if len(parents) < 10:  # the first generation, or most trials have failed
            return draw(problem, seen, rng, (self.population, []))
        predictor = self.fitted(problem, parents, rng)
        found = search(problem, self.search, predictor.predict, int(rng.integers(2**31)))
        best = found.top(len(found)).codes
        num_best, start = self.population - round(self.explore * self.population), 0

        def next_best(count: int) -> Codes:
            nonlocal start
            start += count
            return best[start - count : start]

        return draw(problem, seen, rng, (num_best, [next_best]), (self.population - num_best, []))

    def fitted(self, problem: Problem, parents: Pool, rng: np.random.Generator) -> Fitted:
        """Return the predictor fitted to `parents`; its seed must be the first draw from the generation's `rng`."""
        if problem.fit is None:
            raise ValueError("predictor_guided needs a problem with fit")
        return problem.fit(parents.codes, parents.metric, int(rng.integers(2**31)))


class Nsga2(Spec):
    """NSGA-II: archs on the Pareto front of metric and costs, spread evenly."""

    name: Literal["nsga2"] = "nsga2"
    """Name of the strategy."""
    objectives: tuple[str, ...] = Field(default=("latency_ms",), min_length=1)
    """Costs to minimise, besides maximising the metric."""
    population: int = Field(default=100, ge=2)
    """Archs to try in a generation, and archs to keep."""
    iterations: int = Field(default=50, ge=0)
    """Generations after the first, which is random."""
    cross_prob: float = Field(default=0.9, ge=0, le=1)
    """Probability that a child has two parents."""
    mutate_prob: float = Field(default=0.1, gt=0, le=1)
    """Probability that a block, or a gene outside all blocks, is redrawn in a child."""
    resolution_prob: float = Field(default=0.5, ge=0, le=1)
    """The same probability for single numbers: resolution, frames."""
    waits: ClassVar[bool] = True

    @property
    def num_evaluations(self) -> int:
        """Archs that the whole search tries."""
        return self.population * (1 + self.iterations)

    def survivors(self, pool: Pool) -> Pool:
        """Keep the first fronts, and of the last one the least crowded archs; best first."""
        pool = pool.take(~np.isnan(pool.metric))
        values = objectives(pool, self.objectives)
        rank = ranks(values)
        order = np.lexsort((-crowding(values, rank), rank))
        return pool.take(order[: self.population])

    def children(self, problem: Problem, parents: Pool, seen: set[bytes], rng: np.random.Generator) -> Codes:
        """Return the next rows to try."""
        if not len(parents):
            known = problem.costs(problem.anchor[None])
            for name in self.objectives:
                if name not in known:
                    raise UserError(f"strategy: objectives: unknown cost {name!r}{did_you_mean(name, known)}")
            return draw(problem, seen, rng, (self.population, []))
        table = problem.table

        def winners(count: int) -> Codes:
            # parents are sorted by front and crowding, so that the first of two wins the tournament
            return parents.codes[rng.integers(len(parents), size=(2, count)).min(0)]

        def bred(count: int) -> Codes:
            mothers = winners(count)
            crossed = table.cross(mothers, winners(count), rng)
            children = np.where(rng.random((count, 1)) < self.cross_prob, crossed, mothers)
            return table.mutate(children, rng, self.mutate_prob, self.resolution_prob)

        return draw(problem, seen, rng, (self.population, [bred]))


Strategy = Random | Evolution | PredictorGuided | Nsga2
StrategySpec = Annotated[Strategy, Field(discriminator="name")]
"""The section `strategy` of a job: `{name: evolution, population: 100}`."""


def generation(
    strategy: Strategy, problem: Problem, history: Iterable[Trial], seed: int, number: int
) -> list[Arch] | None:
    """Return the archs of generation `number`, from trial number * population on; None while an earlier generation is
    incomplete.

    The result is a function of the arguments, and depends only on trials of earlier generations in `history`: neither
    their order nor later trials matter. A caller that needs single archs should keep the list. UserError for impossible
    limits.
    """
    past = _past(strategy, problem, history, seed, number)
    if past is None:
        return None
    return problem.table.archs(strategy.children(problem, *past, _rng(seed, number)))


def propose(strategy: Strategy, problem: Problem, history: Iterable[Trial], seed: int, index: int) -> Arch | None:
    """Return the arch of trial `index`; None while the generation before it is incomplete (see `generation`)."""
    number, place = divmod(index, strategy.population)
    archs = generation(strategy, problem, history, seed, number)
    return None if archs is None else archs[place]


def search(problem: Problem, strategy: Strategy, score: Score, seed: int, max_evaluations: int | None = None) -> Pool:
    """Run `strategy` in this process and return all trials in order; `.top(1)` is the best one.

    `score` takes rows of codes (`lambda codes: np.array([... for arch in table.archs(codes)])` for a score of archs).
    The proposals are those of `generation`. Ends after `max_evaluations` (default: the strategy's), or when a
    generation has no new arch.
    """
    left = max_evaluations or strategy.num_evaluations
    parents, seen, tried = _empty_pool(problem), set(), []
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
    return join(tried) if tried else _empty_pool(problem)


def predictor_reports(
    strategy: PredictorGuided, problem: Problem, history: Sequence[Trial], seed: int
) -> list[dict[str, float]]:
    """Return the quality of the predictor before each generation, a dict per generation after the first.

    `held_out_mae`, `spearman` and `num_train` are the predictor's own report; `next_mae` and `next_spearman` compare
    its predictions with the scores of the generation that it proposed, for finished trials.
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
    """Return the parents and the keys of all archs before generation `number`; None if a trial is missing."""
    by_index = {trial.index: trial for trial in history} if strategy.waits else {}
    parents, seen = _empty_pool(problem), set()
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
        _new(problem.table, problem.table.codes(trial.arch for trial in finished), seen)  # failed ones count too
        if len(scored):
            parents = strategy.survivors(join([parents, scored]) if len(parents) else scored)
    return parents, seen


def _new(table: GeneTable, codes: Codes, seen: set[bytes]) -> NDArray[np.bool_]:
    """Return a bool per row, `[n]`: True if it is not in `seen`; then add all rows to `seen`."""
    new = np.zeros(len(codes), bool)
    for row, key in enumerate(table.keys(codes)):
        new[row] = key not in seen
        seen.add(key)
    return new


def _empty_pool(problem: Problem) -> Pool:
    return Pool(np.zeros(0, np.intp), np.zeros((0, len(problem.table.genes)), np.intp), np.zeros(0), {})


def _rng(seed: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number])))
