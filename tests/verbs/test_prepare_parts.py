"""Parts of a prepare job are read side by side and joined in their order."""

import json
import threading

import pyarrow.parquet as pq
import pytest
from tests.waits import patience

from slimray import runs
from slimray.verbs import prepare_parts
from slimray.verbs.prepare_parts import Split, read_parts


def part(number: int) -> dict:
    rows = [{"path": f"{number}-{i}", "label": i, "frames": 10 * number + i} for i in range(number % 3)]
    return {"rows": rows, "bad": [{"path": f"{number}-bad", "reason": "no"}] * (number == 4), "left_out": []}


def test_parts_come_in_order_and_are_read_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_parts, "AHEAD", 6)
    run = runs.run_at(str(tmp_path))
    for number in range(20):
        runs.write_file(run, f"data/parts/{number}.json", json.dumps(part(number)).encode())
    read, together = runs.read_file, threading.Barrier(2, timeout=patience(30))

    def read_in_pairs(run: runs.Run, name: str) -> bytes:
        together.wait()  # nobody passes alone
        return read(run, name)

    monkeypatch.setattr(prepare_parts.runs, "read_file", read_in_pairs)
    found = list(read_parts(run, [f"{number}.json" for number in range(20)]))
    assert found == [part(number) for number in range(20)]


def test_a_part_that_is_gone_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="7"):
        list(read_parts(runs.run_at(str(tmp_path)), ["7.json"]))


def test_parts_are_joined(tmp_path):
    split = Split.at(tmp_path / "index.parquet")
    for number in range(6):
        split.add(part(number), 3)
    split.add({**part(1), "tried": 9, "objects": [{"image": "a"}]}, 3)
    assert (split.files, split.failed, len(split.bad), split.objects) == (27, 1, 1, [{"image": "a"}])
    assert split.index.num_rows == 7
    paths = pq.read_table(split.index.close()).column("path").to_pylist()
    assert paths == ["1-0", "2-0", "2-1", "4-0", "5-0", "5-1", "1-0"]
    assert split.lengths.tolist() == [10, 20, 21, 40, 50, 51, 10]
