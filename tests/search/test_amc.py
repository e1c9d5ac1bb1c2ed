"""AMC: the environment equals the recorded one; policies over groups keep their limits; the search is reproducible."""

import json
import random

import numpy as np
import pytest

from slimray.search import amc
from slimray.search.amc import ChainLayer, GroupStep, GroupWalk, LayerWalk
from slimray.spec import UserError

WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)  # MobileNetV1
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


@pytest.fixture(scope="module")
def recorded(shared):
    return json.loads((shared / "parity/compression/amc_env.json").read_text())


def chain(layers) -> list[ChainLayer]:
    out = []
    for layer in layers:
        for dw in layer.get("dw", []):
            out.append(ChainLayer("depthwise", dw["c"], dw["c"], dw["stride"], dw["k"], dw["hw"]))
        out.append(ChainLayer(**{k: v for k, v in layer.items() if k != "dw"}))
    return out


def mobilenetv1() -> list[ChainLayer]:
    side, layers = 112, [ChainLayer("conv", 3, 32, 2, 3, 112)]
    for before, after, stride in zip(WIDTHS, WIDTHS[1:], STRIDES):
        side //= stride
        layers.append(ChainLayer("depthwise", before, before, stride, 3, side))
        layers.append(ChainLayer("conv", before, after, 1, 1, side))
    return [*layers, ChainLayer("fc", 1024, 1000)]


def check(layers: list[ChainLayer], case) -> None:
    walk = LayerWalk(layers, case["preserve_ratio"], case["lbound"], case["channel_round"])
    state, states = walk.reset(), []
    for action in case["raw_actions"]:
        states.append(state)
        state = walk.step(action)
    assert state is None
    assert walk.channels == case["channels"]
    assert np.array(states) == pytest.approx(np.array(case["states"]), abs=1e-9)
    assert walk.clipped == pytest.approx(case["clipped"], abs=1e-9)
    assert walk.bounds == pytest.approx(case["max_ratio"], rel=1e-9)
    assert walk.inputs == pytest.approx(case["strategy"], abs=1e-9)
    assert walk.cost() / walk.total == pytest.approx(case["env_ratio"], abs=1e-9)


def test_the_toy_network_is_walked_as_recorded(recorded):
    toy = recorded["toy"]
    walk = LayerWalk(chain(toy["layers"]), 0.5)
    assert walk.macs_list == toy["flops_list"]
    assert walk.weight_list == toy["weight_list"]
    assert walk.total == toy["org_flops"]
    assert walk.static == pytest.approx(np.array(toy["static"]), abs=1e-12)
    for case in toy["cases"]:
        check(chain(toy["layers"]), case)


def test_mobilenetv1_is_walked_as_recorded(recorded):
    assert LayerWalk(mobilenetv1(), 0.5).total == recorded["mobilenetv1"]["org_flops"]
    for case in recorded["mobilenetv1"]["rollouts"]:
        check(mobilenetv1(), case)


def test_channels_are_rounded_as_recorded(recorded):
    for channels, ratio, count, kept in recorded["rounding_8"]["rows"]:
        assert amc.rounded(channels, ratio) == count
        assert count / channels == pytest.approx(kept)


def test_rewards():
    assert amc.reward_of(90.0) == pytest.approx(0.9)
    assert amc.reward_of(90.0, 1e6) == pytest.approx(-0.1 * np.log(1e6))


def test_a_budget_below_the_lower_bound_is_refused():
    with pytest.raises(UserError, match="must be above the lower bound"):
        LayerWalk(mobilenetv1(), 0.2)


# ------------------------------------------------------------------------------------------------ groups


def steps() -> list[GroupStep]:
    return [GroupStep(f"g{i}", (8, 16, 24, 32), False, 32, 32, 1, 3, 9216.0, 1e6) for i in range(5)]


def costs(rows):
    """Return the steps of a chain of five layers between 3 inputs and 10 outputs."""
    full = np.concatenate([np.full((len(rows), 1), 3.0), rows, np.full((len(rows), 1), 10.0)], 1)
    return {"macs": (full[:, :-1] * full[:, 1:]).sum(1), "latency_ms": rows.sum(1) / 10}


def row(walk: GroupWalk, actions) -> np.ndarray:
    """Return the channels of the policy at the end of an episode with `actions`."""
    walk.reset()
    for action in actions:
        walk.step(action)
    return np.array([walk.policy()[step.name] for step in walk.steps], float)


def is_full(walk: GroupWalk, counts) -> bool:
    """Return True if no group can take its next larger number."""
    more = np.repeat(counts[None], 5, 0) + 8 * np.eye(5)
    found = costs(more)
    broken = np.any([found[name] > limit for name, limit in walk.limits.items()], axis=0)
    return bool((broken | (more > 32).any(1)).all())


@pytest.mark.parametrize("spends", [False, True])
@pytest.mark.parametrize("limits", [{"macs": 2000.0}, {"latency_ms": 8.0}, {"macs": 2500.0, "latency_ms": 9.0}])
def test_every_walk_keeps_its_limits(limits, spends):
    walk, rng, seen = GroupWalk(steps(), costs, limits, spends=spends), random.Random(0), set()
    for _ in range(200):
        counts = row(walk, [rng.random() for _ in range(5)])
        found = costs(counts[None])
        assert all(found[name][0] <= limit for name, limit in limits.items())
        assert all(count in step.choices for step, count in zip(walk.steps, counts))
        assert is_full(walk, counts) or not spends
        seen.add(tuple(counts))
    assert len(seen) > 30


@pytest.mark.parametrize("spends", [False, True])
def test_a_walk_that_wants_all_takes_all_that_the_limit_leaves(spends):
    walk = GroupWalk(steps(), costs, {"macs": 2000.0}, spends=spends)
    assert is_full(walk, row(walk, [1.0] * 5))


def test_with_a_common_factor_only_how_shares_relate_counts_whatever_comes_first():
    walk = GroupWalk(steps(), costs, {"macs": 2000.0}, spends=True)
    assert row(walk, [0.25] * 5).tolist() == row(walk, [1.0] * 5).tolist()
    first, last = row(walk, [1, 1, 0.3, 0.3, 0.3]), row(walk, [0.3, 0.3, 0.3, 1, 1])
    assert first[:2].min() > first[2:].max()
    assert last[3:].min() > last[:3].max()


def test_limits_out_of_reach_are_one_sentence():
    with pytest.raises(UserError, match=r"amc: the limits are out of reach: .* macs 360"):
        GroupWalk(steps(), costs, {"macs": 100.0})
