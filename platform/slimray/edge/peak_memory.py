"""Memory and size of a network in int8 on a microcontroller, counted as TinyEngine's scheduler does.

In: operators in execution order (`operators` traces those of a module), with their input and output tensors. Out:
bytes. TinyEngine (MCUNet, arXiv 2007.10319; MCUNetV2, 2110.15352) places tensors by first fit, the largest first; a
depthwise convolution overwrites its input (counted so even if a shortcut reads the input again); all operators share
one scratch buffer, for columns of inputs and for one kernel. Weights stay in flash, one byte each, with a bias and a
scale of four bytes each per channel. Surprising: code and stack are not counted; a "KB" in limits is 1,000 bytes.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from slimray.spec import UserError

KB = 1000
# computed as part of the preceding operator, or only a view of a tensor
_FUSED = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Dropout, nn.Flatten, nn.Identity)
_FUSED_CALLS = (torch.flatten, torch.relu, functional.relu, functional.relu6, functional.dropout, "flatten", "relu")
_POOLED = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d)
_OWN = (nn.Sigmoid, nn.Hardsigmoid)  # operators with an output of their own and no weights
_OWN_CALLS = (operator.add, operator.iadd, operator.mul, operator.imul, torch.add, torch.mul, "mean")


@dataclass(frozen=True)
class Operator:
    """An operator: input tensors by number (without weights), and one output tensor of `values` int8.

    `kernel`, `given` (input channels per output channel) and `channels` are those of convolutions and linear layers, 0
    for others; `padded` is height times width of the padded input of a depthwise convolution, 0 for others.
    """

    inputs: tuple[int, ...]
    output: int
    values: int
    kernel: int = 0
    given: int = 0
    channels: int = 0
    padded: int = 0

    @property
    def weights(self) -> int:
        """Number of weights, without biases."""
        return self.kernel**2 * self.given * self.channels


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors (`arena`), `columns` of inputs and one `kernel`; their sum is the peak."""

    arena: int
    columns: int
    kernel: int

    @property
    def peak(self) -> int:
        """Memory that the network needs while it runs."""
        return self.arena + self.columns + self.kernel


def memory(operators: Sequence[Operator], given: int, in_place: bool = True) -> Memory:
    """Return the memory of operators that run one after the other on tensor 0, an input of `given` values.

    With `in_place`, depthwise convolutions overwrite their input.
    """
    last = {tensor: place for place, one in enumerate(operators) for tensor in one.inputs}
    first = [_Tensor(given, 0, last.get(0, 0))]
    buffers, of = [first], {0: first}
    for place, one in enumerate(operators):
        if in_place and one.padded:
            of[one.output] = of[one.inputs[0]]
        else:
            buffers.append([])
            of[one.output] = buffers[-1]
        of[one.output].append(_Tensor(one.values, place, last.get(one.output, place)))
    columns = [_columns(one, in_place) for one in operators]
    kernels = [2 * one.weights for one in operators if one.kernel > 1 and not one.padded]
    return Memory(_first_fit(buffers), max(columns, default=0), max(kernels, default=0))


def size(operators: Iterable[Operator]) -> int:
    """Return the bytes of weights, and of a bias and a scale per output channel."""
    return sum(one.weights + 8 * one.channels for one in operators)


@dataclass(frozen=True)
class _Tensor:
    """A tensor of `size` bytes that is needed from operator `start` to operator `end`."""

    size: int
    start: int
    end: int


def _first_fit(buffers: Iterable[Sequence[_Tensor]]) -> int:
    """Return the largest end address; the tensors of a buffer start at the same address."""
    placed: list[tuple[int, _Tensor]] = []
    for buffer in sorted(buffers, key=lambda buffer: -max(one.size for one in buffer)):
        beside = [
            (at, at + other.size, one.size)
            for at, other in placed
            for one in buffer
            if one.start <= other.end and other.start <= one.end
        ]
        address = 0
        for start, end, needed in sorted(beside):
            if start < address + needed:
                address = max(address, end)
        placed += [(address, one) for one in buffer]
    return max(at + one.size for at, one in placed)


def _columns(one: Operator, written_over: bool) -> int:
    """Return the bytes of scratch memory: two columns in 16 bits, or, for a depthwise one, two padded channels."""
    if one.padded:
        return 2 * (one.padded if written_over else one.kernel**2 * one.channels)
    return 4 * one.kernel**2 * one.given


# --------------------------------------------------------------------------------------------------------- tracing


def operators(module: nn.Module, shape: tuple[int, ...]) -> list[Operator]:
    """Return the operators of a module on the meta device; tensor 0 is its input, a sample of `shape` (C, H, W).

    Raises UserError for operators that TinyEngine does not have.
    """
    if len(shape) != 3:
        raise UserError(f"only networks of pictures run in TinyEngine, but this one takes {list(shape)}")
    tracer = _Tracer(fx.symbolic_trace(nn.Sequential(module)))  # otherwise a single layer would be traced into
    with torch.no_grad():
        tracer.run(torch.zeros(1, *shape, device="meta"))
    return tracer.found


def joined(parts: Sequence[Sequence[Operator]]) -> list[Operator]:
    """Return the operators of successive parts, each of which takes the output of the previous one."""
    found: list[Operator] = []
    for part in parts:
        first, base = (found[-1].output if found else 0), len(found)
        names = {0: first} | {one.output: one.output + base for one in part}
        found += [
            replace(one, inputs=tuple(names[number] for number in one.inputs), output=names[one.output]) for one in part
        ]
    return found


class _Tracer(fx.Interpreter):
    """Runs a graph and records the operators and the tensors between them."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.extra_traceback = False  # otherwise it adds lines to our error messages
        self.found: list[Operator] = []
        self.numbers: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "output":
            inputs = tuple(self.numbers[node] for node in n.all_input_nodes if node in self.numbers)
            self.numbers[n] = self._note(n, inputs, value)
        return value

    def _note(self, node: fx.Node, inputs: tuple[int, ...], value: Tensor) -> int:
        """Return the number of a node's output tensor."""
        module = self.fetch_attr(str(node.target)) if node.op == "call_module" else None
        if node.op == "placeholder":
            return 0
        if isinstance(module, _FUSED) or node.target in _FUSED_CALLS:
            return inputs[0]
        one = Operator(inputs, len(self.found) + 1, value.numel())
        if isinstance(module, nn.Linear):
            one = replace(one, kernel=1, given=module.in_features, channels=module.out_features)
        elif isinstance(module, nn.Conv2d):
            x = node.all_input_nodes[0]
            one = replace(one, kernel=module.kernel_size[0], channels=module.out_channels)
            one = replace(one, given=module.in_channels // module.groups)
            if module.groups == module.in_channels == module.out_channels > 1:
                height, width = self.env[x].shape[2:]
                pad = 2 * int(module.padding[0])
                one = replace(one, padded=(height + pad) * (width + pad))
        elif not isinstance(module, _POOLED + _OWN) and node.target not in _OWN_CALLS:
            raise UserError(f"TinyEngine has no operator for {module or node.target}")
        self.found.append(one)
        return one.output
