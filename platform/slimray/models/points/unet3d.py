"""A 3D U-Net over voxels, the baseline for point-voxel networks, our own definition.

After 3D U-Net (arXiv 1606.06650). Point-Voxel CNN (1907.03739) reports such a baseline but published no configuration.
Here points are averaged into a grid of 64 (`voxel=1.5` for the 96 recalled from the paper), there are two 3x3x3
convolutions per level, strided convolutions go down and up three times (no pooling, whose backward pass is not
deterministic on CUDA), and the grid is interpolated at the points. Takes `[B, C, N]`, coordinates first, and returns
`[B, num_classes, N]`.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from slimray.models.points.ops import devoxelize, normalize_coords, voxelize
from slimray.models.points.pointnet import DROPOUT, NUM_NORMALS, NUM_SHAPES, head_widths, point_head, scaled

CHANNELS, RESOLUTION = (32, 64, 128, 256), 64
MIN_GRID = 4  # on CPU, torch 2.13's bfloat16 weight gradient of a 3x3x3 convolution over 2x2x2 is wrong


def _level(in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (in_channels, out_channels):
        layers += [nn.Conv3d(before, out_channels, 3, padding=1, bias=False), nn.BatchNorm3d(out_channels)]
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class UNet3D(nn.Module):
    """`[B, C, N]` -> `[B, num_classes, N]`. With `num_shapes`, the last channels are a one-hot shape for the head."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        width: float,
        voxel: float,
        normalize: bool,
        head: Sequence[int | str],
        dropout: float,
        num_shapes: int = 0,
    ):
        super().__init__()
        self.in_channels, self.num_shapes, self.normalize = in_channels, num_shapes, normalize
        step = 2 ** (len(CHANNELS) - 1)
        self.resolution = max(MIN_GRID * step, round(voxel * RESOLUTION / step) * step)  # see MIN_GRID
        channels = scaled(CHANNELS, width)
        self.down = nn.ModuleList(_level(a, b) for a, b in zip([in_channels, *channels[1:]], channels))
        self.shrink = nn.ModuleList(nn.Conv3d(a, b, 2, 2) for a, b in pairwise(channels))
        self.grow = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, 2) for a, b in pairwise(channels))
        self.up = nn.ModuleList(_level(2 * a, a) for a in channels[:-1])
        self.classifier = point_head(channels[0] + num_shapes, head_widths(head, width), num_classes, dropout)
        self.head_name = f"classifier.{len(self.classifier) - 1}"

    def forward(self, x: Tensor) -> Tensor:
        places = normalize_coords(x[:, :3], self.resolution, self.normalize)
        grid = self.down[0](voxelize(x[:, : self.in_channels], places, self.resolution).contiguous())
        skips = []
        for shrink, down in zip(self.shrink, list(self.down)[1:]):
            skips.append(grid)
            grid = down(shrink(grid))
        for grow, up, skip in zip(reversed(self.grow), reversed(self.up), reversed(skips)):
            grid = up(torch.cat([grow(grid), skip], 1))
        label = x[:, x.shape[1] - self.num_shapes :]
        return self.classifier(torch.cat([devoxelize(grid, places), label], 1))


def unet3d_s3dis(
    *, num_classes: int, width: float = 1.0, voxel: float = 1.0, in_channels: int = 9, dropout: float = 0.3
) -> UNet3D:
    return UNet3D(num_classes, in_channels, width, voxel, True, (128, DROPOUT), dropout)


def unet3d_shapenet(
    *, num_classes: int, width: float = 1.0, voxel: float = 1.0, num_shapes: int = NUM_SHAPES, dropout: float = 0.3
) -> UNet3D:
    """Build the U-Net for parts, which uses coordinates in the unit ball, normals, and the one-hot shape after them."""
    return UNet3D(num_classes, 3 + NUM_NORMALS, width, voxel, False, (128, DROPOUT), dropout, num_shapes)
