"""How good predictions on point clouds are: segments (S3DIS, ShapeNet parts) and 3D boxes (KITTI), as published.

In: scores, votes or boxes and the truth. Out: percent, 0-100. All of it is merged over workers: `SegmentationScore`,
`ShapeScore` and `FrustumScore` by summing `tensors()`, `Votes` point by point, KITTI by gathering its `Frame`s, two
kilobytes or so each. Protocols are those of Point-Voxel CNN (arXiv 1907.03739), PointNet (1612.00593) and the KITTI
devkit (AP at 11 points; at 40: 1905.12365). Surprising: an AP over few objects is not the area under their curve
(a single car, found, gets 1/11), and a KITTI detection too low in the image is neutral whatever its class is. numpy
and torch do all of it, without CUDA.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

# ------------------------------------------------------------------------------------------------ segments


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
        self.sums[0] += _loss_sum(scores, labels, self._known(labels))

    def add_predictions(self, predicted: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> None:
        """Count classes `[n, N]`, or `[N]` of one cloud, against labels; -1 is no prediction. Adds no loss."""
        labels = _rows(labels)
        predicted = _rows(predicted).to(labels.device)
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
        recall = _percent(own, truth)
        iou = _percent(own, truth + positive - own)
        if absent == "one":
            recall[truth == 0], iou[truth == 0] = 100, 100
        total = int(truth.sum())
        return {
            "overall_acc": 100 * int(own.sum()) / max(total, 1),
            "mean_class_accuracy": _mean(recall),
            "miou": _mean(iou),
            "class_iou": _listed(iou),
            "loss": float(self.sums[0]) / max(total, 1),
            "num_samples": int(self.sums[1]),
        }


def _rows(values: Tensor | np.ndarray) -> Tensor:
    """`[N]` as `[1, N]`; `[n, N]` as it is."""
    tensor = torch.as_tensor(values)
    return tensor if tensor.ndim > 1 else tensor[None]


def _loss_sum(scores: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """The cross-entropy of scores `[n, C, N]`, summed over the known of labels `[n, N]`, on the CPU."""
    scores = scores.float()
    own = scores.gather(1, labels.long().where(known, 0)[:, None])[:, 0]
    return (scores.logsumexp(1) - own)[known].double().sum().cpu()


def _percent(part: Tensor, whole: Tensor) -> Tensor:
    """100 part / whole in float64, nan where `whole` is 0."""
    return 100 * part.double() / whole.double()


def _mean(percent: Tensor) -> float:
    """The mean of what is not nan, 0 if that is nothing."""
    return float(percent.nanmean().nan_to_num())


def _listed(percent: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in percent.tolist()]


def part_ranges(num_parts: Mapping[str, int]) -> dict[str, range]:
    """The labels of each shape's parts, numbered through all shapes in order; name -> how many parts it has."""
    ends = np.cumsum(list(num_parts.values())).tolist()
    return {name: range(end - num, end) for (name, num), end in zip(num_parts.items(), ends, strict=True)}


