"""Costs of the paths of a mixed supernet, for `proxyless`: MACs, or latencies from a measured table."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from slimray.spec import UserError
from slimray.storage import absolute

if TYPE_CHECKING:
    from slimray.models.supernets.elastic import Unit
    from slimray.models.supernets.mixed import MixedNet
    from slimray.train.methods.paths import Goal
    from slimray.verbs.proxyless import ProxylessJob

Edges = tuple[tuple[float, ...], ...]  # the cost of each candidate of each mixed block


def make_goal(job: "ProxylessJob", net: "MixedNet", weight: float) -> "Goal":
    """Return the `Goal`: costs of the paths of `net` on inputs of `data.size`, and their `weight` in the loss.

    UserError `latency.table: ...` for a table that cannot be read, is not finished or lacks a unit, and
    `latency.regulariser: ...` if mul_log cannot be used.
    """
    from slimray.train.methods.paths import Goal

    spec, side = job.latency, job.data.size
    fixed, edges = _path_costs(net, side, _macs) if spec.cost == "macs" else _latencies(net, side, str(spec.table))
    goal = Goal(spec.regulariser, weight, spec.ref, fixed, edges)
    lowest = goal.of(cheapest(goal))
    if lowest <= 0:
        raise UserError(f"latency.table: {spec.table} gives a path {lowest:g} ms: profile again, with more --rounds")
    if spec.regulariser == "mul_log" and lowest <= 1 and job.search.gradient != "reinforce":
        raise UserError(f"latency.regulariser: mul_log needs costs above 1, a path has {lowest:g} ms: use add_linear")
    return goal


def _path_costs(net: "MixedNet", side: int, of: "Callable[[Unit], float]") -> tuple[float, Edges]:
    """Return the cost shared by all paths, and that of each candidate by mixed block; `of` returns a unit's cost."""
    fixed, edges = net.units(side)
    known = {unit.key: of(unit) for unit in (*fixed, *(unit for edge in edges for unit in edge if unit is not None))}
    costs = tuple(tuple(0.0 if unit is None else known[unit.key] for unit in edge) for edge in edges)
    return sum(known[unit.key] for unit in fixed), costs


def _macs(unit: "Unit") -> float:
    from slimray.edge import cost

    return float(cost.count_macs(cost.build_on_meta(unit.make).eval(), (1, *unit.input)))


def _latencies(net: "MixedNet", side: int, table: str) -> tuple[float, Edges]:
    """Return costs in ms from the table in the file `table`, read as in a search: slope x ms, and the offset once.

    Between two measured resolutions, they are interpolated in the number of pixels.
    """
    from slimray.edge import latency_table
    from slimray.edge.arch_costs import neighbours

    try:
        meter = latency_table.finished_meter(absolute(table))
        sides = (side,)
        if meter.resolutions is not None and side not in meter.resolutions:
            sides = neighbours(side, meter)
    except UserError as error:
        raise UserError(f"latency.table: {error}") from None
    lacking: list[str] = []

    def of(unit: "Unit") -> float:
        costs = meter.of(unit)
        if costs is None:
            lacking.append(unit.key)
        return float("nan") if costs is None else costs["latency_ms"]

    found = [_path_costs(net, one, of) for one in sides]
    if lacking:
        raise UserError(
            f"latency.table: {table} lacks {len(lacking)} of the units of this supernet ({min(lacking)}): profile "
            "ofa_proxyless of the same preset, width and classes, at this data.size"
        )
    (low, below), (high, above) = found[0], found[-1]
    share = 0.0 if len(sides) == 1 else (side**2 - sides[0] ** 2) / (sides[1] ** 2 - sides[0] ** 2)
    pairs = [zip(*two, strict=True) for two in zip(below, above, strict=True)]
    edges = tuple(tuple((1 - share) * a + share * b for a, b in pair) for pair in pairs)
    return meter.fixed["latency_ms"] + (1 - share) * low + share * high, edges


def cheapest(goal: "Goal") -> tuple[int, ...]:
    """Return the path with the lowest cost."""
    return tuple(costs.index(min(costs)) for costs in goal.edges)


def of_uniform(goal: "Goal") -> float:
    """Return the expected cost of a path drawn uniformly."""
    import torch

    return float(goal.expected([torch.zeros(len(costs), dtype=torch.float64) for costs in goal.edges]))
