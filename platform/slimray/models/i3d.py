"""I3D: a ResNet-50 inflated to 3D, the baseline for TSM.

Quo Vadis, Action Recognition? (arXiv 1705.07750); the ResNet forms of Non-local Neural Networks (1711.07971) and of the
table in 1811.08383. A clip `[B, T, 3, H, W]` in, `[B, num_classes]` out; parameter names are those of the 2D ResNet, so
that a 2D checkpoint can be inflated by repeating each kernel over time and dividing by its length (published.py).
"""

import torch
from torch import Tensor, nn

from slimray.models.nonlocal_block import NonLocal
from slimray.models.resnet import LAYERS, init_convolutions, scaled, zero_last_norms
from slimray.spec import UserError

ALTERNATE = {1: (1, 1, 1), 2: (1, 0, 1, 0), 3: (1, 0, 1, 0, 1, 0), 4: (0, 1, 0)}  # blocks whose conv1 is 3x1x1
INFLATIONS = ("3x1x1", "3x1x1_every", "3x3x3")
NON_LOCAL_PLACES = {2: (0, 2), 3: (0, 2, 4)}


def _conv3d(in_channels: int, out_channels: int, frames: int, kernel: int, stride: int = 1) -> nn.Conv3d:
    padding = (frames // 2, kernel // 2, kernel // 2)
    return nn.Conv3d(in_channels, out_channels, (frames, kernel, kernel), (1, stride, stride), padding, bias=False)


class Bottleneck3D(nn.Module):
    """A bottleneck over `[N, C, T, H, W]`; `frames` are the temporal lengths of its first and second convolution.

    A non-local block after it is its child `nl`, so that the blocks of a stage have the numbers of the 2D network.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, frames: tuple[int, int], non_local: bool = False):
        super().__init__()
        self.conv1 = _conv3d(in_channels, channels, frames[0], 1)
        self.bn1 = nn.BatchNorm3d(channels)
        self.conv2 = _conv3d(channels, channels, frames[1], 3, stride)
        self.bn2 = nn.BatchNorm3d(channels)
        self.conv3 = _conv3d(channels, channels * 4, 1, 1)
        self.bn3 = nn.BatchNorm3d(channels * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != channels * 4:
            self.downsample = nn.Sequential(
                _conv3d(in_channels, channels * 4, 1, 1, stride), nn.BatchNorm3d(channels * 4)
            )
        self.nl = NonLocal(channels * 4) if non_local else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.relu(self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x)))
        return out if self.nl is None else self.nl(out)


class I3D(nn.Module):
    """I3D ResNet-50. `inflation`: "3x1x1" (conv1 of every second block), "3x1x1_every", or "3x3x3" (every conv2).

    `stem_frames` and `stem_stride` are the first convolution's length and stride in time, `pool_stride` that of the
    first pooling, `temporal_pool` halves time after the first stage. `num_segments` is T, the frames of a clip.
    """

    head_name, first_conv_name = "fc", "conv1"

    def __init__(
        self,
        num_classes: int,
        num_segments: int = 32,
        width: float = 1.0,
        in_channels: int = 3,
        inflation: str = "3x1x1",
        stem_frames: int = 5,
        stem_stride: int = 2,
        pool_stride: int = 2,
        temporal_pool: bool = True,
        non_local: bool = False,
        dropout: float = 0.5,
        zero_gamma: bool = False,
    ):
        super().__init__()
        if temporal_pool and num_segments <= stem_stride * pool_stride:
            raise UserError(
                f"num_segments: {num_segments} frames are too few for stem_stride, pool_stride and temporal_pool: use "
                f"more than {stem_stride * pool_stride}, or temporal_pool: false"
            )
        self.num_segments = num_segments
        channels = scaled(64, width)
        self.conv1 = nn.Conv3d(
            in_channels, channels, (stem_frames, 7, 7), (stem_stride, 2, 2), (stem_frames // 2, 3, 3), bias=False
        )
        self.bn1 = nn.BatchNorm3d(channels)
        self.relu = nn.ReLU(inplace=True)
        long = 3 if pool_stride > 1 else 1
        self.maxpool = nn.MaxPool3d((long, 3, 3), (pool_stride, 2, 2), (long // 2, 1, 1))
        stages = []
        for stage, count in enumerate(LAYERS[50], start=1):
            inner, blocks = scaled(32 * 2**stage, width), []
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                looks_around = non_local and i in NON_LOCAL_PLACES.get(stage, ())
                blocks.append(Bottleneck3D(channels, inner, stride, _frames(inflation, stage, i), looks_around))
                channels = inner * 4
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.pool2 = nn.MaxPool3d((2, 1, 1)) if temporal_pool else nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions(self)
        nn.init.normal_(self.fc.weight, 0, 0.01)
        nn.init.zeros_(self.fc.bias)
        if zero_gamma:
            zero_last_norms(self, (Bottleneck3D,))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x.transpose(1, 2)))))  # [B, C, T, H, W]
        x = self.pool2(self.layer1(x))
        x = self.layer4(self.layer3(self.layer2(x)))
        return self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))


def _frames(inflation: str, stage: int, i: int) -> tuple[int, int]:
    """Return the temporal kernel lengths of conv1 and conv2 of block `i` of a stage."""
    if inflation == "3x3x3":
        return 1, 3
    return (3 if inflation == "3x1x1_every" or ALTERNATE[stage][i] else 1), 1
