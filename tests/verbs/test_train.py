"""Training on real workers: exact after kills, on other worker counts, with damaged files; errors are one sentence."""

import json
import re
import signal
from pathlib import Path

import pytest
from tests.verbs.conftest import (
    Shell,
    end_session,
    find_process,
    has_checkpoint,
    run_and_kill_a_worker,
    seen,
    train_yaml,
    weights,
    write_list,
)
from tests.waits import patience, wait_for

from slimray import runs

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def undisturbed(shell: Shell) -> str:
    """Return the digest of an undisturbed run, `calm`."""
    shell.ok("run", shell.write("calm.yaml", train_yaml("calm", epochs=3)))
    return weights(shell, "calm")


def test_every_sample_is_seen_once_per_epoch(shell, undisturbed):
    assert seen(shell, "calm") == {epoch: list(range(48)) for epoch in range(3)}


def test_a_run_leaves_numbers_a_model_and_a_report(shell, undisturbed):
    run = runs.open_run(str(shell.storage), "calm")
    card = runs.read_card(run)
    assert card is not None
    assert card["steps"] == 18
    assert card["energy"]["kwh"] > 0
    assert card["energy"]["how"] in ("measured", "model", "GPUs measured, processor modelled")
    assert {"val/top1", "val/top5", "val/mean_class_accuracy", "val/loss"} <= set(card["metrics"]["last"])
    rows = runs.read_parts(run, "metrics")
    train = [row for row in rows if row["phase"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 19))
    assert {"data/wait_s", "time/transfer_s", "time/compute_s", "time/communication_s", "train/mfu"} <= set(train[0])
    assert "<svg" in runs.read_file(run, "report.html").decode()
    assert runs.read_status(run).state == "finished"


def test_the_same_name_is_skipped_and_another_job_of_that_name_is_refused(shell, undisturbed):
    assert "calm: already finished, skipped" in shell.ok("run", "calm.yaml")
    refused = shell.run("run", "calm.yaml", "--set", "optim.lr=0.5")
    assert refused.returncode == 2
    assert "optim.lr: 0.02 -> 0.5" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_killed_worker_costs_no_bit(shell, undisturbed):
    run_and_kill_a_worker(shell, shell.write("killed.yaml", train_yaml("killed", epochs=3)), "killed")
    assert weights(shell, "killed") == undisturbed
    assert seen(shell, "killed") == {epoch: list(range(48)) for epoch in range(3)}


def test_a_killed_driver_resumes_on_another_number_of_workers(shell, undisturbed):
    name = shell.write("elastic.yaml", train_yaml("elastic", epochs=3))
    child = shell.start("run", name)
    wait_for("a checkpoint in mid-epoch", lambda: has_checkpoint(shell, "elastic", 8))
    end_session(child)
    state = json.loads(shell.ok("runs", "--json"))
    assert next(row["state"] for row in state if row["name"] == "elastic") == "stopped"
    shell.ok("run", name, "--set", "scale.workers=1")
    assert seen(shell, "elastic") == {epoch: list(range(48)) for epoch in range(3)}
    card = runs.read_card(runs.open_run(str(shell.storage), "elastic"))
    assert card is not None
    assert card["steps"] == 18


def test_nothing_is_left_running(shell, undisturbed):
    child = shell.start("run", shell.write("left.yaml", train_yaml("left", epochs=40)))
    wait_for("the first checkpoint", lambda: has_checkpoint(shell, "left", 2))
    decoder = find_process(child.pid, "slimray.data.video.decoder")
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=patience(60))
    assert child.returncode == 1
    assert "the same command resumes the run" in err
    assert "Traceback" not in err
    wait_for("the decoders to end", lambda: not Path(f"/proc/{decoder}").exists(), 30)


FOLDER_JOB = """
kind: train
name: {name}
data: {{card: my_clips, root: {root}, size: 32, max_bad_fraction: {bound}, decode_timeout_s: {patience}}}
model: {{name: tsm_resnet18, width: 0.125, num_segments: 4}}
batch: {{total: 8, per_worker: 4}}
optim: {{lr: 0.001, reference_batch: 8, epochs: 1}}
scale: {{workers: 2}}
"""


def folder_job(name: str, root: str, bound: float) -> str:
    return FOLDER_JOB.format(name=name, root=root, bound=bound, patience=patience(20))


def test_odd_and_damaged_files_are_trained_on_or_quarantined_with_their_reason(shell, shared):
    zoo = shared / "data/video"
    files = [*sorted(zoo.glob("codec_zoo/**/*.*")), *sorted(zoo.glob("damaged/*.*"))]
    files = [f for f in files if f.suffix not in (".md", ".json")]
    write_list(shell, "zoo", files)
    shell.ok("run", shell.write("zoo.yaml", folder_job("zoo", "zoo", 1)))
    bad = runs.read_parts(runs.open_run(str(shell.storage), "zoo"), "quarantine")
    reasons = {row["path"]: row["reason"] for row in bad if row["split"] == "train"}
    damaged = {f.name for f in files if f.parent.name == "damaged"}
    assert damaged <= set(reasons)
    assert all(len(reason) > 5 and "Traceback" not in reason for reason in reasons.values())
    assert len(set(reasons) - damaged) <= 2, set(reasons) - damaged


def test_too_many_damaged_files_end_the_run_with_one_sentence(shell, shared):
    done = shell.run("run", shell.write("bad.yaml", folder_job("bad", "zoo", 0.01)))
    assert done.returncode == 1
    assert "training files do not decode, more than data.max_bad_fraction (0.01) allows" in done.stderr
    assert "Traceback" not in done.stderr
    status = runs.read_status(runs.open_run(str(shell.storage), "bad"))
    assert status is not None
    assert status.state == "failed"


@pytest.mark.benchmark
def test_a_missing_file_ends_the_run_with_its_name(shell):
    root = shell.folder / "gone"
    root.mkdir()
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("".join(f"none{i}.mp4 {i % 2}\n" for i in range(8)))
    done = shell.run("run", shell.write("gone.yaml", folder_job("gone", "gone", 1)))
    assert done.returncode == 1
    assert re.search(r"a file of the index is missing \(.*/none\d.mp4\)", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
