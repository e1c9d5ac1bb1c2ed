"""A group of Ray Train workers: join a cluster, check its nodes, start workers, monitor them, report failures.

`connect` joins the cluster of RAY_ADDRESS or starts a local one, `require` refuses a job that can never fit, `launch`
runs a function on every worker and returns rank 0's return value. `open_stream` gives a rank its data. Ray's own
checkpoint bookkeeping is not used: a restarted worker finds its place in the run folder (loop.py).
"""

import contextlib
import math
import os
import re
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.actor
import ray.data
import ray.train
from ray import exceptions
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data._internal.stats import get_or_create_stats_actor
from ray.train.collective import barrier, broadcast_from_rank_zero
from ray.train.torch import TorchConfig
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from slimray import runs
from slimray.data.pipeline import FeedConfig, RankStream, Ready, all_nodes_but, feeder_of, spare_feeder, start_feeders
from slimray.spec import RunFailed, UserError
from slimray.storage import StorageError
from slimray.train import connection, nodes
from slimray.train.connection import connect as connect
from slimray.train.controller import Trainer
from slimray.train.progress_actor import ProgressActor
from slimray.train.retries import Budget, note_progress, usable, waits_for
from slimray.train.spec import ScaleSpec

BARRIER_CALLS = 4096  # concurrent calls of Ray Train's barrier; its default, 1,000, deadlocks a larger world
MAX_WORKERS = 4000
POLLS = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"  # environment variable: seconds between the controller's polls of workers
POLLED_PER_S = 200  # workers that the controller can poll in a second
ELASTIC_START_S = 20.0  # an elastic group that cannot be placed retries after this, with as many workers as then fit
WAITING_S, REMIND_S = 15.0, 60.0  # seconds without progress until a launch reports what it waits for, and repeats it
MAX_IN_VAIN = 10  # restarts without a node in a row, with no checkpoint in between


