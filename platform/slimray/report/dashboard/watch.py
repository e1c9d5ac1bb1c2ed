"""Contents of a storage folder for pages that poll every two seconds: `Watch` caches what it has read.

In: a folder or URI, only read. Out: a row per run, as in `slimray runs`, and a `Look` at one run: its records, results,
stages, trials. A run's folder is listed once per look, and a file is read again only when its size or time has changed,
so that a running training costs only its new parts. Surprising: the functions of runs/ read that listing as if it were
a filesystem, so that a page shows a single moment. A file that cannot be read becomes a sentence in its place, never an
error.
"""

import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, cast

import pyarrow as pa
import pyarrow.fs as pafs

from slimray import runs, storage
from slimray.spec import RunFailed, UserError
from slimray.storage import StorageError

POLL_S = 2.0  # between two requests of an open page
PATIENCE_S = 0.7  # how long a page waits for the rows of runs; the rest come with the next request
SETTLED_S = 30.0  # after which the state of a run in a bucket that is not running is read again
LOOK_PATIENCE_S = 1.5  # how long a page waits for a look at one run
NUM_READERS, NUM_LOOKERS = 16, 4
MAX_FILE_BYTES = 64 << 20  # of one file
KEPT_BYTES = 256 << 20  # of all cached files together
KEPT_LOOKS = 32
MAX_ROWS = 5_000  # per phase of a record; longer records are thinned
READ = ("job.yaml", "status.json", "card.json", "results.json", "front.json", "report.html")
READ_FOLDERS = ("metrics", "quarantine", "stages", "trials")
# Raised by files whose content slimray did not write; RecursionError by files that are nested too deeply.
DAMAGED = (AttributeError, KeyError, IndexError, TypeError, ValueError, ArithmeticError, RecursionError, OSError)


@dataclass(frozen=True)
class Stage:
    """A stage of a shrink run, or one trial of its sweep: a run of its own inside the run."""

    name: str
    state: str
    metrics: Sequence[Mapping[str, Any]] = ()
    judged: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Look:
    """All that is shown of one run. `trials`: target -> finished trials; `problems`: unreadable files, with reasons."""

    row: Mapping[str, Any]
    version: str
    started: float = 0.0
    ended: float = 0.0
    job: Mapping[str, Any] = field(default_factory=dict)
    job_text: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    quarantine: Sequence[Mapping[str, Any]] = ()
    stages: Sequence[Stage] = ()
    trials: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    fronts: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    has_report: bool = False
    problems: Sequence[str] = ()


class _Kept:
    """Cache of file contents by path, size and time: the most recently used, KEPT_BYTES in total."""

    def __init__(self) -> None:
        self._bytes: OrderedDict[tuple[str, int, int | None], bytes] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def read(self, fs: pafs.FileSystem, info: pafs.FileInfo) -> bytes:
        key = (info.path, info.size, info.mtime_ns)
        with self._lock:
            if key in self._bytes:
                self._bytes.move_to_end(key)
                return self._bytes[key]
        if info.size > MAX_FILE_BYTES:
            raise StorageError(f"{info.path}: is too large for a page ({info.size >> 20} MB)")
        data = storage.read_bytes(fs, info.path, first=MAX_FILE_BYTES, patience=1)
        with self._lock:
            if key not in self._bytes:
                self._bytes[key] = data
                self._size += len(data)
            while self._size > KEPT_BYTES:
                self._size -= len(self._bytes.popitem(last=False)[1])
        return data


class _Snapshot:
    """The listed files of a run as a filesystem, with the methods that storage.py needs to read."""

    def __init__(self, fs: pafs.FileSystem, infos: Sequence[pafs.FileInfo], kept: _Kept):
        self._fs, self._kept = fs, kept
        self._infos = {info.path: info for info in infos}
        for info in infos:
            folder = info.path.rpartition("/")[0]
            while folder and folder not in self._infos:
                self._infos[folder] = pafs.FileInfo(folder, pafs.FileType.Directory)
                folder = folder.rpartition("/")[0]

    def get_file_info(self, what: str | pafs.FileSelector) -> Any:
        if isinstance(what, str):
            return self._infos.get(what) or pafs.FileInfo(what, pafs.FileType.NotFound)
        base = what.base_dir.rstrip("/") + "/"
        inside = [(path[len(base) :], info) for path, info in self._infos.items() if path.startswith(base)]
        return [info for name, info in inside if what.recursive or "/" not in name]

    def open_input_file(self, path: str) -> Any:
        if path not in self._infos:
            raise FileNotFoundError(path)
        return pa.BufferReader(self._kept.read(self._fs, self._infos[path]))


