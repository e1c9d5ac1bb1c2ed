"""Networks compressed step by step: each step leaves a run, killed jobs resume, zeros stay zero."""

import json

import pytest
import safetensors.torch
import torch
from tests.verbs.conftest import Shell, end_session, weights
from tests.waits import wait_for

from slimray import runs
from slimray.compress import slim_file
from slimray.data.images import image_shapes
from slimray.verbs.stages import is_finished

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

DATA = "{kind: prepare, name: pictures, data: {card: image_shapes, clips: 60, size: 32}}"
TRAIN = """
kind: train
name: whole
data: {run: pictures, size: 32, images: {area: [0.5, 1], brightness: 0, saturation: 0}}
model: {name: resnet18, width: 0.125}
batch: {total: 8, per_worker: 8}
optim: {lr: 0.02, reference_batch: 8, epochs: 1}
scale: {workers: 1}
"""
COMPRESS = """
kind: compress
name: {name}
model: {{run: whole}}
batch: {{total: 8, per_worker: 8}}
optim: {{reference_batch: 8, schedule: cosine}}
steps:
  - step: sparsify
    keep: 0.25
    rounds: 2
    finetune: {{epochs: 1, lr: 0.01, teacher: {{}}}}
  - {{step: sparsify, sensitivity: {{drop: 100, ratios: [0.1]}}}}
  - {{step: share, bits: 4, finetune: {{epochs: 1, lr: 0.001}}}}
  - {{step: code}}
hold_out: 16
checkpoint: {{every_steps: 2}}
scale: {{workers: 1}}
"""


@pytest.fixture(scope="module")
def small(shell: Shell) -> runs.Run:
    """Make an undisturbed compress run, `small`, of the training `whole`."""
    shell.ok("run", shell.write("pictures.yaml", DATA), shell.write("whole.yaml", TRAIN))
    text = COMPRESS.format(name="small")
    told = shell.ok("check", shell.write("small.yaml", text))
    assert "no step of this job makes the network faster" in told
    told = shell.ok("run", "small.yaml")
    assert "not faster" in told or "times as fast" in told
    return runs.open_run(str(shell.storage), "small")


def tensors(run: runs.Run) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(runs.read_model(run)[0])


def test_each_step_is_a_row_and_zeros_stay_zero_in_training(small):
    results = json.loads(runs.read_file(small, "results.json"))
    rows = [one["row"] for one in results["steps"]]
    names = ["00-original", "01-sparsify", "02-finetune", "03-sparsify", "04-finetune", "05-sparsify"]
    names += ["06-share", "07-finetune", "08-code"]
    assert [row["run"] for row in rows] == names
    shares = [row["kept"] / row["weights"] for row in rows]
    assert shares == pytest.approx([1, 0.5, 0.5, 0.25, 0.25, 0.1, 0.1, 0.1, 0.1], abs=0.01)
    before, after = (tensors(runs.run_at(f"{small.uri}/stages/{name}")) for name in names[3:5])
    name = "layer1.0.conv1.weight"
    assert torch.equal(before[name] == 0, after[name] == 0)
    assert not torch.equal(before[name], after[name])
    assert all(row["macs"] == rows[0]["macs"] and row["num_samples"] == 12 and row["speedup"] > 0 for row in rows)
    assert "sensitivity" in results["steps"][5]["details"]
    assert [record["step"] for record in results["steps"][-1]["records"]] == ["sparsify"] * 3 + ["share"]
    shared = tensors(runs.run_at(f"{small.uri}/stages/07-finetune"))[name]
    assert len(shared.unique()) <= 16
    assert not torch.equal(shared, tensors(runs.run_at(f"{small.uri}/stages/06-share"))[name])
    assert rows[-1]["bytes"] == sum(results["steps"][-1]["details"]["parts"].values()) < rows[0]["bytes"] / 5
    found = slim_file.decode(runs.read_file(small, "model/model.slim"), "model.slim")
    assert all(torch.equal(value, found[key]) for key, value in tensors(small).items())
    books = results["steps"][-1]["codebooks"]
    weight = found[name]
    assert dict(books["layer1.0.conv1"]) == {
        float(value): int((weight == value).sum()) for value in weight.unique() if value != 0
    }
    assert "Codebook of layer3.0.conv2" in runs.read_file(small, "report.html").decode()


def test_a_compressed_network_is_scored_shown_predicted_with_and_trained_on(shell, small):
    done = json.loads(shell.run("evaluate", "small", "--json").stdout)
    row = json.loads(runs.read_file(small, "results.json"))["steps"][-1]["row"]
    assert done["rows"][0]["top1"] == pytest.approx(row["top1"])
    assert "08-code" in shell.ok("show", "small")
    (shell.folder / "one.png").write_bytes(image_shapes.encode_png(image_shapes.make_image(1, 0, 32)[0]))
    told = shell.ok("predict", "small", "one.png")
    assert shell.ok("predict", "runs/small/model/model.slim", "one.png") == told
    text = TRAIN.replace("name: whole", "name: further").replace("name: resnet18, width: 0.125", "run: small")
    shell.ok("run", shell.write("further.yaml", text))
    assert runs.read_model(runs.open_run(str(shell.storage), "further"))[1]["compression"] == []


@pytest.mark.benchmark
def test_a_killed_driver_goes_on_in_its_step_and_ends_in_the_same_weights(shell, small):
    child = shell.start("run", shell.write("again.yaml", COMPRESS.format(name="small-killed")))
    stage = runs.run_at(f"{shell.storage}/small-killed/stages/04-finetune")
    wait_for("a checkpoint of the fourth step", lambda: bool(runs.list_checkpoints(stage)), 200)
    end_session(child)
    assert not is_finished(stage)
    shell.ok("run", "again.yaml")
    assert weights(shell, "small-killed") == weights(shell, "small")


def test_mistakes_are_found_before_anything_runs(shell, small):
    text = COMPRESS.format(name="wrong")
    for old, new, said in (
        ("keep: 0.25", "keep: {layer1.0.conv7: 0.5}", "unknown layer 'layer1.0.conv7'"),
        ("model: {run: whole}", "model: {run: pictures}", "holds a dataset"),
        ("hold_out: 16", "hold_out: 48", "leave none to train on"),
        ("batch: {total: 8, per_worker: 8}", "", "batch: is required"),
        ("step: sparsify\n    keep", "step: sparsifi\n    keep", "sparsify"),
    ):
        done = shell.run("check", shell.write("wrong.yaml", text.replace(old, new)))
        assert done.returncode == 2, done.stdout
        assert said in done.stdout + done.stderr, (said, done.stdout + done.stderr)
