"""Least-squares reconstruction: refits the weights of a pruned layer to its original outputs (AMC, arXiv 1802.03494).

For every convolution and linear layer that lost inputs, the remaining weights are fitted so that its outputs at random
places match those of the whole network; biases are unchanged. Published for 1x1 convolutions, here for every ungrouped
kernel: a row of the problem is the patch under the kernel.
"""

from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from slimray.compress.channels import Kept, dropped_atoms
from slimray.compress.groups import CONVS, Groups
from slimray.compress.labels import Lane
from slimray.models.modes import evaluating
from slimray.spec import UserError

POINTS = 10  # places per image, as published
LEAST_VARIED = 1e-3  # singular values below this share of the largest are dropped


def solve(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Return the weights `[out, in]` without intercept that map `inputs` `[n, in]` closest to `outputs` `[n, out]`.

    Directions in which the inputs hardly vary (nearly dead channels) are dropped: weights fitted to them are huge, and
    wrong as soon as an image activates them.
    """
    return np.linalg.lstsq(inputs, outputs, rcond=LEAST_VARIED)[0].T


def patches(module: nn.Module, x: Tensor, places: list[tuple[int, ...]]) -> Tensor:
    """Return the patches under the kernel of a convolution at `places` of its output: `[B * places, C * kernel]`."""
    pad = [amount for amount in reversed(module.padding) for _ in range(2)]  # type: ignore[arg-type]
    padded, rows = functional.pad(x, pad), []
    for place in places:
        part = padded
        sizes = zip(place, module.kernel_size, module.stride, module.dilation, strict=True)  # type: ignore[arg-type]
        for dim, (start, size, stride, dilation) in enumerate(sizes):
            index = start * stride + dilation * torch.arange(size, device=x.device)
            part = part.index_select(dim + 2, index)
        rows.append(part.flatten(1))
    return torch.stack(rows, 1).flatten(0, 1)


@torch.no_grad()
def reconstruct(
    net: nn.Module,
    small: nn.Module,
    groups: Groups,
    kept: Kept,
    batches: Iterable[Any],
    seed: int = 0,
    points: int = POINTS,
) -> list[str]:
    """Fit the layers of `small`, which `cut` made from `net`, in place, and return their names.

    `batches` are inputs of `net`, which runs in eval mode. The fits use the layer inputs of the whole network, as
    published. Layers with fewer rows than unknowns are left unchanged. Raises UserError without batches.
    """
    gone, rng = dropped_atoms(groups, kept), np.random.default_rng(seed)
    layers = {name: one for name, one in groups.layers.items() if _fits(net.get_submodule(name), one.inputs, gone)}
    rows: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in layers}

    def keep(name: str) -> Any:
        stay_in, stay_out = (_stay(lane, gone) for lane in (layers[name].inputs, layers[name].outputs))

        def hook(module: Any, inputs: Any, out: Tensor) -> None:
            x = inputs[0]
            bias = 0 if module.bias is None else module.bias
            if isinstance(module, nn.Linear):
                wanted = (out - bias).reshape(-1, out.shape[-1])
                found = x.reshape(-1, x.shape[-1])
                index = rng.choice(len(found), min(len(found), points * len(x)), replace=False)
                found, wanted = found[index][:, stay_in], wanted[index][:, stay_out]
            else:
                every = list(product(*map(range, out.shape[2:])))
                places = [every[i] for i in rng.choice(len(every), min(points, len(every)), replace=False)]
                found = patches(module, x[:, stay_in], places)
                at = torch.stack([out[(slice(None), slice(None), *place)] for place in places], 1).flatten(0, 1)
                wanted = (at - bias)[:, stay_out]
            rows[name].append((found.double().numpy(force=True), wanted.double().numpy(force=True)))

        return hook

    hooks = [net.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    count = 0
    try:
        with evaluating(net):
            for batch in batches:
                net(*batch) if isinstance(batch, tuple) else net(batch)
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise UserError("reconstruct: there are no samples to fit layers to, give some or turn it off")
    fitted = []
    for name, parts in rows.items():
        weight = small.get_submodule(name).weight
        inputs, outputs = (np.concatenate(side) for side in zip(*parts, strict=True))
        if len(inputs) >= inputs.shape[1]:
            weight.copy_(torch.from_numpy(solve(inputs, outputs)).view(weight.shape))  # type: ignore[operator]
            fitted.append(name)
    return fitted


def _stay(lane: Lane | None, gone: Lane) -> Tensor:
    assert lane is not None
    return torch.from_numpy(np.flatnonzero(~np.isin(lane, gone)))


def _fits(module: nn.Module, inputs: Lane | None, gone: Lane) -> bool:
    """Return True if a layer lost inputs and its kernel can be fitted."""
    if inputs is None or not np.isin(inputs, gone).any():
        return False
    plain = isinstance(module, CONVS) and module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear) or (plain and not isinstance(module.padding, str))
