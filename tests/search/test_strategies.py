"""Searches are functions of the past, keep their limits, and find the best archs."""

import itertools
import json
import random
from functools import partial
from typing import get_args

import numpy as np
import pytest
from pydantic import TypeAdapter

from slimray.arch import Dimension, Space, Stage
from slimray.encoding import GeneTable, cost_tables, costs_by_arch, part
from slimray.search.pareto import best_under, front, spearman
from slimray.search.problem import Pool, Problem, Trial
from slimray.search.strategies import (
    Evolution,
    Nsga2,
    PredictorGuided,
    Random,
    Strategy,
    StrategySpec,
    generation,
    predictor_reports,
    propose,
    search,
)
from slimray.spec import Spec, UserError, parse

SPACE = Space.of(
    {
        "kernel": Dimension.per_block([(3, 5, 7)] * 6),
        "depth": Dimension.depth([(1, 2, 3)] * 2, [Stage(3)] * 2),
        "resolution": Dimension.number((16, 24, 32), input="side"),
    }
)  # 4563 archs
LARGE = Space.of(
    {"kernel": Dimension.per_block([(3, 5, 7)] * 40, None), "resolution": Dimension.number((16, 24, 32), input="side")}
)
TABLE = GeneTable(SPACE)
COSTS = cost_tables(
    TABLE,
    {
        "latency_ms": [
            part(TABLE, [("kernel", i), ("resolution", 0)], lambda k, r: (k**2 + 10) * (r / 16) ** 2 / 50)
            for i in range(6)
        ],
        "params": [part(TABLE, [("kernel", i)], lambda k, i=i: k**2 * (i + 1)) for i in range(6)],
    },
)
EFFECTS = np.random.default_rng(0).normal(size=(len(TABLE.genes), 3))
PAIRS = np.random.default_rng(1).normal(size=(5, 3, 3))


def made_up_score(codes):
    """Return additive effects of the active genes, and of pairs of neighbouring blocks, in percent."""
    runs = TABLE.runs(codes)
    score = np.where(runs, EFFECTS[np.arange(codes.shape[1]), codes], 0).sum(1)
    for i in range(5):
        score += np.where(runs[:, i] & runs[:, i + 1], PAIRS[i][codes[:, i], codes[:, i + 1]], 0)
    return 70 + score


EVERY = TABLE.codes(SPACE.archs())
LIMIT = {"latency_ms": float(np.quantile(COSTS(EVERY)["latency_ms"], 0.3))}
FREE, TIGHT = Problem(TABLE, COSTS), Problem(TABLE, COSTS, LIMIT)


class Ridge:
    """A linear predictor, fitted in closed form."""

    def __init__(self, table, codes, metrics, seed):
        self.table, self.mean = table, metrics.mean()
        features = table.features(codes)
        square = features.T @ features + np.eye(features.shape[1])
        self.weights = np.linalg.solve(square, features.T @ (metrics - self.mean))
        self.report = {"held_out_mae": 0.5, "spearman": 0.8, "num_train": float(len(codes)), "seed": float(seed)}

    def predict(self, codes):
        return self.table.features(codes) @ self.weights + self.mean


GUIDED = Problem(TABLE, COSTS, LIMIT, partial(Ridge, TABLE))
SMALL_SETTINGS = {
    "random": Random(evaluations=120),
    "evolution": Evolution(population=20, iterations=5),
    "predictor_guided": PredictorGuided(population=20, iterations=5, search=Evolution(population=20, iterations=10)),
    "nsga2": Nsga2(population=20, iterations=5),
}


@pytest.fixture(params=[one.model_fields["name"].default for one in get_args(Strategy)])
def strategy(request):
    return SMALL_SETTINGS[request.param]


def trial(index, arch):
    codes = TABLE.codes([arch])
    costs = {name: float(values[0]) for name, values in COSTS(codes).items()}
    return Trial(index, arch, float(made_up_score(codes)[0]), costs)


