"""Trials of a search or a sweep as plain numbers: score, costs, and the axes on which they are drawn."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slimray.arch import Arch
from slimray.report.dashboard.pieces import finite
from slimray.report.dashboard.watch import Look
from slimray.report.metrics import metrics_of


# ---- trials ----------------------------------------------------------------------------------------------------------
def all_trials(look: Look) -> list[Mapping[str, Any]]:
    return [one for trials in look.trials.values() for one in trials]


def trial_key(target: str, trial: Mapping[str, Any]) -> str:
    return f"{target} {trial.get('index', '')}".strip()


def score_of(trial: Mapping[str, Any]) -> Any:
    return trial.get("metric")


def costs_of(trial: Mapping[str, Any]) -> dict[str, float]:
    """Return the costs of a trial: those under `costs`, or, in results.json and front.json, beside the metric."""
    told = trial.get("costs")
    own = (
        told if isinstance(told, Mapping) else {n: v for n, v in trial.items() if n not in ("metric", "index", "arch")}
    )
    return {str(name): value for name, value in own.items() if finite(value)}


def points_of(trials: Sequence[Mapping[str, Any]], cost: str) -> list[tuple[float, float]]:
    """Return (cost, metric) of the trials that have both."""
    rows = [(costs_of(one), score_of(one)) for one in trials]
    return [(costs[cost], score) for costs, score in rows if cost in costs and finite(score)]


def dimensions(trial: Mapping[str, Any]) -> dict[str, float]:
    """Return the axis values of a trial: of its arch (depth, mean kernel, ...) or configuration, and its costs."""
    out: dict[str, float] = {}
    if isinstance(trial.get("arch"), Mapping):
        arch = Arch.from_dict(trial["arch"])
        for name, genes in arch.dimensions:
            if any(name == depth.name for depth in arch.depths):
                out[f"{name}, sum"] = float(sum(genes))  # type: ignore[arg-type]
            elif isinstance(genes, tuple):
                used = [gene for gene, runs in zip(genes, arch.runs(name), strict=True) if runs]
                out[f"{name}, mean"] = float(np.mean(used)) if used else math.nan
            else:
                out[name] = float(genes)
    elif isinstance(trial.get("config"), Mapping):
        out |= {str(name): float(value) for name, value in trial["config"].items() if finite(value)}
    return out | costs_of(trial)


def axes_of(trials: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[float | None]]:
    """Return axis -> its value in each trial, at most nine axes, the metric last."""
    rows = [dimensions(one) for one in trials]
    names = list(dict.fromkeys(name for row in rows for name in row))[:8]
    return {name: [row.get(name) for row in rows] for name in names if name != metric} | {
        metric: list(map(score_of, trials))
    }


def metric_of(look: Look) -> str:
    named = look.results.get("metric")
    if isinstance(named, str):
        return named
    judged = [row for stage in look.stages for row in stage.judged]
    found = [one.get("metrics") for one in all_trials(look)[:20]] + judged
    names = {name for one in found if isinstance(one, Mapping) for name in one}
    return next((metric["name"] for metric in metrics_of(names, look.results)), "metric")


def better_of(look: Look) -> str:
    """Return "higher" or "lower", the better direction of the trials' metric."""
    return next((metric["better"] for metric in metrics_of([metric_of(look)], look.results)), "higher")


def best_of_trials(look: Look) -> float | None:
    """Return the best score of all trials, None if no trial has one."""
    choose = max if better_of(look) == "higher" else min
    return choose(filter(finite, map(score_of, all_trials(look))), default=None)
