"""The run folder on a disk and in a bucket of a real S3 server; locks between real processes; processes killed."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from tests.waits import patience, wait_for

from slimray import runs, storage
from slimray.spec import RunFailed, UserError
from slimray.storage import StorageError, join

JOB = {"kind": "train", "name": "a", "optim": {"lr": 0.1, "tags": ("1e-3", "x")}, "scale": {"workers": 2}, "init": None}


@pytest.fixture(autouse=True)
def settles_soon(monkeypatch) -> None:
    """Shorten the waits for locks in this process; rivals in other processes keep their waits."""
    monkeypatch.setattr(runs.lock, "SETTLE_S", patience(0.3))


@pytest.fixture(params=["disk", "bucket"])
def where(request, tmp_path):
    """An empty storage folder, on a disk and in a bucket."""
    return str(tmp_path) if request.param == "disk" else request.getfixturevalue("bucket")(f"{tmp_path.name}-runs")


@pytest.fixture
def run(where):
    return runs.open_run(where, "a")


@pytest.fixture
def local(tmp_path):
    return runs.open_run(str(tmp_path), "a")


def start(code: str, *arguments: str) -> subprocess.Popen:
    """Run Python `code` in a process of its own; `sys.argv[1:]` are the arguments."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom slimray import runs\nfrom slimray.spec import UserError\n"
        + code
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def put_lock(run, **changes):
    """Write a lock as a process on another machine would."""
    owner = {
        "token": "other",
        "host": "elsewhere boot pid:[1]",
        "pid": 1,
        "born": 1,
        "heartbeat": time.time(),
    } | changes
    storage.write_atomic(run.fs, join(run.path, "lock"), json.dumps(owner).encode())


# ------------------------------------------------------------------------------------------------- which run


def test_a_run_is_found_by_name_and_by_uri(where):
    run = runs.open_run(where, "resnet-tsm")
    assert runs.list_runs(where) == []
    runs.write_job(run, JOB)
    assert runs.find_run("resnet-tsm", where) == run
    assert runs.find_run(run.uri, "elsewhere") == run
    assert runs.list_runs(where) == [run]
    with pytest.raises(UserError, match="no run 'resnet-tms', did you mean 'resnet-tsm'"):
        runs.find_run("resnet-tms", where)
    with pytest.raises(UserError, match="is not a run"):
        runs.find_run(join(where, "nothing"), where)


@pytest.mark.parametrize("name", ["", "../up", "a b", ".hidden", "a/b", "x" * 200])
def test_a_name_that_cannot_be_a_folder_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="letters, digits"):
        runs.open_run(str(tmp_path), name)


def test_the_job_reads_back_as_it_was_written(run):
    job = JOB | {"text": "1e-3", "note": "yes", "rate": 1e-5, "lines": "a\nb: c", "shared": [JOB["optim"]] * 3}
    runs.write_job(run, job)
    assert runs.read_job(run) == json.loads(json.dumps(job))


def test_a_model_is_three_files_and_absent_until_all_are_there(run):
    with pytest.raises(UserError, match="has no model"):
        runs.read_model(run)
    runs.write_model(run, b"weights", {"name": "tsm_resnet18"}, {"classes": ["up", "down"]})
    assert runs.read_model(run) == (b"weights", {"name": "tsm_resnet18"}, {"classes": ["up", "down"]})


def test_damaged_weights_are_told_and_those_of_before_there_was_a_digest_are_read(run, where):
    runs.write_job(run, JOB)
    runs.write_model(run, b"weights", {}, {})
    storage.write_atomic(run.fs, join(run.path, "model/weights.safetensors"), b"weighst")
    for read in (runs.read_model, lambda _: runs.weights_source("a", where)):
        with pytest.raises(StorageError, match=r"model/weights\.safetensors.*: has changed since it was written"):
            read(run)
    storage.delete(run.fs, join(run.path, "model/weights.json"))
    assert runs.read_model(run)[0] == b"weighst"
    storage.delete(run.fs, join(run.path, "model/weights.safetensors"))
    with pytest.raises(UserError, match=r"has no model/weights\.safetensors"):
        runs.read_model(run)


