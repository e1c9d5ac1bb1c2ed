"""From arrays of samples to what a network takes, and from the outputs of views to one: numpy's half.

The same numbers as `slimray.tasks.network.to_input` and `merge_views`, which do it on a training device (a test holds
the two against each other on real files).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from slimray.runtime.answers import softmax


@dataclass(frozen=True)
class Input:
    """Input of a network: normalisation of uint8 pixels, and how the views of a sample are averaged."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    average: Literal["logits", "prob"] = "logits"

    @classmethod
    def of_channels(cls, channels: int, average: Literal["logits", "prob"] = "logits") -> "Input":
        """The one of pictures with so many channels: ImageNet's, of colours or of shades of gray."""
        return cls(average=average) if channels != 1 else cls((0.449,), (0.226,), average)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Input":
        """The one of `model/input.json`; TypeError for what is none."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
        return cls(**values)


def to_input(data: np.ndarray, pixels: Input) -> np.ndarray:
    """Samples `[n, V, ...]` as a network takes them, `[n*V, ...]`.

    uint8 pixels `[..., H, W, 3]` become normalised float32 `[..., 3, H, W]`; floats become float32; whole numbers go as
    they are.
    """
    rows = data.reshape(-1, *data.shape[2:])
    if data.dtype != np.uint8:
        return np.ascontiguousarray(rows, np.float32 if data.dtype.kind == "f" else data.dtype)
    mean = np.asarray(pixels.mean, np.float32).reshape(-1, 1, 1) * np.float32(255)
    std = np.asarray(pixels.std, np.float32).reshape(-1, 1, 1) * np.float32(255)
    return np.ascontiguousarray((np.moveaxis(rows, -1, -3).astype(np.float32) - mean) / std)


def merge_views(outputs: np.ndarray, num_views: int, average: str) -> np.ndarray:
    """Scores `[n, C, ...]` from logits `[n*V, C, ...]` of V views: their mean, or the log of mean probabilities."""
    views = outputs.reshape(-1, num_views, *outputs.shape[1:])
    if average == "prob":
        with np.errstate(divide="ignore"):
            logs = np.log(softmax(views, 2))
        most = logs.max(1, keepdims=True)
        total = np.log(np.exp(logs - most).sum(1)) + most[:, 0]
        return (total - np.float32(math.log(num_views))).astype(np.float32)
    return views.mean(1, dtype=np.float32)
