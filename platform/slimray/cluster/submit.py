"""Submit a checked job to a cluster of any kind and follow it.

`load_cluster` reads a cluster file, `make_submission` prepares a job (checked, resolved, small enough for the cluster),
`render` returns the manifest to apply by hand, `submit` applies it. Ray's Jobs API runs a job once; retries are
slimray's own: a script on the cluster repeats `slimray run`, which resumes. Every request has a time limit, and a job
that can never fit is refused before it is submitted, because Ray would wait for resources for ever.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimray import job
from slimray.cluster import script
from slimray.cluster.jobs_api import (
    DONE,
    UPLOAD_TIMEOUT_S,
    attempt_of,
    attempts_of,
    bounded,
    jobs_script,
    package,
    present,
    require_answer,
    send,
    submission_id,
    wait_until_it_runs,
)
from slimray.cluster.kuberay import kuberay
from slimray.cluster.ray_up import require_ray_up
from slimray.cluster.script import Submission, env_vars
from slimray.cluster.slurm import slurm
from slimray.cluster.specs import (
    KINDS,
    Capacity,
    JobsCluster,
    KubeRayCluster,
    LocalCluster,
    RayUpCluster,
    SlurmCluster,
    Target,
    capacity,
)
from slimray.cluster.tools import command
from slimray.spec import RunFailed, UserError, dump_yaml, lookup, parse, read_yaml
from slimray.storage import absolute
from slimray.verbs import inputs

JOBS_KINDS = (JobsCluster, LocalCluster, RayUpCluster)


def load_cluster(name: str, beside: str | Path | None = None) -> Target:
    """Read the cluster `name`: a file, or one of that name near the job `beside`, in ./cluster, or in the package.

    Raises UserError with file and field if it is missing or invalid.
    """
    path = _find(name, beside)
    documents = read_yaml(path)
    if len(documents) != 1:
        raise UserError(f"{path}: must hold exactly one document, a cluster")
    document = dict(documents[0])
    if document.get("kind") == "plan":
        raise UserError(f"{path}: kind: plan describes machines for `slimray plan`, jobs cannot be submitted to it")
    try:
        spec = lookup(KINDS, str(document.get("kind")), "kind")
    except UserError as error:
        raise UserError(f"{path}: kind: {error}") from None
    beside_it = document.get("ray_up")
    if spec is RayUpCluster and isinstance(beside_it, str):
        document["ray_up"] = next(iter(read_yaml(path.parent / beside_it)), {})
    cluster: Any = parse(spec, document, str(path))
    if isinstance(cluster, RayUpCluster):
        require_ray_up(cluster, path)
    return Target(path.stem, str(path), cluster)


def list_clusters() -> dict[str, Path]:
    """Return the clusters that can be given by name, nearest first, without those in a job's own folder."""
    found: dict[str, Path] = {}
    for folder in (Path("cluster"), inputs.packaged("cluster")):
        for path in sorted(folder.glob("*.yaml")):
            if next(iter(read_yaml(path)), {}).get("kind") in KINDS:
                found.setdefault(path.stem, path)
    return found


def _find(name: str, beside: str | Path | None) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    near = [] if beside is None else [Path(beside).resolve().parent.parent / "cluster", Path(beside).resolve().parent]
    for folder in (*near, Path("cluster"), inputs.packaged("cluster")):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    lookup(list_clusters(), name, "cluster")  # raises
    raise UserError(f"unknown cluster {name!r}")


def make_submission(
    files: Sequence[str],
    target: Target,
    sets: Sequence[str] = (),
    storage: str | None = None,
    restart: bool = False,
    unchecked: bool = False,
) -> Submission:
    """Load, check and resolve the jobs of `files` for a cluster; UserError with every problem found.

    `unchecked` skips the checks that need data and runs, for storage that only the cluster can read; they are made
    there when the job starts. The attempt in the id is 1, see `submit`.
    """
    loaded = job.load(files, sets)
    where = _storage(target, storage)
    if not unchecked:
        facts = job.check(loaded, where, restart)
        job.require(facts)
        loaded_states = [one["state"] for one in facts]
    else:
        loaded_states = ["new"] * len(loaded)
    have = capacity(target.cluster)
    if have is not None:
        left = [one for one, state in zip(loaded, loaded_states, strict=True) if state != "finished"]
        require_room(left, have, target.where)
    missing = [name for name in target.cluster.pass_env if name not in os.environ]
    if missing:
        raise UserError(f"{target.where}: pass_env: {missing[0]} is not set here: export it, or remove it there")
    try:
        env_vars(target.cluster, have, os.environ)
    except UserError as error:
        raise UserError(f"{target.where}: {error}") from None
    documents = "---\n".join(dump_yaml(_at_home(one.document)) for one in loaded)
    return Submission(submission_id(loaded[-1].job.name, 1), Path(files[0]).name, documents, where, restart)


def require_room(loaded: Sequence[job.Loaded], have: Capacity, where: str) -> None:
    """Raise UserError for the first job that can never fit on the cluster `where`, with its field and the limit."""
    for one in loaded:
        if getattr(one.job, "scale", None) is None:
            needs = {"CPU": (1.0, 1.0, have.cpus, have.node_cpus)}
        else:
            scale, decoder = one.job.scale, 1 if one.job.streams else 0
            cpus, gpus = scale.fewest * scale.cpus_per_worker + decoder, scale.fewest * scale.gpus_per_worker
            needs = {
                "CPU": (cpus, scale.cpus_per_worker, have.cpus, have.node_cpus),
                "GPU": (gpus, scale.gpus_per_worker, have.gpus, have.node_gpus),
            }
        for what, (need, each, total, node) in needs.items():
            if need > total:
                raise UserError(
                    f"{one.where}: scale: needs {need:g} {what}s, but {where} can have at most {total:g}: "
                    "lower scale.workers, or let the cluster grow larger"
                )
            if each > node:
                raise UserError(
                    f"{one.where}: scale: a worker needs {each:g} {what}s, but the largest node of {where} has {node:g}"
                )