def make_progress_actor() -> Any:
    """Start the progress actor of a run and return its handle; it is owned by the driver and ends with it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "memory": 1, "max_restarts": -1}  # with no request it would land on any node
    return ray.remote(ProgressActor).options(**options, scheduling_strategy=here).remote()


@dataclass(frozen=True)
class Ahead:
    """Actors started before a launch: the name of its feeder, and the handles that keep them alive."""

    feeder: str = ""
    handles: tuple[Any, ...] = ()


def start_ahead(scale: ScaleSpec) -> Ahead:
    """Start what a launch on a local cluster needs besides workers, while the caller is still reading the dataset.

    A feeder and its decoding processes, and the two actors of Ray Data, import at the same time as the workers. On a
    cluster of several machines nothing is started: its feeders depend on where the ranks run.
    """
    if not connection.is_local():
        return Ahead()
    name = f"slimray-feeder-{uuid.uuid4().hex}"
    held = (get_or_create_autoscaling_coordinator(), get_or_create_stats_actor())
    return Ahead(name, (*held, spare_feeder(name, decode_slots(scale), connection.environment(scale))))


def capacity() -> dict[str, float]:
    """Return the most that the cluster can have: SLIMRAY_CLUSTER_CPUS and _GPUS (set by `submit`), or what it has."""
    have: dict[str, float] = dict(ray.cluster_resources())
    for name in ("CPU", "GPU"):
        told = float(os.environ.get(f"SLIMRAY_CLUSTER_{name}S") or 0)
        have[name] = max(have.get(name, 0.0), told)
    return have


def decode_slots(scale: ScaleSpec) -> int:
    """Return the number of blocks decoded at once: as set, or one per core here, or the CPUs left on a cluster."""
    if scale.decode_slots:
        return scale.decode_slots
    if connection.is_local():
        return os.cpu_count() or 1
    return max(1, int(capacity().get("CPU", 1) - scale.most * scale.cpus_per_worker))


def require(scale: ScaleSpec, slots: int) -> None:
    """Raise UserError when the cluster can never hold the fewest workers and one decoding task."""
    have = capacity()
    cpus, gpus = scale.fewest * scale.cpus_per_worker + min(slots, 1), scale.fewest * scale.gpus_per_worker
    if scale.most > MAX_WORKERS:
        raise UserError(
            f"scale.workers: at most {MAX_WORKERS} (the ranks meet in one actor, which takes {BARRIER_CALLS} calls at "
            f"a time), got {scale.most}"
        )
    for name, need in (("CPU", cpus), ("GPU", gpus)):
        if need > have.get(name, 0):
            raise UserError(
                f"scale: the run needs {need:g} {name}s ({scale.fewest} workers and decoding), the cluster has "
                f"{have.get(name, 0):g}: lower scale.workers or use a larger cluster"
            )


# ------------------------------------------------------------------------------------------- before work starts


def preflight(scale: ScaleSpec, run_uri: str) -> dict[str, str]:
    """Check every node of a cluster of several; return node id -> problem (versions, GPUs, storage).

    Each node runs a task that compares its versions with the driver's, counts the GPUs that it advertises, and reads
    from the run's folder what the driver wrote there. Waits for at most `scale.start_timeout_s` + `scale.storage_s`; a
    node that has not answered by then is left out as well. UserError if the good nodes cannot hold the fewest workers.
    """
    there = nodes.working()
    if len(there) < 2:
        return {}
    run, token = runs.run_at(run_uri), uuid.uuid4().hex
    runs.write_file(run, "logs/preflight.txt", token.encode())
    asked = nodes.ask(there, run_uri, token, scale)
    limit_s = scale.start_timeout_s + scale.storage_s
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=limit_s)
    bad = {asked[ref]: f"did not answer within {limit_s:g} s" for ref in late}
    bad |= {asked[ref]: wrong for ref in done if (wrong := nodes.answer(ref))}
    for ref in late:
        ray.cancel(ref, force=True)
    good = [node["Resources"] for node in there if node["NodeID"] not in bad]
    per_node = [
        min(
            int(have.get("CPU", 0) // scale.cpus_per_worker),
            int(have.get("GPU", 0)) if scale.gpus_per_worker else MAX_WORKERS,
        )
        for have in good
    ]
    if bad and sum(per_node) < scale.fewest:
        first = next(iter(bad))
        host = next(node["NodeManagerHostname"] for node in there if node["NodeID"] == first)
        raise UserError(
            f"scale: {len(bad)} of {len(there)} nodes cannot be used and the others hold {sum(per_node)} of "
            f"{scale.fewest} workers; {host} {bad[first]}"
        )
    return bad


class WideBarrier(ControllerCallback):
    """Lets more than 1,000 ranks meet: Ray Train's barrier is an actor of the controller with the default number of
    concurrent calls, so the default is raised in the controller before it creates one."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Raise the default. Runs in the controller's process, before there are workers."""
        ray.actor.DEFAULT_MAX_CONCURRENCY_ASYNC = BARRIER_CALLS  # pyright: ignore[reportPrivateImportUsage]


class _Watch(threading.Thread):
    """Monitors a launch from the driver: reports what it waits for, new checkpoints, and sick nodes that join.

    If `ends`, it ends the launch, which must be in the main thread, as Ctrl-C would when nothing was reported for
    `limit_s` seconds: Ray itself may wait forever.
    """

    def __init__(
        self, actor: Any, scale: ScaleSpec, left_out: Mapping[str, str], newcomers: nodes.Newcomers | None, ends: bool
    ):
        super().__init__(daemon=True, name="watch")
        self.newcomers, self.ends = newcomers, ends
        self.actor, self.scale, self.left_out, self.sentence = actor, scale, left_out, ""
        self.limit_s = scale.capacity_timeout_s + scale.data_timeout_s + 120
        self.done = threading.Event()

    def run(self) -> None:
        """Poll the progress actor every few seconds."""
        began, said = time.monotonic(), 0.0
        while not self.done.wait(min(5.0, self.limit_s / 4)):
            state = progress_state(self.actor)
            note_progress(state.get("saved"))
            if self.newcomers is not None:
                self._look_at_newcomers(self.newcomers)
            told, now = state.get("told"), time.monotonic()
            if told is None:
                continue
            is_due = time.time() - told > WAITING_S and now - said > REMIND_S
            if is_due and (sentence := waits_for(self.scale, self.left_out, began)):
                said = now
                self.actor.waits_for.remote(sentence)
            if self.ends and time.time() - told > self.limit_s:
                self.sentence = (
                    f"no worker reported progress for {self.limit_s:.0f} s: there are fewer nodes than scale.workers "
                    "needs, or all are stuck (see logs/); the same command resumes"
                )
                os.kill(os.getpid(), signal.SIGINT)
                return

    def _look_at_newcomers(self, newcomers: nodes.Newcomers) -> None:
        with contextlib.suppress(exceptions.RayError, KeyError):
            sick = newcomers.look()
            for node, wrong in sick.items():
                self.actor.sick.remote(node, wrong)
            self.actor.unknown.remote(sorted(newcomers.asked.values()))


