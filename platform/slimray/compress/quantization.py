"""Quantizes a network to few bits: folds BatchNorm, finds ranges on samples, stores weights as integers.

`quantize` takes any module that runs on an example and returns a smaller one, with the record from which a fresh
process rebuilds it (`compress.build`) and the gain that can be counted: its size. The number of MACs does not change;
how much faster they run must be measured. `prepare` returns the trainable form (quantization-aware training,
straight-through), `finish` converts it to integers, `sensitivity` measures the cost of each layer. Integer inference:
arXiv 1712.05877; HAQ's quantizers: 1811.08886. These are our own modules instead of torchao's PT2E graphs, which hold
activation ranges as constants of a traced graph that a later version could not rebuild from a record.
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

KEPT_VALUES = 1 << 17  # values of a layer's input kept for the histograms of ranges below 5 bits
EIGHT: Bits = (8, 8)


@dataclass(frozen=True)
class LayerInfo:
    """A quantizable layer, as seen in a forward pass, with the features for HAQ's state and the cost models.

    `kind` is the name of its class, `depthwise` as HAQ defines it (groups = input channels), `inputs` and `outputs` the
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
    """Result of `quantize`: the smaller network, its record, and sizes in megabytes (1e6 bytes) before and after."""

    net: nn.Module
    record: dict[str, Any]
    size_mb: float
    size_mb_before: float
    macs: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        gain = f"{self.size_mb_before:.3f} MB -> {self.size_mb:.3f} MB, {self.macs:,} MACs as before"
        return "; ".join([gain, "latency not measured (it depends on the runtime and the device)", *self.notes])


def quantize(
    module: nn.Module,
    example: Any,
    calibration: Iterable[Any] | None = None,
    bits: int | Bits | Mapping[str, Bits] = EIGHT,
    scheme: fq.Scheme = "int8",
    keep: Sequence[str] = (),
    embeddings: int | None = None,
) -> QuantizedNetwork:
    """Return a copy of `module` quantized after training; `module` is unchanged.

    `example` is an input `[n, ...]` or a tuple of arguments; `calibration` holds batches of such inputs, or one batch,
    on which ranges are found (without it only the example is used, which is good enough for a trial). `bits` apply to
    all layers, or by layer; layers in `keep`, and those missing from a mapping, stay float. The first and last layer
    have 8 bits unless a mapping says otherwise. Embedding tables stay float unless `embeddings` gives their bits.
    Raises UserError for a network without layers to quantize, an unknown name, bits out of range, layers that are not
    float32, or inputs that are not finite.
    """
    notes = [] if calibration is not None else ["ranges are those of the example alone, give calibration samples"]
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
    """Return a copy of `module` with rounding layers (trainable, or already integers) and its record; as `quantize`."""
    net = copy.deepcopy(module).eval()
    found, tables = layers_of(net, example), tables_of(net, embeddings, scheme)
    chosen = policy([layer.name for layer in found], bits, scheme, [name for name in keep if name not in tables])
    chosen |= {name: pair for name, pair in tables.items() if name not in keep}
    _check_floats(net, chosen)
    if trained and (scheme == "kmeans" or tables):
        what = "embedding tables have" if tables else "the scheme kmeans has"
        raise UserError(f"quantize: {what} no trained form, train first and then quantize")
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
    """Put quantized layers with the ranges `spans` into `net`, already folded, in place; return it and its record."""
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
    """Return a trained network of `prepare` converted to integers, with the same outputs, and its record."""
    return to_whole(copy.deepcopy(net)), {**record, "form": "whole"}


def _batches(calibration: Iterable[Any]) -> Iterable[Any]:
    """Return batches of inputs; a tensor, or a tuple of arguments, is one batch."""
    return [calibration] if isinstance(calibration, Tensor | tuple) else calibration


# ------------------------------------------------------------------------------------------------------- layers


