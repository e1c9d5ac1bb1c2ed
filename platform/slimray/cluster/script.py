"""Command of a submitted job: a shell script, its files and its environment; the same on every cluster."""

import shlex
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from slimray.cluster.specs import Capacity, Cluster
from slimray.credentials import held
from slimray.spec import UserError

SCRIPT = "run.sh"
LOCK_WAIT_S = 150  # for the lock of a process killed on another machine, which goes stale after 60 s


@dataclass(frozen=True)
class Submission:
    """A checked job to submit: `id` names this attempt, `documents` are resolved, `storage` is an absolute URI.

    `token` is unique per submission; ids are not, they repeat once a cluster has forgotten its earlier jobs.
    """

    id: str
    file: str
    documents: str
    storage: str
    restart: bool = False
    token: str = field(default_factory=lambda: uuid.uuid4().hex)


def run_script(job: Submission, cluster: Cluster) -> str:
    """Return the shell script that runs the job stored beside it: `slimray run`, repeated unless the user must fix it.

    A missing secret ends the script with one sentence and code 2. The loop runs on the cluster, so that nobody has to
    stay connected. Its retries and those of the run's workers are one budget: the run is given the number left, and
    exits with code 3 when its workers have used them up. The run writes to $SLIMRAY_PROGRESS whenever it has saved a
    checkpoint, which restores the whole budget. If the script itself is started again (by Kueue or Slurm), it finds the
    lock of a killed process and waits for it to go stale; --restart clears a run once per submission.
    """
    run = f'python -m slimray.cli run "$(dirname "$0")/"{shlex.quote(job.file)} --storage {shlex.quote(job.storage)}'
    run += f" --wait-s {LOCK_WAIT_S}" + (" --restart" if job.restart else "")
    said = "is not set on this cluster: add it to the environment of its nodes (secrets of the cluster file)"
    guard = [f'test -n "${{{name}:-}}" || {{ echo "{name}: {said}" >&2; exit 2; }}' for name in cluster.secrets]
    return "\n".join(
        [
            "#!/bin/sh",
            *guard,
            *([f"export SLIMRAY_SUBMISSION={shlex.quote(job.token)}"] if job.restart else []),
            f"code=0; left={cluster.retries}; ended=",
            "trap 'ended=1' TERM   # the run ends by itself and is not restarted",
            "SLIMRAY_PROGRESS=$(mktemp); export SLIMRAY_PROGRESS SLIMRAY_RETRIES_LEFT=$left",
            f"{run} || code=$?",
            'while [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "$code" -ne 3 ] && [ -z "$ended" ]; do',
            f'  if [ -s "$SLIMRAY_PROGRESS" ]; then left={cluster.retries}; : > "$SLIMRAY_PROGRESS"; fi',
            '  [ "$left" -gt 0 ] || break',
            '  echo "slimray: the run ended with code $code and is restarted, $left retries are left" >&2',
            "  left=$((left - 1)); code=0; export SLIMRAY_RETRIES_LEFT=$left; sleep 5",
            f"  {run} || code=$?",
            "done",
            'rm -f "$SLIMRAY_PROGRESS"',
            'exit "$code"',
            "",
        ]
    )


def files(job: Submission, cluster: Cluster) -> dict[str, str]:
    """Return the files that the job needs on the cluster besides slimray itself: its documents and its script."""
    return {job.file: job.documents, SCRIPT: run_script(job, cluster)}


def write_files(job: Submission, cluster: Cluster, folder: str) -> list[str]:
    """Return shell lines that write the files of a job to `folder`, which is already quoted."""
    return [
        line
        for name, text in files(job, cluster).items()
        for line in here_document(f"{folder}/{shlex.quote(name)}", text)
    ]


def here_document(path: str, text: str) -> list[str]:
    """Return shell lines that write `text` to `path`, which is already quoted; no line of `text` can end it early."""
    end = "END_OF_FILE"
    while end in text.splitlines():
        end += "_"
    return [f"cat > {path} <<'{end}'", text.rstrip("\n"), end]


def env_vars(cluster: Cluster, have: Capacity | None, values: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the job: `env` and `pass_env` of the cluster file, and the capacity of the cluster.

    Raises UserError if a variable of `pass_env` holds a secret, which would be written out and logged by Ray.
    """
    for name in cluster.pass_env:
        if what := held(values.get(name, "")):
            raise UserError(f"pass_env: {name} holds what looks like a secret ({what}): name it in `secrets` instead")
    grown = {} if have is None else {"SLIMRAY_CLUSTER_CPUS": f"{have.cpus:g}", "SLIMRAY_CLUSTER_GPUS": f"{have.gpus:g}"}
    return grown | dict(cluster.env) | {name: values[name] for name in cluster.pass_env if name in values}
