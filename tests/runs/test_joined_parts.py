"""Small parts of records are joined, and a reader gets every row once, at any time and even if a writer is killed."""

import threading
from pathlib import Path

import pytest
from tests.waits import patience

from slimray import runs
from slimray.runs import records
from slimray.storage import StorageError


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "JOINED", 4)
    return runs.run_at(str(tmp_path))


def written(run: runs.Run, count: int, rank: int = 0, first: int = 0, attempt: int = 1) -> None:
    writer = runs.PartWriter(run, "metrics", attempt, rank)
    for step in range(first, first + count):
        writer.write({"step": step, "phase": "train", "x": step * step})
        writer.flush()
    writer.close()


def steps(run: runs.Run) -> list[tuple[int, int]]:
    return [(row["rank"], row["step"]) for row in runs.read_parts(run, "metrics")]


def numbers(run: runs.Run) -> list[str]:
    return sorted(path.name.split("-", 3)[3] for path in Path(run.path).glob("metrics/*"))


def test_of_every_few_parts_one_is_left(run):
    written(run, 10)
    assert numbers(run) == ["000000-000003.jsonl", "000004-000007.jsonl", "000008.jsonl", "000009.jsonl"]
    assert steps(run) == [(0, step) for step in range(10)]
    written(run, 5, rank=1)
    written(run, 6, first=6, attempt=2)
    rows = steps(run)
    assert sorted(rows) == [(0, step) for step in range(12)] + [(1, step) for step in range(5)]
    assert runs.count_writers(run, "metrics") == 2
    assert len(runs.read_parts(run, "metrics", max_rows=4)) < len(rows)


def test_what_is_left_of_a_joining_that_was_cut_short_is_not_read_twice(run, monkeypatch):
    def broken(*_) -> None:
        raise StorageError("away")

    monkeypatch.setattr(records.storage, "delete", broken)
    writer = runs.PartWriter(run, "quarantine", 1, 0)
    for number in range(6):
        writer.write({"path": "a", "number": number % 2})  # rows without a step
        writer.flush()
    writer.close()
    assert len(list(Path(run.path).glob("quarantine/*"))) == 7
    monkeypatch.undo()
    assert len(records._list_parts(run, "quarantine")) == 3
    assert [row["number"] for row in runs.read_parts(run, "quarantine")] == [0, 1]
    written(run, 8)
    for path in Path(run.path).glob("metrics/*-000000-*"):
        content = path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(content):
            path.with_name(path.name.replace("-000000-000003", f"-{number:06d}")).write_bytes(line)
    assert steps(run) == [(0, step) for step in range(8)]


def test_large_parts_stay_as_they_are(run, monkeypatch):
    monkeypatch.setattr(records, "MAX_JOINED_BYTES", 100)
    written(run, 5)
    assert numbers(run) == [f"{number:06d}.jsonl" for number in range(5)]


def test_a_reader_never_misses_a_row_while_parts_are_joined(run):
    writer, done, wrong = runs.PartWriter(run, "metrics", 1, 0), threading.Event(), []
    safe = [0]

    def look() -> None:
        while not done.is_set():
            least = safe[0]
            found = [step for _, step in steps(run)]
            if found != list(range(len(found))) or len(found) < least:
                wrong.append((least, found))

    thread = threading.Thread(target=look)
    thread.start()
    for step in range(60):
        writer.write({"step": step, "phase": "train"})
        writer.flush()
        safe[0] = step + 1
    writer.close()
    done.set()
    thread.join(patience(30))
    assert wrong == []
    assert steps(run) == [(0, step) for step in range(60)]