def test_no_file_of_a_run_holds_a_credential(run):
    said = "https://me:hunter2@host/x?token=hunter2"
    runs.write_job(run, JOB | {"init": {"from": said}})
    runs.begin(run, JOB | {"init": {"from": said}}, 1)
    runs.end(run, "failed", said)
    runs.write_card(run, {"init": said})
    runs.write_file(run, "logs/0001-driver.log", f"OSError: {said}\n".encode())
    write_rows(run, "quarantine", 1, 0, [{"path": "a", "reason": said, "trace": [{"url": said}]}])
    for info in storage.list_files(run.fs, run.path, recursive=True):
        assert b"hunter2" not in storage.read_bytes(run.fs, info.path), info.path
    assert runs.claim(run, JOB | {"init": {"from": said}}).attempt == 2


def test_files_that_a_restart_would_not_clear_are_refused(local):
    with pytest.raises(ValueError, match="not a file of a run folder"):
        runs.write_file(local, "notes.txt", b"")


def test_weights_come_from_a_file_or_a_run_and_their_digest_is_checked(where, tmp_path):
    run = runs.open_run(where, "teacher")
    runs.write_job(run, JOB)
    with pytest.raises(UserError, match="no such weights"):
        runs.weights_source("teacher", where)
    runs.write_model(run, b"weights", {}, {})
    found = runs.weights_source("teacher", where)
    assert storage.read_bytes(*storage.open_uri(found)) == b"weights"
    (tmp_path / "w.pth").write_bytes(b"weights")
    digest = "9fb8d3c6d8ae5ad4bdc1cea2f2ef6fd44f1fd2ff3ba2d5b6ef9ed1e5d2a3f0c1"
    assert runs.weights_source(str(tmp_path / "w.pth"), where) == str(tmp_path / "w.pth")
    with pytest.raises(UserError, match="damaged or a different file"):
        runs.weights_source(str(tmp_path / "w.pth"), where, digest)


# -------------------------------------------------------------------------------------------- the same name again


def test_a_name_is_begun_resumed_and_skipped_when_finished(run):
    assert runs.claim(run, JOB) == runs.Claim(finished=False, attempt=1)
    with runs.hold(run):
        runs.begin(run, JOB, 1)
        assert runs.read_status(run).state == "running"
        assert runs.describe(run)["state"] == "running"
        runs.end(run, "failed", "a worker was lost")
    assert runs.claim(run, JOB) == runs.Claim(finished=False, attempt=2)
    with runs.hold(run):
        runs.begin(run, JOB, 2)
        runs.write_card(run, {"metrics": {"best": {"val/top1": 97.53}}})
        runs.end(run, "finished")
    assert runs.claim(run, JOB) == runs.Claim(finished=True, attempt=2)
    line = runs.describe(run)
    assert (line["kind"], line["state"], line["result"]) == ("train", "finished", "top1 97.5 %")
    assert not runs.exists(run, "lock")


def test_other_settings_are_refused_with_their_difference_except_where_allowed(local):
    runs.write_job(local, JOB)
    other = JOB | {"optim": {"lr": 0.2, "tags": ["1e-3", "x"]}, "scale": {"workers": 4}, "init": {"from": "b"}}
    with pytest.raises(UserError) as caught:
        runs.claim(local, other, may_change=("scale", "tracking"))
    assert 'optim.lr: 0.1 -> 0.2; init: null -> {"from": "b"}' in str(caught.value)
    assert "--restart" in str(caught.value)
    assert "scale" not in str(caught.value)
    assert runs.claim(local, JOB | {"scale": {"workers": 4}}, may_change=("scale",)).attempt == 1


def test_a_finished_run_of_other_settings_is_not_skipped(local):
    runs.begin(local, JOB, 1)
    runs.end(local, "finished")
    with pytest.raises(UserError, match="other settings"):
        runs.claim(local, JOB | {"init": "b"})


def test_restart_clears_what_slimray_wrote_and_nothing_else(run):
    runs.begin(run, JOB, 1)
    runs.write_report(run, "<html>")
    runs.save_checkpoint(run, 5, {"s": b"x"}, {})
    storage.write_atomic(run.fs, join(run.path, "my-notes.txt"), b"mine")
    assert runs.claim(run, JOB | {"init": "b"}, restart=True) == runs.Claim(finished=False, attempt=1)
    left = [info.base_name for info in storage.list_files(run.fs, run.path, recursive=True)]
    assert left == ["my-notes.txt"]


DAMAGE = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 9999, b'{"state": "done"}']


