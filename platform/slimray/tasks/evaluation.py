"""A pass of a network over a split on one rank: what `evaluate` asks a task for, and how most tasks answer it.

Samples come step by step, valid ones only. All ranks take every step and `settle` after it; `score` is then summed over
ranks and `found` is gathered on the first one.
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

    `recipe` is the plain one of its samples, `paths` gives those of the whole index to a pass that asks for them,
    `batch` is the samples of a step over all ranks, `rows` the samples that a network sees at once. `options` are those
    of the evaluation (`votes`, `missed`, ...), `parts` the labels of each shape's parts.
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
    """Samples that decode: `data` `[n, V, ...]`, `targets` `[n, ...]`, their paths and their rows in the index."""

    data: np.ndarray
    targets: np.ndarray
    paths: Sequence[str]
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.data)


class Pass:
    """A pass that scores outputs of samples, their views averaged."""

    def __init__(self, setting: Setting, score: Score):
        self.setting, self.score = setting, score
        self.found: list[Any] = []  # plain values that the first rank gathers

    def take(self, samples: Samples) -> Outputs | None:
        """Count samples (one or more); returns the outputs that examples are made of, of the first view."""
        network = self.setting.network
        outputs = predict_outputs(
            network.net, samples.data, network.pixels, network.device, self.setting.rows, network.precision
        )
        self.score.add(outputs, torch.from_numpy(samples.targets).to(network.device))
        return outputs

    def settle(self, step: int, world: int) -> None:
        """Count what is known only when a step is over. A collective."""

    def result(self) -> dict[str, Any]:
        """Return the metrics by name, once all ranks' counts are in the score."""
        return self.score.result()

    def show(self, samples: Samples, outputs: Outputs | None, before: Sequence[dict], most: int) -> list[dict]:
        """Return examples out of `samples`, `most` of a run with those `before`."""
        count = min(len(samples), most - len(before))
        if outputs is None or count <= 0:
            return []
        views, targets = samples.data[:count, 0], samples.targets[:count]
        first = chosen_rows(outputs, slice(0, count))
        return list(self.setting.task.examples(self.setting.network, views, first, targets, len(before)))
