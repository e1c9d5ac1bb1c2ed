"""From a YAML file to a run: load, resolve, check, run. A job is one document; its `kind` names its verb.

`load` reads the documents of the files, applies `extends:` and `--set`, and embeds the dataset cards, so that a job
says everything about itself. `check` finds what can be found before machines are asked for. `run` claims the run folder
(same name: finished is skipped, unfinished resumes, other settings are refused), does the work and leaves the folder
in a state that says what happened.
"""

import contextlib
import copy
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import slimray
from slimray import runs, workers
from slimray.jobs import evaluate, inputs, prepare, train
from slimray.jobs.context import Context
from slimray.spec import RunFailed, Spec, UserError, did_you_mean, lookup, parse, read_yaml, set_value
from slimray.storage import StorageError

Job = prepare.PrepareJob | train.TrainJob | evaluate.EvaluateJob

SPECS: dict[str, type[Spec]] = {
    "prepare": prepare.PrepareJob,
    "train": train.TrainJob,
    "evaluate": evaluate.EvaluateJob,
}
VERBS = {"prepare": prepare.run, "train": train.run, "evaluate": evaluate.run}
MAY_CHANGE = ("scale", "tracking", "checkpoint")  # sections that a resumed run may have changed


@dataclass(frozen=True)
class Loaded:
    """A job with the words that name it in messages."""

    job: Any
    where: str

    @property
    def document(self) -> dict[str, Any]:
        """The resolved job: all defaults explicit, the dataset card embedded."""
        return self.job.model_dump(mode="json", by_alias=True)


def packaged(folder: str) -> Path:
    """The folder `jobs` or `datasets` that came with slimray: of the checkout, else of the installed package."""
    package = Path(slimray.__file__).resolve().parent
    checkout = package.parents[1] / folder
    return (
        checkout if (checkout / "..").resolve().joinpath("pyproject.toml").is_file() else package / "examples" / folder
    )


def load(paths: Sequence[str | Path], sets: Sequence[str] = ()) -> list[Loaded]:
    """Read, complete and parse the documents of `paths` in order; UserError with file and field otherwise."""
    documents: list[tuple[Path, dict[str, Any]]] = []
    by_name: dict[str, dict[str, Any]] = {}
    for path in map(Path, paths):
        for document in read_yaml(path):
            merged = _extend(document, by_name, str(path))
            by_name[str(merged.get("name"))] = merged
            documents.append((path, merged))
    if not documents:
        raise UserError(f"{', '.join(map(str, paths))}: holds no job")
    for assignment in sets:
        _set([document for _, document in documents], assignment)
    loaded: list[Loaded] = []
    prepared: dict[str, dict[str, Any]] = {}
    for path, document in documents:
        one = _parse(document, path, prepared)
        if any(one.job.name == other.job.name for other in loaded):
            raise UserError(f"{path}: name: {one.job.name!r} is used twice")
        if isinstance(one.job, prepare.PrepareJob) and isinstance(one.job.data.card, dict):
            prepared[one.job.name] = one.job.data.card
        loaded.append(one)
    return loaded


def _parse(document: dict[str, Any], path: Path, prepared: dict[str, dict[str, Any]]) -> Loaded:
    kind, name = document.get("kind"), document.get("name")
    where = f"{path} ({name})" if name else str(path)
    if not isinstance(kind, str):
        raise UserError(f"{where}: kind: is required, one of {', '.join(SPECS)}")
    try:
        spec = lookup(SPECS, kind, "kind")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    job = parse(spec, document, where)
    if not _is_name(job.name):  # type: ignore[attr-defined]
        raise UserError(f"{where}: name: letters, digits, '.', '_' and '-' only, as it becomes a folder")
    data = getattr(job, "data", None)
    if data is not None:
        search = [
            path.resolve().parent,
            path.resolve().parent.parent / "datasets",
            Path("datasets"),
            packaged("datasets"),
        ]
        job = job.model_copy(update={"data": inputs.embed(data, where, search, prepared)})
    return Loaded(job, where)


def _is_name(name: str) -> bool:
    return bool(name) and name[0] not in ".-" and all(c.isalnum() or c in "._-" for c in name) and name.isascii()


