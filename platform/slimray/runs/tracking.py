"""Destinations of the metric rows of a run: its own JSONL always, Weights & Biases and TensorBoard on request.

`Tracker` runs on rank 0 and receives rows such as `{"step": 40, "phase": "train", "train/loss": 1.2}`. The id of the
W&B run is drawn once and kept in `tracking.json` of the run folder: a resumed run continues its curve, one cleared by
`--restart` begins a new one. Steps are an ordinary metric there, because W&B refuses steps that go back, as they do
after a resume. Only numbers are sent: credentials are redacted, paths and other texts are not sent unless `media` is
set, and console, code and git are never captured. If a service fails, one warning is logged and it is no longer used;
only a failure to write the JSONL in the run folder may end a run.
"""

import hashlib
import logging
import math
import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from slimray.credentials import HIDDEN, redact
from slimray.runs.folder import MAX_STATE_BYTES, read_json, run_at, to_json, write_file
from slimray.runs.states import read_status
from slimray.spec import Spec

log = logging.getLogger(__name__)


class TrackingSpec(Spec):
    """Services that receive the metrics, in addition to the run folder, which always gets them."""

    wandb: bool = False
    """Send metrics and the redacted job to Weights & Biases; WANDB_API_KEY is read from the environment."""
    project: str = "slimray"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; default: the owner of the API key."""
    mode: Literal["online", "offline"] | None = None
    """`offline` writes to the run folder for a later `wandb sync`; default: WANDB_MODE, else online."""
    tags: tuple[str, ...] = ()
    """W&B tags."""
    media: bool = False
    """Also send file names and other texts that are part of the job or of a row."""
    tensorboard: bool = False
    """Write TensorBoard event files to `tensorboard/` of the run folder."""


class Rows(Protocol):
    """Writer of the rows to the run folder."""

    def write(self, row: Mapping[str, Any], /) -> None: ...


class Tracker:
    """Sink for the metric rows on rank 0; `folder` is the local folder for the files of W&B and TensorBoard.

    `rows` writes the run's own records, `name` and `uri` identify the run, `job` is the resolved job. Without `folder`,
    files go to the run folder; if that is in a bucket, to a folder in the user's cache, from which `copy` and `close`
    upload them. Raises only what `rows.write` raises.
    """

    def __init__(
        self, spec: TrackingSpec, rows: Rows, name: str, uri: str, job: Mapping[str, Any], folder: Path | None = None
    ):
        self.rows, self.media = rows, spec.media
        self._copied: dict[str, tuple[int, int]] = {}
        self._copies = _folders_to_copy(spec) if folder is None and "://" in uri else ()
        folder = folder or _local_folder(name, uri)
        self._folder, self._uri = folder, uri
        self._wandb: Any = _guarded("W&B", lambda: _start_wandb(spec, name, uri, job, folder)) if spec.wandb else None
        self._board: Any = None
        self._board_folder = folder / "tensorboard" if spec.tensorboard else None

    def log(self, row: Mapping[str, Any]) -> None:
        """Write one row: `step` and any numbers, texts or lists. Services get its finite numbers."""
        self.rows.write(row)
        shown = redact({key: value for key, value in row.items() if self.media or _is_number(value)})
        if self._wandb is not None and not _guarded("W&B", lambda: (self._wandb.log(shown), True)):
            self._wandb = None
        if self._board_folder is not None and not _guarded("TensorBoard", lambda: self._to_board(row)):
            self._board_folder = None

    def copy(self) -> None:
        """Copy event files and offline W&B files that have changed into the run folder, if that is in a bucket."""
        for name in self._copies:
            if not _guarded(f"the copy of {name}/ in the run folder", lambda name=name: self._copy(name)):
                self._copies = tuple(one for one in self._copies if one != name)

    def _copy(self, name: str) -> bool:
        if self._board is not None:
            self._board.flush()
        run = run_at(self._uri)
        for file in sorted((self._folder / name).rglob("*")):
            if file.is_symlink() or not file.is_file():
                continue
            key, found = file.relative_to(self._folder).as_posix(), file.stat()
            if self._copied.get(key) != (found.st_size, found.st_mtime_ns):
                write_file(run, key, file)
                self._copied[key] = (found.st_size, found.st_mtime_ns)
        return True

    def close(self) -> None:
        """Finish the W&B run and the event file; `rows` belongs to the caller and stays open."""
        if self._wandb is not None:
            _guarded("W&B", self._wandb.finish)
        if self._board is not None:
            _guarded("TensorBoard", self._board.close)
        self._board = None
        self.copy()
        self._wandb = self._board = self._board_folder = None

    def _to_board(self, row: Mapping[str, Any]) -> bool:
        if self._board is None:
            from tensorboardX import SummaryWriter

            # purge_step hides what an earlier attempt wrote from this step on, which is done again
            self._board = SummaryWriter(str(self._board_folder), purge_step=row.get("step"))
        for key, value in row.items():
            if key != "step" and _is_number(value):
                self._board.add_scalar(key, value, row.get("step"))
        return True


def run_id(name: str, uri: str) -> str:
    """Return the W&B id of the run at `uri`: the one in its folder, or for runs of older versions a derived one.

    The derived id consists of the run's name and a digest of its name and URI.
    """
    kept = _kept_id(uri)
    return kept or f"{name[:100]}-{hashlib.sha256(f'{name} {uri}'.encode()).hexdigest()[:10]}"


def _kept_id(uri: str) -> str | None:
    found = read_json(run_at(uri), "tracking.json", MAX_STATE_BYTES)
    kept = None if found is None else found.get("wandb_id")
    return kept if isinstance(kept, str) and re.fullmatch(r"[\w.-]{1,128}", kept) else None


def _draw_id(name: str, uri: str) -> str:
    """Return a new W&B id after storing it in the run folder."""
    drawn = f"{name[:100]}-{uuid.uuid4().hex[:10]}"
    write_file(run_at(uri), "tracking.json", to_json({"wandb_id": drawn}))
    return drawn


def _without_paths(value: Any) -> Any:
    """Return `value` with every string that contains a slash or backslash (paths, URIs) replaced by `***`."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    return HIDDEN if isinstance(value, str) and ("/" in value or "\\" in value) else value