@dataclass(frozen=True)
class _Seen:
    """Last known state of a folder: size and time of its status.json, and its row, None if it is not a run."""

    stamp: tuple[int, int | None]
    row: dict[str, Any] | None
    at: float


class Watch:
    """Contents of a storage folder, polled by open pages; thread-safe."""

    def __init__(self, where: str):
        self.where = where
        self._fs, self._path = storage.open_uri(where)
        self._on_disk = isinstance(self._fs, pafs.LocalFileSystem)
        self._pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="dashboard")
        self._lock, self._listed_at = threading.Lock(), -POLL_S
        self._names: list[str] = []
        self._seen: dict[str, _Seen] = {}
        self._asked: dict[str, Future[_Seen]] = {}
        self._looks: OrderedDict[str, Look] = OrderedDict()
        self._looking: dict[str, Future[Look | None]] = {}
        self._lookers = ThreadPoolExecutor(NUM_LOOKERS, thread_name_prefix="dashboard-look")
        self._kept = _Kept()

    def rows(self, patience_s: float = PATIENCE_S) -> list[dict[str, Any]]:
        """Return a row of `runs.describe` for each run, by name; `damaged` rows say why, `reading` ones come later.

        Raises StorageError if the folder cannot be listed.
        """
        with self._lock:
            if time.monotonic() - self._listed_at > POLL_S / 2:
                self._names = [n for n in storage.list_folders(self._fs, self._path) if not n.startswith(".")]
                self._listed_at = time.monotonic()
                there = set(self._names)
                self._seen = {name: seen for name, seen in self._seen.items() if name in there}
                for name in self._names:
                    if name not in self._asked and self._is_due(name):
                        self._asked[name] = self._pool.submit(self._ask, name)
            names, asked = list(self._names), list(self._asked.values())
        wait(asked, patience_s)
        with self._lock:
            for name in [name for name, future in self._asked.items() if future.done()]:
                self._seen[name] = self._asked.pop(name).result()
            seen = {name: self._seen.get(name) for name in names}
        unread = {"kind": None, "state": "reading", "result": None, "updated": None, "message": ""}
        rows = [{"name": name, **unread} if one is None else one.row for name, one in seen.items()]
        return [row for row in rows if row is not None]

    def find(self, name: str) -> runs.Run | None:
        """Return the run of this name; None if there is no such folder, or if the name could lead elsewhere."""
        if not name or "/" in name or "\\" in name or name.startswith("."):
            return None
        path = storage.join(self._path, name)
        if not self._is_inside(path):
            return None
        run = runs.Run(self._fs, path, name, storage.join(self.where if not self._on_disk else self._path, name))
        return run if runs.exists(run, "status.json") or runs.exists(run, "job.yaml") else None

    def look(self, name: str, patience_s: float = LOOK_PATIENCE_S) -> Look | None:
        """Return all that is shown of the run, None if there is none; unreadable files are listed in its `problems`.

        If reading takes longer than `patience_s`, return the previous Look, or one whose state is `reading`; a single
        reader continues in the background for all requests. Raises StorageError if the storage does not respond.
        """
        with self._lock:
            if name not in self._looking:
                self._looking[name] = self._lookers.submit(self._look, name)
            asked = self._looking[name]
        try:
            found = asked.result(patience_s)
        except TimeoutError:
            with self._lock:
                return self._looks.get(name) or Look({"name": name, "state": "reading"}, "reading")
        finally:
            with self._lock:
                if asked.done() and self._looking.get(name) is asked:
                    del self._looking[name]
        return found

    def _look(self, name: str) -> Look | None:
        run = self.find(name)
        if run is None:
            return None
        snapshot, infos = self._listed(run)
        row = self._described(run)
        marks = "".join(f"{info.path}{info.size}{info.mtime_ns}" for info in infos)
        version = hashlib.sha256(f"{json.dumps(row)}{marks}".encode("utf-8", "replace")).hexdigest()[:16]
        with self._lock:
            before = self._looks.get(name)
        if before is not None and before.version == version:
            return before
        look = self._read(snapshot, row, version)
        with self._lock:
            self._looks[name] = look
            self._looks.move_to_end(name)
            while len(self._looks) > KEPT_LOOKS:
                self._looks.popitem(last=False)
        return look

    def report(self, name: str) -> bytes | None:
        """Return the report page of the run, None if there is none."""
        run = self.find(name)
        if run is None:
            return None
        listed = self._listed(run)[0]
        return runs.read_file(listed, "report.html") if runs.exists(listed, "report.html") else None

    def close(self) -> None:
        """Stop the threads."""
        for pool in (self._pool, self._lookers):
            pool.shutdown(wait=False, cancel_futures=True)

    def _is_inside(self, path: str) -> bool:
        """Return True if a path is inside the storage after links are resolved."""
        if not self._on_disk:
            return True
        return os.path.realpath(path).startswith(os.path.join(os.path.realpath(self._path), ""))

    def _described(self, run: runs.Run) -> dict[str, Any]:
        """Return the row of a run; if it holds a link out of the storage, a `damaged` row without reading anything."""
        try:
            for name in (*READ, "lock"):
                if not self._is_inside(f"{run.path}/{name}"):
                    raise UserError(f"{run.uri}/{name}: is a link that leads out of the storage")
            return runs.describe(run)
        except (UserError, RunFailed, *DAMAGED) as error:
            return _damaged(run, error)

    def _is_due(self, name: str) -> bool:
        """Return True if the folder has to be read: on a disk always, in a bucket less often once a run is settled."""
        seen = self._seen.get(name)
        settled = seen is not None and seen.row is not None and seen.row["state"] in ("finished", "failed", "damaged")
        return seen is None or self._on_disk or not settled or time.monotonic() - seen.at > SETTLED_S

    def _ask(self, name: str) -> _Seen:
        run = runs.Run(self._fs, storage.join(self._path, name), name, storage.join(self.where, name))
        seen, now = self._seen.get(name), time.monotonic()
        try:
            if not self._is_inside(run.path):
                return _Seen((0, None), None, now)
            info = storage.retry(lambda: self._fs.get_file_info(f"{run.path}/status.json"), "look up", run.path, 1)
            stamp = (info.size or 0, info.mtime_ns)
            if info.type == pafs.FileType.NotFound and not runs.exists(run, "job.yaml"):
                return _Seen(stamp, None, now)
        except (UserError, RunFailed, *DAMAGED) as error:
            return _Seen((0, None), _damaged(run, error), now)
        if seen is not None and seen.stamp == stamp and seen.row is not None:
            state, age = seen.row["state"], now - seen.at
            if state in ("finished", "failed", "damaged") and info.type != pafs.FileType.NotFound:
                return _Seen(stamp, seen.row, now)
            if state == "stopped" and age < SETTLED_S / 3:
                return seen  # its writer may only have been suspended, which the lock shows and status.json does not
        return _Seen(stamp, self._described(run), now)

    def _listed(self, run: runs.Run) -> tuple[runs.Run, list[pafs.FileInfo]]:
        """Return the run as a snapshot of the files that are shown, and the list of these files."""
        inside = [name for name in READ if self._is_inside(f"{run.path}/{name}")]
        top = [self._fs.get_file_info(f"{run.path}/{name}") for name in inside]
        infos = [info for info in top if info.type == pafs.FileType.File]
        folders = [f"{run.path}/{name}" for name in READ_FOLDERS]
        for found in self._pool.map(lambda path: storage.list_files(self._fs, path, recursive=True), folders):
            shown = [info for info in found if _is_shown(info.path[len(run.path) + 1 :])]
            infos += [info for info in shown if self._is_inside(info.path)]
        snapshot = cast(pafs.FileSystem, _Snapshot(self._fs, infos, self._kept))
        return runs.Run(snapshot, run.path, run.name, run.uri), infos

    def _read(self, run: runs.Run, row: dict[str, Any], version: str) -> Look:
        problems: list[str] = []

        def part(read: Callable[[], Any], default: Any) -> Any:
            try:
                return read()
            except (UserError, RunFailed, *DAMAGED) as error:
                problems.append(_sentence(error))
                return default

        status = part(lambda: runs.read_status(run), None)
        text = part(lambda: runs.read_file(run, "job.yaml").decode("utf-8", "replace"), "")
        results = part(lambda: _mapping(run, "results.json"), {})
        return Look(
            row=row,
            version=version,
            started=status.started if status else 0.0,
            ended=status.updated if status else 0.0,
            job=part(lambda: runs.read_job(run), {}) if text else {},
            job_text=text[:200_000],
            card=part(lambda: _mapping(run, "card.json"), {}),
            results=results,
            metrics=part(lambda: _rows(run, "metrics"), []),
            quarantine=part(lambda: _rows(run, "quarantine"), []),
            stages=part(lambda: self._stages(run, row["state"]), []),
            trials=part(lambda: self._trials(run, results), {}),
            fronts=part(lambda: _fronts(run), {}),
            has_report=runs.exists(run, "report.html"),
            problems=problems,
        )

    def _stages(self, run: runs.Run, whole: str) -> list[Stage]:
        out = []
        for name in storage.list_folders(run.fs, f"{run.path}/stages"):
            stage = runs.Run(run.fs, f"{run.path}/stages/{name}", name, f"{run.uri}/stages/{name}")
            status = runs.read_status(stage)
            judged = _mapping(stage, "results.json").get("rows") or []
            state: str = status.state if status else "queued"
            state = "stopped" if state == "running" and whole != "running" else state
            out.append(Stage(name, state, _rows(stage, "metrics"), [row for row in judged if isinstance(row, dict)]))
        return out

    def _trials(self, run: runs.Run, results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        """Return the trials of a search: from results.json once it has ended, before that from their own files."""
        told = results.get("trials")
        if told:
            targets = [str(row.get("target")) for row in results.get("targets") or [] if isinstance(row, dict)]
            name = targets[0] if len(targets) == 1 else "trial"
            return {name: [{"index": i, **one} for i, one in enumerate(told) if isinstance(one, dict)]}
        files = storage.list_files(run.fs, f"{run.path}/trials", recursive=True)
        files = [info for info in files if info.base_name.endswith(".json")]

        def read(info: pafs.FileInfo) -> Any:
            return json.loads(storage.read_bytes(run.fs, info.path, patience=0))

        out: dict[str, list[dict[str, Any]]] = {}
        with ThreadPoolExecutor(NUM_READERS) as pool:
            for info, one in zip(files, pool.map(read, files), strict=True):
                target = info.path[len(run.path) + len("/trials/") :].rpartition("/")[0] or "trial"
                if isinstance(one, dict):
                    out.setdefault(target, []).append(one)
        return out


def _is_shown(name: str) -> bool:
    """Return True if a file in READ_FOLDERS is read; of a stage only its records, not weights or checkpoints."""
    parts = name.split("/")
    return parts[0] != "stages" or (len(parts) > 2 and (parts[2] in READ[:4] or parts[2] == "metrics"))


def _damaged(run: runs.Run, error: BaseException) -> dict[str, Any]:
    row = {"name": run.name, "kind": None, "state": "damaged", "result": None, "updated": None}
    return row | {"message": _sentence(error), "uri": run.uri}


def _sentence(error: BaseException) -> str:
    if isinstance(error, UserError | RunFailed):
        return str(error)
    return f"is not a run folder as slimray writes it ({type(error).__name__}: {error})"


def _mapping(run: runs.Run, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the run, {} if there is no such file."""
    if not runs.exists(run, name):
        return {}
    found = json.loads(runs.read_file(run, name))
    if not isinstance(found, dict):
        raise StorageError(f"{run.uri}/{name}: is not a JSON object")
    return found


def _rows(run: runs.Run, folder: str) -> list[dict[str, Any]]:
    return runs.read_parts(run, folder, MAX_ROWS)


def _fronts(run: runs.Run) -> dict[str, list[dict[str, Any]]]:
    return {str(cost): list(front) for cost, front in (_mapping(run, "front.json").get("fronts") or {}).items()}
