"""Steps that a GPU checks by itself: nothing is read back, and steps that are not finite are dropped on the device.

That path also works with tensors on the CPU (`Setup.queued`), and is compared here with the path that checks
every step.
"""

import numpy as np
import pytest
import torch
from tests.ranks import run_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimray.compress import sparsity
from slimray.tasks.network import Input
from slimray.train.methods.constrained import Constrained
from slimray.train.methods.method import Piece, Replica, Setup
from slimray.train.methods.plain import Plain
from slimray.train.metrics import Dropped
from slimray.train.ranks import Ranks
from slimray.train.spec import OptimSpec

CPU, SHAPE = torch.device("cpu"), (3, 4, 4)
OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "ema": 0.9},
    "sgd with nesterov": {"optimizer": "sgd", "nesterov": True, "class_weights": (1.0, 2.0)},
    "sgd without momentum": {"optimizer": "sgd", "momentum": 0.0},
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw", "ema": 0.9},
    "lars": {"optimizer": "lars"},
    "fp16": {"precision": "fp16"},
}


class NothingRead(TorchDispatchMode):
    """Fails if the value of a tensor is read by Python, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **kwargs or {})


class Classifier(nn.Module):
    """Convolution with BatchNorm, dropout and a head: `[B, 3, 4, 4]` -> `[B, 2]`."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def make(kind: str, queued: bool = True, rank: int = 0, world: int = 1, pruned: bool = False) -> Replica:
    fields = {"lr": 0.05, "reference_batch": 8, "epochs": 1, "groups": "no_norm_decay", "weight_decay": 0.01}
    optim = OptimSpec.model_validate(fields | OPTIMIZERS[kind])
    torch.manual_seed(0)
    net = Classifier()
    if pruned:
        sparsity.sparsify(net, {"body.0": 0.5})
    method = Constrained(Plain()) if pruned else Plain()
    return method.replica(net, Classifier, Setup(optim, Input(), SHAPE, CPU, rank, world, queued=queued))


def pieces(number: int, finite: bool = True) -> list[Piece]:
    rng = np.random.default_rng(number)
    data = rng.normal(size=(2, 4, 1, 3, 4, 4)).astype(np.float32)
    if not finite:
        data[1, 0, 0, 0, 0, 0] = np.inf
    return [Piece(one, rng.integers(0, 2, 4)) for one in data]


def train(replica: Replica, numbers: range, lost: tuple[int, ...] = ()) -> list[bool]:
    """Take a step on samples of each number, after a step that is not finite for the numbers in `lost`."""
    fits = []
    for number in numbers:
        for finite in (False, True) if number in lost else (True,):
            fits.append(replica.step(pieces(number, finite), 8, 0.05, (0, number)).finite)
    return fits


def state(replica: Replica) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in replica.tensors().items() if name != "loss_scale"}


def require_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_reads_nothing(kind: str):
    replica = make(kind)
    train(replica, range(1))  # the first sends constants
    given = [pieces(1), pieces(2, finite=False)]
    with NothingRead():
        reports = [replica.step(one, 8, 0.05, (0, number)) for number, one in enumerate(given)]
    assert reports[0].finite
    assert reports[1].finite == (kind == "fp16")  # which may be finite at half the scale
    with NothingRead(), pytest.raises(AssertionError):
        make(kind, queued=False).step(given[0], 8, 0.05, (0, 0))


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_is_dropped_leaves_no_trace(kind: str, pruned: bool):
    whole, other = make(kind, pruned=pruned), make(kind, pruned=pruned)
    train(whole, range(3))
    fits = train(other, range(3), lost=(0, 2))
    assert fits == ([True] * 5 if kind == "fp16" else [False, True, True, False, True])
    if kind == "fp16":
        assert other.scale.value == whole.scale.value / 4
        for name, value in state(whole).items():  # gradients had another scale, so rounding differs
            torch.testing.assert_close(value, state(other)[name], rtol=1e-2, atol=1e-3)
    else:
        require_equal(state(whole), state(other))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_both_ways_learn_the_same(kind: str):
    queued, looked_at = make(kind), make(kind, queued=False)
    for replica in (queued, looked_at):
        train(replica, range(4), lost=(1,))
    for name, value in state(looked_at).items():
        torch.testing.assert_close(state(queued)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_of_one_way_goes_on_in_the_other(kind: str, first: bool):
    whole, before, after = make(kind, first), make(kind, first), make(kind, not first)
    train(whole, range(4))
    train(before, range(2))
    after.load({name: value.clone() for name, value in before.tensors().items()})
    train(after, range(2, 4))
    for name, value in state(whole).items():
        torch.testing.assert_close(state(after)[name], value, rtol=1e-4, atol=1e-5)


def one_of_two(rank: int) -> None:
    replica = make("adamw", rank=rank, world=2)
    before = state(replica)
    report = replica.step(pieces(rank, finite=rank == 0), 16, 0.05, (0, 0))
    assert not report.finite
    for name, value in state(replica).items():
        assert name not in before or torch.equal(value, before[name]), name
    assert replica.step(pieces(rank), 16, 0.05, (0, 1)).finite
    mine = torch.cat([value.flatten() for value in replica.net.parameters()])
    everyone = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(everyone, mine)
    assert torch.equal(*everyone)


def test_what_one_rank_finds_not_finite_all_drop():
    run_ranks(one_of_two)


def test_steps_that_were_dropped_are_counted_until_somebody_looks():
    dropped = Dropped(CPU)
    with NothingRead():
        for fits in (False, True, False, False, True):
            dropped.note(torch.tensor(fits))
    assert dropped.look() == (2, 3)
    dropped.note(torch.tensor(False))
    dropped.note(torch.tensor(False))
    assert dropped.look() == (2, 2)
    dropped.note(torch.tensor(False))
    assert dropped.look() == (3, 1)  # in a row, whenever the count is read
    assert dropped.look() == (0, 0)


def numbers_of(rank: int) -> None:
    # for ranks with another device: a CPU has no queue to wait for
    ranks = Ranks(rank, 2, torch.device("meta"), 60, lambda doing, seconds, stacks: None)
    assert ranks.numbers is not None
    assert ranks.sum(rank, 1.0) == [1.0, 2.0]
    assert ranks.gather(rank, 3.0).tolist() == [[0.0, 1.0], [3.0, 3.0]]
    assert ranks.union([rank, 5]) == [0, 1, 5]
    assert ranks.everyone({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert ranks.agree(rank == 0)
    ranks.watchdog.close()


def test_ranks_tell_each_other_numbers_without_their_devices():
    run_ranks(numbers_of)
