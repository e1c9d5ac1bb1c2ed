"""Parts of a prepare job are read in parallel and joined in order."""

import json
import shutil
import threading
from collections import Counter
from pathlib import Path

import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tests.waits import patience

from slimray import runs
from slimray.data.bytes import read_whole
from slimray.data.cards import load_card
from slimray.data.rows import Unpacked, packed
from slimray.verbs import prepare, prepare_parts
from slimray.verbs.context import Context
from slimray.verbs.prepare_parts import Split, read_parts

ROOT = Path(__file__).resolve().parents[2]
OLD, DATASETS = ROOT / "tests/old_runs/storage/clips", ROOT / "datasets"


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
        together.wait()  # nobody passes the barrier alone
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


def test_a_job_whose_parts_are_all_there_joins_them_to_the_indexes_that_it_made_then(tmp_path):
    shutil.copytree(OLD, tmp_path / "clips")
    run, indexes = runs.open_run(str(tmp_path), "clips"), {}
    for split in ("train", "val"):
        path = tmp_path / f"clips/data/{split}.parquet"
        indexes[split] = pq.read_table(path)
        path.unlink()
    job = prepare.PrepareJob.model_validate(runs.read_job(run))
    prepare.run(job, Context(run, str(tmp_path), 2, "clips.yaml (clips)", Console(quiet=True), 1))
    for split, index in indexes.items():
        assert pq.read_table(tmp_path / f"clips/data/{split}.parquet").select(index.column_names).equals(index)
    card = runs.read_card(run)
    assert card is not None
    assert card["metrics"] == {k: {"clips": t.num_rows, "quarantined": 0} for k, t in indexes.items()}


def test_a_task_is_given_its_own_rows_alone_and_makes_its_shard_of_them(tmp_path):
    known = load_card("image_shapes", [DATASETS])
    data = {"card": known.model_dump(mode="json"), "clips": 1_000_000, "size": 32}
    job = prepare.PrepareJob.model_validate({"kind": "prepare", "name": "given-rows", "data": data})
    table = prepare._table(job, known, "train", "")
    rows = packed(prepare._given(prepare._Chunk("train", 7, 1000, 1003), table))
    assert len(rows) < 10_000
    work = prepare._Work(str(tmp_path), "", known, job.data, None, 30)
    (block,) = Unpacked(rows)()
    assert prepare._do_chunk(work, block)["clips"].tolist() == [3]
    made = json.loads((tmp_path / "data/parts/train-000007.json").read_bytes())
    assert [row["path"] for row in made["rows"]] == [f"train/{number:06d}.png" for number in (1000, 1001, 1002)]
    assert pq.read_table(tmp_path / "data" / prepare.shard_of("train", 7)).num_rows == 3
    for row in made["rows"]:
        picture = read_whole(pafs.LocalFileSystem(), f"{tmp_path}/data", row)
        assert picture == read_whole(pafs.LocalFileSystem(), f"{tmp_path}/data", {**row, "offset": -1})
        assert row["offset"] > 0
    shards = Counter(prepare.shard_of("train", number).split("/")[1] for number in range(4096))
    assert len(shards) == 256, "prefixes that a bucket can split off"
    assert max(shards.values()) < 3 * 16


def test_the_place_of_a_sample_is_that_of_its_row_group_whatever_the_order():
    rows = [{"path": "b", "shard": "s", "row": 1}, {"path": "bad"}, {"path": "a", "shard": "s", "row": 0}]
    part = {"rows": [*rows, {"path": "c", "shard": "t", "row": 0}]}
    prepare_parts.note_places(part, "s", [(4, 10), (14, 20)])
    assert [(row["path"], row.get("offset"), row.get("length")) for row in part["rows"]] == [
        ("b", 14, 20), ("bad", None, None), ("a", 4, 10), ("c", None, None)
    ]  # fmt: skip
