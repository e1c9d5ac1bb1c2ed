"""Energy of a run: from counters and sensors if they exist (files as in Linux), otherwise from a model."""

import time
from pathlib import Path

import pytest
from tests.waits import wait_for

from slimray.runtime import energy

RAPL = "sys/class/powercap/intel-rapl"


def put(root: Path, name: str, text: str) -> None:
    """Write a file atomically, as the kernel does, so that nobody reads half of it."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "part").write_text(text)
    (root / "part").replace(root / name)


@pytest.fixture(autouse=True)
def no_tools(tmp_path, monkeypatch):
    """A PATH with only the programs of a test, which hides the GPUs of this machine."""
    monkeypatch.setenv("PATH", str(tmp_path))


def test_rapl_counters_are_summed_over_processors_and_go_round(tmp_path):
    for zone, name, joules in ((0, "package-0", 90), (1, "package-1", 10), (2, "psys", 500)):
        put(tmp_path, f"{RAPL}:{zone}/name", f"{name}\n")
        put(tmp_path, f"{RAPL}:{zone}/energy_uj", f"{joules}000000\n")
        put(tmp_path, f"{RAPL}:{zone}/max_energy_range_uj", "100000000\n")
    before = energy.read(tmp_path)
    put(tmp_path, f"{RAPL}:0/energy_uj", "5000000\n")  # 10 J to the end, 5 J since
    put(tmp_path, f"{RAPL}:1/energy_uj", "17000000\n")
    put(tmp_path, f"{RAPL}:2/energy_uj", "900000000\n")
    assert energy.used(before, energy.read(tmp_path)) == {"rapl": pytest.approx(15 + 7)}


def test_watts_of_a_board_and_of_gpus_are_taken_to_change_evenly(tmp_path):
    put(tmp_path, "sys/class/hwmon/hwmon0/power1_input", "8000000")
    put(tmp_path, "nvidia-smi", "#!/bin/sh\necho 100.5\necho 200\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    before = energy.read(tmp_path)
    put(tmp_path, "sys/class/hwmon/hwmon0/power1_input", "10000000")
    after = energy.read(tmp_path)
    seconds = after.at - before.at
    assert seconds > 0
    assert energy.used(before, after) == {
        "hwmon": pytest.approx(9 * seconds),
        "nvidia-smi": pytest.approx(300.5 * seconds),
    }


def test_without_a_sensor_busy_threads_are_the_model_those_of_the_container_first(tmp_path):
    put(tmp_path, "proc/stat", "cpu  100 0 100 5000 0 0 0 0 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    before = energy.read(tmp_path)
    put(tmp_path, "proc/stat", "cpu  300 0 200 9000 0 0 0 0 0 0\n")
    found = energy.used(before, energy.read(tmp_path))
    assert found == {"model": pytest.approx(energy.WATTS_PER_THREAD * 3)}  # 300 ticks of 10 ms
    put(tmp_path, "sys/fs/cgroup/cpu.stat", "usage_usec 1000000\nuser_usec 1\n")
    before = energy.read(tmp_path)
    put(tmp_path, "sys/fs/cgroup/cpu.stat", "usage_usec 1500000\nuser_usec 1\n")
    assert energy.used(before, energy.read(tmp_path)) == {"model": pytest.approx(energy.WATTS_PER_THREAD / 2)}


def test_a_meter_says_how_it_knows_and_nothing_where_nothing_tells(tmp_path):
    with energy.Meter(tmp_path) as meter:
        wait_for("the first reading", lambda: meter._last)
        assert meter.told() == {}
        put(tmp_path, "sys/fs/cgroup/cpu.stat", "usage_usec 0\n")
        assert meter.told() == {}, "one reading is no difference"
        put(tmp_path, "sys/fs/cgroup/cpu.stat", "usage_usec 7200000000\n")
        told = meter.told()
        assert told["how"] == "model"
        assert "assumed" in told["source"]
        assert told["kwh"] == pytest.approx(2e-3 * energy.WATTS_PER_THREAD)
        put(tmp_path, "nvidia-smi", "#!/bin/sh\necho 1000\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        meter.told()
        time.sleep(0.01)
        told = meter.told()
        assert told["how"] == "GPUs measured, processor modelled"
        assert told["source"].startswith("nvidia-smi, ")
        assert told["kwh"] > 2e-3 * energy.WATTS_PER_THREAD


def test_a_meter_reads_often_enough_to_see_a_counter_go_round(tmp_path):
    put(tmp_path, f"{RAPL}:0/max_energy_range_uj", "100000000")
    put(tmp_path, f"{RAPL}:0/energy_uj", "0")
    with energy.Meter(tmp_path, every_s=0.01) as meter:
        for microjoules in (60_000_000, 20_000_000, 80_000_000):
            known = meter._last
            wait_for("a reading", lambda known=known: meter._last is not known)
            put(tmp_path, f"{RAPL}:0/energy_uj", str(microjoules))
            wait_for("the count to be read", lambda joules=microjoules / 1e6: _count(meter) == joules)
        told = meter.told()
    assert (told["how"], told["source"]) == ("measured", "rapl")
    assert told["kwh"] == pytest.approx(180 / 3.6e6)
    assert told["machine"]


def _count(meter: energy.Meter) -> float | None:
    return None if meter._last is None else meter._last.joules.get("intel-rapl:0", (None, 0))[0]
