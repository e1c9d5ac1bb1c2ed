"""Few bits by `kind: compress`: with and without training, stored small, with the same values wherever loaded."""

import json

import numpy as np
import pytest
import torch
import yaml
from tests.verbs.conftest import Shell
from tests.verbs.test_compress import DATA, TRAIN
from tests.verbs.test_compress_prune import problems  # noqa: F401 a fixture

from slimray import models, runs
from slimray.compress.quantization import LayerInfo
from slimray.edge import cost
from slimray.spec import UserError, parse
from slimray.tasks.network import load_network
from slimray.verbs import step_quantize
from slimray.verbs.bit_policies import Costs, uniform, walk_of
from slimray.verbs.compress_specs import CompressJob, FinetuneStep, RoundedStep, atomic

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
SEARCHED = (
    "{step: quantize, samples: 16, scheme: linear, shares: {size_mb: 0.5}, "
    "search: {name: haq, episodes: 4, population: 2, warmup: 2}}"
)
TRAINED = "{step: quantize, bits: [4, 8], samples: 16, finetune: {epochs: 1, lr: 0.01, teacher: {}, ranges: frozen}}"


def job(step: str) -> CompressJob:
    return parse(CompressJob, yaml.safe_load(QUANTIZE.format(name="q", step=step)), "q.yaml")


def test_a_trained_step_is_rounded_then_trained_then_whole():
    assert [name for name, _ in atomic(job(TRAINED).steps)] == ["01-quantize", "02-finetune", "03-quantize"]
    assert [name for name, _ in atomic(job(PLAIN).steps)] == ["01-quantize"]
    trained = atomic(job(TRAINED).steps)[1][1]
    assert isinstance(trained, RoundedStep)
    assert isinstance(trained, FinetuneStep), "its epochs count"
    assert trained.ranges == "frozen"


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("{step: quantize, bits: 1}", "steps.0"),
        ("{step: quantize, bits: [4, 9]}", "steps.0"),
        ("{step: quantize, scheme: kmeans, finetune: {epochs: 1, lr: 0.1}}", "cannot train codebooks"),
        ("{step: quantize, embeddings: 8, finetune: {epochs: 1, lr: 0.1}}", "embeddings: cannot be trained"),
        ("{step: quantize, embeddings: 1}", "embeddings: must be 2 to 8 with scheme: int8, got 1"),
        ("{step: quantize, shares: {size_mb: 0.5}}", "search: is required with shares"),
        ("{step: quantize, search: haq}", "search: needs shares or limits"),
        ("{step: quantize, search: amc, shares: {size_mb: 0.5}}", "haq"),
        ("{step: quantize, search: haq, bits: 4, shares: {size_mb: 0.5}}", "bits: is decided by the search"),
        ("{step: quantize, search: haq, shares: {latency_ms: 0.5}}", "write hardware"),
        ("{step: quantize, search: haq, hardware: bit_serial, shares: {size_mb: 0.5}}", "hardware: is for shares"),
        ("{step: quantize, search: haq, shares: {size_mb: 0.5}, limits: {size_mb: 1}}", "is also given in shares"),
        ("{step: quantize, search: {name: haq, low: 8}, shares: {size_mb: 0.5}}", "low: must be less than high"),
        ("{step: quantize}\n  - {step: sparsify, keep: 0.5}", "only code may follow quantize"),
    ],
)
def test_bits_that_there_are_not_are_refused(step, said):
    with pytest.raises(UserError, match=said):
        job(step)


LAYERS = [LayerInfo(f"conv{i}", "Conv2d", False, 8, 16, 1, 3, 1152 * (i + 1), 10**6, 2048, 4096, 256) for i in range(4)]


def test_a_batch_that_workers_cannot_share_is_one_sentence():
    text = QUANTIZE.format(name="q", step=TRAINED).replace("workers: 1", "workers: 3")
    with pytest.raises(UserError, match=r"batch\.total: 8 must be a multiple of scale\.workers"):
        parse(CompressJob, yaml.safe_load(text), "q.yaml")


