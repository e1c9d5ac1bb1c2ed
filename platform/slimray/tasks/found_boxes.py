"""Boxes found by frustum networks, for `evaluate`: detections of each rank, KITTI's AP of them all, pictures from
above.

A detection is a plain dict (`image`, `name`, `box` `[7]`, `height` in pixels, `score`), so that ranks can send theirs
to the first one. The objects to be found are in `SPLIT.objects.json` beside the index, written by `prepare`, so that
objects without a frustum count as missed. AP: arXiv 1711.08488, KITTI devkit; the points that a network sees are drawn
at random, so published numbers are means over 20 runs (`repeats`).
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slimray import storage
from slimray.data.points import point_sets
from slimray.runs.examples import BoxView
from slimray.spec import RunFailed
from slimray.tasks import kitti
from slimray.tasks.kitti import Detections, Labels

POINTS_SHOWN = 4000  # per image, in a picture

Detection = dict[str, Any]


def detections_of(boxes: np.ndarray, truth: np.ndarray, paths: Sequence[str]) -> list[Detection]:
    """Return boxes `[n, 7]` found in frustums of `paths`, with their truths float32 `[n, N + 11]`, as detections."""
    labels, _, scores, heights = truth[:, -4:].T
    return [
        {
            "image": path.rpartition("#")[0],
            "name": point_sets.KITTI_CLASSES[int(label)],
            "box": box.tolist(),
            "height": float(height),
            "score": float(score),
        }
        for path, label, box, height, score in zip(paths, labels, boxes, heights, scores, strict=True)
    ]


def read_objects(root: str, split: str) -> dict[str, Labels]:
    """Return image -> its labelled objects; RunFailed if the prepared dataset has no file of objects."""
    fs, folder = storage.open_uri(root)
    place = storage.join(folder, f"{split}.objects.json")
    try:
        images = json.loads(storage.read_bytes(fs, place))
    except FileNotFoundError:
        raise RunFailed(f"{place}: is missing, it lists the objects to be found: run prepare again") from None
    return {one["image"]: _labels(one["objects"]) for one in images}


def _labels(objects: list[dict[str, Any]]) -> Labels:
    solid = [one for one in objects if one["box"] is not None]
    boxes = np.array([one["box"] for one in solid], np.float64).reshape(-1, 7)
    boxes[:, 1] += boxes[:, 5] / 2  # from the centre to the middle of the bottom
    heights = [one["box_2d"][3] - one["box_2d"][1] for one in solid]
    return Labels(
        [one["kind"] for one in solid],
        boxes,
        np.array(heights, np.float64),
        np.array([one["occlusion"] for one in solid], int),
        np.array([one["truncation"] for one in solid], np.float64),
    )


def average_precisions(found: Sequence[Detection], objects: Mapping[str, Labels]) -> dict[str, float]:
    """Return KITTI's AP in percent (see `kitti.kitti_ap`) of the detections in all images."""
    by_image = _by_image(found)
    frames = [kitti.compare_frame(labels, _detections(by_image.get(image, []))) for image, labels in objects.items()]
    return kitti.kitti_ap(frames)


def _by_image(found: Sequence[Detection]) -> dict[str, list[Detection]]:
    out = defaultdict(list)
    for one in found:
        out[one["image"]].append(one)
    return out


def _detections(found: Sequence[Detection]) -> Detections:
    return Detections(
        [one["name"] for one in found],
        np.array([one["box"] for one in found], np.float64).reshape(-1, 7),
        np.array([one["height"] for one in found], np.float64),
        np.array([one["score"] for one in found], np.float64),
    )


def scene_points(data: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the points `[n, C, N]` of frustums rotated back into camera coordinates, float32 `[n * N, 3]`."""
    clouds = [
        point_sets.turned(points[:3].T, -rotation) for points, rotation in zip(data, truth[:, -3].tolist(), strict=True)
    ]
    return np.concatenate(clouds).astype(np.float32) if clouds else np.zeros((0, 3), np.float32)


def pictures(
    points: Mapping[str, list[np.ndarray]], found: Sequence[Detection], objects: Mapping[str, Labels]
) -> list[dict[str, Any]]:
    """Return a view from above of each image of `points` (image -> points `[n, 3]` of its frustums), for the report."""
    by_image, out = _by_image(found), []
    for image, parts in points.items():
        coords = np.concatenate([np.asarray(part, np.float32) for part in parts])
        coords = coords[:: max(1, len(coords) // POINTS_SHOWN)]
        here, labels = by_image.get(image, []), objects.get(image)
        known = [i for i, name in enumerate(labels.names) if name in point_sets.KITTI_CLASSES] if labels else []
        out.append(
            BoxView(
                run="",
                title=image,
                points=coords,
                truths=labels.boxes[known] if labels is not None else np.zeros((0, 7)),
                truth_names=[labels.names[i] for i in known] if labels is not None else [],
                predictions=np.array([one["box"] for one in here]).reshape(-1, 7),
                names=[one["name"] for one in here],
                scores=[one["score"] for one in here],
            ).to_plain()
        )
    return out
