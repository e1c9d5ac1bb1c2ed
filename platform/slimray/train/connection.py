"""Connection to the Ray cluster of a job: join one, or start one here while the driver imports. No torch."""

import contextlib
import importlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.experimental import internal_kv

import slimray
from slimray.storage import PATIENCE
from slimray.train.spec import ScaleSpec

THREADS = "OMP_NUM_THREADS"
GIVEN = b"slimray environment"  # key under which a local cluster stores the environment of its processes
IDLE_S = 60  # how long a local cluster keeps idle processes: the next job of a chain reuses them
QUIET = ("ray.data", "ray.train", "ray.tune", "ray._private.authentication.authentication_token_setup")


def is_local() -> bool:
    """Return whether the cluster is one that `connect` started on this machine."""
    return not os.environ.get("RAY_ADDRESS")


def connect(cpus: int, imported: Sequence[str] = ()) -> None:
    """Join the cluster of RAY_ADDRESS, or use a local one with at least `cpus` logical CPUs.

    The modules `imported`, which the caller needs next, are imported while Ray's own processes start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # slimray reports what matters itself, the rest is in logs/
    if ray.is_initialized():
        if not is_local() or ray.cluster_resources().get("CPU", 0) >= cpus:
            return
        ray.shutdown()
    importing = threading.Thread(target=_import_or_not, args=(*imported,), daemon=True)
    importing.start()
    if is_local():
        _start(cpus)
    else:
        _join(os.environ["RAY_ADDRESS"])
    importing.join()


def _init(address: str, **options: Any) -> None:
    """Call `ray.init`, then restore the SIGTERM handler that was there before.

    Ray's own handler, in C++, prints a stack and aborts the process three seconds later, even if a save is in progress.
    """
    before = signal.getsignal(signal.SIGTERM)
    ray.init(address, logging_level=logging.WARNING, log_to_driver=False, **options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before if callable(before) else lambda number, frame: sys.exit(128 + number))


def _join(address: str) -> None:
    package = Path(slimray.__file__).resolve().parent
    shipped = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # a Ray job: its workers already have its code
    _init(address, runtime_env=None if shipped else {"py_modules": [str(package)]})


def _start(cpus: int) -> None:
    """Start Ray on this machine. Its processes inherit the environment that is set here."""
    own = {"RAY_idle_worker_killing_time_threshold_ms": str(1000 * IDLE_S), THREADS: "1"}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        _init("local", num_cpus=cpus, include_dashboard=False)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    given = json.dumps({THREADS: "1", PATIENCE: os.environ.get(PATIENCE)})
    internal_kv._internal_kv_put(GIVEN, given.encode(), overwrite=True)


def threads(scale: ScaleSpec) -> int:
    """Return the number of torch threads in a process that computes for `scale`."""
    return max(1, int(scale.cpus_per_worker))


def environment(scale: ScaleSpec) -> dict[str, Any]:
    """Return the runtime environment of processes that compute for `scale`.

    Empty where it equals the environment of a local cluster's processes, so that idle ones can be reused.
    """
    wanted = {THREADS: str(threads(scale)), PATIENCE: f"{scale.storage_s:g}"}
    given = internal_kv._internal_kv_get(GIVEN) if is_local() else None
    return {} if given is not None and json.loads(given) == wanted else {"env_vars": wanted}


def _import_or_not(*modules: str) -> None:
    with contextlib.suppress(Exception):  # the caller's own import raises the error
        _import(*modules)


def _import(*modules: str) -> None:
    for module in modules:
        importlib.import_module(module)
