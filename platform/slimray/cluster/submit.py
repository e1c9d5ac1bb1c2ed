"""Hand a checked job to a cluster and follow it: Jobs API, RayJob, `ray up`, Slurm, or raylets on this machine.

`load_cluster` reads a cluster file, `prepare` makes a job ready (checked, resolved, small enough for the cluster),
`render` gives what one would apply by hand, `submit` applies it. Ray's Jobs API runs a job once; starting it again is
slimray's: a script beside the run repeats `slimray run`, which resumes. Every request has a time limit, and what can
never fit is refused before it is submitted, because Ray would wait for it for ever.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import slimray
from slimray import job
from slimray.cluster import manifests
from slimray.cluster.manifests import (
    Capacity,
    Cluster,
    JobsCluster,
    KubeRayCluster,
    LocalCluster,
    RayUpCluster,
    Submission,
)
from slimray.runs import lock
from slimray.spec import RunFailed, UserError, dump_yaml, lookup, parse, read_yaml
from slimray.storage import absolute
from slimray.verbs import inputs

REQUEST_TIMEOUT_S = 15
UPLOAD_TIMEOUT_S = 120
START_TIMEOUT_S = 90  # of a head on this machine
SETTLE_S = 2.0  # how long a job has to run before it counts as started
STOP_GRACE_S = 5
DONE = ("SUCCEEDED", "FAILED", "STOPPED")
RAYS_OWN = re.compile(r"INFO job_manager\.py|^Running entrypoint for job ")  # lines of a job's log that Ray writes
JOBS_KINDS = (JobsCluster, LocalCluster, RayUpCluster)

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """A cluster with the words that name it in messages."""

    name: str
    where: str
    cluster: Cluster


# ---------------------------------------------------------------------------------------------- cluster files


def load_cluster(name: str, beside: str | Path | None = None) -> Target:
    """Read the cluster `name`: a file, or one of that name near the job `beside`, in ./cluster, or among the packaged.

    UserError with file and field if it is not there or not right.
    """
    path = _find(name, beside)
    documents = read_yaml(path)
    if len(documents) != 1:
        raise UserError(f"{path}: must hold one document, a cluster")
    document = dict(documents[0])
    if document.get("kind") == "plan":
        raise UserError(f"{path}: kind: describes machines for `slimray plan`, nothing can be submitted to it")
    try:
        spec = lookup(manifests.KINDS, str(document.get("kind")), "kind")
    except UserError as error:
        raise UserError(f"{path}: kind: {error}") from None
    beside_it = document.get("ray_up")
    if spec is RayUpCluster and isinstance(beside_it, str):
        document["ray_up"] = next(iter(read_yaml(path.parent / beside_it)), {})
    cluster: Any = parse(spec, document, str(path))
    if isinstance(cluster, RayUpCluster):
        _require_ray_up(cluster, path)
    return Target(path.stem, str(path), cluster)


def list_clusters() -> dict[str, Path]:
    """The clusters that a name can mean, nearest first, without those of a job's own folder."""
    found: dict[str, Path] = {}
    for folder in (Path("cluster"), inputs.packaged("cluster")):
        for path in sorted(folder.glob("*.yaml")):
            if next(iter(read_yaml(path)), {}).get("kind") in manifests.KINDS:
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


