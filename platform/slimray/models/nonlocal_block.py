"""The non-local block: every position of a clip attends to every other (Non-local Neural Networks, arXiv 1711.07971).

Embedded Gaussian on `[N, C, T, H, W]`: softmax of plain dot products (no 1/sqrt(d)), keys and values pooled 2x2 in
space, half the channels inside. The last BatchNorm is initialized with zeros, so the block starts as identity.
"""

import torch
from torch import Tensor, nn


class NonLocal(nn.Module):
    """`[N, C, T, H, W]` -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        inner = channels // 2
        pool = nn.MaxPool3d((1, 2, 2))
        self.g = nn.Sequential(nn.Conv3d(channels, inner, 1), pool)
        self.theta = nn.Conv3d(channels, inner, 1)
        self.phi = nn.Sequential(nn.Conv3d(channels, inner, 1), pool)
        self.W = nn.Sequential(nn.Conv3d(inner, channels, 1), nn.BatchNorm3d(channels))
        nn.init.zeros_(self.W[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.W[1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        queries = self.theta(x).flatten(2).transpose(1, 2)  # [N, THW, C/2]
        keys = self.phi(x).flatten(2)  # [N, C/2, THW/4]
        values = self.g(x).flatten(2).transpose(1, 2)  # [N, THW/4, C/2]
        attended = torch.softmax(queries @ keys, dim=-1) @ values  # [N, THW, C/2]
        return self.W(attended.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])) + x
