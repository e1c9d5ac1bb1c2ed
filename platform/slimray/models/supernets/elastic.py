"""Building blocks of all supernets: layers that run on their first channels, plain copies of them, channel sorting.

A layer of a supernet holds the weights of its widest form. `sliced_conv`, `sliced_norm` and `sliced_linear` run an
ordinary torch layer on the first channels only: as many as the input has, and the requested number of outputs. `take`
copies the same slices into a plain layer, so that a supernet and its extracted subnet use the same numbers.
Once-for-All: Train One Network and Specialize it for Efficient Deployment (arXiv 1908.09791). Surprising: in train mode
a sliced BatchNorm updates the first entries of the shared running statistics in place, as published, so the statistics
of a subnet are meaningless until `recalibrate_norms` was applied to the extracted network.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimray.arch import Gene
from slimray.spec import UserError

Spans = Sequence[tuple[int, int]]  # (first channel, number of channels) of each part of an input
_CONVS: dict[int, Callable[..., Tensor]] = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
SE_REDUCTION = 4


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Round `channels` to the nearest multiple of `divisor`, at least one, never more than 10 % below `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


# ------------------------------------------------------------------------------------------------ sliced layers


def sliced_conv(conv: nn.Module, x: Tensor, out_channels: int | None = None, spans: Spans | None = None) -> Tensor:
    """Run `conv` (1D, 2D or 3D) on its first channels: `[N, in, ...]` -> `[N, out_channels, ...]` (None: all).

    The input holds the first channels of the full input of `conv`; if it is a concatenation of several slices, `spans`
    lists the start and length of each. A depthwise convolution keeps the channels of its input. Raises ValueError for
    other grouped convolutions.
    """
    conv = cast(nn.Conv2d, conv)
    groups, out = 1, out_channels
    if conv.groups > 1:
        if conv.groups != conv.in_channels:
            raise ValueError("sliced_conv: a grouped convolution can only be sliced if it is depthwise")
        groups = out = x.shape[1]
    weight, bias = _first(conv.weight, out, None if groups > 1 else x.shape[1], spans), _first(conv.bias, out)
    return _CONVS[weight.ndim](x, weight, bias, conv.stride, conv.padding, conv.dilation, groups)


def sliced_linear(linear: nn.Module, x: Tensor, out_features: int | None = None, spans: Spans | None = None) -> Tensor:
    """Run `linear` on its first features: `[..., in]` -> `[..., out_features]` (None: all).

    `spans` as in `sliced_conv`.
    """
    linear = cast(nn.Linear, linear)
    weight = _first(linear.weight, out_features, x.shape[-1], spans)
    return functional.linear(x, weight, _first(linear.bias, out_features))


def sliced_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Run a BatchNorm on its first features, those of `x` `[N, C, ...]`, in the train or eval mode of `norm`.

    In train mode the first C running statistics are updated in place. With a single value per channel, which has no
    variance, they are used instead and not updated. Raises UserError for a SyncBatchNorm.
    """
    if isinstance(norm, nn.SyncBatchNorm):
        raise UserError("norm: sync does not work for supernets, whose BatchNorm is per worker: use norm: local")
    norm = cast(nn.BatchNorm2d, norm)
    channels, momentum = x.shape[1], norm.momentum
    mean, var = _first(norm.running_mean, channels), _first(norm.running_var, channels)
    training = (norm.training and x.numel() > channels) or mean is None
    if norm.training and training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        momentum = 1 / float(norm.num_batches_tracked) if momentum is None else momentum
    weight, bias = _first(norm.weight, channels), _first(norm.bias, channels)
    return functional.batch_norm(x, mean, var, weight, bias, training, momentum or 0.0, norm.eps)


def _first(value: Tensor | None, out: int | None, inputs: int | None = None, spans: Spans | None = None) -> Any:
    """Return the first `out` rows (None: all) and `inputs` columns of `value`, or the columns of `spans`."""
    if value is None:
        return None
    value = value if out is None or out == len(value) else value[:out]
    if spans is not None:
        return torch.cat([value[:, start : start + count] for start, count in spans], 1)
    return value if inputs is None or inputs == value.shape[1] else value[:, :inputs]


