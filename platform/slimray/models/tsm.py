"""TSM: the temporal shift with which a 2D network sees motion at no cost, its counterpart TSN, and the online form.

Temporal Shift Module for Efficient Video Understanding (arXiv 1811.08383); Temporal Segment Networks (1608.00859).
A clip `[B, T, 3, H, W]` runs frame by frame through a 2D backbone; one eighth of the channels comes from the next
frame, one eighth from the previous one (`causal`: only from the previous one), and the frames' logits are averaged.
Parameter names are those of the published checkpoints. The shift uses `cat` instead of in-place operations, so that it
exports and compiles.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from slimray.models.mobilenetv2 import InvertedResidual, MobileNetV2
from slimray.models.modes import evaluating
from slimray.models.nonlocal_block import NonLocal
from slimray.models.resnet import ResNet

NON_LOCAL_PLACES = {"layer2": (0, 2), "layer3": (0, 2, 4)}


def temporal_shift(
    x: Tensor,
    num_segments: int,
    shift_div: int = 8,
    causal: bool = False,
    folds: tuple[int, int] | None = None,
) -> Tensor:
    """Shift some of the channels by one frame along time, with zeros at the ends of a clip.

    `x` is `[B*T, C, H, W]`, time fastest. With fold = C // shift_div, channels [0, fold) come from the next frame and
    [fold, 2*fold) from the previous one; `causal` shifts only [0, fold), from the previous frame. Others stay. For a
    pruned network, `folds` gives the number of channels left in the first and in the second group.
    """
    rows, channels, height, width = x.shape
    clips = x.view(-1, num_segments, channels, height, width)
    fold, after = (channels // shift_div,) * 2 if folds is None else folds
    if fold + (0 if causal else after) == 0:
        return x
    first, second, rest = clips[:, :, :fold], clips[:, :, fold : fold + after], clips[:, :, fold + after :]
    if causal:
        shifted = torch.cat([_delay(first), clips[:, :, fold:]], dim=2)
    else:
        ahead = torch.cat([first[:, 1:], torch.zeros_like(first[:, :1])], dim=1)
        shifted = torch.cat([ahead, _delay(second), rest], dim=2)
    return shifted.view(rows, channels, height, width)


def _delay(x: Tensor) -> Tensor:
    """Replace every frame of `[B, T, C, H, W]` by the previous one, and the first by zeros."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


class TemporalShift(nn.Module):
    """`temporal_shift` as a layer without parameters: `[B*T, C, H, W]` in and out; `folds` as there."""

    folds: tuple[int, int] | None = None

    def __init__(self, num_segments: int, shift_div: int = 8, causal: bool = False):
        super().__init__()
        self.num_segments, self.shift_div, self.causal = num_segments, shift_div, causal

    def forward(self, x: Tensor) -> Tensor:
        return temporal_shift(x, self.num_segments, self.shift_div, self.causal, self.folds)


class Shift(nn.Module):
    """`net` after a temporal shift: `[B*T, C, H, W]` in, the output of `net` out; `folds` as in `temporal_shift`."""

    folds: tuple[int, int] | None = None

    def __init__(self, net: nn.Module, num_segments: int, shift_div: int, causal: bool):
        super().__init__()
        self.net, self.num_segments, self.shift_div, self.causal = net, num_segments, shift_div, causal

    def forward(self, x: Tensor) -> Tensor:
        return self.net(temporal_shift(x, self.num_segments, self.shift_div, self.causal, self.folds))


class TemporalPool(nn.Module):
    """`net` after a max pool over three frames with stride two: `[B*T, C, H, W]` -> `net([B*T/2, C, H, W])`."""

    def __init__(self, net: nn.Module, num_segments: int):
        super().__init__()
        self.net, self.num_segments = net, num_segments

    def forward(self, x: Tensor) -> Tensor:
        return self.net(temporal_pool(x, self.num_segments))


def temporal_pool(x: Tensor, num_segments: int) -> Tensor:
    """Return the maximum over frames t-1, t, t+1 at every second t: `[B*T, C, H, W]` -> `[B*ceil(T/2), C, H, W]`."""
    clips = x.view(-1, num_segments, *x.shape[1:]).transpose(1, 2)  # [B, C, T, H, W]
    return nn.functional.max_pool3d(clips, (3, 1, 1), (2, 1, 1), (1, 0, 0)).transpose(1, 2).flatten(0, 1)


