"""The run folder: all that one verb leaves for the next, on any storage (`<storage>/<name>/`, a disk or a bucket).

job.yaml (the resolved job), status.json, lock, card.json (final numbers, versions), results.json, report.html, model/,
checkpoints/ and append-only records (metrics/, quarantine/, ...) as immutable numbered JSONL parts, because object
stores cannot append. Everything is bytes, JSON or YAML; nothing is ever unpickled. A name stands for one job: `claim`
skips what is finished, resumes what is not and refuses other settings; `hold` keeps a second writer out.
Times are Unix seconds. A folder is a checkpoint only once its `complete.json`, written last, is there and agrees.
"""

import contextlib
import hashlib
import json
import logging
import os
import random
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs as pafs

from slimray import storage
from slimray.spec import RunFailed, UserError, did_you_mean, dump_yaml, parse_yaml
from slimray.storage import StorageError, join

HEARTBEAT_S = 15.0
STALE_S = 60.0  # a lock whose heartbeat is older belongs to nobody; clocks are assumed to agree within half of it
SETTLE_S = 2.0  # object stores have no exclusive create: write, wait, and whose token then stands has the lock
FLUSH_S = 10.0
FLUSH_ROWS = 1000
MAX_WAITING_ROWS = 100_000
FILES = ("job.yaml", "status.json", "card.json", "results.json", "front.json", "report.html")
FOLDERS = (
    "metrics",
    "quarantine",
    "samples",
    "checkpoints",
    "model",
    "stages",
    "trials",
    "logs",
    "data",
    "tensorboard",
    "wandb",
)

log = logging.getLogger(__name__)

State = Literal["queued", "running", "finished", "failed"]


@dataclass(frozen=True)
class Run:
    """Where one run lies: a filesystem, the path of its folder there, its name, and the URI that names it anywhere."""

    fs: pafs.FileSystem
    path: str
    name: str
    uri: str


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


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its step, what its writer said about it, and sizes and digests of its files."""

    step: int
    meta: dict[str, Any]
    files: dict[str, dict[str, Any]]


# ------------------------------------------------------------------------------------------------ which run


def open_run(where: str, name: str) -> Run:
    """Return the run `name` in the storage folder or URI `where`; it need not exist yet. UserError for a bad name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise UserError(f"run name {name!r}: letters, digits, '.', '_' and '-' only, as it becomes a folder")
    return run_at(join(where, name))


def run_at(uri: str) -> Run:
    """Return the run whose folder is `uri`, a local path or a URI; it need not exist."""
    fs, path = storage.open_uri(uri)
    return Run(fs, path.rstrip("/"), path.rstrip("/").rpartition("/")[2], uri if _is_bucket(uri) else path.rstrip("/"))


def find_run(name_or_uri: str, where: str) -> Run:
    """Return an existing run by name in the storage `where`, or by URI or path; UserError with the closest name."""
    if "/" in name_or_uri:
        run = run_at(name_or_uri)
        if not _is_run(run):
            raise UserError(f"{name_or_uri}: there is no run (it holds neither status.json nor job.yaml)")
        return run
    run = open_run(where, name_or_uri)
    if not _is_run(run):
        names = [run.name for run in list_runs(where)]
        hint = did_you_mean(name_or_uri, names) if names else ", nor any other: --storage says where runs lie"
        raise UserError(f"{where}: no run {name_or_uri!r}{hint}")
    return run


def list_runs(where: str) -> list[Run]:
    """Return all runs of a storage folder, sorted by name; none if the folder is missing."""
    fs, path = storage.open_uri(where)
    names = [name for name in storage.list_folders(fs, path) if not name.startswith(".")]
    uri = where if _is_bucket(where) else path
    runs = [Run(fs, join(path, name), name, join(uri, name)) for name in names]
    with ThreadPoolExecutor(16) as pool:
        return [run for run, found in zip(runs, pool.map(_is_run, runs), strict=True) if found]


