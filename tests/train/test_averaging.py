"""Averaged weights keep the statistics that belong to them, and forget where they started."""

import numpy as np
import pytest
import torch
from torch import nn

from slimray.tasks.network import Input, to_input
from slimray.train.averaging import Ema
from slimray.train.batchnorm import norm_state
from slimray.train.methods.method import Piece, Setup
from slimray.train.methods.plain import PlainReplica
from slimray.train.spec import OptimSpec

SHAPE = (3, 4, 4)


class Classifier(nn.Module):
    """Two convolutions with BatchNorm and a head: `[B, 3, 4, 4]` -> `[B, 2]`."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def samples(num: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pictures in which a channel is brighter than another, or darker."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, num)
    data = rng.integers(0, 200, (num, 1, 4, 4, 3), dtype=np.uint8)
    data[labels == 1, ..., 0] += 50
    return data, labels


def replica(**optim) -> PlainReplica:
    torch.manual_seed(0)
    fields = {"lr": 0.1, "reference_batch": 32, "epochs": 1, "groups": "plain"} | optim
    return PlainReplica(Classifier(), Setup(OptimSpec.model_validate(fields), Input(), SHAPE, torch.device("cpu")))


def train(one: PlainReplica, steps: range) -> None:
    for step in steps:
        data, labels = samples(32, step)
        one.step([Piece(data, labels)], 32, 0.1, (0, step))


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    data, labels = samples(400, 12345)
    return float((net(to_input(data, Input(), torch.device("cpu"))).argmax(1).numpy() == labels).mean())


def test_averaged_weights_are_shown_with_averaged_statistics():
    one = replica(ema=0.9)
    by_hand = norm_state(one.net)
    for step in range(30):
        train(one, range(step, step + 1))
        by_hand = by_hand.lerp(norm_state(one.net), 1 - min(0.9, (2 + step) / (11 + step)))
    shown = norm_state(one.averaged())
    assert not torch.equal(shown, norm_state(one.net))
    torch.testing.assert_close(shown, by_hand)


def test_what_is_averaged_scores_like_what_is_trained():
    one = replica(ema=0.999)
    train(one, range(120))
    trained = PlainReplica(one.net, one.setup)
    trained.ema = None
    assert accuracy(trained.averaged()) > 0.9
    assert accuracy(one.averaged()) > accuracy(trained.averaged()) - 0.05


def test_an_average_warms_up_and_then_follows_with_its_decay():
    net = nn.Linear(1, 1)
    nn.init.zeros_(net.weight)
    ema = Ema(net, 0.9)
    nn.init.ones_(net.weight)
    ema.update(net)
    assert ema.average["weight"].item() == pytest.approx(1 - 2 / 11)
    ema.steps = 10_000
    nn.init.zeros_(net.weight)
    ema.update(net)
    assert ema.average["weight"].item() == pytest.approx(0.9 * (1 - 2 / 11))


def test_an_average_goes_on_where_it_stopped_and_one_of_an_old_checkpoint_without_warm_up():
    whole, first, second = replica(ema=0.9), replica(ema=0.9), replica(ema=0.9)
    train(whole, range(8))
    train(first, range(5))
    state = {name: value.clone() for name, value in first.tensors().items()}
    second.load(state)
    train(second, range(5, 8))
    for name, value in whole.tensors().items():
        assert torch.equal(value, second.tensors()[name]), name
    old = {name: value for name, value in state.items() if not name.startswith("ema_")}
    third = replica(ema=0.9)
    third.load(old)
    assert third.ema.steps > 10**6
    assert torch.equal(third.ema.norms, norm_state(third.net))
