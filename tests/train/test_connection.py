"""A driver that gets SIGTERM while Ray runs in it has the time to save, and reports it in its own words."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.waits import patience

from slimray import runs
from slimray.runs.lock import read_lock

DRIVER = """
import sys, time
from slimray import runs
from slimray.train import connection
run = runs.open_run(sys.argv[1], "a")
with runs.hold(run):
    connection.connect(1)
    try:
        print("ready", flush=True)
        time.sleep(3600)
    finally:
        time.sleep(5)  # longer than Ray's handler in C++ lets a process live
        print("saved", flush=True)
"""


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_sigterm_leaves_a_driver_the_time_to_save_and_writes_no_stack(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    child = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=patience(60))
    finally:
        child.kill()
    assert (child.returncode, out) == (128 + signal.SIGTERM, "saved\n"), err
    assert "SIGTERM received" not in err
    assert read_lock(runs.open_run(str(tmp_path), "a")) is None
