"""Ray's Jobs API: submit, list, follow and stop jobs. Every request has a time limit; errors are one sentence."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import slimray
from slimray.cluster.script import SCRIPT, Submission, env_vars, here_document, write_files
from slimray.cluster.specs import (
    Capacity,
    DriverSpec,
    JobsCluster,
    LocalCluster,
    RayUpCluster,
    Target,
    capacity,
)
from slimray.cluster.tools import TOOLS
from slimray.spec import RunFailed, UserError, dump_yaml, lookup


def jobs_script(job: Submission, cluster: JobsCluster | LocalCluster | RayUpCluster, package: str) -> str:
    """Return a shell script that submits the job by hand, as `slimray submit` does through the Jobs API.

    `package` is the folder of slimray's code. The script reads the values of `pass_env` from its environment.
    """
    driver = cluster.driver if not isinstance(cluster, LocalCluster) else DriverSpec.model_validate({})
    options = ["--submission-id", job.id]
    options += ["--entrypoint-num-cpus", f"{driver.cpus:g}"] if driver.cpus else []
    options += ["--entrypoint-resources", json.dumps(driver.resources)] if driver.resources else []
    options += ["--entrypoint-label-selector", json.dumps(driver.labels)] if driver.labels else []
    start = ["# first: slimray cluster start NAME"] if isinstance(cluster, LocalCluster) else []
    if isinstance(cluster, RayUpCluster):
        start = [
            *here_document('"$work/cluster.yaml"', dump_yaml(cluster.ray_up)),
            'ray up --yes "$work/cluster.yaml"',
            'ray dashboard "$work/cluster.yaml" &   # forwards port 8265 of the head',
            "sleep 15",
        ]
    known = {"py_modules": [package], "env_vars": env_vars(cluster, capacity(cluster), {})}
    quote = "python -c 'import json, sys; print(json.dumps(sys.argv[1]))'"
    passed = [f'echo "  {name}: $({quote} "${{{name}:?is not set}}")" >> "$work/env.yaml"' for name in cluster.pass_env]
    known["env_vars"] |= {} if known["env_vars"] else {"SLIMRAY_SUBMITTED": "1"}  # a block that lines can follow
    return "\n".join(
        [
            "#!/bin/sh",
            "set -eu",
            'work=$(mktemp -d); mkdir "$work/job"',
            *start,
            *write_files(job, cluster, '"$work/job"'),
            *here_document('"$work/env.yaml"', dump_yaml(known)),
            *passed,
            f"export RAY_API_SERVER_ADDRESS={shlex.quote(cluster.address.rstrip('/'))}",
            f'ray job submit --no-wait {shlex.join(options)} --working-dir "$work/job" \\',
            f'  --runtime-env "$work/env.yaml" -- sh {SCRIPT}',
            "",
        ]
    )


REQUEST_TIMEOUT_S = 15
UPLOAD_TIMEOUT_S = 120
SETTLE_S = 2.0  # how long a job has to run before it counts as started
DONE = ("SUCCEEDED", "FAILED", "STOPPED")
RAYS_OWN = re.compile(r"INFO job_manager\.py|^Running entrypoint for job ")  # lines that Ray adds to a job's log
T = TypeVar("T")


def submission_id(name: str, attempt: int) -> str:
    """Return the id of an attempt at the job `name`, unique per name, and valid as a name in Kubernetes and Slurm.

    A name that Kubernetes would not accept (lower case, digits, hyphens, a letter first, at most 40 characters) is
    shortened and gets a digest. KubeRay accepts 47 characters, including the attempt.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if slug != name or len(slug) > 40 or not slug[0].isalpha():
        slug = slug if slug[:1].isalpha() else f"job-{slug}"
        slug = f"{slug[:31].strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{slug}-{attempt}"


def package() -> Path:
    return Path(slimray.__file__).resolve().parent