def _require_ray_up(cluster: RayUpCluster, path: Path) -> None:
    """Hold `ray_up` against Ray's own schema."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import validate_config

    defaults = {"cluster_synced_files": [], "max_workers": 2}
    try:
        validate_config(defaults | cluster.ray_up)
    except ValidationError as error:
        field = ".".join(["ray_up", *map(str, error.absolute_path)])
        raise UserError(f"{path}: {field}: {error.message}") from None
    except ValueError as error:
        raise UserError(f"{path}: ray_up: {error}") from None


# -------------------------------------------------------------------------------------- a job gets ready


def make_submission(
    files: Sequence[str],
    target: Target,
    sets: Sequence[str] = (),
    storage: str | None = None,
    restart: bool = False,
    unchecked: bool = False,
) -> Submission:
    """Load, check and resolve the jobs of `files` for a cluster; UserError with all that is wrong.

    `unchecked` leaves out what needs the data and the runs, for storage that only the cluster sees; it checks them
    itself, first thing. The attempt in the id is 1, see `submit`.
    """
    loaded = job.load(files, sets)
    where = _storage(target, storage)
    if not unchecked:
        facts = job.check(loaded, where, restart)
        job.require(facts)
        loaded_states = [one["state"] for one in facts]
    else:
        loaded_states = ["new"] * len(loaded)
    have = manifests.capacity(target.cluster)
    if have is not None:
        left = [one for one, state in zip(loaded, loaded_states, strict=True) if state != "finished"]
        require_room(left, have, target.where)
    missing = [name for name in target.cluster.pass_env if name not in os.environ]
    if missing:
        raise UserError(f"{target.where}: pass_env: {missing[0]} is not set here: export it, or take it out")
    try:
        manifests.env_vars(target.cluster, have, os.environ)
    except UserError as error:
        raise UserError(f"{target.where}: {error}") from None
    documents = "---\n".join(dump_yaml(_at_home(one.document)) for one in loaded)
    return Submission(submission_id(loaded[-1].job.name, 1), Path(files[0]).name, documents, where, restart)


def submission_id(name: str, attempt: int) -> str:
    """The id of an attempt at the job `name`, which Kubernetes and Slurm take as a name, too."""
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')[:40]}-{attempt}"


def require_room(loaded: Sequence[job.Loaded], have: Capacity, where: str) -> None:
    """Raise UserError for the first job that the cluster `where` can never hold, with its field and what there is."""
    for one in loaded:
        if getattr(one.job, "scale", None) is None:
            needs = {"CPU": (1.0, 1.0, have.cpus, have.node_cpus)}
        else:
            scale, decoder = one.job.scale, 0 if one.job.kind == "search" else 1
            cpus, gpus = scale.fewest * scale.cpus_per_worker + decoder, scale.fewest * scale.gpus_per_worker
            needs = {
                "CPU": (cpus, scale.cpus_per_worker, have.cpus, have.node_cpus),
                "GPU": (gpus, scale.gpus_per_worker, have.gpus, have.node_gpus),
            }
        for what, (need, each, total, node) in needs.items():
            if need > total:
                raise UserError(
                    f"{one.where}: scale: needs {need:g} {what}s, {where} can have at most {total:g}: "
                    "lower scale.workers, or let the cluster grow larger"
                )
            if each > node:
                raise UserError(
                    f"{one.where}: scale: each worker needs {each:g} {what}s, the largest node of {where} has {node:g}"
                )


def _at_home(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the folder of its data as it is from any folder."""
    data = document.get("data")
    if isinstance(data, dict) and data.get("root"):
        return document | {"data": data | {"root": absolute(data["root"])}}
    return document


def _storage(target: Target, given: str | None) -> str:
    """Where the runs lie, the same from here and from there."""
    told = given or target.cluster.storage or os.environ.get("SLIMRAY_STORAGE")
    if isinstance(target.cluster, LocalCluster):
        return absolute(told or "runs")
    if told is None or absolute(told) != told:
        raise UserError(
            f"{target.where}: storage: {'is missing' if told is None else f'{told!r} is a folder of this machine'}: "
            "give s3://, gs:// or a folder that all nodes share, here or by --storage"
        )
    return told


def render(ready: Submission, target: Target) -> str:
    """All that `submit` would apply, to be reviewed and applied by hand: YAML for kubectl, else a script."""
    values = {name: os.environ[name] for name in target.cluster.pass_env if name in os.environ}
    cluster = target.cluster
    if isinstance(cluster, KubeRayCluster):
        return "---\n".join(dump_yaml(one) for one in manifests.kuberay(ready, cluster, values))
    if isinstance(cluster, manifests.SlurmCluster):
        return manifests.slurm(ready, cluster, values)
    return manifests.jobs_script(ready, cluster, str(_package()))


def how_to_apply(target: Target, file: str) -> str:
    """The command that applies what `render` wrote to `file`."""
    if isinstance(target.cluster, KubeRayCluster):
        return f"kubectl apply -f {file}"
    return f"sbatch {file}" if isinstance(target.cluster, manifests.SlurmCluster) else f"sh {file}"


def _package() -> Path:
    return Path(slimray.__file__).resolve().parent


# ------------------------------------------------------------------------------------------------------- submit


