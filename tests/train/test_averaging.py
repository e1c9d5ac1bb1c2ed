"""Averaged weights keep the statistics that belong to them, and forget their starting values."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.ranks import run_ranks
from torch import Tensor, nn

from slimray.tasks.network import Input, to_input
from slimray.train.averaging import Ema
from slimray.train.batchnorm import merge_norm_states, norm_state
from slimray.train.methods import method
from slimray.train.methods.method import Piece, Setup
from slimray.train.methods.plain import PlainReplica
from slimray.train.spec import OptimSpec

SHAPE = (3, 4, 4)


class Classifier(nn.Module):
    """Two convolutions with BatchNorm, and a head: `[B, 3, 4, 4]` -> `[B, 2]`."""

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
    """Return images in which one channel is brighter or darker than another."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, num)
    data = rng.integers(0, 200, (num, 1, 4, 4, 3), dtype=np.uint8)
    data[labels == 1, ..., 0] += 50
    return data, labels


def replica(rank: int = 0, world: int = 1, **optim) -> PlainReplica:
    torch.manual_seed(0)
    fields = {"lr": 0.1, "reference_batch": 32, "epochs": 1, "groups": "plain"} | optim
    setup = Setup(OptimSpec.model_validate(fields), Input(), SHAPE, torch.device("cpu"), rank, world)
    return PlainReplica(Classifier(), setup)


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
    ema.steps.fill_(10_000)
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


def of_all_ranks(mine: Tensor) -> Tensor:
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone)


def statistics_on_a_rank(rank: int, at_once: int, folder: str) -> None:
    method.GATHERED = at_once
    one = replica(rank, 3, ema=0.9)
    for step in range(2):
        one.step([Piece(*samples(8, 10 * step + rank))], 24, 0.1, (0, step))
    own, averaged = of_all_ranks(norm_state(one.net)), of_all_ranks(one.ema.norms)
    assert len(own.unique(dim=0)) == 3
    assert torch.equal(norm_state(one.averaged()), merge_norm_states(averaged, one.net))
    state = one.tensors()
    found = {name: value for name, value in state.items() if "norms." in name}
    wanted = {f"norms.{n}": row for n, row in enumerate(own)} | {
        f"ema_norms.{n}": row for n, row in enumerate(averaged)
    }
    assert list(found) == ([] if rank else sorted(wanted))  # only rank 0 writes them
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    if rank == 0:
        torch.save(state, f"{folder}/state.pt")
    dist.barrier()
    again = replica(rank, 3, ema=0.9)
    again.load(torch.load(f"{folder}/state.pt", weights_only=True))
    assert torch.equal(norm_state(again.net), own[rank])
    assert torch.equal(again.ema.norms, averaged[rank])


@pytest.mark.parametrize("at_once", [3, 99, 2**24], ids=["a number", "a layer", "all"])
def test_every_rank_goes_on_with_its_own_statistics_and_shows_those_of_all(at_once: int, tmp_path):
    run_ranks(statistics_on_a_rank, at_once, str(tmp_path), world=3)
    alone = replica(ema=0.9)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    alone.load(state)
    assert torch.equal(
        norm_state(alone.net), merge_norm_states(torch.stack([state[f"norms.{n}"] for n in range(3)]), alone.net)
    )
