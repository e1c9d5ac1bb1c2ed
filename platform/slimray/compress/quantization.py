"""A network with few bits: BatchNorm folded, ranges found on samples, weights as whole numbers; and what that costs.

`quantize` takes any module that runs on an example and gives a smaller one, with the record by which a fresh process
builds it again (`compress.build`) and the gain that can be counted: its size. Multiply-accumulates stay as many, how
much faster they run only measuring tells. `prepare` gives the form that is trained (quantization-aware training,
straight-through), `finish` its whole numbers, `sensitivity` which layer costs how much. Integer inference: arXiv
1712.05877; HAQ's quantizers: 1811.08886. Our own modules and not PT2E graphs of torchao: those hold the ranges of
activations as constants of a traced graph, which no record builds again in a later version.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimray.compress import fake_quant as fq
from slimray.compress import precision
from slimray.compress.fold import LAYERS, fold, norm_pairs, replace
from slimray.compress.quantized import TABLES, Bits, Quantized, check_bits, make_layer, to_whole
from slimray.models.modes import called, evaluating, samples_in
from slimray.spec import UserError, did_you_mean

KEPT_VALUES = 1 << 17  # of a layer's input, for the histograms of ranges below 5 bits
EIGHT: Bits = (8, 8)


@dataclass(frozen=True)
class LayerInfo:
    """A layer that can be quantized, as a forward pass shows it: what HAQ's state and the cost models need.

    `kind` is the name of its class, `depthwise` as HAQ has it (groups = input channels), `inputs` and `outputs` the
    numbers of values in and out for one sample over all calls, `area` the input's pixels (1 for a linear layer).
    """

    name: str
    kind: str
    depthwise: bool
    in_channels: int
    out_channels: int
    stride: int
    kernel: int
    weights: int
    macs: int
    inputs: int
    outputs: int
    area: int


@dataclass(frozen=True)
class QuantizedNetwork:
    """What `quantize` gives: the smaller network, its record, and sizes in megabytes (1e6 bytes) before and after."""

    net: nn.Module
    record: dict[str, Any]
    size_mb: float
    size_mb_before: float
    macs: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        gain = f"{self.size_mb_before:.3f} MB -> {self.size_mb:.3f} MB, {self.macs:,} MACs as before"
        return "; ".join([gain, "latency not measured: it depends on the runtime and the device", *self.notes])


def quantize(
    module: nn.Module,
    example: Any,
    calibration: Iterable[Any] | None = None,
    bits: int | Bits | Mapping[str, Bits] = EIGHT,
    scheme: fq.Scheme = "int8",
    keep: Sequence[str] = (),
    embeddings: int | None = None,
) -> QuantizedNetwork:
    """Quantize `module` after training; it is left as it is.

    `example` is an input `[n, ...]` or a tuple of arguments, `calibration` batches of such inputs, or one, that ranges
    are found on (the example alone where there are none: for a try only). `bits` are those of all layers, or by layer;
    layers in `keep`, and with a mapping those that are not in it, stay float. First and last layer have 8 bits at least
    unless a mapping says otherwise. Tables of embeddings stay float unless `embeddings` gives their bits.
    UserError: no layer to quantize, an unknown name, bits out of range, layers not in float32, inputs that are not
    finite.
    """
    notes = [] if calibration is not None else ["ranges are those of the example alone: give calibration samples"]
    before = size_mb(module)
    net, record = prepare(module, example, calibration, bits, scheme, keep, False, embeddings)
    macs = sum(layer.macs for layer in layers_of(module, example))
    if floats := _float_weights(net):
        notes.append(f"still float: {', '.join(floats)}")
    return QuantizedNetwork(net, record, size_mb(net), before, macs, notes)


def prepare(
    module: nn.Module,
    example: Any,
    calibration: Iterable[Any] | None = None,
    bits: int | Bits | Mapping[str, Bits] = EIGHT,
    scheme: fq.Scheme = "int8",
    keep: Sequence[str] = (),
    trained: bool = True,
    embeddings: int | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of `module` whose layers round (to be trained, or whole already), and its record; as `quantize`."""
    net = copy.deepcopy(module).eval()
    found, tables = layers_of(net, example), tables_of(net, embeddings, scheme)
    chosen = policy([layer.name for layer in found], bits, scheme, [name for name in keep if name not in tables])
    chosen |= {name: pair for name, pair in tables.items() if name not in keep}
    _check_floats(net, chosen)
    if trained and (scheme == "kmeans" or tables):
        what = "tables of embeddings have" if tables else "the scheme kmeans has"
        raise UserError(f"quantize: {what} no trained form: train, then quantize")
    folded = norm_pairs(net, example)
    fold(net, folded)
    spans = observe(net, chosen, [example] if calibration is None else _batches(calibration), scheme)
    return assemble(net, folded, chosen, spans, scheme, "trained" if trained else "whole")


