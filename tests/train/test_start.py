"""The network of a finished run, such as a teacher, is read by one rank and shared with all."""

from pathlib import Path

import safetensors.torch
import torch
from tests.ranks import run_ranks

from slimray import compress, runs
from slimray.tasks.network import load_network
from slimray.train.ranks import Ranks
from slimray.train.start import network_of

MODEL = {"name": "mobilenetv2", "num_classes": 5, "width": 0.25}
INPUT = {"recipe": {"kind": "image", "size": 32}, "pixels": {}, "classes": list("abcde"), "task": "classify"}


def of_a_rank(rank: int, world: int) -> Ranks:
    return Ranks(rank, world, torch.device("cpu"), 60, lambda doing, seconds, stacks: None)


def written(folder: str) -> runs.Run:
    """Write a run with a network in which no two values are equal."""
    torch.manual_seed(3)
    net = compress.build(**MODEL)
    for value in net.state_dict().values():
        value.copy_(torch.rand(value.shape) * 9)
    run = runs.run_at(folder)
    runs.write_model(run, safetensors.torch.save(net.state_dict()), MODEL, INPUT)
    return run


def read_on_a_rank(rank: int, folder: str) -> None:
    uri = folder if rank == 0 else f"{folder}-which-this-rank-cannot-see"
    net = network_of(of_a_rank(rank, 2), uri)
    wanted = load_network(runs.run_at(folder)).net
    assert not net.training
    assert [module.training for module in net.modules()] == [module.training for module in wanted.modules()]
    assert net.state_dict().keys() == wanted.state_dict().keys()
    for name, value in net.state_dict().items():
        assert torch.equal(value, wanted.state_dict()[name]), name


def test_one_rank_reads_the_network_of_a_run_for_all(tmp_path: Path):
    written(str(tmp_path))
    run_ranks(read_on_a_rank, str(tmp_path), world=2)


def test_a_rank_alone_reads_it_itself(tmp_path: Path):
    run = written(str(tmp_path))
    net = network_of(of_a_rank(0, 1), run.uri)
    assert torch.equal(next(net.parameters()), next(load_network(run).net.parameters()))
