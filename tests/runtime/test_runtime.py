"""Exports without torch: the same answers as their run, with inputs prepared identically, stepped frame by frame."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.runtime.exports import Step, export, read, seeded, write
from tests.waits import patience

from slimray import models, runs, runtime
from slimray.cli import use
from slimray.data.images.pictures import ImageRecipe
from slimray.data.points import shapes
from slimray.data.points.recipe import PointRecipe
from slimray.data.video.clips import ClipRecipe
from slimray.models.tsm import OnlineTSM
from slimray.runtime import inputs
from slimray.runtime.engines import ENGINES
from slimray.runtime.predict import ANSWERS
from slimray.spec import UserError
from slimray.tasks import TASKS, predict
from slimray.tasks.network import Network, merge_views, to_input

CLIPS = ("zoom", "pan", "rest", "turn")
CPU = torch.device("cpu")


def network(net: torch.nn.Module, recipe: Any, classes: tuple[str, ...], task: str) -> Network:
    return Network(net, inputs.Input(), recipe.to_dict(), classes, {}, task)


def taken(one: Network) -> dict[str, Any]:
    """Return the content of model/input.json."""
    plain = {"recipe": one.recipe, "pixels": asdict(one.pixels), "classes": list(one.classes), "task": one.task}
    return json.loads(json.dumps(plain))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def clips(folder) -> tuple[Network, Path, Path]:
    """A causal TSM: the network, its export for clips of batch one, its export as a step."""
    options = {"num_classes": 4, "num_segments": 8, "width": 0.25}
    net = seeded(models.build("tsm_resnet18", causal=True, **options))
    own = network(net, ClipRecipe(num_segments=8, size=64, resize=72, mode="train"), CLIPS, "classify")
    whole = export(folder / "clip", net, torch.randn(1, 8, 3, 64, 64), taken(own), dynamic=())
    online = OnlineTSM(net).eval()
    states = online.initial_buffers(1, 64, 64)
    step = export(folder / "step", Step(online), torch.randn(1, 3, 64, 64), taken(own), dynamic=(), states=states)
    return own, whole, step


@pytest.fixture(scope="module")
def images(folder) -> tuple[Network, Path]:
    net = seeded(models.build("resnet18", num_classes=4, width=0.25))
    own = network(net, ImageRecipe(size=64, mode="train", flip=True), CLIPS, "classify")
    return own, export(folder / "image", net, torch.randn(2, 3, 64, 64), taken(own))


class Labels(torch.nn.Module):
    """Scores of points from their coordinates alone, in the form of a point network's export."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv1d(3, 16, 1), torch.nn.ReLU(), torch.nn.Conv1d(16, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


# ------------------------------------------------------------------------------------------------- the same answers


@pytest.mark.parametrize("average", ["logits", "prob"])
def test_numpy_prepares_and_merges_by_the_same_numbers_as_torch(shared, average):
    pixels = inputs.Input(average=average)
    files = sorted((shared / "data/images").rglob("*.jpg"))[:4]
    assert files
    data = np.stack([np.asarray(Image.open(file).convert("RGB").resize((96, 64))) for file in files])[:, None]
    np.testing.assert_array_equal(inputs.to_input(data, pixels), to_input(data, pixels, CPU).numpy())
    points = np.random.default_rng(0).random((2, 3, 6, 50))
    np.testing.assert_array_equal(inputs.to_input(points, pixels), to_input(points, pixels, CPU).numpy())
    tokens = np.arange(12).reshape(2, 1, 6)
    np.testing.assert_array_equal(inputs.to_input(tokens, pixels), to_input(tokens, pixels, CPU).numpy())
    logits = np.random.default_rng(1).normal(size=(6, 10)).astype(np.float32)
    wanted = merge_views(torch.from_numpy(logits), 3, average).numpy()
    np.testing.assert_allclose(inputs.merge_views(logits, 3, average), wanted, rtol=1e-5, atol=1e-6)


def same(found: Any, wanted: Any) -> None:
    assert (found.reason, wanted.reason) == ("", "")
    assert [name for name, _ in found.top] == [name for name, _ in wanted.top]
    assert [p for _, p in found.top] == pytest.approx([p for _, p in wanted.top], abs=1e-4)


def test_a_picture_gets_the_classes_that_its_run_gives_it(shared, images):
    own, where = images
    files = sorted((shared / "data/images").rglob("*.jpg"))[:3]
    found = list(runtime.load(where).answers(files))
    for one, wanted in zip(found, predict.predict_files(own, files, 5), strict=True):
        same(one, wanted)