@pytest.mark.parametrize("content", DAMAGE)
@pytest.mark.parametrize("file", ["status.json", "job.yaml", "card.json", "lock"])
def test_restart_clears_a_run_whatever_its_state(local, file, content):
    runs.begin(local, JOB, 1)
    runs.save_checkpoint(local, 5, {"s": b"x"}, {})
    runs.end(local, "failed")
    Path(local.path, file).write_bytes(content)
    assert runs.claim(local, JOB, restart=True) == runs.Claim(finished=False, attempt=1)
    assert list(Path(local.path).iterdir()) == []


@pytest.mark.parametrize("file", ["status.json", "job.yaml"])
def test_a_damaged_run_is_cleared_although_it_is_of_before_there_was_a_marker(local, file):
    runs.begin(local, JOB, 1)
    Path(local.path, ".slimray").unlink()
    Path(local.path, file).write_bytes(Path(local.path, file).read_bytes()[:20])
    with pytest.raises(UserError, match="--restart"):
        runs.claim(local, JOB)
    assert runs.claim(local, JOB, restart=True).attempt == 1
    assert list(Path(local.path).iterdir()) == []


@pytest.mark.parametrize(
    "foreign",
    [
        {"job.yaml": b"apiVersion: batch/v1\nkind: Job\nmetadata:\n  name: a\n"},
        {"job.yaml": b"name: a\non: push\n"},
        {"job.yaml": b"kind: [\n"},
        {"status.json": b'{"state": "ok"}'},
        {"report.html": b"<html>"},
        {},
    ],
)
@pytest.mark.parametrize("restart", [True, False])
def test_a_folder_of_something_else_is_not_touched(local, foreign, restart):
    for name, content in (foreign | {"data/mine.bin": b"mine", "logs/mine.log": b"mine", "model/m": b"mine"}).items():
        Path(local.path, name).parent.mkdir(parents=True, exist_ok=True)
        Path(local.path, name).write_bytes(content)
    before = sorted((path, path.read_bytes()) for path in Path(local.path).rglob("*") if path.is_file())
    with pytest.raises(UserError, match="that does not belong to a run of slimray and is left alone"):
        runs.claim(local, JOB, restart=restart)
    assert sorted((path, path.read_bytes()) for path in Path(local.path).rglob("*") if path.is_file()) == before


def test_a_new_default_is_no_difference_and_another_value_is(local):
    def completed(stored):
        return {"ema": None, "cards": {"task": "classify"}} | stored

    runs.write_job(local, JOB)
    now = JOB | {"ema": None, "cards": {"task": "classify"}}
    assert runs.claim(local, now, completed=completed).attempt == 1
    with pytest.raises(UserError, match=r'cards\.task: "classify" -> "segment"'):
        runs.claim(local, now | {"cards": {"task": "segment"}}, completed=completed)


def test_a_run_said_to_be_running_whose_writer_is_gone_is_stopped(local):
    runs.begin(local, JOB, 1)
    assert runs.describe(local)["state"] == "stopped"


def test_an_attempt_that_another_process_has_begun_is_not_begun_again(local):
    runs.begin(local, JOB, 1)
    with pytest.raises(UserError, match="by another process in the meantime"):
        runs.begin(local, JOB, 1)


# --------------------------------------------------------------------------------------------------- the lock

COMPETE = """
run = runs.open_run(sys.argv[1], "a")
print("ready", flush=True)
sys.stdin.readline()
try:
    with runs.hold(run):
        print("held", flush=True)
        sys.stdin.readline()
except UserError as error:
    print("refused:", error, flush=True)
"""


def compete(where: str) -> list[str]:
    """Return the sorted output of two processes that want the lock of run `a` at the same time."""
    rivals = [start(COMPETE, where) for _ in range(2)]
    for rival in rivals:
        assert rival.stdout.readline() == "ready\n"
    for rival in rivals:
        rival.stdin.write("go\n")
        rival.stdin.flush()
    said = [rival.stdout.readline() for rival in rivals]  # the holder keeps it until both have written their output
    for rival in rivals:
        rival.communicate(timeout=patience(30))
    return sorted(said)


def test_of_two_processes_one_gets_the_lock(where):
    said = compete(where)
    assert said[0] == "held\n"
    assert said[1].startswith("refused: run 'a' is being written by ")


def test_of_two_processes_one_takes_over_a_stale_lock(local):
    put_lock(local, heartbeat=time.time() - 2 * runs.lock.STALE_S)
    said = compete(str(Path(local.path).parent))
    assert [line.partition(":")[0].strip() for line in said] == ["held", "refused"]


