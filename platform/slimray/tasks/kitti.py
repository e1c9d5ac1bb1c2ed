"""KITTI's average precision of boxes, as its devkit computes it (at 11 recalls; at 40: arXiv 1905.12365).

In: a `Frame` per image (its objects, the detections, the IoU of both), about two kilobytes, which ranks gather. Out:
percent, 0-100. Surprising: an AP over few objects is not the area under their curve (a single car that is found gets
1/11), and a detection with too small a height in the image is neutral for any class. numpy only.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from slimray.tasks.boxes import box_iou_matrix, over

NUM_THRESHOLDS = 41  # recalls 0, 1/40 ... 1
KITTI_MIN_IOU = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
KITTI_NEUTRAL = {"Car": "Van", "Pedestrian": "Person_sitting"}  # detecting one is neither right nor wrong


@dataclass(frozen=True)
class Difficulty:
    """Conditions for an object to count: least height in pixels, most occlusion (0-3) and truncation (0-1)."""

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
    """True objects of an image: `boxes` `[n, 7]`, `heights` of their 2D boxes in pixels, `occlusion`, `truncation`.

    They include all classes, also neutral ones; DontCare regions have no box and are ignored.
    """

    names: Sequence[str]
    boxes: np.ndarray
    heights: np.ndarray
    occlusion: np.ndarray
    truncation: np.ndarray


@dataclass(frozen=True)
class Detections:
    """Boxes found in an image: `boxes` `[n, 7]`, `heights` of their 2D boxes in pixels, `scores` (higher is surer)."""

    names: Sequence[str]
    boxes: np.ndarray
    heights: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Frame:
    """Data of an image for the AP, small enough to be gathered: `ious` `bev` and `3d` are `[detections, labels]`."""

    labels: Labels
    detections: Detections
    ious: Mapping[str, np.ndarray]


def compare_frame(labels: Labels, detections: Detections) -> Frame:
    """Return the `Frame` of one image; to be called on the rank that predicted it."""
    flat, solid = box_iou_matrix(detections.boxes, labels.boxes)
    return Frame(labels, detections, {"bev": flat, "3d": solid})


def kitti_ap(frames: Sequence[Frame], min_ious: Mapping[str, float] = KITTI_MIN_IOU) -> dict[str, float]:
    """Return the AP in percent as `ap11_3d_car_moderate`: at 11 and 40 recalls, `3d` and `bev`, by class and
    difficulty.

    `frames` are those of all workers, in any order.
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
    """Return the mean of a `precision_curve` in percent: over recalls 0, 0.1 ... 1, or over 1/40 ... 1."""
    return 100 * float((curve[::4] if num_recalls == 11 else curve[1:]).mean())


def precision_curve(
    frames: Iterable[Frame], name: str, metric: Literal["bev", "3d"], difficulty: Difficulty, min_iou: float
) -> np.ndarray:
    """Return the best precision at each of 41 recalls or any higher one, `[41]`; 0 for recalls that are not reached."""
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
    curve[: len(thresholds)] = over(counts[0], counts.sum(0))
    return np.maximum.accumulate(curve[::-1])[::-1]


def _states(frame: Frame, name: str, difficulty: Difficulty) -> tuple[np.ndarray, np.ndarray]:
    """Return the state of each object and detection for the class `name`: 0 counts, 1 is neutral, -1 is ignored."""
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
    """An image for one class: `near` and `ious` of the detections `[D]` and objects `[G]` that are not ignored."""

    near: np.ndarray  # bool [D, G]: the IoU is above the minimum
    ious: np.ndarray  # [D, G]
    counts: np.ndarray  # bool [G]: the object must be found
    valid: np.ndarray  # bool [D]: the detection can count as wrong
    scores: np.ndarray  # [D]


def _case(frame: Frame, metric: str, object_state: np.ndarray, found_state: np.ndarray, min_iou: float) -> _Case:
    found = np.flatnonzero(found_state >= 0)
    ious = frame.ious[metric][found]
    objects = np.flatnonzero((object_state >= 0) & (ious > min_iou).any(0))  # nothing finds the others
    ious, scores = ious[:, objects], np.asarray(frame.detections.scores, np.float64)[found]
    return _Case(ious > min_iou, ious, object_state[objects] == 0, found_state[found] == 0, scores)


def _hit_scores(case: _Case) -> list[float]:
    """Return the scores of the detections that find an object; each object takes the surest one that is left."""
    free, hits = np.ones(len(case.scores), bool), []
    for near, counts in zip(case.near.T, case.counts, strict=True):
        if (near & free).any():
            best = np.where(near & free, case.scores, -np.inf).argmax()
            free[best] = False
            if counts and case.valid[best]:
                hits.append(float(case.scores[best]))
    return hits


def _thresholds(hits: np.ndarray, num_objects: int) -> np.ndarray:
    """Return those of the scores `hits`, highest first, at which recall comes nearest to 0, 1/40, ... 1."""
    chosen, recall = [], 0.0
    for i, score in enumerate(hits):
        here, next_ = (i + 1) / num_objects, (i + 2) / num_objects
        if i + 1 < len(hits) and next_ - recall < recall - here:
            continue
        chosen.append(score)
        recall += 1 / (NUM_THRESHOLDS - 1)
    return np.array(chosen[:NUM_THRESHOLDS])


def _counts(case: _Case, thresholds: np.ndarray) -> np.ndarray:
    """Return the right and wrong detections at each threshold, `[2, T]`; each object takes the best one that is left.

    The best has the highest IoU; a neutral detection is taken only if there is no valid one.
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
