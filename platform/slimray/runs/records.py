"""Append-only records of a run: rows as immutable numbered JSONL parts, because object stores cannot append.

`PartWriter` writes parts from one rank, named by attempt, rank and number, and joins small ones into one named by the
first and last number, so that a day of metrics is a few hundred objects. `read_parts` returns the rows of a folder; for
steps that were done twice it keeps the rows of the newest attempt.
"""

import hashlib
import io
import json
import logging
import math
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from slimray import storage
from slimray.credentials import redact
from slimray.runs.folder import DamagedFile, Run, inside, json_value, known_name, parse_json, write_file
from slimray.storage import StorageError

FLUSH_S = 10.0
FLUSH_ROWS = 1000
MAX_WAITING_ROWS = 100_000
JOINED = 64  # parts joined into one
MAX_JOINED_BYTES = 4 << 20  # larger groups are not joined
RELISTS = 4  # attempts to list and read a folder whose parts are being joined
MAX_PART_BYTES = 256 << 20
MAX_PHASES = 64  # phases whose rows are thinned separately
READERS = 16
AHEAD_BYTES = 32 << 20  # limit on the parts read ahead

log = logging.getLogger(__name__)


class PartWriter:
    """Appends rows to `<folder>/` of a run from one rank, as parts named `attempt-rank-opened-number.jsonl`.

    A background thread writes a part every `flush_s` seconds or FLUSH_ROWS rows, and replaces every JOINED of them by
    one, `...-first-last.jsonl`, which is complete before they are deleted. During a storage outage writing is retried
    for `patience_s` (default: `storage.patience_s()`) while rows wait (`write` blocks at MAX_WAITING_ROWS); after that
    `write` or `close` raises StorageError, once. `opened` (ms) orders the writers of an attempt restarted by a crash.
    """

    def __init__(
        self, run: Run, folder: str, attempt: int, rank: int, flush_s: float = FLUSH_S, patience_s: float | None = None
    ):
        self._run, self._flush_s = run, flush_s
        self._patience_s = storage.patience_s() if patience_s is None else patience_s
        self._stem = f"{known_name(folder)}/{attempt:04d}-{rank:05d}-{time.time_ns() // 1_000_000}"
        self._lines: list[bytes] = []
        self._changed = threading.Condition()
        self._closing = self._failed = self._hurry = False
        self._num_written = 0
        self._error: StorageError | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"{folder} of {run.name}")
        self._thread.start()

    def write(self, row: Mapping[str, Any]) -> None:
        """Queue one row (JSON values, numpy scalars) with credentials hidden.

        Raises StorageError once if rows can no longer be written, ValueError after `close`.
        """
        line = json.dumps(redact(row, names=False), default=json_value).encode()
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
        """Wait until all rows queued so far are on storage; raise StorageError once if they cannot be written."""
        with self._changed:
            wanted, self._hurry = self._num_written + len(self._lines), True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failed or self._num_written >= wanted)
        self._raise_once()

    def close(self) -> None:
        """Write the remaining rows and stop; raise StorageError if rows were lost. A second call does nothing."""
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
            number, small = 0, []
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._closing or self._hurry or len(self._lines) >= FLUSH_ROWS, self._flush_s
                    )
                    lines, closing, self._hurry = self._lines[: 10 * FLUSH_ROWS], self._closing, False
                if lines:
                    self._put(f"{self._stem}-{number:06d}.jsonl", b"\n".join(lines) + b"\n")
                    small.append((number, b"\n".join(lines) + b"\n"))
                    number += 1
                    if len(small) == JOINED:
                        self._join(small)
                        small = []
                elif closing:
                    return
                with self._changed:
                    del self._lines[: len(lines)]
                    self._num_written += len(lines)
                    self._hurry = self._hurry or (bool(self._lines) and len(lines) == 10 * FLUSH_ROWS)
                    self._changed.notify_all()
        except Exception as error:  # noqa: BLE001 raised again in the thread that writes rows
            with self._changed:
                self._error = StorageError(f"{error}; {len(self._lines)} rows of {self._stem} are lost")
                self._failed, self._lines = True, []
                self._changed.notify_all()

    def _join(self, parts: Sequence[tuple[int, bytes]]) -> None:
        """Replace parts by one. If the process dies in between, both remain and readers use the joined one."""
        data = b"".join(content for _, content in parts)
        if len(data) > MAX_JOINED_BYTES:
            return
        self._put(f"{self._stem}-{parts[0][0]:06d}-{parts[-1][0]:06d}.jsonl", data)
        for number, _ in parts:
            try:
                storage.delete(self._run.fs, inside(self._run, f"{self._stem}-{number:06d}.jsonl"))
            except StorageError as error:
                log.warning("could not delete a part that was joined with others: %s", error)

    def _put(self, name: str, data: bytes) -> None:
        began = time.monotonic()
        while True:
            try:
                return write_file(self._run, name, data)
            except StorageError as error:
                if time.monotonic() - began > self._patience_s:
                    raise
                log.warning("rows are waiting for the storage: %s", error)
            time.sleep(min(5.0, self._patience_s / 10))