def take(plain: nn.Module, source: nn.Module, spans: Spans | None = None) -> None:
    """Give every tensor of `plain` a copy of the first rows and columns of the tensor of the same name in `source`.

    `plain` defines the sizes and may be on the meta device; afterwards its tensors have the device and type of `source`
    but share no memory with it, and a BatchNorm also gets its `eps` and `momentum`. The extra level of names of elastic
    layers is skipped, and an `ElasticDepthwise` provides the kernel of the required size. `spans` selects other columns
    of the weight than the first. Raises ValueError if a tensor of `source` is too small.
    """
    source = getattr(source, _LEVEL[type(source)]) if type(source) in _LEVEL else source
    for name, like in list(plain.named_parameters(recurse=False)):
        if isinstance(source, ElasticDepthwise):
            value = source.filter(like.shape[0], like.shape[-1]).detach()
        else:
            value = cast(Tensor, getattr(source, name)).detach()
        copied = _slice(value, like.shape, spans if name == "weight" else None)
        plain.register_parameter(name, nn.Parameter(copied, like.requires_grad))
    for name, like in list(plain.named_buffers(recurse=False)):
        setattr(plain, name, _slice(getattr(source, name), like.shape, None))
    if isinstance(plain, nn.modules.batchnorm._BatchNorm):
        plain.eps, plain.momentum = cast(nn.BatchNorm2d, source).eps, cast(nn.BatchNorm2d, source).momentum
    for name, child in plain.named_children():
        if any(True for _ in child.parameters()) or any(True for _ in child.buffers()):
            take(child, getattr(source, name), spans)


def _slice(value: Tensor, shape: torch.Size, spans: Spans | None) -> Tensor:
    if spans is not None:
        value = torch.cat([value[:, start : start + count] for start, count in spans], 1)
    value = value[tuple(slice(size) for size in shape)]
    if value.shape != shape:
        raise ValueError(f"take: {list(shape)} is not a slice of {list(value.shape)}")
    return value.clone(memory_format=torch.contiguous_format)


class ElasticConv(nn.Module):
    """A convolution with sliced channels, under the name `conv`, the extra level of names in published supernets."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, out_channels: int | None = None) -> Tensor:
        return sliced_conv(self.conv, x, out_channels)


class ElasticNorm(nn.Module):
    """A BatchNorm with sliced features, under the name `bn`."""

    def __init__(self, bn: nn.Module):
        super().__init__()
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        return sliced_norm(self.bn, x)


class ElasticLinear(nn.Module):
    """A linear layer with sliced features, under the name `linear`."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, out_features: int | None = None) -> Tensor:
        return sliced_linear(self.linear, x, out_features)


