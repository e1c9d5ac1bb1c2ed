"""Latency of unmeasured policies, predicted from measured ones; an agent needs it at every step of an episode.

The model is a constant plus a weighted sum of the share of its MACs that each layer keeps. The weights come from least
squares, are never below 0 and are regularised towards the layers' shares of all MACs, which dominate if few policies
were measured. Surprising: latencies are ratios to that of the whole network, as measured by `edge.comparing`, because
the speed of a machine varies over the day.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slimray.compress.groups import Groups
from slimray.compress.policies import Counts, Floats, choices

PULL = 0.01  # regularisation of the weights towards shares of MACs, relative to the squared error of one policy
STEPS = 2000  # of projected gradient descent, with one unknown per layer


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Latency of policies as a share of the whole network's: a constant and a weight per layer. `error` is the mean
    absolute error in percent on held-out policies (cross-validation)."""

    groups: Groups
    constant: float
    weights: Floats
    error: float

    def __call__(self, rows: Floats) -> Floats:
        """Return shares `[n]` of policies `[n, groups]`, numbers of kept channels."""
        return self.constant + self.groups.layer_shares(rows) @ self.weights


def draw(groups: Groups, count: int, least: float, round_to: int, seed: int) -> list[Counts]:
    """Return policies to measure: first all groups at the lower bound `least`, then random ones."""
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
    """Return the model fitted to policies and their measured shares of the whole network's latency."""
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
    """Return constant and weights, at least 0, of least squares regularised towards `prior` (and a constant of 0)."""
    x = np.concatenate([np.ones((len(shares), 1)), shares], 1)
    centre = np.concatenate([[0.0], prior])
    gram, right = x.T @ x + PULL * np.eye(x.shape[1]), x.T @ taken + PULL * centre
    found, rate = centre, 1 / np.linalg.eigvalsh(gram)[-1]
    for _ in range(STEPS):
        found = np.maximum(found - rate * (gram @ found - right), 0)
    return float(found[0]), found[1:]
