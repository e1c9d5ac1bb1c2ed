"""Restarts of workers that failed: the budget of retries, the nodes to leave out, and waiting for capacity.

A launch is a series of starts. Lost workers are charged to the budget of `scale.retries`, which is restored once a
checkpoint is on storage: at 5,000 hours between failures of a node, a run on 192 nodes loses one a day. An error that a
worker raises itself is the user's, and the budget is not restored after it. A node is left out of the next start if its
preemption is announced, if it is sick or if its rank hung; such a start costs no retry. No torch.
"""

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray import exceptions
from ray.train.v2._internal.exceptions import RayTrainError, UserExceptionWithTraceback

from slimray.storage import StorageError
from slimray.train.progress_actor import HUNG
from slimray.train.spec import ScaleSpec

PROGRESS = "SLIMRAY_PROGRESS"  # environment variable: a file of the script that starts `slimray run` again
RETRIES_LEFT = "SLIMRAY_RETRIES_LEFT"  # environment variable: the budget shared with that script
NETWORK = ("DistBackendError", "DistNetworkError")  # errors of torch.distributed


@dataclass
class Budget:
    """Retries of one launch: the number `left`, and the newest step on storage when they were last restored."""

    scale: ScaleSpec
    left: int = field(init=False)
    saved: int = -1

    def __post_init__(self) -> None:
        self.left = min(self.scale.retries, int(os.environ.get(RETRIES_LEFT) or self.scale.retries))

    def renewed(self, error: BaseException | None, saved: int | None) -> bool:
        """Restore the budget if there was progress since, and return True if the launch goes on after `error`.

        `saved` is the newest step of a checkpoint that this launch has written, None if there is none.
        """
        if error is None or not self.scale.retries or saved is None or saved <= self.saved or not lost_machine(error):
            return False
        self.left, self.saved = self.scale.retries, saved
        return True


def lost_machine(error: BaseException) -> bool:
    """Return True if a machine, the network or the storage ended the workers, as far as Ray Train can tell.

    When one rank dies, the collectives of the others fail too; an error that all ranks raised themselves is the user's.
    """
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    raised = [
        getattr(one, "_base_exc", one) if isinstance(one, UserExceptionWithTraceback) else one for one in failures
    ]
    return any(
        isinstance(one, exceptions.RayError | RayTrainError | StorageError) or type(one).__name__ in NETWORK
        for one in raised
    )


def note_progress(saved: int | None) -> None:
    """Notify the script that starts `slimray run` again, if there is one, that a checkpoint is on storage."""
    if saved is not None and (file := os.environ.get(PROGRESS)):
        with contextlib.suppress(OSError):
            Path(file).write_text(f"{saved}\n")


def room(scale: ScaleSpec, left_out: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Return the number of workers that fit on the live nodes except those `left_out`, and the number of such nodes."""
    workers = nodes = 0
    for node in ray.nodes():
        have = node["Resources"]
        if not node["Alive"] or node["NodeID"] in (left_out or {}):
            continue
        fit = int(have.get("CPU", 0) // scale.cpus_per_worker)
        fit = min(fit, int(have.get("GPU", 0) // scale.gpus_per_worker)) if scale.gpus_per_worker else fit
        workers, nodes = workers + fit, nodes + (fit > 0)
    return workers, nodes


def waits_for(scale: ScaleSpec, left_out: Mapping[str, str], since: float) -> str:
    """Return a sentence about the nodes a launch has waited for since `since` (monotonic seconds), "" if none."""
    try:
        fit, nodes = room(scale, left_out)
    except (exceptions.RayError, KeyError):
        return ""
    if fit >= scale.fewest:
        return ""
    left_s = max(0.0, scale.capacity_timeout_s - (time.monotonic() - since))
    without = f", {len(left_out)} left out" if left_out else ""
    needs = f"{scale.cpus_per_worker:g} CPUs" + (" and a GPU" if scale.gpus_per_worker else "")
    return (
        f"waiting for nodes: there is room for {fit} of {scale.fewest} workers ({needs} each) on {nodes} "
        f"nodes{without}; the run ends in {left_s / 60:.0f} minutes (scale.capacity_timeout_s)"
    )


def usable(scale: ScaleSpec, out: Mapping[str, str], leaving: Mapping[str, str], grows: bool) -> dict[str, str]:
    """Return the nodes to leave out from now on, with reasons: those already `out`, and those `leaving`.

    A node whose rank hung is better than none: unless the cluster `grows`, it is kept if the other nodes cannot hold
    the workers.
    """
    for_good = {**out, **{node: why for node, why in leaving.items() if why != HUNG}}
    both = {**for_good, **leaving}
    return both if grows or room(scale, both)[0] >= scale.fewest else for_good
