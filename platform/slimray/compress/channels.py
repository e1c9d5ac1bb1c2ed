"""Removes channels from a network: slices its tensors, writes a record, and rebuilds the shapes from a record.

`cut` returns a smaller copy that computes the same, up to rounding, as the whole network with the removed channels set
to zero (`masked`). The record is plain: it holds the kept channels of each group and the new sizes of each module, so
that a network from `models.build` can be reshaped without running it, also on the meta device.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimray.compress.groups import CONVS, NORMS, TRANSPOSED, Groups
from slimray.compress.labels import Lane, Layer
from slimray.models.cifar_resnet import PadShortcut
from slimray.models.supernets.supernet import SHIFT_DIV
from slimray.spec import UserError

Kept = Mapping[str, Sequence[int]]  # group -> indices of the kept channels, ascending


def dropped_atoms(groups: Groups, kept: Kept) -> Lane:
    """Return the numbers of the removed atoms; UserError for an unknown group, or indices out of range or empty."""
    gone = [np.zeros(0, np.int64)]
    by_name = {group.name: group for group in groups.groups}
    for name, places in kept.items():
        if name not in by_name:
            raise UserError(f"channels: this network has no group {name!r}")
        size, stay = by_name[name].size, sorted({int(place) for place in places})
        if not stay or len(stay) != len(places) or stay[0] < 0 or stay[-1] >= size:
            raise UserError(f"channels: {name}: must be distinct indices from 0 to {size - 1}, at least one")
        gone.append(np.delete(by_name[name].atoms, stay))
    return np.concatenate(gone)


def cut(net: nn.Module, groups: Groups, kept: Kept) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of `net` without the channels that are not in `kept`, and its record.

    `groups` are those of `trace(net, ...)`. Groups missing from `kept` keep all channels. Raises UserError for an
    invalid `kept`.
    """
    gone = dropped_atoms(groups, kept)
    small, modules, places = copy.deepcopy(net), {}, {}
    for name, layer in groups.layers.items():
        stay = {side: _stay(lane, gone) for side, lane in (("inputs", layer.inputs), ("outputs", layer.outputs))}
        if all(index is None or len(index) == len(lane) for index, lane in _pairs(layer, stay)):
            continue
        module = small.get_submodule(name)
        if isinstance(module, PadShortcut):
            low, size = module.low, len(layer.outputs) - module.low - module.high  # type: ignore[arg-type]
            index = stay["outputs"]
            assert index is not None
            places[name] = {"low": int((index < low).sum()), "high": int((index >= low + size).sum())}
        else:
            _slice(module, stay["inputs"], stay["outputs"])
            modules[name] = _sizes(module)
    for name, lane in groups.places.items():
        module: Any = small.get_submodule(name)
        index = _kept(lane, gone)
        if len(index) < len(lane):
            first, second = module.folds or (len(lane) // getattr(module, "shift_div", SHIFT_DIV),) * 2
            ends = np.searchsorted(index, [first, first + second])
            places[name] = {"folds": [int(ends[0]), int(ends[1] - ends[0])]}
    _place(small, places)
    sizes = groups.sizes
    channels = {
        name: [list(map(int, sorted(stay))), sizes[name]] for name, stay in kept.items() if len(stay) < sizes[name]
    }
    return small, {"step": "prune", "channels": channels, "modules": modules, "places": places}


def _kept(lane: Lane, gone: Lane) -> np.ndarray:
    return np.flatnonzero(~np.isin(lane, gone))


def _stay(lane: Lane | None, gone: Lane) -> np.ndarray | None:
    return None if lane is None else _kept(lane, gone)


def _pairs(layer: Layer, stay: Mapping[str, Any]) -> list[tuple[Any, Lane]]:
    lanes = (("inputs", layer.inputs), ("outputs", layer.outputs))
    return [(stay[side], lane) for side, lane in lanes if lane is not None]


def _sizes(module: nn.Module) -> list[int]:
    """Return the sizes of a layer for a record: inputs, outputs and groups of a convolution; one number for a norm."""
    if isinstance(module, nn.Linear):
        return [module.in_features, module.out_features]
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        return [module.in_channels, module.out_channels, module.groups]
    return [int(getattr(module, "num_features", getattr(module, "num_parameters", 0)))]


def _slice(module: nn.Module, inputs: Any, outputs: Any) -> None:
    """Keep only the channels `inputs` and `outputs` (indices, None: all) of a layer."""
    if isinstance(module, nn.Linear):
        _take(module, "weight", 0, outputs)
        _take(module, "weight", 1, inputs)
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, TRANSPOSED):
        _take(module, "weight", 0, inputs)
        _take(module, "weight", 1, outputs)
        module.in_channels, module.out_channels = module.weight.shape[:2]
    elif isinstance(module, CONVS):
        by_depth = module.groups > 1 and module.groups == module.in_channels
        _take(module, "weight", 0, outputs)
        if by_depth:
            module.groups = module.in_channels = len(inputs)
        else:
            per_group = module.in_channels // module.groups
            _take(module, "weight", 1, inputs[inputs < per_group])
            module.in_channels = module.weight.shape[1] * module.groups
        module.out_channels = module.weight.shape[0]
    else:
        for name in ("weight", "bias", "running_mean", "running_var"):
            _take(module, name, 0, outputs)
        attribute = "num_features" if isinstance(module, NORMS) else "num_parameters"
        setattr(module, attribute, len(outputs))
        return
    _take(module, "bias", 0, outputs)


