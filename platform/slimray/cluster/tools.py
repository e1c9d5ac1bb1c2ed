"""Jobs on Kubernetes and Slurm by their own tools: list, log and stop, in the form in which Ray's Jobs API tells them.

What a tool prints becomes the fields that `status`, `logs` and `stop` read of a job: submission_id, status (as Ray
writes it), message (why it waits, or ended), start_time and end_time (ms), metadata. TOOLS has a row for each kind of
cluster that is not followed through the Jobs API.
"""

import datetime
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimray.cluster.specs import KubeRayCluster, SlurmCluster, Target
from slimray.spec import UserError

TOOL_TIMEOUT_S = 30
MAX_LOG_BYTES = 64 << 20
STORAGE = "slimray.io/storage"  # annotation of a RayJob
STATES = {
    "COMPLETED": "SUCCEEDED",
    "RUNNING": "RUNNING",
    "COMPLETING": "RUNNING",
    "CANCELLED": "STOPPED",
} | dict.fromkeys(
    ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"), "FAILED"
)  # of Slurm; others are PENDING, a job that was preempted or requeued too


def command(words: Sequence[str], target: Target, text: str | None = None) -> str:
    """Return what a tool prints; UserError with its last words if it is not there, fails or takes too long."""
    if shutil.which(words[0]) is None:
        raise UserError(f"{target.where}: {words[0]} is not installed here: where it is, `{' '.join(words)}` does it")
    try:
        done = subprocess.run(list(words), input=text, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"{target.where}: `{' '.join(words)}` does not answer: is the cluster in reach?") from None
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or f"code {done.returncode}").splitlines()[-1]
        raise UserError(f"{target.where}: `{' '.join(words)}`: {reason}")
    return done.stdout


@dataclass(frozen=True)
class Tool:
    """Three functions of a cluster: all its jobs; the log of one; end one."""

    jobs: Callable[[Target], list[dict[str, Any]]]
    log: Callable[[str, Target], str]
    stop: Callable[[str, Target], Any]


def _kubectl(target: Target, *words: str) -> str:
    assert isinstance(target.cluster, KubeRayCluster)
    return command(["kubectl", "-n", target.cluster.namespace, *words], target)


def _rayjobs(target: Target) -> list[dict[str, Any]]:
    listed = json.loads(_kubectl(target, "get", "rayjobs", "-l", "app.kubernetes.io/managed-by=slimray", "-o", "json"))
    return [_rayjob(one) for one in listed["items"]]


def _rayjob(item: dict[str, Any]) -> dict[str, Any]:
    told, meta = item.get("status") or {}, item["metadata"]
    deployed = str(told.get("jobDeploymentStatus") or "")
    status = told.get("jobStatus") or "PENDING"
    if "Failed" in deployed and status in ("PENDING", "RUNNING"):  # KubeRay gave up; the last that Ray said stays there
        status = "FAILED"
    waits = "" if status != "PENDING" else f"{deployed.lower() or 'not admitted yet'}: waits for its pods"
    if (item.get("spec") or {}).get("suspend"):
        waits = "suspended: waits in its queue"
    return {
        "submission_id": meta["name"],
        "status": status,
        "message": told.get("message") or told.get("reason") or waits,
        "start_time": _milliseconds(told.get("startTime") or meta.get("creationTimestamp")),
        "end_time": _milliseconds(told.get("endTime")),
        "metadata": {"storage": (meta.get("annotations") or {}).get(STORAGE)},
    }


def _rayjob_log(job_id: str, target: Target) -> str:
    return _kubectl(target, "logs", f"job/{job_id}", "--all-containers")


def _delete_rayjob(job_id: str, target: Target) -> None:
    assert isinstance(target.cluster, KubeRayCluster)
    kinds = "rayjob,configmap,poddisruptionbudget" + (",networkpolicy" if target.cluster.network else "")
    _kubectl(target, "delete", kinds, "-l", f"slimray.io/job={job_id}")


def _slurm_jobs(target: Target) -> list[dict[str, Any]]:
    """The jobs of this user, those that ended minutes ago too; a job's number takes the place of an attempt's."""
    form = "%A|%j|%T|%S|%e|%r"
    listed = command(["squeue", "--me", "--noheader", "--states=all", f"--format={form}"], target)
    found = []
    for line in listed.splitlines():
        number, name, state, begun, ended, reason = (line.split("|") + [""] * 6)[:6]
        if not re.fullmatch(r".+-\d+", name):
            continue
        status = STATES.get(state.split()[0], "PENDING")
        found.append(
            {
                "submission_id": f"{name.rpartition('-')[0]}-{number}",
                "status": status,
                "message": f"waits: {reason}" if status == "PENDING" else "" if reason == "None" else reason,
                "start_time": _milliseconds(begun) if status != "PENDING" else None,
                "end_time": _milliseconds(ended) if status not in ("PENDING", "RUNNING") else None,
                "metadata": {},
            }
        )
    return found


def _slurm_log(job_id: str, target: Target) -> str:
    number = job_id.rpartition("-")[2]
    told = re.search(r"\bStdOut=(\S+)", command(["scontrol", "show", "job", number, "--oneliner"], target))
    if told is None:
        raise UserError(f"{target.where}: Slurm does not say where the log of {job_id} is: look for *-{number}.log")
    try:
        with open(told[1], "rb") as file:
            return file.read(MAX_LOG_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"{target.where}: {Path(told[1])}: {str(error.strerror).lower()}") from None


def _cancel(job_id: str, target: Target) -> None:
    """End a job of Slurm: one that runs by a signal to its script alone, so that Ray is there until it has saved."""
    number = job_id.rpartition("-")[2]
    runs = "RUNNING" in command(["squeue", "--noheader", "--jobs", number, "--format=%T"], target).split()
    command(["scancel", *(["--batch", "--signal=TERM"] if runs else []), number], target)


def _milliseconds(text: Any) -> int | None:
    """ISO 8601 as Unix milliseconds; a time without a zone is this machine's. None for what is not a time."""
    try:
        return round(datetime.datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp() * 1000)
    except ValueError:
        return None


TOOLS: dict[type, Tool] = {
    KubeRayCluster: Tool(_rayjobs, _rayjob_log, _delete_rayjob),
    SlurmCluster: Tool(_slurm_jobs, _slurm_log, _cancel),
}
