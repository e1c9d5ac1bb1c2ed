"""Blocks a second that one feeder can hand out: processor time of its process, and what the plan requires of it.

Feeders, executions of Ray Data and ranks (threads of this process) are real; samples are the cheapest there are (clouds
of five points), in blocks of 8, 96 and 400. Processor time is measured, because the decoders use what is left of the
cores: that of the feeder's process, of the node's raylet and of the cluster's head process, between the first batch and
the last one. A line is fitted to the share of a core over the blocks a second: the constant cost of an execution, and a
cost per block. The shares of the largest feeder of 2, 8, 32 and 192 nodes of 8 ranks follow from it, for the clips of
"Training Kinetics in 15 Minutes" (arXiv 1910.00932): 28,000 a second for 1,536 ranks, 8 in a microbatch, 64 free CPUs
per node. With SLIMRAY_AGAINST, the folder of another checkout, blocks of 8 alone are measured, here and by the same
command there, in as many alternating pairs as PAIRS says (9). CASES of the environment are the steps and the samples of
a block of each line ("5x400 25x96 100x8").
"""

import os
import re
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import psutil
import pyarrow as pa
import ray
from tests.benchmarks.pairs import Ratio, printed_by

from slimray.data.index import index_table
from slimray.data.pipeline import FeedConfig, RankStream, Source, feeder_of, start_feeders
from slimray.data.plan import Phase, block_size, feeder_ranks, num_feeders
from slimray.data.points.clouds import Cloud, write_cloud
from slimray.data.points.recipe import PointRecipe
from slimray.train import workers

CLOUDS, RANKS, SLOTS = 64, 8, 8
CASES = [tuple(map(int, one.split("x"))) for one in os.environ.get("CASES", "5x400 25x96 100x8").split()]
TOLD = re.compile(r"blocks of 8: ([\d.]+) blocks/s; of a core: feeder ([\d.]+)%")
ROOT = Path(__file__).resolve().parents[2]
RECIPE = PointRecipe(num_points=4, mode="val").to_dict()
CLIPS, CLIP_BYTES, RATE = 8, 8 * 224 * 224 * 3 + 8, 28_000 / 1536


def clouds(folder: Path, count: int) -> pa.Table:
    """Write a few tiny clouds; return an index of `count` samples of them."""
    for number in range(CLOUDS):
        cloud = Cloud(np.full((5, 3), number, np.float32) + np.eye(5, 3, dtype=np.float32) / 9)
        (folder / f"{number}.npz").write_bytes(write_cloud(cloud))
    return index_table([{"path": f"{number % CLOUDS}.npz", "label": number % 4} for number in range(count)])


def _processor_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def _pid(name: str) -> int:
    return next(one.pid for one in psutil.process_iter(["name"]) if name in (one.info["name"] or ""))


def measure(folder: Path, steps: int, rows: int) -> dict[str, float]:
    """Blocks a second, and shares of a core, of `steps` steps of RANKS ranks, a block of `rows` samples each."""
    batch = RANKS * rows
    table = clouds(folder, batch * steps)
    phases = (Phase("train", "train", 0, batch * steps, batch, True, RECIPE),)
    source = Source(str(folder), ray.put(table), table.num_rows)
    config = FeedConfig(phases, {"train": source}, 0, RANKS, rows, SLOTS)
    name = f"feeder-{uuid.uuid4().hex}"
    _, (feeder,) = start_feeders(config, name)
    pids = [ray.get(feeder.__ray_call__.remote(lambda _: os.getpid())), _pid("raylet"), _pid("gcs_server")]
    first = Event()
    begin: list[float] = []

    def consume(rank: int) -> int:
        seen = 0
        for _, _, one in RankStream(feeder_of(rank, RANKS, 1, name), config, rank):
            if not first.is_set():
                first.set()
                begin.extend([time.monotonic(), *map(_processor_s, pids)])
            seen += 0 if one is None else len(one)
        return seen

    with ThreadPoolExecutor(RANKS) as pool:
        assert sum(pool.map(consume, range(RANKS))) == batch * steps
    took = time.monotonic() - begin[0]
    shares = [(_processor_s(pid) - before) / took for pid, before in zip(pids, begin[1:], strict=True)]
    ray.kill(feeder)
    return {"rate": RANKS * steps / took, **dict(zip(("feeder", "raylet", "head"), shares, strict=True))}


def asked(num_nodes: int) -> tuple[int, float, float]:
    """Ranks of the largest feeder, and blocks a second through it: of one microbatch each, and as they are."""
    world = 8 * num_nodes
    num = num_feeders(world, [64] * num_nodes)
    ranks = max(len(feeder_ranks(world, num, group)) for group in range(num))
    rate = ranks * RATE / CLIPS
    return ranks, rate, rate / block_size(ranks, CLIPS * CLIP_BYTES)


def told(root: Path) -> tuple[float, float]:
    """Return the blocks a second and the milliseconds of the feeder's process per block of 8, by the code in `root`."""
    rate, share = map(float, TOLD.findall(printed_by(root, "feeder", CASES="150x8"))[0])
    return rate, 10 * share / rate


def compare(against: Path) -> None:
    """Print the ratios of this checkout over another one."""
    found: list[list[tuple[float, float]]] = [[], []]
    for turn in range(int(os.environ.get("PAIRS", "9"))):
        for number in (0, 1) if turn % 2 == 0 else (1, 0):
            found[number].append(told((ROOT, against)[number]))
        print(f"pair {turn}: {found[0][-1]}, {found[1][-1]}", flush=True)
    for number, what in enumerate(("blocks a second", "ms of the feeder's process per block, all it does")):
        print(Ratio(what, *(tuple(one[number] for one in side) for side in found)))


def main() -> None:
    """Print a line for each size of block, and one for each number of nodes."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    if against := os.environ.get("SLIMRAY_AGAINST"):
        compare(Path(against).resolve())
        return
    found = []
    for steps, rows in CASES:
        workers.connect(SLOTS)  # anew, as Ray Data shares CPUs with executions that have just ended
        try:
            with tempfile.TemporaryDirectory() as folder:
                found.append(one := measure(Path(folder), steps, rows))
        finally:
            ray.shutdown()
        shares = ", ".join(f"{name} {one[name]:.1%}" for name in ("feeder", "raylet", "head"))
        print(f"blocks of {rows}: {one['rate']:.1f} blocks/s; of a core: {shares}", flush=True)
    if len(found) == 1:
        return
    each, idle = np.polyfit([one["rate"] for one in found], [one["feeder"] for one in found], 1)
    print(f"a feeder takes {idle:.1%} of a core and {each * 1e3:.1f} ms a block: {(1 - idle) / each:.0f} blocks/s")
    for num_nodes in (2, 8, 32, 192):
        ranks, before, after = asked(num_nodes)
        print(
            f"{num_nodes} nodes: {ranks} ranks of the largest feeder; blocks of a microbatch: {before:.0f} blocks/s, "
            f"{idle + each * before:.0%} of a core; now {after:.0f} blocks/s, {idle + each * after:.0%}",
            flush=True,
        )