def test_the_lock_of_a_killed_process_is_free_at_once(local):
    holder = start(
        "with runs.hold(runs.run_at(sys.argv[1])):\n  print('held', flush=True); sys.stdin.readline()", local.path
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"being written by process {holder.pid}"):
        runs.claim(local, JOB, restart=False) if runs.exists(local, "job.yaml") else runs.hold(local).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with runs.hold(local):
        pass


def test_sigterm_releases_the_lock(local):
    holder = start(
        "with runs.hold(runs.run_at(sys.argv[1])):\n  print('held', flush=True); sys.stdin.readline()", local.path
    )
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGTERM)
    assert holder.wait(timeout=patience(30)) == 143
    assert not runs.exists(local, "lock")


def test_under_a_scheduler_the_lock_of_a_process_that_was_killed_elsewhere_is_waited_for(local, monkeypatch):
    """From another machine, only the heartbeat reveals that the holder is gone."""
    monkeypatch.setattr(runs.lock, "STALE_S", 3.0)
    told: list[str] = []
    put_lock(local, heartbeat=time.time() + 2)  # written a moment ago by a clock that is ahead
    runs.wait_for_writer(local, patience(60), told.append)
    assert len(told) == 1
    assert "run 'a': process 1 on elsewhere wrote it 0 s ago: waiting up to" in told[0]
    with runs.hold(local):
        pass
    told.clear()
    runs.wait_for_writer(local, patience(60), told.append)
    assert told == [], "nobody writes it, nothing is said"
    put_lock(local, heartbeat=time.time() + 3)
    runs.wait_for_writer(local, 0.2, told.append)
    with pytest.raises(UserError, match="being written by process 1 on elsewhere"), runs.hold(local):
        pass


def test_a_lock_of_another_machine_is_respected_while_its_heartbeat_is_young(local):
    runs.write_job(local, JOB)
    put_lock(local, heartbeat=time.time() - runs.lock.STALE_S / 2)
    with pytest.raises(UserError, match="being written by process 1 on elsewhere"), runs.hold(local):
        pass
    with pytest.raises(UserError, match="being written"):
        runs.claim(local, JOB) if runs.read_status(local) else runs.claim(local, JOB, restart=True)
    put_lock(local, heartbeat=time.time() - runs.lock.STALE_S - 1)
    with runs.hold(local):
        pass


def test_the_heartbeat_is_renewed_while_a_lock_is_held(local):
    runs.begin(local, JOB, 1)
    with runs.hold(local, heartbeat_s=0.05):
        first = runs.read_status(local).heartbeat
        wait_for("a heartbeat", lambda: runs.read_status(local).heartbeat > first, 20)


def test_losing_the_lock_interrupts_and_fails_the_run_and_leaves_the_winners_state(local):
    with pytest.raises(RunFailed, match="taken over by process 1 on elsewhere"), runs.hold(local, heartbeat_s=0.05):  # noqa: PT012
        runs.begin(local, JOB, 1)
        for _ in range(100):  # a heartbeat that was under way may write over the first one
            put_lock(local)
            time.sleep(patience(0.5))  # interrupted
    assert runs.exists(local, "lock")
    with pytest.raises(RunFailed, match="taken over"):
        runs.end(local, "failed", "late")
    assert runs.read_status(local).state == "running"


@pytest.mark.parametrize("heartbeat", [1e300, float("nan"), float("inf"), -1, 1 << 70, int("9" * 400)])
def test_a_lock_whose_heartbeat_is_of_no_clock_is_free(local, heartbeat):
    runs.begin(local, JOB, 1)
    put_lock(local, heartbeat=heartbeat)
    assert runs.describe(local)["state"] == "stopped"
    assert runs.claim(local, JOB).attempt == 2
    with runs.hold(local):
        runs.begin(local, JOB, 2)


@pytest.mark.parametrize("ahead_s", [61, 1e6])
def test_a_lock_from_the_future_is_free_and_one_of_a_clock_a_little_ahead_is_held(local, ahead_s):
    put_lock(local, heartbeat=time.time() + ahead_s)
    with runs.hold(local):
        pass
    put_lock(local, heartbeat=time.time() + 20)
    with pytest.raises(UserError, match="being written by process 1 on elsewhere"), runs.hold(local):
        pass


