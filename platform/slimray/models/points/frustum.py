"""Frustum networks: predict a 3D box from the points behind a 2D box, for KITTI's cars, pedestrians and cyclists.

Frustum PointNets (arXiv 1711.08488), with the networks of Point-Voxel CNN (1907.03739). One network segments the
object's points, one predicts its centre, one its box. Points are `[B, 4, N]` (coordinates, intensity) in rectified
camera axes (y down), rotated so that the frustum points along z; the class is a one-hot `[B, 3]`. A box is centre,
heading about y and size (l, w, h); heading is one of 12 bins and a residual, size one of 8 templates and a residual.
The task `frustum_boxes` defines their training.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimray.data.points.point_sets import KITTI_CLASSES
from slimray.models.points import ops
from slimray.models.points.pointnet import (
    DROPOUT,
    CloudNet,
    PointNet,
    PointNet2,
    abstractions,
    head_widths,
    linear_head,
    point_head,
    propagations,
    scaled,
    shared_blocks,
)
from slimray.models.points.pvcnn import Block, point_voxel_blocks

NUM_HEADING_BINS = 12
HEADING_BIN = 2 * math.pi / NUM_HEADING_BINS
SIZE_TEMPLATES = {  # mean l, w, h in metres over KITTI's training split
    "Car": (3.88311640418, 1.62856739989, 1.52563191462),
    "Van": (5.06763659, 1.9007158, 2.20532825),
    "Truck": (10.13586957, 2.58549199, 3.2520595),
    "Pedestrian": (0.84422524, 0.66068622, 1.76255119),
    "Person_sitting": (0.80057803, 0.5983815, 1.27450867),
    "Cyclist": (1.76282397, 0.59706367, 1.73698127),
    "Tram": (16.17150617, 2.53246914, 3.53079012),
    "Misc": (3.64300781, 1.54298177, 1.92320313),
}
NUM_SIZES = len(SIZE_TEMPLATES)
BOX_PARTS = [3, NUM_HEADING_BINS, NUM_HEADING_BINS, NUM_SIZES, NUM_SIZES * 3]  # 59 outputs of a box network
IN_CHANNELS = 4
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
EPS = 1e-15  # for voxel grids around masked points, which may all coincide


# ------------------------------------------------------------------------------------------------ masking


def mask_points(
    coords: Tensor,
    mask_logits: Tensor,
    num_points: int,
    generator: torch.Generator | None = None,
    evenly: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `num_points` of the points that the mask assigns to the object, relative to their mean.

    `coords` `[B, 3, N]`, `mask_logits` `[B, 2, N]` -> coordinates minus mean `[B, 3, num_points]`, mean `[B, 3]`, mask
    `[B, N]`. Points are drawn without replacement; if there are too few, each equally often, and a random rest once
    more; if there are none, all are zero. The draw is random even in eval mode unless `generator` is seeded. With
    `evenly`, as in an exported network, always the same points are drawn, evenly spaced among those of the object.
    Differentiable in `coords`.
    """
    mask = mask_logits[:, 1] > mask_logits[:, 0]
    kept = coords.float() * mask[:, None]
    count = mask.sum(1, keepdim=True).clamp_min(1)
    mean = kept.sum(2) / count
    if evenly:  # multiples of the golden ratio
        keys = (torch.arange(mask.shape[1], device=coords.device) * GOLDEN_RATIO).frac().expand(mask.shape)
    else:
        keys = torch.rand(mask.shape, generator=generator, device=coords.device)
    order = ops.ascending(keys + ~mask)  # the object's points come first, in random order
    places = torch.arange(num_points, device=coords.device) % count
    return ops.gather(kept, order.gather(1, places)) - mean[..., None], mean, mask


# ------------------------------------------------------------------------------------------------ networks


