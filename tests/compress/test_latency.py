"""Latency of policies predicted from measured ones: any dependence on the layers' MACs, noise and few measurements."""

import numpy as np
import pytest
import torch

from slimray import models
from slimray.compress import latency
from slimray.compress.groups import Groups, trace


@pytest.fixture(scope="module")
def groups() -> Groups:
    torch.manual_seed(0)
    return trace(models.build("resnet20", num_classes=10).eval(), torch.randn(2, 3, 32, 32))


def law(groups: Groups) -> np.ndarray:
    """Return weights per layer that are far from its share of the MACs and sum to 0.8."""
    roots = np.array(list(groups.layer_macs({}).values())) ** 0.25
    return 0.8 * roots / roots.sum()


def test_shares_of_layers_are_those_of_their_macs(groups):
    counts = latency.draw(groups, 3, 0.2, 2, 1)[2]
    shares = groups.layer_shares(np.stack([groups.row({}), groups.row(counts)]))
    whole, kept = groups.layer_macs({}), groups.layer_macs(counts)
    assert shares[0] == pytest.approx(1)
    assert shares[1] == pytest.approx([kept[name] / whole[name] for name in whole])


def test_drawn_policies_may_be_chosen_begin_with_the_smallest_and_differ(groups):
    drawn = latency.draw(groups, 30, 0.5, 4, 0)
    assert drawn == latency.draw(groups, 30, 0.5, 4, 0)
    assert len({tuple(one.values()) for one in drawn}) > 25
    assert all(count == groups.sizes[name] // 2 for name, count in drawn[0].items())
    for one in drawn:
        assert all(count % 4 == 0 and count >= groups.sizes[name] / 2 for name, count in one.items())


def test_what_other_policies_take_is_told_from_noisy_measurements(groups):
    rng, weights = np.random.default_rng(0), law(groups)

    def takes(counts: dict[str, int]) -> float:
        return 0.2 + float(groups.layer_shares(groups.row(counts)[None])[0] @ weights)

    measured = [(one, takes(one) * (1 + 0.03 * rng.normal())) for one in latency.draw(groups, 40, 0.2, 2, 0)]
    model = latency.fit(groups, measured)
    assert model.error < 6
    others = latency.draw(groups, 50, 0.2, 2, 9)
    told, true = model(np.stack([groups.row(one) for one in others])), np.array([takes(one) for one in others])
    assert np.abs(told / true - 1).mean() < 0.03
    assert np.all(model.weights >= 0)


def test_one_measurement_leaves_the_rest_to_the_macs(groups):
    half = {name: size // 2 for name, size in groups.sizes.items()}
    model = latency.fit(groups, [(half, 0.3)])
    rows = np.stack([groups.row({}), groups.row(half)])
    assert model(rows) == pytest.approx([1, 0.3], abs=0.02)
