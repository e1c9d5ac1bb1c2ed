"""LeNet-300-100 and Caffe's LeNet-5 for 28 x 28 pictures with one channel, the networks of Deep Compression
(arXiv 1510.00149).

Input `[N, C, S, S]`, output `[N, num_classes]`. LeNet-300-100 has three linear layers, with 266,610 weights and biases
for 10 classes; LeNet-5 has two 5x5 convolutions without padding (20 and 50 channels), each with 2x2 pooling, and two
linear layers, with 431,080. As in Caffe's LeNet-5, there is no activation after the convolutions.
"""

import torch
from torch import Tensor, nn

from slimray.spec import UserError


class LeNet300(nn.Module):
    """Linear layers of 300 and 100 units; `side` is the side of the picture in pixels (`data.size`)."""

    head_name, first_conv_name = "ip3", "ip1"

    def __init__(self, num_classes: int, in_channels: int = 1, side: int = 28):
        super().__init__()
        self.ip1 = nn.Linear(in_channels * side * side, 300)
        self.ip2 = nn.Linear(300, 100)
        self.ip3 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.ip1(torch.flatten(x, 1)))
        return self.ip3(torch.relu(self.ip2(x)))


class LeNet5(nn.Module):
    """Two convolutions and two linear layers; `side` is that of the picture in pixels (`data.size`), at least 16."""

    head_name, first_conv_name = "ip2", "conv1"

    def __init__(self, num_classes: int, in_channels: int = 1, side: int = 28):
        super().__init__()
        if side < 16:
            raise UserError(f"model lenet5: side: must be at least 16 (got {side})")
        rest = ((side - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool = nn.MaxPool2d(2)
        self.ip1 = nn.Linear(50 * rest * rest, 500)
        self.ip2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv2(self.pool(self.conv1(x))))
        return self.ip2(torch.relu(self.ip1(torch.flatten(x, 1))))