class FrustumNet(nn.Module):
    """The three networks in sequence: points `[B, 4, N]` and one-hot `[B, 3]` -> the parts of a box, by name.

    Without `one_hot`, the class is in the last three channels of `points`. Returns `mask_logits` `[B, 2, N]`,
    `center_reg` and `center` `[B, 3]`, `heading_scores`, `heading_residuals_normalized` and `heading_residuals`
    (radians) `[B, 12]`, `size_scores` `[B, 8]`, `size_residuals_normalized` and `size_residuals` (metres) `[B, 8, 3]`.
    The points drawn are fixed by `generator`, or by `draws_evenly` (see `mask_points`), which an exported graph always
    uses.
    """

    size_templates: Tensor

    def __init__(
        self, mask_net: nn.Module, center_net: nn.Module, box_net: nn.Module, num_classes: int, num_points: int
    ):
        super().__init__()
        self.inst_seg_net, self.center_reg_net, self.box_est_net = mask_net, center_net, box_net
        self.num_classes, self.num_points, self.draws_evenly = num_classes, num_points, False
        self.head_name = f"box_est_net.{box_net.head_name}"
        self.register_buffer("size_templates", torch.tensor([list(SIZE_TEMPLATES.values())]))
        sizes = torch.tensor([list(SIZE_TEMPLATES).index(name) for name in KITTI_CLASSES])
        self.register_buffer("class_sizes", sizes, persistent=False)

    def mask_net(self, points: Tensor, one_hot: Tensor) -> Tensor:
        """Return the logits of background and object `[B, 2, N]` for points `[B, 4, N]` and one-hot `[B, 3]`."""
        return self.inst_seg_net(points, one_hot)

    def center_net(self, coords: Tensor, one_hot: Tensor) -> Tensor:
        """Return the object's centre `[B, 3]` relative to the mean of its points; `coords` are relative to it, too."""
        return self.center_reg_net(coords, one_hot)

    def box_net(self, coords: Tensor, one_hot: Tensor) -> Tensor:
        """Return `[B, 59]`, the concatenated BOX_PARTS, for the points relative to the centre `[B, 3, num_points]`."""
        return self.box_est_net(coords, one_hot)

    def forward(
        self, points: Tensor, one_hot: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        if one_hot is None:
            points, one_hot = points[:, : -self.num_classes], points[:, -self.num_classes :, 0]
        mask_logits = self.mask_net(points, one_hot)
        evenly = self.draws_evenly or torch.compiler.is_exporting()
        coords, mean, _ = mask_points(points[:, :3], mask_logits, self.num_points, generator, evenly)
        delta = self.center_net(coords, one_hot).float()
        box = self.box_net(coords - delta[..., None], one_hot).float()
        center, heading_scores, headings, size_scores, sizes = box.split(BOX_PARTS, 1)
        sizes = sizes.unflatten(1, (NUM_SIZES, 3))
        return {
            "mask_logits": mask_logits,
            "center_reg": mean + delta,
            "center": mean + delta + center,
            "heading_scores": heading_scores,
            "heading_residuals_normalized": headings,
            "heading_residuals": headings * (HEADING_BIN / 2),
            "size_scores": size_scores,
            "size_residuals_normalized": sizes,
            "size_residuals": sizes * self.size_templates,
        }


MASK_HEAD = (512, 256, 128, 128, DROPOUT)


def _center_net(num_classes: int, width: float, layers: list[nn.Module] | None = None) -> CloudNet:
    points, hidden = scaled([128, 128, 256], width), scaled([256, 128], width)
    layers = layers or shared_blocks(3, points)
    return CloudNet(layers, linear_head(points[-1] + num_classes, hidden, 3, 0.0), "regression")


def _box_net(num_classes: int, width: float, layers: list[nn.Module] | None = None) -> CloudNet:
    points, hidden = scaled([128, 128, 256, 512], width), scaled([512, 256], width)
    layers = layers or shared_blocks(3, points)
    return CloudNet(layers, linear_head(points[-1] + num_classes, hidden, sum(BOX_PARTS), 0.0))


def frustum_pointnet(
    *, num_classes: int, width: float = 1.0, num_points: int = 512, dropout: float = 0.5
) -> FrustumNet:
    """Build a frustum network of PointNets."""
    points, clouds = scaled([64, 64, 64], width), scaled([128, 1024], width)
    head = point_head(num_classes + points[-1] + clouds[-1], head_widths(MASK_HEAD, width), 2, dropout)
    summary = nn.Sequential(*shared_blocks(points[-1], clouds))
    mask_net = PointNet(IN_CHANNELS, shared_blocks(IN_CHANNELS, points), summary, head, num_classes)
    return FrustumNet(mask_net, _center_net(num_classes, width), _box_net(num_classes, width), num_classes, num_points)


MASK_STAGES = (
    (128, (0.2, 0.4, 0.8), (32, 64, 128), ((32, 32, 64), (64, 64, 128), (64, 96, 128))),
    (32, (0.4, 0.8, 1.6), (64, 64, 128), ((64, 64, 128), (128, 128, 256), (128, 128, 256))),
    ((128, 256, 1024),),
)
BOX_STAGES = (
    (128, (0.2,), (64,), ((64, 64, 128),)),
    (32, (0.4,), (64,), ((128, 128, 256),)),
    ((256, 256, 512),),
)


def frustum_pointnetpp(
    *, num_classes: int, width: float = 1.0, num_points: int = 512, dropout: float = 0.3
) -> FrustumNet:
    """Build a frustum network with PointNet++ for mask and box, and PointNet for the centre."""
    sa_layers = abstractions(IN_CHANNELS - 3, MASK_STAGES, width)
    fp_layers = propagations(sa_layers, IN_CHANNELS, num_classes, ((128, 128),) * 3, width)
    (hidden,) = scaled([128], width)
    classifier = point_head(hidden, [hidden, DROPOUT], 2, dropout)
    mask_net = PointNet2(sa_layers, fp_layers, classifier, slice(3, IN_CHANNELS), slice(IN_CHANNELS))
    box_net = _box_net(num_classes, width, abstractions(0, BOX_STAGES, width))
    return FrustumNet(mask_net, _center_net(num_classes, width), box_net, num_classes, num_points)


def _pvcnn_mask_net(num_classes: int, width: float, voxel: float, dropout: float) -> PointNet:
    blocks: list[Block] = [(64, 2, 16), (64, 1, 12), (128, 1, 12), (1024, 1, None)]
    layers, channels = point_voxel_blocks(IN_CHANNELS, blocks, width, voxel)
    head = point_head(num_classes + 2 * channels[-1], head_widths(MASK_HEAD, width), 2, dropout)
    return PointNet(IN_CHANNELS, layers, None, head, num_classes)


def frustum_pvcnne(
    *, num_classes: int, width: float = 1.0, voxel: float = 1.0, num_points: int = 512, dropout: float = 0.5
) -> FrustumNet:
    """Build the efficient form: PVCNN for the mask, PointNets for centre and box."""
    mask_net = _pvcnn_mask_net(num_classes, width, voxel, dropout)
    return FrustumNet(mask_net, _center_net(num_classes, width), _box_net(num_classes, width), num_classes, num_points)


CENTER_BLOCKS: Sequence[Block] = ((128, 2, 8), (256, 1, None))
BOX_BLOCKS: Sequence[Block] = ((128, 2, 12), (256, 1, 8), (512, 1, None))


def frustum_pvcnn_complete(
    *, num_classes: int, width: float = 1.0, voxel: float = 1.0, num_points: int = 512, dropout: float = 0.5
) -> FrustumNet:
    """Build a network with PVConvs in all three parts; the paper lists it without configuration, so grids are ours."""
    center, _ = point_voxel_blocks(3, CENTER_BLOCKS, width, voxel, eps=EPS)
    box, _ = point_voxel_blocks(3, BOX_BLOCKS, width, voxel, eps=EPS)
    mask_net = _pvcnn_mask_net(num_classes, width, voxel, dropout)
    center_net, box_net = _center_net(num_classes, width, center), _box_net(num_classes, width, box)
    return FrustumNet(mask_net, center_net, box_net, num_classes, num_points)
