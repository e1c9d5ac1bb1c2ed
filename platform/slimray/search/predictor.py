"""Predictor of the scores of subnets, learned from the few that were measured: archs in, metric out.

The network is Once-for-All's (arXiv 1908.09791): three hidden layers of 400, Adam at 1e-3 with weight decay 1e-4, on
the one-hot codes of `Space.encode`; its output is added to a frozen base, the mean of the measured scores. Surprising:
it learns in units of the standard deviation of the metric, so that percent, 0 to 1 and mIoU work equally well; and the
length of training is chosen on held-out archs (five folds of a small set, a fifth of a large one), before it learns
from all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from slimray.arch import Arch, Space
from slimray.encoding import Codes, Floats, GeneTable
from slimray.search.pareto import spearman
from slimray.spec import UserError

HIDDEN = 400
SMALL = 500  # with fewer archs, each fifth is held out once; with more, a single fifth is enough
STEPS_SMALL, STEPS = (25, 50, 100, 200), (100, 200, 400, 800)  # lengths of training to compare


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained predictor; `report` describes its quality on held-out archs.

    The report has `held_out_mae` in units of the metric, `spearman` (rank correlation) and `num_train` (archs that it
    was finally trained on).
    """

    table: GeneTable
    net: nn.Module
    base: float
    scale: float
    report: Mapping[str, float]

    @torch.inference_mode()
    def predict(self, archs: Codes | Sequence[Arch]) -> Floats:
        """Return the expected metric of `archs`, or of rows of codes `[n, genes]`; float64 `[n]`."""
        codes = archs if isinstance(archs, np.ndarray) else self.table.codes(archs)
        out = self.net(torch.from_numpy(self.table.features(codes)))[:, 0]
        return out.double().numpy() * self.scale + self.base

    def state(self) -> dict[str, Tensor]:
        """Return all tensors of the predictor, for saving; `load` reads them back."""
        numbers = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        frozen = {"base": self.base, "scale": self.scale}
        return numbers | {name: torch.tensor(value, dtype=torch.float64) for name, value in frozen.items()}


def load(space: Space, state: Mapping[str, Tensor], report: Mapping[str, float]) -> Predictor:
    """Return the predictor whose `state` was saved; UserError if it was made for another space."""
    table, weights = GeneTable(space), dict(state)
    base, scale = float(weights.pop("base")), float(weights.pop("scale"))
    net = _net(_width(table))
    if weights["0.weight"].shape[1] != _width(table):
        told, here = weights["0.weight"].shape[1], _width(table)
        raise UserError(f"predictor: takes {told} features of an arch, this space has {here}: train it again")
    net.load_state_dict(weights)
    return Predictor(table, net.eval(), base, scale, dict(report))


def fit_predictor(
    space: Space, archs: Codes | Sequence[Arch], metrics: Sequence[float] | Floats, seed: int
) -> Predictor:
    """Train a predictor on `archs` (or rows of codes) and their `metrics`.

    The result is a function of the arguments (on the same machine, with the same number of threads). UserError for
    fewer than 10 archs.
    """
    table = GeneTable(space)
    codes = archs if isinstance(archs, np.ndarray) else table.codes(archs)
    if len(codes) < 10:
        raise UserError(f"predictor: needs at least 10 measured archs to learn from (got {len(codes)})")
    x, y = torch.from_numpy(table.features(codes)), torch.from_numpy(np.array(metrics, np.float64))
    order = np.random.default_rng(seed).permutation(len(codes))
    folds, lengths = np.array_split(order, 5), STEPS_SMALL
    if len(codes) >= SMALL:
        folds, lengths = folds[:1], STEPS
    said: dict[int, list[tuple[np.ndarray, Floats]]] = {steps: [] for steps in lengths}
    for fold, held_out in enumerate(folds):
        learned = np.setdiff1d(order, held_out)
        base, scale = _units(y[learned])
        for steps, net in _train(x[learned], (y[learned] - base) / scale, seed + fold, lengths):
            with torch.inference_mode():
                said[steps].append((held_out, net(x[held_out])[:, 0].double().numpy() * scale + base))
    errors = {}
    for steps, of_folds in said.items():
        tested, values = (np.concatenate(parts) for parts in zip(*of_folds, strict=True))
        off = values - y.numpy()[tested]
        errors[steps] = (float(np.mean(off**2)), float(np.abs(off).mean()), spearman(values, y.numpy()[tested]))
    best = min(errors, key=lambda steps: errors[steps][0])
    base, scale = _units(y)
    ((_, net),) = _train(x, (y - base) / scale, seed, [best])
    report = {"held_out_mae": errors[best][1], "spearman": errors[best][2], "num_train": float(len(codes))}
    return Predictor(table, net.eval(), base, scale, report)


def _train(x: Tensor, y: Tensor, seed: int, marks: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
    """Train a new network on features `x` and targets `y`; yield it after each number of steps in `marks`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _net(x.shape[1])
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)  # half the time
    draw = torch.Generator().manual_seed(seed)
    batch, left, target = max(32, len(x) // 16), torch.empty(0, dtype=torch.long), y.float()
    for step in range(1, max(marks) + 1):
        if not len(left):
            left = torch.randperm(len(x), generator=draw)
        rows, left = left[:batch], left[batch:]
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[rows])[:, 0], target[rows]).backward()
        optimizer.step()
        if step in marks:
            yield step, net


def _net(width: int) -> nn.Sequential:
    hidden = [nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1, bias=False))


def _width(table: GeneTable) -> int:
    return table.features(table.smallest[None]).shape[1]


def _units(y: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of the metric; the latter is 1 if all values are equal."""
    return float(y.mean()), float(y.std()) or 1.0