def describe(run: Run) -> dict[str, Any]:
    """Return one line about a run for tables and programs: name, kind, state, result, updated (ISO, UTC), message.

    A run said to be running whose writer has gone is `stopped`.
    """
    status, card = read_status(run), read_card(run) or {}
    job = read_job(run) if exists(run, "job.yaml") else {}
    state = status.state if status else "queued"
    if state == "running" and not _is_alive(_read_lock(run)):
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


# ------------------------------------------------------------------------------------------------ its files


def exists(run: Run, name: str) -> bool:
    """Return whether the run has the file or folder `name`."""
    return storage.exists(run.fs, join(run.path, name))


def read_file(run: Run, name: str) -> bytes:
    """Return the file `name` of the run; FileNotFoundError if it has none."""
    return storage.read_bytes(run.fs, join(run.path, name))


def write_file(run: Run, name: str, data: bytes | Path) -> None:
    """Write the file `name` of the run atomically. ValueError for a name that `--restart` would not know to clear."""
    storage.write_atomic(run.fs, join(run.path, _known(name)), data)


def list_names(run: Run, folder: str) -> list[str]:
    """Return the sorted names of the files in `folder` of the run; none if it is missing."""
    return [info.base_name for info in storage.list_files(run.fs, join(run.path, folder))]


def read_job(run: Run) -> dict[str, Any]:
    """Return the resolved job; UserError if the run has none or it is no YAML mapping."""
    try:
        documents = parse_yaml(read_file(run, "job.yaml").decode("utf-8", "replace"), join(run.uri, "job.yaml"))
    except FileNotFoundError:
        raise UserError(f"{run.uri}: has no job.yaml, so it is not a run") from None
    return documents[0] if documents else {}


def write_job(run: Run, document: Mapping[str, Any]) -> None:
    """Write the resolved job, all defaults explicit, as job.yaml."""
    write_file(run, "job.yaml", dump_yaml(_plain(document)).encode())


def read_status(run: Run) -> Status | None:
    """Return the state of a run, None if nothing has begun; the heartbeat of a running one is that of its lock."""
    found = _read_json(run, "status.json")
    if found is None:
        return None
    try:
        status = Status(**found)
    except TypeError:
        raise StorageError(f"{join(run.uri, 'status.json')}: is no status of a run") from None
    owner = _read_lock(run) if status.state == "running" else None
    return status if owner is None else replace(status, heartbeat=max(status.heartbeat, owner.heartbeat))


def read_card(run: Run) -> dict[str, Any] | None:
    """Return card.json, None while the run has not finished."""
    return _read_json(run, "card.json")


def write_card(run: Run, card: Mapping[str, Any]) -> None:
    """Write card.json: final numbers, parent, commit, dataset fingerprint, versions, machine, seconds."""
    write_file(run, "card.json", _json(card))


def write_report(run: Run, html: str) -> None:
    """Write report.html."""
    write_file(run, "report.html", html.encode())


def write_model(run: Run, weights: bytes | Path, model: Mapping[str, Any], taken: Mapping[str, Any]) -> None:
    """Write model/: `weights` (safetensors), `model` (build name, options), `taken` (the input the network takes)."""
    write_file(run, "model/weights.safetensors", weights)
    write_file(run, "model/input.json", _json(taken))
    write_file(run, "model/model.json", _json(model))


def read_model(run: Run) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """Return (weights, model, input) as `write_model` took them; UserError if the run has no model (yet)."""
    model, taken = _read_json(run, "model/model.json"), _read_json(run, "model/input.json")
    if model is None or taken is None:
        raise UserError(f"{run.uri}: has no model: it is not a training run, or it has not finished (run it again)")
    return read_file(run, "model/weights.safetensors"), model, taken


