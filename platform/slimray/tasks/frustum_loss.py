"""Loss of frustum networks (models/points/frustum.py): masks, boxes and corners against the truth of each frustum.

In: outputs of a FrustumNet and truths from `load_frustum`. Out: targets by name, and the loss of each sample. Frustum
PointNets: arXiv 1711.08488, section 4.5.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from slimray.models.points.frustum import HEADING_BIN, NUM_HEADING_BINS


def box_corners(center: Tensor, heading: Tensor, size: Tensor) -> Tensor:
    """Return the corners `[B, 8, 3]` of boxes: `center` `[B, 3]`, `heading` `[B]` about y, `size` (l, w, h) `[B, 3]`.

    Length lies along x, height along y, width along z at heading 0; the first four corners have the larger y.
    """
    length, width, height = (size / 2).unbind(1)
    x = torch.stack([length, length, -length, -length] * 2, 1)
    y = torch.stack([height] * 4 + [-height] * 4, 1)
    z = torch.stack([width, -width, -width, width] * 2, 1)
    cos, sin = heading.cos()[:, None], heading.sin()[:, None]
    return torch.stack([cos * x + sin * z, y, cos * z - sin * x], 2) + center[:, None]


def huber(error: Tensor, delta: float) -> Tensor:
    """Return the Huber loss of each `error`: quadratic up to `delta`, linear beyond."""
    size = error.abs()
    quadratic = size.clamp_max(delta)
    return 0.5 * quadratic.square() + delta * (size - quadratic)


def heading_bins(heading: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin (0 to 11, int64) of headings in radians, and their offset from its centre (0 for bin 0)."""
    shifted = (heading % (2 * math.pi) + HEADING_BIN / 2) % (2 * math.pi)
    number = (shifted / HEADING_BIN).floor().clamp_max(NUM_HEADING_BINS - 1)
    return number.long(), shifted - (number + 0.5) * HEADING_BIN


def frustum_targets(truth: Tensor, class_sizes: Tensor, size_templates: Tensor) -> dict[str, Tensor]:
    """Return the targets of `frustum_losses` from truths `[B, N + 11]`: mask `[N]`, box `[7]`, class, and 3 more
    values.

    `class_sizes` int64 holds the size template of each class. The result also has `label` (the class) and `known`
    (bool: there is a true box).
    """
    mask, box, label = truth[:, :-11], truth[:, -11:-4], truth[:, -4].long()
    known = ~box.isnan().any(1)
    box = torch.where(known[:, None], box, 0.0)
    heading_id, heading_residual = heading_bins(box[:, 6])
    size_id = class_sizes[label]
    return {
        "mask": mask.long().clamp_min(0),
        "center": box[:, :3],
        "heading_id": heading_id,
        "heading_residual": heading_residual,
        "size_id": size_id,
        "size_residual": box[:, 3:6] - size_templates.view(-1, 3)[size_id],
        "label": label,
        "known": known,
    }


def frustum_losses(
    outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], size_templates: Tensor, box_weight: float = 1.0
) -> Tensor:
    """Return the loss of a FrustumNet for each sample `[B]`: mask, centre, heading, size, corners (1711.08488, 4.5).

    `targets`: `mask` `[B, N]` int64, `center` `[B, 3]`, `heading_id` and `size_id` `[B]` int64, `heading_residual`
    `[B]` in radians, `size_residual` `[B, 3]` in metres. The corners are those of the true bin and template with the
    predicted residuals, compared with the true box or the box rotated by pi, whichever is nearer.
    """
    rows = torch.arange(len(targets["center"]), device=targets["center"].device)
    heading_id, size_id = targets["heading_id"], targets["size_id"]
    template = size_templates.view(-1, 3)[size_id]
    heading_error = outputs["heading_residuals_normalized"][rows, heading_id] - targets["heading_residual"] / (
        HEADING_BIN / 2
    )
    size_error = outputs["size_residuals_normalized"][rows, size_id] - targets["size_residual"] / template
    bin_center = heading_id * HEADING_BIN
    predicted = box_corners(
        outputs["center"],
        bin_center + outputs["heading_residuals"][rows, heading_id],
        template + outputs["size_residuals"][rows, size_id],
    )
    true_heading, true_size = bin_center + targets["heading_residual"], template + targets["size_residual"]
    corners = [box_corners(targets["center"], true_heading + turn, true_size) for turn in (0.0, math.pi)]
    distance = torch.minimum(*((predicted - true).norm(dim=2) for true in corners))
    box = (
        huber((outputs["center"] - targets["center"]).norm(dim=1), 2.0)
        + huber((outputs["center_reg"] - targets["center"]).norm(dim=1), 1.0)
        + F.cross_entropy(outputs["heading_scores"], heading_id, reduction="none")
        + F.cross_entropy(outputs["size_scores"], size_id, reduction="none")
        + 20 * huber(heading_error, 1.0)
        + 20 * huber(size_error.norm(dim=1), 1.0)
        + 10 * huber(distance, 1.0).mean(1)
    )
    mask = F.cross_entropy(outputs["mask_logits"].float(), targets["mask"], reduction="none").mean(1)
    return mask + box_weight * box