class ElasticDepthwise(nn.Module):
    """A depthwise 2D convolution with several kernel sizes: each is the centre of the next, times a learned matrix.

    `kernels` are odd, ascending. The matrices `7to5_matrix`, ... act on the flat kernel, are shared by all channels and
    start as identity.
    """

    def __init__(self, channels: int, kernels: Sequence[int], stride: int = 1):
        super().__init__()
        self.kernels = tuple(sorted(set(kernels)))
        for small, large in itertools.pairwise(self.kernels):
            self.register_parameter(f"{large}to{small}_matrix", nn.Parameter(torch.eye(small * small)))
        largest = self.kernels[-1]
        self.conv = nn.Conv2d(channels, channels, largest, stride, largest // 2, groups=channels, bias=False)

    def filter(self, channels: int, kernel: int) -> Tensor:
        """Return the weights `[channels, 1, kernel, kernel]` for a kernel size; raise ValueError if unknown."""
        if kernel not in self.kernels:
            raise ValueError(f"kernel: {kernel} is not one of {self.kernels}")
        weight = _first(self.conv.weight, channels)
        for small, large in reversed(list(itertools.pairwise(self.kernels))):
            if kernel < large:
                edge = (large - small) // 2
                centre = weight[:, :, edge : edge + small, edge : edge + small].flatten(2)
                matrix = self.get_parameter(f"{large}to{small}_matrix")
                weight = functional.linear(centre, matrix).view(channels, 1, small, small)
        return weight

    def forward(self, x: Tensor, kernel: int) -> Tensor:
        channels = x.shape[1]
        weight = self.filter(channels, kernel)
        return functional.conv2d(x, weight, None, self.conv.stride, kernel // 2, 1, channels)


_LEVEL = {ElasticConv: "conv", ElasticNorm: "bn", ElasticLinear: "linear"}  # the level of names added by each


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: `[N, C, H, W]` times a factor per channel, `relu6(. + 3) / 6` of a small network.

    In a supernet `sliced_squeeze` runs it on its first channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        middle = make_divisible(channels // SE_REDUCTION)
        self.fc = nn.Sequential(
            OrderedDict(
                reduce=nn.Conv2d(channels, middle, 1),
                relu=nn.ReLU(inplace=True),
                expand=nn.Conv2d(middle, channels, 1),
                h_sigmoid=nn.Hardsigmoid(inplace=True),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3), keepdim=True))


def sliced_squeeze(se: nn.Module, x: Tensor) -> Tensor:
    """Run a `SqueezeExcite` on its first channels, those of `x`; its middle channels shrink with them."""
    channels, layers = x.shape[1], cast(Any, se).fc
    middle = sliced_conv(layers.reduce, x.mean((2, 3), keepdim=True), make_divisible(channels // SE_REDUCTION))
    return x * functional.hardsigmoid(sliced_conv(layers.expand, functional.relu(middle), channels))


# --------------------------------------------------------------------------------------------------------- units


@dataclass(frozen=True)
class Unit:
    """A piece of a network whose latency is measured separately; units with the same `key` do the same work.

    `input` is its input shape without the batch, `make` builds a new module. `counted` builds the module for counting
    parameters and MACs, if it is a different one; None means that of `make`.
    """

    key: str
    input: tuple[int, ...]
    make: Callable[[], nn.Module] = field(compare=False)
    counted: Callable[[], nn.Module] | None = field(default=None, compare=False)


# ------------------------------------------------------------------------------------------------------- sorting


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that can be reordered together without changing the output of the whole supernet.

    `makers` are the layers that produce them (convolutions, BatchNorms, depthwise ones, the output of an SE), `users`
    the layers that consume them, at the first input channel or, given as a pair, from another one on. `judges`, some of
    the users, determine the importance of a channel. `sizes` maps a gene of `dimension` to its number of channels. If
    that depends on several dimensions, `tiers` returns the numbers of channels for all freed values instead.
    """

    dimension: str
    sizes: Mapping[Gene, int]
    makers: tuple[nn.Module, ...]
    users: tuple[nn.Module | tuple[nn.Module, int], ...]
    judges: tuple[nn.Module, ...]
    tiers: Callable[[Mapping[str, Sequence[Gene]]], Sequence[int]] | None = None


@torch.no_grad()
def sort_channels(net: nn.Module, freed: Mapping[str, Sequence[Gene]] | None = None) -> None:
    """Sort the channels of a supernet in place, most important first, without changing the output of the whole network.

    Importance is the L1 norm of the weights that consume a channel. `freed` are the values that training has already
    freed (`{"expand": (4, 6)}`): channels are only reordered within the range between two of these widths, so that the
    outputs of subnets with these values do not change either. `net.channel_groups()` returns the channels that belong
    together; a dimension without a group is ignored.
    """
    freed = freed or {}
    for group in cast(Any, net).channel_groups():
        weights = [_weight(judge) for judge in group.judges]
        total = sum(weight.abs().transpose(0, 1).flatten(1).sum(1) for weight in weights)
        tiers = [group.sizes[gene] for gene in freed.get(group.dimension, ()) if gene in group.sizes]
        order = channel_order(cast(Tensor, total), group.tiers(freed) if group.tiers else tiers)
        for maker in group.makers:
            permute_outputs(maker, order)
        for user in group.users:
            permute_inputs(*user, order=order) if isinstance(user, tuple) else permute_inputs(user, order=order)


def channel_order(importance: Tensor, tiers: Sequence[int] = ()) -> Tensor:
    """Return the channel numbers, most important first, int64 `[C]`; no channel crosses a tier."""
    edges = sorted({0, len(importance), *(tier for tier in tiers if tier < len(importance))})
    parts = [
        start + importance[start:end].argsort(descending=True, stable=True) for start, end in itertools.pairwise(edges)
    ]
    return torch.cat(parts)


def permute_outputs(module: nn.Module, order: Tensor) -> None:
    """Reorder the output channels of a convolution, linear layer or BatchNorm in place by `order` `[C]`."""
    for value in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        if value.ndim:  # not a BatchNorm's count of batches, a scalar
            value.data.copy_(value.data[order.to(value.device)])


def permute_inputs(module: nn.Module, start: int = 0, *, order: Tensor) -> None:
    """Reorder the input channels `start`, ... of a convolution or linear layer in place by `order` `[C]`."""
    weight = _weight(module)
    part = weight[:, start : start + len(order)]
    part.copy_(part[:, order.to(weight.device)].clone())


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight).data