class NonLocalAfter(nn.Module):
    """`block` followed by a non-local block over the clip: `[B*T, C, H, W]` in and out."""

    def __init__(self, block: nn.Module, channels: int, num_segments: int):
        super().__init__()
        self.block, self.nl, self.num_segments = block, NonLocal(channels), num_segments

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        clips = x.view(-1, self.num_segments, *x.shape[1:]).transpose(1, 2)
        return self.nl(clips).transpose(1, 2).reshape(x.shape)


class VideoNet2D(nn.Module):
    """A 2D backbone over the frames of a clip and the mean of their logits: `[B, T, C, H, W]` -> `[B, num_classes]`.

    `shift` turns TSN into TSM. As in the published checkpoints, the classifier is `new_fc` with dropout, and the
    backbone's own without. `num_segments` is T.
    """

    def __init__(
        self,
        base_model: ResNet | MobileNetV2,
        num_classes: int,
        num_segments: int,
        shift: bool,
        dropout: float,
        shift_div: int,
        causal: bool,
        place: str,
        temporal_pool: bool,
        non_local: bool,
    ):
        super().__init__()
        self.num_segments, self.causal = num_segments, causal
        self.num_outputs = -(-num_segments // 2) if temporal_pool else num_segments
        last = "fc" if isinstance(base_model, ResNet) else "classifier"
        self.head_name = "new_fc" if dropout > 0 else f"base_model.{last}"
        self.first_conv_name = "base_model.conv1" if isinstance(base_model, ResNet) else "base_model.features.0.0"
        head = nn.Linear(base_model.num_features, num_classes)
        nn.init.normal_(head.weight, 0, 0.001)
        nn.init.zeros_(head.bias)
        setattr(base_model, last, nn.Dropout(dropout) if dropout > 0 else head)
        self.base_model = base_model
        self.new_fc = head if dropout > 0 else None
        if isinstance(base_model, ResNet):
            stages = [num_segments] + [self.num_outputs] * 3
            if shift:
                _shift_resnet(base_model, stages, shift_div, causal, place)
            if non_local:
                _add_non_local(base_model, stages)
            if temporal_pool:
                base_model.layer2 = TemporalPool(base_model.layer2, num_segments)  # type: ignore[assignment]
        elif shift:
            _shift_mobilenetv2(base_model, num_segments, shift_div, causal)

    def per_frame(self) -> Mapping[str, nn.Module]:
        """Return the modules, by name, that in sequence turn frames `[B*T, C, H, W]` into the logits of each frame."""
        return {"base_model": self.base_model} | ({} if self.new_fc is None else {"new_fc": self.new_fc})

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.num_segments:  # else the logits of 16 frames would pass for 8 frames of twice the classes
            raise ValueError(f"a clip has {x.shape[1]} frames, but the network takes {self.num_segments}")
        logits = self.base_model(x.flatten(0, 1))
        if self.new_fc is not None:
            logits = self.new_fc(logits)
        return logits.view(x.shape[0], self.num_outputs, -1).mean(1)


def _stages(net: ResNet) -> list[nn.Sequential]:
    return [net.layer1, net.layer2, net.layer3, net.layer4]


def _shift_resnet(net: ResNet, num_segments: Sequence[int], shift_div: int, causal: bool, place: str) -> None:
    """Wrap the first convolution of each block (or the block) in a shift; in a ResNet-101 of every second block."""
    step = 2 if len(net.layer3) >= 23 else 1
    for stage, segments in zip(_stages(net), num_segments, strict=True):
        for i in range(0, len(stage), step if place == "blockres" else 1):
            if place == "blockres":
                stage[i].conv1 = Shift(stage[i].conv1, segments, shift_div, causal)  # type: ignore[arg-type]
            else:
                stage[i] = Shift(stage[i], segments, shift_div, causal)


def _add_non_local(net: ResNet, num_segments: Sequence[int]) -> None:
    for name, segments in (("layer2", num_segments[1]), ("layer3", num_segments[2])):
        stage = getattr(net, name)
        for i in NON_LOCAL_PLACES[name]:
            inner = stage[i].net if isinstance(stage[i], Shift) else stage[i]
            stage[i] = NonLocalAfter(stage[i], inner.conv3.out_channels, segments)


def _shift_mobilenetv2(net: MobileNetV2, num_segments: int, shift_div: int, causal: bool) -> None:
    """Wrap the expansion of every block that has a residual connection and expands."""
    for block in net.features:
        if isinstance(block, InvertedResidual) and block.residual and block.expansion != 1:
            block.conv[0] = Shift(block.conv[0], num_segments, shift_div, causal)


# ------------------------------------------------------------------------------------------------ online


class _Stream:
    """Buffers of one step of an online network, in and out, in the order of the shifts."""

    def __init__(self) -> None:
        self.incoming: list[Tensor] | None = None
        self.outgoing: list[Tensor] = []


class _CachedShift(nn.Module):
    """The causal shift of a single frame; the delayed channels are read from and written to the stream."""

    def __init__(self, shift: Shift | TemporalShift, stream: _Stream):
        super().__init__()
        self.shift_div, self.folds, self.stream = shift.shift_div, shift.folds, stream

    def forward(self, x: Tensor) -> Tensor:
        fold = x.shape[1] // self.shift_div if self.folds is None else self.folds[0]
        place = len(self.stream.outgoing)
        now = x[:, :fold]
        before = torch.zeros_like(now) if self.stream.incoming is None else self.stream.incoming[place]
        self.stream.outgoing.append(now)
        return torch.cat([before, x[:, fold:]], dim=1)


class _Cached(nn.Module):
    """`net` after the causal shift of a single frame."""

    def __init__(self, shift: Shift, stream: _Stream):
        super().__init__()
        self.net, self.shift = shift.net, _CachedShift(shift, stream)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.shift(x))


