"""Once-for-All over ResNet-50D: elastic depth, width and expansion of bottlenecks, parameter names as released.

Once-for-All (arXiv 1908.09791) over the "D" form of ResNet-50 (Bag of Tricks, 1812.01187): a stem of 3x3 convolutions,
and shortcuts that average before they project. `depth` is the number of blocks beyond each stage's base; its first gene
(0 or 2) selects the residual convolution of the stem. `width` holds indices into WIDTHS, two for the stem and one per
stage. With `num_segments` the same network takes clips, with a temporal shift (TSM, 1811.08383) before every
bottleneck's first convolution. `preset: tiny` is our own: three short stages for pictures of 32 pixels and clips of 64.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, cast

from torch import Tensor, nn

from slimray.arch import Arch, Dimension, Gene, Space, Stage
from slimray.models.supernets.elastic import ChannelGroup, ElasticLinear, make_divisible
from slimray.models.supernets.supernet import (
    SHIFT_DIV,
    Classifier,
    ConvNorm,
    ElasticConvNorm,
    Part,
    Placed,
    Pool,
    Shape,
    Supernet,
    clip_lengths,
    halved,
    input_dimensions,
    named,
    of_preset,
)
from slimray.models.tsm import TemporalShift, temporal_shift

WIDTHS, EXPANDS, EXTRA = (0.65, 0.8, 1.0), (0.2, 0.25, 0.35), (0, 1, 2)

# --------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class Bottleneck:
    """1x1, 3x3 and 1x1 convolutions and a shortcut, with a projection if the shape changes (`projects`).

    With `frames` > 0, a temporal shift over that many frames precedes the first convolution, with `causal` only from
    the past.
    """

    inputs: int
    middle: int
    outputs: int
    stride: int
    projects: bool
    frames: int = 0
    causal: bool = field(default=False, metadata={"unsaid": True})

    def layers(self) -> dict[str, ConvNorm]:
        """Return the convolutions by name."""
        layers = {
            "conv1": ConvNorm(self.inputs, self.middle, act="relu"),
            "conv2": ConvNorm(self.middle, self.middle, 3, self.stride, "relu"),
            "conv3": ConvNorm(self.middle, self.outputs),
        }
        return layers | ({"downsample": ConvNorm(self.inputs, self.outputs)} if self.projects else {})

    def make(self) -> "BottleneckBlock":
        return BottleneckBlock(self)

    def output(self, shape: Shape) -> Shape:
        return (self.outputs, halved(shape[1], self.stride), halved(shape[2], self.stride))


class BottleneckBlock(nn.Module):
    """A plain bottleneck: `[N, inputs, H, W]` -> `[N, outputs, H/stride, W/stride]`."""

    def __init__(self, block: Bottleneck):
        super().__init__()
        layers = {name: layer.make() for name, layer in block.layers().items()}
        self.conv1, self.conv2, self.conv3 = layers["conv1"], layers["conv2"], layers["conv3"]
        self.downsample = _shortcut(block, layers.get("downsample"))
        self.relu = nn.ReLU(inplace=True)
        self.frames = block.frames
        self.shift = TemporalShift(block.frames, SHIFT_DIV, block.causal) if block.frames else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x if self.shift is None else self.shift(x))
        return self.relu(self.conv3(self.conv2(out)) + (x if self.downsample is None else self.downsample(x)))


def _shortcut(block: Bottleneck, projection: nn.Module | None) -> nn.Module | None:
    """Return the projection after an average pool over the stride, without changing the names of its weights."""
    if isinstance(projection, nn.Sequential) and block.stride > 1:
        pool = nn.AvgPool2d(block.stride, block.stride, ceil_mode=True)
        return named(avg_pool=pool, **dict(projection.named_children()))
    return projection


class ElasticBottleneck(nn.Module):
    """A `Bottleneck` with elastic channels; it is called with the block to run."""

    def __init__(self, widest: Bottleneck):
        super().__init__()
        for name, layer in widest.layers().items():
            self.add_module(name, ElasticConvNorm(layer))
        self.pool = nn.AvgPool2d(widest.stride, widest.stride, ceil_mode=True) if widest.stride > 1 else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, block: Bottleneck) -> Tensor:
        layers = block.layers()
        out = temporal_shift(x, block.frames, SHIFT_DIV, block.causal) if block.frames else x
        for name in ("conv1", "conv2", "conv3"):
            out = self._modules[name](out, layers[name])  # type: ignore[misc]
        if block.projects:
            x = self._modules["downsample"](self.pool(x), layers["downsample"])  # type: ignore[misc]
        return self.relu(out + x)


@dataclass(frozen=True)
class StemResidual:
    """A 3x3 convolution with a shortcut."""

    channels: int

    def layer(self) -> ConvNorm:
        """Return the convolution."""
        return ConvNorm(self.channels, self.channels, 3, act="relu")

    def make(self) -> "StemResidualBlock":
        return StemResidualBlock(self)

    def output(self, shape: Shape) -> Shape:
        return shape


class StemResidualBlock(nn.Module):
    """A plain `StemResidual`: `[N, channels, H, W]` in and out."""

    def __init__(self, block: StemResidual):
        super().__init__()
        self.conv = block.layer().make()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class ElasticStemResidual(nn.Module):
    """A `StemResidual` with elastic channels; it is called with the part to run."""

    def __init__(self, widest: StemResidual):
        super().__init__()
        self.conv = ElasticConvNorm(widest.layer())

    def forward(self, x: Tensor, block: StemResidual) -> Tensor:
        return x + self.conv(x, block.layer())


@dataclass(frozen=True)
class MaxPool:
    """A max pool over 3x3 with stride 2."""

    def make(self) -> nn.Module:
        return nn.MaxPool2d(3, 2, 1)

    def output(self, shape: Shape) -> Shape:
        return (shape[0], halved(shape[1], 2), halved(shape[2], 2))


class ElasticClassifier(nn.Module):
    """A `Classifier` with elastic inputs; it is called with the part to run."""

    def __init__(self, widest: Classifier):
        super().__init__()
        self.dropout = nn.Dropout(widest.dropout)
        self.linear = ElasticLinear(nn.Linear(widest.inputs, widest.classes))

    def forward(self, x: Tensor, part: Classifier) -> Tensor:
        return self.linear(self.dropout(x.flatten(1)))


# -------------------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class ResNetLayout:
    """A supernet of bottlenecks at its widest; `base` are the minimum numbers of blocks per stage."""

    stem: int
    channels: tuple[int, ...]
    base: tuple[int, ...]
    strides: tuple[int, ...]
    max_pool: bool = True
    resolution: int = 224
    num_classes: int = 1000
    dropout: float = 0.0
    num_segments: int = 0
    causal: bool = False
    first_conv_name = "input_stem.0.conv"

    def scaled(self, width: float, **changes: Any) -> "ResNetLayout":
        """Return the layout with `width` times the channels, rounded to multiples of 8, and other `changes`."""
        channels = tuple(make_divisible(c * width) for c in self.channels)
        return replace(self, stem=make_divisible(self.stem * width), channels=channels, **changes)

    def space(self) -> Space:
        stages = [Stage(base + max(EXTRA), base) for base in self.base]
        dimensions = {
            "depth": Dimension.depth([(0, 2)] + [EXTRA] * len(stages), [Stage(0), *stages]),
            "expand": Dimension.per_block([EXPANDS] * sum(stage.blocks for stage in stages)),
            "width": Dimension.per_stage([tuple(range(len(WIDTHS)))] * (2 + len(stages))),
        }
        return Space.of(dimensions | input_dimensions(self.resolution, self.num_segments))

    def plan(self, arch: Arch) -> list[Placed]:
        frames = int(arch.get("frames", 0))
        middle, channels = _channels(self.stem // 2, arch["width"][0]), _channels(self.stem, arch["width"][1])
        stem: list[tuple[int, Part]] = [(0, ConvNorm(3, middle, 3, 2, "relu"))]
        if arch["depth"][0] == 2:
            stem.append((1, StemResidual(middle)))
        stem.append((2, ConvNorm(middle, channels, 3, 1, "relu")))
        plan = [Placed(f"input_stem.{i}", f"input_stem.{at}", part, True) for i, (at, part) in enumerate(stem)]
        if self.max_pool:
            plan.append(Placed("max_pool", "max_pool", MaxPool()))
        place, count = 0, 0
        for stage, base in enumerate(self.base):
            outputs = _channels(self.channels[stage], arch["width"][2 + stage])
            for i in range(base + max(EXTRA)):
                if i < base + arch["depth"][1 + stage]:
                    block = Bottleneck(
                        inputs=channels,
                        middle=_middle(outputs, arch["expand"][place]),
                        outputs=outputs,
                        stride=1 if i else self.strides[stage],
                        projects=i == 0,
                        frames=frames,
                        causal=self.causal,
                    )
                    plan.append(Placed(f"blocks.{count}", f"blocks.{place}", block, True))
                    channels, count = outputs, count + 1
                place += 1
        classifier = Classifier(channels, self.num_classes, self.dropout)
        return [*plan, Placed("pool", "pool", Pool()), Placed("classifier", "classifier", classifier, True)]

    def elastic(self, widest: Part) -> nn.Module:
        if isinstance(widest, Bottleneck):
            return ElasticBottleneck(widest)
        if isinstance(widest, StemResidual):
            return ElasticStemResidual(widest)
        return ElasticClassifier(widest) if isinstance(widest, Classifier) else ElasticConvNorm(cast(ConvNorm, widest))

    def cover(self) -> Iterable[Arch]:
        space = self.space()
        genes = range(len(WIDTHS))
        for expand, even, odd in product(EXPANDS, genes, genes):  # all pairs of neighbouring widths
            width = [odd if i % 2 else even for i in range(2 + len(self.base))]
            for single in clip_lengths(space):
                yield space.arch({"expand": expand, "width": width, **single})

    def channel_groups(self, net: Supernet) -> list[ChannelGroup]:
        """Return the groups of middle channels of bottlenecks; without a shift also of those between blocks."""
        modules = {p.source: cast(Any, net.get_submodule(p.source)) for p in self.plan(self.space().largest())}
        stem, residual, after = (modules[f"input_stem.{i}"] for i in range(3))
        blocks = [module for name, module in modules.items() if name.startswith("blocks.")]
        first = _conv(stem), _conv(residual.conv), _conv(after)
        sizes = _width_sizes(self.stem // 2)
        groups = [
            ChannelGroup("width", sizes, (*_makers(stem), *_makers(residual.conv)), first[1:], first[1:]),
        ]
        if not self.num_segments:
            users = (_conv(blocks[0].conv1), _conv(blocks[0].downsample))
            groups.append(ChannelGroup("width", _width_sizes(self.stem), _makers(after), users, users))
        place = 0
        for stage, base in enumerate(self.base):
            inside = blocks[place : place + base + max(EXTRA)]
            place += len(inside)
            for block in inside:
                for maker, user in ((block.conv1, block.conv2), (block.conv2, block.conv3)):
                    users = (_conv(user),)
                    tiers = _MiddleTiers(self.channels[stage])
                    groups.append(ChannelGroup("expand", {}, _makers(maker), users, users, tiers))
            if not self.num_segments:
                makers = sum((_makers(block.conv3) for block in inside), _makers(inside[0].downsample))
                users = tuple(_conv(block.conv1) for block in inside[1:])
                if place < len(blocks):
                    users += (_conv(blocks[place].conv1), _conv(blocks[place].downsample))
                else:
                    users += (modules["classifier"].linear.linear,)
                groups.append(ChannelGroup("width", _width_sizes(self.channels[stage]), makers, users, users))
        return groups


@dataclass(frozen=True)
class _MiddleTiers:
    """Returns the numbers of middle channels for freed values of `expand` and `width`."""

    outputs: int

    def __call__(self, freed: Mapping[str, Sequence[Gene]]) -> list[int]:
        expands, widths = freed.get("expand", ()), freed.get("width", ())
        pairs = product(expands or (max(EXPANDS),), widths or (len(WIDTHS) - 1,)) if expands or widths else ()
        return [_middle(_channels(self.outputs, int(w)), e) for e, w in pairs]


def _channels(widest: int, width: int) -> int:
    return make_divisible(widest * WIDTHS[width])


def _middle(outputs: int, expand: float) -> int:
    return make_divisible(round(outputs * expand))


def _width_sizes(widest: int) -> dict[Gene, int]:
    return {gene: _channels(widest, gene) for gene in range(len(WIDTHS))}


def _conv(layer: Any) -> nn.Module:
    return layer.conv.conv


def _makers(layer: Any) -> tuple[nn.Module, ...]:
    return (layer.conv.conv, layer.bn.bn)


RESNET50 = ResNetLayout(64, (256, 512, 1024, 2048), (2, 2, 4, 2), (1, 2, 2, 2))
TINY = ResNetLayout(16, (48, 96, 192), (1, 1, 1), (1, 2, 2), max_pool=False, resolution=32)
TINY_CLIPS = replace(TINY, max_pool=True, resolution=64)


def ofa_resnet50(
    num_classes: int, width: float = 1.0, dropout: float = 0.1, preset: str = "imagenet", zero_gamma: bool = False
) -> Supernet:
    """Build the supernet of ResNet-50D; released with `width` 1.0."""
    layout = of_preset({"imagenet": RESNET50, "tiny": TINY}, preset)
    return _supernet(layout.scaled(width, num_classes=num_classes, dropout=dropout), zero_gamma)


def ofa_tsm_resnet50(
    num_classes: int,
    num_segments: int = 8,
    width: float = 1.0,
    dropout: float = 0.1,
    preset: str = "imagenet",
    zero_gamma: bool = False,
    causal: bool = False,
) -> Supernet:
    """Build the supernet of ResNet-50D over clips: `frames` are `num_segments`, half and a quarter of it.

    With `causal`, frames depend only on earlier ones, so that a subnet can be stepped frame by frame.
    """
    layout = of_preset({"imagenet": RESNET50, "tiny": TINY_CLIPS}, preset)
    options = {"num_classes": num_classes, "dropout": dropout, "num_segments": num_segments, "causal": causal}
    return _supernet(layout.scaled(width, **options), zero_gamma)


def _supernet(layout: ResNetLayout, zero_gamma: bool) -> Supernet:
    net = Supernet(layout)
    if zero_gamma:
        for module in net.modules():
            if isinstance(module, ElasticBottleneck):
                nn.init.zeros_(module.get_parameter("conv3.bn.bn.weight"))
    return net
