"""Geometry of upright 3D boxes: their IoU from above and in space. numpy only, in float64.

A box is x, y, z of the centre of its bottom in rectified camera axes (metres, y down), length, width, height, and its
heading about y: `[n, 7]`. At heading 0 the length lies along x.
"""

import numpy as np

MAX_PAIRS = 2**13  # pairs of boxes processed at once, about 8 MB


def box_ious(boxes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the IoU from above and in space, `[n]` each, of pairs of boxes, `[n, 7]` each; 0 for an empty box."""
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    slices = [slice(start, start + MAX_PAIRS) for start in range(0, len(boxes), MAX_PAIRS)]
    area = np.concatenate([_shared_area(boxes[one], others[one]) for one in slices] or [np.zeros(0)])
    sizes, other_sizes = np.maximum(boxes[:, 3:6], 0), np.maximum(others[:, 3:6], 0)
    top = np.maximum(boxes[:, 1] - sizes[:, 2], others[:, 1] - other_sizes[:, 2])
    volume = area * np.maximum(np.minimum(boxes[:, 1], others[:, 1]) - top, 0)
    areas = sizes[:, 0] * sizes[:, 1], other_sizes[:, 0] * other_sizes[:, 1]
    volumes = areas[0] * sizes[:, 2], areas[1] * other_sizes[:, 2]
    return over(area, sum(areas) - area), over(volume, sum(volumes) - volume)


def box_iou_matrix(boxes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the IoU from above and in space of all pairs of boxes: `[n, 7]`, `[m, 7]` -> `[n, m]`, `[n, m]`.

    Only pairs whose circumscribed circles touch are clipped against each other.
    """
    boxes, others = np.asarray(boxes, np.float64).reshape(-1, 7), np.asarray(others, np.float64).reshape(-1, 7)
    reach = np.hypot(boxes[:, 3], boxes[:, 4])[:, None] / 2 + np.hypot(others[:, 3], others[:, 4]) / 2
    away = np.hypot(boxes[:, None, 0] - others[:, 0], boxes[:, None, 2] - others[:, 2])
    rows, columns = np.nonzero(away < reach)
    flat, solid = np.zeros(away.shape), np.zeros(away.shape)
    flat[rows, columns], solid[rows, columns] = box_ious(boxes[rows], others[columns])
    return flat, solid


def over(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def turned(x: np.ndarray, z: np.ndarray, heading: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return points (x, z) rotated about y by `heading`."""
    cos, sin = np.cos(heading), np.sin(heading)
    return cos * x + sin * z, cos * z - sin * x


def _shared_area(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the overlap of each pair of boxes from above, `[n]`.

    In its own axes the other box is |x| <= a, |z| <= b. The outline of the box is cut where it crosses the lines x = a,
    x = -a, z = b, z = -b, and every piece is clamped to the other box: pieces outside become a path along its border,
    and the whole path encloses the overlap. There are no special cases, not even shared sides or equal boxes.
    """
    x, z = turned(boxes[:, 0] - others[:, 0], boxes[:, 2] - others[:, 2], -others[:, 6])
    half, limit = np.maximum(boxes[:, 3:5], 0) / 2, np.maximum(others[:, 3:5], 0)[:, :, None, None] / 2
    u, v = half[:, :1] * [1, 1, -1, -1], half[:, 1:] * [1, -1, -1, 1]
    u, v = turned(u, v, (boxes[:, 6] - others[:, 6])[:, None])
    corners = np.stack([u + x[:, None], v + z[:, None]], 1)[..., None]  # [n, 2, 4, 1]
    edges = np.roll(corners, -1, 2) - corners
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        cuts = np.concatenate([-limit - corners, limit - corners], 3) / edges  # nan or inf for a parallel edge
    cuts = np.nan_to_num(np.concatenate([cuts[:, 0], cuts[:, 1], np.zeros_like(cuts[:, 0, :, :1])], 2))
    cuts = np.sort(cuts.clip(0, 1), 2)[:, None]  # [n, 1, 4, 5], from 0: 1 is the 0 of the next edge
    p, q = (corners + cuts * edges).clip(-limit, limit).reshape(len(boxes), 2, 20).transpose(1, 0, 2)
    return np.abs((p * np.roll(q, -1, 1) - q * np.roll(p, -1, 1)).sum(1)) / 2
