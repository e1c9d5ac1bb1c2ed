"""The epoch plan counts every sample once, on any number of workers, before and after a resume."""

import numpy as np
import pytest

from slimray.data.plan import Phase, blocks, epoch_order, feeder_ranks, microbatches, num_feeders, rank_slice


def phase(num_samples: int, batch: int, first_step: int = 0) -> Phase:
    return Phase("train", "train", 0, num_samples, batch, True, {}, first_step)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(("num_samples", "batch"), [(203, 32), (64, 64), (5, 16), (100, 7), (1, 1)])
def test_every_position_is_consumed_exactly_once(world: int, num_samples: int, batch: int):
    p = phase(num_samples, batch)
    seen = [i for b in blocks([p], world, range(world), 4) for i in range(b.lo, b.hi)]
    assert sorted(seen) == list(range(num_samples))
    assert all(b.hi - b.lo <= 4 for b in blocks([p], world, range(world), 4))


def test_a_resume_on_other_worker_counts_repeats_and_skips_nothing():
    p, seen = phase(203, 32), []
    for world, first, last in [(2, 0, 3), (1, 3, 4), (5, 4, 7)]:
        for step in range(first, last):
            for rank in range(world):
                seen += range(*rank_slice(p, step, rank, world))
    assert sorted(seen) == list(range(203))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_all_ranks_run_equally_many_microbatches(world: int):
    p = phase(101, 32)
    for step in range(p.num_steps):
        cuts = [microbatches(p, step, rank, world, 5) for rank in range(world)]
        assert len({len(c) for c in cuts}) == 1
        assert sum(hi - lo for c in cuts for lo, hi in c) == min(32, 101 - step * 32)


def test_the_order_depends_on_seed_and_epoch_only():
    a = epoch_order(1000, 1, 2)
    epoch_order.cache_clear()
    assert np.array_equal(a, epoch_order(1000, 1, 2))
    assert not np.array_equal(a, epoch_order(1000, 1, 3))
    assert not np.array_equal(a, epoch_order(1000, 2, 2))
    assert np.array_equal(np.sort(a), np.arange(1000))


def test_feeder_groups_cover_all_ranks_once():
    for world in (1, 63, 64, 65, 1536):
        num = num_feeders(world, 96)
        assert [r for g in range(num) for r in feeder_ranks(world, num, g)] == list(range(world))
    assert num_feeders(1536, 96) == 24
    assert num_feeders(1536, 2) == 1
