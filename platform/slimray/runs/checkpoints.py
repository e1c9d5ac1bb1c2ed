"""Checkpoints of a run: one folder of files per step, complete once its marker `complete.json` is there and matches.

The marker is written last. It holds the writer's metadata, and the size and SHA-256 of every file.
"""

import hashlib
import logging
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slimray import storage
from slimray.runs.folder import (
    MAX_STATE_BYTES,
    DamagedFile,
    Run,
    digest,
    is_plain_name,
    read_file,
    read_json,
    to_json,
    write_file,
)
from slimray.spec import RunFailed
from slimray.storage import StorageError, join

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its step, its writer's metadata, and the sizes and digests of its files."""

    step: int
    meta: dict[str, Any]
    files: dict[str, dict[str, Any]]


def save_checkpoint(run: Run, step: int, files: Mapping[str, bytes | Path], meta: Mapping[str, Any]) -> None:
    """Write checkpoints/step_<step>/: first `files` (name -> bytes, or a local file that is streamed), then its marker.

    `meta` (JSON) may hold "epoch" and "metrics"; `keep` finds the best checkpoint by the latter. An existing checkpoint
    of the same step stays intact until the new one is complete.
    """
    folder = _step_folder(step)
    old = _read_marker(run, folder)
    token = f"{uuid.uuid4().hex[:8]}-" if old else ""
    written: dict[str, dict[str, Any]] = {}
    for name, data in files.items():
        size, sha256 = digest(data)
        write_file(run, f"{folder}/{token}{name}", data)
        written[name] = {"file": token + name, "bytes": size, "sha256": sha256}
    write_file(run, f"{folder}/complete.json", to_json({"step": step, "meta": dict(meta), "files": written}))
    for entry in old.files.values() if old else ():
        storage.delete(run.fs, join(run.path, folder, entry["file"]))


def list_checkpoints(run: Run) -> list[Checkpoint]:
    """Return the checkpoints that have a marker, sorted by step, without reading their files."""
    folders = storage.list_folders(run.fs, join(run.path, "checkpoints"))
    found = [_read_marker(run, f"checkpoints/{name}") for name in folders]
    return sorted((one for one in found if one is not None), key=lambda one: one.step)


def worker_hours(run: Run) -> float | None:
    """Return the worker-hours a training has used up to its newest checkpoint; None if it has no checkpoint."""
    newest = list_checkpoints(run)[-1:]
    progress = newest[0].meta.get("progress") if newest else None
    seconds = progress.get("worker_seconds") if isinstance(progress, dict) else None
    return seconds / 3600 if isinstance(seconds, int | float) else None


def checkpoint_at(run: Run, step: int) -> Checkpoint:
    """Return the checkpoint of `step`; raise RunFailed if there is no complete one."""
    found = _read_marker(run, _step_folder(step))
    if found is None:
        raise RunFailed(f"{run.uri}: has no complete checkpoint of step {step}")
    return found


def read_newest(run: Run) -> tuple[Checkpoint, dict[str, bytes]] | None:
    """Return the newest undamaged checkpoint with its files (name -> bytes); None if there is none.

    Damaged checkpoints are skipped with a warning. Each file is read once.
    """
    for checkpoint in reversed(list_checkpoints(run)):
        try:
            return checkpoint, read_checkpoint(run, checkpoint)
        except (StorageError, FileNotFoundError) as error:
            log.warning(
                "run %r: the checkpoint of step %d is damaged and was skipped: %s", run.name, checkpoint.step, error
            )
    return None


