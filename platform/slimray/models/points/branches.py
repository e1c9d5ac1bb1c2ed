"""Responses of the two branches of a PVConv: the strength of each at every point of a cloud.

In: a network and one cloud. Out: for each PVConv the lengths of the feature vectors of its voxel branch and its point
branch, which it adds up, as in the figures of Point-Voxel CNN (arXiv 1907.03739). Coordinates are returned as well,
because a PVConv of PVCNN++ or of a frustum network sees fewer points than the network, or relative to another origin.
Surprising: each PVConv is run twice, since its output does not reveal the two terms of the sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimray.models.modes import evaluating
from slimray.models.points.pvcnn import PVConv


@dataclass(frozen=True, eq=False)
class BranchResponse:
    """One PVConv: its name in the network, its points `coords` `[3, n]`, `voxel` and `point` `[n]`, all float32.

    The two are L2 norms over the channels of each branch's output, before they are added.
    """

    name: str
    coords: np.ndarray
    voxel: np.ndarray
    point: np.ndarray


@torch.no_grad()
def branch_responses(net: nn.Module, points: Tensor) -> list[BranchResponse]:
    """Return the responses of all PVConvs of `net` to a cloud `[1, C, N]`, in order of execution; [] without PVConvs.

    Runs in eval mode, float32, on the device of `net`, and always gives the same result, even if the network draws
    points at random. Restores mode, hooks and random state. Raises ValueError for any other number of clouds.
    """
    if points.ndim != 3 or len(points) != 1:
        raise ValueError(f"points: must be one cloud [1, C, N], got {list(points.shape)}")
    blocks = {name: module for name, module in net.named_modules() if isinstance(module, PVConv)}
    if not blocks:
        return []
    found: list[BranchResponse] = []
    hooks = [block.register_forward_hook(_recorder(name, found)) for name, block in blocks.items()]
    device = next(net.parameters()).device
    try:
        with evaluating(net), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            net(points.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _recorder(name: str, found: list[BranchResponse]) -> Callable[..., None]:
    """Return a forward hook that appends the response of a PVConv to `found`."""

    def record(block: Any, inputs: tuple[Any, ...], _: Any) -> None:
        voxel, point = (branch.float().norm(dim=1)[0].cpu().numpy() for branch in block.branches(inputs[0]))
        found.append(BranchResponse(name, inputs[0][1][0].float().cpu().numpy(), voxel, point))

    return record