def test_a_video_gets_the_classes_that_its_run_gives_it_from_clips_and_step_by_step(shared, clips):
    own, whole, step = clips
    files = sorted((shared / "data/video").rglob("*.mp4"))[:2]
    assert files
    wanted = list(predict.predict_files(own, files, 5))
    for where in (whole, step):
        for one, other in zip(runtime.load(where).answers(files), wanted, strict=True):
            same(one, other)


def test_stepping_gives_what_the_causal_network_gives_over_sixty_four_frames(clips):
    own, _, step = clips
    frames = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), np.uint8)
    net, online = runtime.load(step), OnlineTSM(own.net)  # type: ignore[arg-type]
    states, buffers = net.start(), online.initial_buffers(1, 64, 64)
    for frame in frames:
        logits, states = net.step(frame[None], states)
        with torch.no_grad():
            wanted, buffers = online(to_input(frame[None, None], own.pixels, CPU), buffers)
        np.testing.assert_allclose(logits, wanted.numpy(), rtol=1e-3, atol=1e-4)
    assert max(np.abs(value).max() for value in states.values()) > 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_computes_the_same(images, clips, engine):
    data = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    own, where = images
    wanted = own.outputs(data[:, None], 3)
    found = runtime.load(where, engine=engine, threads=1)(data)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    one, whole, step = clips
    movie = np.random.default_rng(1).integers(0, 256, (2, 8, 64, 64, 3), np.uint8)
    for place in (whole, step):  # exported for one clip at a time, given two
        found = runtime.load(place, engine=engine)(movie)
        np.testing.assert_allclose(found, one.outputs(movie[:, None], 2), rtol=1e-3, atol=1e-4)


def test_points_get_the_labels_that_their_run_gives_them(folder, tmp_path):
    own = network(
        seeded(Labels()), PointRecipe(num_points=256, normalize="sphere", mode="val", per_point=True), CLIPS, "segment"
    )
    where = export(folder / "points", own.net, torch.randn(2, 3, 256), taken(own))
    cloud = tmp_path / "a.npy"
    np.save(cloud, shapes.make_cloud(0, 0, 1000)[0])
    (found,) = runtime.load(where).answers([cloud], out=tmp_path / "export")
    (wanted,) = predict.predict_files(own, [cloud], 5, out=tmp_path / "run")
    assert found.top == wanted.top
    with np.load(found.written[0]) as a, np.load(wanted.written[0]) as b:
        np.testing.assert_array_equal(a["labels"], b["labels"])
        np.testing.assert_allclose(a["confidence"], b["confidence"], atol=1e-5)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_picture_is_enlarged_as_its_run_enlarges_it(folder, tmp_path, fixed):
    net = models.build("carn", scale=2, width=8).eval()
    recipe = {"scale": 2, "size": 32, "mode": "val", "flip": False, "kind": "image_pair"}
    own = Network(net, inputs.Input(), recipe, (), {}, "super_resolve")
    side = 96 if fixed else 40
    where = export(
        folder / f"carn{side}", net, torch.randn(1, 3, side, side), taken(own), dynamic=() if fixed else (2, 3)
    )
    file = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 110, 3), np.uint8)).save(file)
    pictures = []
    for name, answers in (
        ("e", runtime.load(where).answers),
        ("r", lambda *a, **o: predict.predict_files(own, *a, **o)),
    ):
        (found,) = answers([file], 5, out=tmp_path / name)
        assert found.reason == ""
        pictures.append(np.asarray(Image.open(found.written[0])).astype(int))
    assert pictures[0].shape == (100, 220, 3)
    assert np.abs(pictures[0][:-64, :-64] - pictures[1][:-64, :-64]).max() <= 1


@pytest.mark.parametrize("name", ANSWERS)
def test_a_task_answers_for_files_by_the_same_function_with_torch_and_without(name):
    assert TASKS[name].answer is ANSWERS[name].answer
    assert TASKS[name].writes is ANSWERS[name].writes


# ------------------------------------------------------------------------------------------------- where it runs