def _take(module: nn.Module, name: str, dim: int, index: Any) -> None:
    """Keep only the indices `index` along `dim` of a parameter or buffer."""
    old = getattr(module, name, None)
    if old is None or index is None or len(index) == old.shape[dim]:
        return
    new = old.detach().index_select(dim, torch.as_tensor(index, device=old.device)).clone()
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, old.requires_grad)
    setattr(module, name, new)


def _place(net: nn.Module, places: Mapping[str, Mapping[str, Any]]) -> None:
    for name, values in places.items():
        module: Any = net.get_submodule(name)
        if set(values) == {"folds"} and hasattr(module, "folds"):
            first, second = (_count(n, 0) for n in values["folds"])
            module.folds = (first, second)
        elif set(values) == {"low", "high"} and isinstance(module, PadShortcut):
            module.low, module.high = _count(values["low"], 0), _count(values["high"], 0)
        else:
            raise ValueError(f"places: {name} does not have {', '.join(values)}")


def rebuild(net: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Bring `net`, in its shape before pruning, into the shape of `record`; its weights are then meaningless.

    Raises ValueError (or KeyError, AttributeError, TypeError) for a record that does not match the network.
    """
    for name, sizes in record["modules"].items():
        module = net.get_submodule(name)
        old, new = _sizes(module), [_count(size, 1) for size in sizes]
        if len(old) != len(new) or any(b > a for a, b in zip(old, new)):
            raise ValueError(f"modules: {name}: sizes {sizes} do not fit {old}")
        _shrink(module, new)
        if _sizes(module) != new:
            raise ValueError(f"modules: {name}: sizes {sizes} do not fit {old}")
    _place(net, record["places"])
    return net


def _shrink(module: nn.Module, sizes: Sequence[int]) -> None:
    if len(sizes) == 3 and (sizes[0] % sizes[2] or sizes[1] % sizes[2]):
        raise ValueError(f"{sizes[2]} groups do not divide {sizes[0]} and {sizes[1]} channels")
    inputs, outputs = (np.arange(sizes[0]), np.arange(sizes[1])) if len(sizes) > 1 else (None, np.arange(sizes[0]))
    if len(sizes) == 3 and not isinstance(module, TRANSPOSED) and sizes[2] == module.groups and inputs is not None:
        inputs = np.arange(sizes[0] // sizes[2])
    _slice(module, inputs, outputs)


def _count(value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"must be a whole number of at least {least} (got {value!r})")
    return value


@torch.no_grad()
def masked(net: nn.Module, groups: Groups, kept: Kept) -> nn.Module:
    """Return a copy of `net` with the same shape, in which the channels that `cut` would remove are zero."""
    gone, same = dropped_atoms(groups, kept), copy.deepcopy(net)
    for name, layer in groups.layers.items():
        module = same.get_submodule(name)
        if layer.outputs is None or isinstance(module, PadShortcut):
            continue
        index = torch.from_numpy(np.flatnonzero(np.isin(layer.outputs, gone)))
        for tensor, dim in (
            (getattr(module, "weight", None), int(isinstance(module, TRANSPOSED))),
            (getattr(module, "bias", None), 0),
        ):
            if isinstance(tensor, Tensor) and len(index) and not isinstance(module, nn.PReLU):
                tensor.index_fill_(dim, index.to(tensor.device), 0.0)
    return same
