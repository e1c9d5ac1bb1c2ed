"""Modified run folders: whatever their files hold, `runs`, `show` and the pages' readers report it and go on.

Two ways of changing them, with fixed seeds: bits flipped in files that slimray wrote, and values of other types in
their place, drawn from a grammar. What is checked: no error but the two kinds of one sentence, rows that can be shown.
"""

import copy
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from tests.waits import patience

from slimray import runs
from slimray.cli import main
from slimray.report.dashboard.watch import Watch

NUM_FLIPS, NUM_VALUES = 60, 150
JOB = {
    "kind": "train",
    "name": "a",
    "data": {"card": {"name": "x", "classes": ["up", "down"]}},
    "optim": {"lr": 0.1},
    "tracking": {"tags": []},
}
CARD = {
    "metrics": {
        "best": {"val/top1": 90.0, "epoch": 3},
        "last": {"val/top1": 80.0},
        "rows": [{"run": "a", "miou": 1.0}],
    },
    "goodput": {"goodput": 0.5, "useful_s": 1.0, "wall_s": 2.0, "restarts": 0, "repeated_steps": 0},
    "dataset": {"name": "x"},
}
RESULTS = {"classes": ["up", "down"], "confusion": {"a": [[1, 0], [0, 1]]}, "rows": [], "trials": [], "targets": []}
WRONG: list[Any] = [
    None, True, False, "", "a", "\x1b[31m[red]", "</script><script>", "\ud800", "x" * 5000, 0, -1, 1 << 63, 1 << 70,
    int("9" * 400), 1e300, -1e300, float("nan"), float("inf"), [], [[]], [None], {}, {"": {}}, {"type": "Location"},
    {"a": {"b": [1, {"c": None}]}}, [0] * 50, "2026-01-01", "../../x", "s3://u:p@b/x",
]  # fmt: skip


def make_run(folder: Path) -> runs.Run:
    """A finished run with a file of each kind that pages read."""
    run = runs.open_run(str(folder), "a")
    runs.begin(run, JOB, 1)
    writer = runs.PartWriter(run, "metrics", 1, 0)
    for step in range(4):
        writer.write({"step": step, "phase": "train", "epoch": step / 2, "train/loss": 1.0, "time": 1.7e9 + step})
    writer.write({"step": 3, "phase": "val", "epoch": 2.0, "val/top1": 50.0, "confusion": [[1, 0], [0, 1]]})
    writer.close()
    bad = runs.PartWriter(run, "quarantine", 1, 0)
    bad.write({"path": "a.mp4", "reason": "cut"})
    bad.close()
    runs.write_card(run, CARD)
    runs.write_file(run, "results.json", json.dumps(RESULTS).encode())
    runs.write_file(run, "front.json", json.dumps({"fronts": {"macs": [{"macs": 1, "top1": 2}]}}).encode())
    stage = runs.run_at(f"{run.uri}/stages/0-kernel")
    runs.begin(stage, JOB, 1)
    runs.end(stage, "finished")
    runs.write_file(stage, "results.json", json.dumps({"rows": [{"top1": 1.0}]}).encode())
    runs.end(run, "finished", "all is well")
    owner = {"token": "t", "host": "h", "pid": 1, "born": 1, "heartbeat": 1.7e9}
    Path(run.path, "lock").write_text(json.dumps(owner))
    return run


def files_of(run: runs.Run) -> list[Path]:
    return sorted(path for path in Path(run.path).rglob("*") if path.is_file() and path.name != ".slimray")


