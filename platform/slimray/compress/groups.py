"""Groups of channels, of any network, that can only be removed together, and the costs that remain without them.

`trace(net, example)` runs the network once (labels.py) and returns its `Groups`. Channels that must be removed together
form an atom: channel 3 of every convolution of a residual stage, both halves of an edge feature's copy, four channels
before a pixel shuffle. Atoms shared by the same layers form a group; a policy is the number of atoms kept per group.
The MACs and parameters of every policy are then a formula, known before anything is cut. Surprising: a temporal shift
does not restrict what can be removed, because a pruned network stores at each shift how many channels of its two
shifted parts are left.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from slimray.compress.labels import FIXED, ZEROS, Follow, Followed, Lane, Layer, Work
from slimray.models.cifar_resnet import PadShortcut
from slimray.models.modes import evaluating
from slimray.models.supernets.mixed import MixedNet
from slimray.models.text.layers import Heads
from slimray.spec import UserError, did_you_mean

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
MAKERS = (*CONVS, *TRANSPOSED, nn.Linear)
LEAVES = (*CONVS, *TRANSPOSED, *NORMS, nn.Linear, nn.PReLU, PadShortcut, Heads)


@dataclass(frozen=True, eq=False)
class Group:
    """Atoms shared by the same layers: `atoms` are their numbers, in the channel order of the first layer."""

    name: str
    atoms: Lane
    makers: tuple[str, ...]
    users: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of atoms."""
        return len(self.atoms)


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of a network, with its layers and work in terms of atom numbers (0: always kept), for an example batch."""

    groups: tuple[Group, ...]
    layers: dict[str, Layer]
    work: tuple[Work, ...]
    places: dict[str, Lane]
    other_params: int
    params_of: dict[str, tuple[float, float]]  # of each layer: per pair of input and output, per output
    batch: int

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of channels of each group."""
        return {group.name: group.size for group in self.groups}

    @cached_property
    def _group_of(self) -> Lane:
        """Index of the group of every atom number, -1 for numbers that are always kept."""
        top = max((int(group.atoms.max()) for group in self.groups), default=0)
        out = np.full(top + 1, -1, np.int64)
        for place, group in enumerate(self.groups):
            out[group.atoms] = place
        return out

    @cached_property
    def _terms(self) -> list[tuple[float, list[np.ndarray]]]:
        """The work as products: a factor, and for each lane its fixed channels and its channels per atom and group."""
        return [(one.factor / self.batch, [self._counts(lane) for lane in one.lanes]) for one in self.work]

    @cached_property
    def _weights(self) -> list[tuple[float, list[np.ndarray]]]:
        """The parameters in the same form."""
        out = []
        for name, (pairs, alone) in self.params_of.items():
            layer = self.layers[name]
            lanes = [self._counts(lane) for lane in (layer.inputs, layer.outputs) if lane is not None]
            if pairs:
                out.append((pairs, lanes))
            if alone:
                out.append((alone, lanes[-1:]))
        return out

    def _counts(self, lane: Lane) -> np.ndarray:
        """Return `[1 + groups]`: the always kept channels of a lane, then its channels per atom of each group."""
        groups = self._group_of[np.where(lane < len(self._group_of), lane, 0)]
        out = np.zeros(1 + len(self.groups))
        out[0] = (groups < 0).sum()
        for place, count in Counter(groups[groups >= 0].tolist()).items():
            out[1 + place] = count / self.groups[place].size
        return out

    def row(self, kept: Mapping[str, int]) -> np.ndarray:
        """Return the kept counts as a row `[groups]`; missing groups keep all. UserError for a count out of range."""
        for name, count in kept.items():
            if name not in self.sizes:
                raise UserError(f"channels: this network has no group {name!r}{did_you_mean(name, self.sizes)}")
            if isinstance(count, bool) or not isinstance(count, int | np.integer) or not 1 <= count <= self.sizes[name]:
                raise UserError(f"channels: {name}: must be a number from 1 to {self.sizes[name]} (got {count!r})")
        return np.array([kept.get(group.name, group.size) for group in self.groups], float)

    def costs(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Return `macs` (per sample), `params` and `size_mb` with these numbers of channels kept per group."""
        return {name: float(values[0]) for name, values in self.costs_of(self.row(kept)[None]).items()}

    def costs_of(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return `macs`, `params`, `size_mb` (in float32) `[n]` of policies `[n, groups]`, numbers of kept channels."""
        full = np.concatenate([np.ones((len(rows), 1)), rows], 1)
        sums = []
        for terms in (self._terms, self._weights):
            total = np.zeros(len(rows))
            for factor, lanes in terms:
                product = np.full(len(rows), factor)
                for lane in lanes:
                    product = product * (full @ lane)
                total += product
            sums.append(total)
        params = np.round(sums[1]) + self.other_params
        return {"macs": np.round(sums[0]), "params": params, "size_mb": params * 4e-6}

    def layer_macs(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Return the MACs per sample of every layer."""
        full, out = np.concatenate([[1.0], self.row(kept)]), dict.fromkeys(self.layers, 0.0)
        for one, (factor, lanes) in zip(self.work, self._terms, strict=True):
            if one.layer:
                out[one.layer] += factor * float(np.prod([full @ lane for lane in lanes]))
        return {name: value for name, value in out.items() if value}

    def layer_shares(self, rows: np.ndarray) -> np.ndarray:
        """Return the share of MACs that each layer of `layer_macs` keeps, `[n, layers]`, for policies `[n, groups]`."""
        full, sums = np.concatenate([np.ones((len(rows) + 1, 1)), np.concatenate([self.row({})[None], rows])], 1), {}
        for one, (factor, lanes) in zip(self.work, self._terms, strict=True):
            if one.layer:
                product = factor * np.prod([full @ lane for lane in lanes], 0)
                sums[one.layer] = sums.get(one.layer, 0.0) + product
        table = np.stack([values for name, values in sums.items() if values[0]], 1)
        return table[1:] / table[0]


# ------------------------------------------------------------------------------------------------ layers


def _rule(mode: Follow, layer: Layer, inputs: Sequence[Any], out: Tensor) -> None:
    """Number the channels of the output of a layer that has a rule of its own."""
    module, union, found, x = layer.module, mode.found.union, mode.found, inputs[0]
    if isinstance(module, nn.Linear):
        _takes(mode, layer, mode.lane(x, x.ndim - 1))
        _makes(mode, layer, out, out.ndim - 1)
        positions = out.numel() // out.shape[-1]
        found.work.append(Work(positions, (layer.inputs, layer.outputs), layer.name))  # type: ignore[arg-type]
    elif isinstance(module, CONVS):
        channels, groups = module.in_channels, module.groups
        _takes(mode, layer, mode.lane(x, 1))
        assert layer.inputs is not None
        area = float(np.prod(module.kernel_size)) * (out.numel() // out.shape[1])
        if groups > 1 and groups == channels:  # depthwise: an output channel belongs to its input channel
            lane = np.repeat(layer.inputs, module.out_channels // groups)
            layer.outputs = np.where(lane == ZEROS, FIXED, lane)
            mode.set(out, _shaped(layer.outputs, out, 1))
            found.work.append(Work(area, (layer.outputs,), layer.name))
            return
        if groups > 1:  # every group of channels keeps the same indices
            parts = layer.inputs.reshape(groups, -1)
            for part in parts[1:]:
                union.join(parts[0], part)
            for lane in parts:
                union.join(lane[lane == ZEROS], np.zeros_like(lane[lane == ZEROS]))
        _makes(mode, layer, out, 1, groups)
        found.work.append(Work(area / groups, (layer.inputs, layer.outputs), layer.name))  # type: ignore[arg-type]
    elif isinstance(module, TRANSPOSED):
        _takes(mode, layer, mode.lane(x, 1))
        _makes(mode, layer, out, 1)
        if module.groups > 1:
            for lane in (layer.inputs, layer.outputs):
                union.join(lane, np.zeros_like(lane))  # type: ignore[arg-type]
        area = float(np.prod(module.kernel_size)) * (x.numel() // x.shape[1]) / module.groups
        found.work.append(Work(area, (layer.inputs, layer.outputs), layer.name))  # type: ignore[arg-type]
    elif isinstance(module, Heads):  # the channels of a head, in queries, keys and values, are one atom
        lanes = [mode.lane(one, one.ndim - 1).reshape(-1, module.width) for one in inputs[:3]]
        for lane in lanes:
            union.join(lane, np.broadcast_to(lanes[0][:, :1], lane.shape))
        query, _, value = (lane.reshape(-1) for lane in lanes)
        mode.set(out, _shaped(value, out, out.ndim - 1))
        pairs = x.numel() // x.shape[-1] * inputs[1].shape[1]
        found.work += [Work(pairs, (lane,), layer.name) for lane in (query, value)]
    elif isinstance(module, PadShortcut):
        lane = mode.lane(x, 1)
        if layer.outputs is None:
            layer.outputs = np.concatenate([union.fresh(module.low), lane, union.fresh(module.high)])
        union.join(layer.outputs[module.low : module.low + len(lane)], lane)
        mode.set(out, _shaped(layer.outputs, out, 1))
    else:  # a norm or PReLU: one number per channel
        mark = mode.mark_of(x)
        if mark is None or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
            mode.set(out, None if mark is None else mark.numbers, mark is None or mark.zero)
            if mark is None and not isinstance(module, nn.PReLU):
                _takes(mode, layer, np.zeros(x.shape[1], np.int64), both=True)
            return
        _takes(mode, layer, mode.merged(mark.numbers, 1), both=True)
        zero = bool(module.affine) if isinstance(module, NORMS) else mark.zero
        mode.set(out, _shaped(layer.outputs, out, 1), zero)  # type: ignore[arg-type]


def _shaped(lane: Lane, out: Tensor, dim: int) -> Tensor:
    return torch.from_numpy(lane).int().view([-1 if place == dim else 1 for place in range(out.ndim)])


def _takes(mode: Follow, layer: Layer, lane: Lane, both: bool = False) -> None:
    """Record the input channels of a layer; a second call joins the channels that meet there."""
    known = layer.outputs if both else layer.inputs
    if known is not None:
        mode.found.union.join(known, lane)
    elif both:
        layer.outputs = np.where(lane == ZEROS, FIXED, lane)
    else:
        layer.inputs = lane


def _makes(mode: Follow, layer: Layer, out: Tensor, dim: int, groups: int = 1) -> None:
    if layer.outputs is None:
        layer.outputs = np.tile(mode.found.union.fresh(out.shape[dim] // groups), groups)
    mode.set(out, _shaped(layer.outputs, out, dim))


def _leaf(module: nn.Module, shared: set[int]) -> bool:
    """Return True if a module has a rule: a plain layer whose tensors are not shared."""
    if not isinstance(module, LEAVES) or type(module).forward not in {one.forward for one in LEAVES}:
        return False
    return not parametrize.is_parametrized(module) and not any(id(p) in shared for p in module.parameters())


@contextlib.contextmanager
def _followed(net: nn.Module, mode: Follow) -> Iterator[None]:
    """Add hooks to the layers, disable temporal shifts and set eval mode; restore everything afterwards."""
    owners = Counter(id(p) for module in net.modules() for p in module._parameters.values() if p is not None)
    shared, hooks = {key for key, count in owners.items() if count > 1}, []
    shifts: list[tuple[str, Any]] = [
        (name, m) for name, m in net.named_modules() if hasattr(m, "folds") and getattr(m, "frames", 1)
    ]
    before = [module.folds for _, module in shifts]

    def pause(module: nn.Module, inputs: Any) -> None:
        mode.paused += 1

    def number(name: str) -> Any:
        layer = Layer(name, net.get_submodule(name))

        def hook(module: nn.Module, inputs: Any, out: Any) -> None:
            mode.found.layers.setdefault(name, layer)
            _rule(mode, layer, inputs, out)
            mode.paused -= 1

        return hook

    def place(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            mode.paused += 1
            mark, x = mode.mark_of(inputs[0]), inputs[0]
            fixed = np.zeros(x.shape[1], np.int64)
            mode.found.places[name] = fixed if mark is None else mode.merged(mark.numbers, 1)
            mode.paused -= 1

        return hook

    try:
        for name, module in net.named_modules():
            if _leaf(module, shared):
                hooks += [module.register_forward_pre_hook(pause), module.register_forward_hook(number(name))]
        for name, module in shifts:
            hooks.append(module.register_forward_pre_hook(place(name)))
            module.folds = (0, 0)
        with evaluating(net):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for (_, module), folds in zip(shifts, before, strict=True):
            module.folds = folds


# ------------------------------------------------------------------------------------------------ tracing


@torch.no_grad()
def trace(net: nn.Module, example: Any) -> Groups:
    """Return the groups of `net`, found by running it once in eval mode on `example` (a tensor or a tuple of
    arguments).

    Leaves the network unchanged. MACs are counted per sample: the first dimension of the first tensor is the batch.
    Raises UserError for a supernet, of which only subnets can be pruned, and for a network with nothing to remove.
    """
    if hasattr(net, "space") or isinstance(net, MixedNet):
        raise UserError("prune: this network is a supernet, search it or prune one of its subnets (`arch`)")
    arguments = example if isinstance(example, tuple) else (example,)
    found = Followed()
    mode = Follow(found)
    with _followed(net, mode), torch.random.fork_rng([]):
        torch.manual_seed(0)
        with mode:
            outputs = net(*arguments)
        mode.lock(outputs)
    groups = _groups(found)
    if not groups:
        raise UserError("prune: no channel of this network can be removed, because pruning does not know its layers")
    return _counted(net, found, groups, len(tree_leaves(arguments)[0]))


def _groups(found: Followed) -> tuple[Group, ...]:
    """Return atoms grouped by their layers, in the order in which these run; lanes get their representative numbers."""
    union, members, first = found.union, {}, {}
    for layer in found.layers.values():
        for side in ("inputs", "outputs"):
            lane = getattr(layer, side)
            if lane is None:
                continue
            lane = union.roots(lane)
            setattr(layer, side, lane)
            for atom, count in Counter(lane[lane > 0].tolist()).items():
                members.setdefault(atom, []).append((layer.name, side, count))
                first.setdefault(atom, len(first))
    for name, lane in found.places.items():
        found.places[name] = union.roots(lane)
    root = union.find(FIXED)
    assert root == FIXED
    by_layers: dict[tuple, list[int]] = {}
    for atom in sorted(members, key=first.__getitem__):
        by_layers.setdefault(tuple(members[atom]), []).append(atom)
    out, names = [], Counter()
    for layers, atoms in by_layers.items():
        made = [name for name, side, _ in layers if side == "outputs" and isinstance(found.layers[name].module, MAKERS)]
        used = [name for name, side, _ in layers if side == "inputs"]
        if not made:
            continue
        names[made[0]] += 1
        name = made[0] if names[made[0]] == 1 else f"{made[0]}#{names[made[0]]}"
        out.append(Group(name, np.array(atoms), tuple(made), tuple(used)))
    return tuple(out)


def _counted(net: nn.Module, found: Followed, groups: tuple[Group, ...], batch: int) -> Groups:
    work = tuple(Work(one.factor, tuple(map(found.union.roots, one.lanes)), one.layer) for one in found.work)
    params, counted = {}, 0
    for name, layer in found.layers.items():
        module = layer.module
        own = sum(p.numel() for p in module.parameters())
        if not own or layer.outputs is None:
            continue
        bias = 0 if getattr(module, "bias", None) is None else 1
        if isinstance(module, NORMS):
            params[name] = (0.0, own / len(layer.outputs))
        elif isinstance(module, nn.PReLU):
            params[name] = (0.0, 1.0)
        elif isinstance(module, CONVS) and module.groups == module.in_channels and module.groups > 1:
            params[name] = (0.0, float(np.prod(module.kernel_size)) + bias)
        else:
            area = float(np.prod(getattr(module, "kernel_size", 1))) / getattr(module, "groups", 1)
            params[name] = (area, float(bias))
        counted += own
    other = sum(p.numel() for p in net.parameters()) - counted
    return Groups(groups, found.layers, work, found.places, other, params, batch)
