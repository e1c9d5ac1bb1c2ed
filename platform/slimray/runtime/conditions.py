"""Conditions of a device while it computes: temperature, clock, throttling, watts. Linux, read-only.

Watts come from the first available source: RAPL (energy counters of Intel and AMD, which need root), hwmon (INA sensors
of boards), tegrastats (Jetson), nvidia-smi. A device without any of them is not an error: the value is left out.
"""

import os
import platform
import re
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

WATCHED_S = 0.2  # interval over which energy counters are read
GPU_SOURCE = "nvidia-smi"
TOOL_S = 5.0  # time limit of tegrastats and nvidia-smi
# Cooling devices that slow a processor down. Fans do not; states of powerclamp and TCC Offset mean something else.
SLOWING = re.compile(r"Processor|(thermal-)?(cpufreq|devfreq)-.*")


def device(root: Path = Path("/")) -> dict[str, Any]:
    """Return the name of the device or processor, cores, memory in MB, and system."""
    memory = re.search(r"MemTotal:\s+(\d+)", _text(root / "proc/meminfo"))
    board = _text(root / "proc/device-tree/model").strip("\0\n ")
    cpu = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    name = board or (cpu[1].strip() if cpu else platform.processor() or platform.machine())
    return {
        "device": name,
        "cores": os.cpu_count(),
        "memory_mb": int(memory[1]) // 1024 if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def conditions(root: Path = Path("/"), watts: bool = True) -> dict[str, Any]:
    """Return those of `temperature_c`, `clock_mhz`, `throttled` (bool), `watts` and their `source` that can be read."""
    found: dict[str, Any] = {}
    if temperatures := [v / 1000 for v in _numbers(root, "sys/class/thermal/thermal_zone*/temp") if 0 < v < 200_000]:
        found["temperature_c"] = max(temperatures)
    if clocks := _numbers(root, "sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq"):
        found["clock_mhz"] = max(clocks) / 1000
    throttled = _throttled(root)
    if throttled is not None:
        found["throttled"] = throttled
    return found | (_watts(root) if watts else {})


def watts_while(work: Callable[[], Any], root: Path = Path("/")) -> tuple[float, str, float] | None:
    """Return the watts of the device while `work` keeps its processor busy, their source, and the seconds per call.

    None if the device cannot measure them; the watts of a GPU alone do not count.
    """
    found: dict[str, Any] = {}
    reader = threading.Thread(target=lambda: found.update(_watts(root, gpu=False)), daemon=True)
    calls, start = 0, time.perf_counter()
    reader.start()
    while reader.is_alive() or not calls:
        work()
        calls += 1
    seconds = (time.perf_counter() - start) / calls
    return (found["watts"], found["source"], seconds) if found else None


def rapl_joules(root: Path = Path("/")) -> dict[str, tuple[float, float]]:
    """Return the joules that each processor has counted, and the count at which it wraps; {} if they cannot be read."""
    found: dict[str, tuple[float, float]] = {}
    for place in sorted((root / "sys/class/powercap").glob("intel-rapl:?")):
        if _text(place / "name").strip() == "psys":  # the whole platform of a laptop, including its processor
            continue
        joules, most = _number(place / "energy_uj"), _number(place / "max_energy_range_uj")
        if joules is None:
            return {}
        found[place.name] = (joules / 1e6, (most or 0.0) / 1e6)
    return found


def board_watts(root: Path = Path("/")) -> dict[str, float]:
    """Return the current watts from a board's own sensor, by source; {} if it has none."""
    return _first(root, "hwmon", "tegrastats")


def gpu_watts() -> dict[str, float]:
    """Return the current watts of the GPUs, by source; {} if there are none."""
    return _first(Path("/"), GPU_SOURCE)


def throttle_count(root: Path = Path("/")) -> int | None:
    """Return how often cores were throttled for heat since the start of the machine; None if that is not counted."""
    counts = _numbers(root, "sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")
    return int(sum(counts)) if counts else None


def _throttled(root: Path) -> bool | None:
    """Return whether the device is throttled now, or None if unknown.

    Read from the flags of a Raspberry Pi (bits 0 to 3: voltage, cap, throttling, temperature), or from cooling devices.
    """
    flags = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled").strip()
    if re.fullmatch(r"(0x)?[0-9a-fA-F]+", flags):
        return bool(int(flags, 16) & 0b1111)
    places = sorted(root.glob("sys/class/thermal/cooling_device*"))
    states = [_number(place / "cur_state") for place in places if SLOWING.fullmatch(_text(place / "type").strip())]
    known = [state for state in states if state is not None]
    return any(state > 0 for state in known) if known else None


def _watts(root: Path, gpu: bool = True) -> dict[str, Any]:
    for source, watts in _first(root, "rapl", "hwmon", "tegrastats", *([GPU_SOURCE] if gpu else [])).items():
        return {"watts": round(watts, 3), "source": source}
    return {}


def _first(root: Path, *sources: str) -> dict[str, float]:
    """Return the watts of the first of `sources` that reports them, by its name; {} if none does."""
    readers = {"rapl": _rapl, "hwmon": _hwmon, "tegrastats": _tegrastats, GPU_SOURCE: _nvidia_smi}
    for source in sources:
        if (watts := readers[source](root)) is not None:
            return {source: watts}
    return {}


def _rapl(root: Path) -> float | None:
    places = sorted((root / "sys/class/powercap").glob("intel-rapl:?"))
    before = [_number(place / "energy_uj") for place in places]
    if not places or None in before:
        return None
    start = time.monotonic()
    time.sleep(WATCHED_S)
    after, seconds = [_number(place / "energy_uj") for place in places], time.monotonic() - start
    used = [b - a for a, b in zip(before, after) if a is not None and b is not None and b >= a]
    return sum(used) / 1e6 / seconds if len(used) == len(places) else None  # a counter that was reset


def _hwmon(root: Path) -> float | None:
    powers = _numbers(root, "sys/class/hwmon/hwmon*/power*_input")  # microwatts
    if powers:
        return max(powers) / 1e6
    most = None
    for current in sorted((root / "sys/class/hwmon").glob("hwmon*/curr*_input")):  # milliamperes, millivolts
        amperes, volts = _number(current), _number(current.with_name(current.name.replace("curr", "in")))
        if amperes is not None and volts is not None:
            most = max(most or 0.0, amperes * volts / 1e6)
    return most


def _tegrastats(root: Path) -> float | None:
    if shutil.which("tegrastats") is None:
        return None
    with suppress(OSError), subprocess.Popen(["tegrastats", "--interval", "100"], stdout=subprocess.PIPE) as process:
        try:  # it prints lines for ever and never exits by itself
            assert process.stdout is not None
            said = bool(select.select([process.stdout], [], [], TOOL_S)[0])
            line = os.read(process.stdout.fileno(), 4096).decode(errors="replace") if said else ""
        finally:
            process.kill()
        found = re.search(r"(?:VDD_IN|POM_5V_IN)\s+(\d+)", line)
        return int(found[1]) / 1000 if found else None
    return None


def _nvidia_smi(root: Path) -> float | None:
    if shutil.which("nvidia-smi") is None:
        return None
    with suppress(subprocess.SubprocessError, OSError, ValueError):
        command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_S, check=True)
        return sum(float(line) for line in done.stdout.splitlines() if line.strip())
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:1_000_000]
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_text(path).strip())
    except ValueError:
        return None


def _numbers(root: Path, pattern: str) -> list[float]:
    found = [_number(path) for path in sorted(root.glob(pattern))]
    return [one for one in found if one is not None]
