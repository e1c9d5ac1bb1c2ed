"""A Once-for-All supernet over PVCNN: one network for point clouds that contains millions of smaller PVCNNs as slices.

Our own design: the training of Once-for-All (arXiv 1908.09791) over the blocks of Point-Voxel CNN (1907.03739). Elastic
are the number of blocks of a stage (`depth`), the channels of a block (`width`, a fraction of its widest), the grid of
a stage (`voxel`, a fraction of its finest) and the layers after the blocks (`head`). Networks take `[B, C, N]`,
coordinates first; `extract` returns an ordinary PVCNN. Surprising: the head sees the concatenated outputs of all
blocks, so it is sliced per block. The subnets share running statistics that are right for none of them, least of all
for another `voxel` (a coarser grid has fewer empty voxels, over which BatchNorm and SE also average): apply
`recalibrate_norms` to an extracted network, even the largest, before evaluating it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimray.arch import Arch, Dimension, Gene, Space, Stage
from slimray.models.points.ops import devoxelize, normalize_coords, voxelize
from slimray.models.points.pointnet import (
    DROPOUT,
    CloudNet,
    PointNet,
    SharedMLP,
    head_widths,
    linear_head,
    point_head,
    repeat_points,
    scaled,
)
from slimray.models.points.pvcnn import PVConv, SE3d
from slimray.models.supernets.elastic import ChannelGroup, Spans, Unit, sliced_conv, sliced_linear, sliced_norm, take
from slimray.spec import lookup

WIDTHS = HEADS = (0.25, 0.5, 0.75, 1.0)
VOXELS = (0.5, 0.75, 1.0)

Sizes = Sequence[int | str]  # widths of layers, "dropout" for dropout


@dataclass(frozen=True)
class Layout:
    """A supernet at its widest. A stage is (channels, minimum and maximum blocks, grid or None for SharedMLPs).

    `clouds` are the linear layers after the maximum over the points, `point_head` and `cloud_head` the hidden layers of
    the head for points or for whole clouds.
    """

    stages: tuple[tuple[int, int, int, int | None], ...]
    clouds: tuple[int, ...]
    point_head: tuple[int | str, ...]
    cloud_head: tuple[int | str, ...]
    with_se: bool = False
    normalize: bool = True

    def scaled(self, width: float, voxel: float) -> "Layout":
        """Return the layout with `width` times the channels and `voxel` times the grids, as in the other PVCNNs."""
        return replace(
            self,
            stages=tuple((_part(c, width), few, most, g and _part(g, voxel)) for c, few, most, g in self.stages),
            clouds=tuple(scaled(self.clouds, width)),
            point_head=tuple(head_widths(self.point_head, width)),
            cloud_head=tuple(head_widths(self.cloud_head, width)),
        )


# `scenes` and `parts` contain the published PVCNNs for S3DIS (depth 1, 2, 1, 1) and ShapeNet (the same depth); `tiny`
# trains in minutes on a laptop.
PRESETS: dict[str, Layout] = {
    "tiny": Layout(
        stages=((16, 1, 1, 16), (16, 1, 2, 8), (32, 1, 2, 8), (128, 1, 1, None)),
        clouds=(32,),
        point_head=(64, DROPOUT, 32, DROPOUT),
        cloud_head=(64, 32, DROPOUT),
    ),
    "scenes": Layout(
        stages=((64, 1, 1, 32), (64, 1, 3, 16), (128, 1, 2, 16), (1024, 1, 1, None)),
        clouds=(256, 128),
        point_head=(512, DROPOUT, 256, DROPOUT),
        cloud_head=(512, 256, DROPOUT),
    ),
    "parts": Layout(
        stages=((64, 1, 1, 32), (128, 1, 3, 16), (512, 1, 1, None), (2048, 1, 1, None)),
        clouds=(),
        point_head=(256, DROPOUT, 256, DROPOUT, 128),
        cloud_head=(512, 256, DROPOUT),
        with_se=True,
        normalize=False,
    ),
}


def ofa_pvcnn(
    *,
    num_classes: int,
    preset: str = "scenes",
    width: float = 1.0,
    voxel: float = 1.0,
    in_channels: int = 9,
    num_shapes: int = 0,
    dropout: float = 0.3,
) -> "OfaPVCNN":
    """Build a supernet that labels points: `[B, in_channels + num_shapes, N]` -> `[B, num_classes, N]`.

    `preset` is one of PRESETS (tiny, scenes, parts); `width` and `voxel` scale all of it. Only the head sees the last
    `num_shapes` channels, a one-hot shape. Raises UserError for an unknown preset.
    """
    layout = lookup(PRESETS, preset, "preset").scaled(width, voxel)
    return OfaPVCNN(layout, num_classes, in_channels, dropout, dense=True, num_shapes=num_shapes)


def ofa_pvcnn_cls(
    *,
    num_classes: int,
    preset: str = "scenes",
    width: float = 1.0,
    voxel: float = 1.0,
    in_channels: int = 3,
    dropout: float = 0.3,
) -> "OfaPVCNN":
    """Build a supernet that labels whole clouds: `[B, in_channels, N]` -> `[B, num_classes]`; see `ofa_pvcnn`."""
    layout = lookup(PRESETS, preset, "preset").scaled(width, voxel)
    return OfaPVCNN(layout, num_classes, in_channels, dropout, dense=False)


# ------------------------------------------------------------------------------------------------ the supernet


@dataclass(frozen=True)
class _Block:
    """A block that runs: its index among all blocks, its channels, its grid or None for a SharedMLP."""

    place: int
    in_channels: int
    out_channels: int
    grid: int | None


@dataclass(frozen=True)
class _Plan:
    """An arch in channels: the blocks that run, the layers after the maximum, those of the head."""

    blocks: tuple[_Block, ...]
    clouds: list[int]
    head: list[int | str]

    @property
    def summary(self) -> int:
        """Number of channels of the summary of the cloud."""
        return self.clouds[-1] if self.clouds else self.blocks[-1].out_channels


class OfaPVCNN(nn.Module):
    """The supernet: `net(x, arch)` runs a subnet, `net(x)` the largest, `net.extract(arch)` copies one out.

    `dense` networks label points, with a head over all blocks and a one-hot of `num_shapes`; others label whole clouds.
    The parameters are those of the largest subnet. No active subnet is stored.
    """

    def __init__(
        self, layout: Layout, num_classes: int, in_channels: int, dropout: float, dense: bool, num_shapes: int = 0
    ):
        super().__init__()
        self.layout, self.dense, self.num_shapes = layout, dense, num_shapes
        self.num_classes, self.in_channels, self.dropout = num_classes, in_channels, dropout
        self.head_sizes: Sizes = layout.point_head if dense else layout.cloud_head
        self.cloud_sizes: Sequence[int] = layout.clouds if dense else ()
        most = [most for _, _, most, _ in layout.stages]
        self.channels = [c for c, _, most, _ in layout.stages for _ in range(most)]  # of each block at its widest
        self.space = Space.of(
            {
                "depth": Dimension.depth(
                    [range(few, most + 1) for _, few, most, _ in layout.stages], [Stage(count) for count in most]
                ),
                "width": Dimension.per_block([_distinct(WIDTHS, [c]) for c in self.channels]),
                "voxel": Dimension.per_stage([_distinct(VOXELS, [grid]) for *_, grid in layout.stages if grid]),
                "head": Dimension.per_stage([_distinct(HEADS, [*self.cloud_sizes, *self.head_sizes])]),
            }
        )
        widest = self._build(self._plan(self.space.largest()))
        self.point_features = _blocks_of(widest)
        if self.cloud_sizes:
            self.cloud_features = cast(nn.Sequential, widest.cloud_features)
        self.classifier = cast(nn.Sequential, widest.classifier)
        self.head_name = f"classifier.{len(self.classifier) - 1}"

    def forward(self, x: Tensor, arch: Arch | None = None) -> Tensor:
        """Run the subnet `arch`; raise UserError if it is not in `space`, ValueError for a wrong number of channels."""
        given, wanted = x.shape[1], self.in_channels + self.num_shapes
        if given < wanted or (given > wanted and not self.dense):  # slicing would silently accept fewer
            raise ValueError(f"the network takes clouds of {wanted} channels (got {given})")
        plan = self._plan(self.space.largest() if arch is None else arch)
        features, coords, seen = x[:, : self.in_channels], x[:, :3], []
        for block in plan.blocks:
            module = self.point_features[block.place]
            if block.grid is None:
                features = _layer(module, features, block.out_channels)
            else:
                features = _point_voxel(cast(PVConv, module), features, coords, block.out_channels, block.grid)
            seen.append(features)
        summary = features.amax(-1)
        if not self.dense:
            return sliced_linear(self.classifier[-1], _layers(self.classifier, summary, plan.head))
        if plan.clouds:
            summary = _layers(self.cloud_features, summary, plan.clouds)
        joined = torch.cat([x[:, given - self.num_shapes :], *seen, repeat_points(summary, x.shape[-1])], 1)
        return sliced_conv(self.classifier[-1], _layers(self.classifier, joined, plan.head, self._spans(plan)))

    def extract(self, arch: Arch) -> PointNet | CloudNet:
        """Return the subnet `arch` as an ordinary PVCNN with copies of its weights, in the mode of this one."""
        plan = self._plan(arch)
        with torch.device("meta"):
            plain = self._build(plan)
        for block, module in zip(plan.blocks, _blocks_of(plain), strict=True):
            take(module, self.point_features[block.place])
        if plan.clouds:
            take(cast(nn.Module, plain.cloud_features), self.cloud_features)
        head = cast(nn.Sequential, plain.classifier)
        take(head, self.classifier)
        if self.dense:
            take(_three(head[0])[0], _three(self.classifier[0])[0], self._spans(plan))  # spans, not the first columns
        return plain.train(self.training)

    def latency_features(self, arch: Arch) -> list[float]:
        """Return the features from which a predictor learns the latency of `arch`."""
        return self.space.encode(arch)

    def measured(self, arch: Arch, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
        """Return the module to time for the subnet `arch`, whose first unit takes `shape`, and its input shape."""
        return self.extract(arch), (self.in_channels + self.num_shapes, shape[-1])

    def units(self, arch: Arch, num_points: int) -> list[Unit]:
        """Return the pieces of the subnet `arch` in order of execution on clouds of `num_points`, with the head last.

        A block with a grid takes `[3 + C, N]`, coordinates and features; the coordinates should be spread out, because
        its time depends on them. No unit includes the maximum over the points of networks without `clouds`.
        """
        plan, points, out = self._plan(arch), f"points:{num_points}", []
        for block in plan.blocks:
            shape = f"{points}-in:{block.in_channels}-out:{block.out_channels}"
            if block.grid is None:
                make = partial(SharedMLP, block.in_channels, [block.out_channels])
                out.append(Unit(f"mlp-{shape}", (block.in_channels, num_points), make))
                continue
            kind = self.layout.with_se, self.layout.normalize
            key = f"pvconv-{shape}-voxel:{block.grid}-se:{kind[0]:d}-normalize:{kind[1]:d}"
            make = partial(_VoxelUnit, block.in_channels, block.out_channels, block.grid, *kind)
            out.append(Unit(key, (3 + block.in_channels, num_points), make))
        last, outputs = plan.blocks[-1].out_channels, 0 if self.dense else self.num_classes
        layers = plan.clouds if self.dense else plan.head
        if layers or outputs:
            key = f"summary-{points}-in:{last}-layers:{_listed(layers, outputs)}"
            out.append(Unit(key, (last, num_points), partial(_SummaryUnit, last, layers, outputs)))
        if self.dense:
            inputs = sum(count for _, count in self._spans(plan))
            key = f"head-{points}-in:{inputs}-layers:{_listed(plan.head, self.num_classes)}"
            out.append(Unit(key, (inputs, num_points), partial(_HeadUnit, inputs, plan.head, self.num_classes)))
        return out

    def channel_groups(self) -> list[ChannelGroup]:
        """Return the channels that `elastic.sort_channels` may reorder without changing full-width subnets.

        All blocks that can be the last of their stage share an order, because the same weights consume their outputs.
        """
        groups, start, last = [], 0, len(self.layout.stages) - 1
        head, starts = _three(self.classifier[0])[0], self._starts()
        summary: Any = (head, starts[-1]) if self.dense else head  # the consumer of the summary of the cloud
        for number, (channels, few, most, _) in enumerate(self.layout.stages):
            end, sizes = start + most, {width: _part(channels, width) for width in WIDTHS}
            if number < last:
                users: list[Any] = _inputs(self.point_features[end])
            else:
                users = [_three(self.cloud_features[0])[0]] if self.cloud_sizes else [summary]
            for tied in [*([i] for i in range(start, start + few - 1)), range(start + few - 1, end)]:
                blocks = [self.point_features[i] for i in tied]
                judges = [user for i in tied if i + 1 < end for user in _inputs(self.point_features[i + 1])]
                judges += users if end - 1 in tied else []
                judges += [(head, starts[i]) for i in tied] if self.dense else []
                squeezes = [_squeeze(block)[0] for block in blocks if _squeeze(block)]
                makers = [module for block in blocks for module in _outputs(block)]
                groups.append(_group("width", sizes, makers, judges + squeezes, judges))
            for block in self.point_features[start:end]:
                groups += _inner_groups(block, sizes)
            start = end
        if self.cloud_sizes:
            groups += _layer_groups(self.cloud_features, self.cloud_sizes, summary)
        return groups + _layer_groups(self.classifier, self.head_sizes, self.classifier[-1])

    def _plan(self, arch: Arch) -> _Plan:
        """Return an arch in channels; raise UserError for one that is not in `space`."""
        arch = self.space.arch(arch)
        voxels, place, channels, blocks = iter(arch["voxel"]), 0, self.in_channels, []
        for (base, _, most, finest), depth in zip(self.layout.stages, arch["depth"], strict=True):
            grid = finest and _part(finest, next(voxels))
            for i in range(place, place + depth):
                blocks.append(_Block(i, channels, _part(base, arch["width"][i]), grid))
                channels = blocks[-1].out_channels
            place += most
        (head,) = arch["head"]
        return _Plan(tuple(blocks), scaled(self.cloud_sizes, head), head_widths(self.head_sizes, head))

    def _block(self, block: _Block) -> nn.Module:
        if block.grid is None:
            return SharedMLP(block.in_channels, [block.out_channels])
        layout = self.layout
        return PVConv(block.in_channels, block.out_channels, block.grid, layout.with_se, layout.normalize)

    def _build(self, plan: _Plan) -> PointNet | CloudNet:
        """Build the ordinary PVCNN of a plan, with initial weights."""
        blocks, last = [self._block(block) for block in plan.blocks], plan.blocks[-1].out_channels
        if not self.dense:
            return CloudNet(blocks, linear_head(last, plan.head, self.num_classes, self.dropout))
        clouds = linear_head(last, plan.clouds, 0, self.dropout) if plan.clouds else None
        inputs = self.num_shapes + sum(block.out_channels for block in plan.blocks) + plan.summary
        head = point_head(inputs, plan.head, self.num_classes, self.dropout)
        return PointNet(self.in_channels, blocks, clouds, head, self.num_shapes, dense=True)

    def _starts(self) -> list[int]:
        """Return the first input channel of each block's output in the widest head, and last that of the summary."""
        return [self.num_shapes + sum(self.channels[:i]) for i in range(len(self.channels) + 1)]

    def _spans(self, plan: _Plan) -> Spans:
        """Return the input channels of the widest head that a subnet's head uses: the first ones of each part."""
        starts = self._starts()
        parts = [(starts[block.place], block.out_channels) for block in plan.blocks]
        return [(0, self.num_shapes), *parts, (starts[-1], plan.summary)]


