"""The permutation by position is a permutation, is the same for any cut into blocks, and looks like a random one.

Statistics are of fixed keys, so a test never fails by chance; the bounds are of a chance below one in a million.
"""

import itertools
import math

import numpy as np
import pytest

from slimray.data.permutation import permuted
from slimray.data.plan import SHUFFLE, Phase, pass_order

HUGE = 100_000_000


def too_far(counts: np.ndarray, expected: float, degrees: int) -> float:
    """Return by how many standard deviations chi-squared exceeds chance, by the Wilson-Hilferty approximation."""
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    return ((chi2 / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 10, 97, 100, 1000, 65_536, 65_537, 300_007])
def test_every_number_lies_at_one_place(count: int):
    whole = permuted(np.arange(count), count, (3, 1))
    assert whole.dtype == np.int64
    assert np.array_equal(np.sort(whole), np.arange(count))
    cuts = [permuted(np.arange(lo, min(lo + 7, count)), count, (3, 1)) for lo in range(0, min(count, 700), 7)]
    assert np.array_equal(np.concatenate(cuts), whole[: sum(map(len, cuts))])


def test_places_of_a_hundred_million_need_no_array_of_them():
    drawn = np.unique(np.random.default_rng(0).integers(0, HUGE, 400_000))
    found = permuted(drawn, HUGE, (0, 5))
    assert (found.min() >= 0, found.max() < HUGE) == (True, True)
    assert len(np.unique(found)) == len(drawn)
    assert too_far(np.bincount(found * 1000 // HUGE, minlength=1000), len(drawn) / 1000, 999) < 5
    assert abs(np.corrcoef(drawn, found)[0, 1]) * math.sqrt(len(drawn)) < 5
    assert permuted(np.zeros(0, np.int64), HUGE, (0, 0)).tolist() == []


def test_all_permutations_of_five_come_out_equally_often():
    keys = range(2400)
    found = [tuple(permuted(np.arange(5), 5, (7, key)).tolist()) for key in keys]
    counts = np.array([found.count(one) for one in itertools.permutations(range(5))])
    assert too_far(counts, len(keys) / 120, 119) < 5


@pytest.mark.parametrize("count", [7, 16, 50])
def test_every_number_lies_at_every_place_equally_often(count: int):
    keys = 800
    orders = np.array([permuted(np.arange(count), count, (key, 2)) for key in range(keys)])
    at = np.array([np.bincount(column, minlength=count) for column in orders.T])
    assert too_far(at, keys / count, (count - 1) ** 2) < 5
    steps = np.bincount(((orders[:, 1:] - orders[:, :-1]) % count).ravel(), minlength=count)
    assert steps[0] == 0
    assert too_far(steps[1:], keys, count - 2) < 5, "who follows whom"


def test_windows_of_an_index_sorted_by_class_are_mixed_as_by_chance():
    """Of B samples out of n, half of which are of one class, B/2 are of it, with the variance without replacement."""
    num, batch = 100_000, 250
    p = Phase("train", "train", 3, num, batch, True, {}, version=SHUFFLE)
    halves = (pass_order(p, 1) < num // 2).reshape(-1, batch).sum(1)
    variance = batch / 4 * (num - batch) / (num - 1)
    assert halves.mean() == batch / 2
    assert abs(halves.var() / variance - 1) < 5 * math.sqrt(2 / len(halves))
    assert abs(halves - batch / 2).max() < 5.5 * math.sqrt(variance)


def test_epochs_and_seeds_have_nothing_in_common():
    places = np.arange(50_000)
    orders = [permuted(places, len(places), key) for key in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))]
    for one, other in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) * math.sqrt(len(places)) < 5
        assert (one == other).sum() < 15, "one in the mean"


@pytest.mark.parametrize("version", [1, SHUFFLE])
def test_held_out_windows_are_the_same_for_any_cut(version: int):
    p = Phase("train", "train", 4, 123, 8, True, {}, held=20, every=3, version=version)
    whole = pass_order(p, 5)
    for lo, hi in [(0, 1), (5, 40), (30, 33), (90, p.num_positions), (0, 0)]:
        assert np.array_equal(p.plan.samples(lo, hi, 5, lambda: np.zeros(0)), whole[lo:hi])
    trained = np.concatenate([whole[s * 8 : s * 8 + 8] for s in range(p.num_steps) if not p.is_held(s)])
    assert np.array_equal(np.sort(trained), np.arange(103))
    held = np.concatenate(
        [
            pass_order(Phase("t", "t", e, 123, 8, True, {}, held=20, every=3, version=version), 5)[24 + s * 32 :][:8]
            for e in range(5)
            for s in range(4)
        ]
    )
    uses = np.bincount(held, minlength=123)
    assert (uses[:103].max(), uses[103:].min()) == (0, 8)
    assert uses.max() == 8, "160 positions on 20 samples"
