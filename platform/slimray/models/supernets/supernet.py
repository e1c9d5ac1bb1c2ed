"""Convolutional supernets and their parts: a network is a list of parts, and parts are values.

A layout (ofa_mobilenet.py, ofa_resnet.py) lists for an arch the `Part`s that run one after another. Everything else
follows from that list: `Supernet` runs it on shared weights, `extract` builds it as a plain `Subnet` and copies the
weights, `units` cuts it into pieces whose latency is measured. So all of them always describe the same network. With
frames (our own design: Once-for-All, arXiv 1908.09791, over TSM, 1811.08383) the input is a clip, the parts run frame
by frame, residual branches begin with a temporal shift, and the frames' logits are averaged. A causal shift only uses
the past, so that its subnets can be stepped frame by frame (`tsm.OnlineTSM`).
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from slimray.arch import Arch, Dimension, Space
from slimray.models.resnet import init_convolutions
from slimray.models.supernets.elastic import ChannelGroup, ElasticConv, ElasticNorm, Unit, take
from slimray.models.tsm import TemporalShift
from slimray.spec import UserError

ACTS: dict[str, Callable[..., nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6, "h_swish": nn.Hardswish}
SHIFT_DIV = 8
Shape = tuple[int, int, int]  # C, H, W
T = TypeVar("T")


class Part(Protocol):
    """A piece of a network as a value; its fields determine its cost."""

    def make(self) -> nn.Module:
        """Build a new module of this shape."""
        ...

    def output(self, shape: Shape) -> Shape:
        """Return the output shape for the input `shape`."""
        ...


@dataclass(frozen=True)
class Placed:
    """A part, its name in the extracted network, and the name of the supernet's module with its weights (`source`).

    With `elastic`, the supernet's module holds more than this part and is called with the part to run.
    """

    name: str
    source: str
    part: Part
    elastic: bool = False


# --------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class ConvNorm:
    """A convolution, its BatchNorm (`norm`) and activation (`act`; "" for none)."""

    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    act: str = ""
    norm: bool = True
    groups: int = 1
    eps: float = field(default=1e-5, metadata={"free": True})

    def make(self) -> nn.Sequential:
        layers: dict[str, nn.Module] = {
            "conv": nn.Conv2d(
                self.inputs, self.outputs, self.kernel, self.stride, self.kernel // 2, groups=self.groups, bias=False
            )
        }
        if self.norm:
            layers["bn"] = nn.BatchNorm2d(self.outputs, self.eps)
        if self.act:
            layers["act"] = ACTS[self.act](inplace=True)
        return nn.Sequential(OrderedDict(layers))

    def output(self, shape: Shape) -> Shape:
        return (self.outputs, halved(shape[1], self.stride), halved(shape[2], self.stride))


@dataclass(frozen=True)
class Pool:
    """The mean over height and width."""

    def make(self) -> nn.Module:
        return nn.AdaptiveAvgPool2d(1)

    def output(self, shape: Shape) -> Shape:
        return (shape[0], 1, 1)


@dataclass(frozen=True)
class Nothing:
    """A block that is only its shortcut; it keeps its number, as in the released weights."""

    def make(self) -> nn.Module:
        return nn.Identity()

    def output(self, shape: Shape) -> Shape:
        return shape


@dataclass(frozen=True)
class Classifier:
    """Dropout and the last linear layer."""

    inputs: int
    classes: int
    dropout: float = field(default=0.0, metadata={"free": True})

    def make(self) -> nn.Sequential:
        linear = nn.Linear(self.inputs, self.classes)
        return nn.Sequential(OrderedDict(flatten=nn.Flatten(), dropout=nn.Dropout(self.dropout), linear=linear))

    def output(self, shape: Shape) -> Shape:
        return (self.classes, 1, 1)


def halved(size: int, stride: int) -> int:
    """Return the height or width after a convolution or pool of that stride, padded so that stride 1 keeps it."""
    return -(-size // stride)


class ElasticConvNorm(nn.Module):
    """A `ConvNorm` with elastic channels; it is called with the part to run."""

    def __init__(self, widest: ConvNorm):
        super().__init__()
        plain = widest.make()
        self.conv, self.bn = ElasticConv(plain.conv), ElasticNorm(plain.bn)  # type: ignore[arg-type]
        self.act = ACTS[widest.act](inplace=True) if widest.act else nn.Identity()

    def forward(self, x: Tensor, part: ConvNorm) -> Tensor:
        return self.act(self.bn(self.conv(x, part.outputs)))


def named(**layers: nn.Module) -> nn.Sequential:
    """Return a Sequential of layers with these names."""
    return nn.Sequential(OrderedDict(layers))


# -------------------------------------------------------------------------------------------------------- subnet


class Subnet(nn.Sequential):
    """An ordinary network, a chain of parts: `[B, 3, H, W]` -> `[B, num_classes]`.

    With `num_segments` (T) it takes clips `[B, T, 3, H, W]` and returns the mean of the frames' logits; 0 for images.
    """

    head_name = "classifier.linear"

    def __init__(self, parts: Mapping[str, nn.Module], first_conv_name: str, num_segments: int = 0):
        super().__init__(_nested(parts))
        self.first_conv_name, self.num_segments = first_conv_name, num_segments

    @property
    def causal(self) -> bool:
        """True if no frame of a clip depends on a later one."""
        shifts = [module for module in self.modules() if isinstance(module, TemporalShift)]
        return self.num_segments > 0 and all(shift.causal for shift in shifts)

    @property
    def num_outputs(self) -> int:
        """Number of logits averaged for a clip: one per frame."""
        return self.num_segments

    def per_frame(self) -> dict[str, nn.Module]:
        """Return the modules, by name, that in sequence turn frames `[B*T, 3, H, W]` into the logits of each frame."""
        return dict(self.named_children())

    def forward(self, input: Tensor) -> Tensor:
        if not self.num_segments:
            return super().forward(input)
        logits = super().forward(_frames_of(input, self.num_segments))
        return logits.view(len(input), self.num_segments, -1).mean(1)


def _frames_of(clips: Tensor, num_segments: int) -> Tensor:
    """Return clips `[B, T, 3, H, W]` as frames `[B*T, 3, H, W]`; raise ValueError unless T is `num_segments`."""
    if clips.ndim != 5 or clips.shape[1] != num_segments:
        raise ValueError(f"input {list(clips.shape)}: this network takes clips of {num_segments} frames")
    return clips.flatten(0, 1)


def _nested(modules: Mapping[str, nn.Module]) -> "OrderedDict[str, nn.Module]":
    """Collect `blocks.0`, `blocks.1`, ... in one Sequential `blocks`, in order of first appearance."""
    groups: dict[str, OrderedDict[str, nn.Module]] = {}
    for name, module in modules.items():
        top, _, rest = name.partition(".")
        groups.setdefault(top, OrderedDict())[rest] = module
    return OrderedDict(
        (top, inner[""] if "" in inner else nn.Sequential(_nested(inner))) for top, inner in groups.items()
    )


def make_subnet(parts: Mapping[str, Part], first_conv_name: str, num_segments: int = 0) -> Subnet:
    """Build a new plain network of `parts`, with convolutions initialized by fan-out."""
    net = Subnet({name: part.make() for name, part in parts.items()}, first_conv_name, num_segments)
    initialise(net)
    return net


def initialise(net: nn.Module) -> None:
    """Apply He initialization by fan-out to convolutions, as published; biases of linear layers start at 0."""
    init_convolutions(net)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------ supernet


class Layout(Protocol):
    """A family of supernets: its space, the parts of an arch, and the modules that hold the widest parts."""

    @property
    def first_conv_name(self) -> str:
        """Name of the first convolution of an extracted network."""
        ...

    def space(self) -> Space:
        """Return the space of all archs."""
        ...

    def plan(self, arch: Arch) -> list[Placed]:
        """Return the parts of `arch` in order of execution."""
        ...

    def elastic(self, widest: Part) -> nn.Module:
        """Build the supernet's module for an elastic part of the largest arch; it is called with (x, part)."""
        ...

    def cover(self) -> Iterable[Arch]:
        """Yield archs of the largest resolution that together contain all parts of all archs, for every `frames`."""
        ...

    def channel_groups(self, net: "Supernet") -> list[ChannelGroup]:
        """See `elastic.sort_channels`."""
        ...


