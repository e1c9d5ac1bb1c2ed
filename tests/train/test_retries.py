"""Restarts of workers, with real processes: the budget of retries, sick nodes, waiting for nodes."""

import dataclasses
import os
import signal
import threading
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from tests.faulty_s3 import faulty_s3
from tests.waits import patience, wait_for

from slimray import runs
from slimray.data.pipeline import FeedConfig
from slimray.spec import RunFailed
from slimray.train import workers
from slimray.train.spec import ScaleSpec

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("no_ray")]


@dataclasses.dataclass(frozen=True)
class Config:
    """Config of the workers in these tests."""

    folder: str
    progress_actor: object
    fault: str
    run_uri: str = ""


def work(config: Config) -> dict[str, int]:
    """Report a checkpoint to the driver, then die or raise, until this was started five times."""
    starts = Path(config.folder, "starts")
    starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
    count = len(starts.read_text())
    if config.fault != "killed before progress":
        ray.get(config.progress_actor.saved.remote(count))  # type: ignore[attr-defined]
    if count < 5:
        if config.fault == "raises":
            raise ValueError("a mistake in the model")
        os.kill(os.getpid(), signal.SIGKILL)
    return {"starts": count}


@pytest.fixture
def local(monkeypatch):
    """Start a local cluster of two CPUs."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    workers.connect(2)
    yield
    ray.shutdown()


def test_a_lost_machine_after_a_checkpoint_gives_the_retries_back_and_a_users_error_does_not(
    local, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLIMRAY_PROGRESS", str(tmp_path / "progress"))

    def ends(fault: str) -> tuple[object, int]:
        folder = tmp_path / fault
        folder.mkdir()
        config = Config(str(folder), workers.make_progress_actor(), fault)
        try:
            found = workers.launch(work, config, ScaleSpec(workers=1, retries=1), "retries", config.progress_actor)
        except RunFailed as error:
            found = error
        return found, len((folder / "starts").read_text())

    assert ends("killed") == ({"starts": 5}, 5)  # four failures with one retry
    assert (tmp_path / "progress").read_text().strip().isdigit(), "the script that starts the driver hears of it"
    error, starts = ends("killed before progress")
    assert (type(error), getattr(error, "code", None), starts) == (RunFailed, 3, 2)
    error, starts = ends("raises")
    assert (str(error), getattr(error, "code", None), starts) == ("a mistake in the model", 3, 2)


def node_of(config: Config) -> str:
    """Return the node on which the worker runs."""
    return ray.get_runtime_context().get_node_id()


def lacks_a_file(config: Config) -> None:
    """Fail on a missing file once another node is known to be sick: first at once, then with a stream of data."""
    actor, notes = config.progress_actor, Path(config.folder, "notes")
    wait_for("the sick node to be found", lambda: workers.progress_state(actor)["sick"])
    before = notes.read_text() if notes.exists() else ""
    notes.write_text(before + "start\n")
    if before:
        with workers.open_stream(FeedConfig((), {}, 0, 1, 1, 1), "", actor) as stream:
            notes.write_text(before + f"decodes without {','.join(stream.config.left_out)}\n")
    raise RunFailed("a file of the index is missing")


@pytest.fixture
def site(monkeypatch, tmp_path):
    """Start a cluster whose head has no work, and a storage that refuses the credentials of a sick node."""
    for name, value in {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(workers, "WAITING_S", 1.0)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        with faulty_s3() as faults:
            faults.refused = "sick"
            run = runs.open_run(faults.uri("runs"), tmp_path.name)  # the server still holds objects of other tests
            runs.begin(run, {"kind": "train", "name": run.name}, 1)
            yield cluster, run
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_node_that_joins_sick_and_holds_no_rank_decodes_nothing_after_the_first_failure(site, tmp_path):
    """Decoding runs on any node: a failure is retried without the sick node, and only then it is the user's."""
    cluster, run = site
    cluster.add_node(num_cpus=1)
    workers.connect(1)
    actor = workers.make_progress_actor()
    config, found = Config(str(tmp_path), actor, "", run.uri), []
    scale = ScaleSpec(workers=1, retries=2, start_timeout_s=patience(20))

    def launch() -> None:
        try:
            workers.launch(lacks_a_file, config, scale, "lacks", actor, {})
        except RunFailed as error:
            found.append(str(error))

    launching = threading.Thread(target=launch, daemon=True)
    launching.start()
    wait_for("the rank to be there", lambda: workers.progress_state(actor)["nodes"])
    sick = cluster.add_node(num_cpus=1, env_vars={"AWS_ACCESS_KEY_ID": "sick"})
    launching.join(patience(150))
    assert found == ["a file of the index is missing"]
    assert (tmp_path / "notes").read_text().splitlines() == ["start", f"decodes without {sick.node_id}"]


def test_a_node_that_joins_sick_gets_no_rank_and_what_is_waited_for_is_told(site, tmp_path):
    """The sick node may not read the storage, as its role is missing. A node that joins later does the work."""
    cluster, run = site
    sick = cluster.add_node(num_cpus=1, env_vars={"AWS_ACCESS_KEY_ID": "sick"})
    workers.connect(1)
    actor = workers.make_progress_actor()
    config, found = Config(str(tmp_path), actor, "", run.uri), []
    scale = ScaleSpec(workers=1, retries=0, start_timeout_s=patience(20))
    launching = threading.Thread(
        target=lambda: found.append(workers.launch(node_of, config, scale, "sick", actor)), daemon=True
    )
    launching.start()
    wait_for("the sick node to be found", lambda: workers.progress_state(actor)["sick"])
    wait_for("the wait to be told", lambda: workers.progress_state(actor).get("waits_for"))
    told = workers.progress_state(actor)["waits_for"]
    assert "there is room for 0 of 1 workers (1 CPUs each) on 0 nodes, 1 left out; the run ends in" in told
    good = cluster.add_node(num_cpus=1)
    launching.join(patience(120))
    assert found == [good.node_id]
    assert list(workers.progress_state(actor)["sick"]) == [sick.node_id]
    (reason,) = workers.progress_state(actor)["sick"].values()
    assert "access denied, the credentials found were refused" in reason