def assemble(
    net: nn.Module,
    folded: Sequence[tuple[str, str]],
    chosen: Mapping[str, Bits],
    spans: Mapping[str, Tensor],
    scheme: fq.Scheme,
    form: str,
) -> tuple[nn.Module, dict[str, Any]]:
    """Put quantized layers with the ranges `spans` into `net`, folded already, in place; return it and its record."""
    for name, pair in chosen.items():
        layer = net.get_submodule(name)
        made = make_layer(layer, pair, scheme, form)
        with torch.no_grad():
            made.input_range.copy_(spans.get(name, torch.zeros(2)))
        weight: Tensor = layer.weight.detach()  # type: ignore[assignment, union-attr, operator]
        span = None if scheme == "kmeans" else fq.weight_range(weight, pair[0], scheme)
        if isinstance(made, Quantized):
            made.store(weight, span)
        elif span is not None:
            made.weight_range.copy_(span)
        replace(net, layer, made)
    layers = {name: list(pair) for name, pair in chosen.items()}
    pairs = [list(pair) for pair in folded]
    return net, {"step": "quantize", "scheme": scheme, "form": form, "folded": pairs, "layers": layers}


def finish(net: nn.Module, record: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a trained network of `prepare` with whole numbers, which answers the same, and its record."""
    return to_whole(copy.deepcopy(net)), {**record, "form": "whole"}


def _batches(calibration: Iterable[Any]) -> Iterable[Any]:
    """Batches of inputs; a tensor, or a tuple of arguments, is one batch."""
    return [calibration] if isinstance(calibration, Tensor | tuple) else calibration


# ------------------------------------------------------------------------------------------------------- layers


def layers_of(net: nn.Module, example: Any) -> list[LayerInfo]:
    """The convolutions and linear layers of `net` that a pass runs, in the order of their first calls.

    UserError where there are none.
    """
    names = {id(module): name for name, module in net.named_modules()}
    calls: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        calls.setdefault(names[id(layer)], []).append((tuple(inputs[0].shape), tuple(out.shape)))

    _watch(net, note, [example])
    if not calls:
        raise UserError(f"quantize: {type(net).__name__} has no convolution or linear layer that could be quantized")
    return [_info(name, net.get_submodule(name), shapes, samples_in(example)) for name, shapes in calls.items()]


def _info(name: str, layer: nn.Module, calls: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], n: int) -> LayerInfo:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    conv = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    inputs, outputs = (sum(torch.Size(call[side]).numel() for call in calls) // n for side in (0, 1))
    groups = layer.groups if conv else 1  # type: ignore[union-attr]
    in_channels = weight.shape[1] * groups
    return LayerInfo(
        name,
        type(layer).__name__,
        bool(conv and groups == in_channels),
        int(in_channels),
        weight.shape[0],
        layer.stride[0] if conv else 0,  # type: ignore[union-attr, index]
        weight.shape[-1] if conv else 1,
        weight.numel(),
        outputs * weight[0].numel(),
        inputs,
        outputs,
        torch.Size(calls[0][0][2:]).numel() if conv else 1,
    )


def policy(
    names: Sequence[str], bits: int | Bits | Mapping[str, Bits], scheme: fq.Scheme, keep: Sequence[str] = ()
) -> dict[str, Bits]:
    """The bits of each layer of `names` that is quantized; see `quantize`."""
    for name in (*keep, *(bits if isinstance(bits, Mapping) else ())):
        if name not in names:
            raise UserError(f"quantize: there is no layer {name!r} to quantize{did_you_mean(name, names)}")
    if isinstance(bits, Mapping):
        chosen = {name: check_bits(name, bits[name], scheme) for name in names if name in bits}
    else:
        pair = (bits, bits) if isinstance(bits, int) else tuple(bits)
        weights, inputs = check_bits("all layers", pair, scheme)
        ends = (8, inputs and 8) if scheme != "kmeans" else (weights, None)
        chosen = {name: ends if name in (names[0], names[-1]) else (weights, inputs) for name in names}
    return {name: pair for name, pair in chosen.items() if name not in keep}


def tables_of(net: nn.Module, bits: int | None, scheme: fq.Scheme) -> dict[str, Bits]:
    """Return the `bits` of each table of embeddings of `net` by name; none where `bits` is None.

    UserError where there is no table, and for bits out of range.
    """
    if bits is None:
        return {}
    found = [name for name, module in net.named_modules() if type(module) in TABLES]
    if not found:
        raise UserError(f"quantize: {type(net).__name__} has no table of embeddings: leave `embeddings` out")
    return {name: check_bits(name, (bits, None), scheme) for name in found}


def _float_weights(net: nn.Module) -> list[str]:
    """The modules whose own matrices stay float, by name, with their class, and how many weights they have."""
    out = []
    for name, module in net.named_modules():
        own = sum(one.numel() for one in module.parameters(recurse=False) if one.ndim > 1)
        if own and not isinstance(module, Quantized):
            out.append(f"{name or 'the module itself'} ({type(module).__name__}, {own:,} weights)")
    return out


def _check_floats(net: nn.Module, names: Iterable[str]) -> None:
    weights: list[tuple[str, Any]] = [(name, net.get_submodule(name).weight) for name in names]
    precision.require("quantize", weights, torch.float32)


# -------------------------------------------------------------------------------------------------- calibration


def observe(net: nn.Module, chosen: Mapping[str, Bits], batches: Iterable[Any], scheme: fq.Scheme) -> dict[str, Tensor]:
    """The range `[2]` of the input of every layer of `chosen` over all `batches`, by `fq.input_range`.

    UserError without batches, and for inputs that are not finite.
    """
    inputs = {name: pair[1] for name, pair in chosen.items() if pair[1] is not None}
    wanted = {id(net.get_submodule(name)): name for name in inputs}
    return spans_of(gather(net, wanted, batches, kept_values(scheme, inputs.values())), chosen, scheme)


def kept_values(scheme: fq.Scheme, bits: Iterable[int]) -> int:
    """Return how many values of a layer's input its range is found on, 0 if its ends are enough."""
    return KEPT_VALUES if scheme == "linear" and any(one < fq.KL_BITS for one in bits) else 0


class _Sample:
    """A random sample of at most `most` values of a stream, each as likely as any other, and its two ends.

    Every value has a random key, the smallest keys stay: of later values as many are drawn as have such a key.
    """

    def __init__(self, most: int, seed: Sequence[int]):
        self.most, self.rng = most, np.random.default_rng(seed)
        self.keys, self.values, self.ends = np.zeros(0), torch.zeros(0), torch.zeros(0)

    def add(self, values: Tensor) -> None:
        """Take further values `[n]`."""
        self.ends = torch.stack(torch.cat([self.ends, *(end.cpu()[None] for end in values.aminmax())]).aminmax())
        if not self.most:
            return
        for part in values.split(self.most):  # a large batch is not keyed as a whole
            self._take(part)

    def _take(self, values: Tensor) -> None:
        limit = float(self.keys.max()) if len(self.keys) == self.most else 1.0
        count = int(self.rng.binomial(len(values), limit))
        places = torch.from_numpy(self.rng.choice(len(values), count, replace=False))
        self.keys = np.concatenate([self.keys, limit * self.rng.random(count)])
        self.values = torch.cat([self.values, values[places.to(values.device)].cpu()])
        if len(self.keys) > self.most:
            kept = np.argpartition(self.keys, self.most)[: self.most]
            self.keys, self.values = self.keys[kept], self.values[torch.from_numpy(kept)]


def gather(
    net: nn.Module, wanted: Mapping[int, str], batches: Iterable[Any], kept: int = KEPT_VALUES, seed: int = 0
) -> dict[str, Tensor]:
    """Values of the inputs of the layers `wanted` (by id) over `batches`: the smallest, the largest, and others.

    The others are a random sample of all, at most `kept` of each layer however many batches there are, so that a range
    below 5 bits sees the distribution. On the CPU.
    """
    seen: dict[str, _Sample] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        if id(layer) in wanted:
            flat, name = inputs[0].detach().flatten(), wanted[id(layer)]
            if not bool(torch.isfinite(flat.min() + flat.max())):
                raise UserError(f"quantize: the input of {name} is not finite on the calibration samples")
            if name not in seen:
                seen[name] = _Sample(kept, (seed, len(seen)))
            seen[name].add(flat)

    count = _watch(net, note, batches)
    if not count:
        raise UserError("quantize: there are no calibration samples")
    return {name: torch.cat([sample.ends, sample.values]) for name, sample in seen.items()}


def spans_of(values: Mapping[str, Tensor], chosen: Mapping[str, Bits], scheme: fq.Scheme) -> dict[str, Tensor]:
    """The range of the input of every layer of `chosen` that has one, of what `gather` kept."""
    pairs = ((name, bits) for name, (_, bits) in chosen.items() if bits is not None and name in values)
    return {name: fq.input_range(values[name], bits, scheme) for name, bits in pairs}


@torch.no_grad()
def _watch(net: nn.Module, note: Callable[[Any, Any, Any], None], batches: Iterable[Any]) -> int:
    """Run `net` in eval mode with `note` behind every layer; the number of batches. It is left as it was."""
    hooks = [module.register_forward_hook(note) for module in net.modules() if type(module) in LAYERS]
    count = 0
    try:
        with evaluating(net):
            for batch in batches:
                called(net, batch)
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
    return count


# --------------------------------------------------------------------------------------------------------- size


def size_mb(net: nn.Module) -> float:
    """Megabytes (1e6 bytes) of the numbers of `net`: codes by their bits, tables, ranges, biases, BatchNorm statistics.

    Everything that a state dict holds counts as it is stored, each tensor once; counters of batches do not count.
    """
    found = {id(one): one for name, one in net.state_dict(keep_vars=True).items() if not name.endswith("_tracked")}
    return sum(one.numel() * one.element_size() for one in found.values()) / 1e6


# -------------------------------------------------------------------------------------------------- sensitivity


@dataclass(frozen=True)
class Sensitivity:
    """What a layer costs: the score of the network with this one alone quantized, and what it loses by that.

    `saved_mb` is what its quantization takes off the size.
    """

    layer: str
    score: float
    loss: float
    saved_mb: float


def sensitivity(
    module: nn.Module,
    example: Any,
    calibration: Iterable[Any],
    score: Callable[[nn.Module], float],
    bits: int | Bits = EIGHT,
    scheme: fq.Scheme = "int8",
) -> list[Sensitivity]:
    """Quantize each layer alone and score the network (higher is better): the costliest layer first.

    `score` gets a network in eval mode. As many evaluations as layers, and one.
    """
    base = fold(copy.deepcopy(module).eval(), pairs := norm_pairs(module, example))
    names = [layer.name for layer in layers_of(base, example)]
    chosen = policy(names, bits, scheme)
    _check_floats(base, chosen)
    spans = observe(base, chosen, _batches(calibration), scheme)
    whole, rows = score(base), []
    for name in names:
        net, _ = assemble(copy.deepcopy(base), pairs, {name: chosen[name]}, spans, scheme, "whole")
        reached = score(net)
        rows.append(Sensitivity(name, reached, whole - reached, size_mb(base) - size_mb(net)))
    return sorted(rows, key=lambda row: -row.loss)