def run_in_parallel(strategy, problem, seed, workers, history=()):
    """Run trials up to num_evaluations on `workers` that finish in random order; resume from `history`."""
    rng, done, waiting = random.Random(workers), list(history), []
    known = {one.index for one in done}
    todo = [index for index in range(strategy.num_evaluations) if index not in known]
    archs: dict[int, list] = {}
    while todo or waiting:
        while todo and len(waiting) < workers:
            number, place = divmod(todo[0], strategy.population)
            archs[number] = archs.get(number) or generation(strategy, problem, done, seed, number)
            if archs[number] is None:
                assert waiting
                break
            waiting.append((todo.pop(0), archs[number][place]))
        done.append(trial(*waiting.pop(rng.randrange(len(waiting)))))
    return done


def by_index(trials):
    return [one.arch.to_dict() for one in sorted(trials, key=lambda one: one.index)]


def test_the_order_in_which_trials_finish_does_not_matter(strategy):
    alone, many = (run_in_parallel(strategy, GUIDED, 3, workers) for workers in (1, 7))
    assert [one.index for one in many] != [one.index for one in alone]
    assert by_index(many) == by_index(alone)
    assert by_index(run_in_parallel(strategy, GUIDED, 4, 1)) != by_index(alone)


def test_a_search_cut_anywhere_goes_on_as_the_same_search(strategy):
    whole = run_in_parallel(strategy, GUIDED, 3, 5)
    for cut in (0, 13, 20, 57, 101):
        assert by_index(run_in_parallel(strategy, GUIDED, 3, 4, whole[:cut])) == by_index(whole)


def test_a_search_in_process_is_the_same_search(strategy):
    found = search(GUIDED, strategy, made_up_score, 3).trials(TABLE)
    assert by_index(found) == by_index(run_in_parallel(strategy, GUIDED, 3, 1))
    assert [one.index for one in found] == list(range(strategy.num_evaluations))
    assert found[-1] == trial(found[-1].index, found[-1].arch)
    assert len(search(GUIDED, strategy, made_up_score, 3, 33)) == 33


def test_a_proposal_waits_for_the_generation_before_it_and_no_other(strategy):
    whole = run_in_parallel(strategy, GUIDED, 3, 1)
    size = strategy.population
    lacking = whole[: 2 * size - 1] + whole[2 * size :]
    assert propose(strategy, GUIDED, lacking, 3, 2 * size - 1) == whole[2 * size - 1].arch
    assert (propose(strategy, GUIDED, lacking, 3, 2 * size) is None) == strategy.waits
    if len(whole) > 2 * size:
        assert propose(strategy, GUIDED, whole[: 2 * size], 3, 2 * size) == whole[2 * size].arch


def test_every_proposal_keeps_the_limits_and_is_new(strategy):
    for problem in (GUIDED, Problem(TABLE, COSTS, LIMIT | {"params": 500.0}, partial(Ridge, TABLE))):
        found = search(problem, strategy, made_up_score, 5)
        assert len(found) == strategy.num_evaluations
        for name, limit in problem.limits.items():
            assert (found.costs[name] <= limit).all()
        assert len(set(TABLE.archs(found.codes))) == len(found)


def test_evolution_beats_random_search_at_equal_evaluations():
    best = {}
    for strategy in (Evolution(population=20, iterations=9), Random(evaluations=200)):
        best[strategy.name] = [search(TIGHT, strategy, made_up_score, seed).metric.max() for seed in range(10)]
    truth = made_up_score(EVERY[TIGHT.keeps(EVERY)]).max()
    regret = {name: truth - np.array(found) for name, found in best.items()}
    assert min(regret["evolution"].min(), regret["random"].min()) >= 0
    assert regret["evolution"].mean() < 0.5 * regret["random"].mean()
    assert (regret["evolution"] <= regret["random"]).sum() >= 8


