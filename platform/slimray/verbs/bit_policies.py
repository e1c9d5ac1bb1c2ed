"""What bits cost and which limits hold, for the step `quantize`: known from shapes alone, before anything runs.

Policies are lists of [bits of the weights, bits of the inputs] in the order of `quantization.layers_of`. Needs no Ray.
"""

from typing import Any

from slimray.compress.quantization import Bits, LayerInfo
from slimray.edge import hardware
from slimray.edge.bit_costs import bit_table
from slimray.search import haq
from slimray.spec import UserError


class Costs:
    """What policies cost of `size_mb` and, on a device, `latency_ms` and `energy_mj`, and which limits hold."""

    def __init__(self, step: Any, layers: list[LayerInfo]):
        device = None if step.hardware is None else hardware.device(step.hardware)
        self.columns = 1 if step.scheme == "kmeans" else 2
        names = dict.fromkeys(["size_mb", *step.shares, *step.limits])
        books = step.scheme == "kmeans"
        self.of = {name: haq.table_cost(bit_table(device, layers, name, books)) for name in names}
        whole = self.all(self.uniform(len(layers), haq.HIGHEST))
        self.limits = {**step.limits, **{name: share * whole[name] for name, share in step.shares.items()}}

    def uniform(self, count: int, bits: int) -> haq.Policy:
        """The policy of so many bits everywhere."""
        return [[bits] * self.columns for _ in range(count)]

    def all(self, bits: haq.Policy) -> dict[str, float]:
        """What a policy costs, by name; inputs without bits count 8."""
        whole = [[row[0], row[1] if len(row) > 1 else haq.HIGHEST] for row in bits]
        return {name: cost(whole) for name, cost in self.of.items()}

    def worst(self, bits: haq.Policy) -> float:
        """The largest share of a limit that a policy takes; at most 1 keeps them all."""
        costs = self.all(bits)
        return max(costs[name] / limit for name, limit in self.limits.items())


def named(layers: list[LayerInfo], bits: haq.Policy) -> dict[str, Bits]:
    """A policy as bits by layer; without numbers for inputs they stay float."""
    return {one.name: (row[0], row[1] if len(row) > 1 else None) for one, row in zip(layers, bits, strict=True)}


def walk_of(step: Any, layers: list[LayerInfo], costs: Costs) -> haq.BitsWalk:
    """The agent's environment; UserError, with what the fewest bits cost, where they break the limits."""
    spec = step.search
    if not layers:
        raise UserError("keep: leaves no layer to quantize")
    try:
        return haq.BitsWalk(layers, costs.worst, 1.0, spec.low, spec.high, costs.columns == 2)
    except UserError:
        least = costs.all(costs.uniform(len(layers), spec.low))
        told = ", ".join(f"{name} {least[name]:.6g}, the limit is {limit:.6g}" for name, limit in costs.limits.items())
        ends = (" (8 at both ends)", "without the ends they") if costs.columns == 2 else ("", "they")
        raise UserError(
            f"limits: {spec.low} bits everywhere{ends[0]} break the limits; {ends[1]} cost {told}: raise the limits"
        ) from None


def uniform(walk: haq.BitsWalk) -> haq.Policy:
    """The policy of most bits, the same everywhere but at the ends, that keeps the budget of a walk."""
    for bits in range(walk.high, walk.low, -1):
        policy = [[bits] * walk.columns for _ in walk.layers]
        for place, pair in walk.ends.items():
            policy[place] = list(pair)
        if walk.cost(policy) <= walk.budget:
            return policy
    return haq.project([[walk.low] * walk.columns for _ in walk.layers], walk.cost, walk.budget, walk.low, walk.ends)
