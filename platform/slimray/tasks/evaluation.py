"""A pass of a network over a split on one rank, as `evaluate` uses it, with the implementation that most tasks share.

Valid samples arrive step by step. All ranks take every step and call `settle` after it; then `score` is summed over
ranks and `found` is gathered on the first rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from slimray.tasks.network import Network, chosen_rows, predict_outputs
from slimray.tasks.task import Outputs, Score, Task


@dataclass(frozen=True)
class Setting:
    """Settings of a pass.

    `recipe` is the plain recipe of its samples, `paths` returns the paths of the whole index to a pass that needs them,
    `batch` is the number of samples of a step over all ranks, `rows` the number that a network sees at once. `options`
    are those of the evaluation (`votes`, `missed`, ...), `parts` the labels of each shape's parts.
    """

    task: Task
    network: Network
    recipe: Mapping[str, Any]
    paths: Callable[[], Sequence[str]] = tuple
    batch: int = 1
    rows: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, range] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """Decoded samples: `data` `[n, V, ...]`, `targets` `[n, ...]`, their paths and their row numbers in the index."""

    data: np.ndarray
    targets: np.ndarray
    paths: Sequence[str]
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.data)


class Pass:
    """A pass that scores the outputs of samples, averaged over views."""

    def __init__(self, setting: Setting, score: Score):
        self.setting, self.score = setting, score
        self.found: list[Any] = []  # plain values that the first rank gathers

    def take(self, samples: Samples) -> Outputs | None:
        """Count samples (at least one); return the outputs from which examples are made."""
        network = self.setting.network
        outputs = predict_outputs(
            network.net, samples.data, network.pixels, network.device, self.setting.rows, network.precision
        )
        self.score.add(outputs, torch.from_numpy(samples.targets).to(network.device))
        return outputs

    def settle(self, step: int, world: int) -> None:
        """Count what is known only after a step. A collective."""

    def result(self) -> dict[str, Any]:
        """Return the metrics by name, after the counts of all ranks have been summed into the score."""
        return self.score.result()

    def show(self, samples: Samples, outputs: Outputs | None, before: Sequence[dict], most: int) -> list[dict]:
        """Return examples from `samples`, at most `most` per run including those of `before`."""
        count = min(len(samples), most - len(before))
        if outputs is None or count <= 0:
            return []
        views, targets = samples.data[:count, 0], samples.targets[:count]
        first = chosen_rows(outputs, slice(0, count))
        return list(self.setting.task.examples(self.setting.network, views, first, targets, len(before)))
