"""CARN: super resolution by cascading residual units (arXiv 1803.08664), at one scale.

Takes pictures `[B, 3, h, w]` of any size, normalized as for all networks here, and returns RGB `[B, 3, h*s, w*s]`,
nominally in [0, 1] but not clipped. Within each block, and in the whole network, 1x1 convolutions take all previous
outputs (the cascade). The mobile form has grouped convolutions, and its blocks repeat one shared unit. As published,
the activation comes before the pixel shuffle. `width`, `blocks` and `units` can be smaller than the published 64, 3
and 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimray.spec import UserError

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, as published
PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation that normalize pictures
SCALES = (2, 3, 4)


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut; in the mobile form grouped, with a 1x1 convolution after them."""

    def __init__(self, width: int, groups: int = 1):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(width, width, 3, padding=1, groups=groups), nn.ReLU()]
        layers.append(nn.Conv2d(width, width, 3, padding=1, groups=groups))
        if groups > 1:
            layers += [nn.ReLU(), nn.Conv2d(width, width, 1)]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + x).relu()


class Cascade(nn.Module):
    """A chain of parts, each followed by a 1x1 convolution of the input and the outputs of all parts so far."""

    def __init__(self, parts: Sequence[nn.Module], width: int):
        super().__init__()
        self.order = [list(dict.fromkeys(parts)).index(part) for part in parts]
        self.parts = nn.ModuleList(dict.fromkeys(parts))  # a shared part is registered once
        self.joins = nn.ModuleList(nn.Conv2d(width * (place + 2), width, 1) for place in range(len(parts)))

    def forward(self, x: Tensor) -> Tensor:
        out, seen = x, [x]
        for number, join in zip(self.order, self.joins, strict=True):
            seen.append(self.parts[number](out))
            out = join(torch.cat(seen, 1)).relu()
        return out


class Upsample(nn.Module):
    """Enlarges two or three times by a convolution and a pixel shuffle, four times in two steps."""

    def __init__(self, width: int, scale: int, groups: int = 1):
        super().__init__()
        layers: list[nn.Module] = []
        for factor in [2, 2] if scale == 4 else [scale]:
            conv = nn.Conv2d(width, width * factor**2, 3, padding=1, groups=groups)
            layers += [conv, nn.ReLU(), nn.PixelShuffle(factor)]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Carn(nn.Module):
    """The network; `reach` is the radius, in input pixels, of its receptive field."""

    mean: Tensor
    shift: Tensor
    spread: Tensor

    def __init__(self, scale: int, width: int, blocks: int, units: int, groups: int, shared: bool):
        super().__init__()
        self.scale, self.head_name, self.first_conv_name = scale, "exit", "entry"
        self.reach = 4 + 2 * blocks * units
        self.entry = nn.Conv2d(3, width, 3, padding=1)

        def block() -> Cascade:
            one = Residual(width, groups)
            return Cascade([one if shared else Residual(width, groups) for _ in range(units)], width)

        self.body = Cascade([block() for _ in range(blocks)], width)
        self.upsample = Upsample(width, scale, groups)
        self.exit = nn.Conv2d(width, 3, 3, padding=1)
        for name, values in (("mean", RGB_MEAN), ("shift", PIXELS[0]), ("spread", PIXELS[1])):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.spread + self.shift - self.mean
        return self.exit(self.upsample(self.body(self.entry(x)))) + self.mean


def carn(
    *, scale: int, width: int = 64, blocks: int = 3, units: int = 3, groups: int = 1, shared: bool = False
) -> Carn:
    """Build CARN; raise UserError for a scale other than 2, 3 or 4, or groups that do not divide the width."""
    if scale not in SCALES:
        raise UserError(f"scale: must be 2, 3 or 4 (got {scale})")
    if width % groups:
        raise UserError(f"groups: must divide width ({width}), got {groups}")
    return Carn(scale, width, blocks, units, groups, shared)