def test_the_same_command_predicts_with_an_export_without_any_heavy_library(shared, clips, images, tmp_path):
    picture, video = (
        sorted((shared / "data/images").rglob("*.jpg"))[0],
        sorted((shared / "data/video").rglob("*.mp4"))[0],
    )
    code = """
import sys
heavy = ("torch", "ray", "open3d", "dash", "wandb", "onnx", "matplotlib", "safetensors", "jinja2")
sys.modules.update(dict.fromkeys(heavy))
from slimray.cli.main import main
main()
"""
    for where, file in ((images[1], picture), (clips[1], video), (clips[2], video)):
        done = subprocess.run(
            [sys.executable, "-c", code, "predict", str(where), str(file), "--json"],
            capture_output=True, text=True, timeout=patience(120), cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (row,) = json.loads(done.stdout)
        assert {name for name, _ in row["top"]} == set(CLIPS)


def test_an_export_is_named_by_its_folder_by_its_run_or_by_a_format_of_it(images, tmp_path):
    run = runs.open_run(str(tmp_path / "runs"), "net")
    runs.write_job(run, {"kind": "export", "name": "net"})
    place = Path(run.path) / "export/onnx"
    place.mkdir(parents=True)
    for name in ("model.onnx", "export.json"):
        (place / name).write_bytes((images[1] / name).read_bytes())
    where = str(tmp_path / "runs")
    assert runtime.load(place).where == str(place)
    assert runtime.load("net", storage=where).where == str(place)
    assert runtime.load(run.uri, format="onnx").where == str(place)
    with pytest.raises(UserError, match=r"no export of format 'onx'.*did you mean 'onnx'"):
        runtime.load("net", storage=where, format="onx")
    with pytest.raises(UserError, match="no run 'nett', did you mean 'net'"):
        runtime.load("nett", storage=where)


def test_of_several_exports_of_a_run_one_that_an_engine_runs_is_taken(images, tmp_path):
    run = runs.open_run(str(tmp_path / "runs"), "net")
    runs.write_job(run, {"kind": "export", "name": "net"})

    def add(name: str) -> None:
        place = Path(run.path) / "export" / name
        place.mkdir(parents=True)
        (place / "model.onnx").write_bytes((images[1] / "model.onnx").read_bytes())
        write(place, {key: read(images[1])[key] for key in ("inputs", "outputs", "input")} | {"format": name})

    add("executorch")
    add("openvino")
    for find in (lambda: runtime.load(run.uri), lambda: use._export_of("net", str(tmp_path / "runs"))):
        with pytest.raises(
            UserError, match=r"net: its exports are of formats that cannot be run here .*--format onnx`"
        ):
            find()
    add("onnx_int8")
    assert runtime.load(run.uri).facts.format == "onnx_int8"
    assert use._export_of("net", str(tmp_path / "runs")) == runtime.load(run.uri).where
    add("onnx")
    assert runtime.load(run.uri).facts.format == "onnx"


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sha256": "0" * 64}, "differs from the exported file"),
        ({"bytes": 5}, "differs from the exported file"),
        ({"file": "../model.onnx"}, "must be the name of a file beside it"),
        ({"file": "/etc/passwd"}, "must be the name of a file beside it"),
        ({"file": "other.onnx"}, "is missing"),
        ({"version": 2}, "is not an export of version 1"),
        ({"format": "tflite"}, "exports of format 'tflite' cannot be run here"),
        ({"inputs": []}, "inputs: "),
        ({"inputs": [{"name": "other", "shape": [None, 3, 64, 64]}]}, "inputs or outputs differ from export.json"),
        ({"input": {}}, "has no valid recipe for files"),
        ({"states": [{"input": "input", "output": "logits", "shape": [2**40]}]}, "states: hold"),
        ({"states": [{"input": "input", "output": "logits", "shape": [1], "dtype": "V9999999"}]}, "'float32'"),
        (
            {"verification": {"passed": False, "reason": "differs from torch by\n3.0e-01"}},
            r"does not agree with torch \(differs from torch by 3.0e-01\), export the run again",
        ),
        ({"verification": {"passed": False}}, r"does not agree with torch \(no reason is given\)"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_sentence(images, tmp_path, change, sentence):
    (tmp_path / "model.onnx").write_bytes((images[1] / "model.onnx").read_bytes())
    write(tmp_path, {"input": None} | {key: read(images[1])[key] for key in ("inputs", "outputs", "input")} | change)
    with pytest.raises(UserError, match=sentence) as caught:
        runtime.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_input_of_another_size_is_refused_in_one_sentence(images):
    net = runtime.load(images[1])
    with pytest.raises(UserError, match="input: takes any x 3 x 64 x 64, got 1 x 3 x 32 x 64"):
        net(np.zeros((1, 32, 64, 3), np.uint8))


def test_a_task_without_answers_for_files_says_so(images, tmp_path):
    (tmp_path / "model.onnx").write_bytes((images[1] / "model.onnx").read_bytes())
    facts = read(images[1])
    write(tmp_path, {"inputs": facts["inputs"], "outputs": facts["outputs"], "input": facts["input"] | {"task": "new"}})
    with pytest.raises(UserError, match="exports of task 'new' cannot answer for files"):
        runtime.load(tmp_path)("a.jpg")
