"""Injected faults for a training on a cluster of several nodes: which, when, and what must hold afterwards.

A seed determines the events. Storage is a real S3 server behind a proxy that fails on request. Used by the tests (one
seed) and by `tests/benchmarks/chaos.py` (thirty).
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.numpy
from ray.cluster_utils import Cluster
from tests.faulty_s3 import FAULTS, FaultyS3
from tests.verbs.conftest import DATA, Shell, session_of
from tests.waits import patience, wait_for

from slimray import runs
from slimray.spec import UserError
from slimray.storage import StorageError

EPOCHS, STEPS = 5, 30  # of 6 steps each
JOB = """
kind: train
name: {name}
data: {{run: data, size: 32, record_samples: true}}
model: {{name: tsm_resnet18, width: 0.125, num_segments: 4}}
batch: {{total: 8, per_worker: 4}}
optim: {{lr: 0.02, reference_batch: 8, epochs: 5, schedule: cosine}}
scale: {{workers: {workers}, retries: 8, decode_slots: 1, resize_s: 1000, data_timeout_s: 300}}
checkpoint: {{every_steps: 3}}
log_every: 1
"""
EVENTS = ("kill a worker", "kill the driver", "remove a node", "drain a node", "storage fails")
CLOUD_EVENTS = ("bucket down for 60 s", "SIGTERM of the driver", "notice of an hour", "a node joins sick")
OUTAGE_S = 60.0
SICK = "sick"  # the access key of a node that may not read the bucket


def drain(cluster: Cluster, node_id: str, seconds: int) -> None:
    """Announce that a node will be taken, as a cloud does for a spot machine."""
    command = [
        str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.address, "--node-id", node_id,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
        "--deadline-remaining-seconds", str(seconds),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass
class Site:
    """A head that holds no work, two nodes that do, a storage with a dataset, and a folder for job files."""

    cluster: Cluster
    faults: FaultyS3
    shell: Shell
    nodes: list[Any]
    gone: list[Any] = field(default_factory=list)  # nodes that are drained or sick: `tidy` removes them

    @classmethod
    def build(cls, cluster: Cluster, faults: FaultyS3, folder: Path) -> "Site":
        shell = Shell(folder)
        site = cls(cluster, faults, shell, [cluster.add_node(num_cpus=3) for _ in range(2)])
        shell.ok("run", shell.write("data.yaml", DATA), "--storage", faults.uri("runs"))
        return site

    def tidy(self) -> None:
        """Remove the nodes that a training has left."""
        for node in self.gone:
            with contextlib.suppress(Exception):  # a node that drained may have ended by itself
                self.cluster.remove_node(node)
        self.gone.clear()

    def run(self, name: str) -> runs.Run:
        return runs.open_run(self.faults.uri("runs"), name)

    def step_of(self, name: str) -> int:
        """The newest step of which there is a checkpoint."""
        newest = runs.list_checkpoints(self.run(name))
        return newest[-1].step if newest else 0

    def start(self, name: str, workers: str) -> subprocess.Popen:
        file = self.shell.write(f"{name}.yaml", JOB.format(name=name, workers=workers))
        return self.shell.start("run", file, "--storage", self.faults.uri("runs"))


@dataclass(frozen=True)
class Outcome:
    """What a training left: its final training loss, a digest of its weights, which samples each epoch saw."""

    loss: float
    weights: dict[str, bytes]
    seen: dict[int, list[int]]
    goodput: dict[str, Any]


def outcome(site: Site, name: str) -> Outcome:
    """Read it, and check that no checkpoint is half there and no process is left."""
    run = site.run(name)
    for checkpoint in runs.list_checkpoints(run):
        runs.read_checkpoint(run, checkpoint)  # raises if its bytes are not what the marker says
    wait_for("the workers to be gone", lambda: not _leftovers(), 60)
    rows = [row for row in runs.read_parts(run, "metrics") if row["phase"] == "train"]
    seen: dict[int, list[int]] = {}
    for row in runs.read_parts(run, "samples"):
        seen.setdefault(row["epoch"], []).extend(row["ids"])
    tensors = safetensors.numpy.load(runs.read_file(run, "model/weights.safetensors"))
    card = runs.read_card(run) or {}
    return Outcome(
        sum(row["train/loss"] for row in rows[-6:]) / 6,
        {key: value.tobytes() for key, value in tensors.items()},
        {epoch: sorted(ids) for epoch, ids in seen.items()},
        card.get("goodput", {}),
    )


def _leftovers() -> list[int]:
    found = []
    for pid in session_of(os.getpid()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if "RayTrainWorker" in words or "TrainController" in words or "_Feeder" in words:
            found.append(pid)
    return found


def disturbed(site: Site, name: str, seed: int, kinds: tuple[str, ...] = EVENTS) -> tuple[list[str], str]:
    """Run a training under the events of `seed`; returns those and the number of workers it was told."""
    draw = random.Random(seed)
    workers = draw.choice(["2", "[1, 2]"])
    events = draw.sample(kinds, draw.choice([1, 2]))
    times = sorted(draw.sample(range(3, STEPS - 6, 3), len(events)))
    if events[0] == "bucket down for 60 s" and draw.random() < 0.5:
        times[0] = 0  # while it starts
    child = site.start(name, workers)
    for event, step in zip(events, times, strict=True):
        if step:
            wait_for(f"step {step} of {name}", partial(_reached, site, name, step, child), 240)
        if child.poll() is not None:
            break
        child = _happen(event, site, name, workers, child, draw)
    try:
        out, err = child.communicate(timeout=patience(400))
    finally:
        site.faults.heal()
    assert child.returncode == 0, f"seed {seed} ({', '.join(events)}): {out[-1500:]}{err[-1500:]}"
    return events, workers


def _reached(site: Site, name: str, step: int, child: subprocess.Popen) -> bool:
    with contextlib.suppress(UserError, StorageError):  # the storage may be failing for us, too
        return child.poll() is not None or site.step_of(name) >= step
    return False


def _happen(
    event: str, site: Site, name: str, workers: str, child: subprocess.Popen, draw: random.Random
) -> subprocess.Popen:
    if event == "kill a worker":
        found = [pid for pid in session_of(os.getpid()) if _is(pid, "ray::RayTrainWorker")]
        if found:
            os.kill(draw.choice(found), signal.SIGKILL)
    elif event == "kill the driver":
        child.kill()
        child.wait(timeout=patience(30))
        return site.start(name, workers)
    elif event in ("remove a node", "drain a node"):
        node = site.nodes.pop(draw.randrange(len(site.nodes)))
        if event == "drain a node":
            drain(site.cluster, node.node_id, 6)
            time.sleep(7)
        site.cluster.remove_node(node)
        site.nodes.append(site.cluster.add_node(num_cpus=3))
    elif event == "bucket down for 60 s":
        site.faults.fail(draw.choice(["throttle", "refuse"]))
        threading.Timer(OUTAGE_S, site.faults.heal).start()
    elif event == "SIGTERM of the driver":
        child.terminate()
        child.communicate(timeout=patience(60))
        return site.start(name, workers)
    elif event == "notice of an hour":
        node = site.nodes.pop(draw.randrange(len(site.nodes)))
        drain(site.cluster, node.node_id, 3600)
        site.nodes.append(site.cluster.add_node(num_cpus=3))
        site.gone.append(node)
    elif event == "a node joins sick":  # in place of one that is lost, and before a good one
        site.cluster.remove_node(site.nodes.pop(draw.randrange(len(site.nodes))))
        site.gone.append(site.cluster.add_node(num_cpus=3, env_vars={"AWS_ACCESS_KEY_ID": SICK}))
        site.nodes.append(site.cluster.add_node(num_cpus=3))
    else:
        site.faults.kinds, site.faults.rate = list(FAULTS), 0.3
    return child


def _is(pid: int, words: str) -> bool:
    try:
        return words in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def compare(calm: Outcome, name: str, found: Outcome, workers: str) -> str:
    """AssertionError unless `found` is what an undisturbed run gives; returns how alike they are."""
    assert found.seen == calm.seen, f"{name}: {found.seen}"
    if workers == "2" or found.weights == calm.weights:
        assert found.weights == calm.weights, f"{name}: the world size did not change, the weights did"
        return "same bits"
    assert abs(found.loss - calm.loss) < 0.05, f"{name}: loss {found.loss} in place of {calm.loss}"
    return f"loss differs by {found.loss - calm.loss:+.4f}"