def send(ready: Submission, target: Target, have: Capacity, folder: str) -> None:
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)
    cluster: Any = target.cluster
    env = env_vars(cluster, have, os.environ)
    options: dict[str, Any] = {}
    if not isinstance(cluster, LocalCluster):
        driver = cluster.driver
        options = {"entrypoint_num_cpus": driver.cpus or None, "entrypoint_resources": driver.resources or None}
        options["entrypoint_label_selector"] = driver.labels or None
    JobSubmissionClient(cluster.address, headers=_headers(target)).submit_job(
        entrypoint=f"sh {SCRIPT}",
        submission_id=ready.id,
        runtime_env={"working_dir": folder, "py_modules": [str(package())], "env_vars": env},
        metadata={"slimray": slimray.__version__, "storage": ready.storage},
        **options,
    )


def wait_until_it_runs(job_id: str, target: Target, timeout_s: float = 60) -> None:
    """Return once the command has run for a moment or has succeeded; otherwise raise the error that it ended with."""
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
        f"could not be set up (see `slimray status {job_id} --cluster {target.name}`; `slimray stop` cancels it)"
    )


def jobs(target: Target) -> list[dict[str, Any]]:
    """Return a cluster's jobs, oldest first: submission_id, status, message, start_time, end_time (ms), metadata."""
    tool = TOOLS.get(type(target.cluster))
    listed = get(target, "/api/jobs/") if tool is None else tool.jobs(target)
    found = [one for one in listed if one.get("submission_id")]
    return sorted(found, key=lambda one: one.get("start_time") or 0)


def job_info(job_id: str, target: Target) -> dict[str, Any]:
    """Return one job, by its id or by its name, which means its newest attempt.

    Raises UserError if there is none, or if jobs in several storages, which are different jobs, share the name.
    """
    known = jobs(target)
    for one in known:
        if one["submission_id"] == job_id:
            return one
    attempts = attempts_of(target, submission_id(job_id, 0).rpartition("-")[0], known)
    if not attempts:
        with_names = {one["submission_id"]: one for one in known}
        try:
            lookup(with_names, job_id, "job")
        except UserError as error:
            raise UserError(f"{target.where}: {error}") from None
    newest = {(one.get("metadata") or {}).get("storage"): one for one in attempts}  # by storage, the last attempt
    if len(newest) > 1:
        found = ", ".join(f"{one['submission_id']} (runs are in {storage})" for storage, one in newest.items())
        raise UserError(f"{target.where}: {job_id!r} is the name of several jobs, give the id of one: {found}")
    return attempts[-1]


def follow(job_id: str, target: Target, patience_s: float = 120) -> Iterator[str]:
    """Yield the job's log as it grows, until the job ends; RunFailed if the cluster is unreachable for `patience_s`."""
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
    """Return everything that the job has printed so far."""
    job_id, tool = job_info(job_id, target)["submission_id"], TOOLS.get(type(target.cluster))
    if tool is not None:
        return tool.log(job_id, target)
    return get(target, f"/api/jobs/{urllib.parse.quote(job_id)}/logs")["logs"]


def stop(job_id: str, target: Target) -> bool:
    """Stop a job; return False if it had already ended. The same job submitted again resumes."""
    info, tool = job_info(job_id, target), TOOLS.get(type(target.cluster))
    if tool is not None:
        if info["status"] not in DONE:
            tool.stop(info["submission_id"], target)
        return info["status"] not in DONE
    return get(target, f"/api/jobs/{urllib.parse.quote(info['submission_id'])}/stop", method="POST")["stopped"]


def require_success(info: dict[str, Any], target: Target) -> None:
    """Raise an error if an ended job did not succeed: UserError for exit code 2, otherwise RunFailed."""
    if info["status"] == "SUCCEEDED":
        return
    job_id = info["submission_id"]
    if info["status"] == "STOPPED":
        raise RunFailed(f"{target.where}: {job_id} was stopped, submit it again to resume it")
    said: list[str] = []
    for _ in range(6):  # the last lines may arrive after the status
        with contextlib.suppress(UserError, RunFailed):
            said = [line for line in log(job_id, target).splitlines() if line.strip() and not RAYS_OWN.search(line)]
        if said:
            break
        time.sleep(0.5)
    said = said or str(info.get("message")).strip().splitlines()
    kind = UserError if info.get("driver_exit_code") == 2 else RunFailed
    raise kind(f"{job_id}: {said[-1].strip()} (`slimray logs {job_id} --cluster {target.name}`)")


