"""How long tests wait: the seconds that a fast, idle machine may need, times one factor that is measured.

A wait ends as soon as its condition holds, so a large factor costs time only where a test fails. SLIMRAY_TEST_PATIENCE
sets the factor instead; child processes and parallel workers inherit it.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

REFERENCE_S = 0.07  # of `_measure` on two quiet x86-64 cores of 2024, where the seconds in the tests were chosen


def _measure() -> float:
    """Seconds to start a process and let it work for a moment: slow cores and busy ones both show."""
    began = time.perf_counter()
    for _ in range(3):
        subprocess.run([sys.executable, "-S", "-c", "sum(range(1_000_000))"], check=True)
    return time.perf_counter() - began


FACTOR = float(os.environ.get("SLIMRAY_TEST_PATIENCE") or max(1.0, _measure() / REFERENCE_S))
os.environ["SLIMRAY_TEST_PATIENCE"] = str(FACTOR)


def patience(seconds: float) -> float:
    """Return how long to wait here for what may take `seconds` on a quick, quiet machine."""
    return seconds * FACTOR


def as_in_a_terminal() -> None:
    """`preexec_fn` of a process that is to be ended by SIGINT, which what a script starts in the background ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(what: str, condition: Callable[[], object], seconds: float = 120) -> None:
    """Poll until `condition` holds; AssertionError that says what was waited for after `patience(seconds)`."""
    end = time.monotonic() + patience(seconds)
    while not condition():
        assert time.monotonic() < end, f"waited {patience(seconds):.0f} s for {what}"
        time.sleep(0.02)