def launch(
    worker: Callable[[Any], Any],
    config: Any,
    scale: ScaleSpec,
    name: str,
    actor: Any = None,
    left_out: Mapping[str, str] | None = None,
) -> Any:
    """Run `worker(config)` on `scale.workers` Ray Train workers and return rank 0's return value.

    Lost workers restart the group up to `scale.retries` times, and as often again once a checkpoint is on storage
    (retries.py); after that, RunFailed with the first line of the cause. With an `actor`, a RunFailed that a worker
    raises itself is not retried unless the storage was at fault. A worker may also return {"failed": sentence}, which
    ends the run at once, or {"leaving": {node id: reason}}: the group is started again without those nodes, which costs
    no retry. Nodes `left_out` (by `preflight`) get no worker and no decoding tasks. The same holds for nodes found to
    be sick, and, as long as the others can hold the workers, for nodes whose rank hung.
    """
    budget, out, known, vain, saved = Budget(scale), dict(left_out or {}), set(left_out or {}), 0, None
    newcomers = None
    if actor is not None and not connection.is_local():
        seen = [] if left_out is None else [node["NodeID"] for node in nodes.working()]
        newcomers = nodes.Newcomers(getattr(config, "run_uri", ""), scale, seen)
    while True:
        _tell(actor, left_out=sorted(out))
        try:
            result = _launch(worker, config, scale, name, actor, out, known, budget.left, newcomers)
        except RunFailed as error:
            step = progress_state(actor).get("saved")
            if not budget.renewed(error.__cause__, step):
                raise
            _tell(actor, note=f"{error}: step {step} is on storage, so there are {scale.retries} retries again")
            continue
        if not isinstance(result, dict) or "leaving" not in result:
            if isinstance(result, dict) and "failed" in result:
                raise RunFailed(result["failed"])
            return result
        step = progress_state(actor).get("saved")
        vain, saved = (0 if step != saved else vain + 1), step
        said = "; ".join(f"node {node[:8]} {why}" for node, why in result["leaving"].items())
        if vain > MAX_IN_VAIN:
            raise RunFailed(
                f"the workers were started {vain} times in a row without a checkpoint in between, the last time "
                f"because {said}"
            )
        known |= set(result["leaving"])
        out = usable(scale, out, result["leaving"], capacity().get("CPU", 0) > ray.cluster_resources().get("CPU", 0))
        _tell(actor, note=f"{said}: starting again {'without it' if set(result['leaving']) <= set(out) else 'with it'}")


