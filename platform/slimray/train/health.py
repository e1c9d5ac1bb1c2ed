"""The health of a run: stuck ranks, slow ranks, and how much of the time went into useful steps.

`Watchdog` watches one rank from a thread: when nothing has moved for a set time, it reports what the rank was doing
and the stacks of all its threads. The time allowed for a rank's own work on a step follows from earlier steps.
`slow_ranks` finds stragglers in the step times of all ranks (MegaScale, arXiv 2402.15627, does so with a heat map).
`goodput` is useful step seconds over wall seconds. No Ray, no torch.
"""

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

COMPUTING = "computing"  # a rank's own work on a step
OTHERS = "waiting for the other ranks"  # such a rank is not stuck itself
QUICK_S, QUICK_RATIO, QUICK_FROM = 120.0, 20.0, 20  # limit of own work: at least, times the longest, after n steps
SLOW_RATIO, SLOW_Z = 1.3, 3.5  # times the median, and robust standard deviations: both, or noise would be blamed


class Watchdog:
    """Calls `stuck(doing, seconds, stacks)` from its thread, once, when `beat` was not called for `limit_s` seconds.

    `doing` is the argument of the last `beat`. COMPUTING has a shorter limit, QUICK_RATIO times the longest so far and
    at least QUICK_S, unless `waits()` returns True because the rank is waiting for others. The thread needs the
    interpreter lock: code that never releases it is caught by the other ranks instead, whose collectives time out.
    """

    def __init__(
        self, limit_s: float, stuck: Callable[[str, float, str], None], waits: Callable[[], bool] = lambda: False
    ):
        self.limit_s, self.stuck, self.waits = limit_s, stuck, waits
        self.doing, self._at = "starting", time.monotonic()
        self._longest_s, self._num_computed = 0.0, 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def beat(self, doing: str) -> None:
        """Note that the rank makes progress, and what it is doing now."""
        now = time.monotonic()
        if self.doing == COMPUTING:
            self._longest_s, self._num_computed = max(self._longest_s, now - self._at), self._num_computed + 1
        self.doing, self._at = doing, now

    def _quick_s(self) -> float:
        """Return the time limit, in seconds, of what the rank is doing while it does not wait for other ranks."""
        if self.doing != COMPUTING or self._num_computed < QUICK_FROM:
            return self.limit_s
        return min(self.limit_s, max(QUICK_S, QUICK_RATIO * self._longest_s))

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.limit_s / 4)):
            seconds = time.monotonic() - self._at
            if seconds > self.limit_s or (seconds > self._quick_s() and not self.waits()):
                self.stuck(self.doing, seconds, stacks())
                return


def stacks() -> str:
    """Return the stacks of all threads of this process, innermost call first."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def slow_ranks(seconds: Sequence[float]) -> dict[int, float]:
    """Return the slow ranks as rank -> its time over the median; `seconds` is each rank's own work on a step.

    Slow means above SLOW_RATIO times the median and SLOW_Z standard deviations above it, these estimated from the
    median absolute deviation (so that stragglers do not mask themselves). With two ranks there is no majority: the
    ratio to the faster one decides alone.
    """
    values = np.asarray(seconds, float)
    if len(values) < 2:
        return {}
    middle = float(np.median(values)) if len(values) > 2 else float(values.min())
    spread = 1.4826 * float(np.median(np.abs(values - middle))) if len(values) > 2 else 0.0
    bar = max(SLOW_RATIO * middle, middle + SLOW_Z * spread)
    return {int(rank): float(values[rank] / middle) for rank in np.flatnonzero(values > bar)} if middle > 0 else {}


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run: in training steps that counted, and in total since it began; steps repeated; restarts."""

    useful_s: float
    wall_s: float
    repeated_steps: int
    restarts: int

    def to_dict(self) -> dict[str, float]:
        """Return the form that the run's card stores; `goodput` is the share of useful seconds."""
        share = self.useful_s / self.wall_s if self.wall_s > 0 else 0.0
        return {
            "goodput": round(share, 4),
            "useful_s": round(self.useful_s, 1),
            "wall_s": round(self.wall_s, 1),
            "repeated_steps": self.repeated_steps,
            "restarts": self.restarts,
        }


def goodput(
    rows: Sequence[Mapping[str, Any]], began: float, ended: float, restarts: int = 0, repeated: int = 0
) -> Goodput:
    """Return the goodput of a run from its metric `rows` (newest attempt per step), Unix times and restarts."""
    useful, before = 0.0, 0
    for row in sorted((r for r in rows if r.get("phase") == "train"), key=lambda r: r["step"]):
        useful += row["time/step_s"] * (row["step"] - before)
        before = row["step"]
        began = min(began, row["time"] - row["time/step_s"])
    return Goodput(useful, max(ended - began, useful), repeated, restarts)


def end_process() -> None:
    """End this process at once, as a crash would; the process that started it decides what follows."""
    os._exit(17)
