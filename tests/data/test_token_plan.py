"""Batches by tokens count every sample once, on any number of workers, and depend on (seed, epoch) only."""

import itertools

import numpy as np
import pytest

from slimray.data.plan import SHUFFLE, Phase, blocks, microbatches, rank_slice
from slimray.data.ragged import joined, tight
from slimray.data.token_plan import Bags, _edges, _order

LENGTHS = np.random.default_rng(0).integers(3, 40, 503)
BY_LENGTH = np.argsort(LENGTHS, kind="stable")


def phase(bags: Bags, batch: int = 4, epoch: int = 0, first: int = 0, **options) -> Phase:
    fields = {"version": SHUFFLE} | options
    return Phase("train", "train", epoch, bags.num_samples, batch, True, {}, first, bags=bags, **fields)


def ids(p: Phase, lo: int, hi: int) -> list[int]:
    return p.plan.samples(lo, hi, 0, lambda: BY_LENGTH).tolist()


@pytest.mark.parametrize("tokens", [40, 64, 200, 1000, 100_000])
def test_bags_hold_samples_of_similar_length_within_their_tokens(tokens: int):
    bags = Bags.of(LENGTHS, tokens)
    edges = _edges(bags)
    sizes, ordered = np.diff(edges), np.sort(LENGTHS)
    assert (edges[0], edges[-1], sizes.min() > 0) == (0, 503, True)
    for start, end in itertools.pairwise(edges):
        assert (end - start) * ordered[end - 1] <= tokens
        if end < 503 and end - start > 8:
            assert (end - start) % 8 == 0
            assert (end - start + 8) * ordered[min(end + 7, 502)] > tokens
    padded = sum(int(ordered[end - 1]) * int(end - start) for start, end in itertools.pairwise(edges))
    assert tokens != 200 or LENGTHS.sum() > 0.9 * padded


def test_a_sample_that_fits_into_no_bag_is_refused():
    with pytest.raises(ValueError, match="the longest sample has 39 tokens, but a bag 38"):
        Bags.of(LENGTHS, 38)


@pytest.mark.parametrize("version", [2, SHUFFLE])
@pytest.mark.parametrize("world", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(("tokens", "batch"), [(60, 5), (200, 3), (100_000, 4)])
def test_every_sample_is_consumed_exactly_once(world: int, tokens: int, batch: int, version: int):
    p = phase(Bags.of(LENGTHS, tokens, 1), batch, epoch=2, version=version)
    found = list(blocks([p], world, range(world), 1))
    seen = [i for b in found for i in ids(p, b.lo, b.hi)]
    assert sorted(seen) == list(range(503))
    assert p.num_positions == 503
    for b in found:
        assert (b.hi - b.lo) * LENGTHS[ids(p, b.lo, b.hi)].max() <= tokens
    for step in range(p.num_steps):
        cuts = [microbatches(p, step, rank, world, 1) for rank in range(world)]
        assert len({len(cut) for cut in cuts}) == 1
        assert [cut[-1][1] for cut in cuts] == [rank_slice(p, step, rank, world)[1] for rank in range(world)]


def test_a_resume_on_other_worker_counts_repeats_and_skips_nothing():
    p, seen = phase(Bags.of(LENGTHS, 100), 6), []
    for world, first, last in [(2, 0, 3), (1, 3, 4), (5, 4, p.num_steps)]:
        for step in range(first, last):
            for rank in range(world):
                seen += ids(p, *rank_slice(p, step, rank, world))
    assert sorted(seen) == list(range(503))
    whole = [(b.step, b.lo, b.hi) for b in blocks([p], 1, [0], 1)]
    rest = phase(Bags.of(LENGTHS, 100), 6, first=5)
    assert [(b.step, b.lo, b.hi) for b in blocks([rest], 1, [0], 1)] == [one for one in whole if one[0] >= 5]


def test_a_step_holds_the_same_samples_whatever_the_number_of_workers():
    p = phase(Bags.of(LENGTHS, 100), 6, epoch=1)
    for step in range(p.num_steps):
        of = [sorted(i for rank in range(w) for i in ids(p, *rank_slice(p, step, rank, w))) for w in (1, 2, 3, 8)]
        assert of[1:] == of[:1] * 3
    assert p.share(0) == 1.0
    assert p.share(p.num_steps - 1) == (p.bags.count % 6 or 6) / 6
    assert [p.num_trained(step) for step in (0, 1, p.num_steps)] == [0, 6, p.bags.count]


def test_the_order_depends_on_seed_and_epoch_only_and_changes_with_both():
    def order(seed: int, epoch: int) -> list[int]:
        for cached in (_order, _edges):
            cached.cache_clear()
        p = phase(Bags.of(LENGTHS, 100, seed), epoch=epoch)
        return ids(p, 0, 503)

    first = order(1, 2)
    assert order(1, 2) == first
    others = [order(1, 3), order(2, 2)]
    assert all(one != first for one in others)
    bags = [{frozenset(one[i : i + 5]) for i in range(0, 500, 5)} for one in (first, *others)]
    assert len(bags[0] & bags[1]) < 20  # the samples sharing a bag change, too
    assert len({phase(Bags.of(LENGTHS, 100, s), epoch=e).num_steps for s in range(3) for e in range(3)}) == 1
    p = Phase("val", "val", 5, 503, 4, False, {}, bags=Bags.of(LENGTHS, 100))
    assert ids(p, 0, 503) == BY_LENGTH.tolist()


@pytest.mark.parametrize("version", [1, 2])
def test_a_run_that_began_with_arrays_keeps_its_order(version: int):
    def permutation(*key: int, count: int) -> np.ndarray:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(key)))).permutation(count)

    bags, wanted, members = Bags.of(LENGTHS, 100, 1), [], []
    for length, count in bags.counts:
        members += (BY_LENGTH[len(members) :][:count][permutation(1, 2, length, count=count)]).tolist()
    for bag in permutation(1, 2, count=bags.count):
        wanted += members[_edges(bags)[bag] : _edges(bags)[bag + 1]]
    assert ids(phase(bags, epoch=2, version=version), 0, 503) == wanted
    assert ids(phase(bags, epoch=2), 0, 503) != wanted


