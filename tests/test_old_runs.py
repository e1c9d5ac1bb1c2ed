"""Runs written by commit d4a6aae remain usable: read, skipped if finished, resumed if not, and their models loaded.

tests/old_runs holds job files, the storage folder that they left (tests/old_runs/README.md), one file of each kind to
predict, and in recorded.json the output of the commands and the bits of the models. Everything is used in a copy.
"""

import contextlib
import hashlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml
from tests.golden.record import machine
from tests.verbs.conftest import Here, seen

# ------------------------------------------------------------------ imports that follow the package when files move
from slimray import job, runs
from slimray.cli import main as cli
from slimray.report.pages import train_report

# -------------------------------------------------------------------------------------------------------------------

OLD = Path(__file__).resolve().parent / "old_runs"
RECORDED = json.loads((OLD / "recorded.json").read_text())
SAME_MACHINE = machine() == RECORDED["machine"]
SAMPLE = 100 / 6  # percent; the smallest validation split has six samples, one may fall on the other side
FILES = ("clips.yaml", "images.yaml", "clouds.yaml", "frustums.yaml")
NETS = ("clips-net", "images-net", "clouds-net", "frustums-net")
PREDICTED = {"clips-net": "clip.mp4", "images-net": "image.png", "clouds-net": "cloud.xyz",
             "clips-found-small": "clip.mp4", "images-found-small": "image.png", "clouds-found-small": "cloud.xyz",
             "images-paths-derived": "image.png"}  # fmt: skip


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the folder to work in."""
    shutil.copytree(OLD, tmp_path / "old")
    (tmp_path / "old/storage").rename(tmp_path / "old/runs")
    monkeypatch.chdir(tmp_path / "old")
    monkeypatch.delenv("SLIMRAY_STORAGE", raising=False)
    return tmp_path / "old"


def slimray(*arguments: str) -> str:
    """What a command prints on standard output, in this process; AssertionError if it fails."""
    code, out, err = slimray_all(*arguments)
    assert not code, out + err
    return out


def slimray_all(*arguments: str) -> tuple[int, str, str]:
    """The exit code of a command, and what it prints on standard output and as errors."""
    code, out, err, before = 0, io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["slimray", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def bits(folder: Path) -> str:
    """A digest of the weights of a run."""
    tensors = safetensors.numpy.load((folder / "model/weights.safetensors").read_bytes())
    return hashlib.sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors))).hexdigest()[:16]


def test_the_folder_names_no_place_of_the_machine_that_made_it():
    for path in OLD.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".yaml", ".jsonl", ".html", ".log", "") and path.name != "lock":
            text = path.read_text()
            assert not any(place in text for place in ("/work/", "/tmp/", "/root/", "/home/", "/srv/")), path


def test_every_old_run_is_listed_and_shown(old):
    rows = {row["name"]: row for row in json.loads(slimray("runs", "--json"))}
    for name, then in RECORDED["runs"].items():
        assert {key: rows[name][key] for key in then} == then
        shown = json.loads(slimray("show", name, "--json"))
        assert shown["state"] == then["state"]
        for key, value in RECORDED["metrics"].get(name, {}).items():
            assert shown["card"]["metrics"][key] == value
    assert slimray("show", "clips-net").startswith("kind: train\nstate: finished\n")


def test_reports_are_drawn_of_old_records(old):
    for name in NETS:
        page = train_report(runs.open_run("runs", name))
        assert "<svg" in page
        assert name in page


@pytest.mark.parametrize("file", FILES)
def test_the_same_file_again_is_skipped_as_finished(old, file):
    rows = json.loads(slimray("run", file, "--json"))
    assert {row["result"] for row in rows} == {"skipped"}


def test_check_tells_what_is_finished_and_what_would_resume(old):
    facts = json.loads(slimray("check", "frustums.yaml", "clips-unfinished.yaml", "--json"))
    assert [one["state"] for one in facts] == ["finished"] * 3 + ["resume"]
    assert not any(one["problems"] for one in facts)


NEW_FIELDS = [
    ("val_every", "val_every=3", "val_every: 1 -> 3"),
    ("optim.momentum", "optim.momentum=0.8", "optim.momentum: 0.9 -> 0.8"),
    ("data.images", "data.images.area=[0.5,1]", "data.images.area: [0.08, 1.0] -> [0.5, 1.0]"),
    ("average", "average=prob", 'average: "logits" -> "prob"'),
]


@pytest.mark.parametrize(("field", "change", "difference"), NEW_FIELDS, ids=[field for field, *_ in NEW_FIELDS])
def test_a_field_that_an_old_job_lacks_has_its_default(old, field, change, difference):
    run = runs.open_run("runs", "clips-unfinished")
    document = section = runs.read_job(run)
    *sections, last = field.split(".")
    for name in sections:
        section = section[name]
    del section[last]
    runs.write_job(run, document)
    (facts,) = json.loads(slimray("check", "clips-unfinished.yaml", "--json"))
    assert (facts["state"], facts["problems"]) == ("resume", [])
    code, _, err = slimray_all("check", "clips-unfinished.yaml", "--set", change)
    assert code == 2
    assert f"exists with other settings ({difference})" in err


def test_short_clips_of_a_run_begun_before_they_were_spread_stay_as_published(old):
    (unfinished,) = job.load(["clips-unfinished.yaml"], [])
    assert unfinished.job.data.short_clips is None  # that is `spread` in a new run
    assert job._as_begun(unfinished, "runs").job.data.short_clips == "published"
    code, _, err = slimray_all("check", "clips-unfinished.yaml", "--set", "data.short_clips=spread")
    assert code == 2
    assert 'exists with other settings (data.short_clips: "published" -> "spread")' in err


def test_words_about_a_dataset_may_change(old):
    """The card of a generated dataset names a file of the package, which may move."""
    run = runs.open_run("runs", "clips")
    document = runs.read_job(run)
    document["data"]["card"] |= {"description": "in other words", "source": "elsewhere.py"}
    runs.write_job(run, document)
    (old / "data.yaml").write_text((old / "clips.yaml").read_text().partition("---")[0])
    (facts,) = json.loads(slimray("check", "data.yaml", "--json"))
    assert facts["state"] == "finished"


def test_an_old_job_file_is_a_job_of_today(old):
    for folder in sorted((old / "runs").iterdir()):
        document = runs.read_job(runs.open_run("runs", folder.name))
        if document["kind"] in job.SPECS and "extends" not in document:
            (loaded,) = job.resolve([(Path("job.yaml"), document)])
            assert loaded.job.name in (folder.name, document["name"])


@pytest.mark.parametrize(("name", "file"), PREDICTED.items())
def test_an_old_model_answers_as_it_did(old, name, file):
    options = ["--out", "labelled"] if file == "cloud.xyz" else []
    (row,) = json.loads(slimray("predict", name, f"files/{file}", "--top", "20", "--json", *options))
    then = RECORDED["answers"][name]
    assert {label for label, _ in row["top"]} == {label for label, _ in then}
    if SAME_MACHINE:  # to rounding: probabilities are computed by numpy now, by torch then
        assert [label for label, _ in row["top"]] == [label for label, _ in then]
        assert [share for _, share in row["top"]] == pytest.approx([share for _, share in then], abs=1e-7)
    assert dict(map(tuple, row["top"])) == pytest.approx(dict(map(tuple, then)), abs=1e-3)


def test_old_weights_are_where_they_were():
    for name, digest in RECORDED["bits"].items():
        assert bits(OLD / "storage" / name) == digest


# ------------------------------------------------------------------------------------------------------ with workers

EVALUATED = ("clips-eval", "images-eval", "clouds-eval", "frustums-eval")


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_unfinished_run_resumes_to_the_recorded_bits_and_old_models_are_scored_as_then(old):
    shell = Here(old)
    jobs = [runs.read_job(runs.open_run("runs", name)) for name in EVALUATED]
    again = [yaml.safe_dump(job | {"name": f"{job['name']}-again"}) for job in jobs]
    shell.ok("run", "clips-unfinished.yaml", shell.write("again.yaml", "---\n".join(again)))
    unfinished, finished = old / "runs/clips-unfinished", old / "runs/clips-net"
    cards = [json.loads((folder / "card.json").read_text()) for folder in (unfinished, finished)]
    assert (cards[0]["attempt"], cards[0]["steps"]) == (2, cards[1]["steps"])
    assert seen(shell, "clips-unfinished") == seen(shell, "clips-net")
    weights = [
        safetensors.numpy.load((folder / "model/weights.safetensors").read_bytes()) for folder in (unfinished, finished)
    ]
    assert weights[0].keys() == weights[1].keys()
    if SAME_MACHINE:
        for name, value in weights[1].items():
            assert np.array_equal(weights[0][name], value), name
    (checkpoint,) = OLD.glob("storage/clips-unfinished/checkpoints/*/state.safetensors")
    began = safetensors.numpy.load(checkpoint.read_bytes())
    learned = [name for name in weights[1] if name.endswith((".weight", ".bias"))]
    moved = sum(distance(began[f"replica.model.{name}"], weights[1][name]) ** 2 for name in learned)
    apart = sum(distance(weights[0][name], weights[1][name]) ** 2 for name in learned)
    assert apart**0.5 < 0.5 * moved**0.5, "from the checkpoint on it trained something else"
    for name in EVALUATED:
        then, now = (json.loads((old / f"runs/{one}/results.json").read_text()) for one in (name, f"{name}-again"))
        for old_row, row in zip(then["rows"], now["rows"], strict=True):
            if "ap" in old_row:  # boxes: a chance of 100 / classes was told, which means nothing for them
                del old_row["chance"]
            assert_same_numbers(old_row, row, name)
        if SAME_MACHINE:
            assert now["confusion"] == then["confusion"]


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """How far two arrays are apart, as a norm."""
    return float(np.linalg.norm(one.astype(np.float64) - other))


def assert_same_numbers(then: Any, now: Any, where: str) -> None:
    """AssertionError unless every number of `then` is in `now`: equal, or on another machine one sample apart."""
    if isinstance(then, dict):
        for key, value in then.items():
            assert_same_numbers(value, now[key], f"{where}: {key}")
    elif isinstance(then, float) and not SAME_MACHINE:
        assert now == pytest.approx(then, rel=0.02, abs=SAMPLE), where
    else:
        assert now == then, where
