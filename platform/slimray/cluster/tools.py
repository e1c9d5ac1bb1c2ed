"""List, follow and stop jobs on Kubernetes and Slurm with their own tools, in the form that Ray's Jobs API uses.

The output of a tool becomes the fields of a job that `status`, `logs` and `stop` read: submission_id, status (as Ray
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
)  # of Slurm; all others are PENDING, including those of preempted and requeued jobs


def command(words: Sequence[str], target: Target, text: str | None = None) -> str:
    """Return the output of a tool; UserError, with its last line, if it is not installed, fails or takes too long."""
    if shutil.which(words[0]) is None:
        raise UserError(
            f"{target.where}: {words[0]} is not installed here: run `{' '.join(words)}` on a machine that has it"
        )
    try:
        done = subprocess.run(list(words), input=text, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{target.where}: `{' '.join(words)}` does not respond: check that the cluster is reachable from here"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or f"code {done.returncode}").splitlines()[-1]
        raise UserError(f"{target.where}: `{' '.join(words)}`: {reason}")
    return done.stdout


@dataclass(frozen=True)
class Tool:
    """Three functions for a cluster: list its jobs, read the log of one, stop one."""

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
    if "Failed" in deployed and status in ("PENDING", "RUNNING"):  # KubeRay gave up; the status is Ray's last
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
    """Return the jobs of this user, including recently ended ones; Slurm's job number replaces that of the attempt."""
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
        raise UserError(f"{target.where}: Slurm does not report the log of {job_id}: look for a file *-{number}.log")
    try:
        with open(told[1], "rb") as file:
            return file.read(MAX_LOG_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"{target.where}: {Path(told[1])}: {str(error.strerror).lower()}") from None


def _cancel(job_id: str, target: Target) -> None:
    """Stop a Slurm job; a running one by a signal to its script alone, so that Ray stays up until it has saved."""
    number = job_id.rpartition("-")[2]
    runs = "RUNNING" in command(["squeue", "--noheader", "--jobs", number, "--format=%T"], target).split()
    command(["scancel", *(["--batch", "--signal=TERM"] if runs else []), number], target)


def _milliseconds(text: Any) -> int | None:
    """Return an ISO 8601 time as Unix milliseconds, in local time if it has no zone; None if it is not a time."""
    try:
        return round(datetime.datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp() * 1000)
    except ValueError:
        return None


TOOLS: dict[type, Tool] = {
    KubeRayCluster: Tool(_rayjobs, _rayjob_log, _delete_rayjob),
    SlurmCluster: Tool(_slurm_jobs, _slurm_log, _cancel),
}
