"""How many channels stay in each group: uniform, by global rank, by measured sensitivity, under limits on costs.

A policy is an `Arch` of `space(groups)`: a dimension "channels" with a gene per group, so that every search strategy
can look for one. Numbers are multiples of `round_to` (at least one of them) or all channels of a group. Limits are
on `macs`, `params`, `size_mb` (four bytes a parameter) and on what a `meter` measures (`latency_ms`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimray.arch import Arch, Dimension, Space
from slimray.compress.criteria import Floats
from slimray.compress.groups import Groups
from slimray.spec import UserError, did_you_mean

Counts = dict[str, int]  # group -> channels that stay
Meter = Callable[[Counts], Mapping[str, float]]  # what a policy measures, beside what is counted
RATIOS = (0.125, 0.25, 0.5, 0.75)
STEPS = 24  # halvings of a search for the largest ratio that keeps the limits


def choices(size: int, round_to: int) -> list[int]:
    """The numbers of channels that a group of `size` may keep, ascending."""
    return sorted({*range(round_to, size, round_to), size})


def space(groups: Groups, round_to: int = 8) -> Space:
    """All policies: a gene per group, in the order of the groups. UserError for a `round_to` below 1."""
    if round_to < 1:
        raise UserError(f"round_to: must be at least 1 (got {round_to})")
    genes = [choices(group.size, round_to) for group in groups.groups]
    return Space.of({"channels": Dimension.per_block(genes, skipped_by=None)})


def counts_of(groups: Groups, arch: Arch) -> Counts:
    """The policy that an arch of `space` is."""
    return {group.name: int(gene) for group, gene in zip(groups.groups, arch["channels"], strict=True)}


def arch_of(groups: Groups, counts: Mapping[str, int], round_to: int = 8) -> Arch:
    """The arch that a policy is; UserError for numbers that the space does not have."""
    genes = [counts.get(group.name, group.size) for group in groups.groups]
    return space(groups, round_to).arch({"channels": genes})


def rounded(size: int, ratio: float, round_to: int) -> int:
    """The largest allowed number of channels that is at most `ratio` of `size`, or the smallest allowed one."""
    allowed = choices(size, round_to)
    return max((n for n in allowed if n <= ratio * size + 1e-9), default=allowed[0])


@dataclass(frozen=True, eq=False)
class Budget:
    """What policies may cost: `limits` by name, at most. `meter` measures what is not counted, only if limited."""

    groups: Groups
    limits: Mapping[str, float]
    meter: Meter | None = None
    _seen: dict[tuple[int, ...], dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = ("macs", "params", "size_mb", "latency_ms", "energy_mj")
        for name, limit in self.limits.items():
            if name not in known:
                raise UserError(f"limits: unknown cost {name!r}{did_you_mean(name, known)}")
            if not limit > 0:
                raise UserError(f"limits: {name}: must be > 0 (got {limit!r})")
            if name in known[3:] and self.meter is None:
                raise UserError(f"limits: {name}: nothing here measures it: pass `meter`")

    def costs(self, counts: Mapping[str, int]) -> dict[str, float]:
        """What a policy costs, by name."""
        out = self.groups.costs(counts)
        out["size_mb"] = out["params"] * 4e-6
        if self.meter is not None and set(self.limits) & {"latency_ms", "energy_mj"}:
            key = tuple(counts.get(group.name, group.size) for group in self.groups.groups)
            if key not in self._seen:
                self._seen[key] = dict(self.meter(dict(counts)))
            out |= self._seen[key]
        return out

    def keeps(self, counts: Mapping[str, int]) -> bool:
        """Whether a policy keeps all limits."""
        costs = self.costs(counts)
        return all(costs[name] <= limit for name, limit in self.limits.items())

    def largest(self, policy: Callable[[float], Counts]) -> Counts:
        """The policy of the largest number in [0, 1] that keeps the limits, of policies that grow with it.

        UserError, with what the smallest costs, where none keeps them.
        """
        if self.keeps(policy(1.0)):
            return policy(1.0)
        low, high = 0.0, 1.0
        if not self.keeps(policy(low)):
            costs = self.costs(policy(low))
            found = ", ".join(f"{name} {costs[name]:.6g}" for name in self.limits)
            raise UserError(f"limits: the smallest policy has {found}: raise the limits or lower round_to")
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.keeps(policy(middle)) else (low, middle)
        return policy(low)


def uniform(groups: Groups, ratio: float, round_to: int = 8) -> Counts:
    """The same share of channels in every group, rounded down."""
    return {group.name: rounded(group.size, ratio, round_to) for group in groups.groups}


def ranked(groups: Groups, scores: Mapping[str, Floats], share: float, round_to: int = 8) -> Counts:
    """The channels whose score is among the highest `share` of all groups together, rounded down in each group.

    The scores must compare across groups, as those of the criterion "group" do.
    """
    threshold = np.quantile(np.concatenate([scores[group.name] for group in groups.groups]), 1 - share)
    return {
        group.name: rounded(group.size, float((scores[group.name] >= threshold).mean()), round_to)
        for group in groups.groups
    }


def sensitivity(
    groups: Groups, score: Callable[[Counts], float], round_to: int = 8, ratios: Sequence[float] = RATIOS
) -> dict[str, dict[int, float]]:
    """Measured curves: per group, channels kept -> score of the network in which that group alone is pruned.

    `score` takes a policy (groups that are missing keep all); the whole network's score is part of every curve.
    """
    whole, curves = score({}), {}
    for group in groups.groups:
        counts = sorted({rounded(group.size, ratio, round_to) for ratio in ratios} - {group.size})
        curves[group.name] = {count: score({group.name: count}) for count in counts} | {group.size: whole}
    return curves


def by_sensitivity(
    groups: Groups, curves: Mapping[str, Mapping[int, float]], share: float, round_to: int = 8
) -> Counts:
    """The fewest channels of each group whose loss of score, read off its curve, is at most a common one.

    `share` 1 allows no loss, 0 the largest loss of any curve. Between measured points the curve is a straight line; it
    is taken to rise with the number of channels, and nothing is kept below the fewest that were measured.
    """
    worst = max(max(curve.values()) - min(curve.values()) for curve in curves.values())
    out = {}
    for group in groups.groups:
        points = sorted(curves[group.name].items())
        counts, scores = np.array([p[0] for p in points], float), np.maximum.accumulate([p[1] for p in points])
        measured = [n for n in choices(group.size, round_to) if n >= counts[0]]
        lost = scores[-1] - np.interp(measured, counts, scores)
        allowed = [n for n, loss in zip(measured, lost) if loss <= (1 - share) * worst + 1e-12]
        out[group.name] = allowed[0] if share < 1 else group.size
    return out


def group_features(groups: Groups, round_to: int = 8) -> list[dict[str, Any]]:
    """Of every group what an agent sees of it (`GroupStep` of search/amc.py): totals over the layers that have it.

    `inputs` and `outputs` are channels of the layers that make and use it, `kernel` and `stride` the largest, `weights`
    and `macs` (per sample) those of all of them.
    """
    macs, out = groups.layer_macs({}), []
    for group in groups.groups:
        names = dict.fromkeys((*group.makers, *group.users))
        modules: list[Any] = [groups.layers[name].module for name in names]
        out.append(
            {
                "name": group.name,
                "choices": tuple(choices(group.size, round_to)),
                "linear": all(not hasattr(one, "kernel_size") for one in modules),
                "inputs": sum(len(_lane(groups, name, "inputs")) for name in names),
                "outputs": sum(len(_lane(groups, name, "outputs")) for name in names),
                "stride": max(max(getattr(one, "stride", (0,))) for one in modules),
                "kernel": max(max(getattr(one, "kernel_size", (1,))) for one in modules),
                "weights": float(sum(one.weight.numel() for one in modules if hasattr(one, "weight"))),
                "macs": sum(macs.get(name, 0.0) for name in names),
            }
        )
    return out


def _lane(groups: Groups, name: str, side: str) -> Any:
    lane = getattr(groups.layers[name], side)
    return () if lane is None else lane
