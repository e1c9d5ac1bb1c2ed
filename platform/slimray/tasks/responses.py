"""Responses of the branches of a network's PVConvs, for the examples of a report."""

import numpy as np
import torch

from slimray.models.points.branches import branch_responses
from slimray.models.points.pvcnn import PVConv
from slimray.runs.examples import ResponseView
from slimray.tasks.network import Network

EXPLAINED = 2  # clouds per run that are shown with the responses of the PVConvs' branches


def responses(network: Network, view: np.ndarray, number: int) -> list[ResponseView]:
    """Return the responses of the two branches of each PVConv to points `[C, N]`.

    [] for a network without PVConvs, and from example `number` EXPLAINED on.
    """
    if number >= EXPLAINED or not any(isinstance(module, PVConv) for module in network.net.modules()):
        return []
    found = branch_responses(network.net, torch.from_numpy(view)[None].to(network.device))
    return [ResponseView(one.name, one.voxel, one.point, one.coords.T) for one in found]
