"""Segmentation of shapes into their parts (ShapeNet part): the IoU of a shape is the mean over its category's parts.

In: scores or parts of points, and their labels. Out: percent, 0-100, merged over ranks by summing `tensors()`. The
protocol is that of PointNet (arXiv 1612.00593) and Point-Voxel CNN (1907.03739).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimray.tasks import segment
from slimray.tasks.classify import likeliest
from slimray.tasks.evaluation import Pass, Setting
from slimray.tasks.segment import VotePass, as_rows, listed, loss_sum, mean_known, percent
from slimray.tasks.task import LOSS, Metric


def part_ranges(num_parts: Mapping[str, int]) -> dict[str, range]:
    """Return the part labels of each shape, numbered consecutively; `num_parts`: name -> number of parts."""
    ends = np.cumsum(list(num_parts.values())).tolist()
    return {name: range(end - num, end) for (name, num), end in zip(num_parts.items(), ends, strict=True)}


class ShapeScore:
    """IoU of the parts of shapes, summed over ranks: per category the sum of its shapes' IoU and their number.

    `parts` are the part labels of each category. A point's prediction is the best among the parts of the shape's
    category; a shape's IoU is the mean over these parts, where a part that is neither present nor predicted counts 1.
    Negative labels are ignored.
    """

    def __init__(self, parts: Mapping[str, Sequence[int]]):
        self.names, num_parts = tuple(parts), max(max(labels) for labels in parts.values()) + 1
        self.allowed = torch.zeros(len(parts), num_parts, dtype=torch.bool)
        for category, labels in enumerate(parts.values()):
            self.allowed[category, list(labels)] = True
        self.shapes = torch.zeros(len(parts), 2, dtype=torch.float64)  # sum of IoU, shapes
        self.sums = torch.zeros(3, dtype=torch.float64)  # correct points, points, loss

    def add(self, scores: Tensor, labels: Tensor, categories: Tensor | None = None) -> None:
        """Count scores `[n, P, N]` against labels int64 `[n, N]` of shapes of `categories` `[n]`, on their device.

        Without `categories`, they are inferred from the labels. A shape without labels is ignored.
        """
        if categories is None:
            owner = self.allowed.to(torch.uint8).argmax(0).to(labels.device)
            categories = owner[labels.amax(1).clamp_min(0)]
        allowed = self.allowed.to(scores.device)[categories.to(scores.device)]
        predicted = likeliest(scores.masked_fill(~allowed[:, :, None], -torch.inf))
        self.add_predictions(predicted, labels, categories)
        self.sums[2] += loss_sum(scores, labels, labels >= 0)

    def add_predictions(
        self, predicted: Tensor | np.ndarray, labels: Tensor | np.ndarray, categories: Tensor | np.ndarray | int
    ) -> None:
        """Count predicted parts `[n, N]`, or `[N]` of one shape, chosen among those of its category. Adds no loss."""
        labels = as_rows(labels)
        predicted, categories = as_rows(predicted).to(labels.device), torch.as_tensor(categories).cpu().view(-1)
        known, num_parts = labels >= 0, self.allowed.shape[1]
        if labels.numel() and int(labels.max()) >= num_parts:
            raise ValueError(f"label {int(labels.max())}: there are only {num_parts} parts")
        truth, right = self._per_part(labels, known), self._per_part(labels, known & (labels == predicted))
        positive = self._per_part(predicted, known & (predicted >= 0))
        allowed, seen = self.allowed[categories], known.any(1).cpu()
        if (truth + positive)[~allowed].any():
            raise ValueError("a part, true or predicted, does not belong to its shape's category")
        union = truth + positive - right
        iou = torch.where(union > 0, right / union.clamp_min(1), 1.0).double()
        mean = (iou * allowed).sum(1) / allowed.sum(1)
        self.shapes.index_add_(0, categories[seen].long(), torch.stack([mean, torch.ones_like(mean)], 1)[seen])
        self.sums[:2] += torch.stack([right.sum(), truth.sum()])

    def _per_part(self, parts: Tensor, counted: Tensor) -> Tensor:
        """Return the number of counted points of parts `[n, N]`, per shape and part: `[n, P]` on the CPU."""
        size, shape = self.allowed.shape[1], torch.arange(len(parts), device=parts.device)[:, None]
        rows = (shape * size + parts)[counted].long()
        return torch.bincount(rows, minlength=len(parts) * size).cpu().view(-1, size)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what must be summed over ranks, in place."""
        return self.shapes, self.sums

    def result(self) -> dict[str, Any]:
        """Return instance_miou (over shapes), category_miou, category_iou (by name, None without shapes) and
        overall_acc in percent, loss, and num_samples (shapes)."""
        total, num_shapes = self.shapes.sum(0).tolist()
        iou = percent(self.shapes[:, 0], self.shapes[:, 1])
        right, points, loss = self.sums.tolist()
        return {
            "instance_miou": 100 * total / max(num_shapes, 1),
            "category_miou": mean_known(iou),
            "category_iou": dict(zip(self.names, listed(iou), strict=True)),
            "overall_acc": 100 * right / max(points, 1),
            "loss": loss / max(points, 1),
            "num_samples": int(num_shapes),
        }


def start(setting: Setting) -> Pass:
    """Return a pass with one draw of each shape, scored as segments, or with votes, scored as shapes."""
    if not setting.options.get("votes") or not setting.parts:
        return segment.start(setting)
    score = ShapeScore(setting.parts)
    return VotePass(setting, score, score.add_predictions)


PARTS = replace(
    segment.SEGMENT,
    name="parts",
    metrics=(
        Metric("miou", "mIoU"),
        Metric("instance_miou", "instance mIoU"),
        Metric("overall_acc", "overall accuracy"),
        Metric("mean_class_accuracy", "mean class accuracy"),
        Metric("category_miou", "category mIoU"),
        LOSS,
    ),
    start=start,
)
