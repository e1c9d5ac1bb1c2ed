"""A group of Ray Train workers and its cluster: joining, checking, starting, progress, failing in one sentence.

`connect` joins the cluster of RAY_ADDRESS or starts a local one, `require` refuses what can never fit, `launch` runs a
worker function on every worker and returns what rank 0 returned. `open_stream` gives a rank its data. Ray's own
checkpoint book-keeping is not used: a restarted worker finds its place in the run folder (loop.py).
"""

import contextlib
import logging
import math
import os
import re
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import ray
import ray.data
import ray.train
from pydantic import Field
from ray import exceptions
from ray.train.collective import barrier, broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import slimray
from slimray.data.pipeline import FeedConfig, RankStream, feeder_of, start_feeders
from slimray.spec import RunFailed, Spec, UserError
from slimray.storage import StorageError

MAX_WORKERS = 1000  # Ray Train's barrier dead-locks above 1,000 ranks (its actor takes 1,000 calls at a time)


class ScaleSpec(Spec):
    """How many workers, on what, and how much patience."""

    workers: int = Field(default=1, ge=1)
    """Data-parallel workers. Learning rate and warm-up depend on `batch.total` only, never on this."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """Logical CPUs each worker reserves; also its torch threads."""
    gpus_per_worker: Literal[0, 1] = 0
    """GPUs each worker reserves; 0 trains on the CPU."""
    decode_slots: int = Field(default=0, ge=0)
    """Clips blocks decoded at once, a CPU each; 0 = as many as the cluster has left, on a laptop one per core."""
    retries: int = Field(default=3, ge=0)
    """Worker failures survived before the run fails."""
    start_timeout_s: float = Field(default=300, gt=0)
    """Longest wait for the workers to start."""
    data_timeout_s: float = Field(default=600, gt=0)
    """Longest wait of a rank for the data of one step, and of the ranks for each other."""


class _Board:
    """A tiny actor through which rank 0 tells the driver how far it is (fire and forget, never waited for)."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def update(self, **state: Any) -> None:
        self.state.update(state)

    def read(self) -> dict[str, Any]:
        return self.state


