"""What a network costs: parameters and multiply-accumulates, counted without computing.

MACs are those of convolutions, linear layers and matrix products for one sample ("FLOPs" in the papers of this field
are MACs). Counting runs on the meta device: shapes flow, numbers do not.
"""

import contextlib
import copy
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_params(module: nn.Module) -> int:
    """The number of parameters of `module`, trainable or not; buffers do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, input_shape: Sequence[int]) -> int:
    """MACs of one forward pass of `module` in eval mode on an input of `input_shape` (batch included)."""
    on_meta = all(parameter.is_meta for parameter in module.parameters())
    net = (module if on_meta else copy.deepcopy(module).to("meta")).eval()
    with without_compiler(), FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(*input_shape, device="meta"))
    return counter.get_total_flops() // 2


def build_on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Return what `make` builds, with shapes and no memory."""
    with without_compiler(), torch.device("meta"):
        return make()


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Keep torch from importing its compiler while shapes flow, which takes longer than all of the counting.

    On the meta device many operators are Python functions that torch keeps from being compiled: the first call of each
    imports `torch._dynamo` for that. Where that is not imported, nothing is compiled: for as long as the block runs, a
    module stands in its place that leaves these functions as they are, and afterwards torch finds them untouched.
    """
    name = "torch._dynamo"
    if name in sys.modules:
        yield
        return
    marked: list[Any] = []

    def disable(function: Any, *options: Any, **named: Any) -> Any:
        marked.append(function)
        return function

    stand_in: Any = types.ModuleType(name)
    stand_in.disable = disable
    sys.modules[name] = torch._dynamo = stand_in  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del sys.modules[name], torch._dynamo  # type: ignore[attr-defined]
        for function in marked:
            vars(function).pop("__dynamo_disable", None)