def test_a_predictor_saves_measurements_in_a_large_space():
    table = GeneTable(LARGE)
    gains = np.random.default_rng(2).normal(size=(41, 3))

    def score(codes):
        alike = (codes[:, :39] == codes[:, 1:40]).sum(1)
        return gains[np.arange(41), codes].sum(1) - 0.3 * alike

    problem = Problem(table, fit=partial(Ridge, table))
    guided = PredictorGuided(population=40, iterations=4, search=Evolution(population=50, iterations=40))
    best = [
        [search(problem, one, score, seed).metric.max() for seed in range(5)]
        for one in (guided, Evolution(population=40, iterations=4))
    ]
    assert min(best[0]) > max(best[1])


def test_the_predictor_is_judged_by_what_it_then_proposed():
    strategy = SMALL_SETTINGS["predictor_guided"]
    history = run_in_parallel(strategy, GUIDED, 3, 3)
    reports = predictor_reports(strategy, GUIDED, history, 3)
    assert [report["num_train"] for report in reports] == [20, 40, 60, 80, 100]
    second = sorted(history, key=lambda one: one.index)[20:40]
    predictor = Ridge(
        TABLE,
        TABLE.codes(one.arch for one in sorted(history, key=lambda one: (-one.metric, one.index)) if one.index < 20),
        np.array(sorted((one.metric for one in history if one.index < 20), reverse=True)),
        0,
    )
    off = predictor.predict(TABLE.codes(one.arch for one in second)) - [one.metric for one in second]
    assert reports[0]["next_mae"] == pytest.approx(np.abs(off).mean())
    assert len(predictor_reports(strategy, GUIDED, [t for t in history if t.index < 45], 3)) == 2


def test_nsga2_finds_the_true_front():
    every = [trial(i, arch) for i, arch in enumerate(SPACE.archs())]
    truth = front(every, ["latency_ms"])
    assert 8 < len(truth) < 100
    found = search(FREE, Nsga2(population=40, iterations=40), made_up_score, 0)
    assert len(found) < 0.4 * len(every)
    assert {one.arch for one in front(found.trials(TABLE), ["latency_ms"])} == {one.arch for one in truth}


def test_nsga2_takes_several_costs():
    strategy = Nsga2(population=20, iterations=14, objectives=("latency_ms", "params"))
    truth = front([trial(i, arch) for i, arch in enumerate(SPACE.archs())], strategy.objectives)
    hits = []
    for one in (strategy, Random(evaluations=strategy.num_evaluations)):
        archs = {found.arch for found in search(FREE, one, made_up_score, 1).trials(TABLE)}
        hits.append(np.mean([best.arch in archs for best in truth]))
    assert hits[0] > 2 * hits[1]
    with pytest.raises(UserError, match="objectives: unknown cost 'latency', did you mean 'latency_ms'"):
        search(FREE, Nsga2(objectives=("latency",)), made_up_score, 0)


def test_a_limit_that_only_one_arch_keeps_is_kept():
    costs = COSTS(TABLE.smallest[None])
    problem = Problem(TABLE, COSTS, {"latency_ms": float(costs["latency_ms"][0])})
    kept = EVERY[problem.keeps(EVERY)]
    found = search(problem, Evolution(population=10, iterations=50), made_up_score, 0)
    assert set(TABLE.archs(found.codes)) == set(TABLE.archs(kept)) == {SPACE.smallest()}
    assert len(found) == 10  # the second generation has no new arch, so the search ends
    assert generation(Evolution(population=3), problem, [], 0, 0) == [SPACE.smallest()] * 3


def test_an_impossible_limit_is_refused_with_the_smallest_value_found():
    asked = []

    def costs(codes):
        asked.append(len(codes))
        return COSTS(codes)

    for strategy in (Evolution(), Random()):
        problem = Problem(TABLE, costs, {"latency_ms": 0.5, "params": 1e9})
        with pytest.raises(UserError) as error:
            search(problem, strategy, made_up_score, 0)
        smallest = COSTS(EVERY)["latency_ms"].min()
        assert str(error.value) == (
            f"limits: latency_ms: no arch is at most 0.5, the smallest found is {smallest:.6g}: "
            "raise the limit, or search a space with smaller archs"
        )
        assert sum(asked) < 200
        asked.clear()
    with pytest.raises(UserError, match="limits: unknown cost 'latency', did you mean 'latency_ms'"):
        propose(Random(), Problem(TABLE, COSTS, {"latency": 1}), [], 0, 0)


