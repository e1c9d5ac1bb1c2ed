"""Samples for judges and held-out samples are drawn without a permutation of all samples of a large split."""

import random
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from slimray.data.plan import epoch_order
from slimray.verbs import subnets


def first(num_samples: int, count: int) -> np.ndarray:
    """Return the samples with which judges recalibrate."""
    return subnets.drawn(num_samples, True, {}).plan.samples(0, count, 7, lambda: np.zeros(0))


def test_nothing_as_long_as_a_large_split_is_made_for_those_that_are_decoded():
    tracemalloc.start()
    found = first(1_000_000_000, 2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(found.tolist())) == 2000
    assert 0 <= found.min() < 10_000_000 < 990_000_000 < found.max() < 1_000_000_000
    assert peak < 5e6


def test_of_others_they_are_those_that_they_were():
    assert first(1000, 300).tolist() == epoch_order(1000, 7, 0)[:300].tolist()


@pytest.mark.parametrize("large", [100, 1000])
def test_what_is_held_out_is_a_function_of_the_seed_and_in_order(large: int, monkeypatch):
    monkeypatch.setattr(subnets, "LARGE", large)
    table, seen = pa.table({"number": range(500)}), []
    for seed in (1, 1, 2):
        kept, out = (one.column("number").to_pylist() for one in subnets.hold_out(table, 120, seed))
        assert (len(out), sorted(kept + out)) == (120, list(range(500)))
        assert (kept, out) == (sorted(kept), sorted(out))
        seen.append(out)
    assert seen[0] == seen[1] != seen[2]
    order = list(range(500))
    random.Random("hold-out-1").shuffle(order)
    assert (seen[0] == sorted(order[:120])) == (large == 1000)
    assert subnets.hold_out(table, 0, 1) == (table, None)
