"""What is exported of a network: the module, its named inputs and outputs, and the states of an online step.

`whole` takes a network as it is. `step` takes a causal TSM as one frame and its states in, logits and new states out
(Temporal Shift Module, arXiv 1811.08383, online form): all tensors of four dimensions, states are slices of what flows,
never an input handed through, nor what a convolution gives. Surprising: networks that draw points at random draw them
evenly when they leave torch, so that an export answers the same twice.
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
    """A tensor that a step hands to the next one: the names of its input and output, its shape, zeros at first."""

    input: str
    output: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True, eq=False)
class Graph:
    """A module in eval mode with example `inputs` in the order of its arguments, the names of its flat `outputs`.

    `varying` are axes that may have any size; `states` of a step. Layers of the module named in `floats` stay float in
    formats in int8.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    varying: Varying = field(default_factory=dict)
    states: tuple[State, ...] = ()
    floats: tuple[str, ...] = ()


def ready(net: nn.Module) -> nn.Module:
    """Return a copy of a network in eval mode, which draws no points at random."""
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        if hasattr(module, "draws_evenly"):
            module.draws_evenly = True  # type: ignore[assignment]
    return net


def whole(net: nn.Module, example: Tensor, varying: dict[int, str]) -> Graph:
    """Return the graph of a network that `ready` made: `example` `[B, ...]` in, what it gives out.

    Batch and the axes of `varying` are free; negative ones count from the end.
    """
    varying = {axis % example.ndim: called for axis, called in varying.items()}
    with torch.no_grad():
        outputs = net(example)
    return Graph(net, {"input": example}, tuple(output_names(outputs)), {"input": {0: "batch", **varying}})


class _Step(nn.Module):
    """An online network with its buffers as arguments and outputs in a row."""

    def __init__(self, net: OnlineTSM):
        super().__init__()
        self.net = net

    def forward(self, frame: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        logits, states = self.net(frame, states)
        return logits, *states


def step(net: nn.Module, example: Tensor, where: str) -> Graph:
    """Return the graph of one step of a causal TSM; `example` are clips `[B, T, 3, H, W]`, of which a frame is taken.

    UserError, with `where`, for a network that has no online form.
    """
    if not hasattr(net, "per_frame"):
        raise UserError(f"{where}: the network is not a TSM, only a causal one runs frame by frame: leave it out")
    try:
        online = OnlineTSM(net).eval()  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"{where}: {error}: leave it out, or train with model.causal: true") from None
    frame = example[:1, 0]
    buffers = online.initial_buffers(1, *frame.shape[2:], channels=frame.shape[1])
    states = tuple(
        State(STATE_IN.format(number), STATE_OUT.format(number), tuple(one.shape)) for number, one in enumerate(buffers)
    )
    inputs = {"frame": frame} | {state.input: one for state, one in zip(states, buffers, strict=True)}
    return Graph(_Step(online), inputs, ("logits", *(state.output for state in states)), states=states)