@pytest.mark.parametrize("scheme", ["linear", "kmeans"])
def test_bits_keep_shares_of_what_eight_cost_and_limits_in_numbers(scheme):
    limits = "shares: {size_mb: 0.6}" if scheme == "kmeans" else "shares: {latency_ms: 0.7}, limits: {size_mb: 0.008}"
    text = f"{{step: quantize, search: haq, scheme: {scheme}, {limits}"
    step = job(text + (", hardware: bit_serial}" if scheme == "linear" else "}")).steps[0]
    costs = Costs(step, LAYERS)
    walk = walk_of(step, LAYERS, costs)
    whole, rng = costs.all([[8, 8]] * 4), np.random.default_rng(0)
    books = 1024 * len(LAYERS) if scheme == "kmeans" else 0  # 256 floating-point values per layer
    assert whole["size_mb"] == pytest.approx((sum(one.weights for one in LAYERS) + books) / 1e6)
    for _ in range(20):
        walk.reset()
        while walk.step(rng.random()) is not None:
            pass
        found = costs.all(walk.policy())
        assert all(found[name] <= limit for name, limit in costs.limits.items())
    assert costs.limits["size_mb"] == pytest.approx(0.6 * whole["size_mb"] if scheme == "kmeans" else 0.008)
    even = uniform(walk)
    assert walk.cost(even) <= 1
    assert len({tuple(pair) for pair in even[1:-1]}) == 1
    tight = job("{step: quantize, search: haq, limits: {size_mb: 0.001}}").steps[0]
    with pytest.raises(UserError, match=r"2 bits everywhere .* the limit is 0.001"):
        walk_of(tight, LAYERS, Costs(tight, LAYERS))


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ("limits: {size_mb: 0.001}", "steps.0: limits: 2 bits everywhere (8 at both ends) exceed the limits"),
        ("shares: {energy_mj: 0.01}, hardware: bit_serial", "energy_mj"),
        ("shares: {size_mb: 0.5}", ""),
        ("shares: {size_mb: 0.5, latency_ms: 0.6}, hardware: bit_serial", ""),
    ],
)
def test_limits_that_no_bits_keep_are_told_before_anything_runs(problems, limits, said):  # noqa: F811
    found = problems(f"step: quantize, scheme: linear, search: haq, {limits}")
    assert len(found) == bool(said), found
    assert all(said in line for line in found), found


@pytest.mark.parametrize(("name", "sides"), [("transformer", 2), ("hat_small", 2), ("transformer_lm", 1)])
def test_limits_on_networks_of_text_are_told_before_anything_runs_too(name, sides):
    options = {"preset": "tiny"} if name == "hat_small" else {"embed": 32, "ffn": 64}
    net = cost.build_on_meta(lambda: models.build(name, vocab_size=30, **options)).eval()
    text = "{{step: quantize, scheme: kmeans, search: haq, limits: {{size_mb: {}}}}}"
    shape = (2, 9) if sides == 2 else (9,)
    step_quantize.check(job(text.format(10)).steps[0], net, shape)
    with pytest.raises(UserError, match=r"limits: 2 bits everywhere exceed the limits; they cost size_mb"):
        step_quantize.check(job(text.format(1e-5)).steps[0], net, shape)


@pytest.mark.ray
@pytest.mark.benchmark
@pytest.mark.timeout(400)
def test_searched_bits_keep_their_share_on_any_number_of_workers(shell: Shell):
    shell.ok("run", shell.write("pictures.yaml", DATA))
    shell.ok("run", shell.write("whole.yaml", TRAIN))
    found = []
    for workers in (1, 2):
        text = QUANTIZE.format(name=f"mixed-{workers}", step=SEARCHED).replace("workers: 1", f"workers: {workers}")
        text = text.replace("per_worker: 8", "per_worker: 4")
        shell.ok("run", shell.write("mixed.yaml", text))
        run = runs.open_run(str(shell.storage), f"mixed-{workers}")
        found.append(json.loads(runs.read_file(run, "results.json"))["steps"][1]["details"])
    details = found[0]
    assert found[0] == found[1]
    assert len(details["rewards"]) == 4
    assert details["costs"]["size_mb"] <= details["limits"]["size_mb"]
    assert len({tuple(pair) for pair in details["bits"].values()}) > 2, "mixed"
    assert details["bits"]["conv1"] == details["bits"]["fc"] == [8, 8]
    assert details["searched"] == max(candidate["top1"] for candidate in details["candidates"])
    page = runs.read_file(run, "report.html").decode()
    assert "Bits, by layer" in page
    assert "Policies of 01-quantize" in page
    assert "01-quantize" in shell.ok("show", "mixed-1")


@pytest.mark.ray
@pytest.mark.benchmark
@pytest.mark.timeout(400)
def test_networks_of_few_bits_are_small_and_load_with_equal_answers(shell: Shell):
    shell.ok("run", shell.write("pictures.yaml", DATA))
    shell.ok("run", shell.write("whole.yaml", TRAIN))
    wrong = QUANTIZE.format(name="wrong", step="{step: quantize, keep: [layer7]}")
    done = shell.run("check", shell.write("wrong.yaml", wrong))
    assert done.returncode == 2
    assert "no layer 'layer7'" in done.stdout + done.stderr
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
    stages = {name: runs.run_at(f"{shell.storage}/four/stages/{name}") for name in ("02-finetune", "03-quantize")}
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        trained, whole = (load_network(stage).net(x) for stage in stages.values())
    assert torch.equal(trained, whole), "whole numbers answer as the network that was trained"
    details = json.loads(runs.read_file(runs.open_run(str(shell.storage), "eight"), "results.json"))["steps"][1]
    assert "layer1.0.conv1" not in details["details"]["bits"]
    assert len(details["details"]["sensitivity"]) > 10
