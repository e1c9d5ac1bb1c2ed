"""Importance of channels: a score for every channel of every group, and the selection of those that are kept.

`CRITERIA` are "l1" and "l2" (norms of the weights that make a channel, arXiv 1608.08710), "input_l1" (of the weights
that use it, as AMC ranks, 1802.03494), "bn" (the scale of its BatchNorms, 1708.06519), "taylor" (the square of weight
times gradient, summed over the weights that make it, 1906.10771: needs losses) and "group" (the L2 norms of all weights
that make or use it, each relative to its layer's mean, 2301.12900), whose values are comparable across groups.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from slimray.compress.groups import CONVS, MAKERS, NORMS, TRANSPOSED, Group, Groups
from slimray.compress.labels import Lane
from slimray.spec import UserError, did_you_mean

Floats = NDArray[np.float64]
Losses = Callable[[nn.Module], Iterable[Tensor]]  # a scalar loss for each batch, with a graph
CRITERIA = ("l1", "l2", "input_l1", "bn", "taylor", "group")


def importance(
    net: nn.Module, groups: Groups, criterion: str = "l1", losses: Losses | None = None
) -> dict[str, Floats]:
    """Return the scores of all channels, per group `[size]`; at least 0, higher is more important.

    `losses(net)` yields a scalar per batch, only for "taylor"; the network's gradients are cleared afterwards. Raises
    UserError for an unknown criterion, one that does not apply to a group, or "taylor" without losses.
    """
    if criterion not in CRITERIA:
        raise UserError(f"criterion: unknown criterion {criterion!r}{did_you_mean(criterion, CRITERIA)}")
    scores = _taylor(net, groups, losses) if criterion == "taylor" else _norms(net, groups, criterion)
    out = {}
    for group in groups.groups:
        found = [by_atom(group, lane, values) for lane, values in scores if np.isin(group.atoms[:1], lane).any()]
        found = [one for one in found if one.any()]
        if not found:
            raise UserError(f"criterion: {criterion}: group {group.name} has no such weights, choose another criterion")
        if criterion == "group":
            found = [one / one.mean() for one in found]
        out[group.name] = np.sum(found, axis=0) / (len(found) if criterion == "group" else 1)
    return out


def by_atom(group: Group, lane: Lane, values: Floats) -> Floats:
    """Return the values of a layer's channels, summed over each atom of a group, `[size]`."""
    order = np.argsort(group.atoms)
    places = np.searchsorted(group.atoms[order], lane).clip(0, group.size - 1)
    mine = group.atoms[order][places] == lane
    out = np.zeros(group.size)
    np.add.at(out, order[places[mine]], values[mine])
    return out


def _norms(net: nn.Module, groups: Groups, criterion: str) -> list[tuple[Lane, Floats]]:
    """Return, for every layer, the numbers of its channels and their scores."""
    out: list[tuple[Lane, Floats]] = []
    for layer in groups.layers.values():
        module, weight = net.get_submodule(layer.name), getattr(net.get_submodule(layer.name), "weight", None)
        if isinstance(module, NORMS):
            if criterion == "bn" and weight is not None and layer.outputs is not None:
                out.append((layer.outputs, weight.detach().abs().double().numpy(force=True)))
            continue
        if not isinstance(module, MAKERS) or criterion == "bn" or layer.inputs is None or layer.outputs is None:
            continue
        rows = weight.detach().double().abs()  # type: ignore[union-attr]
        power = 1 if criterion in ("l1", "input_l1") else 2
        made, used = _sides(module, rows**power)
        root = 1 / power
        if criterion != "input_l1":
            out.append((layer.outputs, made**root))
        by_depth = isinstance(module, CONVS) and module.groups == module.in_channels and module.groups > 1
        if criterion in ("input_l1", "group") and not by_depth:
            out.append((layer.inputs, used**root))
    return out


def _sides(module: nn.Module, values: Tensor) -> tuple[Floats, Floats]:
    """Return the sums of a weight's `values` per output channel and per input channel."""
    if isinstance(module, TRANSPOSED):
        values = values.transpose(0, 1)
    flat = values.flatten(2) if values.ndim > 2 else values[..., None]
    made, used = flat.sum((1, 2)).numpy(force=True), flat.sum((0, 2)).numpy(force=True)
    repeats = getattr(module, "groups", 1)
    return made, np.tile(used, repeats) if repeats > 1 else used


def _taylor(net: nn.Module, groups: Groups, losses: Losses | None) -> list[tuple[Lane, Floats]]:
    if losses is None:
        raise UserError("criterion: taylor needs `losses`, a function of the network that yields a loss per batch")
    layers = [one for one in groups.layers.values() if isinstance(one.module, MAKERS) and one.outputs is not None]
    sums: dict[str, Floats] = {}
    net.zero_grad()
    for loss in losses(net):
        loss.backward()
        for layer in layers:
            weight = net.get_submodule(layer.name).weight
            if isinstance(weight, nn.Parameter) and weight.grad is not None:
                made, _ = _sides(layer.module, (weight * weight.grad).detach().double())
                sums[layer.name] = sums.get(layer.name, np.zeros(len(made))) + made**2
        net.zero_grad()
    return [(layer.outputs, sums[layer.name]) for layer in layers if layer.name in sums]  # type: ignore[misc]


def strongest(scores: Mapping[str, Floats], counts: Mapping[str, int]) -> dict[str, list[int]]:
    """Return the indices of the `counts` highest scores of each group, ascending; of equal scores the first win."""
    kept = {}
    for name, count in counts.items():
        order = np.argsort(-scores[name], kind="stable")[:count]
        kept[name] = sorted(order.tolist())
    return kept
