"""A cluster of several nodes on this machine: announced preemptions, joining nodes, and workers that hang."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from tests.verbs.conftest import DATA, Shell, find_process, seen, session_of
from tests.waits import patience, wait_for

from slimray import runs

pytestmark = [pytest.mark.ray, pytest.mark.benchmark, pytest.mark.timeout(500)]

ELASTIC = """
kind: train
name: {name}
data: {{run: data, size: 32, record_samples: true}}
model: {{name: tsm_resnet18, width: 0.125, num_segments: 4}}
batch: {{total: 8, per_worker: 4}}
optim: {{lr: 0.02, reference_batch: 8, epochs: {epochs}, schedule: cosine}}
scale: {{workers: {workers}, retries: {retries}, decode_slots: 1, resize_s: 5, data_timeout_s: {patience}}}
checkpoint: {{every_steps: {every}}}
log_every: 1
"""


@pytest.fixture(scope="module")
def cluster():
    """Start a cluster whose head runs drivers, but no work."""
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster.address)
        patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
        yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def site(cluster, tmp_path_factory) -> Shell:
    """Prepare a dataset, and start one node that can work."""
    shell = Shell(tmp_path_factory.mktemp("site"))
    cluster.add_node(num_cpus=3)
    shell.ok("run", shell.write("data.yaml", DATA))
    return shell


def drain(cluster: Cluster, node_id: str, seconds: int) -> None:
    """Announce the preemption of a node, as a cloud does for a spot machine."""
    command = [
        str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.address, "--node-id", node_id,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
        "--deadline-remaining-seconds", str(seconds),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 0, done.stdout + done.stderr


def steps_of(shell: Shell, name: str) -> int:
    """Return the newest step on storage."""
    run = runs.open_run(str(shell.storage), name)
    newest = runs.list_checkpoints(run)
    return newest[-1].step if newest else 0


def world_of(shell: Shell, name: str) -> int:
    """Return the number of workers that wrote the newest checkpoint."""
    newest = runs.list_checkpoints(runs.open_run(str(shell.storage), name))
    return newest[-1].meta["world"] if newest else 0


def written_steps(shell: Shell, name: str) -> list[set[int]]:
    """Return the steps that rank 0 recorded, repeated ones included, for each start of the workers."""
    starts: dict[str, set[int]] = {}
    for part in sorted((shell.storage / name / "metrics").iterdir()):
        rows = [json.loads(line) for line in part.read_text().splitlines()]
        steps = {row["step"] for row in rows if row["phase"] == "train"}
        starts.setdefault(part.name.split("-")[2], set()).update(steps)
    return list(starts.values())


def test_a_node_that_is_announced_to_go_costs_no_step_and_one_that_comes_is_used(cluster, site):
    spot = cluster.add_node(num_cpus=3)
    epochs = 50
    text = ELASTIC.format(name="spot", workers="[1, 2]", epochs=epochs, retries=0, every=20, patience=patience(120))
    file = site.write("spot.yaml", text.replace("retries:", "cpus_per_worker: 2, retries:"))  # one worker per node
    child = site.start("run", file)
    wait_for("two workers", lambda: world_of(site, "spot") == 2, 200)
    drain(cluster, spot.node_id, 8)
    time.sleep(9)
    cluster.remove_node(spot)
    wait_for("one worker", lambda: world_of(site, "spot") == 1, 200)
    added = cluster.add_node(num_cpus=3)
    wait_for("two workers again", lambda: world_of(site, "spot") == 2, 200)
    out, err = child.communicate(timeout=patience(400))
    cluster.remove_node(added)
    assert child.returncode == 0, out + err
    assert "node preemption announced" in out + err
    assert seen(site, "spot") == {epoch: list(range(48)) for epoch in range(epochs)}
    card = runs.read_card(runs.open_run(str(site.storage), "spot"))
    assert card is not None
    assert card["steps"] == 6 * epochs
    assert card["goodput"]["restarts"] == 2
    assert card["goodput"]["repeated_steps"] <= 20
    first, second, third = written_steps(site, "spot")
    assert not first & second  # with a notice, no step is done twice
    assert len(second & third) <= 20  # for the upscale, at most those since a checkpoint
    assert first | second | third == set(range(1, 6 * epochs + 1))
    assert 0 < card["goodput"]["goodput"] < 1


def test_a_notice_of_an_hour_costs_seconds_and_no_retry(cluster, site):
    """The node stays for the hour; the ranks continue at once on the other nodes, without idling until then."""
    spot = cluster.add_node(num_cpus=3)
    text = ELASTIC.format(name="hour", workers="[1, 2]", epochs=20, retries=0, every=20, patience=patience(120))
    file = site.write("hour.yaml", text.replace("retries:", "cpus_per_worker: 2, retries:"))
    child = site.start("run", file)
    wait_for("two workers", lambda: world_of(site, "hour") == 2, 200)
    drain(cluster, spot.node_id, 3600)
    out, err = child.communicate(timeout=patience(400))
    assert child.returncode == 0, out + err
    assert "node preemption announced (ranks" in out + err
    assert f"node {spot.node_id[:8]} is about to be preempted: starting again without it" in out + err
    assert seen(site, "hour") == {epoch: list(range(48)) for epoch in range(20)}
    first, second = written_steps(site, "hour")
    assert not first & second
    cluster.remove_node(spot)


def test_a_worker_that_hangs_is_found_and_the_run_goes_on(cluster, site):
    text = ELASTIC.format(name="hang", workers=1, epochs=6, retries=1, every=2, patience=patience(8))
    file = site.write("hang.yaml", text.replace("workers: 1", "workers: 2, cpus_per_worker: 0.5"))
    child = site.start("run", file)
    wait_for("a checkpoint", lambda: steps_of(site, "hang") >= 4, 200)
    stopped = find_process(os.getpid(), "ray::RayTrainWorker")
    os.kill(stopped, signal.SIGSTOP)
    out, err = child.communicate(timeout=patience(400))
    assert child.returncode == 0, out + err
    logs = sorted((site.storage / "hang/logs").glob("*-stacks.txt"))
    assert len(logs) == 1
    assert "waiting for the other ranks" in logs[0].read_text().splitlines()[0]
    assert "Thread 0x" in logs[0].read_text()
    assert seen(site, "hang") == {epoch: list(range(48)) for epoch in range(6)}
    wait_for("the hung process to end", lambda: stopped not in session_of(os.getpid()), 60)


def test_the_hours_of_a_run_are_a_limit_and_it_resumes_with_more(cluster, site):
    text = ELASTIC.format(name="hours", workers=1, epochs=100, retries=0, every=1000, patience=patience(60))
    file = site.write("hours.yaml", text + "limits: {hours: 0.001}\n")
    done = site.run("run", file)
    assert done.returncode == 1
    assert "limits.hours: 0.001 hours are used up" in done.stderr
    reached = steps_of(site, "hours")
    assert 0 < reached < 600
    done = site.run("run", file, "--set", "limits.hours=0.002")
    assert done.returncode in (0, 1)
    assert steps_of(site, "hours") > reached
