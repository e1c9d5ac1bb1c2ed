"""A compiled network learns as the plain one does; where compilation is impossible, a sentence reports it."""

import numpy as np
import pytest
import torch
from tests.ranks import run_ranks
from torch import nn

from slimray.edge.compiler import compiled
from slimray.spec import RunFailed, UserError
from slimray.tasks.network import Input
from slimray.train.methods.method import Piece, Setup
from slimray.train.methods.plain import PlainReplica
from slimray.train.spec import OptimSpec

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def here_alone(monkeypatch):
    """Compile in this process: a pool of processes takes longer to start than these networks take to compile."""
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    with config.patch(compile_threads=1):
        yield


class Tiny(nn.Module):
    """Convolution, BatchNorm, and a branch that the compiler cannot trace, so that its graph breaks there."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu().mean((2, 3))
        return self.head(x) if float(x.detach().sum()) >= 0 else self.head(-x)


def replica(compile: bool) -> PlainReplica:
    torch.manual_seed(0)
    optim = OptimSpec.model_validate({"epochs": 1, "lr": 0.1, "reference_batch": 5})
    return PlainReplica(Tiny(), Setup(optim, Input(), (3, 8, 8), CPU, compile=compile))


def pieces(step: int) -> list[Piece]:
    """Return pieces of four samples, of one, and of none."""
    draw = np.random.default_rng(step)
    sizes = (4, 1, 0)
    data = [draw.integers(0, 256, (n, 1, 8, 8, 3), dtype=np.uint8) for n in sizes]
    return [Piece(some, draw.integers(0, 3, len(some))) for some in data]


def test_a_compiled_network_takes_the_steps_of_the_plain_one_and_keeps_its_names():
    plain, fast = replica(False), replica(True)
    for step in range(2):
        wanted, found = (one.step(pieces(step), 5, 0.1, (0, step)) for one in (plain, fast))
        assert found.finite
        assert found.loss_sum == pytest.approx(wanted.loss_sum, rel=1e-4)
    ours, theirs = plain.tensors(), fast.tensors()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4)
    other = replica(True)
    other.load(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in other.tensors().items())


def two_steps(rank: int, world: int, cuts: list[list[tuple[int, int]]], compile: bool) -> dict[str, torch.Tensor]:
    """Return the weights after two steps on samples 0 to 4, of which this rank has the pieces `cuts[rank]`."""
    torch.manual_seed(0)
    optim = OptimSpec.model_validate({"epochs": 1, "lr": 0.1, "reference_batch": 5})
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    one = PlainReplica(net, Setup(optim, Input(), (3, 8, 8), CPU, rank, world, compile=compile))
    draw = np.random.default_rng(0)
    data, labels = draw.integers(0, 256, (5, 1, 8, 8, 3), dtype=np.uint8), draw.integers(0, 3, 5)
    for step in range(2):
        one.step([Piece(data[lo:hi], labels[lo:hi]) for lo, hi in cuts[rank]], 5, 0.1, (0, step))
    return {name: value.clone() for name, value in one.net.state_dict().items()}


def rank_of_two(rank: int, out: str) -> None:
    torch.save(two_steps(rank, 2, [[(0, 2), (2, 3)], [(3, 5), (5, 5)]], True), f"{out}/{rank}.pt")


def test_two_compiled_ranks_that_accumulate_learn_as_one_plain_rank(tmp_path):
    run_ranks(rank_of_two, str(tmp_path))
    wanted = two_steps(0, 1, [[(0, 5)]], False)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_what_compiles_must_be_there_and_work(tmp_path):
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(UserError, match=r"needs a C\+\+ comp"):
        compiled(Tiny(), CPU)
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'c++ 99' && exit 0\nexit 1\n")
    broken.chmod(0o755)
    with config.patch({"cpp.cxx": (None, str(broken)), "force_disable_caches": True}):
        call = compiled(nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 13)), CPU)
        with pytest.raises(RunFailed, match=r"scale\.compile: torch cannot compile this network"):
            call(torch.randn(5, 7))