def read_checkpoint(run: Run, checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return name -> bytes of its files; raise StorageError or FileNotFoundError if one is damaged or missing."""
    return {name: _read_verified(run, checkpoint, name) for name in checkpoint.files}


def keep(run: Run, metric: str | None = None, last: int = 2, mode: Literal["max", "min"] = "max") -> None:
    """Delete all checkpoints except the newest `last` (at least 1) and the best by `meta["metrics"][metric]`.

    Of equal ones the earliest counts as the best, because later ones may carry the numbers of an older validation.
    """
    found = list_checkpoints(run)
    stay = {one.step for one in found[-max(1, last) :]}
    sign = 1 if mode == "min" else -1
    scores = [(_score(one, metric), one.step) for one in found]
    stay |= {step for _, step in sorted((sign * score, step) for score, step in scores if score == score)[:1]}
    for one in found:
        if one.step not in stay:
            _delete_checkpoint(run, _step_folder(one.step))


def _score(checkpoint: Checkpoint, metric: str | None) -> float:
    """Return the metric stored with a checkpoint; NaN, which is never the best, if it is not a number."""
    metrics = checkpoint.meta.get("metrics")
    value = metrics.get(metric) if isinstance(metrics, dict) else None
    return float(value) if isinstance(value, int | float) else float("nan")


def drop_after(run: Run, step: int) -> None:
    """Delete the checkpoints after `step`: damaged ones a resume skipped, which `keep` would count as the newest."""
    for one in list_checkpoints(run):
        if one.step > step:
            _delete_checkpoint(run, _step_folder(one.step))


def sweep_orphans(run: Run) -> list[str]:
    """Delete checkpoint folders without a valid marker, left by a crash, and return their names. Only under `hold`.

    Raises StorageError, and keeps the folder, if the storage fails while the marker is read.
    """
    folders = storage.list_folders(run.fs, join(run.path, "checkpoints"))
    orphans = [
        name for name in folders if re.fullmatch(r"step_\d{9,}", name) and _is_orphan(run, f"checkpoints/{name}")
    ]
    for name in orphans:
        _delete_checkpoint(run, f"checkpoints/{name}")
    return orphans


def _is_orphan(run: Run, folder: str) -> bool:
    try:
        return _load_marker(run, folder) is None
    except DamagedFile:
        return True


def _delete_checkpoint(run: Run, folder: str) -> None:
    storage.delete(run.fs, join(run.path, folder, "complete.json"))  # first, so that a partly deleted one is an orphan
    storage.delete(run.fs, join(run.path, folder))


def _step_folder(step: int) -> str:
    return f"checkpoints/step_{step:09d}"


def _read_marker(run: Run, folder: str) -> Checkpoint | None:
    """Return the checkpoint of a marker; None if there is none, and None with a warning if it cannot be read."""
    try:
        return _load_marker(run, folder)
    except StorageError as error:
        log.warning("%s: the checkpoint was skipped, its marker cannot be read: %s", join(run.uri, folder), error)
        return None


def _load_marker(run: Run, folder: str) -> Checkpoint | None:
    """Like `_read_marker`, but raise DamagedFile for an invalid marker and StorageError if the storage fails."""
    found = read_json(run, f"{folder}/complete.json", MAX_STATE_BYTES)
    try:
        return None if found is None else _checked(found, folder)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(
            f"{join(run.uri, folder, 'complete.json')}: is not a valid checkpoint marker ({error})"
        ) from None


def _checked(found: Mapping[str, Any], folder: str) -> Checkpoint:
    """Return the checkpoint of a marker; raise KeyError, TypeError or ValueError if fields are missing or invalid.

    The files it lists must be in `folder`.
    """
    step, meta, files = found["step"], found["meta"], found["files"]
    if type(step) is not int or _step_folder(step) != folder:
        raise ValueError(f"its step is {step!r}")
    if not isinstance(meta, dict) or not isinstance(files, dict):
        raise TypeError("meta or files is not a mapping")
    for name, entry in files.items():
        if not is_plain_name(name) or not is_plain_name(entry["file"]) or entry["file"] == "complete.json":
            raise ValueError(f"{entry['file']!r} is not a valid name for a file of the checkpoint")
        if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise TypeError(f"size or digest of {name} has the wrong type")
    return Checkpoint(step, meta, files)


def _read_verified(run: Run, checkpoint: Checkpoint, name: str) -> bytes:
    entry = checkpoint.files[name]
    data = read_file(run, f"{_step_folder(checkpoint.step)}/{entry['file']}")
    if len(data) != entry["bytes"]:
        raise StorageError(f"{name} has {len(data)} bytes instead of {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise StorageError(f"{name} has changed since it was written (SHA-256 differs)")
    return data
