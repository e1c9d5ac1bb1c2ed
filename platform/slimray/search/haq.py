"""HAQ (arXiv 1811.08886): the walk over a network in which an agent chooses the bits layer by layer.

`BitsWalk` is the environment: two steps per layer (its weights, then its inputs), or one with k-means, where inputs
stay float; a state of ten (nine) numbers; an action in [0, 1] becomes bits by `bits_of`. When all layers have bits,
`project` removes bits, one at a time from the last layer to the first, until the budget is kept. The cost of bits is a
table `[layers, 8, 8]` (edge/bit_costs.py) or the size. Differences from the published code: bits are clamped at both
ends; the first and the last layer have eight bits even if the budget is kept at once; the input image counts with 8
bits, not 7; the last column of a state is 1 if weights are next; and a budget below the cheapest policy is refused
instead of causing an endless loop. `project` itself reproduces the recorded policies exactly.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from slimray.compress.quantization import LayerInfo
from slimray.spec import UserError

Floats = NDArray[np.float64]
Policy = list[list[int]]  # per layer [bits of weights, bits of inputs], or [bits of weights]
COLUMNS = ("depthwise", "c_in", "c_out", "stride", "kernel", "weights", "area", "index", "last_bits", "weights_next")
HIGHEST = 8


def bits_of(action: float, low: int, high: int) -> int:
    """Return the bits for an action in [0, 1], which is divided equally among the numbers from `low` to `high`."""
    return min(max(round((high - low + 1) * action + low - 0.5), low), high)


def reward_of(accuracy: float, whole: float) -> float:
    """Return the reward of an accuracy: a tenth of its difference to that of the float network, `whole`, in percent."""
    return 0.1 * (accuracy - whole)


def table_cost(table: Floats) -> Callable[[Policy], float]:
    """Return the cost function of a table `[layers, weight bits - 1, input bits - 1]`: the sum over layers."""
    rows = np.arange(len(table))

    def cost(bits: Policy) -> float:
        pairs = np.asarray(bits)
        return float(table[rows, pairs[:, 0] - 1, pairs[:, 1] - 1].sum())

    return cost


def project(
    bits: Policy, cost: Callable[[Policy], float], budget: float, low: int, ends: Mapping[int, Sequence[int]]
) -> Policy:
    """Remove bits until `cost` is at most `budget`: from the last layer to the first, inputs before weights.

    Each pass removes one bit everywhere, none below `low`. `ends` maps the numbers of pinned layers to their bits; they
    are set along with the first removal, so a policy that keeps the budget is returned unchanged. If no bit is left to
    remove, the result is the cheapest policy, which exceeds the budget.
    """
    bits = [list(row) for row in bits]
    if cost(bits) <= budget:
        return bits
    while True:
        before = [list(row) for row in bits]
        for layer in reversed(range(len(bits))):
            for column in reversed(range(len(bits[layer]))):
                if bits[layer][column] > low:
                    bits[layer][column] -= 1
                for place, pair in ends.items():
                    bits[place] = list(pair)
                if cost(bits) <= budget:
                    return bits
        if bits == before:
            return bits


class BitsWalk:
    """Walk over `layers`: an action per column of a policy, layer by layer; `policy` projects the result.

    With `inputs`, inputs have bits too (two steps per layer). `ends` maps numbers of pinned layers to bits (default: 8
    for the first and the last; none for k-means). UserError if the cheapest policy exceeds the budget.
    """

    stream = 3

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        cost: Callable[[Policy], float],
        budget: float,
        low: int = 2,
        high: int = HIGHEST,
        inputs: bool = True,
        ends: Mapping[int, Sequence[int]] | None = None,
    ):
        if not layers or not 1 <= low <= high <= HIGHEST:
            raise UserError(f"haq: needs layers, and bits from 1 to {HIGHEST} (got {low} to {high})")
        self.layers, self.cost, self.budget, self.low, self.high = layers, cost, budget, low, high
        self.columns = 2 if inputs else 1
        last = len(layers) - 1
        eight = [HIGHEST] * self.columns
        self.ends = ({0: eight, last: eight} if inputs else {}) if ends is None else ends
        least = [[low] * self.columns for _ in layers]
        for place, pair in self.ends.items():
            least[place] = list(pair)
        if cost(least) > budget:
            raise UserError(
                f"haq: the budget of {budget:g} cannot be kept: {low} bits everywhere (more at pinned ends) cost "
                f"{cost(least):g}"
            )
        self.static = self._static()
        self.reset()

    @property
    def num_steps(self) -> int:
        """Number of actions of an episode."""
        return len(self.layers) * self.columns

    def _static(self) -> Floats:
        """Return the columns that do not change, each scaled to [0, 1] over the layers, `[layers, 8]`."""
        rows = [
            [float(one.depthwise), one.in_channels, one.out_channels, one.stride, one.kernel, one.weights, one.area, i]
            for i, one in enumerate(self.layers)
        ]
        table = np.array(rows, float)
        low, high = table.min(0), table.max(0)
        return (table - low) / np.where(high > low, high - low, 1.0)

    def reset(self) -> Floats:
        """Begin an episode and return its first state."""
        self.chosen: list[int] = []
        return self._state()

    def _state(self) -> Floats:
        place, column = divmod(len(self.chosen), self.columns)
        last = self.chosen[-1] / HIGHEST if self.chosen else 1.0
        more = [1.0 - column] if self.columns == 2 else []
        return np.array([*self.static[place], last, *more])

    def step(self, action: float) -> Floats | None:
        """Take a raw action and return the next state, None after the last."""
        self.chosen.append(bits_of(action, self.low, self.high))
        return self._state() if len(self.chosen) < self.num_steps else None

    def policy(self) -> Policy:
        """Return the chosen bits, pinned and projected to the budget."""
        bits = [self.chosen[i : i + self.columns] for i in range(0, self.num_steps, self.columns)]
        for place, pair in self.ends.items():
            bits[place] = list(pair)
        return project(bits, self.cost, self.budget, self.low, self.ends)
