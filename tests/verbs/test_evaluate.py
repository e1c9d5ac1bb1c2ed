"""Evaluation, display and prediction: a finished run is used by name on the command line, with and without Ray."""

import json

import pytest
from tests.verbs.conftest import Shell, train_yaml

from slimray import runs

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def trained(shell: Shell) -> str:
    shell.ok("run", shell.write("scored.yaml", train_yaml("scored", epochs=1)))
    return "scored"


def test_a_run_is_scored_in_both_frame_orders_with_a_report(shell, trained):
    orders = "frame_orders=[natural, shuffled]"
    done = shell.run("evaluate", trained, "--set", orders, "--set", "scale.workers=2", "--json")
    rows = json.loads(done.stdout)["rows"]
    assert [(row["run"], row["variant"], row["num_samples"]) for row in rows] == [
        ("scored", "natural", 12),
        ("scored", "shuffled", 12),
    ]
    page = runs.read_file(runs.open_run(str(shell.storage), "scored-eval"), "report.html").decode()
    assert "data:image/jpeg;base64," in page
    assert "Confusion" in page


@pytest.mark.benchmark
def test_views_change_what_is_scored_not_how_many(shell, trained):
    shell.ok("evaluate", trained, "--name", "views", "--set", "clips=2", "--set", "crops=3", "--set", "average=prob")
    card = json.loads(shell.ok("show", "views", "--json"))["card"]
    assert card["metrics"]["rows"][0]["views"] == 6
    assert card["metrics"]["rows"][0]["num_samples"] == 12


def test_a_run_that_has_not_finished_cannot_be_scored(shell, trained):
    refused = shell.run("evaluate", "score")
    assert refused.returncode == 2
    assert "no run 'score', did you mean 'scored'?" in refused.stderr


def test_files_are_classified_and_bad_ones_are_named(shell, trained, shared):
    good = next((shell.storage / "data/data/clips/val").glob("*.mp4"))
    bad = shared / "data/video/damaged/text_renamed.mp4"
    done = shell.run("predict", trained, str(good), str(bad), "--json", "--top", "2")
    assert done.returncode == 2
    rows = json.loads(done.stdout)
    assert len(rows[0]["top"]) == 2
    assert 0 < sum(p for _, p in rows[0]["top"]) <= 1
    assert rows[1]["reason"]
    assert "1 of 2 files could not be read" in done.stderr


def test_runs_are_listed_with_kind_state_and_result(shell, trained):
    rows = {row["name"]: row for row in json.loads(shell.ok("runs", "--json"))}
    assert rows["data"]["kind"] == "prepare"
    assert rows["scored"]["state"] == "finished"
    assert rows["scored"]["result"].startswith("top1 ")
    assert "scored" in shell.ok("runs")
