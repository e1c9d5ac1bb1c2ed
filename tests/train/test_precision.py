"""Training in half precision: the loss is scaled so that gradients survive, and less after an overflow."""

import numpy as np
import pytest
import torch
from torch import nn

from slimray.tasks.network import Input
from slimray.tasks.precision import arithmetic_of
from slimray.train import precision, speed
from slimray.train.gpus import GPUS
from slimray.train.methods.method import Piece, Setup
from slimray.train.methods.plain import PlainReplica
from slimray.train.spec import OptimSpec

CPU = torch.device("cpu")


class Head(nn.Module):
    """Linear layer over pixels whose loss has gradients of about `size`: `[B, 3, 2, 2]` -> `[B, 2]`."""

    def __init__(self, size: float):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.size = nn.Linear(12, 2), size

    def forward(self, x):
        return self.layer(x.flatten(1) * self.size)


def step_of(kind: str, size: float, steps: int = 1) -> tuple[PlainReplica, list[bool]]:
    optim = OptimSpec(
        lr=0.1, reference_batch=4, epochs=1, groups="plain", weight_decay=0, precision=kind, clip_norm=None
    )
    replica = PlainReplica(Head(size), Setup(optim, Input(), (3, 2, 2), CPU))
    data = np.random.default_rng(0).integers(0, 256, (4, 1, 2, 2, 3), dtype=np.uint8)
    pieces = [Piece(data, np.array([0, 1, 1, 0]))]
    return replica, [replica.step(pieces, 4, 0.1, (0, number)).finite for number in range(steps)]


def test_small_gradients_survive_in_fp16():
    exact, _ = step_of("fp32", 1e-6)
    start = Head(1e-6).layer.weight
    half, finite = step_of("fp16", 1e-6)
    wanted, got = exact.net.layer.weight - start, half.net.layer.weight - start
    assert finite == [True]
    assert wanted.norm() > 0
    assert (got - wanted).norm() < 0.02 * wanted.norm()


def test_a_step_that_overflows_is_dropped_and_the_next_is_tried_at_half_the_scale():
    replica, finite = step_of("fp16", 100.0)
    assert finite == [True]  # it may be finite at a smaller scale, so it is not a bad step
    assert replica.scale.value == precision.START_SCALE / 2
    assert torch.equal(replica.net.layer.weight, Head(100.0).layer.weight)
    replica, finite = step_of("fp16", 100.0, steps=12)
    assert all(finite)
    assert not torch.equal(replica.net.layer.weight, Head(100.0).layer.weight)


def test_the_scale_goes_round_with_a_checkpoint():
    first, _ = step_of("fp16", 100.0, steps=3)
    second, _ = step_of("fp16", 100.0, steps=0)
    second.load({name: value.clone() for name, value in first.tensors().items()})
    assert second.scale.value == first.scale.value < precision.START_SCALE
    assert "loss_scale" in first.tensors()
    assert first.numbers() == {"train/loss_scale": first.scale.value}
    assert "loss_scale" not in step_of("fp32", 1.0)[0].tensors()


def test_the_scale_grows_again():
    scale = precision.LossScale("fp16", CPU)
    for _ in range(precision.GROWTH_STEPS):
        scale.update(True)
    assert scale.value == 2 * precision.START_SCALE


@pytest.mark.parametrize("kind", ["auto", "bf16", "fp32"])
def test_other_arithmetic_has_no_scale(kind):
    replica, finite = step_of(kind, 1.0)
    assert finite == [True]
    assert replica.scale.value == 1.0
    assert replica.net.layer.weight.dtype == torch.float32


def test_what_auto_means_and_what_utilisation_is_measured_against(monkeypatch):
    assert arithmetic_of("auto", CPU) == "fp32"
    assert arithmetic_of("fp16", CPU) == "fp16"
    assert GPUS["V100"].peak("fp32") == 15.7e12
    assert GPUS["V100"].peak("fp16") == 125e12
    assert GPUS["T4"].peak("fp32") == 8.1e12
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100-SXM2-16GB")
    assert speed.mfu(10**9, 100.0, gpu, "fp32") == pytest.approx(6e11 / 15.7e12)
    assert speed.mfu(10**9, 100.0, gpu, "fp16") == pytest.approx(6e11 / 125e12)