def count_writers(run: Run, folder: str) -> int:
    """Return how many writers rank 0 has opened under `folder`: one per start of the workers that wrote any rows."""
    return len({(part.attempt, part.opened) for part in _list_parts(run, folder) if not part.rank})


def read_parts(run: Run, folder: str, max_rows: int | None = None) -> list[dict[str, Any]]:
    """Return the rows under `folder` in writing order, each with its `attempt` and `rank`; the newest attempt wins.

    A writer that resumed repeats steps from its first one on: from that step its rows replace those of older attempts,
    and those of an older writer of its rank, separately for each phase (the row's `phase`). Rows without `step` are all
    kept except exact repetitions. With `max_rows`, about that many rows of each phase are kept, evenly spaced and
    including the last; memory stays bounded however long the run. Raises StorageError for a part that cannot be read.
    """
    for _ in range(RELISTS):
        try:
            return _read_parts(run, folder, max_rows)
        except FileNotFoundError:  # the writer has joined parts since they were listed
            continue
    return _read_parts(run, folder, max_rows)


def _read_parts(run: Run, folder: str, max_rows: int | None) -> list[dict[str, Any]]:
    writers: dict[tuple[int, int, int], list[_Part]] = {}
    for part in _list_parts(run, folder):
        writers.setdefault((part.attempt, part.opened, part.rank), []).append(part)
    redone: dict[tuple[int, int], dict[Any, float]] = {}  # (attempt, rank) -> phase -> first step of its newer writers
    seen: set[bytes] = set()
    kept = _Selection(max_rows)
    for attempt, opened, rank in sorted(writers, reverse=True):
        newer = [first for (a, r), first in redone.items() if a > attempt or (a, r) == (attempt, rank)]
        begun = redone.setdefault((attempt, rank), {})
        limit = {phase: min(f[phase] for f in newer if phase in f) for phase in set().union(*newer)}
        for row in _rows(run, writers[attempt, opened, rank]):
            phase = row.get("phase")
            if "step" in row:
                new = row["step"] < limit.get(phase, float("inf"))
                begun[phase] = min(row["step"], begun.get(phase, row["step"]))
            else:
                mark = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()[:16]
                new = mark not in seen
                seen.add(mark)
            if new:
                kept.add(phase, {**row, "attempt": attempt, "rank": rank})
        kept.end_writer()
    return kept.rows()


