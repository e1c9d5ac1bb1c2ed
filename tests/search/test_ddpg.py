"""The agent of AMC and HAQ: noise, replay, warm-up, learning."""

from dataclasses import replace

import numpy as np
import pytest

from slimray.search.ddpg import AMC, HAQ, Ddpg, DdpgSettings, Episode, Replay, truncated_normal
from slimray.spec import UserError


def filled(dummy: bool, episodes: int = 3, steps: int = 4) -> Replay:
    replay = Replay(1000)
    for episode in range(episodes):
        for step in range(steps):
            replay.add(np.array([episode, step], float), 0.5, 1.0, step == steps - 1)
        if dummy:
            replay.add(np.array([episode, steps - 1], float), 0.0, 0.0, False)
    return replay


def usable(replay: Replay) -> list[tuple[int, int, float]]:
    rows = [row for place, row in enumerate(replay.rows) if replay.usable(place)]
    return [(int(state[0]), int(state[1]), reward) for state, _, reward, _ in rows]


def test_without_dummies_the_first_transition_of_later_episodes_and_the_newest_are_never_drawn():
    expected = {(e, s, 1.0) for e in range(3) for s in range(4)} - {(1, 0, 1.0), (2, 0, 1.0), (2, 3, 1.0)}
    assert set(usable(filled(False))) == expected


def test_with_dummies_every_transition_is_drawn_and_no_dummy():
    assert usable(filled(True)) == [(e, s, 1.0) for e in range(3) for s in range(4)]


def test_the_state_after_a_transition_is_that_of_the_one_stored_next():
    drawn = filled(True, 4).draw(15, np.random.default_rng(0))
    assert drawn is not None
    states, _, _, goes_on, after = drawn
    inside = goes_on[:, 0] > 0
    assert inside.any()
    assert not inside.all()
    assert (after[inside, 1] == states[inside, 1] + 1).all()
    assert (states[~inside, 1] == 3).all()


def test_a_replay_forgets_the_oldest():
    replay = Replay(5)
    for i in range(8):
        replay.add(np.array([i]), 0.0, 0.0, False)
    assert [int(row[0][0]) for row in replay.rows] == [3, 4, 5, 6, 7]


def test_recorded_schedules():
    assert (AMC.warmup, HAQ.warmup) == (101, 21)
    assert [AMC.sigma_of(101), AMC.sigma_of(160)] == pytest.approx([0.475, 0.023], abs=5e-4)
    assert HAQ.sigma_of(21) == pytest.approx(0.5 * 0.99)


def test_the_noise_is_a_normal_distribution_cut_to_the_unit_interval():
    rng = np.random.default_rng(0)
    draws = np.array([truncated_normal(0.3, 0.5, rng) for _ in range(4000)])
    assert ((draws >= 0) & (draws <= 1)).all()
    grid = np.linspace(0, 1, 10_001)
    density = np.exp(-0.5 * ((grid - 0.3) / 0.5) ** 2)
    mean = (grid * density).sum() / density.sum()
    assert draws.mean() == pytest.approx(mean, abs=4 * draws.std() / len(draws) ** 0.5)
    assert truncated_normal(0.7, 1e-12, rng) == pytest.approx(0.7)
    assert 0 <= truncated_normal(1.0, 1e-3, rng) <= 1


def test_the_warm_up_is_uniform_and_does_not_learn():
    settings = replace(AMC, warmup=3, batch=8)
    agent, rng = Ddpg(settings, 2, 4, seed=0), np.random.default_rng(1)
    before = agent.mean_action(np.array([0.1, 0.2]))
    drawn = [agent.act(np.zeros(2), 0, rng) for _ in range(500)]
    assert np.quantile(drawn, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.08)
    for i in range(3):
        agent.learn(Episode(np.full((4, 2), i / 3), np.full(4, 0.5), 1.0))
    assert agent.mean_action(np.array([0.1, 0.2])) == before
    agent.learn(Episode(np.zeros((4, 2)), np.full(4, 0.5), 1.0))
    assert agent.mean_action(np.array([0.1, 0.2])) != before


@pytest.mark.parametrize("settings", [AMC, HAQ], ids=["amc", "haq"])
def test_an_agent_learns_which_action_pays_in_which_state(settings):
    settings = replace(settings, warmup=30, decay=0.97, hidden=(64, 64), actor_lr=1e-3)
    wanted, states = np.array([0.2, 0.8, 0.5]), np.eye(3)
    agent = Ddpg(settings, 3, 3, seed=0)
    for number in range(150):
        rng = np.random.default_rng(number)
        actions = np.array([agent.act(state, number, rng) for state in states])
        agent.learn(Episode(states, actions, 1 - float(np.abs(actions - wanted).sum())))
    found = np.array([agent.mean_action(state) for state in states])
    learned = slice(None) if settings.dummy else slice(1, None)  # AMC's replay never draws the first step of an episode
    assert np.abs(found - wanted)[learned].max() < 0.2


def trained(settings: DdpgSettings, episodes: list[Episode]) -> Ddpg:
    agent = Ddpg(settings, 2, 3, seed=5)
    for episode in episodes:
        agent.take(episode)
    return agent


def test_the_same_episodes_make_the_same_agent_and_failed_ones_are_left_out():
    settings, rng = replace(AMC, warmup=2, batch=4, hidden=(16, 16)), np.random.default_rng(0)
    episodes = [Episode(rng.random((3, 2)), rng.random(3), float(rng.random())) for _ in range(8)]
    one, two = (trained(settings, episodes) for _ in range(2))
    failed = trained(settings, [*episodes, Episode(np.zeros((3, 2)), np.zeros(3), float("nan"))])
    other = trained(settings, episodes[::-1])
    state = np.array([0.3, 0.6])
    assert one.mean_action(state) == two.mean_action(state) == failed.mean_action(state) != other.mean_action(state)
    assert failed.episodes == one.episodes + 1


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match="ddpg: warmup"):
        replace(AMC, warmup=0)
