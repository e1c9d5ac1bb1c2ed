"""Events that may end a training: an announced preemption of a node, the limits of the job, a stuck rank.

Ray Train's watcher of the group polls the state of the cluster and notifies the process of every rank when preemption
of one of its nodes is announced. Each rank checks its own process for a notice, without a request and without waiting.
The sum over all ranks with which each step begins shows whether any rank has one; only then do all ranks meet.
"""

import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import exceptions
from ray.train.v2._internal.execution.context import get_train_context

from slimray import runs
from slimray.spec import RunFailed
from slimray.train.checkpoints import Progress
from slimray.train.config import FitConfig
from slimray.train.health import OTHERS
from slimray.train.ranks import Ranks
from slimray.train.spec import LimitsSpec

LOOK_S = 2.0  # seconds between rank 0's checks of the job's limits


def told_here() -> Any:
    """Return Ray's PreemptionInfo if this process was notified that a node of the group is to be preempted, else None.

    `ray.train.get_preemption_info` returns the same, but through a barrier of all ranks in one actor.
    """
    return get_train_context().preemption_context.preemption_info


class Notices:
    """Checks for notices at every step. `save` returns once a checkpoint of all ranks is on storage (a collective).

    `tell` reports a note and other state to the driver, `told` returns the notice that this rank's process has, if any.
    """

    def __init__(
        self,
        limits: LimitsSpec | None,
        ranks: Ranks,
        save: Callable[[], None],
        tell: Callable[..., Any],
        told: Callable[[], Any] = told_here,
    ):
        self.limits, self.ranks, self.save, self.tell, self.told = limits, ranks, save, tell, told
        self.looked_at = self.counted_at = time.monotonic()

    def due(self, progress: Progress) -> float:
        """Add the elapsed time to `progress`; return 1 if this rank has a notice, or is rank 0 and a limit is reached,
        else 0. The sum with which each step begins adds this up over all ranks.
        """
        now = time.monotonic()
        progress.seconds += now - self.counted_at
        progress.worker_seconds += (now - self.counted_at) * self.ranks.world
        self.counted_at = now
        over = False
        if self.ranks.rank == 0 and now - self.looked_at >= LOOK_S:
            self.looked_at, over = now, bool(self._over(progress))
        return float(over or self.told() is not None)

    def look(self, progress: Progress) -> dict[str, Any] | None:
        """Return the result with which the workers end, or None to go on. Called after a step at which `due` was not 0
        on some rank. A collective.

        The result is {"failed": sentence} where a limit of the job is reached. On notice of a preemption the ranks save
        now, take no more steps, and return {"leaving": {node id: reason}}: they are started again without those nodes
        at once, however long the notice is, and no step is done twice.
        """
        told = [info for info in self.ranks.everyone(self.told()) if info is not None and info.preempted_node_ids]
        if told:
            return self._save_and_leave(told, progress)
        (over,) = self.ranks.sum(float(self.ranks.rank == 0 and bool(self._over(progress))))
        if over:
            self.save()
            return {"failed": self._over(progress) or "limits: reached"}
        return None

    def _over(self, progress: Progress) -> str:
        return "" if self.limits is None else self.limits.reached(progress.worker_seconds, progress.seconds)

    def _save_and_leave(self, told: list[Any], progress: Progress) -> dict[str, Any]:
        self.save()
        if self.ranks.rank == 0:
            where = f"ranks {', '.join(map(str, sorted({rank for info in told for rank in info.preempted_ranks})))}"
            deadline = min((info.deadline_ms for info in told if info.deadline_ms is not None), default=None)
            notice = "" if deadline is None else f", in {max(0.0, deadline / 1000 - time.time()):.0f} s"
            note = f"node preemption announced ({where}{notice}): saved step {progress.total_steps}, starting again"
            self.tell(note=note, preempted=True, total_steps=progress.total_steps)
        nodes = sorted({node for info in told for node in info.preempted_node_ids})
        return {"leaving": dict.fromkeys(nodes, "is about to be preempted")}


def tell_stuck(config: FitConfig, run: runs.Run, rank: int, doing: str, seconds: float, stacks: str) -> None:
    """Write the stacks of a rank that does not move to the logs and notify the driver: whether it is stuck, or waits
    for others."""
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