class _Selection:
    """The rows to keep: all, or every n-th of each phase plus the last of each writer; n doubles as needed."""

    def __init__(self, max_rows: int | None):
        self._max_rows = max_rows
        self._strides: dict[Any, int] = {}
        self._counts: dict[Any, int] = {}  # phase -> rows seen
        self._sizes: dict[Any, int] = {}  # phase -> rows kept
        self._writers: list[list[tuple[int, Any, int, dict[str, Any]]]] = []  # (place, phase, number, row)
        self._writer: list[tuple[int, Any, int, dict[str, Any]]] = []
        self._tails: dict[Any, tuple[int, Any, int, dict[str, Any]]] = {}
        self._place = 0

    def add(self, phase: Any, row: dict[str, Any]) -> None:
        """Add the next row of the current writer."""
        if phase not in self._counts and len(self._counts) >= MAX_PHASES:
            phase = None
        number = self._counts.get(phase, 0)
        self._counts[phase] = number + 1
        self._place += 1
        one = (self._place, phase, number, row)
        if number % self._strides.get(phase, 1):
            self._tails[phase] = one
            return
        self._tails.pop(phase, None)
        self._writer.append(one)
        self._sizes[phase] = self._sizes.get(phase, 0) + 1
        if self._max_rows is not None and self._sizes[phase] > self._max_rows:
            self._strides[phase] = stride = 2 * self._strides.get(phase, 1)
            for rows in (*self._writers, self._writer):
                rows[:] = [one for one in rows if one[1] != phase or one[2] % stride == 0]
            self._sizes[phase] = sum(one[1] == phase for rows in (*self._writers, self._writer) for one in rows)

    def end_writer(self) -> None:
        """Finish the current writer; writers come newest first."""
        self._writers.append(sorted([*self._writer, *self._tails.values()], key=lambda one: one[0]))
        self._writer, self._tails = [], {}

    def rows(self) -> list[dict[str, Any]]:
        """Return the kept rows in the order in which they were written."""
        return [row for rows in reversed(self._writers) for *_, row in rows]


@dataclass(frozen=True)
class _Part:
    path: str
    attempt: int
    rank: int
    opened: int
    first: int
    last: int
    size: int


def _list_parts(run: Run, folder: str) -> list[_Part]:
    """Return the parts under a folder by name, without those contained in a joined one.

    Raises DamagedFile for a .jsonl file with another kind of name.
    """
    found: list[_Part] = []
    ends: dict[tuple[int, int, int], int] = {}  # writer -> last number so far; a joined part precedes those it contains
    for info in storage.list_files(run.fs, inside(run, folder)):
        match = re.fullmatch(r"(\d{1,9})-(\d{1,9})-(\d{1,15})-(\d{1,9})(?:-(\d{1,9}))?\.jsonl", info.base_name)
        if match is not None:
            attempt, rank, opened, first = (int(match[group]) for group in (1, 2, 3, 4))
            part = _Part(info.path, attempt, rank, opened, first, int(match[5] or first), info.size or 0)
            if part.last > ends.get((attempt, rank, opened), -1):
                ends[attempt, rank, opened] = part.last
                found.append(part)
        elif info.base_name.endswith(".jsonl"):
            raise DamagedFile(f"{info.path}: is not a part of a run's records (its name is attempt-rank-time-number)")
    return found


def _rows(run: Run, parts: Sequence[_Part]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a writer's parts in order, while the next few parts are read ahead."""
    with ThreadPoolExecutor(READERS) as pool:
        ahead: deque[tuple[_Part, Future[bytes]]] = deque()
        waiting = deque(parts)
        while waiting or ahead:
            while waiting and len(ahead) < READERS and (not ahead or sum(p.size for p, _ in ahead) < AHEAD_BYTES):
                part = waiting.popleft()
                ahead.append((part, pool.submit(_read_part, run, part)))
            part, content = ahead.popleft()
            yield from _parse_part(part, content.result())


def _read_part(run: Run, part: _Part) -> bytes:
    if part.size > MAX_PART_BYTES:
        raise DamagedFile(f"{part.path}: is not a part of a run's records ({part.size} bytes)")
    return storage.read_bytes(run.fs, part.path)


def _parse_part(part: _Part, content: bytes) -> Iterator[dict[str, Any]]:
    where = f"{part.path}: is not a part of a run's records"
    for line in io.BytesIO(content):
        row = parse_json(line, where)
        if (
            not isinstance(row, dict)
            or not _is_step(row.get("step", 0))
            or not isinstance(row.get("phase"), str | None)
        ):
            raise DamagedFile(f"{where} ({line[:60]!r})")
        yield row


def _is_step(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))
