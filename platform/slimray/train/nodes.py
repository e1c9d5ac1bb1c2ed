"""Checks of nodes: find those that cannot work for a run, before it starts and as they join while it runs.

Each node runs a task that compares its versions with the driver's, counts the GPUs that it advertises, and reads from
the run's folder what the driver wrote there. A node that fails gets no ranks and no decoding tasks. A storage that does
not answer is not held against a node. No model, no data.
"""

import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import slimray
from slimray import runs, storage
from slimray.data.pipeline import failure_of
from slimray.spec import UserError
from slimray.storage import StorageError
from slimray.train.spec import ScaleSpec


def versions() -> dict[str, str]:
    """Return the versions, by package, that all processes of a run must share."""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "ray": ray.__version__,
        "torch": torch.__version__,
        "slimray": slimray.__version__,
    }


def look(run_uri: str, token: str, wanted: Mapping[str, str], gpus: int, patience_s: float) -> str:
    """Return the fault of the node this runs on, "" if none. StorageError if the storage does not answer.

    `token` is what the driver wrote into the run's folder; if "", it wrote nothing, and the folder must hold a run.
    """
    for name, version in versions().items():
        if version != wanted[name]:
            return f"has {name} {version}, the driver has {wanted[name]}"
    found = len([one for one in Path("/dev").glob("nvidia*") if one.name.removeprefix("nvidia").isdigit()])
    if found < gpus:
        return f"advertises {gpus} GPUs but has {found}"
    if not run_uri:
        return ""
    elsewhere = f"sees another {run_uri} than the driver: use a shared folder, s3:// or gs://"
    try:
        with storage.patient(patience_s):
            run = runs.run_at(run_uri)
            if token:
                return "" if runs.read_file(run, "logs/preflight.txt").decode() == token else elsewhere
            return "" if runs.exists(run, "status.json") else elsewhere
    except FileNotFoundError:
        return elsewhere
    except UserError as error:
        return f"cannot read {run_uri} ({(str(error).splitlines() or [''])[0]})"


def working() -> list[dict[str, Any]]:
    """Return the nodes that are alive and have CPUs, in the form of `ray.nodes`."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def ask(nodes: Sequence[Mapping[str, Any]], run_uri: str, token: str, scale: ScaleSpec) -> dict[Any, str]:
    """Start `look` on each of the nodes; return reference of the result -> node id."""
    task, wanted, asked = ray.remote(num_cpus=0, max_retries=1)(look), versions(), {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        gpus = int(node["Resources"].get("GPU", 0)) if scale.gpus_per_worker else 0
        ref = task.options(scheduling_strategy=there).remote(run_uri, token, wanted, gpus, scale.storage_s)
        asked[ref] = node["NodeID"]
    return asked


def answer(ref: Any) -> str:
    """Return the fault that the check `ref` found, also that the node cannot run a task; StorageError as `look`."""
    try:
        return ray.get(ref)
    except exceptions.RayError as error:
        if isinstance(error, exceptions.RayTaskError) and isinstance(cause := failure_of(error), StorageError):
            raise cause from None  # the storage failed after a wait, not the node
        return f"cannot run a task ({(str(error).strip().splitlines() or [type(error).__name__])[-1]})"


class Newcomers:
    """Checks the nodes that join while a launch runs, in the background of its driver."""

    def __init__(self, run_uri: str, scale: ScaleSpec, known: Iterable[str]):
        self.run_uri, self.scale, self.known = run_uri, scale, set(known)
        self.asked: dict[Any, str] = {}

    def look(self) -> dict[str, str]:
        """Start checks on new nodes, and return the sick ones among those checked: node id -> fault.

        Meant to be called every few seconds. A node that does not answer, or disappears, stays unknown.
        """
        new = [node for node in working() if node["NodeID"] not in self.known]
        self.known |= {node["NodeID"] for node in new}
        self.asked |= ask(new, self.run_uri, "", self.scale)
        done, _ = ray.wait(list(self.asked), num_returns=len(self.asked), timeout=0) if self.asked else ([], [])
        sick = {}
        for ref in done:
            node = self.asked.pop(ref)
            try:
                if (wrong := answer(ref)) and node in {one["NodeID"] for one in working()}:
                    sick[node] = wrong
            except StorageError:  # ask again
                self.known.discard(node)
        return sick