@pytest.mark.parametrize("pid", [1 << 60, 1 << 40, -1, 0])
def test_a_lock_of_a_process_that_cannot_be_is_free(local, pid):
    put_lock(local, host=runs.lock.this_host(), pid=pid, born=runs.lock.process_birth(os.getpid()))
    with runs.hold(local):
        pass


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"null", b"5", b"\xff", b"[" * 9999, b'{"token": "x"}'),
        *({"pid": "1"}, {"pid": 1 << 70}, {"born": None}, {"token": 5}, {"host": []}, {"heartbeat": "soon"}),
    ],
)
def test_a_lock_that_slimray_did_not_write_is_told_and_restart_clears_it(local, content):
    runs.begin(local, JOB, 1)
    put_lock(local, **content) if isinstance(content, dict) else Path(local.path, "lock").write_bytes(content)
    assert runs.describe(local)["state"] == "damaged"
    for take in (lambda: runs.claim(local, JOB), runs.hold(local).__enter__):
        with pytest.raises(UserError, match="lock: is not a lock of slimray: delete it if no process writes this run"):
            take()
    assert runs.claim(local, JOB, restart=True).attempt == 1
    assert not runs.exists(local, "lock")


def test_a_lock_that_is_written_over_while_it_is_held_is_written_again(local):
    with runs.hold(local, heartbeat_s=0.05):
        Path(local.path, "lock").write_bytes(b"{}")
        wait_for("the lock", lambda: Path(local.path, "lock").read_bytes() != b"{}", 20)


def test_a_lock_without_a_host_is_told_of_all_the_same(local):
    put_lock(local, host="")
    with pytest.raises(UserError, match="run 'a' is being written by another process: wait for it"), runs.hold(local):
        pass


# ----------------------------------------------------------------------------------------------------- records


def test_no_row_is_lost_on_close_and_parts_are_immutable(run):
    writer = runs.PartWriter(run, "metrics", attempt=1, rank=0, flush_s=0.05)
    for step in range(2500):
        writer.write({"step": step, "train/loss": float(step)})
        if step == 100:
            wait_for("the first part", lambda: runs.read_parts(run, "metrics"), 20)
    first = storage.list_files(run.fs, join(run.path, "metrics"))[0]
    before = storage.read_bytes(run.fs, first.path)
    writer.close()
    writer.close()
    rows = runs.read_parts(run, "metrics")
    assert [row["step"] for row in rows] == list(range(2500))
    assert storage.read_bytes(run.fs, first.path) == before
    with pytest.raises(ValueError, match="is closed"):
        writer.write({})


def test_rows_hold_numpy_scalars_and_not_a_number(local):
    import numpy as np

    writer = runs.PartWriter(local, "metrics", 1, 0)
    writer.write({"step": np.int64(3), "train/loss": float("nan"), "ids": np.arange(3)})
    writer.close()
    (row,) = runs.read_parts(local, "metrics")
    assert row["step"] == 3
    assert row["ids"] == [0, 1, 2]
    assert math.isnan(row["train/loss"])


def test_rows_wait_while_the_storage_is_away(local):
    obstacle = Path(local.path, "metrics")
    obstacle.parent.mkdir(parents=True)
    obstacle.write_bytes(b"a file where the folder should be")
    writer = runs.PartWriter(local, "metrics", 1, 0, flush_s=0.01, patience_s=patience(10))
    writer.write({"step": 1})
    time.sleep(0.2)
    obstacle.unlink()
    writer.write({"step": 2})
    writer.close()
    assert [row["step"] for row in runs.read_parts(local, "metrics")] == [1, 2]


def test_rows_that_cannot_be_written_raise_once(local):
    Path(local.path).mkdir()
    Path(local.path, "metrics").write_bytes(b"a file where the folder should be")
    writer = runs.PartWriter(local, "metrics", 1, 0, flush_s=0.01, patience_s=0.1)
    writer.write({"step": 1})
    wait_for("the writer to give up", lambda: writer._failed, 20)
    with pytest.raises(StorageError, match=r"1 rows of metrics/0001-00000-.* are lost"):
        writer.write({"step": 2})
    writer.write({"step": 3})
    writer.close()


def write_rows(run, folder, attempt, rank, rows):
    time.sleep(0.002)  # writers of a rank are told apart by the millisecond in which they were opened
    writer = runs.PartWriter(run, folder, attempt, rank)
    for row in rows:
        writer.write(row)
    writer.close()


