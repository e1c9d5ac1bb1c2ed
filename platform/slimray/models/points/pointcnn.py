"""PointCNN: a learned K x K matrix reorders the neighbours of a point, which are then convolved.

PointCNN: Convolution On X-Transformed Points (arXiv 1801.07791), ShapeNet part form, written in torch from its
description; weights of the original, in TensorFlow, cannot be loaded. Takes `[B, C, N]`, coordinates first, then
normals, and returns `[B, num_classes, N]`. The decoder repeats the encoder's (K, D), as the published configuration was
not available.
"""

import math

import torch
from torch import Tensor, nn

from slimray.models.points.ops import furthest_point_sample, gather, knn
from slimray.models.points.pointnet import NUM_NORMALS, Cloud, scaled

ENCODER = ((8, 1, None, 256), (12, 2, 768, 256), (16, 2, 384, 512), (16, 6, 128, 1024))  # K, D, points, channels
DECODER = ((16, 6, 3, 3), (16, 6, 3, 2), (12, 2, 2, 1), (8, 2, 1, 0), (8, 1, 0, 0))  # K, D, from level, to level
GLOBAL_SHARE = 4  # the last layer adds a quarter of its channels, computed from the coordinates of the points


def _dense(in_channels: int, out_channels: int, dim: int = 2, kernel: int = 1, activate: bool = True) -> nn.Sequential:
    """Return a convolution without bias (over `kernel` neighbours), then ELU, then BatchNorm."""
    if dim == 1:
        conv, norm = nn.Conv1d(in_channels, out_channels, 1, bias=False), nn.BatchNorm1d(out_channels)
    else:
        conv = nn.Conv2d(in_channels, out_channels, (1, kernel), bias=False)
        norm = nn.BatchNorm2d(out_channels)
    return nn.Sequential(conv, nn.ELU() if activate else nn.Identity(), norm)


class XConv(nn.Module):
    """Computes features of queries from every `dilation`-th of their k * dilation nearest points.

    `in_channels` are those of the points' features, 0 for none; `delta` channels are lifted from local coordinates.
    """

    def __init__(
        self, in_channels: int, out_channels: int, k: int, dilation: int, delta: int, depth: int, summary: int
    ):
        super().__init__()
        self.k, self.dilation, self.in_channels = k, dilation, in_channels
        self.lift = nn.Sequential(_dense(3, delta), _dense(delta, delta))
        self.transform = nn.ModuleList([_dense(3, k * k, kernel=k)])
        for activate in (True, False):  # per row of the matrix: one channel in, K out
            conv = nn.Conv2d(k, k * k, (1, k), groups=k, bias=False)
            layers = nn.Sequential(conv, nn.ELU() if activate else nn.Identity(), nn.BatchNorm2d(k * k))
            self.transform.append(layers)
        channels = delta + in_channels
        self.filter = nn.Sequential(
            nn.Conv2d(channels, channels * depth, (1, k), groups=channels, bias=False),
            _dense(channels * depth, out_channels),
        )
        self.summary = nn.Sequential(_dense(3, summary, 1), _dense(summary, summary, 1)) if summary else None
        self.out_channels = out_channels + summary

    def forward(self, cloud: Cloud, queries: Tensor) -> Tensor:
        """Return `[B, out_channels, M]` for points (features `[B, in_channels, N]`, coords) and queries `[B, 3, M]`."""
        features, coords = cloud
        index = knn(coords, queries, self.k * self.dilation)[:, :, :: self.dilation]
        local = gather(coords, index) - queries[..., None]  # [B, 3, M, K]
        near = self.lift(local)
        if self.in_channels:
            near = torch.cat([near, gather(features, index).to(near.dtype)], 1)
        matrix = self.transform[0](local)  # [B, K * K, M, 1]
        for layer in list(self.transform)[1:]:
            matrix = layer(matrix.squeeze(-1).unflatten(1, (self.k, self.k)).transpose(2, 3))
        matrix = matrix.squeeze(-1).unflatten(1, (self.k, self.k)).permute(0, 3, 1, 2)  # [B, M, K, K]
        ordered = (matrix @ near.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [B, C, M, K]
        out = self.filter(ordered).squeeze(-1)
        return out if self.summary is None else torch.cat([out, self.summary(queries)], 1)


class PointCNN(nn.Module):
    """X-convolutions on fewer and fewer points and back, and a head: `[B, C, N]` -> `[B, num_classes, N]`."""

    def __init__(self, num_classes: int, width: float, num_features: int, dropout: float):
        super().__init__()
        self.num_features = num_features
        channels = scaled([c for *_, c in ENCODER], width)
        self.encoder, before, skips = nn.ModuleList(), num_features, []
        for level, ((k, dilation, _, _), out) in enumerate(zip(ENCODER, channels)):
            if level == 0:
                delta, depth = max(1, out // (4 if num_features else 2)), 4
            else:
                delta, depth = max(1, channels[level - 1] // 4), math.ceil(out / channels[level - 1])
            summary = max(1, out // GLOBAL_SHARE) if level == len(ENCODER) - 1 else 0
            layer = XConv(before, out, k, dilation, delta, depth, summary)
            self.encoder.append(layer)
            before = layer.out_channels
            skips.append(before)
        self.decoder, self.merge = nn.ModuleList(), nn.ModuleList()
        for k, dilation, source, target in DECODER:
            out, delta = channels[target], max(1, channels[source] // 4)
            self.decoder.append(XConv(before, out, k, dilation, delta, 1, 0))
            self.merge.append(_dense(out + skips[target], out, 1))
            before = out
        (hidden,) = scaled([256], width)
        self.classifier = nn.Sequential(
            _dense(before, hidden, 1), _dense(hidden, hidden, 1), nn.Dropout(dropout), nn.Conv1d(hidden, num_classes, 1)
        )
        self.head_name = "classifier.3"

    def forward(self, x: Tensor) -> Tensor:
        coords, features = x[:, :3], x[:, 3 : 3 + self.num_features]
        levels: list[Cloud] = []
        for layer, (_, _, num_points, _) in zip(self.encoder, ENCODER):
            queries = coords
            if num_points is not None and num_points < coords.shape[2]:
                queries = gather(coords, furthest_point_sample(coords, num_points))
            features, coords = layer((features, coords), queries), queries
            levels.append((features, coords))
        for layer, merge, (_, _, _, target) in zip(self.decoder, self.merge, DECODER):
            skip, queries = levels[target]
            features = merge(torch.cat([layer((features, coords), queries), skip], 1))
            coords = queries
        return self.classifier(features)


def pointcnn_shapenet(*, num_classes: int, width: float = 1.0, dropout: float = 0.5) -> PointCNN:
    """Build PointCNN for parts, which uses coordinates and normals and ignores the channels after them."""
    return PointCNN(num_classes, width, NUM_NORMALS, dropout)
