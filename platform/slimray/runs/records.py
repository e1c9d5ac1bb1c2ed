"""Append-only records of a run: rows as immutable numbered JSONL parts, because object stores cannot append.

`PartWriter` writes them from one rank, named by attempt, rank and number; `read_parts` returns the rows of a folder and
keeps, of the steps that were done twice, those of the newest attempt.
"""

import json
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from slimray import storage
from slimray.credentials import redact
from slimray.runs.folder import Run, json_value, known_name, write_file
from slimray.storage import StorageError, join

FLUSH_S = 10.0
FLUSH_ROWS = 1000
MAX_WAITING_ROWS = 100_000

log = logging.getLogger(__name__)


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
        self._stem = f"{known_name(folder)}/{attempt:04d}-{rank:05d}-{time.time_ns() // 1_000_000}"
        self._lines: list[bytes] = []
        self._changed = threading.Condition()
        self._closing = self._failed = self._hurry = False
        self._num_written = 0
        self._error: StorageError | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"{folder} of {run.name}")
        self._thread.start()

    def write(self, row: Mapping[str, Any]) -> None:
        """Queue one row (JSON values, numpy scalars), credentials hidden.

        Raises StorageError once if rows cannot be written any more.
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