def make_board() -> Any:
    """Start the progress actor of a run; it belongs to the driver and dies with it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(_Board).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()


def local_cpus(scale: ScaleSpec) -> int:
    """Logical CPUs that `scale` wants of a local cluster: the workers' and a slot per decoder, a place for each.

    They are counted, not owned: on a laptop workers and decoders share the cores.
    """
    return math.ceil(scale.workers * scale.cpus_per_worker) + (scale.decode_slots or os.cpu_count() or 1)


def connect(cpus: int) -> None:
    """Join the cluster of RAY_ADDRESS, or have a local one with at least `cpus` logical CPUs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    for name in ("ray.data", "ray.train", "ray.tune", "ray._private.authentication.authentication_token_setup"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters becomes a sentence, the rest is in logs/
    address = os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        if address or ray.cluster_resources().get("CPU", 0) >= cpus:
            return
        ray.shutdown()
    if address:
        package = Path(slimray.__file__).resolve().parent
        ray.init(address, runtime_env={"py_modules": [str(package)]}, **quiet)
    else:
        ray.init("local", num_cpus=cpus, include_dashboard=False, **quiet)
    ray.data.DataContext.get_current().enable_progress_bars = False


def decode_slots(scale: ScaleSpec) -> int:
    """How many blocks are decoded at once: as told, else one per core of this machine, or what a cluster has left."""
    if scale.decode_slots:
        return scale.decode_slots
    if not os.environ.get("RAY_ADDRESS"):
        return os.cpu_count() or 1
    return max(1, int(ray.cluster_resources().get("CPU", 1) - scale.workers * scale.cpus_per_worker))


def require(scale: ScaleSpec, slots: int) -> None:
    """Raise UserError when the cluster as it stands can never hold the workers and at least one decoding task."""
    have = ray.cluster_resources()
    cpus, gpus = scale.workers * scale.cpus_per_worker + min(slots, 1), scale.workers * scale.gpus_per_worker
    if scale.workers > MAX_WORKERS:
        raise UserError(
            f"scale.workers: at most {MAX_WORKERS} (a barrier of Ray Train dead-locks above), got {scale.workers}"
        )
    for name, need in (("CPU", cpus), ("GPU", gpus)):
        if need > have.get(name, 0):
            raise UserError(
                f"scale: the run needs {need:g} {name}s ({scale.workers} workers and decoding), the cluster has "
                f"{have.get(name, 0):g}: lower scale.workers or use a larger cluster"
            )


def launch(worker: Callable[[Any], Any], config: Any, scale: ScaleSpec, name: str, board: Any = None) -> Any:
    """Run `worker(config)` on `scale.workers` Ray Train workers and return rank 0's return value.

    Lost workers restart the group up to `scale.retries` times; then RunFailed with the first line of the cause. What a
    worker itself calls a RunFailed is not tried again where there is a `board`, unless the storage was at fault. A
    worker may also return {"failed": sentence}, which ends the run at once.
    """
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(scale.start_timeout_s)
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(scale.data_timeout_s + 60)
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    threads = str(max(1, int(scale.cpus_per_worker)))

    def entry(config: Any) -> Any:
        sentence = _read(board).get("failed")
        if sentence:
            return {"failed": sentence}
        try:
            return worker(config)
        except StorageError:
            raise
        except (RunFailed, UserError) as error:
            _tell(board, failed=str(error).splitlines()[0])
            raise

    with tempfile.TemporaryDirectory(prefix="slimray-") as scratch:
        trainer = TorchTrainer(
            entry,
            train_loop_config=config,
            torch_config=TorchConfig(timeout_s=int(scale.data_timeout_s) + 60),
            scaling_config=ray.train.ScalingConfig(
                num_workers=scale.workers,
                use_gpu=scale.gpus_per_worker > 0,
                resources_per_worker={"CPU": scale.cpus_per_worker}
                | ({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {}),
            ),
            run_config=ray.train.RunConfig(
                name=f"{name}-{uuid.uuid4().hex[:8]}",
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(
                    max_failures=scale.retries, controller_failure_limit=scale.retries
                ),
                worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
            ),
        )
        before = signal.getsignal(signal.SIGINT)
        try:
            result: Any = trainer.fit().return_value
        except SystemExit:  # Ray Train's answer to Ctrl-C
            raise KeyboardInterrupt from None
        except ray.train.TrainingFailedError as error:
            raise RunFailed(_cause(error)) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, before)  # fit() leaves a handler of its own behind
    if isinstance(result, dict) and "failed" in result:
        raise RunFailed(result["failed"])
    return result


def _read(board: Any) -> dict[str, Any]:
    """What the board says; nothing if there is none or it has gone: no run needs it."""
    try:
        return {} if board is None else ray.get(board.read.remote(), timeout=60)
    except (exceptions.RayError, TimeoutError):
        return {}


def _tell(board: Any, **state: Any) -> None:
    with contextlib.suppress(exceptions.RayError, TimeoutError):
        if board is not None:
            ray.get(board.update.remote(**state), timeout=60)


def _cause(error: BaseException) -> str:
    """One sentence out of the workers' exceptions: what slimray itself said, else the last line of the first one."""
    if type(error).__name__ == "ControllerError" and "tim" in str(error).lower():
        return "scale.start_timeout_s: the workers did not start in time: lower scale.workers, or wait longer"
    failures = [str(failure).strip() for failure in (getattr(error, "worker_failures", None) or {}).values()]
    failures = [text for text in failures if text] or [str(error).strip() or type(error).__name__]
    for text in failures:
        said = re.findall(r"^slimray\.\w+\.(?:RunFailed|StorageError|UserError): (.+)$", text, re.MULTILINE)
        if said:
            return said[-1]
    return failures[0].splitlines()[-1]


@contextlib.contextmanager
def open_stream(feed: FeedConfig) -> Iterator[RankStream]:
    """This rank's data for as long as the block lasts; rank 0 starts the feeders and tells the others.

    A collective, at its beginning and at its end.
    """
    context = ray.train.get_context()
    rank, feeders = context.get_world_rank(), []
    told: Any = None
    if rank == 0:
        name = f"slimray-feeder-{uuid.uuid4().hex}"
        feeders = start_feeders(feed, name)
        told = {"name": name, "num": len(feeders)}
    told = broadcast_from_rank_zero(told)
    assert told is not None
    try:
        yield RankStream(feeder_of(rank, feed.world, told["num"], told["name"]), feed, rank)
        barrier()  # the others may still be taking their last blocks
    finally:
        for feeder in feeders:
            ray.kill(feeder)