class Supernet(nn.Module):
    """One network that contains every arch of `space`: `net(x, arch)` runs it, `net.extract(arch)` copies it.

    Takes `[B, 3, H, W]`, or with `frames` in the space clips `[B, T, 3, H, W]`, T = `arch["frames"]`, and returns
    `[B, num_classes]`. No active arch is stored, the input is never resized, and without an arch the largest runs. In
    train mode the first entries of BatchNorm's shared running statistics are updated in place.
    """

    def __init__(self, layout: Layout):
        super().__init__()
        self.layout, self.space = layout, layout.space()
        largest = self.space.largest()
        modules = {p.source: layout.elastic(p.part) if p.elastic else p.part.make() for p in layout.plan(largest)}
        for name, module in _nested(modules).items():
            self.add_module(name, module)
        self.num_segments = int(largest.get("frames", 0))
        self.head_name = next(n for n, m in self.named_modules() if isinstance(m, nn.Linear))
        self.first_conv_name = next(n for n, m in self.named_modules() if isinstance(m, nn.Conv2d))
        initialise(self)

    def forward(self, x: Tensor, arch: Arch | None = None) -> Tensor:
        arch = self.space.largest() if arch is None else self.space.arch(arch)
        frames = int(arch.get("frames", 0))
        out = _frames_of(x, frames) if frames else x
        for placed in self.layout.plan(arch):
            module = self.get_submodule(placed.source)
            out = module(out, placed.part) if placed.elastic else module(out)
        return out.view(len(x), frames, -1).mean(1) if frames else out

    def extract(self, arch: Arch) -> Subnet:
        """Return the subnet `arch` as an ordinary network, in the mode of this one, with copies of its weights.

        Its BatchNorm statistics are meaningless until `recalibrate_norms`. Raises UserError for an arch of another
        space.
        """
        arch = self.space.arch(arch)
        plan = self.layout.plan(arch)
        with torch.device("meta"):
            modules = {placed.name: placed.part.make() for placed in plan}
        for placed in plan:
            take(modules[placed.name], self.get_submodule(placed.source))
        return Subnet(modules, self.layout.first_conv_name, int(arch.get("frames", 0))).train(self.training)

    def latency_features(self, arch: Arch) -> list[float]:
        """Return the features from which a predictor learns the latency of `arch`."""
        return self.space.encode(arch)

    def measured(self, arch: Arch, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
        """Return the module to time for the subnet `arch`, whose first unit takes `shape`, and its input shape."""
        return self.extract(arch), shape

    def units(self, arch: Arch, resolution: int | None = None) -> list[Unit]:
        """Return the pieces of the subnet `arch` on an input of `resolution` (None: that of the arch), in order.

        Chained together they are the extracted network. An input is `(C, H, W)`, or `(T, C, H, W)` for clips.
        """
        arch = self.space.arch(arch)
        side = int(arch["resolution"]) if resolution is None else resolution
        plan = self.layout.plan(arch)
        shape, frames, out = (3, side, side), int(arch.get("frames", 0)), []
        for placed in plan:
            last = placed is plan[-1]
            key = _key(placed.part, shape, frames)
            make = partial(_OverFrames, placed.part, last) if frames else placed.part.make
            out.append(Unit(key, (frames, *shape) if frames else shape, make))
            shape = placed.part.output(shape)
        return out

    def all_units(self, resolutions: Iterable[int] | None = None) -> dict[str, Unit]:
        """Return the units of all archs at all `resolutions` (None: those of the space), by key."""
        sides = self.space.dimensions["resolution"].choices[0] if resolutions is None else resolutions
        archs = list(self.layout.cover())
        return {unit.key: unit for side in sides for arch in archs for unit in self.units(arch, int(side))}

    def channel_groups(self) -> list[ChannelGroup]:
        """Return the channels that `elastic.sort_channels` may reorder; none on which a temporal shift acts."""
        return self.layout.channel_groups(self)


class _OverFrames(nn.Module):
    """Runs a part on every frame of clips `[B, T, C, H, W]`; with `mean` its outputs are averaged over the frames."""

    def __init__(self, part: Part, mean: bool):
        super().__init__()
        self.part, self.mean = part.make(), mean

    def forward(self, clips: Tensor) -> Tensor:
        out = self.part(clips.flatten(0, 1))
        out = out.view(*clips.shape[:2], *out.shape[1:])
        return out.mean(1) if self.mean else out


def _key(part: Part, shape: Shape, frames: int) -> str:
    """Return the key of a part, `MBConv-56x56-inputs:24-...`: its class, its input, and fields that affect its cost.

    Fields with the metadata `unsaid` are included only if they differ from their default, so that tables measured
    before these fields existed remain valid.
    """
    fields = [
        f
        for f in dataclasses.fields(part)  # type: ignore[arg-type]
        if not (f.metadata.get("free") or (f.metadata.get("unsaid") and getattr(part, f.name) == f.default))
    ]
    values = [f"{f.name}:{_plain(getattr(part, f.name))}" for f in fields]
    channels = [] if any(f.name == "inputs" for f in fields) else [f"inputs:{shape[0]}"]
    per_clip = [f"clip:{frames}"] if frames else []
    return "-".join([type(part).__name__, f"{shape[1]}x{shape[2]}", *channels, *values, *per_clip])


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else "none" if value == "" else value


# -------------------------------------------------------------------------------------------- spaces and options


def of_preset(presets: Mapping[str, T], preset: str) -> T:
    """Return the layout of a preset; raise UserError if there is none of that name."""
    if preset not in presets:
        raise UserError(f"preset: must be {' or '.join(presets)} (got {preset!r})")
    return presets[preset]


def input_dimensions(resolution: int, num_segments: int = 0) -> dict[str, Dimension]:
    """Return the dimensions of the input: `resolution` from 4/7 of the largest in steps of 4 (224: 128 to 224).

    With `num_segments` also `frames`: that many, half and a quarter, if these are integers and at least 2.
    """
    out = {"resolution": Dimension.number(range(4 * round(resolution / 7), resolution + 1, 4), input="side")}
    if num_segments:
        parts = [num_segments // d for d in (4, 2, 1) if num_segments % d == 0]
        out["frames"] = Dimension.number([n for n in parts if n >= 2] or [num_segments], input="frames")
    return out


def clip_lengths(space: Space) -> list[dict[str, int]]:
    """Return the genes for each length of clips in `space`, `[{}]` for images."""
    name = space.input_name("frames")
    return [{}] if name is None else [{name: int(frames)} for frames in space.dimensions[name].choices[0]]
