"""Latency of policies that were not measured, from some that were: what an agent needs at every step of an episode.

The share of its MACs that each layer keeps, weighted, and a constant: weights are found by least squares, none below 0,
pulled towards the layers' shares of all MACs, which decide where few policies were measured. Surprising: latencies are
ratios to the whole network's, as `edge.comparing` measures them, because a machine is not equally fast all day.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slimray.compress.groups import Groups
from slimray.compress.policies import Counts, Floats, choices

PULL = 0.01  # of the weights towards the layers' shares of MACs, against the squared errors of one policy
STEPS = 2000  # of projected gradient descent, on as many unknowns as layers


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """What policies take, as a share of the whole network: a constant, and a weight per layer; `error` in percent is
    the mean absolute one on policies that were left out in turn."""

    groups: Groups
    constant: float
    weights: Floats
    error: float

    def __call__(self, rows: Floats) -> Floats:
        """Shares `[n]` of policies `[n, groups]`, numbers of channels that stay."""
        return self.constant + self.groups.layer_shares(rows) @ self.weights


def draw(groups: Groups, count: int, least: float, round_to: int, seed: int) -> list[Counts]:
    """Policies to measure: all groups at the lower bound `least`, then at random around a random level."""
    rng, out = np.random.default_rng([seed, 3]), []
    for number in range(count):
        level = least if number == 0 else rng.uniform(least, 1)
        shares = np.clip(level + (number > 0) * rng.normal(0, 0.2, len(groups.groups)), least, 1)
        policy = {}
        for group, share in zip(groups.groups, shares, strict=True):
            allowed = choices(group.size, round_to)
            policy[group.name] = max((n for n in allowed if n <= share * group.size + 1e-9), default=allowed[0])
        out.append(policy)
    return out


def fit(groups: Groups, measured: Sequence[tuple[Mapping[str, int], float]]) -> LatencyModel:
    """The model of measured policies and their shares of the whole network's latency, whose own share is 1."""
    rows = np.stack([groups.row({}), *(groups.row(counts) for counts, _ in measured)])
    shares, taken = groups.layer_shares(rows), np.array([1.0, *(value for _, value in measured)])
    whole = groups.layer_macs({})
    prior = np.array(list(whole.values())) / sum(whole.values())
    errors = []
    for fold in range(min(5, len(measured))):
        out = np.arange(len(measured)) % 5 == fold
        kept = np.concatenate([[True], ~out])
        constant, weights = _solve(shares[kept], taken[kept], prior)
        errors.append(np.abs((constant + shares[~kept] @ weights) / taken[~kept] - 1))
    constant, weights = _solve(shares, taken, prior)
    return LatencyModel(groups, constant, weights, 100 * float(np.concatenate(errors).mean()) if errors else 0.0)


def _solve(shares: Floats, taken: Floats, prior: Floats) -> tuple[float, Floats]:
    """Constant and weights, none below 0, of least squares with a pull towards `prior` (and a constant of 0)."""
    x = np.concatenate([np.ones((len(shares), 1)), shares], 1)
    centre = np.concatenate([[0.0], prior])
    gram, right = x.T @ x + PULL * np.eye(x.shape[1]), x.T @ taken + PULL * centre
    found, rate = centre, 1 / np.linalg.eigvalsh(gram)[-1]
    for _ in range(STEPS):
        found = np.maximum(found - rate * (gram @ found - right), 0)
    return float(found[0]), found[1:]
