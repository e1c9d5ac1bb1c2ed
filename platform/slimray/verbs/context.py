"""Arguments and results of a verb's functions: `Context` for `run`, `CheckContext` for `check`, `Made` for `makes`.

`makes(job)` of a verb names the runs that a job leaves behind, each with a `Made`: what later jobs can know of it
before it exists. A consumer checks what a run holds, a dataset or a network, never which verb wrote it. No Ray, no
torch.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy
from rich.console import Console

import slimray
from slimray import runs
from slimray.data.spec import DataSpec
from slimray.spec import UserError, noting
from slimray.verbs.inputs import in_words

What = Literal["dataset", "network", "supernet", "export", "table"]


@dataclass(frozen=True)
class Made:
    """Description of a run before it exists, for the jobs that will read it.

    `what` is its content: a dataset, a network, a supernet, exports of a network, or tables of numbers. `card` is the
    dataset card (with the task), None if it is known only once the run that this one reads exists. For a dataset:
    `splits`, and `samples` by split as far as known; if `counted`, these are the files that `check` counts, one sample
    each. For a network: the `data` section that defines its samples. For a supernet: the number of training samples
    `held_out`. A run that is `like` another one has that run's card and data.
    """

    what: What
    card: Mapping[str, Any] | None = None
    data: DataSpec | None = None
    splits: tuple[str, ...] = ()
    samples: Mapping[str, int] = field(default_factory=dict)
    counted: bool = False
    held_out: int = 0
    like: str | None = None

    def resolved(self, ahead: "Mapping[str, Made]") -> "Made":
        """Return a copy with card and data of the run that it is `like`, if that is one of those `ahead`."""
        other = ahead.get(self.like or "")
        return self if other is None else replace(self, card=other.card, data=other.data)

    def with_samples(self, samples: Mapping[str, int] | None) -> "Made":
        """Return a copy with the numbers of listed files by split that `check` found, if each file is one sample."""
        return replace(self, samples=samples) if self.counted and samples is not None else self


def trained_on(data: DataSpec, what: What = "network", held_out: int = 0) -> Made:
    """Return the `Made` of a training on `data`: a network, or a supernet with samples held out."""
    return Made(what, data.card if isinstance(data.card, dict) else None, data, held_out=held_out)


@dataclass(frozen=True)
class CheckContext:
    """A job while it is checked: `where` it is written, the `storage` of its runs, and `ahead`, the runs that earlier
    jobs of its file make.

    With `look`, a few files of each split are opened. `problems` collects the problems found, a line each.
    """

    where: str
    storage: str
    ahead: Mapping[str, Made] = field(default_factory=dict)
    look: bool = False
    problems: list[str] = field(default_factory=list)

    def noting(self) -> contextlib.AbstractContextManager[None]:
        """Turn a UserError inside the block into a problem, so that the remaining checks still run."""
        return noting(self.problems, self.where)

    def require(self, name: str, what: tuple[What, ...], field: str) -> Made | None:
        """Return the `Made` of the run `name`, which `field` reads; None if no earlier job makes it.

        UserError if it will hold something other than one of `what`.
        """
        made = self.ahead.get(name)
        if made is not None and made.what not in what:
            wanted = " or ".join(map(in_words, what))
            raise UserError(f"{field}: {name!r} will hold {in_words(made.what)}, not {wanted}")
        return made


@dataclass(frozen=True)
class Context:
    """A claimed run while its verb works on it. `where` names the job in messages (`jobs/x.yaml (name)`).

    `cpus` is the number of logical CPUs of a local cluster: enough for this job and those that follow in its file.
    `energy` returns the energy that this machine has used since the start (see slimray.runtime.energy), if it can be
    measured. `tell` passes an event ({"state": "preempted", "message": ...}) to the notification target of the job.
    """

    run: runs.Run
    storage: str
    attempt: int
    where: str
    console: Console
    cpus: int
    tell: Callable[[Mapping[str, Any]], None] = lambda event: None
    started: float = field(default_factory=time.time)
    energy: Callable[[], Mapping[str, Any]] = dict

    def finish(self, card: dict[str, Any], results: dict[str, Any] | None = None) -> None:
        """Write the run's card (with versions, machine, seconds and energy added) and its results.json."""
        if results is not None:
            runs.write_file(self.run, "results.json", json.dumps(results).encode())
        seconds = round(time.time() - self.started, 1)
        told = {"environment": environment(), "seconds": seconds, "attempt": self.attempt}
        energy = self.energy()
        runs.write_card(self.run, card | told | ({"energy": dict(energy)} if energy else {}))


def environment() -> dict[str, Any]:
    """Return versions, machine and git commit, as far as they can be determined."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "slimray": slimray.__version__,
        "git": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": importlib.metadata.version("ray") if importlib.util.find_spec("ray") else None,
        "numpy": numpy.__version__,
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "gpu": gpu,
    }


def git_commit() -> str | None:
    """Return the commit of the working folder, with `+` if it has changes; None outside a repository."""
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
