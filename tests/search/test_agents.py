"""The search over episodes is the same in whatever order trials end, and learns from each of them once."""

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slimray.compress.quantization import layers_of
from slimray.search import haq
from slimray.search.agents import Climb, Climber, Learner, SearchSettings, Trial, best, search
from slimray.search.amc import GroupStep, GroupWalk
from slimray.search.ddpg import AMC, HAQ, Ddpg
from slimray.spec import UserError


def groups(spends: bool = False) -> GroupWalk:
    steps = [GroupStep(f"g{i}", (8, 16, 24, 32), False, 32, 32, 1, 3, 9216.0, 1e6) for i in range(5)]
    ends = np.array([[3.0], [10.0]])

    def costs(rows):
        full = np.concatenate([np.repeat(ends[:1], len(rows), 0), rows, np.repeat(ends[1:], len(rows), 0)], 1)
        return {"macs": (full[:, :-1] * full[:, 1:]).sum(1)}

    return GroupWalk(steps, costs, {"macs": 2000.0}, spends=spends)


def bits() -> haq.BitsWalk:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1))
    layers = layers_of(net, torch.zeros(1, 3, 8, 8))

    def cost(policy: haq.Policy) -> float:
        return float(sum(layer.weights * row[0] for layer, row in zip(layers, policy, strict=True)))

    return haq.BitsWalk(layers, cost, 0.6 * cost([[8, 8]] * 3), ends={})


def by_channels(policy: dict[str, int]) -> float:
    """Reward channels of the third group three times as much."""
    return sum(c * (3 if name == "g2" else 1) for name, c in policy.items()) / 224


def hilly(policy: dict[str, int]) -> float:
    """Reward channels of every group except the third with diminishing returns."""
    return sum(c / 32 * 2 if name == "g2" else (c / 32) ** 0.3 for name, c in policy.items())


SMALL: dict[str, Any] = {"warmup": 12, "decay": 0.85, "batch": 16, "hidden": (32, 32), "dummy": True}
CASES: dict[str, Any] = {
    "amc": (groups, by_channels, SearchSettings(40, 4, replace(AMC, **SMALL))),
    "climb": (
        lambda: groups(spends=True),
        hilly,
        SearchSettings(40, 4, Climb((0.25, 0.5, 0.25, 1.0, 0.25), 0.2)),
    ),
    "haq": (bits, lambda policy: float(policy[1][1]), SearchSettings(24, 2, replace(HAQ, **SMALL))),
}


@pytest.fixture(params=CASES)
def case(request):
    walk, reward, settings = CASES[request.param]
    return walk(), reward, settings


def stored(trials: list[Trial]) -> list[Trial]:
    return [Trial.from_dict(json.loads(json.dumps(trial.to_dict()))) for trial in trials]


def require_equal(found: list[Trial], expected: list[Trial]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.index, one.policy) == (other.index, other.policy)
        assert (one.actions == other.actions).all()
        assert (one.states == other.states).all()


def test_a_search_is_what_its_history_proposes_whatever_the_order_it_finished_in(case):
    walk, reward, settings = case
    done, size = search(walk, settings, reward, seed=3), settings.population
    assert [trial.index for trial in done] == list(range(settings.episodes))
    assert len({repr(trial.policy) for trial in done}) > 6
    history = stored(done)
    random.Random(0).shuffle(history)
    known = {trial.index: trial for trial in history}
    for number in (0, 3, 7, settings.episodes // size - 1):
        again = Learner(walk, settings, 3).propose(known, number)
        assert again is not None
        require_equal(again, done[size * number : size * (number + 1)])
    del known[5]
    assert Learner(walk, settings, 3).propose(known, 9) is None


def test_an_agent_learns_once_from_every_episode(case, monkeypatch):
    walk, reward, settings = case
    kind = Climber if isinstance(settings.agent, Climb) else Ddpg
    done, taken, take = search(walk, settings, reward, seed=3), [], kind.take
    monkeypatch.setattr(kind, "take", lambda agent, episode: (taken.append(episode), take(agent, episode)))
    learner, known = Learner(walk, settings, 3), {trial.index: trial for trial in done}
    for number in range(settings.episodes // settings.population):
        proposed = learner.propose(known, number)
        assert proposed is not None
        require_equal(proposed, [done[trial.index] for trial in proposed])
    assert len(taken) == settings.episodes - settings.population  # all generations except the last
    with pytest.raises(ValueError, match="generation 2 comes before one that was proposed"):
        learner.propose(known, 2)


def test_a_policy_that_was_tried_keeps_its_reward(case):
    walk, reward, settings = case
    tried = []
    search(walk, settings, lambda policy: (tried.append(repr(policy)), reward(policy))[1], seed=3)
    assert len(tried) == len(set(tried))


def test_the_search_finds_more_than_its_warm_up_did():
    settings = CASES["amc"][2]
    settings = replace(settings, episodes=120, population=1, agent=replace(settings.agent, actor_lr=1e-3))
    done = search(groups(), settings, by_channels, seed=1)
    random_best, found = best(done[: settings.agent.warmup]).reward, [trial.reward for trial in done]
    assert np.mean(found[-20:]) > np.mean(found[: settings.agent.warmup])
    assert best(done).reward >= random_best


def test_climbing_begins_at_its_start_and_goes_on_from_the_best_so_far():
    walk, _, settings = CASES["climb"]
    done = search(walk(), replace(settings, population=1), hilly, seed=1)
    assert done[0].actions.tolist() == list(settings.agent.start)
    for index in range(1, settings.episodes):
        gone = np.abs(done[index].actions - best(done[:index]).actions)
        assert 0 < gone.mean() < 0.3
    assert best(done).reward > done[0].reward + 0.05


def test_a_start_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="5 actions are needed, not 1"):
        Learner(groups(), SearchSettings(4, 1, Climb((0.5,))), 0)
    with pytest.raises(UserError, match="spread must be > 0"):
        Climb((0.5,), 0.0)


def test_failed_trials_are_no_reward_and_the_search_goes_on():
    settings = replace(CASES["amc"][2], episodes=20)
    done = search(groups(), settings, lambda c: float("nan") if c["g0"] > 16 else by_channels(c), seed=0)
    assert np.isfinite(best(done).reward)
    with pytest.raises(ValueError, match="no trial has a reward"):
        best([replace(done[0], reward=float("nan"))])


def test_trials_stored_before_policies_had_one_name_are_read():
    [trial] = stored(search(groups(), replace(CASES["amc"][2], episodes=1), by_channels))
    plain = trial.to_dict()
    plain["counts"] = plain.pop("policy")
    assert Trial.from_dict(plain).policy == trial.policy


def test_a_search_of_nothing_is_refused():
    with pytest.raises(UserError, match="episodes and population must be >= 1"):
        SearchSettings(0, 1, AMC)
