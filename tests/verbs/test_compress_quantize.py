"""Few bits by `kind: compress`: after training and trained, stored small, the same numbers wherever they are loaded."""

import json

import pytest
import torch
from tests.verbs.conftest import Shell
from tests.verbs.test_compress import DATA, TRAIN

from slimray import runs
from slimray.spec import UserError, parse
from slimray.tasks.network import load_network
from slimray.verbs.compress_specs import CompressJob, atomic

QUANTIZE = """
kind: compress
name: {name}
model: {{run: whole}}
batch: {{total: 8, per_worker: 8}}
optim: {{reference_batch: 8, schedule: cosine}}
steps:
  - {step}
judge: {{calibrate_batch: 8}}
timing: null
scale: {{workers: 1}}
"""
PLAIN = "{step: quantize, samples: 16, max_loss: 1000, keep: [layer1.0.conv1]}"
TRAINED = "{step: quantize, bits: [4, 8], samples: 16, finetune: {epochs: 1, lr: 0.01, teacher: {}}}"


def job(step: str) -> CompressJob:
    import yaml

    return parse(CompressJob, yaml.safe_load(QUANTIZE.format(name="q", step=step)), "q.yaml")


def test_a_trained_step_is_rounded_then_trained_then_whole():
    assert [name for name, _ in atomic(job(TRAINED).steps)] == ["01-quantize", "02-finetune", "03-quantize"]
    assert [name for name, _ in atomic(job(PLAIN).steps)] == ["01-quantize"]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("{step: quantize, bits: 1}", "steps.0"),
        ("{step: quantize, bits: [4, 9]}", "steps.0"),
        ("{step: quantize, scheme: kmeans, finetune: {epochs: 1, lr: 0.1}}", "codebooks are not trained here"),
    ],
)
def test_bits_that_there_are_not_are_refused(step, said):
    with pytest.raises(UserError, match=said):
        job(step)


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_networks_of_few_bits_are_small_and_load_with_equal_answers(shell: Shell):
    shell.ok("run", shell.write("pictures.yaml", DATA))
    shell.ok("run", shell.write("whole.yaml", TRAIN))
    wrong = QUANTIZE.format(name="wrong", step="{step: quantize, keep: [layer7]}")
    done = shell.run("check", shell.write("wrong.yaml", wrong))
    assert done.returncode == 2
    assert "there is no layer 'layer7'" in done.stdout + done.stderr
    for name, step, share in (("eight", PLAIN, 0.3), ("four", TRAINED, 0.2)):
        shell.ok("run", shell.write(f"{name}.yaml", QUANTIZE.format(name=name, step=step)))
        run = runs.open_run(str(shell.storage), name)
        results = json.loads(runs.read_file(run, "results.json"))["steps"]
        first, last = results[0]["row"], results[-1]["row"]
        assert last["bytes"] < share * first["bytes"]
        assert last["macs"] == first["macs"]
        x = torch.randn(4, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(load_network(run).net(x), load_network(run).net(x))
        scored = json.loads(shell.run("evaluate", name, "--json").stdout)["rows"][0]
        assert scored["top1"] == pytest.approx(last["top1"])
    stages = {name: runs.open_run(str(shell.storage), f"four/stages/{name}") for name in ("02-finetune", "03-quantize")}
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        trained, whole = (load_network(stage).net(x) for stage in stages.values())
    assert torch.equal(trained, whole), "whole numbers answer as the network that was trained"
    details = json.loads(runs.read_file(runs.open_run(str(shell.storage), "eight"), "results.json"))["steps"][1]
    assert "layer1.0.conv1" not in details["details"]["bits"]
    assert len(details["details"]["sensitivity"]) > 10
