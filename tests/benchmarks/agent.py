"""The device agent on this machine: its latency table against a local one, and the overhead of a request.

The agent runs in a separate environment, a plain install without torch and Ray (see runtime.py, PLAIN_PYTHON). A third
of the operators of `ofa_mobilenetv3` (tiny, one resolution) are timed in ONNX Runtime, here and by the agent in turn,
PAIRS times; a figure is the sum over the operators. Beside the ratio: the same for each side against itself (odd
readings over even ones), and the time that a request takes beyond its measurement.
`python -m tests.benchmarks.agent table` instead compares a table of `ofa_mobilenetv3` measured by the agent with UNSEEN
other subnets, exported and timed whole on the device (see latency.py); the table is kept in SLIMRAY_BENCH_DIR, and an
unfinished one is continued.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tests.benchmarks import latency
from tests.benchmarks.pairs import Ratio
from tests.benchmarks.runtime import CLEAN, installed
from tests.runtime.test_agent import TOKEN, Device

from slimray import models
from slimray.edge import profiler, remote
from slimray.edge.arch_costs import Prices
from slimray.edge.runtimes import RUNTIMES, Chain, Clock, Reading, Runtime, settings
from slimray.runtime import agent

MODEL = {"name": "ofa_mobilenetv3", "num_classes": 10, "preset": "tiny"}
PAIRS, SIDE = 15, 32
UNSEEN, SIDES, ROUNDS = 20, (160,), 9
PUBLISHED = {"name": "ofa_mobilenetv3", "num_classes": 1000}


def main(names: tuple[str, ...] = ("operators",)) -> None:
    """Print the ratio, its noise and the overhead; or how far the table is from subnets that it has not seen."""
    os.environ[agent.TOKEN_VARIABLE] = TOKEN
    with tempfile.TemporaryDirectory() as folder:
        python = installed(Path(folder, "plain"))
        absent = "import importlib.util as u; assert not any(map(u.find_spec, ('torch', 'ray')))"
        subprocess.run([python, "-c", absent], check=True, env=CLEAN)
        device = Device(python=python)
        try:
            if "operators" in names:
                measure(device)
            if "table" in names:
                there = remote.runtime(remote.connect(device.url))
                latency.report(models.build(**PUBLISHED).eval(), PUBLISHED, there, SIDES, UNSEEN, rounds=ROUNDS)
        finally:
            device.end()


def measure(device: Device) -> None:
    net = models.build(**MODEL).eval()
    prices = Prices(net, None)
    archs = [group[0] for group in profiler._cover(net, [SIDE], None)][::3]
    there, beyond = remote.runtime(remote.connect(device.url)), list[float]()
    asked = there.reading
    assert asked is not None

    def reading(reference: Chain, chain: Chain, runs: int, clock: Clock) -> Reading:
        start = time.perf_counter()
        found = asked(reference, chain, runs, clock)
        beyond.append(1e3 * (time.perf_counter() - start - found.wall_s))
        return found

    places: list[Runtime] = [replace(there, reading=reading), RUNTIMES["cpu-onnx"]]
    rows: list[list[np.ndarray]] = [[], []]
    with settings(1):
        chains = [list(profiler._chains(one, [prices.units(a) for a in archs], 1, {})) for one in places]
        for number in range(PAIRS + 1):
            for place in (0, 1) if number % 2 else (1, 0):
                found = profiler.take_readings(places[place], chains[place], 1, 1, random.Random(number))
                rows[place].append(np.concatenate([one[0] for one in found.chains]))
    first, second = (np.stack(one[1:]) for one in rows)  # the first round warms up
    sums = [tuple(one.sum(1).tolist()) for one in (first, second)]
    units = len({key for chain in chains[0] for key in chain.keys})
    print(f"{units} operators, {first.shape[1]} places, torch {torch.__version__}")
    print(Ratio("agent over local, all operators", *sums))
    each = np.quantile(first, 0.25, 0) / np.quantile(second, 0.25, 0)
    print(f"operator by operator: median {np.median(each):.3f}, nine of ten in {np.quantile(each, [0.05, 0.95])}")
    for name, one in (("agent", first), ("local", second)):
        noise = np.abs(np.quantile(one[::2], 0.25, 0) / np.quantile(one[1::2], 0.25, 0) - 1)
        print(f"{name}, test and retest of an operator: {100 * np.median(noise):.1f} %")
    low, high = np.quantile(beyond, [0.1, 0.9])
    print(f"a request beyond its measurement: {median(beyond):.2f} ms (80 % in {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or ("operators",))
