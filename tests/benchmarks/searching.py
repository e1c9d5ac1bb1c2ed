"""Distance of a search from the optimum, where the optimum is known: every arch of a small space is scored once.

The supernet is that of `shrinking.py` on clouds, seed 0 (trained first if its weights are not there). All archs of a
part of its space are recalibrated and scored on clouds held out of training, and kept as lines of JSON in
`SLIMRAY_BENCH_DIR`. Then, under each of ten limits on MACs (deciles of the archs) and with ten seeds, random search,
evolution and predictor-guided search look for the best arch, with two budgets: a fifth of the evaluations that the
whole space takes, and a fifth of the archs within the limit, which is less. Goals: within 0.5 points of the optimum,
better than random search at equal evaluations, and a Spearman correlation of the predictor of at least 0.8 on unseen
archs.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np
from tests.benchmarks import shrinking

from slimray.arch import Arch, Space
from slimray.edge import cost
from slimray.encoding import GeneTable, costs_by_arch
from slimray.search.pareto import spearman
from slimray.search.predictor import fit_predictor
from slimray.search.problem import Pool, Problem
from slimray.search.strategies import Evolution, PredictorGuided, Random, search
from slimray.verbs.search import arch_costs
from slimray.verbs.specs import JudgeSpec

SEEDS = {"random": 10, "evolution": 10, "predictor": 10}
LIMITS, SHARE = 10, 0.2
JUDGE = JudgeSpec.model_validate({"calibrate": 160, "calibrate_batch": 40, "batch": 48})


def small_space(space: Space) -> Space:
    """576 archs of `ofa_pvcnn`: depths, the ends of widths and head, resolution of the second stage; others largest."""
    choices: dict[str, Any] = {name: [(max(values),) for values in genes] for name, genes in space.choices}
    choices["depth"] = [tuple(sorted({min(values), max(values)})) for values in space.dimensions["depth"].choices]
    choices["width"] = [(0.25, 1.0)] * len(choices["width"])
    choices["head"] = [(0.25, 1.0)]
    choices["voxel"][1] = (0.5, 1.0)
    return Space.of({name: replace(one, choices=tuple(choices[name])) for name, one in space.named})


def judged(seed: int = 0, num_stages: int | None = None) -> tuple[Space, list[Arch], np.ndarray, np.ndarray]:
    """The space, its archs, what each scores on held-out clouds (mIoU in percent) and its MACs.

    Of the supernet of that seed after `num_stages` of its stages (None: all).
    """
    setting = shrinking.SETTINGS["points"]
    job = setting.of_seed(seed)
    job = job.model_copy(update={"stages": job.stages[:num_stages], "judge": JUDGE})
    data = setting.data(job)
    *_, (_, net) = shrinking.shrink(job, data, shrinking.keeper("points", seed))
    space = small_space(net.space)
    archs, path = list(space.archs()), shrinking.place("points", f"-{seed}-{len(job.stages)}-archs.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {Arch.from_dict(line["arch"]): line["metric"] for line in lines}
    judge = shrinking.Judge(data, job, held=True)
    start, missing = time.process_time(), [arch for arch in archs if arch not in known]
    with path.open("a") as file:
        for arch in missing:
            known[arch] = judge.score(net.extract(arch), arch)
            file.write(json.dumps({"arch": arch.to_dict(), "metric": known[arch]}) + "\n")
            file.flush()
    costs = arch_costs(cost.build_on_meta(lambda: shrinking.build(job, data)), data.recipe)
    macs = np.array([costs(arch)["macs"] for arch in archs])
    print(f"{len(missing)} of {len(archs)} archs judged in {time.process_time() - start:.0f} s of one core")
    return space, archs, np.array([known[arch] for arch in archs]), macs


def strategies(budget: int) -> dict[str, Any]:
    """The three at that many evaluations, their generations small enough that there are several."""
    part = max(4, budget // 6)
    return {
        "random": Random(evaluations=budget),
        "evolution": Evolution(population=part, iterations=-(-budget // part)),
        "predictor": PredictorGuided(
            population=max(5, budget // 3), iterations=3, explore=0.1, search=Evolution(population=50, iterations=10)
        ),
    }


def regrets(
    space: Space, scores: Mapping[Arch, float], macs: Mapping[Arch, float], limit: float, budget: int
) -> dict[str, list[float]]:
    """Strategy -> by how many points its best arch is below the optimum under `limit`, for each seed."""
    table = GeneTable(space)
    costs = costs_by_arch(table, lambda arch: {"macs": macs[arch]})

    def score(codes: np.ndarray) -> np.ndarray:
        return np.array([scores[arch] for arch in table.archs(codes)])

    def fit(codes: np.ndarray, metrics: np.ndarray, seed: int) -> Any:
        return fit_predictor(space, codes, metrics, seed)

    best = max(scores[arch] for arch in scores if macs[arch] <= limit)
    out: dict[str, list[float]] = {}
    for name, strategy in strategies(budget).items():
        for seed in range(SEEDS[name]):
            pool: Pool = search(Problem(table, costs, {"macs": limit}, fit), strategy, score, seed, budget)
            assert len(pool) <= budget
            assert (pool.costs["macs"] <= limit).all()
            out.setdefault(name, []).append(best - float(pool.metric.max()))
    return out


def main() -> None:
    report(*judged())


def report(space: Space, archs: list[Arch], metric: np.ndarray, macs: np.ndarray) -> None:
    """Print how near each strategy comes to the best of `archs`, and how well the predictor ranks."""
    scores, costs = dict(zip(archs, metric.tolist(), strict=True)), dict(zip(archs, macs.tolist(), strict=True))
    print(
        f"{len(archs)} archs, {metric.min():.1f} to {metric.max():.1f} % (spread {np.ptp(metric):.1f}), MACs "
        f"{macs.min():,.0f} to {macs.max():,.0f}, Spearman of MACs and accuracy {spearman(macs, metric):.2f}",
        flush=True,
    )
    found, budget = [], round(SHARE * len(archs))
    for seed in range(SEEDS["predictor"]):
        order = np.random.default_rng(seed).permutation(len(archs))
        codes = GeneTable(space).codes(archs)
        seen, unseen = order[:budget], order[budget:]
        said = fit_predictor(space, codes[seen], metric[seen], seed).predict(codes[unseen])
        found.append(spearman(said, metric[unseen]))
    print(
        f"predictor of {budget} archs, Spearman on {len(archs) - budget} unseen: {mean(found):.3f} "
        f"({min(found):.3f} to {max(found):.3f})",
        flush=True,
    )
    for title, whole in (("of the whole space", True), ("of the archs that keep the limit", False)):
        print(f"### a fifth {title}; points below the optimum, mean over the seeds (worst)")
        all_of: dict[str, list[list[float]]] = {}
        for tenth in range(1, LIMITS + 1):
            limit = float(np.quantile(macs, tenth / LIMITS))
            inside = int((macs <= limit).sum())
            evaluations = round(SHARE * (len(archs) if whole else inside))
            row = regrets(space, scores, costs, limit, evaluations)
            text = ", ".join(f"{name} {mean(values):.2f} ({max(values):.2f})" for name, values in row.items())
            print(f"macs <= {limit:>10,.0f}, {inside:4} archs, {evaluations:3} evaluations: {text}", flush=True)
            for name, values in row.items():
                all_of.setdefault(name, []).append(values)
        by_seed = {name: np.array(rows).mean(0) for name, rows in all_of.items()}
        for name, rows in all_of.items():
            means, count = np.array(rows).mean(1), SEEDS[name]
            better = by_seed["random"][:count] - by_seed[name]
            print(
                f"{name}, {count} seeds: mean {means.mean():.2f}, worst limit {means.max():.2f}, limits within 0.5: "
                f"{(means <= 0.5).sum()} of {LIMITS}; better than random by {better.mean():.2f} +- "
                f"{better.std(ddof=1) / count**0.5:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