def weights_source(source: str, where: str, sha256: str | None = None) -> str:
    """Return the path or URI of the weights `source` means: a file, a URL (fetched once), or a run by name or URI.

    `where` is the storage in which names are looked up. UserError if there is none or its SHA-256 is not `sha256`.
    """
    if source.startswith(("http://", "https://")):
        found = str(_download(source))
    elif Path(source).expanduser().is_file():
        found = str(Path(source).expanduser().absolute())
    elif re.search(r"\.(safetensors|pth|pt|ckpt|tar|bin)(\?.*)?$", source):
        found = source
    else:
        found = join(find_run(source, where).uri, "model/weights.safetensors")
    try:
        data = storage.read_bytes(*storage.open_uri(found)) if sha256 else b""
        there = bool(data) or storage.exists(*storage.open_uri(found))
    except FileNotFoundError:
        there = False
    if not there:
        raise UserError(f"{source}: no such weights: give a checkpoint file, a URL or a finished training run")
    if sha256 and (digest := hashlib.sha256(data).hexdigest()) != sha256.lower():
        raise UserError(f"{source}: has SHA-256 {digest}, not {sha256}: it is damaged or another file")
    return found


# --------------------------------------------------------------------------------------- claiming a run name


def claim(run: Run, document: Mapping[str, Any], restart: bool = False, may_change: Sequence[str] = ()) -> Claim:
    """Say what is to be done for the job `document` in the folder of its name, and clear the folder on `restart`.

    Nothing there: attempt 1. The same job, where sections in `may_change` may differ: skip if finished, else the next
    attempt. Raises UserError for other settings (with the differing fields) and while another process writes.
    """
    status = read_status(run)
    old = read_job(run) if exists(run, "job.yaml") else None
    if old is None and status is None:
        return Claim(False, 1)
    if restart:
        with hold(run):
            clear(run)
        return Claim(False, 1)
    changes = list(_differences(old or {}, _plain(document), may_change)) if old is not None else []
    if changes:
        shown = "; ".join(changes[:8]) + (f"; and {len(changes) - 8} more" if len(changes) > 8 else "")
        raise UserError(
            f"run {run.name!r} exists with other settings ({shown}): choose another name, or --restart to clear it"
        )
    if status is not None and status.state == "finished":
        return Claim(True, status.attempt)
    owner = _read_lock(run)
    if _is_alive(owner):
        raise _occupied(run, owner)
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
    owner, before, now = _read_lock(run), read_status(run), time.time()
    if owner is not None and not _is_me(owner):
        raise RunFailed(_taken_over(run, owner))
    _write_status(
        run, Status(state, before.attempt if before else 1, now, message, before.started if before else now, now)
    )


# -------------------------------------------------------------------------------------------------- the lock


@dataclass(frozen=True)
class _Owner:
    """Who holds a lock. `host` tells machine, boot and PID namespace apart; `born` tells a reused PID apart."""

    token: str
    host: str
    pid: int
    born: int
    heartbeat: float


@contextlib.contextmanager
def hold(run: Run, heartbeat_s: float = HEARTBEAT_S) -> Iterator[threading.Event]:
    """Keep every other writer out of `run` for as long as the block lasts; yields an event that tells when it was lost.

    A background thread renews the heartbeat; storage that is away for a while does not end the block. A lock is free
    when its heartbeat is older than STALE_S, or at once when its process on this machine is gone. UserError when
    another holds it. If it is lost (this process slept, another took over), the main thread is interrupted and the
    block ends with RunFailed.
    """
    mine = _acquire(run)
    stop, lost = threading.Event(), threading.Event()
    in_main = threading.current_thread() is threading.main_thread()

    def beat() -> None:
        while not stop.wait(heartbeat_s):
            try:
                if _still_mine(run, mine):
                    _write_lock(run, mine)
                    continue
            except StorageError as error:
                log.warning("the lock of run %r could not be renewed: %s", run.name, error)
                continue
            lost.set()
            if in_main:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            return

    thread = threading.Thread(target=beat, daemon=True, name=f"lock of {run.name}")
    thread.start()
    try:
        yield lost
    except BaseException as error:
        if lost.is_set():
            raise RunFailed(_taken_over(run, _read_lock(run))) from error
        raise
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(StorageError):  # then it goes stale by itself
            _release(run, mine)
    if lost.is_set():
        raise RunFailed(_taken_over(run, _read_lock(run)))