def submit(ready: Submission, files: Sequence[str], target: Target, sets: Sequence[str] = ()) -> str:
    """Start the job and return the id of this attempt, as soon as its command runs.

    UserError when the cluster does not answer, is too small, already runs this job, or when the command ends at once
    for the user's mistake, such as a secret that is missing.
    """
    cluster = target.cluster
    if not isinstance(cluster, JOBS_KINDS):
        return _apply(ready, target)
    _require_answer(target)
    have = manifests.capacity(cluster)
    if have is None:
        have = _present(target)
        require_room(job.load(files, sets), have, f"{target.where}: the cluster at {cluster.address} now")
    name = ready.id.rpartition("-")[0]
    before = _attempts(target, name)
    if before and before[-1]["status"] not in DONE:
        running = before[-1]["submission_id"]
        raise UserError(
            f"{target.where}: {running} runs already: `slimray logs -f {running} --cluster {target.name}` follows it, "
            "`slimray stop` ends it"
        )
    ready = replace(ready, id=f"{name}-{_attempt(before[-1]) + 1 if before else 1}")
    with tempfile.TemporaryDirectory(prefix="slimray-") as folder:
        for file, text in manifests.files(ready, cluster).items():
            Path(folder, file).write_text(text)
        _bounded(lambda: _send(ready, target, have, folder), UPLOAD_TIMEOUT_S, target)
    _wait_until_it_runs(ready.id, target)
    return ready.id


def _send(ready: Submission, target: Target, have: Capacity, folder: str) -> None:
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)
    cluster: Any = target.cluster
    env = manifests.env_vars(cluster, have, os.environ)
    options: dict[str, Any] = {}
    if not isinstance(cluster, LocalCluster):
        driver = cluster.driver
        options = {"entrypoint_num_cpus": driver.cpus or None, "entrypoint_resources": driver.resources or None}
        options["entrypoint_label_selector"] = driver.labels or None
    JobSubmissionClient(cluster.address, headers=_headers(target)).submit_job(
        entrypoint=f"sh {manifests.SCRIPT}",
        submission_id=ready.id,
        runtime_env={"working_dir": folder, "py_modules": [str(_package())], "env_vars": env},
        metadata={"slimray": slimray.__version__, "storage": ready.storage},
        **options,
    )


def _wait_until_it_runs(job_id: str, target: Target, timeout_s: float = 60) -> None:
    """Return when the command has run for a moment or has ended well; raise what it ended in otherwise."""
    end, running = time.monotonic() + timeout_s, None
    while time.monotonic() < end:
        info = job_info(job_id, target)
        if info["status"] in DONE:
            return require_success(info, target)
        if info["status"] == "RUNNING":
            running = running or time.monotonic()
            if time.monotonic() - running > SETTLE_S:
                return None
        time.sleep(0.5)
    raise RunFailed(
        f"{target.where}: {job_id} has not started within {timeout_s:g} s: no node fits `driver`, or its environment "
        f"could not be made (`slimray status {job_id} --cluster {target.name}`, `slimray stop` takes it back)"
    )


def _apply(ready: Submission, target: Target) -> str:
    """Give a manifest to kubectl or sbatch, if they are here."""
    tool = "kubectl" if isinstance(target.cluster, KubeRayCluster) else "sbatch"
    options = ["apply", "-f", "-"] if tool == "kubectl" else []
    if shutil.which(tool) is None:
        raise UserError(
            f"{target.where}: {tool} is not installed here: write the manifest with --dry-run --out FILE and apply it "
            f"where it is: {how_to_apply(target, 'FILE')}"
        )
    if tool == "kubectl":
        ready = replace(ready, id=_next_id(ready.id, target))
    said = _command([tool, *options], target, render(ready, target))
    return ready.id if tool == "kubectl" else f"{ready.id} ({said.strip().splitlines()[-1]})"


def _next_id(job_id: str, target: Target) -> str:
    """The id after those of the RayJobs that are there: an object that is applied again would change nothing."""
    name, cluster = job_id.rpartition("-")[0], target.cluster
    assert isinstance(cluster, KubeRayCluster)
    there = _command(["kubectl", "-n", cluster.namespace, "get", "rayjobs", "-o", "name"], target)
    numbers = re.findall(rf"/{re.escape(name)}-(\d+)$", there, re.MULTILINE)
    return f"{name}-{max(map(int, numbers), default=0) + 1}"