class ShapeScore:
    """IoU of the parts of shapes, summed over ranks: per category the sum of its shapes' IoU and their number.

    `parts` are the part labels of each category. A shape's prediction is the best among the parts of its category, its
    IoU the mean over them; a part that neither is there nor is predicted counts 1. Negative labels are left out.
    """

    def __init__(self, parts: Mapping[str, Sequence[int]]):
        self.names, num_parts = tuple(parts), max(max(labels) for labels in parts.values()) + 1
        self.allowed = torch.zeros(len(parts), num_parts, dtype=torch.bool)
        for category, labels in enumerate(parts.values()):
            self.allowed[category, list(labels)] = True
        self.shapes = torch.zeros(len(parts), 2, dtype=torch.float64)  # sum of IoU, shapes
        self.sums = torch.zeros(3, dtype=torch.float64)  # points that are right, points, loss

    def add(self, scores: Tensor, labels: Tensor, categories: Tensor | None = None) -> None:
        """Count scores `[n, P, N]` against labels int64 `[n, N]` of shapes of `categories` `[n]`, on their device.

        Without `categories` they are those that the labels belong to. A shape without labels is left out.
        """
        if categories is None:
            owner = self.allowed.to(torch.uint8).argmax(0).to(labels.device)
            categories = owner[labels.amax(1).clamp_min(0)]
        allowed = self.allowed.to(scores.device)[categories.to(scores.device)]
        predicted = scores.masked_fill(~allowed[:, :, None], -torch.inf).argmax(1)
        self.add_predictions(predicted, labels, categories)
        self.sums[2] += _loss_sum(scores, labels, labels >= 0)

    def add_predictions(
        self, predicted: Tensor | np.ndarray, labels: Tensor | np.ndarray, categories: Tensor | np.ndarray | int
    ) -> None:
        """Count parts `[n, N]`, or `[N]` of one shape, that were chosen among those of its category. Adds no loss."""
        labels = _rows(labels)
        predicted, categories = _rows(predicted).to(labels.device), torch.as_tensor(categories).cpu().view(-1)
        known, num_parts = labels >= 0, self.allowed.shape[1]
        if labels.numel() and int(labels.max()) >= num_parts:
            raise ValueError(f"label {int(labels.max())}: there are {num_parts} parts")
        truth, right = self._per_part(labels, known), self._per_part(labels, known & (labels == predicted))
        positive = self._per_part(predicted, known & (predicted >= 0))
        allowed, seen = self.allowed[categories], known.any(1).cpu()
        if (truth + positive)[~allowed].any():
            raise ValueError("a part, true or predicted, is none of its shape's category")
        union = truth + positive - right
        iou = torch.where(union > 0, right / union.clamp_min(1), 1.0).double()
        mean = (iou * allowed).sum(1) / allowed.sum(1)
        self.shapes.index_add_(0, categories[seen].long(), torch.stack([mean, torch.ones_like(mean)], 1)[seen])
        self.sums[:2] += torch.stack([right.sum(), truth.sum()])

    def _per_part(self, parts: Tensor, counted: Tensor) -> Tensor:
        """How many of parts `[n, N]` are counted, per shape and part: `[n, P]` on the CPU."""
        size, shape = self.allowed.shape[1], torch.arange(len(parts), device=parts.device)[:, None]
        rows = (shape * size + parts)[counted].long()
        return torch.bincount(rows, minlength=len(parts) * size).cpu().view(-1, size)

    def tensors(self) -> tuple[Tensor, ...]:
        """What must be summed over ranks, in place."""
        return self.shapes, self.sums

    def result(self) -> dict[str, Any]:
        """instance_miou (over shapes), category_miou, category_iou (by name, None without shapes), overall_acc, loss,
        num_samples (shapes); percent."""
        total, num_shapes = self.shapes.sum(0).tolist()
        iou = _percent(self.shapes[:, 0], self.shapes[:, 1])
        right, points, loss = self.sums.tolist()
        return {
            "instance_miou": 100 * total / max(num_shapes, 1),
            "category_miou": _mean(iou),
            "category_iou": dict(zip(self.names, _listed(iou), strict=True)),
            "overall_acc": 100 * right / max(points, 1),
            "loss": loss / max(points, 1),
            "num_samples": int(num_shapes),
        }


# ------------------------------------------------------------------------------------------------ votes


class Votes:
    """For each point of a scene the most confident prediction so far: `confidence` float32 and `predicted`, -1 if none.

    Eight bytes a point; a scene belongs to one worker, or several vote on windows of it and one adds their votes up:
    `votes.add(np.arange(num_points), other.confidence, other.predicted)`.
    """

    def __init__(self, num_points: int):
        self.confidence = np.zeros(num_points, np.float32)
        self.predicted = np.full(num_points, -1, np.int32)

    def add(self, index: np.ndarray, confidence: np.ndarray, predicted: np.ndarray) -> None:
        """Take over the predictions that are surer than those before; of equal ones the first stays. All `[n]`."""
        before = self.confidence[index]
        np.maximum.at(self.confidence, index, confidence)
        better = np.flatnonzero((confidence > before) & (confidence == self.confidence[index]))
        self.predicted[index[better][::-1]] = predicted[better][::-1]  # numpy keeps the last: here the first


def vote_draws(
    num_valid: int, num_points: int, num_votes: int, rng: np.random.Generator, capacity: int | None = None
) -> np.ndarray:
    """The points of a window or shape in random chunks `[K, num_points]`, each of them `num_votes` times or more.

    K = num_votes * ceil(capacity / num_points). `capacity` is what a full window holds (S3DIS: 8192), default
    `num_valid`, which is the protocol of ShapeNet (with 2048 points and 10 votes).
    """
    total = num_votes * math.ceil(max(capacity or 0, num_valid) / num_points) * num_points
    order = np.resize(np.arange(num_valid), total)
    rng.shuffle(order)
    return order.reshape(-1, num_points)