def _extend(document: dict[str, Any], by_name: dict[str, dict[str, Any]], where: str) -> dict[str, Any]:
    """`extends: NAME` copies an earlier document of the same command and lays this one over it, field by field."""
    if "extends" not in document:
        return document
    parent = document["extends"]
    if parent not in by_name:
        raise UserError(f"{where}: extends: {parent!r} is no earlier document{did_you_mean(str(parent), by_name)}")
    return _merge(by_name[parent], {k: v for k, v in document.items() if k != "extends"})


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def _set(documents: list[dict[str, Any]], assignment: str) -> None:
    """Apply one --set to the documents it can mean: `NAME:a.b=c` to one, `a.b=c` to all whose kind has section `a`."""
    target, colon, rest = assignment.partition(":")
    if colon and "=" not in target and "." not in target:
        chosen = [d for d in documents if d.get("name") == target]
        if not chosen:
            names = [str(d.get("name")) for d in documents]
            raise UserError(f"--set {assignment}: no document is named {target!r}{did_you_mean(target, names)}")
    else:
        rest, section = assignment, assignment.partition("=")[0].split(".")[0].strip()
        chosen = [d for d in documents if section in getattr(SPECS.get(str(d.get("kind"))), "model_fields", {})]
        if rest.startswith("data.root") and len(chosen) > 1:  # a document that reads a run has its root from there
            chosen = [d for d in chosen if "card" in (d.get("data") or {})]
        if not chosen:
            raise UserError(f"--set {assignment}: no document has a section {section!r}")
    for document in chosen:
        set_value(document, rest)


# ------------------------------------------------------------------------------------------------ check and run


def check(loaded: Sequence[Loaded], storage: str) -> list[dict[str, Any]]:
    """Validate everything that can be known now and return the facts of each job, in order."""
    ahead = {one.job.name for one in loaded}
    out = []
    for one in loaded:
        facts: dict[str, Any] = {"name": one.job.name, "kind": one.job.kind}
        if isinstance(one.job, train.TrainJob):
            facts |= _check_train(one, storage, ahead)
        elif isinstance(one.job, evaluate.EvaluateJob):
            for name in one.job.runs:
                if name not in ahead:
                    runs.find_run(name, storage)
            facts |= {"runs": list(one.job.runs), "views": one.job.clips * one.job.crops}
        else:
            facts |= prepare.facts(one.job, one.where)
        out.append(facts)
    return out


def _check_train(one: Loaded, storage: str, ahead: set[str]) -> dict[str, Any]:
    job: train.TrainJob = one.job
    try:
        if job.data.run in ahead and isinstance(job.data.card, dict):
            card = parse(inputs.cards.Card, job.data.card, one.where)
            return train.facts(job, None, card)
        splits = inputs.open_splits(job.data, one.where, storage, train.split_names(job))
        return train.facts(job, splits, splits.card)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(one.where) else f"{one.where}: {text}") from None


def local_cpus(loaded: Sequence[Loaded]) -> int:
    """Logical CPUs with which a local cluster holds every one of the jobs."""
    wanted = [
        one.job.tasks or os.cpu_count() or 1
        if isinstance(one.job, prepare.PrepareJob)
        else workers.local_cpus(one.job.scale)
        for one in loaded
    ]
    return max(wanted, default=1)


def run(one: Loaded, storage: str, console: Console, restart: bool = False, cpus: int = 0) -> str:
    """Do one job; returns "finished" or "skipped". The run folder says what happened, `logs/` of it has the traceback.

    Raises UserError and RunFailed as they come; anything else that goes wrong becomes a RunFailed.
    """
    folder = runs.open_run(storage, one.job.name)
    claim = runs.claim(folder, one.document, restart=restart, may_change=MAY_CHANGE)
    if claim.finished:
        console.print(f"{one.job.name}: already finished, skipped", highlight=False)
        return "skipped"
    with runs.hold(folder):
        runs.begin(folder, one.document, claim.attempt)
        context = Context(folder, storage, claim.attempt, one.where, console, max(cpus, local_cpus([one])))
        started = time.time()
        try:
            VERBS[one.job.kind](one.job, context)
        except BaseException as error:
            _note_failure(folder, claim.attempt, error)
            if isinstance(error, UserError | RunFailed | KeyboardInterrupt):
                raise
            raise RunFailed(_sentence(error)) from error
        runs.end(folder, "finished", "")
    console.print(f"{one.job.name}: done in {time.time() - started:.0f} s", highlight=False)
    return "finished"


def _note_failure(folder: runs.Run, attempt: int, error: BaseException) -> None:
    """Write the traceback to the run's logs and the sentence to its status."""
    text = "".join(traceback.format_exception(error))
    with contextlib.suppress(StorageError):  # the storage itself may be what failed; the sentence is printed anyway
        runs.write_file(folder, f"logs/{attempt:04d}-driver.log", text.encode())
        runs.end(folder, "failed", _sentence(error))


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped by the user"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