def _command(command: Sequence[str], target: Target, text: str | None = None) -> str:
    """What a tool prints; UserError with its first words if it is not there, fails or takes too long."""
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{target.where}: {command[0]} is not installed here: where it is, `{' '.join(command)}` does it"
        )
    try:
        done = subprocess.run(list(command), input=text, capture_output=True, text=True, timeout=2 * REQUEST_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"{target.where}: `{' '.join(command)}` does not answer: is the cluster in reach?") from None
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or f"code {done.returncode}").splitlines()[-1]
        raise UserError(f"{target.where}: `{' '.join(command)}`: {reason}")
    return done.stdout


# ------------------------------------------------------------------------------------------------------- follow


def jobs(target: Target) -> list[dict[str, Any]]:
    """The jobs of a cluster's Jobs API, oldest first: submission_id, status, message, start_time, end_time (ms)."""
    _require_jobs_api(target)
    found = [one for one in _get(target, "/api/jobs/") if one.get("submission_id")]
    return sorted(found, key=lambda one: one.get("start_time") or 0)


def job_info(job_id: str, target: Target) -> dict[str, Any]:
    """One job, by its id or by its name, which means its newest attempt; UserError if there is none."""
    _require_jobs_api(target)
    known = jobs(target)
    for one in known:
        if one["submission_id"] == job_id:
            return one
    attempts = _attempts(target, submission_id(job_id, 0).rpartition("-")[0], known)
    if not attempts:
        with_names = {one["submission_id"]: one for one in known}
        try:
            lookup(with_names, job_id, "job")
        except UserError as error:
            raise UserError(f"{target.where}: {error}") from None
    return attempts[-1]


def follow(job_id: str, target: Target, patience_s: float = 120) -> Iterator[str]:
    """The job's log as it comes, until it has ended; RunFailed when the cluster is gone for `patience_s`."""
    shown, heard = 0, time.monotonic()
    job_id = job_info(job_id, target)["submission_id"]
    while True:
        try:
            info, text = job_info(job_id, target), log(job_id, target)
        except RunFailed:
            if time.monotonic() - heard > patience_s:
                raise
            time.sleep(2)
            continue
        heard = time.monotonic()
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
        if info["status"] in DONE:
            return
        time.sleep(1)


def log(job_id: str, target: Target) -> str:
    """All that the job has printed so far."""
    _require_jobs_api(target)
    job_id = job_info(job_id, target)["submission_id"]
    return _get(target, f"/api/jobs/{urllib.parse.quote(job_id)}/logs")["logs"]


def stop(job_id: str, target: Target) -> bool:
    """End a job; False if it had ended already. The same job submitted again resumes."""
    _require_jobs_api(target)
    job_id = job_info(job_id, target)["submission_id"]
    return _get(target, f"/api/jobs/{urllib.parse.quote(job_id)}/stop", method="POST")["stopped"]


def require_success(info: dict[str, Any], target: Target) -> None:
    """Raise what a job that has ended deserves: UserError for code 2, RunFailed for others; nothing if it is well."""
    if info["status"] == "SUCCEEDED":
        return
    job_id = info["submission_id"]
    if info["status"] == "STOPPED":
        raise RunFailed(f"{target.where}: {job_id} was stopped: submit it again, it resumes")
    said: list[str] = []
    for _ in range(6):  # the last lines may come after the status
        with contextlib.suppress(UserError, RunFailed):
            said = [line for line in log(job_id, target).splitlines() if line.strip() and not RAYS_OWN.search(line)]
        if said:
            break
        time.sleep(0.5)
    said = said or str(info.get("message")).strip().splitlines()
    kind = UserError if info.get("driver_exit_code") == 2 else RunFailed
    raise kind(f"{job_id}: {said[-1].strip()} (`slimray logs {job_id} --cluster {target.name}`)")