def test_the_newest_attempt_counts_from_the_step_where_it_resumed(run):
    write_rows(run, "metrics", 1, 0, [{"step": s, "phase": "train", "by": 1} for s in (10, 20, 25, 30, 40)])
    write_rows(run, "metrics", 1, 0, [{"step": 20, "phase": "val", "by": 1}])
    write_rows(run, "metrics", 2, 0, [{"step": s, "phase": "train", "by": 2} for s in (30, 45)])
    rows = runs.read_parts(run, "metrics")
    assert [(row["step"], row["by"]) for row in rows if row["phase"] == "train"] == [
        (10, 1),
        (20, 1),
        (25, 1),
        (30, 2),
        (45, 2),
    ]
    assert [row["step"] for row in rows if row["phase"] == "val"] == [20]


def test_a_rank_restarted_within_an_attempt_replaces_its_own_rows_only(local):
    for rank in (0, 1):
        write_rows(local, "samples", 1, rank, [{"step": s, "ids": [rank, s]} for s in (0, 1, 2)])
    write_rows(local, "samples", 1, 0, [{"step": s, "ids": [9, s]} for s in (1, 2)])
    found = sorted((row["rank"], row["step"], row["ids"][0]) for row in runs.read_parts(local, "samples"))
    assert found == [(0, 0, 0), (0, 1, 9), (0, 2, 9), (1, 0, 1), (1, 1, 1), (1, 2, 1)]


def test_fewer_ranks_after_a_resume_leave_no_row_of_a_rank_that_is_gone(local):
    for rank in (0, 1):
        write_rows(local, "samples", 1, rank, [{"step": s, "ids": [rank]} for s in (0, 1, 2)])
    write_rows(local, "samples", 2, 0, [{"step": s, "ids": [0, 1]} for s in (1, 2)])
    found = sorted((row["step"], row["ids"]) for row in runs.read_parts(local, "samples"))
    assert found == [(0, [0]), (0, [1]), (1, [0, 1]), (2, [0, 1])]


def test_a_long_record_is_thinned_evenly_and_a_short_one_is_not(local):
    write_rows(local, "metrics", 1, 0, [{"step": s, "phase": "train"} for s in range(3000)])
    write_rows(local, "metrics", 2, 0, [{"step": s, "phase": "train"} for s in range(2000, 9_998)])
    write_rows(local, "metrics", 2, 0, [{"step": s, "phase": "val"} for s in range(50)])
    whole, rows = (runs.read_parts(local, "metrics", most) for most in (None, 100))
    assert len(whole) == 9_998 + 50
    assert [row for row in rows if row["phase"] == "val"] == [row for row in whole if row["phase"] == "val"]
    steps = [row["step"] for row in rows if row["phase"] == "train"]
    assert steps == sorted(steps)
    assert 50 <= len(steps) <= 103
    assert (steps[0] < 200, steps[-1]) == (True, 9_997)
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 2 * 9_998 / 50
    assert runs.read_parts(local, "metrics", 100_000) == whole


