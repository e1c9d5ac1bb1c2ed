"""The life of a run: its status, and what is to be done about a name that is there already.

A name stands for one job: `claim` skips what is finished, resumes what is not and refuses other settings; `begin` and
`end` write the status of an attempt, under the lock of the folder. Times are Unix seconds.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from slimray import storage
from slimray.credentials import redact
from slimray.runs.checkpoints import sweep_orphans
from slimray.runs.folder import (
    FILES,
    FOLDERS,
    Run,
    exists,
    plain,
    read_card,
    read_job,
    read_json,
    to_json,
    write_file,
    write_job,
)
from slimray.runs.lock import hold, is_alive, is_me, occupied, read_lock, taken_over
from slimray.spec import RunFailed, UserError
from slimray.storage import StorageError, join

State = Literal["queued", "running", "finished", "failed"]


@dataclass(frozen=True)
class Status:
    """How far a run is. `attempt` counts from 1; `heartbeat` is the last sign of life of a running one."""

    state: State
    attempt: int
    heartbeat: float
    message: str
    started: float
    updated: float


@dataclass(frozen=True)
class Claim:
    """What is to be done about a run of this name: nothing if `finished`, else the `attempt` to begin (1 = afresh)."""

    finished: bool
    attempt: int


def read_status(run: Run) -> Status | None:
    """Return the state of a run, None if nothing has begun; the heartbeat of a running one is that of its lock."""
    found = read_json(run, "status.json")
    if found is None:
        return None
    try:
        status = Status(**found)
    except TypeError:
        raise StorageError(f"{join(run.uri, 'status.json')}: is no status of a run") from None
    owner = read_lock(run) if status.state == "running" else None
    return status if owner is None else replace(status, heartbeat=max(status.heartbeat, owner.heartbeat))


def describe(run: Run) -> dict[str, Any]:
    """Return one line about a run for tables and programs: name, kind, state, result, updated (ISO, UTC), message.

    A run said to be running whose writer has gone is `stopped`.
    """
    status, card = read_status(run), read_card(run) or {}
    job = read_job(run) if exists(run, "job.yaml") else {}
    state = status.state if status else "queued"
    if state == "running" and not is_alive(read_lock(run)):
        state = "stopped"
    metrics = card.get("metrics") or {}
    rows = [metrics.get("best") or {}, *(metrics.get("rows") or [])]
    found = [
        (row[name], name.removeprefix("val/"))
        for row in rows
        for name in ("val/miou", "miou", "val/top1", "top1")
        if isinstance(row.get(name), int | float)
    ]
    best = max(found, default=None)
    return {
        "name": run.name,
        "kind": job.get("kind"),
        "state": state,
        "result": None if best is None else f"{best[1]} {best[0]:.1f} %",
        "updated": None if status is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(status.updated)),
        "message": status.message if status else "",
        "uri": run.uri,
    }


def claim(
    run: Run,
    document: Mapping[str, Any],
    restart: bool = False,
    may_change: Sequence[str] = (),
    completed: Callable[[dict[str, Any]], Mapping[str, Any]] = dict,
) -> Claim:
    """Say what is to be done for the job `document` in the folder of its name, and clear the folder on `restart`.

    Nothing there: attempt 1. The same job, where sections in `may_change` may differ: skip if finished, else the next
    attempt. Raises UserError for other settings (with the differing fields) and while another process writes.
    `completed` adds to the stored job the fields that the version of slimray that wrote it did not have.
    """
    status = read_status(run)
    old = read_job(run) if exists(run, "job.yaml") else None
    if old is None and status is None:
        return Claim(False, 1)
    if restart:
        with hold(run):
            clear(run)
        return Claim(False, 1)
    before, now = redact(plain(completed(old or {}))), redact(plain(document))
    changes = [] if old is None else list(_differences(before, now, may_change))
    if changes:
        shown = "; ".join(changes[:8]) + (f"; and {len(changes) - 8} more" if len(changes) > 8 else "")
        raise UserError(
            f"run {run.name!r} exists with other settings ({shown}): choose another name, or --restart to clear it"
        )
    if status is not None and status.state == "finished":
        return Claim(True, status.attempt)
    owner = read_lock(run)
    if is_alive(owner):
        raise occupied(run, owner)
    return Claim(False, status.attempt + 1 if status is not None else 1)


def clear(run: Run) -> None:
    """Delete what slimray wrote into the run folder, and nothing else. Only under `hold`; may be repeated."""
    now = time.time()
    _write_status(run, Status("queued", 0, now, "being cleared", now, now))  # else half a run could look finished
    for name in (*FOLDERS, *FILES[2:], "job.yaml", "status.json"):
        storage.delete(run.fs, join(run.path, name))


def begin(run: Run, document: Mapping[str, Any], attempt: int) -> None:
    """Write the job and say that `attempt` runs; sweeps checkpoints that were never completed. Only under `hold`.

    Raises UserError when another process has begun or finished this attempt since it was claimed.
    """
    before = read_status(run)
    if before is not None and (before.attempt >= attempt or before.state == "finished"):
        raise UserError(f"run {run.name!r} was {before.state} by another process meanwhile: start the command again")
    sweep_orphans(run)
    write_job(run, document)
    now = time.time()
    _write_status(run, Status("running", attempt, now, "", now, now))


def end(run: Run, state: State, message: str = "") -> None:
    """Write the final state of the attempt; RunFailed, and nothing written, if another has taken the run over."""
    owner, before, now = read_lock(run), read_status(run), time.time()
    if owner is not None and not is_me(owner):
        raise RunFailed(taken_over(run, owner))
    _write_status(
        run, Status(state, before.attempt if before else 1, now, message, before.started if before else now, now)
    )


def _write_status(run: Run, status: Status) -> None:
    write_file(run, "status.json", to_json(asdict(status)))


def _differences(old: Any, new: Any, may_change: Sequence[str], field: str = "") -> Iterator[str]:
    """`field: old -> new` for each field of two plain documents that differs outside the prefixes `may_change`."""
    if any(field == prefix or field.startswith(prefix + ".") for prefix in may_change) or old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            inner = f"{field}.{key}" if field else str(key)
            yield from _differences(old.get(key), new.get(key), may_change, inner)
    else:
        yield f"{field}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