def worker_hour(target: Target) -> float | None:
    """Return the price of one worker-hour, from `machine` in the cluster file and prices.yaml; None if unknown."""
    from slimray.train.calibrate import find_cluster  # imports torch

    folders = (Path(target.where).resolve().parent, Path("cluster"), inputs.packaged("cluster"))
    try:
        cluster = find_cluster(target.where, folders, on_gpu=True) if target.cluster.machine else None
    except UserError:
        return None
    if cluster is None or cluster.usd_per_node_hour is None or not cluster.ranks_per_node:
        return None
    return cluster.usd_per_node_hour / cluster.ranks_per_node


def _at_home(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with an absolute path to its data."""
    data = document.get("data")
    if isinstance(data, dict) and data.get("root"):
        return document | {"data": data | {"root": absolute(data["root"])}}
    return document


def _storage(target: Target, given: str | None) -> str:
    """Return the storage of the runs, valid both here and on the cluster; UserError if there is none."""
    told = given or target.cluster.storage or os.environ.get("SLIMRAY_STORAGE")
    if isinstance(target.cluster, LocalCluster):
        return absolute(told or "runs")
    if told is None or absolute(told) != told:
        raise UserError(
            f"{target.where}: storage: {'is missing' if told is None else f'{told!r} is a folder of this machine'}: "
            "give s3://, gs:// or a folder that all nodes share, here or with --storage"
        )
    return told


def render(ready: Submission, target: Target) -> str:
    """Return all that `submit` would apply, to review and apply by hand: YAML for kubectl, otherwise a script."""
    values = {name: os.environ[name] for name in target.cluster.pass_env if name in os.environ}
    cluster = target.cluster
    if isinstance(cluster, KubeRayCluster):
        return "---\n".join(dump_yaml(one) for one in kuberay(ready, cluster, values))
    if isinstance(cluster, SlurmCluster):
        return slurm(ready, cluster, values)
    return jobs_script(ready, cluster, str(package()))


def how_to_apply(target: Target, file: str) -> str:
    """Return the command that applies the output of `render` stored in `file`."""
    if isinstance(target.cluster, KubeRayCluster):
        return f"kubectl apply -f {file}"
    return f"sbatch {file}" if isinstance(target.cluster, SlurmCluster) else f"sh {file}"


def submit(ready: Submission, files: Sequence[str], target: Target, sets: Sequence[str] = ()) -> str:
    """Start the job and return the id of this attempt, as soon as its command runs.

    Raises UserError if the cluster does not respond, is too small or already runs this job, or if the command ends at
    once because of a user error such as a missing secret.
    """
    cluster = target.cluster
    if not isinstance(cluster, JOBS_KINDS):
        return _apply(ready, target)
    require_answer(target)
    have = capacity(cluster)
    if have is None:
        have = present(target)
        require_room(job.load(files, sets), have, f"{target.where}: the cluster at {cluster.address} now")
    name = ready.id.rpartition("-")[0]
    before = attempts_of(target, name)
    mine = [one for one in before if (one.get("metadata") or {}).get("storage", ready.storage) == ready.storage]
    if mine and mine[-1]["status"] not in DONE:
        running = mine[-1]["submission_id"]
        raise UserError(
            f"{target.where}: {running} is already running: `slimray logs -f {running} --cluster {target.name}` "
            "follows it, `slimray stop` ends it"
        )
    ready = replace(ready, id=f"{name}-{attempt_of(before[-1]) + 1 if before else 1}")
    with tempfile.TemporaryDirectory(prefix="slimray-") as folder:
        for file, text in script.files(ready, cluster).items():
            Path(folder, file).write_text(text)
        bounded(lambda: send(ready, target, have, folder), UPLOAD_TIMEOUT_S, target)
    wait_until_it_runs(ready.id, target)
    return ready.id


def _apply(ready: Submission, target: Target) -> str:
    """Pass the manifest to kubectl or sbatch; UserError if they are not installed here."""
    tool = "kubectl" if isinstance(target.cluster, KubeRayCluster) else "sbatch"
    options = ["apply", "-f", "-"] if tool == "kubectl" else []
    if shutil.which(tool) is None:
        raise UserError(
            f"{target.where}: {tool} is not installed here: write the manifest with --dry-run --out FILE and run "
            f"`{how_to_apply(target, 'FILE')}` on a machine that has it"
        )
    if tool == "kubectl":
        ready = replace(ready, id=_next_id(ready.id, target))
    said = command([tool, *options], target, render(ready, target))
    if tool == "kubectl":
        return ready.id
    number = re.search(r"\d+", said)
    if number is None:
        raise RunFailed(f"{target.where}: sbatch did not print the number of the job ({said.strip()})")
    return f"{ready.id.rpartition('-')[0]}-{number[0]}"  # as Slurm's tools list it


def _next_id(job_id: str, target: Target) -> str:
    """Return the id after those of the existing RayJobs; applying an existing object again would change nothing."""
    name, cluster = job_id.rpartition("-")[0], target.cluster
    assert isinstance(cluster, KubeRayCluster)
    there = command(["kubectl", "-n", cluster.namespace, "get", "rayjobs", "-o", "name"], target)
    numbers = re.findall(rf"/{re.escape(name)}-(\d+)$", there, re.MULTILINE)
    return f"{name}-{max(map(int, numbers), default=0) + 1}"