def test_thinning_holds_one_part_at_a_time(local):
    """The rows of 40 parts, all at once, take some 40 MB; of these a thinned reading holds a few."""
    Path(local.path, "metrics").mkdir(parents=True)
    for part in range(40):
        rows = [{"step": 1000 * part + i, "phase": "train", "note": "x" * 900} for i in range(1000)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path(local.path, f"metrics/0001-00000-1700000000000-{part:06d}.jsonl").write_text(text)
    tracemalloc.start()
    assert len(runs.read_parts(local, "metrics", 50)) <= 51
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = sum(path.stat().st_size for path in Path(local.path, "metrics").iterdir())
    assert peak < whole  # what is read ahead is at most 16 of the 40 parts


@pytest.mark.parametrize(
    "line", ['{"step": "3"}', '{"step": NaN}', '{"step": true}', "[]", "5", '{"phase": {}}', "[" * 9999, "\x00", "{"]
)
def test_a_row_that_slimray_does_not_write_is_told_with_its_part(local, line):
    Path(local.path, "metrics").mkdir(parents=True)
    Path(local.path, "metrics/0001-00000-1700000000000-000000.jsonl").write_text(line + "\n")
    with pytest.raises(StorageError, match=r"000000\.jsonl: is not "):
        runs.read_parts(local, "metrics")


def test_a_part_of_another_name_is_told_and_other_files_are_left_alone(local):
    write_rows(local, "metrics", 1, 0, [{"step": 1}])
    Path(local.path, "metrics/notes.txt").write_text("mine")
    assert len(runs.read_parts(local, "metrics")) == runs.count_writers(local, "metrics") == 1
    Path(local.path, "metrics/copy.jsonl").write_text("{}")
    with pytest.raises(StorageError, match=r"copy\.jsonl: is not a part of a run's records"):
        runs.read_parts(local, "metrics")


def test_rows_without_a_step_stay_but_for_repetitions(local):
    write_rows(local, "quarantine", 1, 0, [{"path": "a.mp4", "reason": "cut"}, {"path": "b.mp4", "reason": "cut"}])
    write_rows(local, "quarantine", 2, 3, [{"path": "a.mp4", "reason": "cut"}, {"path": "c.mp4", "reason": "cut"}])
    assert sorted(row["path"] for row in runs.read_parts(local, "quarantine")) == ["a.mp4", "b.mp4", "c.mp4"]


# ------------------------------------------------------------------------------------------------- checkpoints


def newest(run: runs.Run) -> runs.Checkpoint | None:
    """Return the newest readable checkpoint."""
    found = runs.read_newest(run)
    assert found is None or found[1] == runs.read_checkpoint(run, found[0])
    return None if found is None else found[0]


def test_a_checkpoint_reads_back_and_the_newest_is_found(run, tmp_path):
    assert newest(run) is None
    big = tmp_path / "state"
    big.write_bytes(os.urandom(6 << 20))  # more than one part of a multipart upload
    runs.save_checkpoint(run, 5, {"state.safetensors": b"five"}, {"epoch": 0})
    runs.save_checkpoint(run, 10, {"state.safetensors": big, "more.json": b"{}"}, {"epoch": 1, "progress": {"step": 3}})
    found = newest(run)
    assert (found.step, found.meta) == (10, {"epoch": 1, "progress": {"step": 3}})
    assert runs.read_checkpoint(run, found) == {"state.safetensors": big.read_bytes(), "more.json": b"{}"}
    assert runs.read_checkpoint(run, runs.checkpoint_at(run, 5)) == {"state.safetensors": b"five"}
    with pytest.raises(RunFailed, match="no complete checkpoint of step 7"):
        runs.checkpoint_at(run, 7)


@pytest.mark.parametrize("damage", [b"shorter", b"other bytes!", None])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(run, damage, caplog):
    runs.save_checkpoint(run, 1, {"state": b"whole bytes!"}, {})
    runs.save_checkpoint(run, 2, {"state": b"whole bytes!"}, {})
    path = join(run.path, "checkpoints/step_000000002/state")
    storage.delete(run.fs, path) if damage is None else storage.write_atomic(run.fs, path, damage)
    assert newest(run).step == 1
    assert "checkpoint of step 2 is damaged and was skipped" in caplog.text


def test_a_checkpoint_of_the_same_step_replaces_the_old_one_only_when_it_is_whole(run):
    runs.save_checkpoint(run, 3, {"state": b"old"}, {"metrics": {}})
    with pytest.raises(FileNotFoundError):
        runs.save_checkpoint(run, 3, {"state": b"new", "more": Path("/nonexistent/source")}, {})
    assert runs.read_checkpoint(run, newest(run)) == {"state": b"old"}
    runs.save_checkpoint(run, 3, {"state": b"new"}, {"metrics": {"val/top1": 1.0}})
    found = newest(run)
    assert runs.read_checkpoint(run, found) == {"state": b"new"}
    assert found.meta == {"metrics": {"val/top1": 1.0}}


def test_the_best_and_the_last_checkpoints_are_kept(run):
    for step, top1 in ((1, 10.0), (2, 90.0), (3, 90.0), (4, 30.0), (5, float("nan")), (6, None)):
        metrics = {} if top1 is None else {"val/top1": top1}
        runs.save_checkpoint(run, step, {"state": b"x"}, {"metrics": metrics})
    runs.keep(run, metric="val/top1", last=2)
    assert [one.step for one in runs.list_checkpoints(run)] == [2, 5, 6]
    runs.keep(run, last=0)
    assert [one.step for one in runs.list_checkpoints(run)] == [6]


def test_a_checkpoint_whose_writer_was_killed_is_never_taken_for_whole(run, tmp_path):
    runs.save_checkpoint(run, 1, {"a": b"x", "b": b"x"}, {})
    pipe = tmp_path / "pipe"  # the writer blocks forever at its second file
    os.mkfifo(pipe)
    code = "run = runs.run_at(sys.argv[1])\nruns.save_checkpoint(run, 2, {'a': b'x' * 100, 'b': Path(sys.argv[2])}, {})"
    writer = start(code, run.uri, str(pipe))
    wait_for("the first file", lambda: runs.exists(run, "checkpoints/step_000000002/a"), 20)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert newest(run).step == 1
    runs.begin(run, JOB, 1)  # sweeps
    assert storage.list_folders(run.fs, join(run.path, "checkpoints")) == ["step_000000001"]


def test_a_broken_marker_is_no_checkpoint(local, caplog):
    runs.save_checkpoint(local, 1, {"a": b"x"}, {})
    runs.save_checkpoint(local, 2, {"a": b"x"}, {})
    Path(local.path, "checkpoints/step_000000002/complete.json").write_bytes(b'{"step": 2, ')
    assert newest(local).step == 1
    assert "its marker cannot be read" in caplog.text


@pytest.mark.parametrize("file", ["../../../victim", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", 5, None])
@pytest.mark.parametrize("key", ["name", "file"])
def test_a_planted_marker_neither_reads_nor_deletes_anything_outside(local, tmp_path, file, key, caplog):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_bytes(b"precious")
    runs.save_checkpoint(local, 1, {"state": b"x"}, {})
    marker = Path(local.path, "checkpoints/step_000000002/complete.json")
    marker.parent.mkdir()
    entry = {"file": file if key == "file" else "state", "bytes": 8, "sha256": "x"}
    name = str(file) if key == "name" else "state"
    marker.write_text(json.dumps({"step": 2, "meta": {}, "files": {name: entry}}))
    if key == "name" and file in (5, None):
        return  # numbers are plain names
    assert newest(local).step == 1
    assert "the checkpoint was skipped" in caplog.text
    runs.save_checkpoint(local, 2, {"state": b"y"}, {})
    assert newest(local).step == 2
    marker.write_text(json.dumps({"step": 2, "meta": {}, "files": {name: entry}}))
    assert runs.sweep_orphans(local) == ["step_000000002"]
    runs.keep(local, last=1)
    runs.drop_after(local, 0)
    assert (victim / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "changes", [{"step": 3}, {"step": "2"}, {"meta": []}, {"files": []}, {"files": {"state": 5}}, {"files": None}]
)
def test_a_marker_of_other_types_is_no_checkpoint(local, changes):
    runs.save_checkpoint(local, 2, {"state": b"x"}, {"metrics": {}})
    marker = Path(local.path, "checkpoints/step_000000002/complete.json")
    marker.write_text(json.dumps(json.loads(marker.read_bytes()) | changes))
    assert newest(local) is None


def test_what_a_writer_said_is_no_score_unless_it_is_a_number(local):
    for step, meta in enumerate([{"metrics": {"m": 5}}, {"metrics": {"m": "9"}}, {"metrics": [9]}, {"metrics": None}]):
        runs.save_checkpoint(local, step, {"a": b"x"}, meta)
    runs.keep(local, metric="m", last=1)
    assert [one.step for one in runs.list_checkpoints(local)] == [0, 3]


def test_a_checkpoint_is_not_swept_because_the_storage_fails(local):
    runs.save_checkpoint(local, 1, {"a": b"x"}, {})
    marker = Path(local.path, "checkpoints/step_000000001/complete.json")
    content = marker.read_bytes()
    marker.unlink()
    marker.mkdir()  # cannot be read, as under a storage that fails
    with pytest.raises(StorageError):
        runs.sweep_orphans(local)
    marker.rmdir()
    marker.write_bytes(content)
    assert newest(local).step == 1


@pytest.mark.parametrize("name", ["../b/job.yaml", "model/../../b", "/etc/passwd", "model//x", "./job.yaml", "a\\b"])
def test_names_that_lead_out_of_a_run_are_not_read(local, name):
    for read in (runs.read_file, runs.list_names, runs.exists):
        with pytest.raises(StorageError, match="cannot be the name of a file in it"):
            read(local, name)


def test_saving_while_another_thread_keeps_is_safe(local):
    def save():
        for step in range(20):
            runs.save_checkpoint(local, step, {"a": b"x"}, {})

    thread = threading.Thread(target=save)
    thread.start()
    while thread.is_alive():
        runs.keep(local, last=2)
    assert newest(local).step == 19
