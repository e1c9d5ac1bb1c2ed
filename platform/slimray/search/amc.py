"""AMC (arXiv 1802.03494): the walk over a network in which an agent decides layer by layer how many channels to keep.

`LayerWalk` is the published environment, as recorded from its code: a chain of layers, in which the action of a layer
keeps a share of its *input* channels. `GroupWalk` is ours: an action per dependency group, so that residual sums,
concatenations and shared layers are decided once, under limits on any cost that is a function of the numbers kept
(MACs, params, measured latency). Both have the same three parts: a state of ten numbers per step, a clip that keeps the
budget within reach, and a rounding to channels. agents.py runs the search over a `GroupWalk`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimray.spec import UserError

Floats = NDArray[np.float64]
COLUMNS = ("index", "type", "c_in", "c_out", "stride", "kernel", "weights", "reduced", "rest", "last_action")
LEAST = 0.2  # lower bound of every action
HALVINGS = 24  # bisection steps for the largest common factor that keeps the limits


def rounded(channels: int, ratio: float, multiple: int = 8) -> int:
    """Return a share `ratio` of `channels` as a number: rounded half to even, then up to `multiple`, as recorded.

    If that exceeds `channels`, it is rounded down to a multiple. Surprising: with fewer than `multiple` channels this
    gives 0 (upstream never prunes such a layer); a ratio of 1 keeps all.
    """
    if ratio == 1:
        return channels
    count = max(round(ratio * channels), 1)
    count = -(-count // multiple) * multiple
    return count if count <= channels else channels // multiple * multiple


def _scaled(rows: Sequence[Sequence[float]]) -> Floats:
    """Return the columns of the steps `[steps, 10]`, each scaled to [0, 1] over the steps if it varies."""
    table = np.array(rows, float)
    low, high = table.min(0), table.max(0)
    varied = high > low
    table[:, varied] = (table[:, varied] - low[varied]) / (high - low)[varied]
    return table


def reward_of(accuracy: float, macs: float | None = None) -> float:
    """Return the reward of an accuracy in percent: accuracy / 100, or, with `macs`, -(error / 100) x log(macs)."""
    return accuracy * 0.01 if macs is None else -(100 - accuracy) * 0.01 * float(np.log(macs))


# ------------------------------------------------------------------------------------------------ as recorded


@dataclass(frozen=True)
class ChainLayer:
    """A layer of the recorded environment: `type` is conv, fc or depthwise, `hw` the side of its output."""

    type: str
    cin: int
    cout: int
    stride: int = 0
    k: int = 1
    hw: int = 1

    @property
    def macs(self) -> float:
        """MACs as recorded: the bias of a linear layer counts as one per output."""
        if self.type == "fc":
            return float(self.cin * self.cout + self.cout)
        groups = self.cin if self.type == "depthwise" else 1
        return float(self.cin * self.cout * self.k**2 * self.hw**2 / groups)

    @property
    def weights(self) -> int:
        """Weights without the bias."""
        return self.cin * self.cout * self.k**2 // (self.cin if self.type == "depthwise" else 1)

    @property
    def params(self) -> int:
        """Weights, and the bias of a linear layer."""
        return self.weights + (self.cout if self.type == "fc" else 0)


class LayerWalk:
    """The recorded environment over `layers` in order; depthwise layers are decided with the next layer to prune.

    `ratio` is the share of all MACs that may be kept, `least` the lower bound of an action. `step` takes a raw action
    and returns the state of the next layer, None after the last.
    """

    def __init__(self, layers: Sequence[ChainLayer], ratio: float, least: float = LEAST, multiple: int = 8):
        if not least < ratio <= 1:
            raise UserError(f"amc: the budget ({ratio}) must be above the lower bound of actions ({least})")
        self.ratio, self.least, self.multiple = ratio, least, multiple
        self.layers: list[ChainLayer] = []
        self.buffers: list[list[ChainLayer]] = []
        waiting: list[ChainLayer] = []
        for layer in layers:
            if layer.type == "depthwise":
                waiting.append(layer)
            else:
                self.layers.append(layer)
                self.buffers.append(waiting)
                waiting = []
        every = [*self.layers, *(layer for some in self.buffers for layer in some)]
        self.macs_list, self.weight_list = [one.macs for one in every], [float(one.params) for one in every]
        self.total = sum(self.macs_list)
        self.static = self._static()
        self.reset()

    def _static(self) -> Floats:
        """Return the columns of the layers, each scaled to [0, 1] over them; the last three, which vary in an episode,
        start as 0, 0 and 1."""
        rows = [
            [i, float(one.type == "fc"), one.cin, one.cout, one.stride, one.k, one.weights, 0.0, 0.0, 1.0]
            for i, one in enumerate(self.layers)
        ]
        return _scaled(rows)

    def reset(self) -> Floats:
        """Begin an episode and return the state of the first layer."""
        count = len(self.layers)
        self.inputs, self.outputs = [1.0, *[self.least] * (count - 1)], [*[self.least] * (count - 1), 1.0]
        self.clipped: list[float] = []
        self.bounds: list[float] = []
        self.channels: list[int] = []
        state = self.static[0].copy()
        state[8] = sum(self.weight_list[1:]) / sum(self.weight_list)
        return state

    def _buffer(self, place: int) -> float:
        return sum(layer.macs for layer in self.buffers[place])

    def cost(self) -> float:
        """Return the MACs with the ratios so far; layers not yet visited count at the lower bound."""
        return sum(
            self.macs_list[i] * self.inputs[i] * self.outputs[i] + self._buffer(i) * self.inputs[i]
            for i in range(len(self.layers))
        )

    def step(self, action: float) -> Floats | None:
        """Take a raw action for the current layer."""
        place = len(self.clipped)
        this = self.macs_list[place] * self.outputs[place] + self._buffer(place)
        other = 0.0
        for i in range(len(self.layers)):
            if i == place:
                continue
            if i == place - 1:
                this += self.macs_list[i] * self.inputs[i]
                other += self._buffer(i) * self.inputs[i]
            else:
                other += self.macs_list[i] * self.inputs[i] * self.outputs[i] + self._buffer(i) * self.inputs[i]
        bound = (self.ratio * self.total - other) / this
        action = 1.0 if place == 0 else max(min(action, bound), self.least)
        layer = self.layers[place]
        channels = rounded(layer.cin, action, self.multiple)
        kept = channels / layer.cin
        self.bounds.append(bound)
        self.clipped.append(action)
        self.channels.append(channels)
        self.inputs[place] = kept
        if place:
            self.outputs[place - 1] = kept
        if place + 1 == len(self.layers):
            return None
        state = self.static[place + 1].copy()
        state[7] = (self.total - self.cost()) / self.total
        state[8] = sum(self.macs_list[place + 2 :]) / self.total
        state[9] = kept
        return state


# ------------------------------------------------------------------------------------------------ dependency groups


@dataclass(frozen=True)
class GroupStep:
    """A group of channels as the agent sees it: the allowed numbers of channels, and totals over its layers."""

    name: str
    choices: tuple[int, ...]
    linear: bool
    inputs: int
    outputs: int
    stride: int
    kernel: int
    weights: float
    macs: float


class GroupWalk:
    """Walk with an action per group: the share of its channels to keep, under `limits` on `costs`.

    `costs` takes numbers of channels `[n, groups]` and returns cost -> `[n]`. The number of a group is the largest
    allowed one up to its action with which the limits can still be kept if all later groups are at the lower bound
    `least`: policies keep their limits, whatever layers share. UserError if the limits cannot be kept even with all
    groups at the bound.

    With `spends`, the actions of an episode are relative shares, which a common factor scales up as far as the limits
    allow, none below `least`; the remaining budget goes to single groups. Similar policies then have the same cost,
    whichever groups come first.
    """

    stream = 2

    def __init__(
        self,
        steps: Sequence[GroupStep],
        costs: Callable[[Floats], Mapping[str, Floats]],
        limits: Mapping[str, float],
        least: float = LEAST,
        spends: bool = False,
    ):
        self.steps, self.costs, self.limits = tuple(steps), costs, dict(limits)
        self.least, self.spends = least, spends
        self.full = np.array([step.choices[-1] for step in steps], float)
        self.lowest = self._numbers(np.zeros(len(steps)))
        if not self._keeps(self.lowest[None])[0]:
            found = costs(self.lowest[None])
            shown = ", ".join(f"{name} {float(found[name][0]):.6g}" for name in limits)
            raise UserError(f"amc: the limits are out of reach: with all groups at the lower bound costs are {shown}")
        rows = [
            [i, float(s.linear), s.inputs, s.outputs, s.stride, s.kernel, s.weights, 0.0, 0.0, 1.0]
            for i, s in enumerate(self.steps)
        ]
        self.static = _scaled(rows)
        self.judged = next(iter(limits), "macs")
        self.total = float(costs(self.full[None])[self.judged][0])
        self.reset()

    @property
    def num_steps(self) -> int:
        """Number of actions of an episode."""
        return len(self.steps)

    def _number(self, step: GroupStep, ratio: float) -> int:
        """Return the largest allowed number up to a share, which is clipped to [`least`, 1]."""
        most = min(max(ratio, self.least), 1.0) * step.choices[-1] + 1e-9
        return max((n for n in step.choices if n <= most), default=step.choices[0])

    def _numbers(self, ratios: Floats) -> Floats:
        return np.array([self._number(*pair) for pair in zip(self.steps, ratios, strict=True)], float)

    def _keeps(self, rows: Floats) -> NDArray[np.bool_]:
        costs = self.costs(rows)
        return np.all([costs[name] <= limit for name, limit in self.limits.items()], axis=0)

    def reset(self) -> Floats:
        """Begin an episode and return the state of the first group."""
        self.row, self.place = self.lowest.copy(), 0
        self.shares = np.zeros(len(self.steps))
        return self._state(1.0)

    def _state(self, last: float) -> Floats:
        state = self.static[self.place].copy()
        later = sum(step.macs for step in self.steps[self.place + 1 :])
        state[7] = 1 - float(self.costs(self.row[None])[self.judged][0]) / self.total
        state[8] = later / max(sum(step.macs for step in self.steps), 1.0)
        state[9] = last
        return state

    def step(self, action: float) -> Floats | None:
        """Take a raw action for the current group and return the state of the next one, None after the last."""
        step = self.steps[self.place]
        wanted = self._number(step, action)
        self.shares[self.place] = min(max(action, self.least), 1.0)
        if self.spends:
            self.row[self.place] = wanted
        else:
            allowed = [n for n in step.choices if n <= wanted]
            rows = np.repeat(self.row[None], len(allowed), 0)
            rows[:, self.place] = allowed
            kept = np.flatnonzero(self._keeps(rows))
            self.row[self.place] = allowed[kept[-1]] if len(kept) else self.lowest[self.place]
        share = self.row[self.place] / self.full[self.place]
        self.place += 1
        return None if self.place == len(self.steps) else self._state(share)

    def policy(self) -> dict[str, int]:
        """Return the number of channels to keep by group, after the last step."""
        counts = self._spent() if self.spends else self.row
        return {step.name: int(count) for step, count in zip(self.steps, counts, strict=True)}

    def _spent(self) -> Floats:
        """Return the numbers for the largest common factor that keeps the limits, single ones raised while possible.

        The group that is furthest below its action's share comes first.
        """
        low, high = 0.0, 1 / self.least
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._keeps(self._numbers(middle * self.shares)[None])[0] else (low, middle)
        counts = self._numbers(low * self.shares)
        while True:
            larger = [min((n for n in s.choices if n > c), default=c) for s, c in zip(self.steps, counts, strict=True)]
            rows = np.where(np.eye(len(counts), dtype=bool), np.array(larger, float), counts)
            fits = self._keeps(rows) & (rows.sum(1) > counts.sum())
            if not fits.any():
                return counts
            counts = rows[np.where(fits, counts / (self.shares * self.full), np.inf).argmin()]
