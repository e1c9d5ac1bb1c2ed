"""Progress and times of a device while its queue is filled: the simulated device of this file is steps behind."""

import copy
import threading
import time

import pytest
import torch
import torch.distributed as dist
from tests.ranks import run_ranks
from tests.waits import patience
from torch import nn

from slimray.train import health
from slimray.train.methods import method
from slimray.train.methods.method import Setup
from slimray.train.methods.plain import PlainReplica
from slimray.train.metrics import Clock
from slimray.train.spec import OptimSpec
from slimray.train.timing import TIMERS, ProcessorTimer, Timer, timer_of

CPU = torch.device("cpu")


class Behind:
    """Timer of a device that works through a queue: a moment is a position in it, which the device reaches by `work`
    or when something waits for it."""

    ahead = 2

    def __init__(self) -> None:
        self.given = self.done = 0
        self.waited_for: list[int] = []
        self.reached: dict[int, float] = {}

    def now(self) -> int:
        self.given += 1
        return self.given

    def work(self, moment: int, at: float) -> None:
        self.done, self.reached[moment] = max(self.done, moment), at

    def has_passed(self, moment: int) -> bool:
        return moment <= self.done

    def seconds(self, start: int, end: int) -> float:
        self.waited_for.append(end)
        self.done = max(self.done, end)
        return self.reached.get(end, float(end)) - self.reached.get(start, float(start))

    def finish(self) -> None:
        self.done = self.given


def test_a_processor_is_beyond_what_it_was_given():
    timer: Timer = timer_of(CPU)
    assert isinstance(timer, ProcessorTimer)
    assert isinstance(timer_of(torch.device("meta")), ProcessorTimer)
    start = timer.now()
    time.sleep(0.02)
    end = timer.now()
    assert timer.seconds(start, end) >= 0.02
    assert timer.has_passed(end)
    assert timer.finish() is None
    assert set(TIMERS) == {"cpu", "cuda"}


def step(clock: Clock, timer: Timer, samples: int) -> None:
    start = timer.now()
    clock.add(("wait", start, timer.now()))
    clock.samples += samples
    clock.add(("work", timer.now(), timer.now()))
    clock.end_step(start)


def test_seconds_of_a_step_are_added_when_the_device_has_done_it_and_no_more_than_two_are_queued():
    timer = Behind()
    clock = Clock(timer)
    for count in range(1, 6):
        step(clock, timer, 4)
        assert clock.timed == 4 * max(0, count - 2)
        assert timer.done <= timer.given - 5 * min(count, 2)  # without waiting for the last two
    assert clock.seconds["total"] == 3 * 4  # moments of this device are seconds
    clock.settle()
    assert (clock.steps, clock.samples, clock.timed) == (5, 20, 20)
    assert clock.seconds == {"total": 20, "wait": 5, "sum": 0, "work": 5, "transfer": 0, "reduce": 0}
    assert clock.compute_s == 5


def test_a_processor_knows_the_seconds_of_every_step():
    clock = Clock(ProcessorTimer(CPU))
    step(clock, clock.timer, 4)
    assert clock.timed == 4
    assert 0 <= clock.seconds["wait"] <= clock.seconds["total"] > 0


def replica_of(timer: Timer) -> PlainReplica:
    optim = OptimSpec(lr=0.1, reference_batch=4, epochs=1, groups="plain")
    one = PlainReplica(nn.Linear(2, 2), Setup(optim, method.Input(), (2,), CPU))
    one.timer = timer
    return one


def test_a_rank_waits_for_others_where_its_device_stands_in_the_all_reduce(monkeypatch):
    monkeypatch.setattr(method, "REDUCING_S", 0.0)
    timer = Behind()
    one = replica_of(timer)
    assert not one.reduces()
    steps = []
    for _ in range(2):  # both are queued
        one.reduce_begins()
        assert one.reducing is not None
        begin, end = one.reducing[1], timer.now()
        one.reduced.append((*one.reducing, end))
        one.reducing = None
        steps.append((begin, end))
    assert not one.reduces()  # the device computes, and does not have its gradients yet
    for begin, end in steps:
        timer.work(begin, 0.0)
        assert one.reduces()
        timer.work(end, 0.0)
        assert not one.reduces()
    one.reduce_begins()  # a backward pass that is being queued
    assert not one.reduces()
    timer.finish()
    assert one.reduces()


@pytest.mark.parametrize("reduces", [True, False])
def test_the_watchdog_tells_a_device_that_hangs_from_one_that_waits(monkeypatch, reduces: bool):
    """The CPU waits for a queued step while the device is in its own work, or in the all-reduce of gradients."""
    monkeypatch.setattr(method, "REDUCING_S", 0.0)
    monkeypatch.setattr(health, "QUICK_S", 0.3)
    monkeypatch.setattr(health, "QUICK_RATIO", 2.0)
    timer, told, event = Behind(), [], threading.Event()
    one = replica_of(timer)
    one.reduce_begins()
    assert one.reducing is not None
    begin, one.reduced = one.reducing[1], copy.copy(one.reduced)
    one.reduced.append((*one.reducing, timer.now()))
    one.reducing = None
    if reduces:
        timer.work(begin, 0.0)
    dog = health.Watchdog(patience(600), lambda *what: (told.append(what), event.set()), one.reduces)
    for _ in range(health.QUICK_FROM):
        dog.beat(health.COMPUTING)
        dog.beat(health.OTHERS)
    dog.beat(health.COMPUTING)
    if reduces:
        time.sleep(1.5)
        assert not told
    else:
        assert event.wait(patience(30))
        assert told[0][0] == health.COMPUTING
    dog.close()


def both_wait(rank: int) -> None:
    """The first rank arrives once the other one is seen in the all-reduce of gradients."""
    method.REDUCING_S, store = 0.2, dist.distributed_c10d._get_default_store()
    optim = OptimSpec(lr=0.1, reference_batch=4, epochs=1, groups="plain")
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    one = PlainReplica(net, Setup(optim, method.Input(), (3, 2, 2), CPU, rank, 2))
    rng = method.np.random.default_rng(0)
    piece = method.Piece(rng.integers(0, 256, (4, 1, 2, 2, 3), dtype=method.np.uint8), rng.integers(0, 2, 4))

    def look() -> None:
        while not one.reduces():
            time.sleep(0.02)
        store.set("waits", "1")

    if rank == 0:
        store.wait(["waits"])
    else:
        threading.Thread(target=look, daemon=True).start()
    report = one.step([piece], 8, 0.1, (0, 0))
    assert not one.reduces()
    names = [name for name, _, _ in report.spans]
    assert names == ["work", "transfer", "reduce"]
    seconds = {name: one.timer.seconds(start, end) for name, start, end in report.spans}
    assert seconds["reduce"] < seconds["work"]
    assert seconds["reduce"] > method.REDUCING_S or rank == 0


def test_a_rank_that_waits_for_a_late_one_is_in_the_all_reduce():
    run_ranks(both_wait)
