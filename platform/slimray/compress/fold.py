"""Folds BatchNorm into the preceding layer: finds the pairs by running the network once, and folds them.

A pair is a convolution or linear layer whose output goes to one BatchNorm and nowhere else (nor is returned by the
network), every time it is called. Pairs are found by watching a forward pass, not by names, so this works on any module
that runs. In eval mode a folded network computes the same, up to rounding; the BatchNorm becomes an Identity and the
layer gets a bias.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from slimray.models.modes import called, evaluating

LAYERS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Uses(TorchFunctionMode):
    """Counts how many operations take each tensor; keeps all tensors alive, so that ids are unique."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()
        self.held: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(one, Tensor) for one in tree_leaves(out)):
            taken = {id(one): one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
            self.count.update(taken.keys())
            self.held += [*taken.values(), out]
        return out


def norm_pairs(net: nn.Module, example: Any) -> list[tuple[str, str]]:
    """Return the names of the pairs (layer, BatchNorm) of `net` that can be folded, in the order in which they run.

    `example` is an input of `net`, batch first, or a tuple of arguments. The network is run once in eval mode and left
    unchanged.
    """
    names = {id(module): name for name, module in net.named_modules()}
    made: dict[int, int] = {}  # output of a layer -> the layer
    calls: Counter[int] = Counter()
    pairs: list[tuple[int, int, int]] = []  # layer, norm, the tensor between them

    def after(module: nn.Module, _: Any, out: Any) -> None:
        calls[id(module)] += 1
        if isinstance(out, Tensor):
            made[id(out)] = id(module)
            uses.held.append(out)

    def before(module: nn.Module, inputs: Any) -> None:
        calls[id(module)] += 1
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])], id(module), id(inputs[0])))

    hooks, modules = [], {id(module): module for module in net.modules()}
    for module in modules.values():
        if type(module) in LAYERS:
            hooks.append(module.register_forward_hook(after))
        elif type(module) in NORMS and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(before))
    uses = _Uses()
    try:
        with evaluating(net), torch.no_grad(), uses:
            answer = called(net, example)
    finally:
        for hook in hooks:
            hook.remove()
    uses.count.update({id(leaf) for leaf in tree_leaves(answer)})
    between = Counter((layer, norm) for layer, norm, tensor in pairs if uses.count[tensor] == 1)
    found = []
    for (layer, norm), times in between.items():
        width = modules[layer].weight.shape[0]  # type: ignore[union-attr]
        if times == calls[layer] == calls[norm] and modules[norm].num_features == width:
            found.append((names[layer], names[norm]))
    return found


@torch.no_grad()
def fold(net: nn.Module, pairs: Sequence[Sequence[str]]) -> nn.Module:
    """Fold the `pairs` (layer, BatchNorm) of `net` in place and return it; also on the meta device.

    Raises AttributeError for a name that `net` does not have, TypeError for one that is not such a layer.
    """
    for name, norm_name in pairs:
        layer, norm = net.get_submodule(name), net.get_submodule(norm_name)
        if not isinstance(layer, LAYERS) or not isinstance(norm, NORMS):
            raise TypeError(f"{name} and {norm_name} are not a layer and its BatchNorm")
        weight, mean, variance = layer.weight, norm.running_mean, norm.running_var
        factor = (variance.double() + norm.eps).rsqrt()  # type: ignore[union-attr, operator]
        if norm.affine:
            factor = factor * norm.weight.double()  # type: ignore[operator]
        shift = -mean.double() if layer.bias is None else layer.bias.double() - mean.double()  # type: ignore
        bias = shift * factor + (norm.bias.double() if norm.affine else 0)  # type: ignore[operator]
        shape = (-1, *[1] * (weight.ndim - 1))  # type: ignore[operator, union-attr]
        folded = (weight.double() * factor.view(shape)).to(weight.dtype)  # type: ignore[operator, arg-type, union-attr]
        layer.weight = nn.Parameter(folded)
        layer.bias = nn.Parameter(bias.to(weight.dtype))  # type: ignore[arg-type, union-attr]
        replace(net, norm, nn.Identity())
    return net


def replace(net: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace the module `old` by `new` in `net`, under all its names."""
    for parent in list(net.modules()):
        for name, child in parent._modules.items():
            if child is old:
                setattr(parent, name, new)