def attempts_of(target: Target, name: str, known: Sequence[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    mine = [one for one in known or jobs(target) if re.fullmatch(rf"{re.escape(name)}-\d+", one["submission_id"])]
    return sorted(mine, key=attempt_of)


def attempt_of(info: dict[str, Any]) -> int:
    return int(info["submission_id"].rpartition("-")[2])


def get(target: Target, path: str, method: str = "GET") -> Any:
    """Return the response of a cluster's dashboard; raise UserError or RunFailed within seconds if there is none."""
    cluster: Any = target.cluster
    url = cluster.address.rstrip("/") + path
    request = urllib.request.Request(url, headers=_headers(target), method=method)  # noqa: S310 http by the spec
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:  # noqa: S310
            return json.loads(answer.read() or "null")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(
                f"{target.where}: the cluster at {cluster.address} rejects the token, set "
                f"{getattr(cluster, 'token_env', None) or 'RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH'} to the cluster's"
            ) from None
        reason = (error.read().decode(errors="replace").strip() or error.reason).splitlines()[-1]
        raise RunFailed(f"{target.where}: {cluster.address} returned HTTP {error.code} ({reason[:200]})") from None
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise RunFailed(
            f"{target.where}: the cluster at {cluster.address} does not respond ({reason.lower()})"
        ) from None


def _headers(target: Target) -> dict[str, str]:
    """Return the header with the token that Ray would use; {} if there is none or RAY_AUTH_MODE=disabled."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return {}
    named = getattr(target.cluster, "token_env", None)
    if named is not None:
        if not os.environ.get(named):
            raise UserError(f"{target.where}: token_env: {named} is not set, export the token of the cluster")
        return _bearer(os.environ[named], target)
    path = token_path()
    token = os.environ.get("RAY_AUTH_TOKEN") or (path.read_text().strip() if path.is_file() else "")
    return _bearer(token, target) if token else {}


def _bearer(token: str, target: Target) -> dict[str, str]:
    """Return the header with the token; raise UserError if it would be sent over a network unencrypted."""
    cluster: Any = target.cluster
    parts = urllib.parse.urlsplit(cluster.address)
    if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise UserError(
            f"{target.where}: address: {cluster.address} would receive the cluster's token over plain http: forward "
            "its port (`ssh -N -L 8265:127.0.0.1:8265 HEAD`) and write http://127.0.0.1:8265, or use https://"
        )
    return {"Authorization": f"Bearer {token}"}


def token_path() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def require_answer(target: Target) -> None:
    """Raise UserError with the next step if the dashboard is unreachable or runs another version of Ray."""
    import ray

    try:
        theirs = str((get(target, "/api/version") or {}).get("ray_version"))
    except RunFailed as error:
        cluster = target.cluster
        step = "check `address`, and that the head is running"
        if isinstance(cluster, LocalCluster):
            step = f"start it with `slimray cluster start {target.name}`"
        elif isinstance(cluster, RayUpCluster):
            step = "start it with `ray up` and forward its port with `ray dashboard` (--dry-run prints both)"
        raise UserError(f"{error}, {step}") from None
    if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise UserError(
            f"{target.where}: the cluster runs Ray {theirs}, but slimray here uses {ray.__version__}: "
            "install the same version"
        )


def present(target: Target) -> Capacity:
    """Return the current capacity of a cluster's nodes."""
    nodes = get(target, "/api/v0/nodes?detail=true&limit=10000")["data"]["result"]["result"]
    have = [one.get("resources_total") or {} for one in nodes if one.get("state") == "ALIVE"]
    cpus, gpus = ([float(one.get(name, 0)) for one in have] or [0.0] for name in ("CPU", "GPU"))
    return Capacity(sum(cpus), sum(gpus), max(cpus), max(gpus))


def bounded(action: Callable[[], T], timeout_s: float, target: Target) -> T:
    """Return `action()`, a call of Ray's client, which has no time limit of its own; errors become one sentence."""
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
        raise RunFailed(f"{target.where}: the cluster did not accept the job within {timeout_s:g} s")
    if "error" in box:
        error = box["error"]
        if isinstance(error, UserError | RunFailed):
            raise error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RunFailed(f"{target.where}: the cluster rejects the job: {lines[-1][:300]}") from error
    return box["value"]
