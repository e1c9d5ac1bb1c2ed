"""Two networks timed against each other on this machine, in turn, so that what disturbs one disturbs both.

The result is the median of the ratios pair by pair and the order statistics around it that enclose the true median
with at least 95 %. One thread on a CPU is timed by the processor time that it got, so that other work does not count.
"""

import math
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from slimray.edge.runtimes import RUNTIMES, THREAD_CLOCK, Clock, settings

READING_S = 0.004  # a reading repeats a quick network until it takes this long


@torch.no_grad()
def compare(
    first: nn.Module, second: nn.Module, x: Tensor, hardware: str = "cpu-eager", threads: int = 1, pairs: int = 9
) -> dict[str, Any]:
    """Return how many times as fast `second` is as `first` on the input `x` (batch included), and both times.

    {"first_ms", "second_ms" (medians), "ratio", "low", "high" (its interval), "pairs", "hardware", "threads"}; a ratio
    above 1 means that `second` is faster. UserError where `hardware` (a row of RUNTIMES) cannot run here.
    """
    runtime = RUNTIMES[hardware]
    runtime.check()
    one_thread = threads == 1 and THREAD_CLOCK and hardware.startswith("cpu")
    clock: Clock = time.thread_time if one_thread else time.perf_counter
    with settings(threads):
        steps = [runtime.prepare(net.eval(), x, threads) for net in (first, second)]
        fed = runtime.feed(x)

        def read(step: Any, count: int) -> float:
            return sum(runtime.timed([step] * count, [fed] * count, clock)) / count

        for step in steps:
            read(step, 3)
        slow = max(read(step, 3) for step in steps)  # ms
        count = max(1, min(1000, math.ceil(1e3 * READING_S / max(slow, 1e-3))))
        times: list[tuple[float, float]] = []
        for number in range(pairs):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            found = {which: read(steps[which], count) for which in order}
            times.append((found[0], found[1]))
    ratios = sorted(a / b for a, b in times)
    skip = _outside(pairs)
    return {
        "first_ms": median(a for a, _ in times),
        "second_ms": median(b for _, b in times),
        "ratio": median(ratios),
        "low": ratios[skip],
        "high": ratios[-1 - skip],
        "pairs": pairs,
        "hardware": hardware,
        "threads": threads,
    }


def _outside(count: int) -> int:
    """How many of `count` ordered values may be left out at each end so that the rest encloses the median with 95 %."""
    skip = 0
    while 2 * sum(math.comb(count, i) for i in range(skip + 2)) <= 0.05 * 2**count:
        skip += 1
    return skip
