"""3D boxes from frustums (KITTI): decodes a network's outputs into boxes, and scores them.

In: the outputs of a frustum network and the truth. Out: boxes `[n, 7]` as in boxes.py, and percent, 0-100, merged over
ranks by summing `tensors()`. Frustum PointNets: arXiv 1711.08488.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from slimray.data.modalities import Target, read_recipe
from slimray.data.points.point_sets import KITTI_CLASSES
from slimray.models.points.frustum import SIZE_TEMPLATES
from slimray.runtime.answers import Answerer, AnswerOptions, Model
from slimray.spec import UserError
from slimray.tasks import found_boxes
from slimray.tasks.boxes import box_ious, turned
from slimray.tasks.evaluation import Pass, Samples, Setting
from slimray.tasks.frustum_loss import frustum_losses, frustum_targets
from slimray.tasks.segment import mean_known, percent
from slimray.tasks.task import LossOptions, Metric, Outputs, PassResult, Table, Task, class_arguments

AP = re.compile(r"ap(\d+)_(3d|bev)_(.+)_(easy|moderate|hard)")  # see kitti.kitti_ap


@cache
def _sizes(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the size template of each class (int64 `[3]`), and all templates l, w, h in metres `[1, 8, 3]`."""
    numbers = [list(SIZE_TEMPLATES).index(name) for name in KITTI_CLASSES]
    return torch.tensor(numbers, device=device), torch.tensor([list(SIZE_TEMPLATES.values())], device=device)


def targets_of(truth: Tensor) -> dict[str, Tensor]:
    """Return the target outputs of a network for truths `[n, N + 11]` (`load_frustum`), see `frustum_targets`."""
    return frustum_targets(truth, *_sizes(truth.device))


def losses(outputs: Mapping[str, Tensor], truth: Tensor, options: LossOptions) -> Tensor:
    """Return the loss of each sample `[n]` against truths `[n, N + 11]`; 0 if no object is known."""
    targets = targets_of(truth)
    return torch.where(targets["known"], frustum_losses(outputs, targets, _sizes(truth.device)[1]), 0.0)


def weights(truth: Tensor, options: LossOptions) -> Tensor:
    """Return the weight of each sample `[n]`, 1."""
    return torch.ones(len(truth), device=truth.device)


def target(recipe: Mapping[str, Any]) -> Target:
    """Return the target: point mask, box, class, rotation, score and height of a frustum, concatenated."""
    return Target((read_recipe(dict(recipe)).num_points + 11,), "float32")


def decode_boxes(
    outputs: Mapping[str, Any], size_templates: ArrayLike | Tensor, rotation: ArrayLike | Tensor = 0.0
) -> np.ndarray:
    """Return boxes `[n, 7]` decoded from the outputs of a frustum network; headings are within [-pi, pi).

    `outputs`: `center` `[n, 3]`, `heading_scores` and `heading_residuals` `[n, 12]`, `size_scores` `[n, 8]` and
    `size_residuals` `[n, 8, 3]`; `size_templates` hold l, w, h. `rotation` `[n]` is the angle by which the points had
    been rotated: pi / 2 + the angle of the frustum.
    """
    scores, sizes = _numpy(outputs["heading_scores"]), _numpy(outputs["size_residuals"])
    heading_id, size_id = scores.argmax(1), _numpy(outputs["size_scores"]).argmax(1)
    rows = np.arange(len(scores))
    heading = heading_id * (2 * math.pi / scores.shape[1]) + _numpy(outputs["heading_residuals"])[rows, heading_id]
    size = _numpy(size_templates).reshape(-1, 3)[size_id] + sizes[rows, size_id]
    return _standing(_numpy(outputs["center"]), heading, size, _numpy(rotation))


def _standing(center: np.ndarray, heading: np.ndarray, size: np.ndarray, rotation: np.ndarray | float) -> np.ndarray:
    """Return boxes `[n, 7]` from their centres, rotated back by `rotation`."""
    x, z = turned(center[:, 0], center[:, 2], np.asarray(rotation))
    wrapped = (heading + rotation + math.pi) % (2 * math.pi) - math.pi
    return np.column_stack([x, center[:, 1] + size[:, 2] / 2, z, size, wrapped])


def _numpy(values: Any) -> np.ndarray:
    return torch.as_tensor(values).detach().double().cpu().numpy()