def test_a_last_window_that_is_not_full_is_dropped_on_request():
    bags = Bags.of(LENGTHS, 100)
    whole, cut = phase(bags, 8), phase(bags, 8, drop_last=True)
    assert bags.count % 8
    assert cut.num_steps == whole.num_steps - 1
    assert cut.num_positions < whole.num_positions == 503
    assert all(cut.share(step) == 1.0 for step in range(cut.num_steps))
    assert cut.num_trained(cut.num_steps) == cut.num_steps * 8


@pytest.mark.parametrize("batch", [1, 4])
def test_a_pass_that_ends_with_its_steps_is_the_beginning_of_the_whole_one_on_any_number_of_workers(batch: int):
    bags = Bags.of(LENGTHS, 100)
    whole = phase(bags, batch)
    for world in (1, 3):
        cut = phase(bags, batch, steps=5)
        assert (cut.num_steps, phase(bags, batch, steps=1000).num_steps) == (5, whole.num_steps)
        wanted = [block for block in blocks([whole], world, range(world), 1) if block.step < 5]
        assert list(blocks([cut], world, range(world), 1)) == wanted
        assert ids(cut, wanted[0].lo, wanted[-1].hi) == ids(whole, wanted[0].lo, wanted[-1].hi)


def test_arrays_of_unequal_length_are_filled_up_and_cut_down_again():
    a, b = np.arange(6).reshape(1, 2, 3), np.arange(10, 18).reshape(2, 2, 2)
    whole = joined([a, b], 1)
    assert whole.tolist() == [[[0, 1, 2], [3, 4, 5]], [[10, 11, 1], [12, 13, 1]], [[14, 15, 1], [16, 17, 1]]]
    assert joined([a, a], 1).shape == (2, 2, 3)
    labels = np.array([[5, 6, 7], [8, 1, 1], [9, 9, 1]])
    data, cut = tight(whole[1:], labels[1:], (1, 1))
    assert (data.tolist(), cut.tolist()) == (b.tolist(), [[8, 1], [9, 9]])
    data, cut = tight(np.array([[[4, 5, 1, 1]]]), np.array([[5, 1, 1]]), (1, 1))  # a window and what follows it
    assert (data.tolist(), cut.tolist()) == ([[[4, 5]]], [[5]])
    data, cut = tight(whole[:0], labels[:0], (1, 1))
    assert (len(data), cut.shape) == (0, (0, 1))
