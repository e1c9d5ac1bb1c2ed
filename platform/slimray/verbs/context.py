"""What every verb is handed besides its job: the claimed run folder, where runs lie, where to speak."""

import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console

import slimray
from slimray import runs


@dataclass(frozen=True)
class Context:
    """A claimed run while its verb works on it. `where` names the job in messages (`jobs/x.yaml (name)`).

    `cpus` are the logical CPUs that a local cluster gets: enough for this job and those that follow in its file.
    `tell` hands an event ({"state": "preempted", "message": ...}) to whoever the job notifies.
    """

    run: runs.Run
    storage: str
    attempt: int
    where: str
    console: Console
    cpus: int
    tell: Callable[[Mapping[str, Any]], None] = lambda event: None
    started: float = field(default_factory=time.time)

    def finish(self, card: dict[str, Any], results: dict[str, Any] | None = None) -> None:
        """Write the run's card (with versions, machine and seconds added) and its results.json."""
        if results is not None:
            runs.write_file(self.run, "results.json", json.dumps(results).encode())
        seconds = round(time.time() - self.started, 1)
        runs.write_card(self.run, card | {"environment": environment(), "seconds": seconds, "attempt": self.attempt})


def environment() -> dict[str, Any]:
    """Versions, machine and git commit, as far as they can be known."""
    import ray

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "slimray": slimray.__version__,
        "git": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "numpy": numpy.__version__,
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "gpu": gpu,
    }


def git_commit() -> str | None:
    """The commit of the working folder, with `+` if it has changes; None outside a repository."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=5, cwd=Path.cwd()
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else None