def layers_of(net: nn.Module, example: Any) -> list[LayerInfo]:
    """Return the convolutions and linear layers of `net` that run in a pass, in the order of their first calls.

    Raises UserError if there are none.
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
    """Return the bits of each layer of `names` that is quantized; see `quantize`."""
    for name in (*keep, *(bits if isinstance(bits, Mapping) else ())):
        if name not in names:
            raise UserError(f"quantize: no layer {name!r} that can be quantized{did_you_mean(name, names)}")
    if isinstance(bits, Mapping):
        chosen = {name: check_bits(name, bits[name], scheme) for name in names if name in bits}
    else:
        pair = (bits, bits) if isinstance(bits, int) else tuple(bits)
        weights, inputs = check_bits("all layers", pair, scheme)
        ends = (8, inputs and 8) if scheme != "kmeans" else (weights, None)
        chosen = {name: ends if name in (names[0], names[-1]) else (weights, inputs) for name in names}
    return {name: pair for name, pair in chosen.items() if name not in keep}


def tables_of(net: nn.Module, bits: int | None, scheme: fq.Scheme) -> dict[str, Bits]:
    """Return the `bits` of each embedding table of `net` by name; {} if `bits` is None.

    Raises UserError if there is no table, and for bits out of range.
    """
    if bits is None:
        return {}
    found = [name for name, module in net.named_modules() if type(module) in TABLES]
    if not found:
        raise UserError(f"quantize: {type(net).__name__} has no embedding table, remove `embeddings`")
    return {name: check_bits(name, (bits, None), scheme) for name in found}


def _float_weights(net: nn.Module) -> list[str]:
    """Return the names of the modules whose own matrices stay float, with their class and number of weights."""
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
    """Return the input range `[2]` of every layer of `chosen` over all `batches`, by `fq.input_range`.

    Raises UserError without batches, and for inputs that are not finite.
    """
    inputs = {name: pair[1] for name, pair in chosen.items() if pair[1] is not None}
    wanted = {id(net.get_submodule(name)): name for name in inputs}
    return spans_of(gather(net, wanted, batches, kept_values(scheme, inputs.values())), chosen, scheme)


def kept_values(scheme: fq.Scheme, bits: Iterable[int]) -> int:
    """Return the number of input values to keep per layer for finding its range, 0 if minimum and maximum suffice."""
    return KEPT_VALUES if scheme == "linear" and any(one < fq.KL_BITS for one in bits) else 0


class _Sample:
    """A uniform random sample of at most `most` values of a stream, with its minimum and maximum.

    Every value has a random key and the smallest keys stay; of later values, only as many are drawn as would have such
    a key.
    """

    def __init__(self, most: int, seed: Sequence[int]):
        self.most, self.rng = most, np.random.default_rng(seed)
        self.keys, self.values, self.ends = np.zeros(0), torch.zeros(0), torch.zeros(0)

    def add(self, values: Tensor) -> None:
        """Add further values `[n]`."""
        self.ends = torch.stack(torch.cat([self.ends, *(end.cpu()[None] for end in values.aminmax())]).aminmax())
        if not self.most:
            return
        for part in values.split(self.most):  # to avoid keys for a large batch all at once
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
    """Return input values of the layers `wanted` (id -> name) over `batches`: minimum, maximum, and others, on the CPU.

    The others are a random sample, at most `kept` per layer for any number of batches, so that ranges below 5 bits can
    use the distribution. Raises UserError without batches, and for inputs that are not finite.
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
    """Return the input range of every layer of `chosen` whose inputs are rounded, from the `values` of `gather`."""
    pairs = ((name, bits) for name, (_, bits) in chosen.items() if bits is not None and name in values)
    return {name: fq.input_range(values[name], bits, scheme) for name, bits in pairs}


@torch.no_grad()
def _watch(net: nn.Module, note: Callable[[Any, Any, Any], None], batches: Iterable[Any]) -> int:
    """Run `net` in eval mode, calling `note` after every layer; return the number of batches. `net` is unchanged."""
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
    """Return the megabytes (1e6 bytes) of `net`: packed codes, tables, ranges, biases, BatchNorm statistics.

    Everything in the state dict counts at its stored size, shared tensors once; counters of batches do not count.
    """
    found = {id(one): one for name, one in net.state_dict(keep_vars=True).items() if not name.endswith("_tracked")}
    return sum(one.numel() * one.element_size() for one in found.values()) / 1e6


# -------------------------------------------------------------------------------------------------- sensitivity


@dataclass(frozen=True)
class Sensitivity:
    """Cost of quantizing one layer: the score of the network with only this layer quantized, and its loss of score.

    `saved_mb` is the reduction in size.
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
    """Quantize each layer alone and score the network (higher is better); return the layers, the costliest first.

    `score` gets a network in eval mode. Needs one evaluation per layer, plus one.
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
