"""Costs of bits, and the limits on them, for the step `quantize`: computed from shapes alone, before anything runs.

Policies are lists of [bits of the weights, bits of the inputs] in the order of `quantization.layers_of`. Needs no Ray.
"""

from typing import Any

from slimray.compress.quantization import Bits, LayerInfo
from slimray.edge import hardware
from slimray.edge.bit_costs import bit_table
from slimray.search import haq
from slimray.spec import UserError


class Costs:
    """Costs of policies, `size_mb` and on a device also `latency_ms` and `energy_mj`, and the limits in numbers."""

    def __init__(self, step: Any, layers: list[LayerInfo]):
        device = None if step.hardware is None else hardware.device(step.hardware)
        self.columns = 1 if step.scheme == "kmeans" else 2
        names = dict.fromkeys(["size_mb", *step.shares, *step.limits])
        books = step.scheme == "kmeans"
        self.of = {name: haq.table_cost(bit_table(device, layers, name, books)) for name in names}
        whole = self.all(self.uniform(len(layers), haq.HIGHEST))
        self.limits = {**step.limits, **{name: share * whole[name] for name, share in step.shares.items()}}

    def uniform(self, count: int, bits: int) -> haq.Policy:
        """Return the policy with `bits` everywhere, for `count` layers."""
        return [[bits] * self.columns for _ in range(count)]

    def all(self, bits: haq.Policy) -> dict[str, float]:
        """Return all costs of a policy by name; inputs without bits count as 8 bits."""
        whole = [[row[0], row[1] if len(row) > 1 else haq.HIGHEST] for row in bits]
        return {name: cost(whole) for name, cost in self.of.items()}

    def worst(self, bits: haq.Policy) -> float:
        """Return the largest ratio of a cost to its limit; a policy within all limits has at most 1."""
        costs = self.all(bits)
        return max(costs[name] / limit for name, limit in self.limits.items())


def named(layers: list[LayerInfo], bits: haq.Policy) -> dict[str, Bits]:
    """Return a policy as bits by layer name; without bits for inputs, these stay float (None)."""
    return {one.name: (row[0], row[1] if len(row) > 1 else None) for one, row in zip(layers, bits, strict=True)}


def walk_of(step: Any, layers: list[LayerInfo], costs: Costs) -> haq.BitsWalk:
    """Return the agent's environment; UserError, with the costs of the fewest bits, if even these exceed the limits."""
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
            f"limits: {spec.low} bits everywhere{ends[0]} exceed the limits; {ends[1]} cost {told}: raise the limits"
        ) from None


def uniform(walk: haq.BitsWalk) -> haq.Policy:
    """Return the policy with the most bits within the budget of a walk, the same bits everywhere but at the ends."""
    for bits in range(walk.high, walk.low, -1):
        policy = [[bits] * walk.columns for _ in walk.layers]
        for place, pair in walk.ends.items():
            policy[place] = list(pair)
        if walk.cost(policy) <= walk.budget:
            return policy
    return haq.project([[walk.low] * walk.columns for _ in walk.layers], walk.cost, walk.budget, walk.low, walk.ends)
