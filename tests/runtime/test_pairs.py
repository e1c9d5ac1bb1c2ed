"""Pairs: the median of ratios and the interval that encloses it."""

import math

import numpy as np
import pytest

from slimray.runtime.pairs import Pairs, alternate, enclosing


def test_the_interval_encloses_the_median_with_95_percent():
    assert [enclosing(count) for count in (1, 5, 9, 15, 25)] == [0, 0, 1, 3, 7]
    for count in (6, 9, 14, 40, 1500):
        tails = [
            2 * sum(math.comb(count, i) for i in range(skip)) for skip in (enclosing(count) + 1, enclosing(count) + 2)
        ]
        assert tails[0] <= 2**count // 20 < tails[1]
    draws = np.sort(np.random.default_rng(0).normal(size=(4000, 9)))
    held = (draws[:, enclosing(9)] < 0) & (draws[:, -1 - enclosing(9)] > 0)
    assert held.mean() == pytest.approx(1 - 2 * 10 / 2**9, abs=0.015)


def test_ratios_are_told_with_their_interval():
    pairs = Pairs(tuple(range(1, 16)), (1.0,) * 15)
    assert (pairs.ratio, pairs.interval) == (8, (4, 12))
    plain = pairs.to_plain("a", "b")
    assert plain == {"a_ms": 8, "b_ms": 1, "ratio": 8, "interval": [4, 12], "pairs": 15}


def test_what_is_measured_takes_turns():
    asked = []
    found = alternate(lambda: asked.append("a") or len(asked), lambda: asked.append("b") or len(asked), 3)
    assert "".join(asked) == "abbaab"
    assert (found.a, found.b) == ((1, 4, 5), (2, 3, 6))
