"""Chains of verbs in one file: jobs accept the runs of earlier ones before these exist; and imported modules."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.verbs.conftest import Here
from tests.waits import patience

from slimray import job, runs
from slimray.verbs import VERBS

CHAIN = """
kind: prepare
name: {name}-data
data: {{card: {card}, clips: 40, size: {size}, frames: 6, points: 256}}
---
kind: shrink
name: {name}-supernet
data: {{run: {name}-data, {data}}}
model: {{{model}}}
batch: {{total: 8, per_worker: 8}}
optim: {{reference_batch: 8, schedule: cosine, groups: no_norm_decay}}
stages:
  - {{name: teacher, epochs: 1, lr: 0.01}}
  - {{name: rest, free: {{depth: {depth}}}, epochs: 1, lr: 0.01}}
hold_out: 8
judge: {{calibrate: 16, calibrate_batch: 8, samples: 8}}
judged: 2
scale: {{workers: 1}}
---
kind: search
name: {name}-search
supernet: {name}-supernet
strategy: {{name: random, evaluations: 2}}
targets: [{{name: any}}]
judge: {{calibrate: 16, calibrate_batch: 8, samples: 8}}
scale: {{workers: 1}}
---
kind: train
name: {name}-tuned
data: {{run: {name}-data, {data}}}
model: {{run: {name}-search-any}}
init: {{from: {name}-search-any}}
batch: {{total: 8, per_worker: 8}}
optim: {{lr: 0.001, reference_batch: 8, epochs: 1, groups: no_norm_decay}}
scale: {{workers: 1}}
---
kind: recalibrate
name: {name}-again
run: {name}-tuned
judge: {{calibrate: 16, calibrate_batch: 8}}
---
kind: evaluate
name: {name}-scores
runs: [{name}-search-any, {name}-tuned, {name}-again]
pictures: 2
scale: {{workers: 1}}
"""
KINDS = {
    "images": {
        "card": "image_shapes", "size": 32, "data": "size: 32", "depth": [2, 3],
        "model": "name: ofa_mobilenetv3, preset: tiny, width: 0.25",
    },
    "clips": {
        "card": "moving_shapes", "size": 64, "data": "size: 64", "depth": [2, 3],
        "model": "name: ofa_tsm_mobilenetv3, preset: tiny, width: 0.25, num_segments: 4",
    },
    "clouds": {
        "card": "shapes", "size": 32, "data": "points: {num_points: 128}", "depth": [1, 2],
        "model": "name: ofa_pvcnn, preset: tiny, width: 0.25, voxel: 0.5, in_channels: 3",
    },
}  # fmt: skip


def chain(name: str) -> str:
    return CHAIN.format(name=name, **KINDS[name])


@pytest.mark.parametrize("name", KINDS)
def test_a_chain_of_runs_that_do_not_exist_yet_passes_the_check(name, tmp_path):
    path = tmp_path / "chain.yaml"
    path.write_text(chain(name))
    found = job.check(job.load([path]), str(tmp_path / "runs"))
    assert [one["problems"] for one in found] == [[]] * 6
    tuned = next(one for one in found if one["name"] == f"{name}-tuned")
    assert tuned["model"] == f"that of {name}-search-any"
    assert tuned["steps"] == 4


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "model: {run: images-search-any}",
            "model: {run: images-search}",
            "'images-search' will hold tables of numbers",
        ),
        (
            "init: {from: images-search-any}",
            "init: {from: images-data}",
            "'images-data' will hold a dataset",
        ),
        ("runs: [images-search-any", "runs: [images-supernet", "runs: 'images-supernet' will hold a supernet"),
        ("supernet: images-supernet", "supernet: images-tuned", "images-tuned"),
        ("model: {run: images-search-any}", "model: {run: images-search-any, width: 2}", "model.width: is for name"),
        ("model: {run: images-search-any}", "model: {}", "model.name: is required"),
    ],
)
def test_a_run_that_will_hold_something_else_is_one_sentence(old, new, sentence, tmp_path):
    path = tmp_path / "chain.yaml"
    path.write_text(chain("images").replace(old, new))
    try:
        problems = [one for facts in job.check(job.load([path]), str(tmp_path / "runs")) for one in facts["problems"]]
    except Exception as error:  # noqa: BLE001 a document that is not read says it at once
        problems = str(error).splitlines()
    assert any(sentence in problem for problem in problems), problems


def test_a_network_found_in_clips_is_not_trained_on_images(tmp_path):
    path = tmp_path / "chain.yaml"
    mixed = chain("images").replace("model: {run: images-search-any}", "model: {run: clips-search-any}")
    path.write_text(f"{chain('clips')}---{mixed}")
    problems = [one for facts in job.check(job.load([path]), str(tmp_path / "runs")) for one in facts["problems"]]
    assert any("model.run: 'clips-search-any' takes clips, the dataset has images" in one for one in problems)


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("names", [("images",), pytest.param(tuple(KINDS), marks=pytest.mark.benchmark)])
def test_what_a_search_finds_is_evaluated_trained_on_and_predicted_with(names, tmp_path):
    shell = Here(tmp_path)
    shell.ok("run", shell.write("chain.yaml", "---".join(chain(name) for name in names)))
    for name in names:
        found, tuned = (runs.open_run(str(shell.storage), f"{name}-{which}") for which in ("search-any", "tuned"))
        scores = json.loads(runs.read_file(runs.open_run(str(shell.storage), f"{name}-scores"), "results.json"))
        assert [row["run"] for row in scores["rows"]] == [found.name, tuned.name, f"{name}-again"]
        (_, model, taken), (_, trained, again) = runs.read_model(found), runs.read_model(tuned)
        assert trained == model
        for field in ("size", "num_segments", "num_points"):
            assert again["recipe"].get(field) == taken["recipe"].get(field)
    picture = tmp_path / "picture.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(picture)
    for which in ("search-any", "tuned"):
        assert "%" in shell.ok("predict", f"images-{which}", str(picture))
    assert "holds a supernet" in shell.run("predict", "images-supernet", str(picture)).stderr


# -------------------------------------------------------------------------------------------------- a quick house


def imported(*arguments: str, cwd: Path) -> set[str]:
    """Return the modules that a command imports."""
    code = f"""
