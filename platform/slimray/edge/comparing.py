"""Compares the latency of two networks on this machine, timed alternately so that disturbances affect both.

The result is the median of the ratios by pair and its confidence interval (pairs.py). A single CPU thread is timed by
its processor time, so that other work does not count.
"""

import math
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from slimray.edge.runtimes import RUNTIMES, THREAD_CLOCK, Clock, settings
from slimray.models.modes import evaluating
from slimray.runtime.pairs import alternate

READING_S = 0.004  # shortest reading: quick networks are repeated


@torch.no_grad()
def compare(
    first: nn.Module, second: nn.Module, x: Tensor, hardware: str = "cpu-eager", threads: int = 1, pairs: int = 9
) -> dict[str, Any]:
    """Return the speed of `second` relative to `first` on the input `x` (batch included), and both times.

    {"first_ms", "second_ms" (medians), "ratio", "low", "high" (its interval), "pairs", "hardware", "threads"}; a ratio
    above 1 means that `second` is faster. Raises UserError if `hardware` (a row of RUNTIMES) cannot run here.
    """
    runtime = RUNTIMES[hardware]
    runtime.check()
    one_thread = threads == 1 and THREAD_CLOCK and hardware.startswith("cpu")
    clock: Clock = time.thread_time if one_thread else time.perf_counter
    with settings(threads), evaluating(first, second):
        steps = [runtime.prepare(net, x, threads) for net in (first, second)]
        fed = runtime.feed(x)

        def read(step: Any, count: int) -> float:
            return sum(runtime.timed([step] * count, [fed] * count, clock)) / count

        for step in steps:
            read(step, 3)
        slow = max(read(step, 3) for step in steps)  # ms
        count = max(1, min(1000, math.ceil(1e3 * READING_S / max(slow, 1e-3))))
        found = alternate(lambda: read(steps[0], count), lambda: read(steps[1], count), pairs)
    low, high = found.interval
    return {
        "first_ms": median(found.a),
        "second_ms": median(found.b),
        "ratio": found.ratio,
        "low": low,
        "high": high,
        "pairs": pairs,
        "hardware": hardware,
        "threads": threads,
    }
