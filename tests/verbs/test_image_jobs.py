"""Jobs on images as far as they go without Ray: results of `check`, scoring of runs, contents of a report."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from slimray import job, models, runs
from slimray.data.images import image_shapes
from slimray.data.images.pictures import ImageRecipe
from slimray.data.modalities import read_recipe
from slimray.report import charts, pages
from slimray.spec import UserError, parse
from slimray.tasks import TASKS
from slimray.tasks.evaluation import Pass, Samples, Setting
from slimray.tasks.network import Network, load_network
from slimray.verbs import evaluate

TRAIN = """
kind: train
name: net
data: {card: my_images, root: images, size: 32}
model: {name: resnet18, width: 0.125}
batch: {total: 4, per_worker: 2}
optim: {lr: 0.02, reference_batch: 4, epochs: 2}
scale: {workers: 2}
---
kind: evaluate
name: eval
runs: [net]
crops: 5
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Make a working folder with images of three classes, and jobs.yaml."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for number in range(12):
            picture, label = image_shapes.make_image(number, 0, 40)
            path = tmp_path / f"images/{split}/{image_shapes.CLASSES[label % 3]}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_shapes.encode_png(picture))
    (tmp_path / "jobs.yaml").write_text(TRAIN)
    return tmp_path


def check(*sets: str) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in job.check(job.load(["jobs.yaml"], sets), "runs", look=True)}


def problems(*sets: str) -> list[str]:
    return [problem.partition(": ")[2] for one in check(*sets).values() for problem in one["problems"]]


def finish(recipe: ImageRecipe) -> Network:
    """Write the run `net` as a training would, but untrained."""
    torch.manual_seed(0)
    options = {"name": "resnet18", "num_classes": 3, "width": 0.125}
    run = runs.open_run("runs", "net")
    with runs.hold(run):
        runs.begin(run, job.load(["jobs.yaml"])[0].document, 1)
        runs.write_card(run, {"metrics": {}})
        runs.end(run, "finished", "")
    classes = sorted(image_shapes.CLASSES[:3])
    taken = {"recipe": recipe.to_dict(), "pixels": {"average": "logits"}, "classes": classes}
    runs.write_model(run, safetensors.torch.save(models.build(**options).state_dict()), options, taken)
    return load_network(run)


def test_check_tells_what_a_network_of_images_takes():
    facts = check()
    assert [one["problems"] for one in facts.values()] == [[], []]
    net = facts["net"]
    assert (net["input"], net["classes"], net["train_samples"], net["steps"]) == ([3, 32, 32], 3, 12, 6)
    assert net["macs"] > 100_000
    assert facts["eval"]["views"] == 5


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        ("net:model={name: tsm_resnet18}", "model.name: tsm_resnet18 takes clips, the dataset has images"),
        ("net:model={name: pvcnn_cls}", "model.name: pvcnn_cls takes clouds, the dataset has images"),
        ("net:model.in_channels=1", "model.in_channels: the images have 3 channels (got 1)"),
        ("net:model.num_segments=8", "model.num_segments: resnet18 has no such option"),
        ("net:model.width=0", "model.width: must be > 0 (got 0)"),
        ("net:data.train=trian", "data: my_images has no split 'trian', did you mean 'train'?"),
        ("net:data.resize=20", "data.resize: must be at least size (32), got 20"),
    ],
)
def test_a_wrong_job_is_one_sentence(sets, sentence):
    try:
        said = problems(sets)
    except UserError as error:
        said = [str(error).splitlines()[0].partition(": ")[2]]
    assert any(one.startswith(sentence) for one in said), said


def test_a_dataset_that_is_not_there_is_the_only_complaint():
    said = problems("net:data={run: nowhere}")
    assert [one for one in said if "eval" not in one] == [
        "data.run: runs: no run 'nowhere', nor any other: set --storage to where the runs are"
    ]


def test_a_run_is_scored_in_several_crops_and_at_another_size():
    network = finish(ImageRecipe(size=32, mode="val", flip=False))
    scored = parse(evaluate.EvaluateJob, {"kind": "evaluate", "name": "e", "runs": ["net"], "crops": 5}, "x.yaml")
    splits: Any = None  # only votes on points read them
    recipe = read_recipe(evaluate._recipe(scored, network, "natural", splits, "val"))
    assert (recipe.size, recipe.crops, recipe.short_side, recipe.mode) == (32, 5, 37, "test")
    larger = scored.model_copy(update={"size": 64})
    assert read_recipe(evaluate._recipe(larger, network, "natural", splits, "val")).short_side == 74
    tight = replace(network, recipe=network.recipe | {"resize": 32})
    assert read_recipe(evaluate._recipe(larger, tight, "natural", splits, "val")).short_side == 64
    zoomed = replace(network, recipe=network.recipe | {"resize": 40})
    assert read_recipe(evaluate._recipe(larger, zoomed, "natural", splits, "val")).short_side == 80
    smaller = scored.model_copy(update={"size": 16})
    assert read_recipe(evaluate._recipe(smaller, zoomed, "natural", splits, "val")).short_side == 20
    full = scored.model_copy(update={"size": 64, "resize": 64})
    assert read_recipe(evaluate._recipe(full, zoomed, "natural", splits, "val")).short_side == 64


@pytest.mark.parametrize(
    ("sets", "field"), [("eval:clips=2", "clips"), ("eval:frame_orders=[shuffled]", "frame_orders")]
)
def test_what_only_clips_have_is_refused(sets, field):
    finish(ImageRecipe(size=32, mode="val"))
    said = [one for one in problems(sets) if "eval" not in one]
    assert said == [f"{field}: is for clips, 'net' was trained on images: leave it out"]


def test_a_report_shows_images_with_truth_and_guess():
    network = finish(ImageRecipe(size=32, mode="val"))

    views = np.stack([image_shapes.make_image(n, 0, 32)[0] for n in (0, 2)])[:, None]
    samples, task = Samples(views, np.array([0, 2]), ["a", "c"], [0, 2]), TASKS[network.task]
    scores = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    found = Pass(Setting(task, network, network.recipe), task.score(3, {})).show(samples, scores, [], 5)
    assert [(one["type"], one["truth"], one["top"][0][0]) for one in found] == [
        ("clip", network.classes[0], network.classes[0]),
        ("clip", network.classes[2], network.classes[1]),
    ]
    raw = base64.b64decode(found[0]["frames_jpeg_base64"])
    with Image.open(io.BytesIO(raw)) as image:
        shown = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(shown - views[0, 0]).mean() < 25
    assert len(raw) < 10_000
    clips = [charts.Clip("net", one["frames_jpeg_base64"], one["truth"], one["top"]) for one in found]
    page = pages.render("x", clips=clips, headline={}, curves=[], tables=[])
    assert "<h2>Images</h2>" in page
    assert "<h2>Clips</h2>" not in page
    assert json.dumps(found[0]), "goes into results.json"
