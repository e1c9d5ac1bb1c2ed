"""MobileNetV2 for images, with the parameter names of the TSM checkpoints (`features.3.conv.0.weight`).

Input `[N, C, H, W]`, output `[N, num_classes]`. Inverted Residuals and Linear Bottlenecks (arXiv 1801.04381). Channels
are rounded up to multiples of 8; at any width the stem has 32 channels and the last layer at least 1,280, as in the
published video networks. torchvision's names are mapped on loading (published.py).
"""

import math

from torch import Tensor, nn

from slimray.models.resnet import init_convolutions

# expansion, channels, repeats, stride of the first
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM_CHANNELS, LAST_CHANNELS = 32, 1280


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    ]


class InvertedResidual(nn.Module):
    """Expand (1x1), filter depthwise (3x3), project (1x1): `[N, in, H, W]` -> `[N, out, H/stride, W/stride]`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        self.residual = stride == 1 and in_channels == out_channels
        self.expansion = expansion
        hidden = in_channels * expansion
        layers = [] if expansion == 1 else [*_conv(in_channels, hidden, 1), nn.ReLU6(inplace=True)]
        layers += [*_conv(hidden, hidden, 3, stride, hidden), nn.ReLU6(inplace=True), *_conv(hidden, out_channels, 1)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2; `classifier` is the last linear layer."""

    head_name, first_conv_name = "classifier", "features.0.0"

    def __init__(self, num_classes: int, width: float = 1.0, in_channels: int = 3, zero_gamma: bool = False):
        super().__init__()
        features: list[nn.Module] = [nn.Sequential(*_conv(in_channels, STEM_CHANNELS, 3, 2), nn.ReLU6(inplace=True))]
        channels = STEM_CHANNELS
        for expansion, base, repeats, stride in STAGES:
            out = math.ceil(base * width / 8) * 8 if expansion > 1 else base
            for i in range(repeats):
                features.append(InvertedResidual(channels, out, stride if i == 0 else 1, expansion))
                channels = out
        last = math.ceil(LAST_CHANNELS * max(1.0, width) / 8) * 8
        features.append(nn.Sequential(*_conv(channels, last, 1), nn.ReLU6(inplace=True)))
        self.features = nn.Sequential(*features)
        self.classifier: nn.Module = nn.Linear(last, num_classes)
        self.num_features = last
        init_convolutions(self)
        if zero_gamma:
            for block in self.features:
                if isinstance(block, InvertedResidual) and block.residual:
                    nn.init.zeros_(block.conv[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
