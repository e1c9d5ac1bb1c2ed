"""AMC: the environment equals the recorded one; policies over groups keep their limits; the search is one search."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from slimray.search import amc
from slimray.search.amc import AmcSettings, AmcTrial, ChainLayer, GroupStep, GroupWalk, LayerWalk, best, propose, search
from slimray.search.ddpg import AMC
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
    """A chain of five layers between 3 inputs and 10 outputs."""
    full = np.concatenate([np.full((len(rows), 1), 3.0), rows, np.full((len(rows), 1), 10.0)], 1)
    return {"macs": (full[:, :-1] * full[:, 1:]).sum(1), "latency_ms": rows.sum(1) / 10}


@pytest.mark.parametrize("limits", [{"macs": 2000.0}, {"latency_ms": 8.0}, {"macs": 2500.0, "latency_ms": 9.0}])
def test_every_walk_keeps_its_limits(limits):
    walk, rng, seen = GroupWalk(steps(), costs, limits), random.Random(0), set()
    for _ in range(200):
        walk.reset()
        while walk.step(rng.random()) is not None:
            pass
        found = costs(walk.row[None])
        assert all(found[name][0] <= limit for name, limit in limits.items())
        assert all(count in step.choices for step, count in zip(walk.steps, walk.row))
        seen.add(tuple(walk.row))
    assert len(seen) > 30


def test_a_walk_that_wants_all_takes_all_that_the_limit_leaves():
    walk = GroupWalk(steps(), costs, {"macs": 2000.0})
    while walk.step(1.0) is not None:
        pass
    more = np.repeat(walk.row[None], 5, 0) + 8 * np.eye(5)
    assert (costs(more)["macs"][(more <= 32).all(1)] > 2000).all()


def test_limits_out_of_reach_are_one_sentence():
    with pytest.raises(UserError, match=r"amc: the limits are out of reach: .* macs 360"):
        GroupWalk(steps(), costs, {"macs": 100.0})


def reward(counts) -> float:
    """Channels of the third group pay three times as much."""
    return sum(c * (3 if name == "g2" else 1) for name, c in counts.items()) / 224


SETTINGS = AmcSettings(40, 4, replace(AMC, warmup=12, decay=0.85, batch=16, hidden=(32, 32), dummy=True))


def test_a_search_is_what_its_history_proposes_whatever_the_order_it_finished_in():
    walk = GroupWalk(steps(), costs, {"macs": 2000.0})
    done = search(walk, SETTINGS, reward, seed=3)
    history = [AmcTrial.from_dict(json.loads(json.dumps(trial.to_dict()))) for trial in done]
    random.Random(0).shuffle(history)
    for number in (0, 3, 7, 9):
        again = propose(walk, SETTINGS, history, 3, number)
        assert again is not None
        assert [trial.index for trial in again] == list(range(4 * number, 4 * number + 4))
        for trial in again:
            assert trial.counts == done[trial.index].counts
            assert (trial.actions == done[trial.index].actions).all()
    assert propose(walk, SETTINGS, history[:20], 3, 9) is None
    assert len({tuple(trial.counts.values()) for trial in done}) > 10


def test_the_search_finds_more_than_its_warm_up_did():
    walk = GroupWalk(steps(), costs, {"macs": 2000.0})
    settings = replace(SETTINGS, episodes=120, population=1, agent=replace(SETTINGS.agent, actor_lr=1e-3))
    done = search(walk, settings, reward, seed=1)
    random_best, found = best(done[: settings.agent.warmup]).reward, [trial.reward for trial in done]
    assert np.mean(found[-20:]) > np.mean(found[: settings.agent.warmup])
    assert best(done).reward >= random_best


def test_failed_trials_are_no_reward_and_the_search_goes_on():
    walk = GroupWalk(steps(), costs, {"macs": 2000.0})
    done = search(walk, replace(SETTINGS, episodes=20), lambda c: float("nan") if c["g0"] > 16 else reward(c), seed=0)
    assert np.isfinite(best(done).reward)
    with pytest.raises(ValueError, match="no trial has a reward"):
        best([replace(done[0], reward=float("nan"))])