class PerFrame(Protocol):
    """A network over clips that `OnlineTSM` can convert: `VideoNet2D`, or a subnet of a supernet over clips."""

    training: bool

    @property
    def causal(self) -> bool: ...
    @property
    def num_segments(self) -> int: ...
    @property
    def num_outputs(self) -> int: ...
    def per_frame(self) -> Mapping[str, nn.Module]: ...


class OnlineTSM(nn.Module):
    """A causal TSM stepped frame by frame: `(frame [B, C, H, W], buffers) -> (logits [B, num_classes], buffers)`.

    `buffers` is a tuple with a tensor `[B, C//shift_div, h, w]` per shift; `initial_buffers` returns the zeros for the
    start of one. Nothing is kept between calls: the buffers are the whole state of a stream. The mean of the
    logits over a clip equals the output of the offline network. Raises ValueError for a network without online form.
    """

    def __init__(self, net: PerFrame):
        super().__init__()
        if not net.causal or net.num_outputs != net.num_segments:
            raise ValueError("OnlineTSM: needs a network built with causal=True and without temporal_pool")
        layers = copy.deepcopy(dict(net.per_frame()))
        self._names, self._stream, self.training = tuple(layers), _Stream(), net.training
        for name, layer in layers.items():
            self.add_module(name, layer)
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, NonLocalAfter):
                    raise ValueError("OnlineTSM: non-local blocks need the whole clip and have no online form")
                if isinstance(child, Shift):
                    setattr(parent, name, _Cached(child, self._stream).train(child.training))
                if isinstance(child, TemporalShift):
                    setattr(parent, name, _CachedShift(child, self._stream).train(child.training))

    def forward(self, frame: Tensor, buffers: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._run(frame, list(buffers))

    step = forward

    @torch.no_grad()
    def initial_buffers(self, batch: int, height: int, width: int, channels: int = 3) -> tuple[Tensor, ...]:
        """Return the zero buffers for a stream of frames `[batch, channels, height, width]`."""
        like = next(self.parameters())
        frame = torch.zeros(1, channels, height, width, dtype=like.dtype, device=like.device)
        with evaluating(self):
            _, shapes = self._run(frame, None)
        return tuple(b.new_zeros(batch, *b.shape[1:]) for b in shapes)

    def _run(self, frame: Tensor, buffers: list[Tensor] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        self._stream.incoming, self._stream.outgoing = buffers, []
        try:
            for name in self._names:
                frame = self.get_submodule(name)(frame)
            return frame, tuple(self._stream.outgoing)
        finally:
            self._stream.incoming, self._stream.outgoing = None, []