import sys
from slimray.cli.main import main
sys.argv = ["slimray", *{arguments!r}]
try:
    main()
except SystemExit:
    pass
sys.stderr.write("\\n" + " ".join(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=patience(120))
    return set(done.stderr.splitlines()[-1].split())


HEAVY = {"ray", "torch._dynamo", "decord", "open3d", "wandb", "matplotlib", "pandas", "scipy", "sklearn", "optuna"}


def test_checking_a_file_imports_torch_and_neither_ray_nor_decoders(tmp_path):
    jobs = Path(__file__).resolve().parents[2] / "jobs"
    found = imported("check", str(jobs / "quickstart.yaml"), cwd=tmp_path)
    assert "torch" in found, "the networks are built"
    assert not found & HEAVY
    assert "slimray.train.loop" not in found


@pytest.mark.parametrize("command", ["runs", "show there", "explain", "explain train.optim", "init examples"])
def test_looking_at_runs_and_help_imports_no_torch(command, tmp_path):
    run = runs.open_run(str(tmp_path / "runs"), "there")
    runs.begin(run, {"kind": "train", "name": "there"}, 1)
    runs.end(run, "finished")
    found = imported(*command.split(), cwd=tmp_path)
    assert not found & (HEAVY | {"torch"})


def test_every_verb_has_the_same_four_names():
    for kind, verb in VERBS.items():
        assert verb.__name__ == f"slimray.verbs.{kind}"
        assert issubclass(verb.Job, job.Spec)
        assert all(callable(getattr(verb, name)) for name in ("check", "makes", "run"))
