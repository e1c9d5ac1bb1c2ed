"""Health of a run: the watchdog, stragglers, goodput."""

import threading
import time

import pytest
from tests.waits import patience

from slimray.train import health


def test_a_rank_that_stops_is_reported_once_with_its_stacks():
    told, event = [], threading.Event()

    def stuck(doing: str, seconds: float, stacks: str) -> None:
        told.append((doing, seconds, stacks))
        event.set()

    dog = health.Watchdog(0.2, stuck)
    dog.beat("computing step 3")
    assert event.wait(patience(10))
    time.sleep(0.5)
    ((doing, seconds, stacks),) = told
    assert doing == "computing step 3"
    assert seconds > 0.2
    assert "test_a_rank_that_stops" in stacks


def test_a_rank_that_goes_on_is_left_alone():
    told: list = []
    limit = patience(1.0)
    dog = health.Watchdog(limit, lambda *what: told.append(what))
    for _ in range(40):
        dog.beat("computing")
        time.sleep(limit / 20)
    dog.close()
    assert not told


@pytest.mark.parametrize(("doing", "waits", "told"), [("computing", 0, 1), ("computing", 1, 0), ("saving", 0, 0)])
def test_own_work_that_takes_far_longer_than_before_is_reported_before_the_limit(monkeypatch, doing, waits, told):
    monkeypatch.setattr(health, "QUICK_S", 0.3)
    monkeypatch.setattr(health, "QUICK_RATIO", 2.0)
    found, event = [], threading.Event()
    dog = health.Watchdog(patience(600), lambda *what: (found.append(what), event.set()), lambda: bool(waits))
    for _ in range(health.QUICK_FROM):
        dog.beat(health.COMPUTING)
        time.sleep(0.005)
        dog.beat(health.OTHERS)
    dog.beat(doing)
    if told:
        assert event.wait(patience(30))
        assert found[0][1] < patience(600)
    else:
        time.sleep(1.5)
        assert not found
    dog.close()


def test_the_first_steps_may_take_as_long_as_anything(monkeypatch):
    monkeypatch.setattr(health, "QUICK_S", 0.2)
    found: list = []
    dog = health.Watchdog(patience(600), lambda *what: found.append(what))
    dog.beat(health.COMPUTING)
    time.sleep(1.5)
    dog.close()
    assert not found


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([1.0, 1.0, 1.0, 1.5], [3]),
        ([1.0, 1.02, 0.98, 1.1], []),
        ([1.0, 1.6], [1]),
        ([1.0, 1.2], []),
        ([1.0], []),
        ([0.0, 0.0, 0.0], []),
        ([1.0] * 62 + [2.0, 3.0], [62, 63]),
        ([0.5, 1.0, 1.5, 2.0, 2.5, 3.0], []),
    ],
)
def test_slow_ranks_are_those_far_from_the_others(seconds, slow):
    found = health.slow_ranks(seconds)
    assert sorted(found) == slow
    assert all(ratio > health.SLOW_RATIO for ratio in found.values())


def test_goodput_is_useful_seconds_over_all_of_them():
    rows = [
        {"phase": "train", "step": 10, "time": 103.0, "time/step_s": 0.2},
        {"phase": "val", "step": 10, "time": 104.0},
        {"phase": "train", "step": 20, "time": 107.0, "time/step_s": 0.3},
    ]
    found = health.goodput(rows, began=100.0, ended=110.0, restarts=1, repeated=4).to_dict()
    assert found == {"goodput": 0.5, "useful_s": 5.0, "wall_s": 10.0, "repeated_steps": 4, "restarts": 1}
    assert health.goodput([], 5.0, 5.0).to_dict()["goodput"] == 0.0
