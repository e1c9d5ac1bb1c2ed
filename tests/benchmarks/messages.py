"""Messages and bytes that a training step sends, by sender and receiver, on clusters of 2 and 8 raylets.

A real training (`slimray run`, one rank per raylet, generated pictures, a small ResNet) runs on each cluster twice,
with 8 and with 32 samples per rank, so that its steps take different times. The kernel counts what every TCP socket of
this machine has sent (`ss`, of iproute2). Two counts 40 s apart, and the metric rows between them, give messages (TCP
segments with data), bytes and processor time a second: for gradients (between ranks), for data (between feeders,
decoders, raylets and ranks) and for control (everything with the head process, the driver, the progress actor or an
actor of Ray Train). Whatever does not grow with the steps a second is polling and heartbeats. Unix sockets, between a
raylet and its own workers, are not counted. The variable NODES sets the clusters ("2 8"). With SLIMRAY_AGAINST, the
folder of another checkout, the same trainings run there too, with the libraries of this environment.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster
from tests.benchmarks.pairs import environment_of

from slimray import runs

ROOT = Path(__file__).resolve().parents[2]
WARM_STEPS, WINDOW_S, PER_WORKER = 20, 40.0, (8, 32)
DATA = "{kind: prepare, name: pictures, data: {card: image_shapes, clips: 1920}}\n"
TRAIN = """
kind: train
name: NAME
data: {run: pictures, size: 32, resize: 32}
model: {name: resnet18, width: 0.0625}
batch: {total: TOTAL, per_worker: EACH}
optim: {lr: 0.01, reference_batch: 8, epochs: 10000}
scale: {workers: WORKERS}
log_every: 5
"""
ROLES = {  # words of a command line -> what the process is; the first that fits
    "_Feeder": "feeder", "ProgressActor": "progress actor", "RayTrainWorker": "rank",
    "SynchronizationActor": "barrier", "PreemptionWatcher": "watcher", "TrainController": "driver",
    "AutoscalingCoordinator": "coordinator", "_StatsActor": "statistics", "ray::": "decoder", "gcs_server": "head",
    "raylet/raylet": "raylet", "slimray.cli": "driver", "dashboard": "agent", "runtime_env": "agent",
}  # fmt: skip
SOCKET = re.compile(r'"[^"]*",pid=(\d+)')
SENT = re.compile(r"\bbytes_sent:(\d+)|\bdata_segs_out:(\d+)")
PURPOSES, LISTED = ("gradients", "data", "control"), 5
DATA_ROLES = {"decoder", "feeder", "raylet", "statistics", "coordinator"}
Pair = tuple[str, str]


@dataclass(frozen=True)
class Counts:
    """What was counted until one moment: by socket (sender, receiver) and by process."""

    at: float
    sent: dict[tuple[str, str], tuple[Pair, int, int]]  # addresses -> roles, messages, bytes
    processor_s: dict[int, tuple[str, float]]


def _role(pid: int) -> str:
    try:
        words = " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return "other"
    return next((role for word, role in ROLES.items() if word in words), "other")


def _purpose(pair: Pair) -> str:
    """Return what two processes talk about; "" where neither is of the training."""
    if set(pair) == {"rank"}:
        return "gradients"
    if set(pair) <= DATA_ROLES or set(pair) in ({"rank", "feeder"}, {"rank", "decoder"}, {"rank", "raylet"}):
        return "data"
    return "" if "other" in pair else "control"


def count() -> Counts:
    """Count what the processes of this machine have sent and computed so far."""
    listing = subprocess.run(["ss", "-tinpHO", "state", "established"], check=True, capture_output=True, text=True)
    owners: dict[str, int] = {}
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for line in listing.stdout.splitlines():
        here, there = (one.replace("[::ffff:", "").replace("]", "") for one in line.split()[2:4])
        if owner := SOCKET.search(line):
            owners[here] = int(owner[1])
        size, messages = 0, 0
        for sent, segments in SENT.findall(line):
            size, messages = size + int(sent or 0), messages + int(segments or 0)
        found[here, there] = (messages, size)
    pids = set(owners.values())
    roles = {pid: _role(pid) for pid in pids}
    sent = {
        (here, there): ((roles[owners[here]], roles[owners[there]]), *what)
        for (here, there), what in found.items()
        if here in owners and there in owners
    }
    spent = {}
    for pid in pids:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error:
            continue
        spent[pid] = (roles[pid], times.user + times.system)
    return Counts(time.time(), sent, spent)


@dataclass(frozen=True)
class Traffic:
    """What a training sends in a second, and its steps a second; processor time of the busiest process of a role."""

    steps: float
    messages: Counter[Pair]
    size: Counter[Pair]
    busiest: Counter[str]

    @classmethod
    def between(cls, first: Counts, last: Counts, steps: float) -> "Traffic":
        """What happened between two counts, at `steps` steps a second."""
        took = last.at - first.at
        messages, size, busiest = Counter(), Counter(), Counter()
        for addresses, (pair, segments, sent) in last.sent.items():
            _, had, before = first.sent.get(addresses, (pair, 0, 0))
            messages[pair] += (segments - had) / took  # type: ignore[assignment]
            size[pair] += (sent - before) / took  # type: ignore[assignment]
        for pid, (role, spent) in last.processor_s.items():
            share = (spent - first.processor_s.get(pid, (role, 0.0))[1]) / took
            busiest[role] = max(busiest[role], share)  # type: ignore[assignment]
        return cls(steps, messages, size, busiest)


def _steps_a_second(run: runs.Run, first: float, last: float) -> float:
    """Return the steps a second between two moments, by a line through the metric rows."""
    rows = [row for row in runs.read_parts(run, "metrics") if "train/loss" in row and first <= row["time"] <= last]
    return float(np.polyfit([row["time"] for row in rows], [row["step"] for row in rows], 1)[0])


def _slimray(root: Path, folder: Path, text: str) -> subprocess.Popen[bytes]:
    (folder / "job.yaml").write_text(text)
    command = [sys.executable, "-m", "slimray.cli", "run", "job.yaml", "--storage", str(folder / "runs")]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment_of(root), stdout=log, stderr=log)


def train(root: Path, folder: Path, nodes: int, each: int) -> Traffic:
    """Train with one rank a raylet, `each` samples of it a step, until counted; return what was sent."""
    name = f"pictures-{nodes}-{each}"
    text = TRAIN.replace("NAME", name).replace("TOTAL", str(nodes * each)).replace("EACH", str(each))
    run = runs.run_at(str(folder / "runs" / name))
    driver = _slimray(root, folder, text.replace("WORKERS", str(nodes)))
    try:
        while not any(row.get("step", 0) > WARM_STEPS for row in runs.read_parts(run, "metrics")):
            if driver.poll() is not None:
                raise RuntimeError((folder / "log.txt").read_text())
            time.sleep(2.0)
        first = count()
        time.sleep(WINDOW_S)
        last = count()
        while max(row["time"] for row in runs.read_parts(run, "metrics")) < last.at:
            time.sleep(1.0)
    finally:
        driver.send_signal(signal.SIGINT)
        driver.wait(120)
    return Traffic.between(first, last, _steps_a_second(run, first.at, last.at))


def show(title: str, short: Traffic, long: Traffic) -> None:
    """Print what two trainings of different step times sent, by purpose, and the pairs that sent most of it."""
    print(f"{title}: {short.steps:.2f} and {long.steps:.2f} steps a second", flush=True)
    for purpose in PURPOSES:
        pairs = [pair for pair in {*short.messages, *long.messages} if _purpose(pair) == purpose]
        told = []
        for one in (short, long):
            messages, size = (sum(counts[pair] for pair in pairs) for counts in (one.messages, one.size))
            told.append(
                f"{messages:,.1f} messages and {size:,.0f} bytes a second "
                f"({messages / one.steps:,.1f} and {size / one.steps:,.0f} a step)"
            )
        print(f"  {purpose}: {'; '.join(told)}", flush=True)
        for pair in sorted(pairs, key=lambda one: -short.messages[one])[:LISTED]:
            rates = f"{short.messages[pair]:.1f} / {long.messages[pair]:.1f}"
            print(f"    {' to '.join(pair)}: {rates} messages a second", flush=True)
    shares = ", ".join(
        f"{role} {100 * one:.1f} / {100 * long.busiest[role]:.1f}" for role, one in short.busiest.most_common()
    )
    print(f"  percent of a core, busiest process of each role: {shares}", flush=True)


def measure(root: Path, nodes: int) -> None:
    """Print what trainings of the code in `root` send on a cluster of `nodes` raylets."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = str(cluster.address)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            for _ in range(nodes):
                cluster.add_node(num_cpus=2, object_store_memory=150 << 20)
            if _slimray(root, folder, DATA).wait(600):
                raise RuntimeError((folder / "log.txt").read_text())
            short, long = (train(root, folder, nodes, each) for each in PER_WORKER)
        finally:
            ray.shutdown()
            cluster.shutdown()
            os.environ.pop("RAY_ADDRESS")
    show(f"{root.name}, {nodes} raylets, {nodes} ranks", short, long)


def main() -> None:
    """Print a block of lines for each cluster, of this checkout and of SLIMRAY_AGAINST."""
    os.environ.update({"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"})
    against = os.environ.get("SLIMRAY_AGAINST")
    for nodes in map(int, os.environ.get("NODES", "2 8").split()):
        for root in [ROOT] + ([Path(against).resolve()] if against else []):
            measure(root, nodes)


if __name__ == "__main__":
    main()