def _acquire(run: Run) -> _Owner:
    mine = _Owner(uuid.uuid4().hex, _this_host(), os.getpid(), _born(os.getpid()), time.time())
    for _ in range(5):
        looked = time.monotonic()
        owner = _read_lock(run)
        if _is_alive(owner):
            raise _occupied(run, owner)
        if owner is None and isinstance(run.fs, pafs.LocalFileSystem):
            if _create_exclusively(run, mine):
                return mine
            continue
        _write_lock(run, mine)
        if time.monotonic() - looked < SETTLE_S / 2:
            time.sleep(SETTLE_S)
            owner = _read_lock(run)
            if owner is not None and owner.token == mine.token:
                return mine
            raise _occupied(run, owner)
        _release(run, mine)  # another that looked before this slow write may trust its own by now: begin again
        time.sleep(random.uniform(0, SETTLE_S))
    raise StorageError(f"{run.uri}: the lock could not be taken, the storage needs more than {SETTLE_S / 2:g} s for it")


def _still_mine(run: Run, mine: _Owner) -> bool:
    """Whether nobody else has the lock; a foreign token that stands for a moment only is a slow rival stepping back."""
    for pause in (SETTLE_S, 0):
        owner = _read_lock(run)
        if owner is None or owner.token == mine.token:
            return True
        time.sleep(pause)
    return False


def _release(run: Run, mine: _Owner) -> None:
    owner = _read_lock(run)
    if owner is not None and owner.token == mine.token:
        storage.delete(run.fs, join(run.path, "lock"))


def _create_exclusively(run: Run, mine: _Owner) -> bool:
    """Create the lock on a disk, whole and only if there is none: a hard link does not replace its target."""
    path = Path(run.path, "lock")
    part = path.with_name(f".lock.{mine.token}.tmp")
    try:
        storage.write_atomic(run.fs, str(part), _json(asdict(mine)))
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise StorageError(f"{path}: cannot be created ({error.strerror})") from error
    finally:
        part.unlink(missing_ok=True)
    return True


def _write_lock(run: Run, owner: _Owner) -> None:
    storage.write_atomic(run.fs, join(run.path, "lock"), _json(asdict(owner) | {"heartbeat": time.time()}))


def _read_lock(run: Run) -> _Owner | None:
    found = _read_json(run, "lock")
    try:
        return None if found is None else _Owner(**found)
    except TypeError:
        raise UserError(f"{join(run.uri, 'lock')}: is no lock of slimray: delete it if nothing writes there") from None


def _is_alive(owner: _Owner | None) -> bool:
    if owner is None or time.time() - owner.heartbeat > STALE_S:
        return False
    if owner.host != _this_host():
        return True
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _born(owner.pid) == owner.born


def _is_me(owner: _Owner) -> bool:
    return (owner.host, owner.pid, owner.born) == (_this_host(), os.getpid(), _born(os.getpid()))


def _this_host() -> str:
    """Name, boot and PID namespace: containers may share a host name, and PIDs mean something in one namespace only."""
    boot, space = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    return " ".join(filter(None, (socket.gethostname(), boot, space)))