def test_the_smallest_arch_need_not_be_the_cheapest():
    table = GeneTable(SPACE)
    parts = [part(table, [("kernel", i)], lambda k: {3: 9.0, 5: 4.0, 7: 5.0}[k]) for i in range(6)]
    costs = cost_tables(table, {"latency_ms": parts})
    assert costs(table.smallest[None])["latency_ms"] == 18
    found = search(Problem(table, costs, {"latency_ms": 8.5}), Random(evaluations=30), made_up_score, 0)
    assert set(found.costs["latency_ms"]) == {8.0}
    with pytest.raises(UserError, match="the smallest found is 8:"):
        search(Problem(table, costs, {"latency_ms": 7.9}), Random(), made_up_score, 0)


def test_limits_that_exclude_each_other_are_refused():
    table = GeneTable(SPACE)
    costs = costs_by_arch(table, lambda arch: {"a": float(arch["resolution"]), "b": float(48 - arch["resolution"])})
    assert search(Problem(table, costs, {"a": 24, "b": 24}), Random(evaluations=9), made_up_score, 0)
    with pytest.raises(UserError, match="no arch found that keeps all of them, the closest has a 24, b 24"):
        search(Problem(table, costs, {"a": 24, "b": 23}), Random(), made_up_score, 0)


def test_a_space_tried_to_the_end_ends_the_search():
    tiny = GeneTable(
        Space.of({"width": Dimension.per_stage([(8, 16, 24)] * 2), "resolution": Dimension.number((16, 32))})
    )
    for strategy in (Random(), Evolution(population=5), Nsga2(population=5, objectives=("params",))):
        problem = Problem(tiny, costs_by_arch(tiny, lambda arch: {"params": float(sum(arch["width"]))}))
        found = search(problem, strategy, lambda codes: codes.sum(1).astype(float), 0)
        assert len(set(tiny.archs(found.codes))) == 18
        assert len(found) < 18 + strategy.population


def test_failed_trials_count_as_finished_and_are_no_parents():
    strategy = Evolution(population=10, iterations=3, parent_ratio=1.0, mutate_prob=0.01, resolution_prob=0.0)
    first = generation(strategy, FREE, [], 0, 0)
    assert first is not None
    small = [arch["resolution"] == 16 for arch in first]
    assert 0 < sum(small) < 10
    history = [Trial(i, arch, float("nan") if low else 50.0, {}) for i, (arch, low) in enumerate(zip(first, small))]
    second = generation(strategy, FREE, history, 0, 1)
    assert second is not None
    assert all(arch["resolution"] != 16 for arch in second)
    failed = [Trial(i, arch, float("nan"), {}) for i, arch in enumerate(first)]
    assert len(generation(strategy, FREE, failed, 0, 1) or ()) == 10
    assert best_under(failed, {}) is None
    assert front(failed, []) == []


def test_a_trial_that_failed_needs_no_costs():
    strategy = Nsga2(population=10, iterations=3)
    first = generation(strategy, FREE, [], 0, 0) or []
    history = [Trial(i, arch, float("nan"), {}) if i % 2 else trial(i, arch) for i, arch in enumerate(first)]
    second = generation(strategy, FREE, history, 0, 1)
    assert len(set(second or ()) - set(first)) == 10  # and is not tried again
    failed = [Trial(i, arch, float("nan"), {}) for i, arch in enumerate(first)]
    assert len(set(generation(strategy, FREE, failed, 0, 1) or ()) - set(first)) == 10


