"""ResNet-20 and deeper variants for pictures of 32 pixels, with the parameter names of the published CIFAR-10 weights.

Input `[N, C, H, W]`, output `[N, num_classes]`. Deep Residual Learning (arXiv 1512.03385), section 4.2: three stages of
16, 32 and 64 channels, 6n + 2 layers. A shortcut whose shape changes has no weights ("option A"): it takes every second
pixel and adds zero channels on both sides. Published weights expect 32 pixels without resizing (`data: {size: 32,
resize: 32}`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimray.models.resnet import init_convolutions, scaled


class PadShortcut(nn.Module):
    """Takes every `stride`-th pixel, and adds zero channels: `low` before the others, `high` after them."""

    def __init__(self, low: int, high: int, stride: int):
        super().__init__()
        self.low, self.high, self.stride = low, high, stride

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.low, self.high))


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights: `[N, in, H, W]` -> `[N, channels, H/stride, W/stride]`."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        more, low = channels - in_channels, (channels - in_channels) // 2
        changes = stride != 1 or more
        self.shortcut: nn.Module = PadShortcut(low, more - low, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of `depth` 6n + 2 layers; `fc` is the classifier."""

    head_name, first_conv_name = "fc", "conv1"

    def __init__(self, depth: int, num_classes: int, width: float = 1.0, in_channels: int = 3):
        super().__init__()
        channels = scaled(16, width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        stages = []
        for stage in range(3):
            blocks = []
            for i in range((depth - 2) // 6):
                out = scaled(16 * 2**stage, width)
                blocks.append(CifarBlock(channels, out, 2 if stage and i == 0 else 1))
                channels = out
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = nn.Linear(channels, num_classes)
        self.num_features = channels
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        return self.fc(torch.flatten(self.avgpool(x), 1))
