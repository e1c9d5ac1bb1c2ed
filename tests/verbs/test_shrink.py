"""A supernet shrunk stage by stage and searched: exact after a kill, with stored trials, and subnets as runs."""

import json

import pytest
from tests.verbs.conftest import Shell, end_session, weights
from tests.verbs.test_compress import DATA
from tests.waits import wait_for

from slimray import runs
from slimray.arch import Arch

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

SHRINK = """
kind: shrink
name: {name}
data: {{run: pictures, size: 32, images: {{area: [0.5, 1], brightness: 0, saturation: 0}}}}
model: {{name: ofa_mobilenetv3, preset: tiny, width: 0.5}}
batch: {{total: 8, per_worker: 8}}
optim: {{reference_batch: 8, schedule: cosine, groups: no_norm_decay}}
stages:
  - {{name: teacher, epochs: 1, lr: 0.02}}
  - name: rest
    free: {{kernel: [3, 5, 7], depth: [2, 3], expand: [3, 4, 6]}}
    epochs: 1
    lr: 0.01
    subnets: 2
    sandwich: true
    sort_channels: true
hold_out: 16
judge: {{calibrate: 32, calibrate_batch: 16}}
judged: 3
checkpoint: {{every_steps: 2}}
scale: {{workers: 1}}
"""
SEARCH = """
kind: search
name: {name}
supernet: ofa
strategy: {{name: evolution, population: 4, iterations: 1}}
targets: [{{name: small, limits: {{macs: {macs}}}}}]
judge: {{calibrate: 32, calibrate_batch: 16}}
scale: {{workers: 1}}
"""


@pytest.fixture(scope="module")
def ofa(shell: Shell) -> str:
    """Return the digest of an undisturbed shrink run, `ofa`."""
    shell.ok("run", shell.write("pictures.yaml", DATA), shell.write("ofa.yaml", SHRINK.format(name="ofa")))
    return weights(shell, "ofa")


def test_stages_are_judged_and_samples_are_held_out(shell, ofa):
    run = runs.open_run(str(shell.storage), "ofa")
    stages = json.loads(runs.read_file(run, "results.json"))["stages"]
    assert [stage["stage"] for stage in stages] == ["teacher", "rest"]
    assert [row["subnet"] for row in stages[0]["rows"]] == ["largest", "smallest", "sample 1"]
    assert all(row["num_samples"] == 12 for stage in stages for row in stage["rows"])
    card = runs.read_card(run)
    assert card is not None
    assert runs.exists(run, "data/held_out.parquet")
    assert "<svg" in runs.read_file(run, "report.html").decode()
    done = shell.run("evaluate", "ofa")
    assert done.returncode == 2
    assert "holds a supernet" in done.stderr


def test_a_killed_driver_goes_on_in_its_stage_and_ends_in_the_same_weights(shell, ofa):
    child = shell.start("run", shell.write("again.yaml", SHRINK.format(name="ofa-killed")))
    stage = runs.run_at(f"{shell.storage}/ofa-killed/stages/01-rest")
    wait_for("a checkpoint of the second stage", lambda: bool(runs.list_checkpoints(stage)), 200)
    end_session(child)
    assert not runs.exists(stage, "model/weights.safetensors")
    shell.ok("run", "again.yaml")
    assert weights(shell, "ofa-killed") == ofa


def test_a_search_keeps_limits_and_goes_on_from_its_trials(shell, ofa):
    done = shell.run("run", shell.write("hard.yaml", SEARCH.format(name="hard", macs=1000)))
    assert done.returncode == 2
    assert "no arch is at most 1000, the smallest found is" in done.stderr
    text = SEARCH.format(name="found", macs=1_500_000)
    child = shell.start("run", shell.write("found.yaml", text))
    found = runs.open_run(str(shell.storage), "found")
    wait_for("three trials", lambda: runs.exists(found, "trials/small/000002.json"), 120)
    end_session(child)
    kept = {name: runs.read_file(found, f"trials/small/{name}") for name in runs.list_names(found, "trials/small")}
    shell.ok("run", "found.yaml")
    assert {name: runs.read_file(found, f"trials/small/{name}") for name in kept} == kept
    shell.ok("run", shell.write("twin.yaml", text.replace("name: found", "name: twin")))
    both = [runs.open_run(str(shell.storage), name) for name in ("found", "twin")]
    results = [json.loads(runs.read_file(run, "results.json")) for run in both]
    assert results[0]["trials"] == results[1]["trials"]
    for row in results[0]["targets"]:
        assert row["macs"] <= row["limits"].get("macs", float("inf"))
    front = json.loads(runs.read_file(found, "front.json"))["fronts"]["macs"]
    assert [point["macs"] for point in front] == sorted(point["macs"] for point in front)
    assert Arch.from_dict(front[0]["arch"])["resolution"] <= 32


def test_a_found_subnet_is_a_run_to_score_and_to_predict_with(shell, ofa):
    done = shell.run("evaluate", "found-small", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["rows"][0]
    told = json.loads(runs.read_file(runs.open_run(str(shell.storage), "found"), "results.json"))["targets"][0]
    assert row["params"] == told["params"]
    assert row["macs"] == told["macs"]