def _launch(
    worker: Callable[[Any], Any],
    config: Any,
    scale: ScaleSpec,
    name: str,
    actor: Any,
    left_out: Mapping[str, str],
    known: Set[str],
    retries: int,
    newcomers: nodes.Newcomers | None,
) -> Any:
    """Start the workers once, and again after up to `retries` failures; return rank 0's return value.

    If a rank runs on a node that is sick or whose rank hung, and the node is not in `known`, the ranks return it as
    {"leaving": ...}.
    """
    several, in_main = newcomers is not None, threading.current_thread() is threading.main_thread()
    watch = _Watch(actor, scale, left_out, newcomers, in_main)
    if actor is not None:
        watch.start()
    entry = _entry(worker, actor, scale, known if several else None)
    with _environment(scale), tempfile.TemporaryDirectory(prefix="slimray-") as scratch:
        trainer = Trainer(
            entry,
            train_loop_config=config,
            torch_config=TorchConfig(timeout_s=int(scale.data_timeout_s) + 40),
            scaling_config=ray.train.ScalingConfig(
                num_workers=scale.workers,
                elastic_resize_monitor_interval_s=scale.resize_s,
                label_selector=all_nodes_but(left_out) if left_out else None,
                use_gpu=scale.gpus_per_worker > 0,
                resources_per_worker={"CPU": scale.cpus_per_worker}
                | ({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {}),
            ),
            run_config=ray.train.RunConfig(
                name=f"{name}-{uuid.uuid4().hex[:8]}",
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(
                    max_failures=retries, controller_failure_limit=math.ceil(scale.capacity_timeout_s / _start_s(scale))
                ),
                worker_runtime_env=connection.environment(scale),
            ),
        )
        try:
            return trainer.fit().return_value
        except KeyboardInterrupt:
            if watch.sentence:
                raise RunFailed(watch.sentence) from None
            raise
        except ray.train.TrainingFailedError as error:
            stuck = progress_state(actor).get("stuck") or []
            raise RunFailed(stuck[-1] if stuck else _cause(error), code=3) from error
        finally:
            watch.done.set()


def _entry(worker: Callable[[Any], Any], actor: Any, scale: ScaleSpec, known: Set[str] | None) -> Callable[[Any], Any]:
    """Return the function that each rank runs: `worker`, unless the run has failed already or nodes of the group turn
    out to be unfit. `known` are unfit nodes that the driver knows of, None on a local cluster. An error that the user
    must fix is reported to the actor, so that it is not tried again."""
    wanted = nodes.versions()

    def entry(config: Any) -> Any:
        sentence = progress_state(actor).get("failed")
        if sentence:
            return {"failed": sentence}
        run_uri = getattr(config, "run_uri", "")
        if known is not None and (leaving := _unfit(actor, wanted, run_uri, scale, known)):
            return {"leaving": leaving}
        try:
            return worker(config)
        except StorageError:
            raise
        except (RunFailed, UserError) as error:
            first = str(error).splitlines()[0]
            if known is not None and (why := _doubtful(actor)):  # StorageError is tried again, and costs a retry
                raise StorageError(f"{first} ({why})") from error
            _tell(actor, failed=first)
            raise

    return entry


@contextlib.contextmanager
def _environment(scale: ScaleSpec) -> Iterator[None]:
    """Set the environment variables of Ray Train's controller, which runs in this process, within the block."""
    asked = os.environ.get(POLLS)
    os.environ |= {
        POLLS: f"{poll_s(scale.most, asked):g}",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_start_s(scale)),
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(scale.data_timeout_s + 60),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # it would log into the driver's terminal
        # a local machine is never preempted
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": str(int(not connection.is_local())),
        "RAY_TRAIN_CALLBACKS": f"{WideBarrier.__module__}.{WideBarrier.__name__}",
    }
    try:
        yield
    finally:
        os.environ.pop(POLLS) if asked is None else os.environ.update({POLLS: asked})


def _start_s(scale: ScaleSpec) -> float:
    """Return the seconds after which a start of the workers counts as a failure of the controller."""
    elastic = scale.most > scale.fewest
    return min(scale.start_timeout_s, ELASTIC_START_S) if elastic else scale.start_timeout_s


def poll_s(workers: int, asked: str | None) -> float:
    """Return the seconds between the controller's polls of all workers: `asked` (default 0.5), longer for many."""
    return max(float(asked or 0.5), workers / POLLED_PER_S)


