"""PVCNN and PVCNN++: points carry the detail, a coarse voxel grid carries the neighbourhood.

Point-Voxel CNN for Efficient 3D Deep Learning (arXiv 1907.03739). A PVConv adds a voxel branch (average into a grid,
two 3D convolutions, interpolate back) to a point branch (a shared MLP). Networks take `[B, C, N]`, coordinates first,
and return `[B, num_classes, N]`. `width` multiplies the channels and `voxel` the grid resolutions, both truncated to
integers as in the published models; parameter names are those of the published checkpoints.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from slimray.models.points.ops import devoxelize, normalize_coords, voxelize
from slimray.models.points.pointnet import (
    DROPOUT,
    NUM_NORMALS,
    NUM_SHAPES,
    Cloud,
    CloudNet,
    FeaturePropagation,
    PointNet,
    PointNet2,
    SetAbstraction,
    SharedMLP,
    head_widths,
    linear_head,
    point_head,
    scaled,
    shapenet_head,
)

Block = tuple[int, int, int | None]  # channels, repeats, grid resolution or None for a SharedMLP


class SE3d(nn.Module):
    """Squeeze and excitation over a dense grid, including empty voxels: `[B, C, R, R, R]` (arXiv 1709.01507)."""

    def __init__(self, channels: int, reduction: int = 8):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, grid: Tensor) -> Tensor:
        return grid * self.fc(grid.mean((2, 3, 4)))[:, :, None, None, None]


class PVConv(nn.Module):
    """A voxel branch at `resolution` plus a point branch: a cloud of `in_channels` in, of `out_channels` out.

    The grid is fitted to the raw coordinates (`normalize_coords`), which are returned unchanged.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resolution: int,
        with_se: bool = False,
        normalize: bool = True,
        eps: float = 0.0,
    ):
        super().__init__()
        self.resolution, self.normalize, self.eps = resolution, normalize, eps
        layers: list[nn.Module] = []
        for before in (in_channels, out_channels):
            norm = nn.BatchNorm3d(out_channels, eps=1e-4)
            layers += [nn.Conv3d(before, out_channels, 3, padding=1), norm, nn.LeakyReLU(0.1, inplace=True)]
        if with_se:
            layers.append(SE3d(out_channels))
        self.voxel_layers = nn.Sequential(*layers)
        self.point_features = SharedMLP(in_channels, [out_channels])

    def forward(self, cloud: Cloud) -> Cloud:
        voxel, point = self.branches(cloud)
        return point + voxel, cloud[1]

    def branches(self, cloud: Cloud) -> tuple[Tensor, Tensor]:
        """Return the outputs of voxel and point branch, both `[B, out_channels, N]`; their sum is the output."""
        features, coords = cloud
        places = normalize_coords(coords, self.resolution, self.normalize, self.eps)
        grid = voxelize(features, places, self.resolution)
        if not grid.is_cuda:  # channels-last saves a fifth of a step on a GPU, but makes CPU BatchNorm err by 1e-4
            grid = grid.contiguous()
        return devoxelize(self.voxel_layers(grid), places), self.point_features(features)


def point_voxel_blocks(
    in_channels: int,
    blocks: Sequence[Block],
    width: float,
    voxel: float,
    with_se: bool = False,
    normalize: bool = True,
    eps: float = 0.0,
) -> tuple[list[nn.Module], list[int]]:
    """Return the modules of `blocks`, and the output channels of each."""
    layers: list[nn.Module] = []
    channels: list[int] = []
    for base, repeats, resolution in blocks:
        (out,) = scaled([base], width)
        for _ in range(repeats):
            if resolution is None:
                layers.append(SharedMLP(in_channels, [out]))
            else:
                grid = max(1, int(voxel * resolution))
                layers.append(PVConv(in_channels, out, grid, with_se, normalize, eps))
            channels.append(out)
            in_channels = out
    return layers, channels


