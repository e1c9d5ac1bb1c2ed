"""A rank's step is cut into microbatches of the rows that count, the same number on every rank."""

import numpy as np
import pytest
import torch
from ray.data.block import BlockAccessor

from slimray.data.pipeline import Batch
from slimray.data.plan import Phase, rank_slice
from slimray.data.token_plan import Bags
from slimray.tasks.network import Input, to_input
from slimray.train import pieces
from slimray.train.ranks import Ranks

LENGTHS = np.array([2, 2, 3, 3, 3, 4, 4, 5, 5, 5])
NUM, WORLD, PAD = 10, 3, 1
BY_COUNT = {"kind": "image", "target": {"shape": [], "dtype": "int64", "fill": -1}}
BY_TOKENS = {"kind": "text", "target": {"shape": [5], "dtype": "int64", "fill": PAD}}


def rows(phase: Phase, step: int, rank: int) -> Batch | None:
    """Return a rank's batch at its positions of the plan: samples hold their number + 2, padded to five."""
    lo, hi = rank_slice(phase, step, rank, WORLD)
    if lo == hi:
        return None
    samples = phase.plan.samples(lo, hi, 0, lambda: np.arange(NUM))
    lengths = LENGTHS[samples]
    data = np.where(np.arange(5) < lengths[:, None], samples[:, None] + 2, PAD)
    columns = {
        "data": data[:, None],
        "label": data if phase.bags else samples,
        "position": np.arange(lo, hi),
        "sample": samples,
        "valid": np.ones(len(samples), bool),
        "path": np.array([""] * len(samples)),
        "reason": np.array([""] * len(samples)),
    }
    return Batch([BlockAccessor.batch_to_arrow_block(columns)])


def cut(phase: Phase, step: int, rank: int, bad: int | None) -> pieces.Cut:
    batch, ranks = rows(phase, step, rank), Ranks(rank, WORLD, torch.device("cpu"), 600, lambda *told: None)
    keep = np.zeros(0, bool) if batch is None else batch.sample != bad
    found = pieces.cut(batch, keep, phase, step, 2, ranks)
    assert found.batch is batch
    assert np.array_equal(found.keep, keep)
    return found


def test_what_is_on_the_device_already_is_taken_as_an_array_is():
    data = np.random.default_rng(0).integers(0, 256, (3, 2, 4, 4, 3), dtype=np.uint8)
    cpu, pixels = torch.device("cpu"), Input()
    wanted = to_input(data, pixels, cpu)
    assert torch.equal(to_input(torch.from_numpy(data), pixels, cpu), wanted)
    assert torch.equal(
        to_input(torch.from_numpy(data).transpose(2, 3).contiguous().transpose(2, 3), pixels, cpu), wanted
    )
    assert pieces.sent(data, cpu) is data


@pytest.mark.parametrize("bad", [None, 4])
def test_all_rows_but_bad_ones_are_in_pieces_of_at_most_so_many(bad: int | None):
    phase, seen = Phase("train", "train", 1, NUM, 7, True, BY_COUNT, version=3), []
    for step in range(phase.num_steps):
        found = [cut(phase, step, rank, bad).pieces for rank in range(WORLD)]
        assert len({len(one) for one in found}) == 1
        assert all(len(piece.data) <= 2 for one in found for piece in one)
        for piece in (piece for one in found for piece in one if len(piece.data)):
            seen += piece.labels.tolist()
            assert piece.data.max((1, 2)).tolist() == (piece.labels + 2).tolist()
    assert sorted(seen) == [i for i in range(NUM) if i != bad]


def test_a_bag_is_a_piece_as_long_as_its_longest_sample():
    bags = Bags.of(LENGTHS, 10)
    phase, seen = Phase("train", "train", 1, NUM, 4, True, BY_TOKENS, bags=bags, version=3), []
    for step in range(phase.num_steps):
        for rank in range(WORLD):
            for piece in (one for one in cut(phase, step, rank, 9).pieces if len(one.data)):
                samples = piece.data[:, 0, 0] - 2
                assert piece.data.shape[-1] == piece.labels.shape[-1] == LENGTHS[samples].max()
                assert np.array_equal(piece.data[:, 0], piece.labels)
                seen += samples.tolist()
    assert sorted(seen) == list(range(9))