def _part(size: int, ratio: float) -> int:
    (part,) = scaled([size], ratio)
    return part


def _distinct(ratios: Sequence[Gene], sizes: Sizes) -> list[Gene]:
    """Return the ascending `ratios` that give different numbers of channels: a narrow network has fewer subnets."""
    return list({tuple(head_widths(sizes, ratio)): ratio for ratio in ratios}.values())


def _blocks_of(net: PointNet | CloudNet) -> nn.ModuleList:
    return net.point_features if isinstance(net, PointNet) else nn.ModuleList(net.features)


# ------------------------------------------------------------------------------------------------ on first channels


def _three(layer: nn.Module) -> list[Any]:
    """Return the convolution or linear layer, BatchNorm and ReLU of a one-layer SharedMLP or of a layer of a head."""
    return list(layer.layers.children() if isinstance(layer, SharedMLP) else layer.children())


def _layer(module: nn.Module, x: Tensor, size: int, spans: Spans | None = None) -> Tensor:
    """Run such a layer on its first channels."""
    weighing, norm, activation = _three(module)
    run = sliced_linear if isinstance(weighing, nn.Linear) else sliced_conv
    return activation(sliced_norm(norm, run(weighing, x, size, spans)))


def _layers(modules: nn.Sequential, x: Tensor, sizes: Sizes, spans: Spans | None = None) -> Tensor:
    """Run one layer or dropout for each of `sizes`; `spans` applies to the first."""
    for module, size in zip(modules, sizes, strict=False):
        x = module(x) if isinstance(size, str) else _layer(module, x, size, spans)
        spans = None
    return x


