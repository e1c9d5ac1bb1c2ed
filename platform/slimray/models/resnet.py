"""ResNet-18/50/101 for images, with torchvision's parameter names, so that its published weights load.

Input `[N, C, H, W]`, output `[N, num_classes]`. Deep Residual Learning (arXiv 1512.03385); the stride of a bottleneck
sits in its 3x3 convolution, as in the published weights. `width` scales all channels; at 1 the counts are the paper's.
"""

import torch
from torch import Tensor, nn

LAYERS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def scaled(channels: int, width: float) -> int:
    """Return `channels` times `width`, rounded to the nearest multiple of 8, at least 8."""
    return max(8, round(channels * width / 8) * 8)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: `[N, in, H, W]` -> `[N, channels, H/stride, W/stride]`."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut: `[N, in, H, W]` -> `[N, 4*channels, H/stride, W/stride]`."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, channels * 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x)))


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return the projection for a shortcut that changes the shape, None if it does not."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """ResNet of `depth` 18, 50 or 101; `fc` is the classifier."""

    head_name, first_conv_name = "fc", "conv1"

    def __init__(
        self, depth: int, num_classes: int, width: float = 1.0, in_channels: int = 3, zero_gamma: bool = False
    ):
        super().__init__()
        block = BasicBlock if depth < 50 else Bottleneck
        channels = scaled(64, width)
        self.conv1 = nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages = []
        for stage, count in enumerate(LAYERS[depth]):
            inner = scaled(64 * 2**stage, width)
            blocks = []
            for i in range(count):
                blocks.append(block(channels, inner, 2 if stage and i == 0 else 1))
                channels = inner * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = nn.Linear(channels, num_classes)
        self.num_features = channels
        init_convolutions(self)
        if zero_gamma:
            zero_last_norms(self, (BasicBlock, Bottleneck))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def init_convolutions(net: nn.Module) -> None:
    """Apply He initialization by fan-out to every convolution (arXiv 1502.01852)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def zero_last_norms(net: nn.Module, blocks: tuple[type[nn.Module], ...]) -> None:
    """Zero the scale of every block's last BatchNorm, so that it starts as identity (arXiv 1706.02677)."""
    for module in net.modules():
        if isinstance(module, blocks):
            norms = [m for m in module.children() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d)]
            nn.init.zeros_(norms[-1].weight)
