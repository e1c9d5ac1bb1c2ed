"""Pruning policies under limits on costs: uniform, by global rank, or by measured sensitivity.

A policy is the number of kept channels per group: a positive multiple of `round_to`, or all channels of the group.
`choose` makes one by name. Limits apply to `macs`, `params`, `size_mb` (four bytes per parameter) and to the values
that a `meter` measures (`latency_ms`, `energy_mj`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimray.compress.criteria import Floats
from slimray.compress.groups import Groups
from slimray.spec import UserError, did_you_mean

Counts = dict[str, int]  # group -> kept channels
Meter = Callable[[Counts], Mapping[str, float]]  # measures the costs of a policy that cannot be counted
Curves = dict[str, dict[int, float]]  # group -> kept channels, with only this group pruned -> score
POLICIES = ("uniform", "ranked", "sensitivity")
RATIOS = (0.125, 0.25, 0.5, 0.75)
STEPS = 24  # bisections in the search for the largest ratio within the limits


def choices(size: int, round_to: int) -> list[int]:
    """Return the numbers of channels that a group of `size` may keep, ascending."""
    return sorted({*range(round_to, size, round_to), size})


def rounded(size: int, ratio: float, round_to: int) -> int:
    """Return the largest allowed number of channels that is at most `ratio` of `size`, or else the smallest allowed."""
    allowed = choices(size, round_to)
    return max((n for n in allowed if n <= ratio * size + 1e-9), default=allowed[0])


@dataclass(frozen=True, eq=False)
class Budget:
    """Upper limits of policies by cost. `meter` measures costs that cannot be counted, only if they are limited."""

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
                raise UserError(f"limits: {name}: must be measured: pass `meter`")

    def costs(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Return the costs of a policy, by name."""
        out = self.groups.costs(counts)
        if self.meter is not None and set(self.limits) & {"latency_ms", "energy_mj"}:
            key = tuple(counts.get(group.name, group.size) for group in self.groups.groups)
            if key not in self._seen:
                self._seen[key] = dict(self.meter(dict(counts)))
            out |= self._seen[key]
        return out

    def keeps(self, counts: Mapping[str, int]) -> bool:
        """Return True if a policy is within all limits."""
        costs = self.costs(counts)
        return all(costs[name] <= limit for name, limit in self.limits.items())

    def largest(self, policy: Callable[[float], Counts]) -> Counts:
        """Return `policy(x)` for the largest x in [0, 1] within the limits; costs must grow with x.

        Raises UserError, with the costs of the smallest policy, if none is within the limits.
        """
        if self.keeps(policy(1.0)):
            return policy(1.0)
        low, high = 0.0, 1.0
        if not self.keeps(policy(low)):
            costs = self.costs(policy(low))
            whole = self.groups.costs({})
            of = {name: f" of {whole[name]:.6g}" for name in whole}
            found = ", ".join(f"{name} {costs[name]:.6g}{of.get(name, '')}" for name in self.limits)
            raise UserError(f"limits: the smallest policy has {found}: raise the limits or lower round_to")
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.keeps(policy(middle)) else (low, middle)
        return policy(low)


def choose(
    budget: Budget,
    name: str,
    scores: Mapping[str, Floats],
    round_to: int,
    keep: float | None = None,
    score: Callable[[Counts], float] | None = None,
) -> tuple[Counts, Curves]:
    """Return the policy `name` within a budget, or with the share `keep` of channels, and its measured curves, if any.

    "uniform" keeps the same share everywhere; "ranked" uses the `scores` of channels (criteria.py) over all groups;
    "sensitivity" uses curves measured with `score` (of a policy, higher is better). Raises UserError for an unknown
    name, a `keep` out of range, "sensitivity" without `score`, or limits that cannot be reached.
    """
    if name not in POLICIES:
        raise UserError(f"policy: unknown policy {name!r}{did_you_mean(name, POLICIES)}")
    if keep is not None and not 0 < keep <= 1:
        raise UserError(f"keep: must be above 0 and at most 1 (got {keep!r})")
    groups, curves = budget.groups, Curves()
    if name == "uniform":
        of = lambda share: uniform(groups, share, round_to)  # noqa: E731
    elif name == "ranked":
        of = lambda share: ranked(groups, scores, share, round_to)  # noqa: E731
    else:
        if score is None:
            raise UserError("policy: sensitivity needs `score`, a function of a network, higher is better")
        curves = sensitivity(groups, score, round_to)
        of = lambda share: by_sensitivity(groups, curves, share, round_to)  # noqa: E731
    if keep is None:
        return budget.largest(of), curves
    if name == "uniform":
        return of(keep), curves
    most, low, high = keep * sum(groups.sizes.values()), 0.0, 1.0
    floors = {group.name: choices(group.size, round_to)[0] for group in groups.groups}
    if most <= sum(floors.values()):
        return floors, curves
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(of(middle).values()) <= most else (low, middle)
    return of(low), curves


def uniform(groups: Groups, ratio: float, round_to: int = 8) -> Counts:
    """Return the policy with the same share of channels in every group, rounded down."""
    return {group.name: rounded(group.size, ratio, round_to) for group in groups.groups}


def ranked(groups: Groups, scores: Mapping[str, Floats], share: float, round_to: int = 8) -> Counts:
    """Return the policy that keeps the channels with the highest `share` of all scores, rounded down in each group.

    The scores must be comparable across groups, as those of the criterion "group" are.
    """
    threshold = np.quantile(np.concatenate([scores[group.name] for group in groups.groups]), 1 - share)
    return {
        group.name: rounded(group.size, float((scores[group.name] >= threshold).mean()), round_to)
        for group in groups.groups
    }


def sensitivity(
    groups: Groups, score: Callable[[Counts], float], round_to: int = 8, ratios: Sequence[float] = RATIOS
) -> Curves:
    """Return measured curves: per group, kept channels -> score of the network with only this group pruned.

    `score` takes a policy (missing groups keep all); the whole network's score is part of every curve.
    """
    whole, curves = score({}), {}
    for group in groups.groups:
        counts = sorted({rounded(group.size, ratio, round_to) for ratio in ratios} - {group.size})
        curves[group.name] = {count: score({group.name: count}) for count in counts} | {group.size: whole}
    return curves


def by_sensitivity(
    groups: Groups, curves: Mapping[str, Mapping[int, float]], share: float, round_to: int = 8
) -> Counts:
    """Return the fewest channels of each group whose loss of score, by its curve, is within a common bound.

    `share` 1 allows no loss, 0 the largest loss of any curve. Curves are interpolated linearly and assumed to rise with
    the number of channels; no fewer channels are kept than were measured.
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
    """Return the features of every group for an agent (`GroupStep` of search/amc.py), over the layers that share it.

    `inputs` and `outputs` are the channels of the layers that make and use it, `kernel` and `stride` the largest of
    them, `weights` and `macs` (per sample) the totals.
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
