"""Quantization-aware training: trained parameters, learned ranges, zeros that stay zero, and integers at the end."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimray.compress import quantization, sparsity
from slimray.compress.quantized import FakeQuantized
from slimray.tasks.network import Input, to_input
from slimray.train.methods.constrained import Constrained
from slimray.train.methods.method import Piece, Replica, Setup
from slimray.train.methods.plain import Plain
from slimray.train.methods.quantized import QuantizationAware, RangeRule
from slimray.train.spec import OptimSpec

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
PICTURES, LABELS = RNG.integers(0, 256, (16, 1, 8, 8, 3), dtype=np.uint8), np.arange(16) % 3


def rounding(scheme: Any, bits: tuple[int, int], sparse: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(128, 3),
    )
    if sparse:
        sparsity.sparsify(net, {"3": 0.5})
    x = to_input(PICTURES, Input(), CPU)
    return quantization.prepare(net.eval(), x, [x], bits, scheme)


def trained(net: nn.Module, ranges: RangeRule, steps: int = 12, lr: float = 0.02) -> tuple[Replica, list[float]]:
    optim = OptimSpec.model_validate({"lr": lr, "reference_batch": 16, "epochs": 1, "groups": "no_norm_decay"})
    method = QuantizationAware(Constrained(Plain()), ranges)
    replica = method.replica(net, lambda: copy.deepcopy(net), Setup(optim, Input(), (3, 8, 8), CPU))
    pieces = [Piece(PICTURES, LABELS)]
    return replica, [replica.step(pieces, 16, lr, (0, step)).loss_sum for step in range(steps)]


def second(net: nn.Module) -> FakeQuantized:
    layer = net.get_submodule("3")
    assert isinstance(layer, FakeQuantized)
    return layer


def ranges_of(net: nn.Module) -> Tensor:
    return torch.stack([m.input_range.detach().clone() for m in net.modules() if isinstance(m, FakeQuantized)])


@pytest.mark.parametrize(("scheme", "bits"), [("int8", (8, 8)), ("int8", (4, 4)), ("linear", (4, 4))])
def test_a_network_learns_while_it_rounds_and_answers_the_same_in_whole_numbers(scheme, bits):
    net, record = rounding(scheme, bits)
    before = ranges_of(net)
    replica, losses = trained(net, "learned")
    assert losses[-1] < 0.9 * losses[0]
    after = ranges_of(replica.net)
    assert not torch.equal(before, after)
    low, high = after.T
    assert bool((low <= 0).all())
    assert bool((high > 0).all())
    if scheme == "linear":
        assert torch.equal(low == 0, before[:, 0] == 0), "a half wave stays one"
        assert torch.equal(low[low < 0], -high[low < 0])
    whole, told = quantization.finish(replica.averaged(), record)
    x = to_input(PICTURES, Input(), CPU)
    with torch.no_grad():
        assert torch.equal(whole(x), replica.averaged()(x))
    assert told["form"] == "whole"


def test_frozen_ranges_are_those_of_the_calibration():
    net, _ = rounding("int8", (4, 4))
    before, weights = ranges_of(net), copy.deepcopy(net.state_dict())
    replica, losses = trained(net, "frozen")
    assert torch.equal(ranges_of(replica.net), before)
    assert losses[-1] < losses[0]
    assert not torch.equal(replica.net.state_dict()["3.weight"], weights["3.weight"])


def test_pruned_weights_stay_zero_while_a_network_rounds():
    net, _ = rounding("int8", (8, 8), sparse=True)
    zeros = second(net).weight == 0
    assert int(zeros.sum()) == 288
    replica, _ = trained(net, "learned")
    assert torch.equal(second(replica.net).weight == 0, zeros)


def test_ranges_that_a_step_turned_over_hold_zero_again():
    net, _ = rounding("int8", (8, 8))
    replica, _ = trained(net, "learned", steps=1)
    layers = [m for m in replica.net.modules() if isinstance(m, FakeQuantized)]
    with torch.no_grad():
        layers[1].input_range.copy_(torch.tensor([0.5, -0.25]))
    assert replica.constraint is not None
    replica.constraint.after_step()
    low, high = layers[1].input_range.tolist()
    assert low == 0 < high < 1e-6