def read_everything(where: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Return the rows of `slimray runs --json`, after all readers have read the folder."""
    for command in (["runs"], ["show", "a"], ["show", "a", "--json"], ["runs", "--json"]):
        capsys.readouterr()
        try:
            with mock.patch.object(sys, "argv", ["slimray", *command, "--storage", str(where)]):
                main.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        assert code in (0, 2), (command, said.err)
        assert "Traceback" not in said.err
        assert "\x1b" not in said.out + said.err
        if command[-1] == "--json" and code == 0:
            found = json.loads(said.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    rows = found
    watch = Watch(str(where))
    try:
        for row in watch.rows(patience_s=patience(60)):
            assert row["state"] != "reading"
            json.dumps(row)
        look = watch.look("a", patience_s=patience(60))
        if look is not None:
            assert look.row["state"] != "reading"
            json.dumps([look.problems, look.job_text, look.version])
    finally:
        watch.close()
    return rows


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value inside a plain value, itself included."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*path, key))


def with_value(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    document = copy.deepcopy(document)
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return document


def test_a_whole_run_is_read(tmp_path, capsys):
    make_run(tmp_path)
    (row,) = read_everything(tmp_path, capsys)
    assert (row["state"], row["kind"], row["result"]) == ("finished", "train", "top1 90.0 %")


def test_flipped_bits_are_told_and_the_other_runs_are_listed(tmp_path, capsys):
    run, draw = make_run(tmp_path), random.Random(1)
    runs.write_job(runs.open_run(str(tmp_path), "b"), JOB | {"name": "b"})
    files = files_of(run)
    for _ in range(NUM_FLIPS):
        path = draw.choice(files)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 4, 40))):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        cut = draw.choice((None, None, draw.randrange(len(damaged))))
        path.write_bytes(bytes(damaged)[:cut])
        assert [row["name"] for row in read_everything(tmp_path, capsys)] == ["a", "b"]
        path.write_bytes(whole)


def test_values_of_other_types_are_told_and_the_other_runs_are_listed(tmp_path, capsys):
    run, draw = make_run(tmp_path), random.Random(2)
    runs.write_job(runs.open_run(str(tmp_path), "b"), JOB | {"name": "b"})
    files = files_of(run)
    for _ in range(NUM_VALUES):
        path, value = draw.choice(files), draw.choice(WRONG)
        whole = path.read_text()
        if path.suffix == ".yaml":
            document = yaml.safe_load(whole)
            text = yaml.dump(with_value(document, draw.choice(list(places(document))), value))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in whole.splitlines()]
            rows = with_value(rows, draw.choice([place for place in places(rows) if place]), value)
            text = "".join(json.dumps(row) + "\n" for row in rows)
        else:
            document = json.loads(whole)
            text = json.dumps(with_value(document, draw.choice(list(places(document))), value))
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        assert [row["name"] for row in read_everything(tmp_path, capsys)] == ["a", "b"], (path, value)
        path.write_text(whole)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("status.json", {"updated": 1e300}),
        ("status.json", {"updated": int("9" * 400)}),
        ("status.json", {"started": float("nan")}),
        ("status.json", {"state": {"type": "Location"}}),
        ("status.json", {"attempt": True}),
        ("status.json", {"message": {"a": 1}}),
        ("status.json", b"[" * 100_000),
        ("status.json", b'{"state": "finished"}' + b" " * 2_000_000),
        ("lock", {"pid": 1 << 70}),
        ("job.yaml", b"kind: !!int ''\n"),
        ("job.yaml", b"kind: !!bool maybe\n"),
        ("job.yaml", b"x" * 2_000_000),
        ("card.json", b"{" * 100_000),
        ("card.json", b"[1]"),
    ],
)
def test_a_damaged_run_is_a_row_that_says_so(tmp_path, capsys, file, content):
    run = make_run(tmp_path)
    path = Path(run.path, file)
    if file == "lock":
        status = Path(run.path, "status.json")  # of a run that runs
        status.write_text(status.read_text().replace('"finished"', '"running"'))
    path.write_bytes(
        content if isinstance(content, bytes) else json.dumps(json.loads(path.read_bytes()) | content).encode()
    )
    (row,) = read_everything(tmp_path, capsys)
    assert row["state"] == "damaged"
    assert file in row["message"]


@pytest.mark.parametrize("card", [{"goodput": {}}, {"metrics": []}, {"metrics": {"best": 5, "rows": 7}}, {}])
def test_a_card_without_its_numbers_is_shown_without_them(tmp_path, capsys, card):
    run = make_run(tmp_path)
    runs.write_card(run, card)
    (row,) = read_everything(tmp_path, capsys)
    assert (row["state"], row["result"]) == ("finished", None)