def confident(scores: Tensor, parts: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest class and its probability at each point: scores `[n, C, N]` -> float32, int64 `[n, N]`.

    With `parts` the likeliest of those; the probability is still that among all.
    """
    probabilities = scores.float().softmax(1)
    if parts is None:
        best, chosen = probabilities.max(1)
        return best.cpu().numpy(), chosen.cpu().numpy()
    labels = torch.tensor(list(parts), device=scores.device)
    best, chosen = probabilities.index_select(1, labels).max(1)
    return best.cpu().numpy(), labels[chosen].cpu().numpy()


# ------------------------------------------------------------------------------------------------ boxes
# A box is x, y, z of the middle of its bottom in rect camera axes (metres, y down), length, width, height, and its
# heading about y: `[n, 7]`. At heading 0 the length lies along x.

MAX_PAIRS = 2**13  # pairs of boxes held at a time, some 8 MB


def box_ious(boxes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU from above and in space of each box with its other, `[n, 7]` both: `[n]`, `[n]`; 0 for a box without size."""
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    slices = [slice(start, start + MAX_PAIRS) for start in range(0, len(boxes), MAX_PAIRS)]
    area = np.concatenate([_shared_area(boxes[one], others[one]) for one in slices] or [np.zeros(0)])
    sizes, other_sizes = np.maximum(boxes[:, 3:6], 0), np.maximum(others[:, 3:6], 0)
    top = np.maximum(boxes[:, 1] - sizes[:, 2], others[:, 1] - other_sizes[:, 2])
    volume = area * np.maximum(np.minimum(boxes[:, 1], others[:, 1]) - top, 0)
    areas = sizes[:, 0] * sizes[:, 1], other_sizes[:, 0] * other_sizes[:, 1]
    volumes = areas[0] * sizes[:, 2], areas[1] * other_sizes[:, 2]
    return _over(area, sum(areas) - area), _over(volume, sum(volumes) - volume)


def box_iou_matrix(boxes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU from above and in space of every box with every other: `[n, 7]`, `[m, 7]` -> `[n, m]`, `[n, m]`.

    Only pairs whose circles from above touch are clipped.
    """
    boxes, others = np.asarray(boxes, np.float64).reshape(-1, 7), np.asarray(others, np.float64).reshape(-1, 7)
    reach = np.hypot(boxes[:, 3], boxes[:, 4])[:, None] / 2 + np.hypot(others[:, 3], others[:, 4]) / 2
    away = np.hypot(boxes[:, None, 0] - others[:, 0], boxes[:, None, 2] - others[:, 2])
    rows, columns = np.nonzero(away < reach)
    flat, solid = np.zeros(away.shape), np.zeros(away.shape)
    flat[rows, columns], solid[rows, columns] = box_ious(boxes[rows], others[columns])
    return flat, solid


def _over(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _turned(x: np.ndarray, z: np.ndarray, heading: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (x, z) turned about y by `heading`."""
    cos, sin = np.cos(heading), np.sin(heading)
    return cos * x + sin * z, cos * z - sin * x


def _shared_area(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The area that each box and its other have in common from above, `[n]`.

    In its own axes the other box is |x| <= a, |z| <= b. The outline of the box is cut where it crosses the lines x = a,
    x = -a, z = b, z = -b, and every piece is clamped into the other box: outside, it turns into a path along the rim,
    and the whole encloses the common area. No case is special, not even shared sides or equal boxes.
    """
    x, z = _turned(boxes[:, 0] - others[:, 0], boxes[:, 2] - others[:, 2], -others[:, 6])
    half, limit = np.maximum(boxes[:, 3:5], 0) / 2, np.maximum(others[:, 3:5], 0)[:, :, None, None] / 2
    u, v = half[:, :1] * [1, 1, -1, -1], half[:, 1:] * [1, -1, -1, 1]
    u, v = _turned(u, v, (boxes[:, 6] - others[:, 6])[:, None])
    corners = np.stack([u + x[:, None], v + z[:, None]], 1)[..., None]  # [n, 2, 4, 1]
    edges = np.roll(corners, -1, 2) - corners
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        cuts = np.concatenate([-limit - corners, limit - corners], 3) / edges  # where an edge is parallel: nan or inf
    cuts = np.nan_to_num(np.concatenate([cuts[:, 0], cuts[:, 1], np.zeros_like(cuts[:, 0, :, :1])], 2))
    cuts = np.sort(cuts.clip(0, 1), 2)[:, None]  # [n, 1, 4, 5], from 0: 1 is the 0 of the next edge
    p, q = (corners + cuts * edges).clip(-limit, limit).reshape(len(boxes), 2, 20).transpose(1, 0, 2)
    return np.abs((p * np.roll(q, -1, 1) - q * np.roll(p, -1, 1)).sum(1)) / 2


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
    x, z = _turned(center[:, 0], center[:, 2], np.asarray(rotation))
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
            "class_found_3d": _mean(_percent(self.boxes[:, 1], self.boxes[:, 0])),
            "num_known": int(total),
            "num_samples": int(total + unknown),
        }


# ------------------------------------------------------------------------------------------------ KITTI's AP

NUM_THRESHOLDS = 41  # recalls 0, 1/40 ... 1
KITTI_MIN_IOU = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
KITTI_NEUTRAL = {"Car": "Van", "Pedestrian": "Person_sitting"}  # finding one is neither right nor wrong


@dataclass(frozen=True)
class Difficulty:
    """What an object must be like to count: higher in the image (pixels), no more occluded (0-3), truncated (0-1)."""

    min_height: float
    max_occlusion: int
    max_truncation: float


KITTI_DIFFICULTIES = {
    "easy": Difficulty(40, 0, 0.15),
    "moderate": Difficulty(25, 1, 0.3),
    "hard": Difficulty(25, 2, 0.5),
}


@dataclass(frozen=True)
class Labels:
    """The true objects of an image: `boxes` `[n, 7]`, `heights` of their 2D boxes in pixels, `occlusion`, `truncation`.

    Of all classes, the neutral ones too; DontCare regions have no box and play no part.
    """

    names: Sequence[str]
    boxes: np.ndarray
    heights: np.ndarray
    occlusion: np.ndarray
    truncation: np.ndarray


@dataclass(frozen=True)
class Detections:
    """What was found in an image: `boxes` `[n, 7]`, `heights` of their 2D boxes in pixels, `scores` (high is sure)."""

    names: Sequence[str]
    boxes: np.ndarray
    heights: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Frame:
    """All that an AP needs of an image, small enough to be gathered: `ious` `bev` and `3d`, `[detections, labels]`."""

    labels: Labels
    detections: Detections
    ious: Mapping[str, np.ndarray]


def compare_frame(labels: Labels, detections: Detections) -> Frame:
    """The geometry of one image, to be done wherever it was predicted."""
    flat, solid = box_iou_matrix(detections.boxes, labels.boxes)
    return Frame(labels, detections, {"bev": flat, "3d": solid})


def kitti_ap(frames: Sequence[Frame], min_ious: Mapping[str, float] = KITTI_MIN_IOU) -> dict[str, float]:
    """AP in percent as `ap11_3d_car_moderate`: at 11 and 40 recalls, `3d` and `bev`, per class and difficulty.

    `frames` of all workers, in any order.
    """
    out = {}
    for name, min_iou in min_ious.items():
        for metric in ("3d", "bev"):
            for level, difficulty in KITTI_DIFFICULTIES.items():
                curve = precision_curve(frames, name, metric, difficulty, min_iou)
                for points in (11, 40):
                    out[f"ap{points}_{metric}_{name.lower()}_{level}"] = average_precision(curve, points)
    return out


def average_precision(curve: np.ndarray, num_recalls: Literal[11, 40]) -> float:
    """The mean of a `precision_curve` in percent: over recalls 0, 0.1 ... 1, or over 1/40 ... 1."""
    return 100 * float((curve[::4] if num_recalls == 11 else curve[1:]).mean())


def precision_curve(
    frames: Iterable[Frame], name: str, metric: Literal["bev", "3d"], difficulty: Difficulty, min_iou: float
) -> np.ndarray:
    """The best precision at each of 41 recalls or any higher one, `[41]`; 0 where recall does not reach."""
    cases, num_objects = [], 0
    for frame in frames:
        object_state, found_state = _states(frame, name, difficulty)
        num_objects += int((object_state == 0).sum())
        if (found_state == 0).any() or ((object_state >= 0).any() and (found_state >= 0).any()):
            cases.append(_case(frame, metric, object_state, found_state, min_iou))
    scores = [score for case in cases for score in _hit_scores(case)]
    thresholds = _thresholds(np.sort(scores)[::-1], num_objects)
    counts = sum((_counts(case, thresholds) for case in cases), np.zeros((2, len(thresholds))))
    curve = np.zeros(NUM_THRESHOLDS)
    curve[: len(thresholds)] = _over(counts[0], counts.sum(0))
    return np.maximum.accumulate(curve[::-1])[::-1]


def _states(frame: Frame, name: str, difficulty: Difficulty) -> tuple[np.ndarray, np.ndarray]:
    """What each object and each detection is to `name`: 0 it counts, 1 it is neutral, -1 it plays no part."""
    labels, found, neutral = frame.labels, frame.detections, KITTI_NEUTRAL.get(name, "").lower()
    classes = np.array([0 if n.lower() == name.lower() else 1 if n.lower() == neutral else -1 for n in labels.names])
    fits = (
        (np.asarray(labels.heights) > difficulty.min_height)
        & (np.asarray(labels.occlusion) <= difficulty.max_occlusion)
        & (np.asarray(labels.truncation) <= difficulty.max_truncation)
    )
    same = np.array([n.lower() == name.lower() for n in found.names], bool)
    low = np.asarray(found.heights) < difficulty.min_height
    return np.where((classes == 0) & ~fits, 1, classes).astype(int), np.where(low, 1, np.where(same, 0, -1))


@dataclass(frozen=True)
class _Case:
    """An image as one class sees it: `near` and `ious` of detections `[D]` and objects `[G]` that play a part."""

    near: np.ndarray  # bool [D, G]: the IoU is above the minimum
    ious: np.ndarray  # [D, G]
    counts: np.ndarray  # bool [G]: the object is to be found
    valid: np.ndarray  # bool [D]: the detection may be wrong
    scores: np.ndarray  # [D]


def _case(frame: Frame, metric: str, object_state: np.ndarray, found_state: np.ndarray, min_iou: float) -> _Case:
    found = np.flatnonzero(found_state >= 0)
    ious = frame.ious[metric][found]
    objects = np.flatnonzero((object_state >= 0) & (ious > min_iou).any(0))  # others are found by nothing
    ious, scores = ious[:, objects], np.asarray(frame.detections.scores, np.float64)[found]
    return _Case(ious > min_iou, ious, object_state[objects] == 0, found_state[found] == 0, scores)


def _hit_scores(case: _Case) -> list[float]:
    """The scores of the detections that find an object, each object taking the surest that is left."""
    free, hits = np.ones(len(case.scores), bool), []
    for near, counts in zip(case.near.T, case.counts, strict=True):
        if (near & free).any():
            best = np.where(near & free, case.scores, -np.inf).argmax()
            free[best] = False
            if counts and case.valid[best]:
                hits.append(float(case.scores[best]))
    return hits


def _thresholds(hits: np.ndarray, num_objects: int) -> np.ndarray:
    """Of scores `hits`, highest first, those at which recall comes nearest to 0, 1/40, ... 1."""
    chosen, recall = [], 0.0
    for i, score in enumerate(hits):
        here, next_ = (i + 1) / num_objects, (i + 2) / num_objects
        if i + 1 < len(hits) and next_ - recall < recall - here:
            continue
        chosen.append(score)
        recall += 1 / (NUM_THRESHOLDS - 1)
    return np.array(chosen[:NUM_THRESHOLDS])


def _counts(case: _Case, thresholds: np.ndarray) -> np.ndarray:
    """Right and wrong detections at each threshold, `[2, T]`: each object takes the nearest that is left.

    A neutral detection is taken only where there is no valid one.
    """
    free = case.scores >= thresholds[:, None]  # [T, D]
    right, rows = np.zeros(len(thresholds)), np.arange(len(thresholds))
    for near, iou, counts in zip(case.near.T, case.ious.T, case.counts, strict=True):
        open_ = free & near
        valid = open_ & case.valid
        found, any_ = valid.any(1), open_.any(1)
        chosen = np.where(found, np.where(valid, iou, -1.0).argmax(1), open_.argmax(1))
        free[rows[any_], chosen[any_]] = False
        right += found & counts
    return np.stack([right, (free & case.valid).sum(1)])
