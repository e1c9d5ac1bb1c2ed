"""A validation gives the same result whenever it runs, and computes in the arithmetic of the training."""

from typing import cast

import numpy as np
import pytest
import torch
from ray.data.block import BlockAccessor
from torch import nn

from slimray import models
from slimray.data.pipeline import Batch
from slimray.tasks.network import Input, predict_outputs
from slimray.tasks.precision import computing, judged_in
from slimray.train.loop import score_batch

CPU = torch.device("cpu")


def frustums(count: int = 6, points: int = 64) -> Batch:
    """Return frustums, one per class, with twice as many points on the object as `mask_points` keeps."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(count, 1, 7, points)).astype(np.float32)
    data[:, :, 4:] = np.eye(3, dtype=np.float32)[np.arange(count) % 3][:, None, :, None]
    label = np.zeros((count, points + 11), np.float32)
    label[:, :points] = 1
    label[:, points : points + 7] = [1, 2, 10, 4, 1.7, 1.5, 0.6]
    columns = {
        "data": data,
        "label": label,
        "position": np.arange(count),
        "sample": np.arange(count),
        "valid": np.ones(count, bool),
        "path": np.array(["a"] * count),
        "reason": np.array([""] * count),
    }
    return Batch([BlockAccessor.batch_to_arrow_block(columns)])


class Kept:
    """Score that keeps the predicted boxes, without rounding them to counts."""

    def __init__(self):
        self.centers: list[torch.Tensor] = []

    def add(self, outputs, targets):
        self.centers.append(outputs["center"])

    def tensors(self):
        return self.centers

    def result(self):
        return {"num_samples": sum(map(len, self.centers))}


def validated(net: nn.Module, seed: tuple[int, int, int], precision: str = "auto") -> torch.Tensor:
    """Return the centers of boxes that a validation predicts in a step, `[6, 3]`."""
    score = Kept()
    score_batch(net, frustums(), Input(), CPU, 3, score, seed, precision)
    assert score.result() == {"num_samples": 6}
    return torch.cat(score.tensors())


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """Network that samples some of the points it assigns to the object, at random."""
    torch.manual_seed(0)
    net = models.build("frustum_pointnet", num_classes=3, width=0.125, num_points=16).eval()
    with torch.no_grad():  # every point is on the object, so there are more than it uses
        parameters = dict(net.named_parameters())
        last = [name for name in parameters if name.startswith("inst_seg") and name.endswith("bias")][-1]
        parameters[last].copy_(torch.tensor([-9.0, 9.0]))
    return net


def test_what_a_network_draws_is_the_same_at_every_validation_whatever_was_drawn_before(net):
    first = validated(net, (7, 2, 1))
    torch.rand(1000)  # a resumed run has drawn other random numbers before
    assert torch.equal(validated(net, (7, 2, 1)), first)
    for other in ((8, 2, 1), (7, 3, 1), (7, 2, 0)):
        assert not torch.equal(validated(net, other), first)


class Seen(nn.Module):
    """Network that records the dtypes in which its convolutions computed."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.types = net, set()
        for module in net.modules():
            if isinstance(module, nn.Conv1d):
                module.register_forward_hook(lambda layer, taken, out: self.types.add(out.dtype))

    def forward(self, x: torch.Tensor):
        return self.net(x)


@pytest.mark.parametrize(
    ("precision", "computed"), [("fp32", torch.float32), ("auto", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_validation_computes_as_the_training_does(net, precision, computed):
    seen = Seen(net)
    validated(seen, (0, 0, 0), precision)
    assert seen.types == {computed}


def test_a_network_trained_in_float32_is_used_in_float32():
    assert [judged_in(one) for one in ("fp32", "tf32", "auto", "bf16", "fp16")] == [
        "fp32", "tf32", "auto", "auto", "auto",
    ]  # fmt: skip
    layer = nn.Conv2d(3, 4, 1)
    views = np.random.default_rng(0).integers(0, 256, (2, 1, 5, 5, 3), np.uint8)
    exact, half = (cast(torch.Tensor, predict_outputs(layer, views, Input(), CPU, 2, one)) for one in ("fp32", "bf16"))
    assert exact.dtype == half.dtype == torch.float32
    assert 0 < (exact - half).abs().max() < 0.05


def test_the_settings_of_products_are_left_as_they_were():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for wanted in ("tf32", "fp32"):
        with computing(CPU, wanted):
            assert torch.backends.cuda.matmul.allow_tf32 is (wanted == "tf32")
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
