"""3D convolutions as 2D convolutions, for runtimes without 3D ones: XNNPACK, and with it ExecuTorch.

A slice of the output is a 2D convolution of as many input slices as the kernel is deep, with their channels
concatenated: one convolution over all slices as a batch, with the same number of products. A following BatchNorm is
folded in here, because afterwards it no longer follows a convolution directly and no exporter would fold it.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimray.compress import fold


class SlicedConv3d(nn.Module):
    """The same function as `conv`, `[B, C, D, H, W]` -> `[B, C', D', H', W']`, computed in 2D.

    Raises ValueError if `conv` has groups, dilation or a padding given by name.
    """

    def __init__(self, conv: nn.Conv3d):
        super().__init__()
        if not can_slice(conv):
            raise ValueError(f"{conv}: has groups, dilation or a padding given by name")
        self.deep, *kernel = conv.kernel_size
        self.stride, *stride = conv.stride
        self.padding, *padding = map(int, conv.padding)
        weight = conv.weight.detach().movedim(2, 1).flatten(1, 2)  # [C', kernel * C, kH, kW]
        self.conv = nn.Conv2d(weight.shape[1], len(weight), (kernel[0], kernel[1]), bias=conv.bias is not None)
        self.conv.stride, self.conv.padding = (stride[0], stride[1]), (padding[0], padding[1])
        self.conv.weight = nn.Parameter(weight)
        self.conv.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, D, H, W]` -> `[B, C', D', H', W']`."""
        slices = functional.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, 0, self.padding, self.padding))
        count = (slices.shape[1] - self.deep) // self.stride + 1
        last = self.stride * (count - 1) + 1
        stacked = torch.cat([slices[:, k : k + last : self.stride] for k in range(self.deep)], 2)
        return self.conv(stacked.flatten(0, 1)).unflatten(0, (-1, count)).transpose(1, 2)


def can_slice(module: nn.Module) -> bool:
    """Return True if a module is a 3D convolution that SlicedConv3d can compute."""
    if type(module) is not nn.Conv3d or isinstance(module.padding, str) or module.padding_mode != "zeros":
        return False
    return module.groups == 1 and set(module.dilation) == {1}


def sliced(net: nn.Module, example: tuple[Any, ...]) -> nn.Module:
    """Return `net` (in eval mode) with its 3D convolutions computed in 2D: a copy, or itself if it has none.

    `example` holds its arguments.
    """
    if not any(can_slice(module) for module in net.modules()):
        return net
    net = copy.deepcopy(net)
    pairs = fold.norm_pairs(net, example)
    fold.fold(net, [pair for pair in pairs if can_slice(net.get_submodule(pair[0]))])
    for module in list(net.modules()):
        if can_slice(module):
            fold.replace(net, module, SlicedConv3d(module))  # type: ignore[arg-type]
    return net