def _start_wandb(spec: TrackingSpec, name: str, uri: str, job: Mapping[str, Any], folder: Path) -> Any:
    """Start or resume the W&B run; if it was deleted online, begin a new one, as W&B never accepts its id again."""
    folder.mkdir(parents=True, exist_ok=True)
    status = read_status(run_at(uri))
    resumed = status is not None and status.attempt > 1  # without a stored id, an older version began the run
    known = run_id(name, uri) if resumed or _kept_id(uri) else _draw_id(name, uri)
    try:
        run = _init_wandb(spec, known, name, job, folder)
    except Exception as error:
        if "deleted" not in str(error):
            raise
        log.warning("tracking: the W&B run %s was deleted, starting a new one", known)
        run = _init_wandb(spec, _draw_id(name, uri), name, job, folder)
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def _init_wandb(spec: TrackingSpec, run_id: str, name: str, job: Mapping[str, Any], folder: Path) -> Any:
    import wandb

    config = redact(dict(job))
    mode: Any = spec.mode or os.environ.get("WANDB_MODE") or "online"
    return wandb.init(
        id=run_id,
        name=name,
        resume="allow",
        project=spec.project,
        entity=spec.entity,
        tags=spec.tags,
        mode=mode,
        dir=str(folder),
        config=config if spec.media else _without_paths(config),
        settings=wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            host="",
            silent=True,
            init_timeout=30,
            finish_timeout=60,
            x_disable_meta=True,  # host, user, command line
            x_save_requirements=False,
        ),
    )


def _guarded(service: str, action: Callable[[], Any]) -> Any:
    """Return the result of `action`; log a warning and return None if it fails, as tracking must not end a training."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 whatever a service raises
        reason = redact(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        log.warning("tracking: %s is off for this run (%s); metrics/ of the run folder has all rows", service, reason)
        return None


def _folders_to_copy(spec: TrackingSpec) -> tuple[str, ...]:
    offline = spec.wandb and (spec.mode or os.environ.get("WANDB_MODE")) == "offline"
    return (("tensorboard",) if spec.tensorboard else ()) + (("wandb",) if offline else ())


def _local_folder(name: str, uri: str) -> Path:
    if "://" not in uri:
        return Path(uri)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slimray" / "tracking"
    return cache / f"{name[:100]}-{hashlib.sha256(f'{name} {uri}'.encode()).hexdigest()[:10]}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
