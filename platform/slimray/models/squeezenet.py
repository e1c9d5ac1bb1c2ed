"""SqueezeNet 1.0 (arXiv 1602.07360) with torchvision's parameter names, so that its published weights load.

Input `[N, C, H, W]`, output `[N, num_classes]`: the mean over the picture of a 1x1 convolution. A fire module squeezes
channels by a 1x1 convolution and expands them by parallel 1x1 and 3x3 convolutions. It has 1,248,424 weights and biases
for 1000 classes.
"""

import torch
from torch import Tensor, nn


class Fire(nn.Module):
    """A fire module: `[N, in, H, W]` -> `[N, 2 * expand, H, W]`."""

    def __init__(self, in_channels: int, squeeze: int, expand: int):
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.expand1x1(x)), torch.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.0; `width` scales all channels except the classes, to multiples of 8."""

    head_name, first_conv_name = "classifier.1", "features.0"

    def __init__(self, num_classes: int, width: float = 1.0, in_channels: int = 3, dropout: float = 0.5):
        super().__init__()

        def wide(channels: int) -> int:
            return channels if width == 1 else max(8, round(channels * width / 8) * 8)

        def pool() -> nn.Module:
            return nn.MaxPool2d(3, 2, ceil_mode=True)

        layers: list[nn.Module] = [nn.Conv2d(in_channels, wide(96), 7, 2), nn.ReLU(), pool()]
        channels = wide(96)
        for number, (squeeze, expand) in enumerate(
            ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
        ):
            layers.append(Fire(channels, wide(squeeze), wide(expand)))
            channels = 2 * wide(expand)
            if number in (2, 6):
                layers.append(pool())
        self.features = nn.Sequential(*layers)
        head = nn.Conv2d(channels, num_classes, 1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), head, nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(head.weight, 0, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)
