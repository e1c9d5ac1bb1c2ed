"""Energy that this machine uses while something runs: measured if it has counters or sensors, otherwise modelled.

RAPL (readable by root) counts the energy of the processors; boards have a sensor (hwmon, tegrastats); nvidia-smi
reports the watts of GPUs. If the processor has none of these, its energy is modelled as the busy time of its threads
times WATTS_PER_THREAD. All sources cover the whole machine (or container), whoever keeps it busy, but no other machine.
"""

import os
import platform
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimray.runtime import conditions

EVERY_S = 10.0  # between readings, because counters wrap within minutes and watts change
WATTS_PER_THREAD = 5.0  # assumed: servers of 2020 to 2026 have 2 to 7 W of rated power per hardware thread
J_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Reading:
    """A reading of the sensors: `joules` counted and the count at which each wraps, by zone; `watts` by source."""

    at: float
    joules: Mapping[str, tuple[float, float]]
    watts: Mapping[str, float]
    busy_s: float | None
    """Busy seconds of its threads since the machine started; None if they are not counted."""


def read(root: Path = Path("/")) -> Reading:
    """Return one reading of all sensors."""
    at, joules, watts = time.monotonic(), conditions.rapl_joules(root), dict[str, float]()
    if not joules:
        watts |= conditions.board_watts(root)
    return Reading(at, joules, watts | conditions.gpu_watts(), _busy_s(root))


def used(before: Reading, after: Reading) -> dict[str, float]:
    """Return the joules between two readings by source: `rapl`, `hwmon`, `tegrastats`, `nvidia-smi`, or `model`.

    Watts are assumed to change linearly between the two.
    """
    found: dict[str, float] = {}
    for zone in before.joules.keys() & after.joules.keys():
        (start, _), (end, most) = before.joules[zone], after.joules[zone]
        found["rapl"] = found.get("rapl", 0.0) + (end - start if end >= start else max(0.0, end - start + most))
    for source in before.watts.keys() & after.watts.keys():
        found[source] = (before.watts[source] + after.watts[source]) / 2 * (after.at - before.at)
    if not found.keys() - {conditions.GPU_SOURCE} and before.busy_s is not None and after.busy_s is not None:
        found["model"] = max(0.0, after.busy_s - before.busy_s) * WATTS_PER_THREAD
    return found


class Meter:
    """Adds up energy in a thread of its own, from `with` on; `told` returns the sum at any time."""

    def __init__(self, root: Path = Path("/"), every_s: float = EVERY_S):
        self._root, self._every_s = root, every_s
        self._last: Reading | None = None
        self._joules: dict[str, float] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Meter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def told(self) -> dict[str, Any]:
        """Return the energy so far: `kwh`, `how` ("measured", "model", or which part is which), `source`, `machine`.

        {} if there is no source.
        """
        self._look()
        if not self._joules:
            return {}
        modelled, measured = "model" in self._joules, sorted(self._joules.keys() - {"model"})
        how = "measured" if not modelled else "GPUs measured, processor modelled" if measured else "model"
        guess = [f"busy threads x {WATTS_PER_THREAD:g} W (assumed)"] if modelled else []
        kwh, source = sum(self._joules.values()) / J_PER_KWH, ", ".join([*measured, *guess])
        return {"kwh": kwh, "how": how, "source": source, "machine": platform.node()}

    def _look(self) -> None:
        with self._lock:
            now = read(self._root)
            for source, joules in (used(self._last, now) if self._last else {}).items():
                self._joules[source] = self._joules.get(source, 0.0) + joules
            self._last = now

    def _watch(self) -> None:
        self._look()
        while not self._over.wait(self._every_s):
            self._look()


def _busy_s(root: Path) -> float | None:
    """Return the busy seconds of all threads of the container, or else of the machine; None if they are not counted."""
    with suppress(OSError, ValueError, KeyError):
        lines = (root / "sys/fs/cgroup/cpu.stat").read_text().splitlines()
        return int(dict(line.split() for line in lines)["usage_usec"]) / 1e6
    with suppress(OSError, ValueError, IndexError):
        user, nice, system, _, _, irq, softirq = map(int, (root / "proc/stat").read_text().split("\n")[0].split()[1:8])
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return None
