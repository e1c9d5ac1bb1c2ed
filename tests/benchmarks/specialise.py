"""Seconds of one specialisation, and of a hundred, in one process: `ofa_mobilenetv3`, predictor and tables loaded.

A specialisation is a search with the published settings (population 100, 500 generations) on the predictions of a
predictor, under a limit on latency. The accuracies that the predictor learned from and the latencies of the tables are
made up, which does not change the time. Goals: one in 5 s, 100 pairs of hardware and limit in 3 minutes, by the clock
and with one thread; processor time is printed beside it for busy machines.
"""

import os
import time
from collections.abc import Mapping

import numpy as np
import torch

from slimray import models
from slimray.edge import cost, hardware
from slimray.edge.arch_costs import Meter, Prices
from slimray.search.predictor import fit_predictor
from slimray.search.problem import Problem
from slimray.search.strategies import Evolution, search

PAIRS, DEVICES = int(os.environ.get("SLIMRAY_BENCH_PAIRS", "100")), 10


def made_up(known: Mapping[str, float], number: int) -> Meter:
    """A table: a time for every unit, which is `known` and something of its own."""
    share = np.random.default_rng(number).uniform(0.8, 1.2, len(known))
    ms = {key: {"latency_ms": one * times} for (key, one), times in zip(known.items(), share, strict=True)}
    return Meter(f"table {number}", "table", "made up", ("latency_ms",), lambda unit: ms[unit.key])


def main() -> None:
    torch.set_num_threads(1)
    net = cost.build_on_meta(lambda: models.build("ofa_mobilenetv3", num_classes=1000))
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    plain = Prices(net).on(None)
    print(f"which genes each layer depends on, once for a supernet: {time.perf_counter() - start:.1f} s")
    table = plain.table
    codes = table.sample(1000, rng)
    features = table.features(codes)
    scores = 75 + features @ rng.normal(size=features.shape[1]) * 0.3 + rng.normal(size=len(codes)) * 0.1
    predictor = fit_predictor(net.space, codes, scores, seed=0)
    device = hardware.HARDWARE["dsp"]
    known = {key: hardware.unit_costs(device, unit)["latency_ms"] for key, unit in net.all_units().items()}
    meters = [made_up(known, number) for number in range(DEVICES)]
    times = []
    for pair in range(PAIRS):
        start, busy = time.perf_counter(), time.process_time()
        prices = plain.on(meters[pair % DEVICES])
        costs = prices.matrix(["latency_ms"])
        limit = float(np.quantile(costs(table.sample(1000, rng))["latency_ms"], 0.1 + 0.8 * pair / PAIRS))
        found = search(Problem(prices.table, costs, {"latency_ms": limit}), Evolution(), predictor.predict, seed=pair)
        best = found.top(1)
        assert best.costs["latency_ms"][0] <= limit
        times.append((time.perf_counter() - start, time.process_time() - busy))
        if pair == 0:
            print(
                f"one specialisation, {len(found):,} archs: {times[0][0]:.1f} s, processor {times[0][1]:.1f} s; it "
                f"expects {best.metric[0]:.2f} within {limit:.3f} ms, of all it tried {found.metric.mean():.2f}",
                flush=True,
            )
    total, busy = (sum(column) for column in zip(*times, strict=True))
    print(f"{PAIRS} pairs of {DEVICES} devices: {total:.0f} s, processor {busy:.0f} s, one thread")
    slowest, median = max(wall for wall, _ in times), float(np.median([wall for wall, _ in times]))
    print(f"each: median {median:.2f} s, slowest {slowest:.2f} s")


if __name__ == "__main__":
    main()