def test_parents_are_the_best_of_all_generations():
    strategy = Evolution(population=20, iterations=5)
    found = search(FREE, strategy, made_up_score, 0)
    folded = strategy.survivors(found.take(slice(0, 20)))
    for start in range(20, len(found), 20):
        both = [folded, found.take(slice(start, start + 20))]
        folded = strategy.survivors(
            Pool(
                np.concatenate([p.index for p in both]),
                np.concatenate([p.codes for p in both]),
                np.concatenate([p.metric for p in both]),
                {},
            )
        )
    assert folded.index.tolist() == found.top(5).index.tolist()


def test_the_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    for costs in (["latency_ms"], ["latency_ms", "params"]):
        archs = TABLE.archs(TABLE.sample(150, rng))
        trials = [
            Trial(i, arch, float(rng.integers(8)), {n: float(rng.integers(8)) for n in ("latency_ms", "params")})
            for i, arch in enumerate(dict.fromkeys(archs))
        ]

        def beats(a, b, costs=costs):
            pairs = [(-a.metric, -b.metric), *((a.costs[n], b.costs[n]) for n in costs)]
            return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

        found = front(trials, costs)
        assert {t.index for t in found} == {t.index for t in trials if not any(beats(o, t) for o in trials)}
        assert [t.costs["latency_ms"] for t in found] == sorted(t.costs["latency_ms"] for t in found)
    assert front([trials[0], Trial(99, trials[0].arch, 100.0, trials[0].costs)], ["params"]) == [trials[0]]


def test_the_best_under_limits_is_the_first_of_the_highest():
    arch = SPACE.smallest()
    trials = [Trial(i, arch, m, {"ms": c}) for i, (m, c) in enumerate([(70, 9), (60, 3), (65, 5), (65, 4)])]
    assert best_under(trials[::-1], {"ms": 6}) is trials[2]
    assert best_under(trials, {}) is trials[0]
    assert best_under(trials, {"ms": 1}) is None


def test_rank_correlation_is_spearmans():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 4000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826816681233)  # with a tie
    assert np.isnan(spearman([1, 1], [1, 2]))


def test_settings_are_those_published():
    settings = Evolution()
    assert (settings.population, settings.iterations, settings.num_evaluations) == (100, 500, 50_100)
    problem = Problem(GeneTable(LARGE))
    parents = settings.survivors(search(problem, Random(evaluations=200), lambda codes: codes.sum(1), 0))
    children = settings.children(problem, parents, set(), np.random.default_rng(0))
    alike = np.array([(child == parents.codes).mean(1).max() for child in children])  # with the nearest parent
    assert (len(parents), len(children)) == (25, 100)
    assert alike[:50].min() > 0.75 > alike[50:].mean()  # mutants of one parent first, then children of two


def test_a_strategy_is_read_from_yaml():
    class Job(Spec):
        strategy: StrategySpec

    read = parse(Job, {"strategy": {"name": "evolution", "population": 40, "mutate_prob": 0.2}}, "job.yaml").strategy
    assert read == Evolution(population=40, mutate_prob=0.2)
    assert TypeAdapter(StrategySpec).validate_json(json.dumps(read.model_dump())) == read
    nested = {"name": "predictor_guided", "search": {"iterations": 7}}
    assert parse(Job, {"strategy": nested}, "job.yaml").strategy.search == Evolution(iterations=7)
    with pytest.raises(UserError, match=r"strategy\.name: unknown name 'evolutoin', did you mean 'evolution'"):
        parse(Job, {"strategy": {"name": "evolutoin"}}, "job.yaml")
    with pytest.raises(UserError, match=r"strategy\.popluation: unknown field, did you mean 'population'"):
        parse(Job, {"strategy": {"name": "nsga2", "popluation": 5}}, "job.yaml")


def test_nobody_needs_to_be_tried_for_a_first_generation(strategy):
    first = generation(strategy, GUIDED, [], 11, 0)
    assert first is not None
    assert len(first) == strategy.population
    assert list(itertools.islice((propose(strategy, GUIDED, [], 11, i) for i in range(3)), 3)) == first[:3]
