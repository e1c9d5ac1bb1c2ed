"""A predictor learns from few archs which of the others are better, and reports its quality."""

import numpy as np
import pytest
import torch

from slimray.arch import Dimension, Space, Stage
from slimray.encoding import GeneTable
from slimray.search.pareto import spearman
from slimray.search.predictor import fit_predictor, load
from slimray.spec import UserError

SPACE = Space.of(
    {
        "kernel": Dimension.per_block([(3, 5, 7)] * 12),
        "expand": Dimension.per_block([(3, 4, 6)] * 12),
        "depth": Dimension.depth([(2, 3, 4)] * 3, [Stage(4)] * 3),
        "resolution": Dimension.number((128, 160, 192), input="side"),
    }
)
TABLE = GeneTable(SPACE)


def landscape(codes):
    """Return a top-1 from 0 to 1: genes help with diminishing returns; equal kernels in neighbouring blocks do not."""
    rng, runs = np.random.default_rng(0), TABLE.runs(codes)
    gains = np.cumsum(rng.uniform(0.2, 1, (codes.shape[1], 3)) * [1, 0.6, 0.3], axis=1)
    value = np.where(runs, gains[np.arange(codes.shape[1]), codes], 0).sum(1)
    for i in range(11):
        value -= 0.5 * (runs[:, i] & runs[:, i + 1] & (codes[:, i] == codes[:, i + 1]))
    return 0.6 + 0.01 * value


def measured(count, seed, noise=0.003):
    rng = np.random.default_rng(seed)
    codes = TABLE.sample(count, rng)
    return codes, landscape(codes) + rng.normal(0, noise, count)


@pytest.fixture(scope="module")
def predictor():
    return fit_predictor(SPACE, *measured(200, 1), seed=0)


def test_two_hundred_noisy_labels_rank_the_rest(predictor):
    others = TABLE.sample(1000, np.random.default_rng(2))
    said, truth = predictor.predict(others), landscape(others)
    assert spearman(said, truth) >= 0.8
    assert np.abs(said - truth).mean() < 0.5 * np.abs(truth - truth.mean()).mean()


def test_the_report_is_what_new_archs_confirm(predictor):
    others, values = measured(1000, 3)
    said = predictor.predict(others)
    assert predictor.report["num_train"] == 200
    assert predictor.report["spearman"] == pytest.approx(spearman(said, values), abs=0.08)
    assert predictor.report["held_out_mae"] == pytest.approx(np.abs(said - values).mean(), rel=0.25)


def test_archs_and_rows_are_predicted_alike(predictor):
    codes = TABLE.sample(5, np.random.default_rng(4))
    assert np.array_equal(predictor.predict(TABLE.archs(codes)), predictor.predict(codes))
    assert predictor.predict(codes).dtype == np.float64


def test_a_predictor_is_saved_as_tensors(predictor):
    codes = TABLE.sample(50, np.random.default_rng(5))
    state = predictor.state()
    assert all(isinstance(value, torch.Tensor) and value.is_contiguous() for value in state.values())
    again = load(SPACE, state, predictor.report)
    assert np.array_equal(again.predict(codes), predictor.predict(codes))
    with pytest.raises(UserError, match="takes 75 features of an arch, this space has 72: train it again"):
        load(SPACE.restrict(resolution=(128,)), state, predictor.report)


def test_fifty_labels_are_better_than_none():
    small = fit_predictor(SPACE, *measured(50, 6), seed=0)
    others = TABLE.sample(1000, np.random.default_rng(7))
    assert spearman(small.predict(others), landscape(others)) > 0.5
    assert small.report["num_train"] == 50
    with pytest.raises(UserError, match=r"needs at least 10 measured archs to learn from \(got 9\)"):
        fit_predictor(SPACE, *measured(9, 0), seed=0)


def test_a_fit_is_a_function_of_its_arguments_and_of_no_unit():
    codes, values = measured(15, 8)
    others = TABLE.sample(50, np.random.default_rng(9))
    before = torch.random.get_rng_state()
    first = fit_predictor(SPACE, codes, values, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    percent = fit_predictor(SPACE, TABLE.archs(codes), (100 * values).tolist(), seed=1)
    assert percent.predict(others) == pytest.approx(100 * first.predict(others), abs=0.05)
    assert not np.allclose(fit_predictor(SPACE, codes, values, seed=2).predict(others), first.predict(others))


def test_equal_scores_are_learned_as_such():
    codes, _ = measured(10, 10)
    same = fit_predictor(SPACE, codes, np.full(10, 0.7), seed=0)
    assert same.predict(codes) == pytest.approx(0.7, abs=0.02)
    assert np.isnan(same.report["spearman"]) or abs(same.report["spearman"]) <= 1
