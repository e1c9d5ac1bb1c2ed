"""The epoch plan counts every sample once, on any number of workers, before and after a resume."""

import numpy as np
import pytest

from slimray.data.plan import (
    CountPlan,
    Phase,
    blocks,
    epoch_order,
    feeder_nodes,
    feeder_ranks,
    microbatches,
    num_feeders,
    pass_order,
    rank_slice,
)


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
        num = num_feeders(world, [96] * 192)
        assert [r for g in range(num) for r in feeder_ranks(world, num, g)] == list(range(world))
    assert num_feeders(1536, [96] * 192) == 24


@pytest.mark.parametrize(
    ("world", "free_cpus", "num"),
    [
        (1536, [64] * 192, 16),
        (1536, [64] * 192 + [2.0, 0.5], 16),  # a small node beside them, and one that is full
        (1536, [12] * 192, 6),
        (1536, [5] * 192, 2),
        (1536, [2], 1),
        (1536, [], 1),
        (64, [96] * 8, 1),
        (65, [8] * 9, 2),
    ],
)
def test_feeders_are_as_many_as_the_free_cpus_of_the_nodes_can_be_shared_out_to(world, free_cpus, num):
    assert num_feeders(world, free_cpus) == num


@pytest.mark.parametrize("num_nodes", [2, 8, 32, 192])
def test_no_node_feeds_more_ranks_the_more_nodes_there_are(num_nodes: int):
    world, node_of = 8 * num_nodes, {rank: f"n{rank // 8}" for rank in range(8 * num_nodes)}
    num = num_feeders(world, [96 - 8 * 4] * num_nodes)
    nodes = feeder_nodes(world, num, node_of)
    assert len(set(nodes)) == num, "each on a node of its own"
    if num == 1:
        assert nodes == [""]
        assert world <= 64
        return
    fed = {node: feeder_ranks(world, num, group) for group, node in enumerate(nodes)}
    assert all(node in {node_of[rank] for rank in ranks} for node, ranks in fed.items())
    assert max(map(len, fed.values())) <= 96
    assert feeder_nodes(world, num, {}) == [""] * num


def test_held_out_windows_come_between_and_training_goes_over_the_others_once():
    orders = []
    for epoch in range(1, 7):
        p = Phase("train", "train", epoch, 123, 8, True, {}, held=20, every=3)
        order = pass_order(p, 5)
        assert len(order) == p.num_positions
        windows = [order[step * 8 : (step + 1) * 8] for step in range(p.num_steps)]
        held = [window for step, window in enumerate(windows) if p.is_held(step)]
        trained = np.concatenate([window for step, window in enumerate(windows) if not p.is_held(step)])
        assert np.array_equal(np.sort(trained), np.arange(103))
        assert [p.is_held(step) for step in range(5)] == [False, False, False, True, False]
        assert len(held) == 4
        assert all(len(window) == 8 and window.min() >= 103 for window in held)
        done = [p.num_trained(step) for step in range(p.num_steps + 1)]
        assert (done[:6], done[-1]) == ([0, 8, 16, 24, 24, 32], 103)
        orders.append(np.concatenate(held))
    uses = np.bincount(np.concatenate(orders), minlength=123)[103:]
    assert uses.max() - uses.min() <= 2  # 192 positions on 20 samples, the first epoch is not counted
    assert np.array_equal(pass_order(p, 5), order)
    assert not np.array_equal(pass_order(p, 6), order)


@pytest.mark.parametrize("world", [1, 3, 8])
def test_held_out_windows_are_shared_out_and_resumed_like_the_others(world: int):
    whole = Phase("train", "train", 1, 123, 8, True, {}, held=20, every=3)
    rest = Phase("train", "train", 1, 123, 8, True, {}, 5, held=20, every=3)
    seen = [(b.step, i) for b in blocks([whole], world, range(world), 3) for i in range(b.lo, b.hi)]
    assert sorted(i for _, i in seen) == list(range(whole.num_positions))
    left = [(b.step, i) for b in blocks([rest], world, range(world), 3) for i in range(b.lo, b.hi)]
    assert left == [(step, i) for step, i in seen if step >= 5]


def test_without_held_out_windows_held_samples_are_left_out():
    p = Phase("train", "train", 0, 50, 8, True, {}, held=10)
    assert np.array_equal(np.sort(pass_order(p, 0)), np.arange(40))
    assert not any(p.is_held(step) for step in range(p.num_steps))
    assert p.num_trained(99) == 40


@pytest.mark.parametrize("held", [0, 5])
def test_a_last_window_that_is_not_full_is_dropped_on_request_and_others_are_dropped_in_the_next_epoch(held: int):
    every = 2 if held else 0
    left = []
    for epoch in range(2):
        whole = Phase("train", "train", epoch, 31, 4, True, {}, 0, held, every)
        cut = Phase("train", "train", epoch, 31, 4, True, {}, 0, held, every, drop_last=True)
        assert cut.num_steps == whole.num_steps - 1
        assert all(cut.share(step) == 1.0 for step in range(cut.num_steps))
        assert whole.share(whole.num_steps - 1) == (whole.num_positions % 4) / 4 < 1
        assert cut.num_trained(cut.num_steps) == whole.num_trained(whole.num_steps) // 4 * 4
        for step in range(cut.num_steps):
            assert rank_slice(cut, step, 1, 3) == rank_slice(whole, step, 1, 3)
        left.append(set(pass_order(whole, 1)[cut.num_positions :].tolist()))
    assert left[0] != left[1]


def test_a_pass_may_end_early():
    phase = Phase("precise", "train", 0, 31, 4, True, {}, limit=10)
    assert (phase.num_steps, phase.num_positions) == (3, 10)
    assert [hi for _, hi in (rank_slice(phase, step, 0, 1) for step in range(3))] == [4, 8, 10]
    assert Phase("precise", "train", 0, 31, 4, True, {}, limit=100).num_positions == 31


@pytest.mark.parametrize("world", [1, 3])
def test_a_pass_that_ends_with_its_steps_is_the_beginning_of_the_whole_one(world: int):
    whole, cut = (Phase("train", "train", 2, 31, 4, True, {}, steps=steps) for steps in (0, 5))
    assert (whole.num_steps, cut.num_steps) == (8, 5)
    assert cut.num_trained(cut.num_steps) == 20
    for step in range(5):
        assert cut.share(step) == 1.0
        for rank in range(world):
            assert rank_slice(cut, step, rank, world) == rank_slice(whole, step, rank, world)
    assert CountPlan(cut).samples(0, 20, 1).tolist() == pass_order(whole, 1)[:20].tolist()
    assert Phase("train", "train", 2, 31, 4, True, {}, steps=100).share(7) == 0.75