def _point_voxel(block: PVConv, features: Tensor, coords: Tensor, channels: int, resolution: int) -> Tensor:
    """Run `block` on its first channels, with a grid of another resolution."""
    places = normalize_coords(coords, resolution, block.normalize, block.eps)
    grid = voxelize(features, places, resolution).contiguous()  # as in PVConv
    layers = list(block.voxel_layers)
    for conv, norm, activation in (layers[:3], layers[3:6]):
        grid = activation(sliced_norm(norm, sliced_conv(conv, grid, channels)))
    if squeeze := _squeeze(block):
        middle = sliced_linear(squeeze[0], grid.mean((2, 3, 4)), _squeezed(channels)).relu()
        grid = grid * sliced_linear(squeeze[1], middle, channels).sigmoid()[:, :, None, None, None]
    return _layer(block.point_features, features, channels) + devoxelize(grid, places)


def _squeezed(channels: int) -> int:
    """Return the number of middle channels of an SE3d."""
    return max(1, channels // 8)


# ------------------------------------------------------------------------------------------------ sorting


class _Columns(nn.Module):
    """A view of the columns of a wider layer's weights that consume one part of a concatenation."""

    def __init__(self, wide: nn.Module, start: int, count: int):
        super().__init__()
        self.weight = cast(Tensor, wide.weight).detach()[:, start : start + count]


def _squeeze(block: nn.Module) -> list[nn.Module]:
    """Return the two linear layers of a block's SE, [] if it has none."""
    se = block.voxel_layers[-1] if isinstance(block, PVConv) else None
    return [se.fc[0], se.fc[2]] if isinstance(se, SE3d) else []


def _inputs(block: nn.Module) -> list[nn.Module]:
    """Return the layers of a block that consume its input."""
    if isinstance(block, PVConv):
        return [block.voxel_layers[0], _three(block.point_features)[0]]
    return _three(block)[:1]


def _outputs(block: nn.Module) -> list[nn.Module]:
    """Return the layers of a block whose channels are those of its output."""
    if isinstance(block, PVConv):
        return [*list(block.voxel_layers)[3:5], *_squeeze(block)[1:], *_outputs(block.point_features)]
    return _three(block)[:2]


def _group(
    dimension: str, sizes: Mapping[Gene, int], makers: Sequence[nn.Module], users: Sequence[Any], judges: Sequence[Any]
) -> ChannelGroup:
    """Return a group judged by the layers that consume it, or by parts of layers given as pairs."""
    judging = [_Columns(*j, count=max(sizes.values())) if isinstance(j, tuple) else j for j in judges]
    return ChannelGroup(dimension, sizes, tuple(makers), tuple(users), tuple(judging))


def _inner_groups(block: nn.Module, sizes: Mapping[Gene, int]) -> list[ChannelGroup]:
    """Return the groups between the two convolutions of a block with a grid, and in the middle of its SE."""
    if not isinstance(block, PVConv):
        return []
    layers = list(block.voxel_layers)
    groups = [_group("width", sizes, layers[:2], layers[3:4], layers[3:4])]
    if squeeze := _squeeze(block):
        middle = {width: _squeezed(size) for width, size in sizes.items()}
        groups.append(_group("width", middle, squeeze[:1], squeeze[1:], squeeze[1:]))
    return groups


def _layer_groups(modules: nn.Sequential, sizes: Sizes, user: Any) -> list[ChannelGroup]:
    """Return the groups between the layers of a head; `user` consumes the last."""
    layers = [(module, size) for module, size in zip(modules, sizes, strict=False) if isinstance(size, int)]
    users = [_three(module)[0] for module, _ in layers[1:]] + [user]
    groups = []
    for (module, size), taker in zip(layers, users, strict=True):
        parts: dict[Gene, int] = {ratio: _part(size, ratio) for ratio in HEADS}
        groups.append(_group("head", parts, _three(module)[:2], [taker], [taker]))
    return groups


# ------------------------------------------------------------------------------------------------ units


class _VoxelUnit(nn.Module):
    """A PVConv that takes coordinates and features as one tensor `[B, 3 + C, N]`."""

    def __init__(self, in_channels: int, out_channels: int, grid: int, with_se: bool, normalize: bool):
        super().__init__()
        self.block = PVConv(in_channels, out_channels, grid, with_se, normalize)

    def forward(self, x: Tensor) -> Tensor:
        return self.block((x[:, 3:], x[:, :3]))[0]


class _SummaryUnit(nn.Module):
    """The maximum over the points and the linear layers after it: `[B, C, N]` -> `[B, C']`."""

    def __init__(self, in_channels: int, layers: Sizes, num_outputs: int):
        super().__init__()
        self.layers = linear_head(in_channels, layers, num_outputs, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.amax(-1))


class _HeadUnit(nn.Module):
    """The head for points, with the copy that concatenates its parts: `[B, C, N]` -> `[B, num_classes, N]`."""

    def __init__(self, in_channels: int, layers: Sizes, num_classes: int):
        super().__init__()
        self.layers = point_head(in_channels, layers, num_classes, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.cat(x.chunk(2, 1), 1))  # copies as many bytes as concatenating the real parts


def _listed(sizes: Sizes, outputs: int) -> str:
    return ",".join(str(size) for size in [*sizes, outputs] if size and not isinstance(size, str))
