"""The graph to export: a module, its named inputs and outputs, and the states of an online step.

`whole` takes a network as it is. `step` turns a causal TSM into a graph from one frame and its states to logits and new
states (Temporal Shift Module, arXiv 1811.08383, online form): all tensors have four dimensions, and states are slices
of activations, never an unchanged input or the whole output of a convolution. Surprising: networks that sample points
at random sample them evenly once exported, so that an export is deterministic.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slimray.edge.onnx_file import Varying, output_names
from slimray.models.tsm import OnlineTSM
from slimray.spec import UserError

STATE_IN, STATE_OUT = "state_{}", "next_state_{}"


@dataclass(frozen=True)
class State:
    """A tensor that a step hands to the next, initially zeros: the names of its input and output, and its shape."""

    input: str
    output: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True, eq=False)
class Graph:
    """A module in eval mode, example `inputs` in the order of its arguments, and the names of its flat `outputs`.

    `varying` are the axes that may have any size, `states` those of a step. The layers named in `floats` stay float in
    int8 formats.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    varying: Varying = field(default_factory=dict)
    states: tuple[State, ...] = ()
    floats: tuple[str, ...] = ()


def ready(net: nn.Module) -> nn.Module:
    """Return a copy of a network in eval mode that samples points evenly instead of at random."""
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        if hasattr(module, "draws_evenly"):
            module.draws_evenly = True  # type: ignore[assignment]
    return net


def whole(net: nn.Module, example: Tensor, varying: dict[int, str]) -> Graph:
    """Return the graph of a network prepared by `ready`, traced with `example` `[B, ...]`.

    The batch and the axes of `varying` may have any size; negative axes count from the end.
    """
    varying = {axis % example.ndim: called for axis, called in varying.items()}
    with torch.no_grad():
        outputs = net(example)
    return Graph(net, {"input": example}, tuple(output_names(outputs)), {"input": {0: "batch", **varying}})


class _Step(nn.Module):
    """An online network with its buffers as flat arguments and outputs."""

    def __init__(self, net: OnlineTSM):
        super().__init__()
        self.net = net

    def forward(self, frame: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        logits, states = self.net(frame, states)
        return logits, *states


def step(net: nn.Module, example: Tensor, where: str) -> Graph:
    """Return the graph of one step of a causal TSM; one frame is taken from `example`, clips `[B, T, 3, H, W]`.

    Raises UserError, with `where`, for a network that has no online form.
    """
    if not hasattr(net, "per_frame"):
        raise UserError(f"{where}: the network is not a TSM, and only a causal TSM runs frame by frame: remove it")
    try:
        online = OnlineTSM(net).eval()  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"{where}: {error}: remove it, or train with model.causal: true") from None
    frame = example[:1, 0]
    buffers = online.initial_buffers(1, *frame.shape[2:], channels=frame.shape[1])
    states = tuple(
        State(STATE_IN.format(number), STATE_OUT.format(number), tuple(one.shape)) for number, one in enumerate(buffers)
    )
    inputs = {"frame": frame} | {state.input: one for state, one in zip(states, buffers, strict=True)}
    return Graph(_Step(online), inputs, ("logits", *(state.output for state in states)), states=states)
