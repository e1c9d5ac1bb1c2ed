"""The command of a submitted job: a shell script, its files and its environment; the same on every cluster."""

import shlex
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from slimray.cluster.specs import Capacity, Cluster
from slimray.credentials import held
from slimray.spec import UserError

SCRIPT = "run.sh"
LOCK_WAIT_S = 150  # for the lock of a process that was killed on another machine: it goes stale after 60 s


@dataclass(frozen=True)
class Submission:
    """A checked job on its way: `id` names this attempt, `documents` are resolved, `storage` is an absolute URI.

    `token` is another for each submission: ids come again when a cluster has forgotten the jobs of before.
    """

    id: str
    file: str
    documents: str
    storage: str
    restart: bool = False
    token: str = field(default_factory=lambda: uuid.uuid4().hex)


def run_script(job: Submission, cluster: Cluster) -> str:
    """The shell script that does the job beside it: `slimray run`, again while it fails for no fault of the user's.

    A missing secret ends it with one sentence and code 2. The loop lives beside the run, so that nobody has to stay.
    Its retries and those of the run's workers are one budget: a run is told how many are left, and code 3 says that its
    workers have used them up. The run writes into $SLIMRAY_PROGRESS when it has saved a checkpoint: the budget is then
    whole again. Whoever starts the script again (Kueue, Slurm) finds the lock of a process that was killed, and waits
    for it to go stale; --restart clears a run once for each submission.
    """
    run = f'python -m slimray.cli run "$(dirname "$0")/"{shlex.quote(job.file)} --storage {shlex.quote(job.storage)}'
    run += f" --wait-s {LOCK_WAIT_S}" + (" --restart" if job.restart else "")
    said = "is not set on this cluster: put it into the environment of its nodes (secrets of the cluster file)"
    guard = [f'test -n "${{{name}:-}}" || {{ echo "{name}: {said}" >&2; exit 2; }}' for name in cluster.secrets]
    return "\n".join(
        [
            "#!/bin/sh",
            *guard,
            *([f"export SLIMRAY_SUBMISSION={shlex.quote(job.token)}"] if job.restart else []),
            f"code=0; left={cluster.retries}; ended=",
            "trap 'ended=1' TERM   # the run ends by itself, and is not started again",
            "SLIMRAY_PROGRESS=$(mktemp); export SLIMRAY_PROGRESS SLIMRAY_RETRIES_LEFT=$left",
            f"{run} || code=$?",
            'while [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "$code" -ne 3 ] && [ -z "$ended" ]; do',
            f'  if [ -s "$SLIMRAY_PROGRESS" ]; then left={cluster.retries}; : > "$SLIMRAY_PROGRESS"; fi',
            '  [ "$left" -gt 0 ] || break',
            '  echo "slimray: the run ended with code $code and goes on, $left retries are left" >&2',
            "  left=$((left - 1)); code=0; export SLIMRAY_RETRIES_LEFT=$left; sleep 5",
            f"  {run} || code=$?",
            "done",
            'rm -f "$SLIMRAY_PROGRESS"',
            'exit "$code"',
            "",
        ]
    )


def files(job: Submission, cluster: Cluster) -> dict[str, str]:
    """Return what the job needs on the cluster beside slimray itself: the resolved documents, and the script."""
    return {job.file: job.documents, SCRIPT: run_script(job, cluster)}


def write_files(job: Submission, cluster: Cluster, folder: str) -> list[str]:
    """Shell lines that write the files of a job."""
    return [
        line
        for name, text in files(job, cluster).items()
        for line in here_document(f"{folder}/{shlex.quote(name)}", text)
    ]


def here_document(path: str, text: str) -> list[str]:
    """Shell lines that write `text` to `path`, which is quoted already; no line of `text` can end it early."""
    end = "END_OF_FILE"
    while end in text.splitlines():
        end += "_"
    return [f"cat > {path} <<'{end}'", text.rstrip("\n"), end]


def env_vars(cluster: Cluster, have: Capacity | None, values: Mapping[str, str]) -> dict[str, str]:
    """The environment of the job: what the file writes out and passes on, and how far the cluster can grow.

    UserError if a variable of `pass_env` turns out to hold a secret: it would be written out, and Ray would log it.
    """
    for name in cluster.pass_env:
        if what := held(values.get(name, "")):
            raise UserError(f"pass_env: {name} holds what looks like a secret ({what}): name it in `secrets` instead")
    grown = {} if have is None else {"SLIMRAY_CLUSTER_CPUS": f"{have.cpus:g}", "SLIMRAY_CLUSTER_GPUS": f"{have.gpus:g}"}
    return grown | dict(cluster.env) | {name: values[name] for name in cluster.pass_env if name in values}
