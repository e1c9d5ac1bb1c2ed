"""Tracking: the run's rows always, W&B and TensorBoard on request, no secrets, and paths only on request."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.waits import patience, wait_for

from slimray import runs
from slimray.runs.tracking import Tracker, TrackingSpec, redact, run_id


class Rows:
    """Keeps rows, as the run folder's writer would."""

    def __init__(self):
        self.kept: list[dict] = []

    def write(self, row):
        self.kept.append(dict(row))


JOB = {
    "kind": "train",
    "name": "one",
    "data": {"root": "/home/me/clips"},
    "api_key": "abc123secret",
    "optim": {"lr": 0.1},
}


def tracker(spec: TrackingSpec, folder: Path) -> tuple[Tracker, Rows]:
    rows = Rows()
    return Tracker(spec, rows, "one", str(folder), JOB, folder), rows


def test_rows_go_to_the_run_folder_whatever_else_is_asked(tmp_path):
    sink, rows = tracker(TrackingSpec(), tmp_path)
    sink.log({"step": 1, "train/loss": 2.0})
    sink.close()
    assert rows.kept == [{"step": 1, "train/loss": 2.0}]
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_numbers(tmp_path):
    sink, _ = tracker(TrackingSpec(tensorboard=True), tmp_path)
    for step in (1, 2):
        sink.log({"step": step, "train/loss": 2.0 / step, "phase": "train"})
    sink.close()
    events = list(tmp_path.rglob("events.out.tfevents.*"))
    assert len(events) == 1
    assert b"train/loss" in events[0].read_bytes()


OFFLINE = """
import sys
from pathlib import Path
from slimray import runs
from slimray.runs.tracking import Tracker, TrackingSpec
import json
class Rows:
    def write(self, row): pass
job, folder, media = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "media"
sink = Tracker(TrackingSpec(wandb=True, mode="offline", media=media), Rows(), "one", str(folder), job, folder)
sink.log({"step": 1, "train/loss": 2.0})
sink.log({"step": 2, "train/loss": 1.0})
sink.close()
"""


@pytest.mark.parametrize("media", ["none", "media"])
def test_wandb_works_offline_and_hears_neither_secrets_nor_paths_unless_asked(tmp_path, media):
    command = [sys.executable, "-c", OFFLINE, json.dumps(JOB), str(tmp_path), media]
    env = os.environ | {"WANDB_SILENT": "true", "HOME": str(tmp_path / "home")}
    subprocess.run(command, check=True, timeout=patience(120), env=env, capture_output=True)
    written = list(tmp_path.rglob("run-*.wandb"))
    assert len(written) == 1
    assert run_id("one", str(tmp_path)) in written[0].name
    content = written[0].read_bytes()
    assert b"abc123secret" not in content
    assert (b"/home/me/clips" in content) == (media == "media")
    assert b"train/loss" in content


def test_an_id_is_the_same_for_the_same_place_only():
    assert run_id("one", "/a/one") == run_id("one", "/a/one")
    assert run_id("one", "/a/one") != run_id("one", "/b/one")


class Service:
    """Stands in for the W&B package: records the ids of runs, and refuses those that were deleted."""

    def __init__(self):
        self.ids: list[str] = []
        self.deleted: set[str] = set()

    def init(self, id, **_):
        self.ids.append(id)
        if id in self.deleted:
            raise RuntimeError(f"failed to upsert bucket: run {id} was previously created and deleted; try a new name")
        return self

    def Settings(self, **_):
        return None

    def define_metric(self, *_, **__): ...

    def finish(self): ...


def begin_and_track(run: runs.Run, attempt: int) -> None:
    runs.begin(run, JOB, attempt)
    Tracker(TrackingSpec(wandb=True, mode="offline"), Rows(), run.name, run.uri, JOB).close()
    runs.end(run, "failed")


@pytest.fixture
def service(monkeypatch):
    found = Service()
    monkeypatch.setitem(sys.modules, "wandb", found)
    return found


def test_a_resumed_run_keeps_its_id_and_a_cleared_one_gets_another(tmp_path, service):
    run = runs.open_run(str(tmp_path), "one")
    begin_and_track(run, 1)
    begin_and_track(run, 2)
    runs.claim(run, JOB, restart=True)
    begin_and_track(run, 1)
    assert service.ids[0] == service.ids[1] != service.ids[2]
    assert all(one.startswith("one-") for one in service.ids)


def test_a_run_that_was_deleted_online_begins_anew_and_stays_there(tmp_path, service, caplog):
    run = runs.open_run(str(tmp_path), "one")
    begin_and_track(run, 1)
    service.deleted = {service.ids[0]}
    begin_and_track(run, 2)
    begin_and_track(run, 3)
    assert service.ids[1] == service.ids[0]
    assert service.ids[2] not in service.deleted
    assert service.ids[3] == service.ids[2]
    assert "was deleted, starting a new one" in caplog.text


def test_a_run_of_before_ids_were_kept_resumes_under_its_old_one(tmp_path, service):
    run = runs.open_run(str(tmp_path), "one")
    runs.begin(run, JOB, 1)
    begin_and_track(run, 2)
    assert service.ids == [run_id("one", run.uri)]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"WANDB_API_KEY": "x", "lr": 0.1}, {"WANDB_API_KEY": "***", "lr": 0.1}),
        ("https://me:pw@host/x", "https://***@host/x"),
        ("s3://b/x?X-Amz-Signature=abc&v=1", "s3://b/x?X-Amz-Signature=***&v=1"),
        ([{"deep": {"password": "p"}}], [{"deep": {"password": "***"}}]),
    ],
)
def test_secrets_are_redacted_at_any_depth(value, shown):
    assert redact(value) == shown


def test_event_files_reach_a_run_folder_in_a_bucket_while_it_runs_and_at_its_end(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    uri = bucket("tracked").replace("tracked", "tracked/one", 1)
    run = runs.run_at(uri)

    def copied() -> bytes:
        (name,) = runs.list_names(run, "tensorboard")
        return runs.read_file(run, f"tensorboard/{name}")

    sink = Tracker(TrackingSpec(tensorboard=True), Rows(), "one", uri, JOB)
    sink.log({"step": 1, "train/loss": 2.0})
    wait_for("the writer's own process", lambda: sink.copy() is None and b"train/loss" in copied())
    first = copied()
    sink.log({"step": 2, "val/top1": 2.0})
    sink.close()
    assert copied().startswith(first)
    assert b"val/top1" in copied()
