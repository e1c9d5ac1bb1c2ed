"""The life cycle of a run: its status, and how to proceed if a run of its name already exists.

A name stands for one job: `claim` skips a finished run, resumes an unfinished one and refuses different settings;
`begin` and `end` write the status of an attempt, under the lock of the folder. Times are Unix seconds.
"""

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar, get_args

from slimray import storage
from slimray.credentials import redact
from slimray.runs.checkpoints import sweep_orphans
from slimray.runs.folder import (
    FILES,
    FOLDERS,
    MARKER,
    MAX_STATE_BYTES,
    DamagedFile,
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
from slimray.runs.lock import drop_damaged_lock, hold, is_alive, is_me, occupied, read_lock, taken_over
from slimray.spec import RunFailed, UserError, shown
from slimray.storage import join

State = Literal["queued", "running", "finished", "failed"]
LAST_TIME = 253402300799  # the end of the year 9999
MAX_MESSAGE = 2000  # characters of a message in a listing
T = TypeVar("T")


@dataclass(frozen=True)
class Status:
    """Progress of a run. `attempt` counts from 1; `heartbeat` is when a running one last reported progress."""

    state: State
    attempt: int
    heartbeat: float
    message: str
    started: float
    updated: float


@dataclass(frozen=True)
class Claim:
    """Next step for a run of this name: nothing if `finished`, else the `attempt` to begin (1 is a new start)."""

    finished: bool
    attempt: int


def read_status(run: Run) -> Status | None:
    """Return the status of a run, None if it has not begun; the heartbeat of a running one comes from its lock.

    Raises DamagedFile if status.json does not hold what slimray writes.
    """
    found = read_json(run, "status.json", MAX_STATE_BYTES, complaint="is not the status of a run")
    if found is None:
        return None
    try:
        status = Status(**{field: found[field] for field in Status.__dataclass_fields__})
    except KeyError:
        status = None
    if status is None or not _is_status(status):
        raise DamagedFile(f"{join(run.uri, 'status.json')}: is not the status of a run") from None
    try:
        owner = read_lock(run) if status.state == "running" else None
    except UserError:
        owner = None  # `claim` reports the damaged lock
    if owner is None or not is_time(owner.heartbeat):
        return status
    return replace(status, heartbeat=max(status.heartbeat, owner.heartbeat))


def _is_status(status: Status) -> bool:
    times = (status.heartbeat, status.started, status.updated)
    fits = status.state in get_args(State) and isinstance(status.message, str)
    return fits and type(status.attempt) is int and status.attempt >= 0 and all(map(is_time, times))


def is_time(value: Any) -> bool:
    """Return whether `value` is a time in Unix seconds, up to the end of the year 9999."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LAST_TIME


def describe(run: Run) -> dict[str, Any]:
    """Return one line about a run for tables and programs: name, kind, state, result, updated (ISO, UTC), message.

    A run whose status is running but whose writer is gone is `stopped`. One whose files cannot be read is `damaged`,
    with the reason as its message; the content of a folder never raises an error.
    """
    problems: list[str] = []

    def part(read: Callable[[Run], T], default: T) -> T:
        try:
            return read(run)
        except (UserError, RunFailed) as error:
            problems.append(str(error))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
            problems.append(f"is not a run folder that slimray wrote ({type(error).__name__}: {error})")
        return default

    status = part(read_status, None)
    card = part(read_card, None) or {}
    job = part(lambda run: read_job(run) if exists(run, "job.yaml") else {}, {})
    state: str = status.state if status else "queued"
    if state == "running" and not part(lambda run: is_alive(read_lock(run)), False):
        state = "stopped"
    kind = job.get("kind")
    return {
        "name": run.name,
        "kind": kind if isinstance(kind, str) else None,
        "state": "damaged" if problems else state,
        "result": part(lambda _: _best(card), None),
        "updated": None if status is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(status.updated)),
        "message": shown(problems[0] if problems else status.message if status else "")[:MAX_MESSAGE],
        "uri": run.uri,
    }


SCORES = ("miou", "top1", "class_found_3d")  # for cards that do not name their metric


def _best(card: Mapping[str, Any]) -> str | None:
    """Return the best score of a finished run as text (name, value, unit); None if its card has none."""
    metrics = card.get("metrics")
    if not isinstance(metrics, dict):
        return None
    rows = [metrics.get("best"), *(metrics["rows"] if isinstance(metrics.get("rows"), list) else [])]
    metric = card.get("metric")
    named = metric if isinstance(metric, dict) else {}
    names = [named["name"]] if isinstance(named.get("name"), str) else SCORES
    found = [
        (row[key], name)
        for row in rows
        for name in names
        for key in (f"val/{name}", name)
        if isinstance(row, dict) and _is_score(row.get(key))
    ]
    best = (min if named.get("better") == "lower" else max)(found, default=None)
    if best is None:
        return None
    unit = str(named.get("unit", "%"))
    return f"{best[1]} {best[0]:.1f} %" if unit == "%" else f"{best[1]} {best[0]:.4g} {unit}".rstrip()


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def claim(
    run: Run,
    document: Mapping[str, Any],
    restart: bool = False,
    may_change: Sequence[str] = (),
    completed: Callable[[dict[str, Any]], Mapping[str, Any]] = dict,
    submission: str = "",
) -> Claim:
    """Return how to proceed with the job `document` in the folder of its name; clears the folder on `restart`.

    A `submission` clears the folder only once: a scheduler that starts it again after a preemption resumes the run.

    An empty folder gives attempt 1. The same job, apart from sections in `may_change`, is skipped if it is finished,
    and otherwise gets the next attempt. `completed` adds to the stored job the fields that did not exist in the version
    that wrote it. Raises UserError for different settings (naming the fields), while another process writes, for
    damaged files, and for a folder that slimray did not create.
    """
    if restart and not (submission and _submission_of(run) == submission):
        if _require_ours(run):
            drop_damaged_lock(run)
            with hold(run):
                clear(run)
        return Claim(False, 1)
    try:
        status = read_status(run)
        old = read_job(run) if exists(run, "job.yaml") else None
    except (DamagedFile, UserError) as error:
        if not _has_mark(run):
            raise _foreign(run, "job.yaml" if exists(run, "job.yaml") else "status.json") from None
        raise UserError(
            f"{error}: the run is damaged: restore the file, or use --restart to clear it and start over"
        ) from None
    if old is None and status is None:
        if not _require_ours(run):
            return Claim(False, 1)
        raise UserError(
            f"run {run.name!r} has lost its job.yaml and status.json: clear it with --restart to start over"
        )
    changes: list[str] = []
    if old is not None:
        new = redact(plain(document))
        changes = list(_differences(old, new, may_change))
        changes = changes and list(_differences(redact(plain(completed(old))), new, may_change))
    if changes:
        if not _has_mark(run):
            raise _foreign(run, "job.yaml")
        told = "; ".join(changes[:8]) + (f"; and {len(changes) - 8} more" if len(changes) > 8 else "")
        raise UserError(
            f"run {run.name!r} exists with other settings ({told}): choose another name, or clear it with --restart"
        )
    if status is not None and status.state == "finished":
        return Claim(True, status.attempt)
    owner = read_lock(run)
    if is_alive(owner):
        raise occupied(run, owner)
    return Claim(False, status.attempt + 1 if status is not None else 1)


def _require_ours(run: Run) -> bool:
    """Return whether the folder holds a run, in whatever state; raise UserError if it holds other files."""
    if _has_mark(run):
        return True
    there = [name for name in (*FILES, *FOLDERS) if exists(run, name)]
    if there:
        raise _foreign(run, there[0])
    return False


def _foreign(run: Run, name: str) -> UserError:
    return UserError(
        f"{run.uri}: holds a {name} that does not belong to a run of slimray and is left alone: choose another name "
        "or another --storage"
    )


def _has_mark(run: Run) -> bool:
    """Return whether slimray made the folder, judging by its marker or, for older runs, by status.json and job.yaml."""
    if exists(run, MARKER):
        return True
    name = re.escape(run.name.encode())
    marks = {
        "status.json": (rb'"state": ', rb'"attempt": ', rb'"heartbeat": '),
        "job.yaml": (rb"^kind: [a-z_]+\s*$", rb"^name: ['\"]?" + name + rb"['\"]?\s*$"),
    }
    for file, patterns in marks.items():
        try:
            text = storage.read_bytes(run.fs, join(run.path, file), first=MAX_STATE_BYTES)
        except FileNotFoundError:
            continue
        if all(re.search(pattern, text, re.MULTILINE) for pattern in patterns):
            return True
    return False


def clear(run: Run) -> None:
    """Delete what slimray wrote into the run folder, and nothing else. Only under `hold`; may be repeated."""
    now = time.time()
    _write_status(run, Status("queued", 0, now, "being cleared", now, now))  # or half a run could look finished
    for name in (*FOLDERS, *FILES[2:], "job.yaml", "status.json", MARKER):
        storage.delete(run.fs, join(run.path, name))


def _submission_of(run: Run) -> str:
    """Return the submission that began the run, as recorded in its marker; "" if none is."""
    try:
        text = storage.read_bytes(run.fs, join(run.path, MARKER), first=MAX_STATE_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return text.partition("submission: ")[2].strip()


def begin(run: Run, document: Mapping[str, Any], attempt: int, submission: str = "") -> None:
    """Write the job, mark `attempt` of `submission` as running, and delete incomplete checkpoints. Only under `hold`.

    Raises UserError if another process has begun or finished this attempt since it was claimed.
    """
    before = read_status(run)
    if before is not None and (before.attempt >= attempt or before.state == "finished"):
        raise UserError(
            f"run {run.name!r} was begun by another process in the meantime and is {before.state}: "
            "start the command again"
        )
    sweep_orphans(run)
    if submission or not exists(run, MARKER):
        text = "This folder is written by slimray; `slimray run --restart` clears it.\n"
        write_file(run, MARKER, (text + (f"submission: {submission}\n" if submission else "")).encode())
    write_job(run, document)
    now = time.time()
    _write_status(run, Status("running", attempt, now, "", now, now))


def end(run: Run, state: State, message: str = "") -> None:
    """Write the final state of the attempt; raise RunFailed and write nothing if another process took over the run."""
    now, owner, before = time.time(), None, None
    with contextlib.suppress(UserError):  # the lock was overwritten; the end of the attempt is written all the same
        owner = read_lock(run)
    with contextlib.suppress(DamagedFile):
        before = read_status(run)
    if owner is not None and not is_me(owner):
        raise RunFailed(taken_over(run, owner))
    _write_status(
        run, Status(state, before.attempt if before else 1, now, message, before.started if before else now, now)
    )


def note(run: Run, message: str) -> None:
    """Write `message` into the status of a running run; do nothing for others. Only under `hold`."""
    status = read_status(run)
    if status is not None and status.state == "running":
        _write_status(run, replace(status, message=message, updated=time.time()))


def _write_status(run: Run, status: Status) -> None:
    write_file(run, "status.json", to_json(asdict(status)))


def _differences(old: Any, new: Any, may_change: Sequence[str], field: str = "") -> Iterator[str]:
    """Yield `field: old -> new` for each field that differs between two documents outside `may_change`."""
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
