"""Latency of subnets learned from subnets measured as a whole, compared with simpler models on unseen ones.

The network is that of Hardware-Aware Transformers (arXiv 2005.14187): features of an arch (`net.latency_features`, the
ten of HAT for transformers), four hidden layers of 400, squared error. `errors` compares it with least squares on the
same features, with a line over MACs and with the calibrated table, each on held-out subnets (five folds). Surprising:
it learns the ratio to the mean latency, with Adam at 1e-3 in hundreds of steps, whereas the release used thousands at
1e-5, because a table has tens of subnets and not thousands.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from slimray.arch import Arch
from slimray.edge.arch_costs import Prices
from slimray.edge.latency_table import LatencyTable
from slimray.spec import UserError

Floats = NDArray[np.float64]
FOLDS, FEWEST = 5, 20
HIDDEN, LAYERS, STEPS, BATCH = 400, 4, 400, 128
RIDGE = 1e-6  # regularisation of least squares, which only matters where features do not determine the fit
Fit = Callable[[Floats, Floats], Callable[[Floats], Floats]]  # features and ms -> features -> ms


@dataclass(frozen=True, eq=False)
class LatencyPredictor:
    """A trained predictor from features `[n, features]` to ms `[n]`."""

    net: nn.Module
    centre: Floats
    spread: Floats
    scale: float

    @torch.inference_mode()
    def __call__(self, features: Floats) -> Floats:
        """Return the expected latencies in ms, float64 `[n]`."""
        x = torch.from_numpy((features - self.centre) / self.spread).float()
        return self.scale * self.net(x)[:, 0].double().numpy()


def fit_network(features: Floats, ms: Floats, seed: int = 0, steps: int = STEPS) -> LatencyPredictor:
    """Train a predictor on features `[n, features]` and measured ms `[n]`; deterministic in its arguments."""
    centre, spread = features.mean(0), features.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    scale = float(ms.mean())
    x = torch.from_numpy((features - centre) / spread).float()
    y = torch.from_numpy(ms / scale).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = [x.shape[1], *[HIDDEN] * LAYERS]
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
        net = nn.Sequential(*layers, nn.Linear(HIDDEN, 1))
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randperm(len(x), generator=draw)[:BATCH]
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[rows])[:, 0], y[rows]).backward()
        optimizer.step()
        schedule.step()
    return LatencyPredictor(net.eval(), centre, spread, scale)


def fit_least_squares(features: Floats, ms: Floats) -> Callable[[Floats], Floats]:
    """Fit a linear model of ms `[n]` on features `[n, features]`; return the function from features to ms."""
    centre, spread = features.mean(0), features.std(0)
    spread = np.where(spread > 0, spread, 1.0)

    def row(values: Floats) -> Floats:
        return np.concatenate([(values - centre) / spread, np.ones((len(values), 1))], 1)

    x = row(features)
    weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ ms)
    return lambda values: row(values) @ weights


def held_out(fit: Fit, features: Floats, ms: Floats, seed: int = 0) -> Floats:
    """Return cross-validated predictions, each from a fit to the other four fifths, in ms `[n]`."""
    order, said = np.random.default_rng(seed).permutation(len(ms)), np.zeros(len(ms))
    for fold in np.array_split(order, FOLDS):
        learned = np.setdiff1d(order, fold)
        said[fold] = fit(features[learned], ms[learned])(features[fold])
    return said


def mape(said: Floats, ms: Floats) -> float:
    """Return the mean absolute error of predictions `[n]`, in percent of the measured values `[n]`."""
    return float(100 * np.mean(np.abs(said / ms - 1)))


def errors(net: Any, table: LatencyTable, seed: int = 0, steps: int = STEPS) -> Mapping[str, float]:
    """Return the mean absolute error in percent, on held-out subnets of `net`, of each way to predict latency.

    The data are the subnets measured as a whole in a finished `table`, duplicates counted once. Raises UserError if
    there are fewer than FEWEST.
    """
    rows = {} if table.calibration is None else {Arch.from_dict(row.arch): row for row in table.calibration.rows}
    if len(rows) < FEWEST:
        raise UserError(
            f"profile: {len(rows)} whole subnets are too few to learn from, give --calibrate {FEWEST} or more"
        )
    archs, ms = list(rows), np.array([row.measured_ms for row in rows.values()])
    prices = Prices(net, table.num_points)
    macs = np.array([[prices.arch_costs(arch)["macs"]] for arch in archs])
    features = features_of(net, archs)
    return {
        "table": mape(np.array([row.predicted_ms for row in rows.values()]), ms),
        "network": mape(held_out(lambda x, y: fit_network(x, y, seed, steps), features, ms, seed), ms),
        "least_squares": mape(held_out(fit_least_squares, features, ms, seed), ms),
        "macs": mape(held_out(fit_least_squares, macs, ms, seed), ms),
    }


def features_of(net: Any, archs: Sequence[Arch]) -> Floats:
    """Return the features of archs, `[n, features]`."""
    return np.array([net.latency_features(arch) for arch in archs], float)
