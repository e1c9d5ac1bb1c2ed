"""Ranks exchange bad samples by number, and checkpoints of older versions store them as masks."""

import numpy as np
import pytest
import torch
from ray.data.block import BlockAccessor
from tests.ranks import run_ranks

from slimray import runs
from slimray.data.pipeline import Batch
from slimray.data.plan import Phase
from slimray.train.metrics import BadSamples
from slimray.train.ranks import Ranks

NUM = 1_000_000_000  # no array of this size may be allocated


def batch(bad: list[int], good: list[int]) -> Batch:
    samples = np.array([*bad, *good])
    columns = {
        "data": np.zeros((len(samples), 1), np.uint8),
        "label": np.zeros(len(samples), np.int64),
        "position": np.arange(len(samples)),
        "sample": samples,
        "valid": np.array([False] * len(bad) + [True] * len(good)),
        "path": np.array([f"{i}.mp4" for i in samples]),
        "reason": np.array(["no"] * len(bad) + [""] * len(good)),
    }
    return Batch([BlockAccessor.batch_to_arrow_block(columns)])


def alone(rank: int = 0, world: int = 1) -> BadSamples:
    return BadSamples(NUM, Ranks(rank, world, torch.device("cpu"), 600, lambda *told: None))


def phase(split: str) -> Phase:
    return Phase(split, split, 0, NUM, 4, True, {})


def test_what_was_found_counts_from_the_next_epoch_on_and_is_quarantined_once(tmp_path):
    run, bad = runs.run_at(str(tmp_path)), alone()
    writer = runs.PartWriter(run, "quarantine", 1, 0)
    for _ in range(2):
        bad.note(batch([7, NUM - 1], [3]), phase("train"), writer)
    bad.note(batch([9], []), phase("val"), writer)
    assert not bad.is_known(np.array([3, 7])).any()
    bad.end_epoch()
    assert bad.is_known(np.array([3, 7, 9, NUM - 1])).tolist() == [False, True, False, True]
    writer.close()
    rows = [(row["sample"], row["split"]) for row in runs.read_parts(run, "quarantine")]
    assert rows == [(7, "train"), (NUM - 1, "train"), (9, "val")]
    assert bad.too_many(2 / NUM) is None
    assert f"2 of {NUM} training files do not decode" in (bad.too_many(1 / NUM) or "")


def test_a_checkpoint_gives_back_what_it_took_also_one_with_masks(tmp_path):
    bad = alone()
    writer = runs.PartWriter(runs.run_at(str(tmp_path)), "quarantine", 1, 0)
    bad.note(batch([5], []), phase("train"), writer)
    bad.end_epoch()
    bad.note(batch([2], []), phase("train"), writer)
    writer.close()
    mask, seen = torch.zeros(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)
    mask[5], seen[[2, 5]] = 1, 1
    for tensors in (bad.tensors(), {"mask": mask, "bad_seen": seen}):
        other = alone()
        other.load(tensors)
        assert other.is_known(np.array([2, 5])).tolist() == [False, True]
        assert other.tensors()["bad.seen"].tolist() == [2, 5]
        assert other.tensors()["bad.known"].tolist() == [5]
    empty = alone()
    empty.load(alone().tensors())
    assert not empty.is_known(np.array([0])).any()


def _on_a_rank(rank: int, folder: str) -> None:
    bad = alone(rank, 3)
    writer = runs.PartWriter(runs.run_at(folder), "quarantine", 1, rank)
    bad.note(batch([[5, 11], [], [11, 4]][rank], [20 + rank]), phase("train"), writer)
    assert bad.too_many(2 / NUM) is not None
    assert bad.too_many(3 / NUM) is None
    assert sorted(bad.seen) == [4, 5, 11]
    bad.end_epoch()
    assert bad.known.tolist() == [4, 5, 11]
    if rank == 1:
        bad.note(batch([6], []), phase("train"), writer)
    assert bad.tensors()["bad.seen"].tolist() == [4, 5, 6, 11]
    bad.end_epoch()
    assert bad.known.tolist() == [4, 5, 6, 11]
    assert bad.ranks.union([]) == []
    writer.close()


def test_all_ranks_know_what_any_of_them_found(tmp_path):
    run_ranks(_on_a_rank, str(tmp_path), world=3)


@pytest.mark.parametrize("numbers", [[], [3, 1, 3]])
def test_a_rank_alone_has_its_own_numbers(numbers):
    assert alone().ranks.union(numbers) == sorted(set(numbers))
