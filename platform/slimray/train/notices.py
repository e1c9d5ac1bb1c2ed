"""What may end a training: a node whose preemption is announced, the limits of the job, a rank that is stuck."""

import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray import exceptions

from slimray import runs
from slimray.spec import RunFailed
from slimray.train.checkpoints import Progress
from slimray.train.config import FitConfig
from slimray.train.health import OTHERS
from slimray.train.ranks import Ranks

LOOK_S = 2.0  # how often the ranks ask whether the preemption of one of their nodes is announced


class Notices:
    """Looks for notices every LOOK_S. `save` returns once a checkpoint of all ranks is on storage (a collective)."""

    def __init__(self, config: FitConfig, ranks: Ranks, save: Callable[[], None]):
        self.config, self.ranks, self.save = config, ranks, save
        self.looked_at = self.counted_at = time.monotonic()

    def due(self) -> float:
        """Return 1 on rank 0 every LOOK_S, else 0: all ranks hear of it in the sum that each step begins with."""
        now = time.monotonic()
        if self.ranks.rank or now - self.looked_at < LOOK_S:
            return 0.0
        self.looked_at = now
        return 1.0

    def look(self, progress: Progress) -> dict[str, Any] | None:
        """Return what ends the workers, after a step that rank 0 chose; None to go on. A collective.

        {"failed": sentence} where a limit of the job is reached. With notice of a preemption the ranks save now, take
        no more steps, and return {"leaving": {node id: reason}}: they are started again without those nodes, at once,
        however long the notice is, and no step is done twice.
        """
        now = time.monotonic()
        progress.seconds += now - self.counted_at
        progress.worker_seconds += (now - self.counted_at) * self.ranks.world
        self.counted_at = now
        info = ray.train.get_preemption_info()
        if info is not None and info.preempted_node_ids:
            return self._save_and_leave(info, progress)
        (over,) = self.ranks.sum(float(self.ranks.rank == 0 and bool(self._over(progress))))
        if over:
            self.save()
            return {"failed": self._over(progress) or "limits: reached"}
        return None

    def _over(self, progress: Progress) -> str:
        limits = self.config.limits
        return limits.reached(progress.worker_seconds, progress.seconds) if limits is not None else ""

    def _save_and_leave(self, info: Any, progress: Progress) -> dict[str, Any]:
        self.save()
        if self.ranks.rank == 0:
            where = f"ranks {', '.join(map(str, info.preempted_ranks))}"
            notice = "" if info.deadline_ms is None else f", in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s"
            note = f"node preemption announced ({where}{notice}): saved step {progress.total_steps}, starting again"
            self.config.progress_actor.update.remote(note=note, preempted=True, total_steps=progress.total_steps)
        return {"leaving": dict.fromkeys(info.preempted_node_ids, "is about to be taken")}


def tell_stuck(config: FitConfig, run: runs.Run, rank: int, doing: str, seconds: float, stacks: str) -> None:
    """Write the stacks of a rank that does not move to the logs, and tell the driver, unless it waits for others."""
    where = f"rank {rank} ({socket.gethostname()})"
    file = f"logs/{config.attempt:04d}-rank{rank:05d}-stacks.txt"
    with contextlib.suppress(OSError, RunFailed):
        runs.write_file(run, file, f"{where}, {doing}\n\n{stacks}".encode())
    node = ray.get_runtime_context().get_node_id()
    if doing == OTHERS:
        config.progress_actor.waits.remote(rank)
    else:
        sentence = f"{where} did not move for {seconds:.0f} s while {doing}: its stacks are in {file}"
        with contextlib.suppress(exceptions.RayError, TimeoutError):
            ray.get([config.progress_actor.stuck.remote(sentence), config.progress_actor.hung.remote(node)], timeout=30)
