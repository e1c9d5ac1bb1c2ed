"""PointNet, PointNet++, and the blocks that all point networks use: shared MLPs, set abstraction, propagation.

PointNet (arXiv 1612.00593), PointNet++ (1706.02413), in the form of the Point-Voxel CNN models (1907.03739). A cloud is
a pair (features `[B, C, N]`, coords `[B, 3, N]`); a block takes and returns one, so that a Sequential can chain blocks.
Networks take `[B, C, N]`, coordinates first, and return `[B, num_classes, N]`. Parameter names are those of the
published checkpoints. Every hidden width is `int(width * channels)`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimray.models.points import ops

Cloud = tuple[Tensor, Tensor]
NUM_SHAPES, NUM_NORMALS = 16, 3  # ShapeNet part: one-hot shape as the last channels, normals after the coordinates
DROPOUT = "dropout"


def scaled(channels: Sequence[int], width: float) -> list[int]:
    """Return each of `channels` times `width`, truncated to an integer as in the published models, at least 1."""
    return [max(1, int(width * c)) for c in channels]


class SharedMLP(nn.Module):
    """One MLP for every point: 1x1 convolutions, each with BatchNorm and ReLU; `[B, C, *]` or a cloud in and out."""

    def __init__(self, in_channels: int, channels: Sequence[int], dim: int = 1):
        super().__init__()
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if dim == 1 else (nn.Conv2d, nn.BatchNorm2d)
        layers: list[nn.Module] = []
        for before, after in zip([in_channels, *channels], channels):
            layers += [conv(before, after, 1), norm(after), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Any) -> Any:
        return self.layers(x) if isinstance(x, Tensor) else (self.layers(x[0]), x[1])


def linear_head(in_channels: int, channels: Sequence[int | str], num_outputs: int, dropout: float) -> nn.Sequential:
    """Return Linear-BatchNorm-ReLU layers of `channels`, with dropout for each "dropout", and a last linear layer."""
    layers: list[nn.Module] = []
    for size in channels:
        if isinstance(size, str):
            layers.append(nn.Dropout(dropout))
            continue
        layers.append(nn.Sequential(nn.Linear(in_channels, size), nn.BatchNorm1d(size), nn.ReLU(inplace=True)))
        in_channels = size
    return nn.Sequential(*layers, nn.Linear(in_channels, num_outputs)) if num_outputs else nn.Sequential(*layers)


def point_head(in_channels: int, channels: Sequence[int | str], num_outputs: int, dropout: float) -> nn.Sequential:
    """Return shared MLPs of `channels`, where "dropout" stands for dropout, and a last 1x1 convolution."""
    layers: list[nn.Module] = []
    for size in channels:
        layers.append(nn.Dropout(dropout) if isinstance(size, str) else SharedMLP(in_channels, [size]))
        in_channels = in_channels if isinstance(size, str) else size
    return nn.Sequential(*layers, nn.Conv1d(in_channels, num_outputs, 1))


def head_widths(channels: Sequence[int | str], width: float) -> list[int | str]:
    """Return `scaled` channels, with "dropout" unchanged."""
    return [c if isinstance(c, str) else scaled([c], width)[0] for c in channels]


def repeat_points(cloud: Tensor, num_points: int) -> Tensor:
    """Repeat a vector per cloud, `[B, C]` or `[B, C, 1]`, for each of its points: `[B, C, N]`."""
    return cloud.reshape(*cloud.shape[:2], 1).expand(-1, -1, num_points)


# ------------------------------------------------------------------------------------------------ PointNet


class Transform(nn.Module):
    """A T-Net: a `C x C` matrix computed from the points and applied to their first C channels, at first near identity.

    Its sizes are the published ones; its place among the blocks is our choice.
    """

    def __init__(self, channels: int, width: float = 1.0):
        super().__init__()
        hidden = scaled([64, 128, 1024, 512, 256], width)
        self.features = SharedMLP(channels, hidden[:3])
        self.classifier = linear_head(hidden[2], hidden[3:], channels**2, 0.0)
        self.channels = channels

    def forward(self, cloud: Cloud) -> Cloud:
        x, coords = cloud
        matrix = self.classifier(self.features(x).amax(-1)).view(-1, self.channels, self.channels)
        return (matrix + torch.eye(self.channels, device=x.device, dtype=matrix.dtype)) @ x, coords


class PointNet(nn.Module):
    """Blocks at every point, a summary of the cloud, and a head that sees both: `[B, C, N]` -> `[B, num_classes, N]`.

    `point_features` are chained and see the first `in_channels`. The summary is their maximum over the points, followed
    by `cloud_features` if these are linear layers, or preceded by them if they are shared MLPs. The head sees the last
    `num_one_hot` input channels, the output of every block (`dense`) or of the last, and the summary.
    """

    def __init__(
        self,
        in_channels: int,
        point_features: Sequence[nn.Module],
        cloud_features: nn.Sequential | None,
        classifier: nn.Sequential,
        num_one_hot: int = 0,
        dense: bool = False,
    ):
        super().__init__()
        self.point_features = nn.ModuleList(point_features)
        if cloud_features is not None:
            self.cloud_features = cloud_features
        self.classifier = classifier
        self.in_channels, self.num_one_hot, self.dense = in_channels, num_one_hot, dense
        self.head_name = f"classifier.{len(classifier) - 1}"

    def forward(self, x: Tensor, one_hot: Tensor | None = None) -> Tensor:
        """Run the network; `one_hot` is `[B, num_one_hot]` if it is not in the last channels of `x`."""
        num_points = x.shape[-1]
        if one_hot is None:
            label = x[:, x.shape[1] - self.num_one_hot :]
        else:
            label = repeat_points(one_hot, num_points)
        features, coords, seen = x[:, : self.in_channels], x[:, :3], []
        for block in self.point_features:
            features, coords = block((features, coords))
            if not isinstance(block, Transform):
                seen.append(features)
        parts = [label, *(seen if self.dense else seen[-1:]), repeat_points(self._summary(features), num_points)]
        return self.classifier(torch.cat(parts, 1))

    def _summary(self, features: Tensor) -> Tensor:
        cloud = getattr(self, "cloud_features", None)
        if cloud is None:
            return features.amax(-1)
        if isinstance(cloud[0], SharedMLP):
            return cloud(features).amax(-1)
        return cloud(features.amax(-1))


class CloudNet(nn.Module):
    """Blocks, the maximum over the points, a head: `[B, C, N]` (and a one-hot `[B, K]`) -> `[B, num_outputs]`."""

    def __init__(self, features: Sequence[nn.Module], head: nn.Sequential, head_name: str = "classifier"):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.add_module(head_name, head)
        self.head_name = f"{head_name}.{len(head) - 1}"

    def forward(self, x: Tensor, one_hot: Tensor | None = None) -> Tensor:
        features = self.features((x, x[:, :3]))[0].amax(-1)
        features = features if one_hot is None else torch.cat([features, one_hot.to(features.dtype)], 1)
        return self.get_submodule(self.head_name.partition(".")[0])(features)


def shared_blocks(in_channels: int, channels: Sequence[int]) -> list[nn.Module]:
    """Return one SharedMLP with one layer for each of `channels`."""
    return [SharedMLP(before, [after]) for before, after in zip([in_channels, *channels], channels)]


def pointnet_s3dis(*, num_classes: int, width: float = 1.0, in_channels: int = 9, dropout: float = 0.3) -> PointNet:
    points, clouds = scaled([64, 64, 64, 128, 1024], width), scaled([256, 128], width)
    return PointNet(
        in_channels,
        shared_blocks(in_channels, points),
        linear_head(points[-1], clouds, 0, dropout),
        point_head(points[-1] + clouds[-1], head_widths([512, 256, DROPOUT], width), num_classes, dropout),
    )


def pointnet_shapenet(
    *,
    num_classes: int,
    width: float = 1.0,
    transform: bool = False,
    num_shapes: int = NUM_SHAPES,
    dropout: float = 0.2,
) -> PointNet:
    """Build PointNet for parts, which uses only coordinates and shape.

    `transform` adds T-Nets to the input and before the fourth block.
    """
    points = scaled([64, 128, 128, 512, 2048], width)
    blocks = shared_blocks(3, points)
    if transform:
        blocks = [Transform(3, width), *blocks[:3], Transform(points[2], width), *blocks[3:]]
    return PointNet(3, blocks, None, shapenet_head(points, num_classes, width, num_shapes, dropout), num_shapes, True)


def shapenet_head(
    points: Sequence[int], num_classes: int, width: float, num_shapes: int, dropout: float
) -> nn.Sequential:
    """Return the head of PointNet and PVCNN for parts; sees the shape, all blocks' outputs and the last's maximum."""
    channels = head_widths([256, DROPOUT, 256, DROPOUT, 128], width)
    return point_head(num_shapes + sum(points) + points[-1], channels, num_classes, dropout)


def pointnet_cls(*, num_classes: int, width: float = 1.0, in_channels: int = 3, dropout: float = 0.3) -> CloudNet:
    """Build PointNet without T-Nets for whole clouds."""
    points = scaled([64, 64, 64, 128, 1024], width)
    head = linear_head(points[-1], head_widths([512, 256, DROPOUT], width), num_classes, dropout)
    return CloudNet(shared_blocks(in_channels, points), head)


# ------------------------------------------------------------------------------------------------ PointNet++


class SetAbstraction(nn.Module):
    """Samples `num_centers` points and summarizes the neighbours of each by an MLP and a maximum.

    There is one ball and MLP per entry of `radii` (unscaled coordinates), `num_neighbors` and `channels`; outputs are
    concatenated. With `in_channels` 0 only the positions of neighbours are used. Clouds of N points in, `num_centers`
    out.
    """

    def __init__(
        self,
        in_channels: int,
        num_centers: int,
        radii: Sequence[float],
        num_neighbors: Sequence[int],
        channels: Sequence[Sequence[int]],
    ):
        super().__init__()
        self.in_channels, self.num_centers, self.balls = in_channels, num_centers, tuple(zip(radii, num_neighbors))
        self.mlps = nn.ModuleList(SharedMLP(in_channels + 3, widths, dim=2) for widths in channels)
        self.out_channels = sum(widths[-1] for widths in channels)

    def forward(self, cloud: Cloud) -> Cloud:
        features, coords = cloud[0] if self.in_channels else None, cloud[1]
        centers = ops.gather(coords, ops.furthest_point_sample(coords, self.num_centers))
        scales = []
        for (radius, num_neighbors), mlp in zip(self.balls, self.mlps):
            index = ops.ball_query(coords, centers, radius, num_neighbors)
            scales.append(mlp(ops.group(coords, centers, features, index)).amax(-1))
        return torch.cat(scales, 1), centers


class GlobalAbstraction(nn.Module):
    """Reduces a cloud to one point at the origin by an MLP on [features, coords] and the maximum: `[B, C', 1]`."""

    def __init__(self, in_channels: int, channels: Sequence[int]):
        super().__init__()
        self.mlps = nn.ModuleList([SharedMLP(in_channels + 3, channels)])
        self.out_channels = channels[-1]

    def forward(self, cloud: Cloud) -> Cloud:
        features, coords = cloud
        summary = self.mlps[0](torch.cat([features, coords.to(features.dtype)], 1)).amax(-1, keepdim=True)
        return summary, torch.zeros_like(coords[:, :, :1])


class FeaturePropagation(nn.Module):
    """Propagates features of centres to more points: interpolation, concatenation with the points' own, an MLP.

    Takes (points' features, points' coords, centres' features, centres' coords) and returns the points' cloud.
    """

    def __init__(self, in_channels: int, channels: Sequence[int]):
        super().__init__()
        self.mlp = SharedMLP(in_channels, channels)

    def forward(self, clouds: tuple[Tensor, Tensor, Tensor, Tensor]) -> Cloud:
        skip, coords, features, centers = clouds
        return self.mlp(torch.cat([ops.interpolate(coords, centers, features), skip], 1)), coords


class PointNet2(nn.Module):
    """Set abstraction down, propagation up, a head at every point: `[B, C, N]` -> `[B, num_classes, N]`.

    The first stage gets the channels `inputs` of `x` as features, the last propagation those of `skip`. A one-hot is
    appended to the features of the last stage. Radii are in the units of the coordinates.
    """

    def __init__(
        self,
        sa_layers: Sequence[nn.Module],
        fp_layers: Sequence[nn.Module],
        classifier: nn.Sequential,
        inputs: slice,
        skip: slice,
    ):
        super().__init__()
        self.sa_layers, self.fp_layers = nn.ModuleList(sa_layers), nn.ModuleList(fp_layers)
        self.classifier = classifier
        self.inputs, self.skip = inputs, skip
        self.head_name = f"classifier.{len(classifier) - 1}"

    def forward(self, x: Tensor, one_hot: Tensor | None = None) -> Tensor:
        features, coords = x[:, self.inputs], x[:, :3]
        levels = [(x[:, self.skip], coords)]
        for stage in self.sa_layers:
            features, coords = stage((features, coords))
            levels.append((features, coords))
        levels.pop()
        if one_hot is not None:
            features = torch.cat([features, repeat_points(one_hot.to(features.dtype), features.shape[-1])], 1)
        for stage, level in zip(self.fp_layers, reversed(levels), strict=True):
            features, coords = stage((*level, features, coords))
        return self.classifier(features)


def abstractions(in_channels: int, stages: Sequence[tuple], width: float) -> list[nn.Module]:
    """Return set abstractions for `stages`: (centres, radii, neighbours, widths per scale), or (widths,) if global."""
    layers: list[nn.Module] = []
    for stage in stages:
        if len(stage) == 1:
            layers.append(GlobalAbstraction(in_channels, scaled(stage[0], width)))
        else:
            num_centers, radii, num_neighbors, channels = stage
            channels = [scaled(c, width) for c in channels]
            layers.append(SetAbstraction(in_channels, num_centers, radii, num_neighbors, channels))
        in_channels = layers[-1].out_channels  # type: ignore[assignment]
    return layers


def propagations(
    sa_layers: Sequence[nn.Module], num_skip: int, num_one_hot: int, channels: Sequence[Sequence[int]], width: float
) -> list[nn.Module]:
    """Return feature propagations of `channels` back up the levels of `sa_layers`; the top has `num_skip` channels."""
    skips = [num_skip, *(layer.out_channels for layer in sa_layers)]  # type: ignore[misc]
    in_channels, layers = skips.pop() + num_one_hot, []
    for widths, skip in zip(channels, reversed(skips), strict=True):
        widths = scaled(widths, width)
        layers.append(FeaturePropagation(in_channels + skip, widths))  # type: ignore[operator]
        in_channels = widths[-1]
    return layers


SSG = (
    (512, (0.2,), (64,), ((64, 64, 128),)),
    (128, (0.4,), (64,), ((128, 128, 256),)),
    ((256, 512, 1024),),
)
MSG = (
    (512, (0.1, 0.2, 0.4), (32, 64, 128), ((32, 32, 64), (64, 64, 128), (64, 96, 128))),
    (128, (0.4, 0.8), (64, 128), ((128, 128, 256), (128, 196, 256))),
    ((256, 512, 1024),),
)


def _pointnetpp_shapenet(
    stages: Sequence[tuple], num_skip: int, num_classes: int, width: float, dropout: float
) -> PointNet2:
    sa_layers = abstractions(NUM_NORMALS, stages, width)
    fp_layers = propagations(sa_layers, num_skip, 0, ((256, 256), (256, 128), (128, 128, 128)), width)
    (hidden,) = scaled([128], width)
    classifier = point_head(hidden, [hidden, DROPOUT], num_classes, dropout)
    return PointNet2(sa_layers, fp_layers, classifier, slice(3, 3 + NUM_NORMALS), slice(num_skip))


def pointnetpp_ssg_shapenet(*, num_classes: int, width: float = 1.0, dropout: float = 0.5) -> PointNet2:
    """Build PointNet++ with one scale for parts, which uses coordinates and normals and ignores other channels."""
    return _pointnetpp_shapenet(SSG, 3 + NUM_NORMALS, num_classes, width, dropout)


def pointnetpp_msg_shapenet(
    *, num_classes: int, width: float = 1.0, num_shapes: int = NUM_SHAPES, dropout: float = 0.5
) -> PointNet2:
    """Build PointNet++ with several scales for parts.

    It uses coordinates, normals and, in the last propagation, the one-hot shape that follows them.
    """
    return _pointnetpp_shapenet(MSG, 3 + NUM_NORMALS + num_shapes, num_classes, width, dropout)