def _attempts(target: Target, name: str, known: Sequence[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    mine = [one for one in known or jobs(target) if re.fullmatch(rf"{re.escape(name)}-\d+", one["submission_id"])]
    return sorted(mine, key=_attempt)


def _attempt(info: dict[str, Any]) -> int:
    return int(info["submission_id"].rpartition("-")[2])


def _require_jobs_api(target: Target) -> None:
    """For clusters that are looked at with tools of their own: say which."""
    cluster, tool = target.cluster, ""
    if isinstance(cluster, KubeRayCluster):
        tool = f"`kubectl -n {cluster.namespace} get rayjobs` and `kubectl -n {cluster.namespace} logs job/JOB`"
    elif isinstance(cluster, manifests.SlurmCluster):
        tool = "`squeue --me`, `scancel` and the file JOB-NUMBER.log"
    if tool:
        raise UserError(f"{target.where}: a cluster of kind {cluster.kind} is followed with {tool}")


# ------------------------------------------------------------------------------------------------ Ray's REST API


def _get(target: Target, path: str, method: str = "GET") -> Any:
    """The answer of a cluster's dashboard; UserError or RunFailed in one sentence, within seconds, otherwise."""
    cluster: Any = target.cluster
    url = cluster.address.rstrip("/") + path
    request = urllib.request.Request(url, headers=_headers(target), method=method)  # noqa: S310 http by the spec
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:  # noqa: S310
            return json.loads(answer.read() or "null")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(
                f"{target.where}: the cluster at {cluster.address} refuses the token: set "
                f"{getattr(cluster, 'token_env', None) or 'RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH'} to the cluster's"
            ) from None
        reason = (error.read().decode(errors="replace").strip() or error.reason).splitlines()[-1]
        raise RunFailed(f"{target.where}: {cluster.address} answers {error.code} ({reason[:200]})") from None
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise RunFailed(
            f"{target.where}: the cluster at {cluster.address} does not answer ({reason.lower()})"
        ) from None


def _headers(target: Target) -> dict[str, str]:
    """The token, from where Ray looks for it; none where RAY_AUTH_MODE=disabled says so."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return {}
    named = getattr(target.cluster, "token_env", None)
    if named is not None:
        if not os.environ.get(named):
            raise UserError(f"{target.where}: token_env: {named} is not set: export the token of the cluster")
        return {"Authorization": f"Bearer {os.environ[named]}"}
    path = _token_path()
    token = os.environ.get("RAY_AUTH_TOKEN") or (path.read_text().strip() if path.is_file() else "")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _token_path() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def _require_answer(target: Target) -> None:
    """Raise UserError with the next step when the dashboard is out of reach, or of another version of Ray."""
    import ray

    try:
        theirs = str((_get(target, "/api/version") or {}).get("ray_version"))
    except RunFailed as error:
        cluster = target.cluster
        step = "check `address`, and that the head runs"
        if isinstance(cluster, LocalCluster):
            step = f"start it with `slimray cluster start {target.name}`"
        elif isinstance(cluster, RayUpCluster):
            step = "start it with `ray up` and forward its port with `ray dashboard` (--dry-run prints both)"
        raise UserError(f"{error}: {step}") from None
    if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise UserError(
            f"{target.where}: the cluster runs Ray {theirs}, slimray here uses {ray.__version__}: align them"
        )


def _present(target: Target) -> Capacity:
    """What the nodes of a cluster have now."""
    nodes = _get(target, "/api/v0/nodes?detail=true&limit=10000")["data"]["result"]["result"]
    have = [one.get("resources_total") or {} for one in nodes if one.get("state") == "ALIVE"]
    cpus, gpus = ([float(one.get(name, 0)) for one in have] or [0.0] for name in ("CPU", "GPU"))
    return Capacity(sum(cpus), sum(gpus), max(cpus), max(gpus))


def _bounded(action: Callable[[], T], timeout_s: float, target: Target) -> T:
    """`action()` of Ray's client, which knows no time limit of its own; its errors become a sentence."""
    box: dict[str, Any] = {}

    def work() -> None:
        try:
            box["value"] = action()
        except Exception as error:  # noqa: BLE001 raised again by the caller's thread
            box["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise RunFailed(f"{target.where}: the cluster did not take the job within {timeout_s:g} s")
    if "error" in box:
        error = box["error"]
        if isinstance(error, UserError | RunFailed):
            raise error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RunFailed(f"{target.where}: the cluster refuses the job: {lines[-1][:300]}") from error
    return box["value"]


# -------------------------------------------------------------------------------------- raylets on this machine


def start_local(target: Target) -> str:
    """Start the head of a `local` cluster, with Ray's autoscaler, as a process group of its own; returns its address.

    UserError if it runs already or a port is taken, RunFailed with the last line of its log if it does not come up.
    """
    cluster = _local(target)
    if _running(target.name) is not None:
        raise UserError(f"{target.where}: runs already at {cluster.address} (`slimray cluster stop {target.name}`)")
    for field, port in (("port", cluster.port), ("dashboard_port", cluster.dashboard_port)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                raise UserError(f"{target.where}: {field}: {port} is taken by another program, choose another")
    folder = _state_folder()
    folder.mkdir(parents=True, exist_ok=True)
    config, log_file = folder / f"{target.name}.autoscaler.yaml", folder / f"{target.name}.log"
    config.write_text(dump_yaml(manifests.autoscaling_config(cluster)))
    head = manifests.HEAD_NODE_ID
    env = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": head,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # the whole cluster goes, there is nobody to drain to
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # `python` of its jobs
    }
    env.pop("RAY_ADDRESS", None)
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    if env.get("RAY_AUTH_MODE") != "disabled":
        env["RAY_AUTH_MODE"] = "token"
        subprocess.run([*ray, "get-auth-token", "--generate"], env=env, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL, check=True, timeout=START_TIMEOUT_S)  # fmt: skip
        with contextlib.suppress(OSError):  # a token from the environment has no file
            _token_path().chmod(0o600)  # Ray leaves it readable for everybody
    command = [*ray, "start", "--head", "--block", "--port", str(cluster.port), "--num-cpus", "0"]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(cluster.dashboard_port)]
    command += ["--autoscaling-config", str(config)]
    with open(log_file, "w") as out:
        child = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_for_head(child, target, log_file)
        state = {"pid": child.pid, "born": _born(child.pid), "address": cluster.address, "port": cluster.port}
        _state_file(target.name).write_text(json.dumps(state))
    except BaseException:
        _end_group(child.pid)
        raise
    return cluster.address


def stop_local(target: Target) -> bool:
    """End the processes that `start_local` started, and no others; False if there were none."""
    _local(target)
    state = _running(target.name)
    if state is not None:
        _end_group(state["pid"])
    _state_file(target.name).unlink(missing_ok=True)
    return state is not None


def _local(target: Target) -> LocalCluster:
    if not isinstance(target.cluster, LocalCluster):
        tool = "`ray up` and `ray down`" if isinstance(target.cluster, RayUpCluster) else "tools of its own"
        raise UserError(
            f"{target.where}: is of kind {target.cluster.kind}: only kind local is started here, others with {tool}"
        )
    return target.cluster


def _wait_for_head(child: subprocess.Popen, target: Target, log_file: Path) -> None:
    """Return when the head's Jobs API answers and knows the head's node."""
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        if child.poll() is not None:
            lines = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
            raise RunFailed(f"{target.where}: Ray did not start: {lines[-1] if lines else 'no word'} (log: {log_file})")
        with contextlib.suppress(RunFailed, KeyError, TypeError):
            nodes = _get(target, "/api/v0/nodes")["data"]["result"]["result"]
            if any(one["state"] == "ALIVE" for one in nodes):
                return
        time.sleep(0.5)
    raise RunFailed(f"{target.where}: Ray did not start within {START_TIMEOUT_S} s (log: {log_file})")


def _state_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slimray" / "clusters"


def _state_file(name: str) -> Path:
    return _state_folder() / f"{name}.json"


def _running(name: str) -> dict[str, Any] | None:
    """What was noted about the head of that name, if that very process still lives."""
    try:
        state = json.loads(_state_file(name).read_text())
        return state if _born(int(state["pid"])) == state["born"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _born(pid: int) -> str:
    """Words that no other process shares, also after a restart of the machine; "" if there is no process `pid`."""
    birth = lock.process_birth(pid)
    return f"{lock.this_host()} {birth}" if birth else ""


def _end_group(leader: int) -> None:
    """SIGTERM, then SIGKILL, for the process group of `leader`; returns when it is gone."""
    for sent, patience_s in ((signal.SIGTERM, STOP_GRACE_S), (signal.SIGKILL, STOP_GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, sent)
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(leader, os.WNOHANG)
            try:
                os.killpg(leader, 0)
            except ProcessLookupError:
                return
            time.sleep(0.2)
