"""Unstructured pruning: the smallest weights of each layer become zero (arXiv 1506.02626), and stay zero in training.

A layer is a convolution or a linear layer, identified by its name; biases and BatchNorm are unchanged. `sparsify` and
`sparsify_below` zero weights by a keep ratio or a threshold per layer and return the record. Masks for training come
from the weights themselves, where a zero is a pruned weight, so that a resumed run has the same masks without further
state.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimray.compress.quantized import FakeQuantized, Quantized
from slimray.spec import UserError, did_you_mean

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, FakeQuantized)


def layers_of(net: nn.Module) -> dict[str, Tensor]:
    """Return the weights of all convolutions and linear layers of `net` by layer name, shared weights once."""
    found: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, LAYERS) and not any(module.weight is known for known in found.values()):
            found[name] = module.weight
    return found


def density(net: nn.Module) -> dict[str, tuple[int, int]]:
    """Return, for each layer of `net`, its number of nonzero weights and its number of weights."""
    whole = {name: one.weight for name, one in net.named_modules() if isinstance(one, Quantized)}
    return {name: (int(torch.count_nonzero(w)), w.numel()) for name, w in (layers_of(net) | whole).items()}


def by_layer(net: nn.Module, given: float | Mapping[str, float], field: str) -> dict[str, float]:
    """Return the value of each layer of `net`: `given` for all, or only for the layers that `given` names.

    Raises UserError, with `field`, for a name that is not a layer.
    """
    layers = layers_of(net)
    if not isinstance(given, Mapping):
        return dict.fromkeys(layers, float(given))
    for name in given:
        if name not in layers:
            hint = did_you_mean(name, layers)
            raise UserError(f"{field}: unknown layer {name!r}{hint}")
    return {name: float(value) for name, value in given.items()}


@torch.no_grad()
def sparsify(net: nn.Module, keep: Mapping[str, float]) -> dict[str, Any]:
    """Keep the share `keep[layer]` (0 to 1, of all weights of the layer) with the largest magnitude; zero the others.

    Changes `net` in place and returns the record: layer -> [weights kept, weights]. The number kept is rounded, and at
    least 1; of equal magnitudes the first are kept; zeros stay zero. Raises UserError for a name that is not a layer.
    """
    layers = layers_of(net)
    for name, ratio in by_layer(net, keep, "keep").items():
        weight = layers[name]
        count = max(1, round(ratio * weight.numel()))
        order = weight.abs().flatten().sort(descending=True, stable=True).indices
        gone = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        gone[order[count:]] = True
        weight.masked_fill_(gone.view(weight.shape), 0)
    return _record(net)


@torch.no_grad()
def sparsify_below(net: nn.Module, quality: Mapping[str, float]) -> dict[str, Any]:
    """Zero the weights of each layer below `quality[layer]` times the standard deviation of its nonzero weights.

    Changes `net` in place and returns the record as `sparsify` does. A layer keeps at least its largest weight. Raises
    UserError for a name that is not a layer.
    """
    layers = layers_of(net)
    for name, factor in by_layer(net, quality, "quality").items():
        weight = layers[name]
        kept = weight[weight != 0]
        if kept.numel() < 2:
            continue
        limit = torch.minimum(factor * kept.std(correction=0), weight.abs().max())
        weight[weight.abs() < limit] = 0
    return _record(net)


def _record(net: nn.Module) -> dict[str, Any]:
    return {"step": "sparsify", "weights": {name: list(counts) for name, counts in density(net).items()}}


def scale_dropout(net: nn.Module) -> None:
    """Reduce the dropout before each sparse layer to D x sqrt(kept / all) (arXiv 1506.02626).

    A dropout belongs to the next convolution or linear layer in the order of the modules.
    """
    waiting: list[nn.Module] = []
    for module in net.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
            waiting.append(module)
        elif isinstance(module, LAYERS):
            share = int(torch.count_nonzero(module.weight)) / max(1, module.weight.numel())
            for dropout in waiting:
                dropout.p = dropout.p * math.sqrt(share)  # type: ignore[assignment]
            waiting = []


class Masks:
    """Training constraint for a sparse network: its zeros stay zero. Layers without zeros are not constrained."""

    def __init__(self, net: nn.Module):
        self.layers = {name: weight for name, weight in layers_of(net).items() if bool((weight == 0).any())}
        self.masks: dict[str, Tensor] = {name: weight.detach() != 0 for name, weight in self.layers.items()}

    def before_clipping(self) -> None:
        """Zero the gradients of pruned weights, so that their momentum and the weights themselves stay 0."""
        for name, weight in self.layers.items():
            if weight.grad is not None:
                weight.grad.mul_(self.masks[name])

    def before_step(self) -> None:
        """Do nothing: the gradients need no further change."""

    @torch.no_grad()
    def after_step(self) -> None:
        """Reset pruned weights to zero (never -0), whatever the optimizer did to them."""
        for name, weight in self.layers.items():
            weight.masked_fill_(~self.masks[name], 0)
