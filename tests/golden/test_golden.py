"""The code computes what it computed at commit d4a6aae: equal bits on an equal machine, else equal numbers in float64.

record.py says which values were corrected since.

On another machine numbers may differ by SLACK times what a nudge of the starting weights made of them, which was
measured when they were recorded; points are trained in float32 there too. What is an integer is equal everywhere.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.golden.record import CASES, KINDS, WORLDS, machine
from tests.waits import patience

HERE = Path(__file__).resolve().parent
GOLDEN = json.loads((HERE / "golden.json").read_text())
SAME_MACHINE = machine() == GOLDEN["machine"]
SLACK, ROUNDING = 100, 1e-5  # the latter relative: numbers are written with six digits
DECODED = 2e-2  # by how much two versions of a decoder may differ, relative


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    """The values of today, computed as golden.json was, in a process of its own."""
    file = tmp_path_factory.mktemp("golden") / "today.json"
    command = [sys.executable, "-m", "tests.golden.record", str(file), *([] if SAME_MACHINE else ["--double"])]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=patience(240))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("what", ["plans", "archs", "indexes"])
def test_what_holds_no_fraction_is_equal_everywhere(found, what):
    for name, value in GOLDEN["exact"][what].items():
        assert found["exact"][what][name] == value, name
    assert set(found["exact"][what]) >= set(GOLDEN["exact"][what])


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_samples_are_read_and_varied_as_then(found, kind):
    for name, value in GOLDEN["samples"][kind].items():
        agrees(found["samples"][kind][name], value, 0.0, DECODED, f"{kind} {name}")


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_recorded(found, case):
    golden, ours = GOLDEN["cases"][case], found["cases"][case]["losses"]
    if SAME_MACHINE:
        assert ours == golden["losses"]
        return
    for world, losses in golden["double losses"].items():
        for step, (a, b, spread) in enumerate(zip(ours[world], losses, golden["loss spread"], strict=True)):
            assert a == pytest.approx(b, rel=ROUNDING, abs=SLACK * spread), f"{world} ranks, step {step}"


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_and_scores_hold_the_recorded_tensors(found, case):
    golden, ours = GOLDEN["cases"][case], found["cases"][case]
    assert sorted(ours["tensors"]) == sorted(golden["tensors"])
    for name, (*rows, spread) in golden["tensors"].items():
        for world, then, now in zip(WORLDS, rows, ours["tensors"][name], strict=True):
            assert (then is None) == (now is None), f"{name}, {world} ranks"
            if then is not None:
                agrees(now, then, spread, ROUNDING, f"{name}, {world} ranks")
    if SAME_MACHINE:  # a digest of all tensors, of those too that are not recorded one by one
        assert ours["all"] == golden["all"]


def agrees(now: str, then: str, spread: float, relative: float, name: str) -> None:
    """AssertionError unless two descriptions are of one tensor: of the same bits, on another machine in numbers."""
    bits, norm, projection = then.split()
    bits_now, norm_now, projection_now = now.split()
    if SAME_MACHINE:
        assert bits_now == bits, f"{name}: has other bits"
        return
    apart = SLACK * spread + relative * max(float(norm), 1e-3)
    assert float(norm_now) == pytest.approx(float(norm), rel=0, abs=apart), name
    assert float(projection_now) == pytest.approx(float(projection), rel=0, abs=apart), name
