"""Once-for-All over MobileNetV3 and ProxylessNAS blocks.

Supernets with elastic kernel, expansion and depth (Once-for-All, arXiv 1908.09791; layouts of MobileNetV3, 1905.02244,
and ProxylessNAS, 1812.00332), parameter names as released. With `num_segments` the same networks take clips, with a
temporal shift (TSM, 1811.08383) at the input of every block that has a residual connection, except the first block, as
in TSM's MobileNetV2. `preset: tiny` is our own: three short stages for pictures of 32 pixels and clips of 64; so is
`micro` (of ProxylessNAS), for microcontrollers and pictures of 96.

Shortcuts are as released: a block of a stage has one if its stride is 1 and it keeps its channels. The first block of
MobileNetV3 has one; that of ProxylessNAS has none, even if a small width makes its channels equal. Before 2026-11-30 it
had one in that case: runs from then are read with `shortcuts: by_channels` (`models.stored`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, cast

from torch import Tensor, nn

from slimray.arch import Arch, Dimension, Space, Stage
from slimray.models.supernets.elastic import (
    SE_REDUCTION,
    ChannelGroup,
    ElasticConv,
    ElasticDepthwise,
    ElasticNorm,
    SqueezeExcite,
    make_divisible,
    sliced_squeeze,
)
from slimray.models.supernets.supernet import (
    ACTS,
    SHIFT_DIV,
    Classifier,
    ConvNorm,
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
from slimray.spec import UserError

KERNELS, EXPANDS = (3, 5, 7), (3, 4, 6)
SHORTCUTS = ("defined", "by_channels")

# --------------------------------------------------------------------------------------------------------- block


@dataclass(frozen=True)
class MBConv:
    """An inverted residual block: expand (1x1, omitted without `expands`), filter depthwise, project.

    With `frames` > 0 the residual branch begins with a temporal shift over that many frames, with `causal` only from
    the past. With `shortcut` the input is added to the output, if the stride is 1 and the channels are equal.
    """

    inputs: int
    middle: int
    outputs: int
    kernel: int
    stride: int
    act: str
    se: bool
    expands: bool = True
    frames: int = 0
    shortcut: bool = field(default=True, metadata={"unsaid": True})
    causal: bool = field(default=False, metadata={"unsaid": True})
    eps: float = field(default=1e-5, metadata={"free": True})

    @property
    def residual(self) -> bool:
        """True if the input is added to the output."""
        return self.shortcut and self.stride == 1 and self.inputs == self.outputs

    def make(self) -> "MBConvBlock":
        return MBConvBlock(self)

    def output(self, shape: Shape) -> Shape:
        return (self.outputs, halved(shape[1], self.stride), halved(shape[2], self.stride))


class MBConvBlock(nn.Module):
    """A plain inverted residual block: `[N, inputs, H, W]` -> `[N, outputs, H/stride, W/stride]`."""

    def __init__(self, block: MBConv):
        super().__init__()
        middle, eps = block.middle, block.eps
        layers: dict[str, nn.Module] = {}
        if block.expands:
            layers["inverted_bottleneck"] = ConvNorm(block.inputs, middle, act=block.act, eps=eps).make()
        depth = ConvNorm(middle, middle, block.kernel, block.stride, block.act, groups=middle, eps=eps).make()
        if block.se:
            depth.add_module("se", SqueezeExcite(middle))
        layers["depth_conv"] = depth
        layers["point_linear"] = ConvNorm(middle, block.outputs, eps=eps).make()
        self.conv = named(**layers)
        self.residual, self.frames = block.residual, block.frames
        self.shift = TemporalShift(block.frames, SHIFT_DIV, block.causal) if block.frames else None

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.shift is None else self.shift(x)
        for layers in self.conv:  # not self.conv(out), whose call frame would keep the widest activation alive
            for layer in cast(nn.Sequential, layers):
                out = layer(out)
        return x + out if self.residual else out


class ElasticMBConv(nn.Module):
    """An `MBConv` with elastic middle channels and kernel; it is called with the block to run."""

    def __init__(self, widest: MBConv, kernels: tuple[int, ...]):
        super().__init__()
        middle, eps = widest.middle, widest.eps
        depth: dict[str, nn.Module] = {
            "conv": ElasticDepthwise(middle, kernels, widest.stride),
            "bn": ElasticNorm(nn.BatchNorm2d(middle, eps)),
            "act": ACTS[widest.act](inplace=True),
        }
        if widest.se:
            depth["se"] = SqueezeExcite(middle)
        self.conv = named(
            inverted_bottleneck=named(
                conv=ElasticConv(nn.Conv2d(widest.inputs, middle, 1, bias=False)),
                bn=ElasticNorm(nn.BatchNorm2d(middle, eps)),
                act=ACTS[widest.act](inplace=True),
            ),
            depth_conv=named(**depth),
            point_linear=named(
                conv=ElasticConv(nn.Conv2d(middle, widest.outputs, 1, bias=False)),
                bn=ElasticNorm(nn.BatchNorm2d(widest.outputs, eps)),
            ),
        )

    def forward(self, x: Tensor, block: MBConv) -> Tensor:
        expand, depth, project = cast(Any, self.conv)
        out = temporal_shift(x, block.frames, SHIFT_DIV, block.causal) if block.frames else x
        out = expand.act(expand.bn(expand.conv(out, block.middle)))
        out = depth.act(depth.bn(depth.conv(out, block.kernel)))
        if block.se:
            out = sliced_squeeze(depth.se, out)
        out = project.bn(project.conv(out))
        return x + out if block.residual else out

    def channel_groups(self, sizes: dict[Any, int]) -> list[ChannelGroup]:
        """Return the groups of middle channels, and of those inside the SE; `sizes`: gene of `expand` -> channels."""
        expand, depth, project = cast(Any, self.conv)
        makers = [expand.conv.conv, expand.bn.bn, depth.conv.conv, depth.bn.bn]
        judge = project.conv.conv
        if not hasattr(depth, "se"):
            return [ChannelGroup("expand", sizes, tuple(makers), (judge,), (judge,))]
        inner, outer = depth.se.fc.reduce, depth.se.fc.expand
        squeezed = {gene: make_divisible(size // SE_REDUCTION) for gene, size in sizes.items()}
        return [
            ChannelGroup("expand", sizes, (*makers, outer), (judge, inner), (judge,)),
            ChannelGroup("expand", squeezed, (inner,), (outer,), (outer,)),
        ]


def first_block(stem: int, outputs: int, act: str, eps: float, shortcut: bool) -> MBConv:
    """Return the block after the first convolution, which does not expand; `shortcut` as the family defines it."""
    # False is set only if the channels would allow one, so that the keys of all other first blocks do not change
    return MBConv(stem, stem, outputs, 3, 1, act, False, expands=False, shortcut=shortcut or stem != outputs, eps=eps)


# -------------------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class MobileStage:
    """Blocks of the same width; the first has the stride. `depths` are the numbers of blocks that may run."""

    channels: int
    stride: int
    act: str
    se: bool = False
    depths: tuple[int, ...] = (2, 3, 4)


@dataclass(frozen=True)
class MobileLayout:
    """A supernet of inverted residual blocks, with final numbers of channels (`scaled` applies a width).

    `expand` > 0: the end of MobileNetV3 (1x1 to `expand`, pool, 1x1 to `last` without BatchNorm); 0: 1x1 to `last`,
    pool. `first_shortcut`: the first block has a shortcut (if its channels are equal).
    """

    stem: int
    first: int
    stages: tuple[MobileStage, ...]
    expand: int
    last: int
    act: str
    first_act: str
    eps: float
    first_shortcut: bool = True
    resolution: int = 224
    num_classes: int = 1000
    dropout: float = 0.0
    num_segments: int = 0
    causal: bool = False
    first_conv_name = "first_conv.conv"

    def scaled(self, width: float, **changes: Any) -> "MobileLayout":
        """Return the layout with `width` times the channels, rounded to multiples of 8, and other `changes`."""
        stages = tuple(replace(s, channels=make_divisible(s.channels * width)) for s in self.stages)
        return replace(
            self,
            stem=make_divisible(self.stem * width),
            first=make_divisible(self.first * width),
            stages=stages,
            expand=self.expand and make_divisible(self.expand * width),
            last=make_divisible(self.last * width),
            **changes,
        )

    def space(self) -> Space:
        stages = [Stage(max(stage.depths)) for stage in self.stages]
        num_blocks = sum(stage.blocks for stage in stages)
        dimensions = {
            "kernel": Dimension.per_block([KERNELS] * num_blocks),
            "expand": Dimension.per_block([EXPANDS] * num_blocks),
            "depth": Dimension.depth([stage.depths for stage in self.stages], stages),
        }
        return Space.of(dimensions | input_dimensions(self.resolution, self.num_segments))

    def plan(self, arch: Arch) -> list[Placed]:
        frames = int(arch.get("frames", 0))
        first = first_block(self.stem, self.first, self.first_act, self.eps, self.first_shortcut)
        plan = [
            Placed("first_conv", "first_conv", ConvNorm(3, self.stem, 3, 2, self.act, eps=self.eps)),
            Placed("blocks.0", "blocks.0", first),
        ]
        place, channels = 0, self.first
        for stage, depth in zip(self.stages, arch["depth"], strict=True):
            for i in range(max(stage.depths)):
                if i < depth:
                    block = MBConv(
                        inputs=channels,
                        middle=middle_channels(channels, arch["expand"][place]),
                        outputs=stage.channels,
                        kernel=arch["kernel"][place],
                        stride=1 if i else stage.stride,
                        act=stage.act,
                        se=stage.se,
                        eps=self.eps,
                    )
                    if frames and block.residual:
                        block = replace(block, frames=frames, causal=self.causal)
                    plan.append(Placed(f"blocks.{len(plan) - 1}", f"blocks.{place + 1}", block, elastic=True))
                    channels = stage.channels
                place += 1
        return plan + [Placed(name, name, part) for name, part in self._end(channels).items()]

    def _end(self, channels: int) -> dict[str, Part]:
        return end_parts(channels, self.expand, self.last, self.act, self.eps, self.num_classes, self.dropout)

    def elastic(self, widest: Part) -> nn.Module:
        return ElasticMBConv(cast(MBConv, widest), KERNELS)

    def cover(self) -> Iterable[Arch]:
        space = self.space()
        for kernel, expand in product(KERNELS, EXPANDS):
            for single in clip_lengths(space):
                yield space.arch({"kernel": kernel, "expand": expand, **single})

    def channel_groups(self, net: Supernet) -> list[ChannelGroup]:
        out = []
        for placed in self.plan(self.space().largest()):
            if placed.elastic:
                inputs = cast(MBConv, placed.part).inputs
                block = cast(ElasticMBConv, net.get_submodule(placed.source))
                out += block.channel_groups({gene: middle_channels(inputs, gene) for gene in EXPANDS})
        return out


def middle_channels(inputs: int, expand: float) -> int:
    return make_divisible(round(inputs * expand))


def end_parts(
    channels: int, expand: int, last: int, act: str, eps: float, num_classes: int, dropout: float
) -> dict[str, Part]:
    """Return the parts after the blocks: those of MobileNetV3 with `expand`, else those of ProxylessNAS."""
    classifier = Classifier(last, num_classes, dropout)
    if expand:
        return {
            "final_expand_layer": ConvNorm(channels, expand, act=act, eps=eps),
            "pool": Pool(),
            "feature_mix_layer": ConvNorm(expand, last, act=act, norm=False),
            "classifier": classifier,
        }
    return {
        "feature_mix_layer": ConvNorm(channels, last, act=act, eps=eps),
        "pool": Pool(),
        "classifier": classifier,
    }


MOBILENETV3 = MobileLayout(
    stem=16,
    first=16,
    stages=(
        MobileStage(24, 2, "relu"),
        MobileStage(40, 2, "relu", se=True),
        MobileStage(80, 2, "h_swish"),
        MobileStage(112, 1, "h_swish", se=True),
        MobileStage(160, 2, "h_swish", se=True),
    ),
    expand=960,
    last=1280,
    act="h_swish",
    first_act="relu",
    eps=1e-5,
)
MOBILENETV3_TINY = replace(
    MOBILENETV3,
    stem=8,
    first=8,
    stages=(
        MobileStage(16, 1, "relu", depths=(2, 3)),
        MobileStage(24, 2, "relu", se=True, depths=(2, 3)),
        MobileStage(40, 2, "h_swish", se=True, depths=(2, 3)),
    ),
    expand=120,
    last=160,
    resolution=32,
)
PROXYLESS = MobileLayout(
    stem=32,
    first=16,
    stages=(
        MobileStage(24, 2, "relu6"),
        MobileStage(40, 2, "relu6"),
        MobileStage(80, 2, "relu6"),
        MobileStage(96, 1, "relu6"),
        MobileStage(192, 2, "relu6"),
        MobileStage(320, 1, "relu6", depths=(1,)),
    ),
    expand=0,
    last=1280,
    act="relu6",
    first_act="relu6",
    eps=1e-3,
    first_shortcut=False,
)
PROXYLESS_TINY = replace(
    PROXYLESS,
    stem=8,
    first=8,
    first_shortcut=True,  # in our own preset, the first block keeps its channels at every width
    stages=(
        MobileStage(16, 1, "relu6", depths=(2, 3)),
        MobileStage(24, 2, "relu6", depths=(2, 3)),
        MobileStage(40, 2, "relu6", depths=(2, 3)),
        MobileStage(64, 1, "relu6", depths=(1,)),
    ),
    last=160,
    resolution=32,
)

PROXYLESS_MICRO = replace(
    PROXYLESS,
    stem=16,
    first=8,
    stages=(
        MobileStage(16, 2, "relu6", depths=(1, 2)),
        MobileStage(24, 2, "relu6", depths=(1, 2, 3)),
        MobileStage(40, 2, "relu6", depths=(1, 2, 3)),
        MobileStage(48, 1, "relu6", depths=(1, 2)),
        MobileStage(80, 2, "relu6", depths=(1, 2)),
    ),
    last=192,
    resolution=96,
)


def at_twice_the_resolution(layout: MobileLayout) -> MobileLayout:
    """Return `layout` for inputs of twice the size, which its first stage halves once more."""
    first, *rest = layout.stages
    return replace(layout, stages=(replace(first, stride=2 * first.stride), *rest), resolution=2 * layout.resolution)


def ofa_mobilenetv3(
    num_classes: int, width: float = 1.0, dropout: float = 0.1, preset: str = "imagenet", zero_gamma: bool = False
) -> Supernet:
    """Build the supernet of MobileNetV3 blocks; released with `width` 1.0 and 1.2."""
    layout = of_preset({"imagenet": MOBILENETV3, "tiny": MOBILENETV3_TINY}, preset)
    return _supernet(layout.scaled(width, num_classes=num_classes, dropout=dropout), zero_gamma)


def proxyless_layout(preset: str, shortcuts: str) -> MobileLayout:
    """Return the layout of a ProxylessNAS preset; raise UserError for an unknown one. `shortcuts`: see the module."""
    layout = of_preset({"imagenet": PROXYLESS, "tiny": PROXYLESS_TINY, "micro": PROXYLESS_MICRO}, preset)
    return replace(layout, first_shortcut=layout.first_shortcut or by_channels(shortcuts))


def by_channels(shortcuts: str) -> bool:
    if shortcuts not in SHORTCUTS:
        raise UserError(f"shortcuts: must be {' or '.join(SHORTCUTS)} (got {shortcuts!r})")
    return shortcuts == "by_channels"


def ofa_proxyless(
    num_classes: int,
    width: float = 1.0,
    dropout: float = 0.1,
    preset: str = "imagenet",
    zero_gamma: bool = False,
    shortcuts: str = "defined",
) -> Supernet:
    """Build the supernet of ProxylessNAS blocks; released with `width` 1.3."""
    layout = proxyless_layout(preset, shortcuts)
    return _supernet(layout.scaled(width, num_classes=num_classes, dropout=dropout), zero_gamma)


def ofa_tsm_mobilenetv3(
    num_classes: int,
    num_segments: int = 8,
    width: float = 1.0,
    dropout: float = 0.1,
    preset: str = "imagenet",
    zero_gamma: bool = False,
    causal: bool = False,
) -> Supernet:
    """Build the supernet of MobileNetV3 blocks over clips: `frames` are `num_segments`, half and a quarter of it.

    With `causal`, frames depend only on earlier ones, so that a subnet can be stepped frame by frame.
    """
    tiny = at_twice_the_resolution(MOBILENETV3_TINY)
    layout = of_preset({"imagenet": MOBILENETV3, "tiny": tiny}, preset)
    options = {"num_classes": num_classes, "dropout": dropout, "num_segments": num_segments, "causal": causal}
    return _supernet(layout.scaled(width, **options), zero_gamma)


def _supernet(layout: MobileLayout, zero_gamma: bool) -> Supernet:
    net = Supernet(layout)
    if zero_gamma:
        for placed in layout.plan(net.space.largest()):
            if isinstance(placed.part, MBConv) and placed.part.residual:
                nn.init.zeros_(
                    net.get_parameter(f"{placed.source}.conv.point_linear.bn{'.bn' * placed.elastic}.weight")
                )
    return net
