"""Metrics among the numbers of a run: their names, units and which direction is better.

The results.json of a run holds the metrics of its task as plain values (`Metric.to_plain`). For older runs without
them, and for unfinished runs, the task is inferred from the names of the numbers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

Metric = Mapping[str, Any]
"""A metric as plain values: `name`, `label`, `unit` ("%" is 0-100), `better`, `main`, `share`."""


def metrics_of(names: Iterable[str], results: Mapping[str, Any]) -> list[Metric]:
    """Return the metrics among the numbers of these names, the most important first; [] if none is known."""
    written = results.get("metrics")
    known = set(names)
    if isinstance(written, list) and written:
        return [one for one in written if one["name"] in known]
    from slimray.tasks import TASKS  # imports torch, not needed for runs that store their metrics

    def fit(metrics: Sequence[Any]) -> int:
        return sum(metric.main and metric.name in known for metric in metrics)

    best = max((task.metrics for task in TASKS.values()), key=fit)
    return [metric.to_plain() for metric in best if metric.name in known] if fit(best) else []


def main_ones(metrics: Sequence[Metric]) -> list[Metric]:
    """Return the metrics for headlines and charts."""
    return [metric for metric in metrics if metric["main"]]


def names_in(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the names of the numbers in rows, without the phase `val/`."""
    return {name.removeprefix("val/") for row in rows for name in row if not name.startswith(("train/", "time/"))}


def best_of(rows: Sequence[Mapping[str, Any]], metric: Metric, prefix: str = "val/") -> Mapping[str, Any]:
    """Return the first row with the best value of the metric, {} if no row has it."""
    name = prefix + metric["name"]
    judged = [row for row in rows if finite(row.get(name))]
    choose = max if metric["better"] == "higher" else min
    return choose(judged, key=lambda row: row[name], default={})


def text_of(metric: Metric, value: Any) -> str:
    """Return a value of a metric with its unit: `71.4 %`, `33.66 dB`."""
    if not finite(value):
        return "–"
    return f"{value:.1f} %" if metric["unit"] == "%" else f"{value:.4g} {metric['unit']}".rstrip()


def finite(value: Any) -> TypeGuard[float]:
    """Return True if a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
