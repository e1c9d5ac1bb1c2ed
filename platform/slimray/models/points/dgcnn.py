"""DGCNN: convolutions over a graph of nearest neighbours that is rebuilt from the features of every layer.

Dynamic Graph CNN for Learning on Point Clouds (arXiv 1801.07829), in the form and with the sizes of
antao97/dgcnn.pytorch. Takes `[B, C, N]`, coordinates first, and returns `[B, num_classes, N]`. Neighbours are searched
in float32; parameter names are our own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimray.models.points.ops import gather, knn
from slimray.models.points.pointnet import NUM_SHAPES, repeat_points, scaled


def _conv(in_channels: int, channels: Sequence[int], dim: int = 1) -> nn.Sequential:
    """Return 1x1 convolutions without bias, each with BatchNorm and LeakyReLU(0.2)."""
    conv, norm = (nn.Conv1d, nn.BatchNorm1d) if dim == 1 else (nn.Conv2d, nn.BatchNorm2d)
    layers: list[nn.Module] = []
    for before, after in zip([in_channels, *channels], channels):
        layers += [conv(before, after, 1, bias=False), norm(after), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers)


class EdgeConv(nn.Module):
    """The maximum over `k` neighbours of an MLP on [neighbour - point, point]: `[B, C, N]` -> `[B, C', N]`.

    Neighbours are the nearest by `places` `[B, D, N]`, by default the features; a point is a neighbour of itself.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], k: int):
        super().__init__()
        self.k, self.mlp = k, _conv(2 * in_channels, channels, dim=2)

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        places = x if places is None else places
        near, own = gather(x, knn(places, places, self.k)), x[..., None].expand(-1, -1, -1, self.k)
        return self.mlp(torch.cat([near - own, own], 1)).amax(-1)


class EdgeTransform(nn.Module):
    """A T-Net on edges: a 3x3 matrix computed from the points `[B, 3, N]` and applied to them; initially identity."""

    def __init__(self, k: int, width: float):
        super().__init__()
        edge, inner, points, hidden, last = scaled([64, 128, 1024, 512, 256], width)
        self.edges = EdgeConv(3, [edge, inner], k)
        self.points = _conv(inner, [points])
        layers: list[nn.Module] = []
        for before, after in ((points, hidden), (hidden, last)):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.LeakyReLU(0.2, inplace=True)]
        self.matrix = nn.Sequential(*layers, nn.Linear(last, 9))
        final: nn.Linear = self.matrix[-1]  # type: ignore[assignment]
        nn.init.zeros_(final.weight)
        with torch.no_grad():
            final.bias.copy_(torch.eye(3).flatten())

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix(self.points(self.edges(x)).amax(-1)).view(-1, 3, 3)
        return matrix.transpose(1, 2) @ x.to(matrix.dtype)


class DGCNN(nn.Module):
    """Three EdgeConvs, a summary of the cloud, a head that sees all: `[B, C, N]` -> `[B, num_classes, N]`.

    The first graph is built from the channels `graph` of the input. With `num_shapes`, the last channels are a one-hot
    shape. `head` lists the widths of the hidden layers, each with a flag for dropout after it.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        graph: slice,
        head: Sequence[tuple[int, bool]],
        k: int,
        width: float,
        dropout: float,
        num_shapes: int = 0,
        transform: bool = False,
    ):
        super().__init__()
        self.in_channels, self.graph, self.num_shapes = in_channels, graph, num_shapes
        edge, label, points = scaled([64, 64, 1024], width)
        self.transform = EdgeTransform(k, width) if transform else None
        self.edge_convs = nn.ModuleList(
            [EdgeConv(in_channels, [edge, edge], k), EdgeConv(edge, [edge, edge], k), EdgeConv(edge, [edge], k)]
        )
        self.points = _conv(3 * edge, [points])
        self.label = _conv(num_shapes, [label]) if num_shapes else None
        channels, layers = points + 3 * edge + (label if num_shapes else 0), []
        for base, drops in head:
            (size,) = scaled([base], width)
            layers += [_conv(channels, [size]), *([nn.Dropout(dropout)] if drops else [])]
            channels = size
        self.classifier = nn.Sequential(*layers, nn.Conv1d(channels, num_classes, 1, bias=False))
        self.head_name = f"classifier.{len(layers)}"

    def forward(self, x: Tensor) -> Tensor:
        num_points, seen = x.shape[-1], []
        features, places = x[:, : self.in_channels], x[:, self.graph]
        if self.transform is not None:
            features = places = self.transform(features)
        for conv in self.edge_convs:
            features = conv(features, places)
            places = features
            seen.append(features)
        cloud = self.points(torch.cat(seen, 1)).amax(-1)
        parts = [repeat_points(cloud, num_points)]
        if self.label is not None:
            label = self.label(x[:, -self.num_shapes :, :1])
            parts.append(repeat_points(label, num_points))
        return self.classifier(torch.cat([*parts, *seen], 1))


def dgcnn_s3dis(
    *, num_classes: int, width: float = 1.0, in_channels: int = 9, k: int = 20, dropout: float = 0.5
) -> DGCNN:
    """Build DGCNN for scenes; the first graph uses channels 6 to 8 (place in the room) of 9, else the coordinates."""
    graph = slice(6, 9) if in_channels == 9 else slice(0, 3)
    return DGCNN(num_classes, in_channels, graph, [(512, False), (256, True)], k, width, dropout)


def dgcnn_shapenet(
    *, num_classes: int, width: float = 1.0, k: int = 40, num_shapes: int = NUM_SHAPES, dropout: float = 0.5
) -> DGCNN:
    """Build DGCNN for parts, which uses only coordinates and shape."""
    head = [(256, True), (256, True), (128, False)]
    return DGCNN(num_classes, 3, slice(0, 3), head, k, width, dropout, num_shapes, transform=True)
