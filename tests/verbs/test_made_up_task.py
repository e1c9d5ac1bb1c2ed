"""The contract of a task: one that only tests define is checked, trained, evaluated, used to predict, and reported."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from rich.console import Console
from tests.pages import Elements
from tests.tasks import made_up
from tests.waits import patience

from slimray import job, runs
from slimray.tasks import TASKS
from slimray.tasks.network import load_network
from slimray.tasks.predict import predict_files

pytestmark = [pytest.mark.ray, pytest.mark.timeout(patience(300)), pytest.mark.usefixtures("no_ray")]
JOBS = """
kind: train
name: counting
data:
  card: {{name: squares, layout: folders, splits: {{train: train, val: val}}, sample: image, task: count_squares}}
  root: {root}
  size: 16
  resize: 16
  flip: false
  images: {{area: [1, 1], ratio: [1, 1], brightness: 0, saturation: 0}}
model: {{name: resnet18, width: 0.125}}
batch: {{total: 6, per_worker: 6}}
optim: {{optimizer: adam, lr: 0.003, reference_batch: 6, epochs: 4, groups: plain, schedule: constant}}
checkpoint: {{keep_last: 1}}
---
kind: evaluate
name: counted
runs: [counting]
pictures: 2
"""


def draw(folder: Path) -> None:
    """Write images of 0, 1 and 2 bright squares, in folders by their number."""
    rng = np.random.default_rng(0)
    for split, each in (("train", 4), ("val", 2)):
        for count in range(3):
            (folder / split / str(count)).mkdir(parents=True)
            for number in range(each):
                picture = rng.integers(0, 40, (16, 16, 3), np.uint8)
                for square in range(count):
                    picture[2 + 7 * square : 7 + 7 * square, 3:12] = 240
                Image.fromarray(picture).save(folder / split / str(count) / f"{number}.png")


def test_a_task_of_the_tests_runs_through_every_verb(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, made_up.COUNT.name, made_up.COUNT)
    draw(tmp_path / "squares")
    (tmp_path / "jobs.yaml").write_text(JOBS.format(root=tmp_path / "squares"))
    storage = str(tmp_path / "runs")
    loaded = job.load([str(tmp_path / "jobs.yaml")], [])
    known = job.check(loaded, storage)
    job.require(known)
    assert known[0]["params"] > 0
    root = str(Path(__file__).resolve().parents[2])  # the workers import the task from here
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    hook = {"worker_process_setup_hook": made_up.register}
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=hook)
    for one in loaded:
        assert job.run(one, storage, Console(quiet=True), False, 4) == "finished"
    run, scored = runs.open_run(storage, "counting"), runs.open_run(storage, "counted")
    card = runs.read_card(run)
    judged = [row["val/miss"] for row in runs.read_parts(run, "metrics") if "val/miss" in row]
    assert len(judged) == 4
    assert card["metrics"]["best"]["val/miss"] == min(judged)  # lower is better
    steps = {one.meta["progress"]["last"]["val/miss"] for one in runs.list_checkpoints(run)}
    assert min(judged) in steps, "the best checkpoint is kept"
    assert runs.describe(run)["result"] == f"miss {min(judged):.4g} squares"
    (row,) = json.loads(runs.read_file(scored, "results.json"))["rows"]
    assert row["miss"] == pytest.approx(judged[-1], rel=1e-5)
    text = Elements(runs.read_file(scored, "report.html").decode()).text
    assert "How far off" in text
    assert "told " in text
    assert "best squares missed" in Elements(runs.read_file(run, "report.html").decode()).text
    (found,) = predict_files(load_network(run), [tmp_path / "squares/val/2/0.png"], 5)
    assert found.top[0][0] == "squares"
