"""3D boxes out of frustums (KITTI): what a network's outputs mean as boxes, and how many of them are right.

In: the outputs of a frustum network and the truth. Out: boxes `[n, 7]` as in boxes.py, and percent, 0-100, merged over
ranks by summing `tensors()`. Frustum PointNets: arXiv 1711.08488.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from slimray.tasks.boxes import box_ious, turned
from slimray.tasks.segment import mean_known, percent


def decode_boxes(
    outputs: Mapping[str, Any], size_templates: ArrayLike | Tensor, rotation: ArrayLike | Tensor = 0.0
) -> np.ndarray:
    """Boxes `[n, 7]` out of what a frustum network returns; heading within [-pi, pi).

    `outputs`: `center` `[n, 3]`, `heading_scores` and `heading_residuals` `[n, 12]`, `size_scores` `[n, 8]` and
    `size_residuals` `[n, 8, 3]`; `size_templates` hold l, w, h. `rotation` `[n]` is by how much the points had been
    turned: pi / 2 + the angle of the frustum.
    """
    scores, sizes = _numpy(outputs["heading_scores"]), _numpy(outputs["size_residuals"])
    heading_id, size_id = scores.argmax(1), _numpy(outputs["size_scores"]).argmax(1)
    rows = np.arange(len(scores))
    heading = heading_id * (2 * math.pi / scores.shape[1]) + _numpy(outputs["heading_residuals"])[rows, heading_id]
    size = _numpy(size_templates).reshape(-1, 3)[size_id] + sizes[rows, size_id]
    return _standing(_numpy(outputs["center"]), heading, size, _numpy(rotation))


def _standing(center: np.ndarray, heading: np.ndarray, size: np.ndarray, rotation: np.ndarray | float) -> np.ndarray:
    """Boxes `[n, 7]` turned back by `rotation` from their centres."""
    x, z = turned(center[:, 0], center[:, 2], np.asarray(rotation))
    wrapped = (heading + rotation + math.pi) % (2 * math.pi) - math.pi
    return np.column_stack([x, center[:, 1] + size[:, 2] / 2, z, size, wrapped])


def _numpy(values: Any) -> np.ndarray:
    return torch.as_tensor(values).detach().double().cpu().numpy()


class FrustumScore:
    """How well frustum networks find boxes, for the validation while they train; summed over ranks.

    Not KITTI's AP: one box is compared with the one truth of its frustum. `min_ious` are the IoU in space above which a
    box of each class is found (KITTI: 0.7, 0.5, 0.5).
    """

    def __init__(self, min_ious: Sequence[float] = (0.7, 0.5, 0.5)):
        self.min_ious = np.asarray(min_ious)
        self.boxes = torch.zeros(len(min_ious), 4, dtype=torch.float64)  # boxes, found, IoU of at least 0.7, sum of IoU
        self.sums = torch.zeros(3, dtype=torch.float64)  # points whose mask is right, points, frustums without a truth

    def add_unknown(self, count: int) -> None:
        """Count frustums in which no object is known: a detector's. They are samples, and say nothing of a network."""
        self.sums[2] += count

    def add(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        labels: ArrayLike | Tensor,
        size_templates: ArrayLike | Tensor,
    ) -> None:
        """Compare outputs and targets as `frustum_loss` takes them; `labels` `[n]` are the classes."""
        labels = _numpy(labels).astype(np.int64)
        bin_size = 2 * math.pi / outputs["heading_scores"].shape[1]
        heading = _numpy(targets["heading_id"]) * bin_size + _numpy(targets["heading_residual"])
        template = _numpy(size_templates).reshape(-1, 3)[_numpy(targets["size_id"]).astype(np.int64)]
        truth = _standing(_numpy(targets["center"]), heading, template + _numpy(targets["size_residual"]), 0.0)
        _, iou = box_ious(decode_boxes(outputs, size_templates), truth)
        rows = np.stack([np.ones_like(iou), iou >= self.min_ious[labels], iou >= 0.7, iou], 1)
        self.boxes.index_add_(0, torch.from_numpy(labels), torch.from_numpy(rows))
        logits, mask = outputs["mask_logits"], targets["mask"]
        self.sums[0] += ((logits[:, 1] > logits[:, 0]) == mask.bool()).sum().cpu()
        self.sums[1] += mask.numel()

    def tensors(self) -> tuple[Tensor, ...]:
        """What must be summed over ranks, in place."""
        return self.boxes, self.sums

    def result(self) -> dict[str, Any]:
        """mask_acc, mean_iou_3d, found_3d (IoU of at least 0.7), class_found_3d (mean over classes, each at its own
        threshold), percent, of the frustums with a known object; num_known of these, num_samples of all."""
        total, _, found, iou = self.boxes.sum(0).tolist()
        right, points, unknown = self.sums.tolist()
        return {
            "mask_acc": 100 * right / max(points, 1),
            "mean_iou_3d": 100 * iou / max(total, 1),
            "found_3d": 100 * found / max(total, 1),
            "class_found_3d": mean_known(percent(self.boxes[:, 1], self.boxes[:, 0])),
            "num_known": int(total),
            "num_samples": int(total + unknown),
        }
