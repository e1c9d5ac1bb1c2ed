"""The control path of a step: processor time of the busiest process, for the numbers of ranks in the variable RANKS.

Two ways to check for announced preemptions. Until 2026-11-30, every 2 s, all ranks met in Ray Train's actor. Now Ray
Train's watcher queries the state of the cluster every 5 s, and at each step a rank reads what its own process was told.
The actor, the state and the sum of the ranks are the real ones; the ranks are calls of one process.
"""

import os
import time
from typing import Any

import psutil
import ray
import torch
from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor
from ray.train.v2._internal.execution.preemption import PreemptionContext, _get_draining_nodes
from tests.waits import patience

from slimray.train import workers
from slimray.train.checkpoints import Progress
from slimray.train.notices import Notices
from slimray.train.ranks import Ranks

ROUNDS, POLLS, STEPS = 3, 200, 10_000


def _processor_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def barrier(world: int) -> tuple[float, float]:
    """Processor seconds of the actor in which `world` ranks meet, and seconds, for each time they do."""
    options: dict[str, Any] = {"max_concurrency": workers.BARRIER_CALLS}
    actor: Any = SynchronizationActor.options(**options).remote()  # pyright: ignore[reportAttributeAccessIssue]
    pid = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
    spent, began = 0.0, 0.0
    for turn in range(ROUNDS + 1):
        calls = [actor.broadcast_from_rank_zero.remote(rank, world, None, "measured") for rank in range(world)]
        ray.get(calls, timeout=patience(300))
        if turn == 0:  # the first one starts what there is to start
            spent, began = _processor_s(pid), time.monotonic()
    out = (_processor_s(pid) - spent) / ROUNDS, (time.monotonic() - began) / ROUNDS
    ray.kill(actor)
    return out


def poll() -> tuple[float, float]:
    """Processor seconds of the cluster's head process, and seconds, for each question which nodes are to be taken."""
    head = next(one for one in psutil.process_iter(["name"]) if "gcs_server" in (one.info["name"] or ""))
    _get_draining_nodes()
    spent, began = _processor_s(head.pid), time.monotonic()
    for _ in range(POLLS):
        _get_draining_nodes()
    return (_processor_s(head.pid) - spent) / POLLS, (time.monotonic() - began) / POLLS


def look() -> float:
    """Seconds of a rank's look at what it was told."""
    here, progress = PreemptionContext(), Progress()
    ranks = Ranks(0, 1, torch.device("cpu"), 600, lambda *told: None)
    notices = Notices(None, ranks, print, print, lambda: here.preemption_info)
    began = time.perf_counter()
    for _ in range(STEPS):
        notices.due(progress)
    return (time.perf_counter() - began) / STEPS


def main() -> None:
    """Print a line for each number of ranks."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    workers.connect(2)
    try:
        asked, took = poll()
        looked = look()
        print(f"now, for any number of ranks: the state asked every 5 s takes {asked * 1e3:.2f} ms of the head process")
        print(f"  ({took * 1e3:.2f} ms to answer), a rank's own look {looked * 1e6:.1f} us a step", flush=True)
        for world in map(int, os.environ.get("RANKS", "64 256 1536").split()):
            busy, took = barrier(world)
            print(
                f"before, {world} ranks: a look takes {busy * 1e3:.0f} ms of the actor's process ({took:.2f} s until "
                f"all are through, from one process): {busy / 2:.1%} of it every 2 s; now {asked / 5:.4%} of the head",
                flush=True,
            )
    finally:
        ray.shutdown()
