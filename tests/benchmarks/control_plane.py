"""The control plane: a dry training (no model, real ingest, real records) with many workers on eight raylets.

This is a training without its network: Ray Train's worker group, the feeders and Ray Data, the records and checkpoints
of the run folder. Its ranks do not import torch. Printed are the seconds to start, for 100 steps and to end, and the
memory of all processes, for two numbers of workers; the difference is the cost of a worker. The variable WORKERS sets
them ("16 64"). With BARE=1 a worker group of Ray Train alone is started, whose ranks only meet: no job on Ray Train can
start faster. With SLIMRAY_AGAINST, the folder of another checkout, each number of workers is measured in PAIRS (3)
alternating pairs, by the same command there and with the libraries of this environment: one line per run, and the
ratios after each pair. What is in SLIMRAY_BENCH_DIR is not computed again.
"""

import os
import re
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.train
from ray.cluster_utils import Cluster
from ray.train.collective import barrier, broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from tests.benchmarks.pairs import printed_by

from slimray import runs
from slimray.data.index import INDEX, UNKNOWN
from slimray.data.pipeline import FeedConfig, RankStream, Source, feeder_of, start_feeders
from slimray.data.plan import Phase
from slimray.runtime.pairs import Pairs

ROOT = Path(__file__).resolve().parents[2]
NODES, STEPS = 8, int(os.environ.get("STEPS", "100"))
TOLD = re.compile(r"start and end ([\d.]+) s, first batch ([\d.]+) s, \d+ steps ([\d.]+) s; peak MB \(PSS\): (\d+)")
WHAT = ("start, first batch and end", f"{STEPS} steps", "memory")
RECIPE = {"kind": "image", "size": 32}


def dry_rank(config: dict[str, Any]) -> dict[str, float]:
    """A rank that takes its data, counts it and reports, and does nothing with it."""

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    began, told, feeders = time.monotonic(), None, []
    if rank == 0:
        name = f"feeder-{uuid.uuid4().hex}"
        _, feeders = start_feeders(config["feed"], name)
        told = {"name": name, "num": len(feeders)}
    told = broadcast_from_rank_zero(told)
    assert told is not None
    run, seen, first = runs.run_at(config["uri"]), 0, 0.0
    rows = runs.PartWriter(run, "samples", 1, rank)
    for _, step, batch in RankStream(feeder_of(rank, world, told["num"], told["name"]), config["feed"], rank):
        first = first or time.monotonic()
        if batch is not None:
            seen += len(batch)
            rows.write({"step": step, "epoch": 0, "ids": batch.sample.tolist()})
        if step % 25 == 24:
            barrier()  # what a checkpoint costs all ranks
            if rank == 0:
                runs.save_checkpoint(run, step + 1, {"state": b"x" * 1000}, {"progress": {}})
    rows.close()
    barrier()
    for feeder in feeders:
        ray.kill(feeder)
    took = time.monotonic() - first
    return {"first_batch_s": first - began, "steps_s": took, "feeders": told["num"], "torch": "torch" in sys.modules}


def idle_rank(config: dict[str, Any]) -> float:
    """A rank that only meets the others; returns when (Unix seconds) all had met."""
    barrier()
    return time.time()


def _memory_mb(leader: int) -> dict[str, float]:
    """Proportional memory (PSS) of all processes below `leader`, by kind, in MB."""
    from tests.verbs.conftest import session_of

    total: dict[str, float] = {}
    for pid in session_of(leader):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            pss = next(line for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if "Pss:" in line)
        except (OSError, StopIteration):
            continue
        kind = next((k for k in ("RayTrainWorker", "raylet", "gcs_server", "TrainController") if k in words), "other")
        total[kind] = total.get(kind, 0.0) + float(pss.split()[1]) / 1e3
    return total


