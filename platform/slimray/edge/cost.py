"""Costs of a network: parameters and multiply-accumulates, counted without computing.

MACs are those of convolutions, linear layers and matrix products for one sample ("FLOPs" in the papers of this field
are MACs). Counting runs on the meta device, which propagates shapes but no numbers.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slimray.compress.quantized import Quantized
from slimray.edge.compiler import without_compiler


def count_params(module: nn.Module) -> int:
    """Return the number of parameters of `module`, trainable or not, with integer weights but without other buffers."""
    whole = sum(m.num_weights for m in module.modules() if isinstance(m, Quantized))
    return sum(parameter.numel() for parameter in module.parameters()) + whole


def count_macs(module: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the MACs of one forward pass of `module` in eval mode on an input of `input_shape` (batch included)."""
    on_meta = all(parameter.is_meta for parameter in module.parameters())
    net = (module if on_meta else copy.deepcopy(module).to("meta")).eval()
    with without_compiler(), FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(*input_shape, device="meta"))
    return counter.get_total_flops() // 2


def build_on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Return the module that `make` builds, with shapes but without memory."""
    with without_compiler(), torch.device("meta"):
        return make()