def _unfit(actor: Any, wanted: dict[str, str], run_uri: str, scale: ScaleSpec, known: Set[str]) -> dict[str, str]:
    """Return the nodes of this group that are sick or had a rank that hung, with reasons, except those `known`.

    Called on every rank before it works: each checks its own node, which may have joined after `preflight`. A
    collective.
    """
    context, node = ray.train.get_context(), ray.get_runtime_context().get_node_id()
    rank = context.get_world_rank()
    ray.get(actor.joined.remote(rank, node), timeout=60)
    if wrong := nodes.look(run_uri, "", wanted, scale.gpus_per_worker, scale.storage_s):
        ray.get(actor.sick.remote(node, wrong), timeout=60)
    barrier()
    told: Any = None
    if rank == 0:
        state = progress_state(actor)
        bad = {**state.get("hung", {}), **state.get("sick", {})}
        told = {one: why for one, why in bad.items() if one in state.get("nodes", ()) and one not in known}
    return broadcast_from_rank_zero(told) or {}


def _doubtful(actor: Any) -> str:
    """Return why a failed decoding task may be due to its node: one that decodes is sick or unchecked. "" if none."""
    state = progress_state(actor)
    sick = {node: why for node, why in state.get("sick", {}).items() if node not in state.get("fed_without", ())}
    found = [f"node {node[:8]} {why}" for node, why in sick.items()]
    return "; ".join(found or [f"node {node[:8]} has just joined" for node in state.get("unknown", ())])


def progress_state(actor: Any) -> dict[str, Any]:
    """Return the state of the progress actor; {} if there is none, or it died: no run depends on it."""
    return _asked(actor, "read")


def _asked(actor: Any, method: str) -> dict[Any, Any]:
    """Return the result of a method of the progress actor; {} if there is none, or it died."""
    try:
        return {} if actor is None else ray.get(getattr(actor, method).remote(), timeout=60)
    except (exceptions.RayError, TimeoutError):
        return {}


def _tell(actor: Any, **state: Any) -> None:
    with contextlib.suppress(exceptions.RayError, TimeoutError):
        if actor is not None:
            ray.get(actor.update.remote(**state), timeout=60)


def _cause(error: BaseException) -> str:
    """Return one sentence from the workers' exceptions: slimray's own message, else the last line of the first one."""
    if type(error).__name__ == "ControllerError" and "tim" in str(error).lower():
        return "scale.capacity_timeout_s: no nodes came up to hold the workers: lower scale.workers, or wait longer"
    failures = [str(failure).strip() for failure in (getattr(error, "worker_failures", None) or {}).values()]
    failures = [text for text in failures if text] or [str(error).strip() or type(error).__name__]
    for text in failures:
        said = re.findall(r"^slimray\.\w+\.(?:RunFailed|StorageError|UserError): (.+)$", text, re.MULTILINE)
        if said:
            return said[-1]
    return failures[0].splitlines()[-1]


@contextlib.contextmanager
def open_stream(
    feed: FeedConfig, spare: str = "", actor: Any = None, ready: Ready | None = None
) -> Iterator[RankStream]:
    """Open the stream of this rank's data, each batch processed by `ready`; rank 0 starts the feeders for all.

    `spare` is the name of a feeder that was started ahead. Nodes that the progress `actor` lists as left out or sick
    get no decoding tasks. A collective, at its beginning and at its end.
    """
    context = ray.train.get_context()
    rank, feeders = context.get_world_rank(), []
    told: Any = None
    if rank == 0:
        state = progress_state(actor)
        feed = replace(feed, left_out=tuple(sorted({*state.get("left_out", ()), *state.get("sick", ())})))
        if feed.left_out:
            actor.fed_without.remote(feed.left_out)
        name, feeders = start_feeders(feed, f"slimray-feeder-{uuid.uuid4().hex}", spare, _asked(actor, "places"))
        told = {"name": name, "num": len(feeders)}
    told = broadcast_from_rank_zero(told)
    assert told is not None
    try:
        yield RankStream(feeder_of(rank, feed.world, told["num"], told["name"]), feed, rank, ready)
        barrier()  # other ranks may still be fetching their last blocks
    finally:
        for feeder in feeders:
            ray.kill(feeder)