def measure(world: int) -> None:
    """Print one line for `world` workers."""
    from slimray.train import workers
    from slimray.train.controller import InProcessTrainer  # not in the ranks, which import this file: it imports torch

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = f"{workers.poll_s(world, '0.5'):g}"
    cluster = start_cluster(world)
    peak: dict[str, float] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(2.0):
            now = _memory_mb(os.getpid())
            if sum(now.values()) > sum(peak.values()):
                peak.clear()
                peak.update(now)

    threading.Thread(target=watch, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        table = _pictures(images, 256)
        source = Source(str(images), ray.put(table), table.num_rows)
        samples = world * STEPS
        index = pa.concat_tables([table] * -(-samples // table.num_rows)).slice(0, samples)
        source = Source(str(images), ray.put(index), samples)
        phases = (Phase("train", "train", 0, samples, world, True, RECIPE),)
        feed = FeedConfig(phases, {"train": source}, 0, world, 1, 2, 30.0, 600.0)
        run = runs.run_at(f"{folder}/run")
        began = time.monotonic()
        trainer = InProcessTrainer(
            dry_rank,
            train_loop_config={"feed": feed, "uri": run.uri},
            scaling_config=ray.train.ScalingConfig(num_workers=world, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(name=uuid.uuid4().hex, storage_path=f"{folder}/ray"),
        )
        result: Any = trainer.fit().return_value
        whole = time.monotonic() - began
        seen = [i for row in runs.read_parts(run, "samples") for i in row["ids"]]
        assert sorted(seen) == list(range(samples)), "a sample was lost or seen twice"
    done.set()
    start = whole - result["steps_s"] - result["first_batch_s"]
    parts = ", ".join(f"{kind} {mb:.0f}" for kind, mb in sorted(peak.items()))
    print(
        f"{world} workers, {NODES} raylets, {result['feeders']} feeders, torch in ranks: {bool(result['torch'])}: "
        f"start and end {start:.1f} s, first batch {result['first_batch_s']:.1f} s, {STEPS} steps "
        f"{result['steps_s']:.1f} s; peak MB (PSS): {sum(peak.values()):.0f} ({parts})",
        flush=True,
    )
    stop(cluster)


def start_cluster(world: int) -> Cluster:
    """Start NODES raylets that hold `world` workers, and connect to them."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    for _ in range(NODES):
        cluster.add_node(num_cpus=-(-world // NODES) + 1, object_store_memory=150 << 20)
    os.environ["RAY_ADDRESS"] = cluster.address
    ray.init(cluster.address, log_to_driver=False)
    return cluster


def stop(cluster: Cluster) -> None:
    """Disconnect, and stop the raylets."""
    ray.shutdown()
    cluster.shutdown()
    os.environ.pop("RAY_ADDRESS")


def measure_bare(world: int) -> None:
    """Print how long Ray Train takes to start `world` workers that do nothing."""
    cluster, began = start_cluster(world), time.time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DataParallelTrainer(
            idle_rank,
            train_loop_config={},
            scaling_config=ray.train.ScalingConfig(num_workers=world, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(name=uuid.uuid4().hex, storage_path=folder),
        )
        result: Any = trainer.fit()
    met = result.return_value - began
    print(f"{world} workers, {NODES} raylets, Ray Train alone: all met after {met:.1f} s", flush=True)
    stop(cluster)


def _pictures(folder: Path, count: int) -> pa.Table:
    """Small JPEG files and their index."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number:03d}.jpg")
    rows = [{"path": f"{number:03d}.jpg", "label": number % 4} for number in range(count)]
    filled = [{**UNKNOWN, **row} for row in rows]
    return pa.Table.from_pylist(filled, schema=INDEX)


@dataclass
class _Kept:
    """Where the figures of runs are kept."""

    folder: Path
    seed: int = 0

    def file(self, name: str) -> Path:
        """The file of that name."""
        return self.folder / name


def compare(world: int, against: Path, kept: _Kept) -> None:
    """Print the figures of pairs of runs, of this checkout and of another."""
    from tests.benchmarks.kept import row_of  # imports torch

    found: list[list[list[float]]] = [[], []]
    for turn in range(int(os.environ.get("PAIRS", "3"))):
        for number in (0, 1) if turn % 2 == 0 else (1, 0):
            root = (ROOT, against)[number]
            name = f"control plane, {world} workers, run {turn} of {('this', 'the other')[number]} checkout"
            row = row_of(kept, name, lambda root=root: {"told": _told(root, world)})
            print(f"{name}: {row['told']}", flush=True)
            start, first, steps, memory = map(float, TOLD.findall(row["told"])[0])
            found[number].append([start + first, steps, memory])
        for number, what in enumerate(WHAT):
            ours, theirs = (tuple(one[number] for one in side) for side in found)
            pairs = Pairs(ours, theirs)
            low, high = pairs.interval
            print(f"  {world} workers, {what}: ratio {pairs.ratio:.2f} [{low:.2f}, {high:.2f}]", flush=True)


def _told(root: Path, world: int) -> str:
    """The line that `root` prints for `world` workers."""
    printed = printed_by(root, "control_plane", WORKERS=str(world))
    return next(line for line in printed.splitlines() if TOLD.search(line))


def main() -> None:
    """Measure two sizes, each on a cluster of its own."""
    against = os.environ.get("SLIMRAY_AGAINST")
    os.environ.update({"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"})
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300"})
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        kept = _Kept(Path(os.environ.get("SLIMRAY_BENCH_DIR", folder)))
        kept.folder.mkdir(parents=True, exist_ok=True)
        for world in map(int, os.environ.get("WORKERS", "16 64").split()):
            if against:
                compare(world, Path(against).resolve(), kept)
            else:
                (measure_bare if os.environ.get("BARE") == "1" else measure)(world)
