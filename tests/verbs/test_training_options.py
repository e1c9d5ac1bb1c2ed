"""Results of `check` for the options of a training, and compatibility with runs of earlier versions; without Ray."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from slimray import job, runs
from slimray.data.images.pictures import ImageRecipe
from slimray.data.video.clips import ClipRecipe
from slimray.spec import UserError

IMAGES = """
kind: train
name: net
data: {card: my_images, root: images, size: 32}
model: {name: resnet18, width: 0.125}
batch: {total: 4, per_worker: 2}
optim: {lr: 0.02, reference_batch: 4, epochs: 2}
scale: {workers: 2}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Write six images of two classes in `images`."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 6), ("val", 2)):
        for number in range(count):
            file = tmp_path / f"images/{split}/{'ab'[number % 2]}/{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((40, 40, 3), 40 * number, np.uint8)).save(file)
    return tmp_path


def load(text: str = IMAGES, *sets: str) -> list[job.Loaded]:
    Path("job.yaml").write_text(text)
    return job.load(["job.yaml"], sets)


def problems(*sets: str) -> list[str]:
    (facts,) = job.check(load(IMAGES, *sets), "runs")
    return facts["problems"]


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        (["optim.precise_norm=3"], "optim.precise_norm: 3 samples are too few for 2 workers: set at least 4"),
        (["optim.precision=tf32"], "optim.precision: tf32 needs GPUs: set scale.gpus_per_worker, or use fp32"),
        (["teacher=x", "optim.mutual=1", "optim.groups=plain"], "optim.mutual: cannot be combined with teacher"),
        (["scale.compile=true", "optim.mutual=1", "optim.groups=plain"], "scale.compile: compiles one network"),
        (["data.val=null", "checkpoint.ship=best"], "checkpoint.ship: best needs validations"),
    ],
)
def test_sections_that_do_not_fit_are_one_sentence(sets, sentence):
    with pytest.raises(UserError) as error:
        load(IMAGES, *sets)
    assert sentence in str(error.value)


def test_what_only_the_dataset_tells_is_found_by_check():
    assert problems() == []
    assert problems("batch.drop_last=true") == []
    (dropped,) = problems("batch.drop_last=true", "batch.total=8")
    assert "batch.drop_last: 6 training samples do not fill a batch of 8" in dropped
    (missing,) = problems("teacher=nobody")
    assert "teacher: 'nobody' is not a run that holds a network" in missing


def write_teacher(task: str, classes: int, recipe: dict[str, Any] | None = None) -> None:
    """Write a run `old` with what `check` reads of a network: its task, samples and classes."""
    run = runs.open_run("runs", "old")
    if not runs.exists(run, "job.yaml"):
        runs.begin(run, {"kind": "train", "name": "old"}, 1)
        runs.end(run, "finished")
    recipe = ImageRecipe(size=32).to_dict() if recipe is None else recipe
    taken = {"recipe": recipe, "pixels": {}, "classes": ["a"] * classes, "task": task}
    runs.write_file(run, "model/input.json", json.dumps(taken).encode())


def test_a_finished_teacher_of_another_task_is_found_by_check():
    write_teacher("classify", 2)
    assert problems("teacher=old") == []
    write_teacher("classify", 7)
    assert problems("teacher=old") == ["job.yaml (net): teacher: 'old' has 7 classes, the dataset has 2"]
    write_teacher("segment", 2)
    (said,) = problems("teacher=old")
    assert said == "job.yaml (net): teacher: 'old' is for the task segment, the dataset for classify: name another run"
    write_teacher("classify", 2, ClipRecipe(num_segments=2, size=32).to_dict())
    (said,) = problems("teacher=old")
    assert said == "job.yaml (net): teacher: 'old' takes clips, the dataset has images: name another run"
    runs.write_file(runs.open_run("runs", "old"), "model/input.json", b"[1]")
    (said,) = problems("teacher=old")
    assert "teacher: 'old' is not a run that holds a network" in said


AHEAD = """
kind: train
name: first
data: {{card: {card}, size: 32}}
model: {model}
batch: {{total: 4, per_worker: 2}}
optim: {{lr: 0.02, reference_batch: 4, epochs: 2}}
---
"""