class FrustumScore:
    """Score of the boxes that frustum networks find, for validation during training; summed over ranks.

    Not KITTI's AP: one box is compared with the single true box of its frustum. `min_ious` are the IoUs in space above
    which a box of each class counts as found (KITTI: 0.7, 0.5, 0.5).
    """

    def __init__(self, min_ious: Sequence[float] = (0.7, 0.5, 0.5)):
        self.min_ious = np.asarray(min_ious)
        self.boxes = torch.zeros(len(min_ious), 4, dtype=torch.float64)  # boxes, found, IoU of at least 0.7, sum of IoU
        self.sums = torch.zeros(3, dtype=torch.float64)  # points whose mask is right, points, frustums without a truth

    def add_unknown(self, count: int) -> None:
        """Count frustums without a known object, which come from a detector. They are samples, but are not scored."""
        self.sums[2] += count

    def add(self, outputs: Mapping[str, Tensor], truth: Tensor) -> None:
        """Count a network's outputs for frustums with truths `[n, N + 11]`; those without an object are unknown."""
        targets = targets_of(truth)
        known = targets["known"]
        self.add_unknown(int((~known).sum()))
        if known.any():
            found = {name: value[known] for name, value in outputs.items()}
            right = {name: value[known] for name, value in targets.items()}
            self.compare(found, right, right["label"], _sizes(truth.device)[1])

    def compare(
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
        found = decode_boxes(outputs, size_templates)
        _, iou = box_ious(found, truth)
        iou = np.where(np.isfinite(found).all(1), iou, 0.0)  # a box that is not finite overlaps nothing
        rows = np.stack([np.ones_like(iou), iou >= self.min_ious[labels], iou >= 0.7, iou], 1)
        self.boxes.index_add_(0, torch.from_numpy(labels), torch.from_numpy(rows))
        logits, mask = outputs["mask_logits"], targets["mask"]
        right = ((logits[:, 1] > logits[:, 0]) == mask.bool()) & logits.isfinite().all(1)
        self.sums[0] += right.sum().cpu()
        self.sums[1] += mask.numel()

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what must be summed over ranks, in place."""
        return self.boxes, self.sums

    def result(self) -> dict[str, Any]:
        """Return percentages over the frustums with a known object, num_known of these and num_samples of all.

        mask_acc, mean_iou_3d, found_3d (IoU of at least 0.7), class_found_3d (mean over classes, each at its own
        threshold).
        """
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


# ------------------------------------------------------------------------------------------------ evaluation


class BoxPass(Pass):
    """A pass that also keeps the found boxes, for KITTI's AP, and the points of the images shown."""

    def take(self, samples: Samples) -> Outputs | None:
        """Count the boxes of samples."""
        outputs = super().take(samples)
        assert isinstance(outputs, Mapping)
        boxes = decode_boxes(outputs, _sizes(self.setting.network.device)[1], samples.targets[:, -3])
        self.found += found_boxes.detections_of(boxes, samples.targets, samples.paths)
        return outputs

    def show(self, samples: Samples, outputs: Outputs | None, before: Sequence[dict], most: int) -> list[dict]:
        """Return the points of frustums, by image; `finish` makes scenes of them once all boxes are known."""
        images, out = {one["image"] for one in before}, []
        for number, path in enumerate(samples.paths):
            image = path.rpartition("#")[0]
            if image in images or len(images) < most:
                images.add(image)
                points = found_boxes.scene_points(samples.data[[number], 0], samples.targets[[number]])
                out.append({"type": "frustum", "image": image, "points": points})
        return out


def start(setting: Setting) -> Pass:
    """Return a pass over frustums."""
    return BoxPass(setting, FrustumScore())


def finish(row: dict[str, Any], result: PassResult) -> list[dict[str, Any]]:
    """Add KITTI's AP, `ap`, to a row; return scenes seen from above."""
    objects = found_boxes.read_objects(result.root, result.split)
    row["ap"] = found_boxes.average_precisions(result.found, objects)
    points: dict[str, list[np.ndarray]] = {}
    for one in result.examples:
        points.setdefault(one["image"], []).append(one["points"])
    return found_boxes.pictures(points, result.found, objects)


def tables(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[Table]:
    """Return tables of KITTI's AP for the rows that have `ap` (name -> `mean`, `std` and `max` over repeats)."""
    levels, found = ("easy", "moderate", "hard"), dict[tuple[str, ...], dict[str, float]]()
    for row in rows:
        key = " · ".join(str(row[name]) for name in ("run", "variant") if row.get(name))
        for name, numbers in row.get("ap", {}).items():
            if parts := AP.fullmatch(name):
                recalls, seen, kind, level = parts.groups()
                where = "in space" if seen == "3d" else "from above"
                found.setdefault((key, kind, where, recalls), {})[level] = numbers["mean"]
    cells = [(*key, *(triple.get(level) for level in levels)) for key, triple in found.items()]
    note = "Percent; mean precision at 11 or 40 recalls, with boxes matched by their IoU in space or from above."
    header = ("run", "class", "boxes", "recalls", *levels)
    return [Table("Average precision of boxes", header, cells, note, levels)] if cells else []


def answer(network: Model, options: AnswerOptions) -> Answerer:
    """Raise UserError, because no file is a frustum."""
    raise UserError("this network takes frustums, which are not files: score it with an evaluate job")


FRUSTUM_BOXES = Task(
    name="frustum_boxes",
    metrics=(
        Metric("class_found_3d", "boxes found"),
        Metric("found_3d", "boxes found at IoU 0.7"),
        Metric("mean_iou_3d", "mean IoU of boxes"),
        Metric("mask_acc", "accuracy of masks"),
    ),
    target=target,
    arguments=class_arguments,
    losses=losses,
    weights=weights,
    score=lambda num_classes, recipe: FrustumScore(),
    start=start,
    examples=lambda network, views, outputs, targets, shown: (),
    answer=answer,
    finish=finish,
    tables=tables,
    in_tables=frozenset({"ap"}),
)