def _born(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def _occupied(run: Run, owner: _Owner | None) -> UserError:
    who = "another process" if owner is None else f"process {owner.pid} on {owner.host.split()[0]}"
    return UserError(f"run {run.name!r} is being written by {who}: wait for it, stop it, or choose another name")


def _taken_over(run: Run, owner: _Owner | None) -> str:
    who = "another process" if owner is None else f"process {owner.pid} on {owner.host.split()[0]}"
    return f"run {run.name!r} was taken over by {who} because this one gave no sign of life for {STALE_S:g} s"


# ------------------------------------------------------------------------------------- append-only records


class PartWriter:
    """Appends rows to `<folder>/` of a run from one rank, as parts named `attempt-rank-opened-number.jsonl`.

    A background thread writes a part every `flush_s` seconds or FLUSH_ROWS rows. Storage that is away is asked again
    for `patience_s` seconds, rows wait meanwhile (`write` blocks at MAX_WAITING_ROWS); after that the next `write` or
    `close` raises StorageError, once. `opened` (ms) orders the writers of an attempt that a crash restarted.
    """

    def __init__(
        self, run: Run, folder: str, attempt: int, rank: int, flush_s: float = FLUSH_S, patience_s: float = 180.0
    ):
        self._run, self._flush_s, self._patience_s = run, flush_s, patience_s
        self._stem = f"{_known(folder)}/{attempt:04d}-{rank:05d}-{time.time_ns() // 1_000_000}"
        self._lines: list[bytes] = []
        self._changed = threading.Condition()
        self._closing = self._failed = self._hurry = False
        self._num_written = 0
        self._error: StorageError | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"{folder} of {run.name}")
        self._thread.start()

    def write(self, row: Mapping[str, Any]) -> None:
        """Queue one row (JSON values, numpy scalars). Raises StorageError once if rows cannot be written any more."""
        line = json.dumps(row, default=_json_value).encode()
        with self._changed:
            if self._closing:
                raise ValueError(f"{self._stem} is closed")
            self._changed.wait_for(lambda: self._failed or len(self._lines) < MAX_WAITING_ROWS)
            if not self._failed:
                self._lines.append(line)
            if len(self._lines) >= FLUSH_ROWS:
                self._changed.notify_all()
        self._raise_once()

    def flush(self) -> None:
        """Return once all rows queued so far are on storage; StorageError once if they cannot be written."""
        with self._changed:
            wanted, self._hurry = self._num_written + len(self._lines), True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failed or self._num_written >= wanted)
        self._raise_once()

    def close(self) -> None:
        """Write what is left and stop; StorageError if rows were lost. A second call does nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._raise_once()

    def _raise_once(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        try:
            number = 0
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._closing or self._hurry or len(self._lines) >= FLUSH_ROWS, self._flush_s
                    )
                    lines, closing, self._hurry = self._lines[: 10 * FLUSH_ROWS], self._closing, False
                if lines:
                    self._put(f"{self._stem}-{number:06d}.jsonl", b"\n".join(lines) + b"\n")
                    number += 1
                elif closing:
                    return
                with self._changed:
                    del self._lines[: len(lines)]
                    self._num_written += len(lines)
                    self._hurry = self._hurry or (bool(self._lines) and len(lines) == 10 * FLUSH_ROWS)
                    self._changed.notify_all()
        except Exception as error:  # noqa: BLE001 a thread's failure is raised where the rows come from
            with self._changed:
                self._error = StorageError(f"{error}; {len(self._lines)} rows of {self._stem} are lost")
                self._failed, self._lines = True, []
                self._changed.notify_all()

    def _put(self, name: str, data: bytes) -> None:
        began = time.monotonic()
        while True:
            try:
                return write_file(self._run, name, data)
            except StorageError as error:
                if time.monotonic() - began > self._patience_s:
                    raise
                log.warning("rows wait for the storage: %s", error)
            time.sleep(min(5.0, self._patience_s / 10))


def count_writers(run: Run, folder: str) -> int:
    """How often rank 0 began to write under `folder`: once for every start of the workers that did anything."""
    names = [part.base_name.split("-") for part in storage.list_files(run.fs, join(run.path, folder))]
    return len({(attempt, opened) for attempt, rank, opened, *_ in names if not int(rank)})


def read_parts(run: Run, folder: str) -> list[dict[str, Any]]:
    """Return the rows under `folder` in writing order, each with its `attempt` and `rank`, the newest attempt per step.

    A writer that resumed does its steps again, from its first one on: from there its rows replace those of older
    attempts, and those of an older writer of its rank, phase by phase (the row's `phase`). Rows without `step` all
    stay, but for exact repetitions. StorageError for a part that does not read.
    """
    parts = storage.list_files(run.fs, join(run.path, folder))
    with ThreadPoolExecutor(16) as pool:
        contents = list(pool.map(lambda part: storage.read_bytes(run.fs, part.path), parts))
    writers: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for part, content in zip(parts, contents, strict=True):
        try:
            attempt, rank, opened, _ = map(int, part.base_name.removesuffix(".jsonl").split("-"))
            rows = [json.loads(line) for line in content.splitlines()]
        except ValueError as error:
            raise StorageError(f"{part.path}: is no part of a run's records ({error})") from None
        writers.setdefault((attempt, opened, rank), []).extend(rows)
    out: list[list[dict[str, Any]]] = []
    redone: dict[tuple[int, int], dict[Any, float]] = {}  # (attempt, rank) -> phase -> first step of its newer writers
    seen: set[str] = set()
    for attempt, opened, rank in sorted(writers, reverse=True):
        newer = [first for (a, r), first in redone.items() if a > attempt or (a, r) == (attempt, rank)]
        kept, begun = [], redone.setdefault((attempt, rank), {})
        limit = {phase: min(f[phase] for f in newer if phase in f) for phase in set().union(*newer)}
        for row in writers[attempt, opened, rank]:
            if "step" in row:
                new = row["step"] < limit.get(row.get("phase"), float("inf"))
                begun[row.get("phase")] = min(row["step"], begun.get(row.get("phase"), row["step"]))
            else:
                text = json.dumps(row, sort_keys=True)
                new = text not in seen
                seen.add(text)
            if new:
                kept.append({**row, "attempt": attempt, "rank": rank})
        out.append(kept)
    return [row for kept in reversed(out) for row in kept]


# --------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(run: Run, step: int, files: Mapping[str, bytes | Path], meta: Mapping[str, Any]) -> None:
    """Write checkpoints/step_<step>/ with `files` (name -> bytes or local file, streamed) and its marker, last.

    `meta` (JSON) may hold "epoch" and "metrics", by which `keep` finds the best. A checkpoint of the same step stays
    whole until the new one is.
    """
    folder = _step_folder(step)
    old = _read_marker(run, folder)
    token = f"{uuid.uuid4().hex[:8]}-" if old else ""
    written: dict[str, dict[str, Any]] = {}
    for name, data in files.items():
        size, digest = _digest(data)
        write_file(run, f"{folder}/{token}{name}", data)
        written[name] = {"file": token + name, "bytes": size, "sha256": digest}
    write_file(run, f"{folder}/complete.json", _json({"step": step, "meta": dict(meta), "files": written}))
    for entry in old.files.values() if old else ():
        storage.delete(run.fs, join(run.path, folder, entry["file"]))


def list_checkpoints(run: Run) -> list[Checkpoint]:
    """Return the checkpoints that have a marker, by step; their content is not looked at."""
    folders = storage.list_folders(run.fs, join(run.path, "checkpoints"))
    found = [_read_marker(run, f"checkpoints/{name}") for name in folders]
    return sorted((one for one in found if one is not None), key=lambda one: one.step)


def checkpoint_at(run: Run, step: int) -> Checkpoint:
    """Return the checkpoint of `step`; RunFailed if there is no complete one."""
    found = _read_marker(run, _step_folder(step))
    if found is None:
        raise RunFailed(f"{run.uri}: has no complete checkpoint of step {step}")
    return found


def newest_checkpoint(run: Run) -> Checkpoint | None:
    """Return the newest checkpoint whose files are all there with the right bytes, None if there is none.

    Damaged ones are passed over with a warning. Reads each file once to compare its SHA-256.
    """
    for checkpoint in reversed(list_checkpoints(run)):
        try:
            for name in checkpoint.files:
                _read_verified(run, checkpoint, name)
        except (StorageError, FileNotFoundError) as error:
            log.warning(
                "run %r: checkpoint of step %d is damaged and passed over: %s", run.name, checkpoint.step, error
            )
            continue
        return checkpoint
    return None


def read_checkpoint(run: Run, checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return name -> bytes of its files; StorageError or FileNotFoundError if one is not what was written."""
    return {name: _read_verified(run, checkpoint, name) for name in checkpoint.files}


def keep(run: Run, metric: str | None = None, last: int = 2, mode: Literal["max", "min"] = "max") -> None:
    """Delete all checkpoints but the newest `last` (at least 1) and the best by `meta["metrics"][metric]`.

    Among equals the earliest is the best: later ones may carry the numbers of an older validation.
    """
    found = list_checkpoints(run)
    stay = {one.step for one in found[-max(1, last) :]}
    sign = 1 if mode == "min" else -1
    scored = [(sign * one.meta.get("metrics", {}).get(metric, float("nan")), one.step) for one in found]
    stay |= {step for _, step in sorted(pair for pair in scored if pair[0] == pair[0])[:1]}  # NaN is no score
    for one in found:
        if one.step not in stay:
            _delete_checkpoint(run, _step_folder(one.step))


def drop_after(run: Run, step: int) -> None:
    """Delete the checkpoints after `step`: damaged ones, which a resume passed over and `keep` would take for newer."""
    for one in list_checkpoints(run):
        if one.step > step:
            _delete_checkpoint(run, _step_folder(one.step))


def sweep_orphans(run: Run) -> list[str]:
    """Delete checkpoint folders without a marker, left by a crash, and return their names. Only under `hold`."""
    folders = storage.list_folders(run.fs, join(run.path, "checkpoints"))
    orphans = [name for name in folders if _read_marker(run, f"checkpoints/{name}") is None]
    for name in orphans:
        _delete_checkpoint(run, f"checkpoints/{name}")
    return orphans


def _delete_checkpoint(run: Run, folder: str) -> None:
    storage.delete(run.fs, join(run.path, folder, "complete.json"))  # first: from here on it is an orphan
    storage.delete(run.fs, join(run.path, folder))


def _step_folder(step: int) -> str:
    return f"checkpoints/step_{step:09d}"


def _read_marker(run: Run, folder: str) -> Checkpoint | None:
    try:
        found = _read_json(run, f"{folder}/complete.json")
        return None if found is None else Checkpoint(int(found["step"]), found["meta"], found["files"])
    except (StorageError, KeyError, TypeError, ValueError) as error:
        log.warning("%s: the marker does not read, the checkpoint is passed over: %s", join(run.uri, folder), error)
        return None


def _read_verified(run: Run, checkpoint: Checkpoint, name: str) -> bytes:
    entry = checkpoint.files[name]
    data = read_file(run, f"{_step_folder(checkpoint.step)}/{entry['file']}")
    if len(data) != entry["bytes"]:
        raise StorageError(f"{name} has {len(data)} bytes in place of {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise StorageError(f"{name} has other bytes than were written (SHA-256 differs)")
    return data


def _digest(data: bytes | Path) -> tuple[int, str]:
    if isinstance(data, bytes):
        return len(data), hashlib.sha256(data).hexdigest()
    with open(data, "rb") as file:
        return data.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------------- helpers


def _is_bucket(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def _is_run(run: Run) -> bool:
    return exists(run, "status.json") or exists(run, "job.yaml")


def _known(name: str) -> str:
    if name not in FILES and name.partition("/")[0] not in FOLDERS:
        raise ValueError(f"{name!r} is no file of a run folder: add it to FILES or FOLDERS in runs.py")
    return name


def _write_status(run: Run, status: Status) -> None:
    write_file(run, "status.json", _json(asdict(status)))


def _read_json(run: Run, name: str) -> dict[str, Any] | None:
    """The JSON object in the file `name`, None if there is no such file; StorageError if it is not JSON."""
    try:
        return json.loads(read_file(run, name))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StorageError(f"{join(run.uri, name)}: is not JSON ({error})") from None


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(value), indent=2, default=_json_value).encode() + b"\n"


def _json_value(value: Any) -> Any:
    """numpy scalars and arrays as plain numbers and lists, paths as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _plain(document: Mapping[str, Any]) -> dict[str, Any]:
    """`document` as JSON values only, as it reads back from job.yaml."""
    return json.loads(_json(document))


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


def _download(url: str) -> Path:
    """Fetch `url` into the user's cache once, atomically; UserError when it cannot be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slimray" / "weights"
    target = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.rpartition('/')[2].partition('?')[0]}"
    if target.is_file():
        return target
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:  # noqa: S310 http(s) only
            while chunk := response.read(1 << 20):
                file.write(chunk)
        part.replace(target)
    except (OSError, urllib.error.URLError) as error:
        raise UserError(f"{url}: cannot be fetched ({getattr(error, 'reason', error)}): download it by hand") from None
    finally:
        part.unlink(missing_ok=True)
    return target
