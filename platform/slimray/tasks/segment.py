"""Segmentation of clouds of points: a class for each point (S3DIS), and how good the predictions are, as published.

In: scores or classes of points, and their labels. Out: percent, 0-100, merged over ranks by summing `tensors()`. The
protocol is that of PointNet (arXiv 1612.00593) and Point-Voxel CNN (1907.03739).
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor


class SegmentationScore:
    """Counts of labelled points, to be summed over ranks: `confusion[truth, predicted]`, `missed[truth]`, loss.

    Points whose label is `ignore_label` or negative are left out. `missed` are those that never got a prediction.
    """

    def __init__(self, num_classes: int, ignore_label: int | None = None):
        self.ignore_label = ignore_label
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.missed = torch.zeros(num_classes, dtype=torch.int64)
        self.sums = torch.zeros(2, dtype=torch.float64)  # loss, clouds

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count scores `[n, C, N]` against labels int64 `[n, N]`, on their device."""
        self.add_predictions(scores.argmax(1), labels)
        self.sums[0] += loss_sum(scores, labels, self._known(labels))

    def add_predictions(self, predicted: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> None:
        """Count classes `[n, N]`, or `[N]` of one cloud, against labels; -1 is no prediction. Adds no loss."""
        labels = as_rows(labels)
        predicted = as_rows(predicted).to(labels.device)
        known, num_classes = self._known(labels), len(self.missed)
        pairs = labels[known].long() * (num_classes + 1) + predicted[known].long() + 1
        if len(pairs) and int(labels[known].max()) >= num_classes:
            raise ValueError(f"label {int(labels[known].max())}: there are {num_classes} classes")
        counts = torch.bincount(pairs, minlength=num_classes * (num_classes + 1)).cpu().view(num_classes, -1)
        self.missed += counts[:, 0]
        self.confusion += counts[:, 1:]
        self.sums[1] += known.any(1).sum().cpu()

    def _known(self, labels: Tensor) -> Tensor:
        return labels >= 0 if self.ignore_label is None else (labels >= 0) & (labels != self.ignore_label)

    def tensors(self) -> tuple[Tensor, ...]:
        """What must be summed over ranks, in place."""
        return self.confusion, self.missed, self.sums

    def result(self, absent: Literal["skip", "one"] = "skip", missed_as_last: bool = False) -> dict[str, Any]:
        """overall_acc, mean_class_accuracy, miou (percent), class_iou (a list), loss (per point), num_samples (clouds).

        With `absent="skip"` a class without a true point has no accuracy, and one that is not predicted either has no
        IoU (None in the list); "one" is the published meter during training: 1 for both if there is no true point.
        `missed_as_last` is the published evaluation of S3DIS: points without prediction count as predicted to be of
        the last class, though never rightly.
        """
        own, truth = self.confusion.diagonal(), self.confusion.sum(1) + self.missed
        positive = self.confusion.sum(0)
        if missed_as_last:
            positive[-1] += self.missed.sum()
        recall = percent(own, truth)
        iou = percent(own, truth + positive - own)
        if absent == "one":
            recall[truth == 0], iou[truth == 0] = 100, 100
        total = int(truth.sum())
        return {
            "overall_acc": 100 * int(own.sum()) / max(total, 1),
            "mean_class_accuracy": mean_known(recall),
            "miou": mean_known(iou),
            "class_iou": listed(iou),
            "loss": float(self.sums[0]) / max(total, 1),
            "num_samples": int(self.sums[1]),
        }


def as_rows(values: Tensor | np.ndarray) -> Tensor:
    """`[N]` as `[1, N]`; `[n, N]` as it is."""
    tensor = torch.as_tensor(values)
    return tensor if tensor.ndim > 1 else tensor[None]


def loss_sum(scores: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """The cross-entropy of scores `[n, C, N]`, summed over the known of labels `[n, N]`, on the CPU."""
    scores = scores.float()
    own = scores.gather(1, labels.long().where(known, 0)[:, None])[:, 0]
    return (scores.logsumexp(1) - own)[known].double().sum().cpu()


def percent(part: Tensor, whole: Tensor) -> Tensor:
    """100 part / whole in float64, nan where `whole` is 0."""
    return 100 * part.double() / whole.double()


def mean_known(percent: Tensor) -> float:
    """The mean of what is not nan, 0 if that is nothing."""
    return float(percent.nanmean().nan_to_num())


def listed(percent: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in percent.tolist()]
