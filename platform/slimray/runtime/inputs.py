"""Turns arrays of samples into the input of a network, and merges the outputs of views, in numpy.

Gives the same numbers as `slimray.tasks.network.to_input` and `merge_views`, which work on a training device (a test
compares the two on real files).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from slimray.runtime.answers import softmax


@dataclass(frozen=True)
class Input:
    """Input of a network: the normalisation of uint8 pixels, and the way the views of a sample are averaged."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    average: Literal["logits", "prob"] = "logits"

    @classmethod
    def of_channels(cls, channels: int, average: Literal["logits", "prob"] = "logits") -> "Input":
        """Return the Input for pictures with this number of channels: ImageNet's, for colour or grayscale."""
        return cls(average=average) if channels != 1 else cls((0.449,), (0.226,), average)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Input":
        """Return the Input stored in `model/input.json`; TypeError if it is invalid."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
        return cls(**values)


def to_input(data: np.ndarray, pixels: Input) -> np.ndarray:
    """Return samples `[n, V, ...]` as input of a network `[n*V, ...]`.

    uint8 pixels `[..., H, W, 3]` become normalised float32 `[..., 3, H, W]`; floats become float32; other integers are
    unchanged.
    """
    rows = data.reshape(-1, *data.shape[2:])
    if data.dtype != np.uint8:
        return np.ascontiguousarray(rows, np.float32 if data.dtype.kind == "f" else data.dtype)
    mean = np.asarray(pixels.mean, np.float32).reshape(-1, 1, 1) * np.float32(255)
    std = np.asarray(pixels.std, np.float32).reshape(-1, 1, 1) * np.float32(255)
    return np.ascontiguousarray((np.moveaxis(rows, -1, -3).astype(np.float32) - mean) / std)


def merge_views(outputs: np.ndarray, num_views: int, average: str) -> np.ndarray:
    """Return scores `[n, C, ...]` of logits `[n*V, C, ...]` of V views: the mean, or the log of mean probabilities."""
    views = outputs.reshape(-1, num_views, *outputs.shape[1:])
    if average == "prob":
        with np.errstate(divide="ignore"):
            logs = np.log(softmax(views, 2))
        most = logs.max(1, keepdims=True)
        total = np.log(np.exp(logs - most).sum(1)) + most[:, 0]
        return (total - np.float32(math.log(num_views))).astype(np.float32)
    return views.mean(1, dtype=np.float32)