def test_a_teacher_that_a_job_ahead_trains_is_compared_too():
    def said(card: str, model: str) -> list[str]:
        (_, facts) = job.check(load(AHEAD.format(card=card, model=model) + IMAGES, "net:teacher=first"), "runs")
        return facts["problems"]

    assert said("my_images, root: images", "{name: resnet18, width: 0.125}") == []
    (other,) = said("my_folders", "{name: tsm_resnet18}")
    assert "teacher: 'first' takes clips, the dataset has images: name another run" in other
    (other,) = said("s3dis", "{name: pvcnn_s3dis}")
    assert "teacher: 'first' is for the task segment, the dataset for classify: name another run" in other


def test_a_task_without_classes_takes_no_teacher():
    text = IMAGES.replace("my_images, root: images", "super_resolution, root: images")
    text = text.replace("{name: resnet18, width: 0.125}", "{name: carn}") + "teacher: nobody\n"
    (facts,) = job.check(load(text), "runs")
    assert any("teacher: works for classes of samples, points or tokens, not for" in one for one in facts["problems"])


def test_steps_are_counted_without_the_batch_that_is_dropped():
    (whole,) = job.check(load(), "runs")
    (dropped,) = job.check(load(IMAGES, "batch.drop_last=true"), "runs")
    assert (whole["steps"], dropped["steps"]) == (4, 2)


CLOUDS = "{kind: prepare, name: clouds, data: {card: my_clouds, root: clouds}}\n---\n" + IMAGES.replace(
    "{card: my_images, root: images, size: 32}", "{run: clouds, points: {num_points: 64}}"
).replace("{name: resnet18, width: 0.125}", "{name: pvcnn_cls, width: 0.25}")


def test_groups_that_the_network_has_not_are_found_by_check():
    Path("clouds").mkdir()
    for split in ("train", "val"):
        np.save(f"clouds/{split}.npy", np.random.default_rng(0).random((64, 3), np.float32))
        Path(f"clouds/{split}.txt").write_text(f"{split}.npy 0\n" * 4)
    (_, facts) = job.check(load(CLOUDS), "runs")
    assert facts["problems"] == []
    (_, facts) = job.check(load(CLOUDS, "net:optim.groups=tsm"), "runs")
    assert "optim.groups: tsm needs a network of clips or images" in facts["problems"][0]


def begin_as_before(one: job.Loaded, state: str, **optim) -> runs.Run:
    """Write a run folder as an earlier version did: its job.yaml lacks today's fields and has other defaults."""
    document = yaml.safe_load(yaml.safe_dump(one.document))
    for name in ("scaling", "nesterov", "betas", "eps", "precision", "precise_norm"):
        del document["optim"][name]
    del document["batch"]["drop_last"], document["checkpoint"]["ship"], document["teacher"]
    document["optim"] |= optim
    run = runs.open_run("runs", one.job.name)
    runs.begin(run, document, 1)
    runs.end(run, state)
    return run


def test_a_run_of_an_earlier_version_is_skipped_or_resumed_and_keeps_its_groups():
    (one,) = load()
    assert one.job.optim.groups is None
    begin_as_before(one, "failed", groups="tsm")
    (facts,) = job.check([one], "runs")
    assert (facts["state"], facts["problems"]) == ("resume", [])
    assert job._as_begun(one, "runs").job.optim.groups == "tsm"
    runs.clear(runs.open_run("runs", "net"))
    begin_as_before(one, "finished", groups="tsm")
    (facts,) = job.check([one], "runs")
    assert facts["state"] == "finished"


def test_a_new_option_that_is_written_is_a_difference():
    begin_as_before(load()[0], "failed", groups="tsm")
    (facts,) = job.check(load(IMAGES, "optim.nesterov=true"), "runs")
    assert "optim.nesterov: false -> true" in facts["problems"][0]
    (facts,) = job.check(load(IMAGES, "optim.groups=plain"), "runs")
    assert 'optim.groups: "tsm" -> "plain"' in facts["problems"][0]