def pvcnn_s3dis(
    *, num_classes: int, width: float = 1.0, voxel: float = 1.0, in_channels: int = 9, dropout: float = 0.3
) -> PointNet:
    """Build PVCNN for scenes; its head sees the output of every block and a summary of the cloud."""
    blocks: list[Block] = [(64, 1, 32), (64, 2, 16), (128, 1, 16), (1024, 1, None)]
    layers, channels = point_voxel_blocks(in_channels, blocks, width, voxel)
    clouds = scaled([256, 128], width)
    head = point_head(
        sum(channels) + clouds[-1], head_widths([512, DROPOUT, 256, DROPOUT], width), num_classes, dropout
    )
    return PointNet(in_channels, layers, linear_head(channels[-1], clouds, 0, dropout), head, dense=True)


def pvcnn_shapenet(
    *, num_classes: int, width: float = 1.0, voxel: float = 1.0, num_shapes: int = NUM_SHAPES, dropout: float = 0.2
) -> PointNet:
    """Build PVCNN for parts, which uses coordinates in the unit ball, normals, and the one-hot shape after them."""
    blocks: list[Block] = [(64, 1, 32), (128, 2, 16), (512, 1, None), (2048, 1, None)]
    in_channels = 3 + NUM_NORMALS
    layers, channels = point_voxel_blocks(in_channels, blocks, width, voxel, with_se=True, normalize=False)
    head = shapenet_head(channels, num_classes, width, num_shapes, dropout)
    return PointNet(in_channels, layers, None, head, num_shapes, dense=True)


def pvcnn_cls(
    *, num_classes: int, width: float = 1.0, voxel: float = 1.0, in_channels: int = 3, dropout: float = 0.3
) -> CloudNet:
    """Build PVCNN for whole clouds, our own definition: the blocks of the S3DIS network with the head of PointNet."""
    blocks: list[Block] = [(64, 1, 32), (64, 2, 16), (128, 1, 16), (1024, 1, None)]
    layers, channels = point_voxel_blocks(in_channels, blocks, width, voxel)
    head = linear_head(channels[-1], head_widths([512, 256, DROPOUT], width), num_classes, dropout)
    return CloudNet(layers, head)


# PVCNN++: (blocks, centres, radius, neighbours, widths) down and (widths, blocks) up
SA_STAGES: tuple[tuple[list[Block], int, float, int, tuple[int, ...]], ...] = (
    ([(32, 2, 32)], 1024, 0.1, 32, (32, 64)),
    ([(64, 3, 16)], 256, 0.2, 32, (64, 128)),
    ([(128, 3, 8)], 64, 0.4, 32, (128, 256)),
    ([], 16, 0.8, 32, (256, 256, 512)),
)
FP_STAGES: tuple[tuple[tuple[int, ...], list[Block]], ...] = (
    ((256, 256), [(256, 1, 8)]),
    ((256, 256), [(256, 1, 8)]),
    ((256, 128), [(128, 2, 16)]),
    ((128, 128, 64), [(64, 1, 32)]),
)


def pvcnnpp_s3dis(
    *, num_classes: int, width: float = 1.0, voxel: float = 1.0, in_channels: int = 9, dropout: float = 0.5
) -> PointNet2:
    """Build PVCNN++: PointNet++ with PVConvs before each sampling and after each propagation."""
    channels, sa_layers, skips = in_channels, [], [in_channels - 3]
    for blocks, num_centers, radius, num_neighbors, widths in SA_STAGES:
        layers, out = point_voxel_blocks(channels, blocks, width, voxel, with_se=True)
        widths = scaled(widths, width)
        layers.append(SetAbstraction(out[-1] if out else channels, num_centers, [radius], [num_neighbors], [widths]))
        sa_layers.append(layers[0] if len(layers) == 1 else nn.Sequential(*layers))
        channels = widths[-1]
        skips.append(channels)
    fp_layers, channels = [], skips.pop()
    for widths, blocks in FP_STAGES:
        widths = scaled(widths, width)
        layers, out = point_voxel_blocks(widths[-1], blocks, width, voxel, with_se=True)
        fp_layers.append(nn.Sequential(FeaturePropagation(channels + skips.pop(), widths), *layers))
        channels = out[-1]
    classifier = point_head(channels, head_widths([128, DROPOUT], width), num_classes, dropout)
    return PointNet2(sa_layers, fp_layers, classifier, slice(0, in_channels), slice(3, in_channels))
