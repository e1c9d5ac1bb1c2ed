"""Data that one rank has read reaches all ranks: bytes and values of tensors, in pieces."""

import random

import pytest
import torch
from tests.ranks import run_ranks

from slimray.train import ranks
from slimray.train.ranks import Ranks

PIECE = 1000


def of_a_rank(rank: int, world: int) -> Ranks:
    return Ranks(rank, world, torch.device("cpu"), 60, lambda doing, seconds, stacks: None)


def bytes_on_a_rank(rank: int, size: int) -> None:
    ranks.SHARED = PIECE
    wanted = random.Random(size).randbytes(size)
    assert of_a_rank(rank, 3).share(wanted if rank == 0 else None) == wanted


@pytest.mark.parametrize("size", [0, 1, PIECE, 2 * PIECE + 7])
def test_bytes_of_one_rank_reach_all(size: int):
    run_ranks(bytes_on_a_rank, size, world=3)


def values_on_a_rank(rank: int) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    net.register_buffer("mask", torch.zeros(3, 2, dtype=torch.bool))
    net.register_buffer("coarse", torch.zeros(3, dtype=torch.bfloat16))
    net.register_buffer("none", torch.zeros(0))
    wanted = {name: torch.full_like(value, 3) for name, value in net.state_dict().items()}
    if rank == 0:
        net.load_state_dict(wanted)
    of_a_rank(rank, 2).give(net.state_dict().values())
    for name, value in net.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    assert net[0].weight.requires_grad


def test_values_of_one_rank_become_those_of_all():
    run_ranks(values_on_a_rank, world=2)


def test_a_rank_alone_has_what_it_has():
    alone = of_a_rank(0, 1)
    tensor = torch.ones(2)
    alone.give([tensor])
    assert alone.share(b"bytes") == b"bytes"
    assert tensor.tolist() == [1, 1]
