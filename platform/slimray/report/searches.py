"""Parts of the page of a search: progress over trials, costs of all trials, layers of the subnets found."""

from collections.abc import Mapping, Sequence
from typing import Any

from slimray.arch import Arch
from slimray.report.charts import Curves, Scatter
from slimray.report.tables import Table

BLOCKS = 6  # characters in the bar of the largest value
NO_COSTS = ("arch", "metric")  # fields of a trial that are not costs
_LAYERS = "Gene by gene; a full bar is the largest value in the supernet, – is a block that does not run."


def history(results: Mapping[str, Any], metric: Mapping[str, Any]) -> Curves:
    """Return the best value so far after each trial, for each target."""
    best = max if metric.get("better", "higher") == "higher" else min
    series = {}
    for target, values in list(results.get("history", {}).items())[:5]:
        reached: list[tuple[int, float]] = []
        for number, value in enumerate(values, 1):
            if value is not None:
                reached.append((number, best(value, reached[-1][1]) if reached else value))
        series[target] = ([number for number, _ in reached], [value for _, value in reached])
    return Curves(f"best {metric['name']} so far, by trial", metric["unit"], series)


def fronts(results: Mapping[str, Any], metric: Mapping[str, Any]) -> list[Scatter]:
    """Return the metric of all trials by each cost, with the subnet found for each target."""
    trials, out = results.get("trials", []), []
    by_arch = {Arch.from_dict(trial["arch"]): trial for trial in trials}
    chosen = [(by_arch.get(Arch.from_dict(row["arch"])), row) for row in results.get("targets", [])]
    for cost in (name for name in trials[0] if name not in NO_COSTS) if trials else ():
        named = [(trial[cost], row["searched"], row["target"]) for trial, row in chosen if trial is not None]
        points = [(trial[cost], trial["metric"]) for trial in trials]
        out.append(Scatter(f"{metric['name']} by {cost}", cost, metric["name"], points, named, metric["better"]))
    return out


def layers(row: Mapping[str, Any], largest: Mapping[str, float]) -> Table:
    """Return the genes of a found subnet, with bars; `largest` holds the highest value of each dimension."""
    arch = Arch.from_dict(row["arch"])
    rows: list[Sequence[Any]] = []
    for name, value in row["arch"].items():
        if not (isinstance(value, int | float) or (isinstance(value, list) and _are_numbers(value))):
            continue  # describes the dimensions, not a gene
        genes = value if isinstance(value, list) else [value]
        runs = arch.runs(name) if isinstance(value, list) else (True,)
        top = largest.get(name, max(genes, default=1)) or 1
        rows.append([name, *(f"{one:g} {_bar(one / top)}" if on else "–" for one, on in zip(genes, runs, strict=True))])
    width = max((len(one) for one in rows), default=1)
    filled = [[*one, *[""] * (width - len(one))] for one in rows]
    return Table(f"Layers of {row['run']}", ["dimension", *map(str, range(1, width))], filled, _LAYERS)


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(one, int | float) for one in values)


def _bar(share: float) -> str:
    return "█" * max(1, round(BLOCKS * share)) if share > 0 else ""
