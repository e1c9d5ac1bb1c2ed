"""Latency learned from subnets: the network learns nonlinear laws, and all models are compared on unseen subnets."""

import random

import numpy as np
import pytest

from slimray import models
from slimray.edge import latency_predictor as lp
from slimray.edge.latency_table import Calibration, CalibrationRow, LatencyTable
from slimray.models.text import hat
from slimray.spec import UserError


def points(count: int = 100, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return features, and latencies that depend on the product of two of them."""
    features = np.random.default_rng(seed).uniform(1, 6, (count, 3))
    return features, 5 + features[:, 0] * features[:, 1]


def test_the_network_learns_a_product_that_least_squares_cannot():
    features, ms = points(220)
    known, unseen = slice(180), slice(180, None)
    network = lp.fit_network(features[known], ms[known], steps=150)(features[unseen])
    linear = lp.fit_least_squares(features[known], ms[known])(features[unseen])
    assert lp.mape(network, ms[unseen]) < 0.5 * lp.mape(linear, ms[unseen])


def test_least_squares_finds_a_line_that_is_there():
    features, _ = points(60)
    ms = 3 + features @ [2.0, 0.5, 1.0]
    assert lp.mape(lp.held_out(lp.fit_least_squares, features, ms), ms) < 0.01


def test_a_fold_is_told_by_models_that_have_not_seen_it():
    features, ms = points(40)
    seen = []

    def remember(x, y):
        seen.append({tuple(row) for row in x})
        return lambda rows: np.array([tuple(row) in seen[-1] for row in rows], float)

    assert lp.held_out(remember, features, ms).sum() == 0
    assert len(seen) == lp.FOLDS


def test_a_predictor_is_a_function_of_its_data_and_seed():
    features, ms = points(20)
    first, second, other = (lp.fit_network(features, ms, seed, steps=5)(features) for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def table_of(model: dict, count: int) -> tuple[object, LatencyTable]:
    """Return a finished table whose subnets have latencies given by a formula of their features."""
    net, rng = models.build(**model), random.Random(0)
    archs = [net.space.sample(rng) for _ in range(count)]
    ms = [1 + hat.features(arch)[5] * (0.5 + hat.features(arch)[9]) for arch in archs]
    rows = tuple(
        CalibrationRow(arch=arch.to_dict(), measured_ms=one, predicted_ms=1.1 * one)
        for arch, one in zip(archs, ms, strict=True)
    )
    calibration = Calibration(
        fixed_ms=0, slope=1, median_error_percent=10, largest_error_percent=10, noise_percent=0, rows=rows
    )
    return net, LatencyTable(
        format=1, model=model, num_points=None, hardware="cpu-eager", device="", threads=1, versions={}, date="",
        resolutions=None, rounds=2, seconds=0, done=2, reference_ms=(), waited_percent=0, units={}, subnets=(),
        calibration=calibration,
    )  # fmt: skip


def test_errors_are_those_of_every_way_on_the_subnets_of_a_table():
    net, table = table_of({"name": "hat_small", "vocab_size": 20, "preset": "tiny"}, 40)
    found = lp.errors(net, table, steps=60)
    assert found["table"] == pytest.approx(10)
    assert found["network"] < found["macs"]
    assert found["least_squares"] < found["macs"]


def test_few_subnets_are_one_sentence():
    net, table = table_of({"name": "hat_small", "vocab_size": 20, "preset": "tiny"}, 10)
    with pytest.raises(UserError, match=r"whole subnets are too few to learn from, give --calibrate 20"):
        lp.errors(net, table)
