"""Compression steps that need no cluster: every consumer reads their results, also from the file alone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tests.compress.test_rebuild import saved

from slimray import runs
from slimray.compress import quantization, slim_file
from slimray.data.spec import DataSpec
from slimray.spec import UserError
from slimray.tasks.network import load_network, load_slim
from slimray.verbs import compressing, step_code, step_share, step_sparsify
from slimray.verbs.compress_specs import CompressJob, atomic
from slimray.verbs.context import Context

JOB: dict[str, Any] = {
    "kind": "compress",
    "name": "smaller",
    "model": {"run": "small"},
    "batch": {"total": 8, "per_worker": 8},
    "optim": {"reference_batch": 8},
    "steps": [
        {"step": "sparsify", "keep": 0.25, "rounds": 2, "finetune": {"epochs": 1, "lr": 0.1}},
        {"step": "share", "bits": 4, "finetune": {"epochs": 1, "lr": 0.1}},
        {"step": "code"},
    ],
}


def test_rounds_and_centroids_are_steps_of_their_own():
    steps = atomic(CompressJob.model_validate(JOB).steps)
    assert [name for name, _ in steps] == [
        "01-sparsify", "02-finetune", "03-sparsify", "04-finetune", "05-share", "06-finetune", "07-code",
    ]  # fmt: skip
    assert [getattr(step, "keep", None) for _, step in steps][:3:2] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": None}, "batch: is required"),
        ({"steps": [{"step": "sparsify", "keep": 0.5, "quality": 1.0}]}, "write one of"),
        ({"steps": [{"step": "sparsify", "keep": 0.5, "rounds": 3}]}, "rounds: more than one round needs finetune"),
        ({"model": {"name": "resnet18"}}, "init: is required"),
        ({"steps": [{"step": "share", "bits": 9}]}, "less than or equal to 8"),
    ],
)
def test_jobs_that_mean_nothing_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        CompressJob.model_validate(JOB | change)


@pytest.fixture
def work(tmp_path: Path) -> compressing.Work:
    """A compression of an untrained network."""
    saved(tmp_path, {"name": "resnet18", "num_classes": 3, "width": 0.125})
    job = CompressJob.model_validate(JOB)
    run = runs.open_run(str(tmp_path), "smaller")
    ctx = Context(run, str(tmp_path), 1, "job.yaml (smaller)", Console(quiet=True), 1)
    data: Any = SimpleNamespace()  # no step here reads the dataset
    return compressing.Work(job, ctx, DataSpec(run="data", size=32), data, None)


def test_steps_leave_runs_and_a_file_that_holds_all_of_the_network(work):
    before = compressing.write_original(work)
    stages = {}
    for (folder, step), row in (
        (("01-sparsify", atomic(work.job.steps)[2][1]), step_sparsify),
        (("02-share", atomic(work.job.steps)[4][1]), step_share),
        (("03-code", atomic(work.job.steps)[6][1]), step_code),
    ):
        before, stages[folder] = row.run(step, work, folder, before)
        again, details = row.run(step, work, folder, before)  # finished: nothing is repeated
        assert (again.uri, details) == (before.uri, stages[folder])
    net = load_network(before)
    assert [record["step"] for record in net.model["compression"]] == ["sparsify", "share"]
    assert len(net.net.get_parameter("layer1.0.conv1.weight").unique()) <= 16
    data = runs.read_file(before, "model/model.slim")
    assert sum(stages["03-code"]["parts"].values()) == len(data) == compressing.size_of(before)
    assert len(data) < len(runs.read_model(before)[0]) / 6
    alone = load_slim(data, "model.slim")
    (Path(before.path) / "model/weights.safetensors").unlink()
    for other in (alone, load_network(before)):
        assert (other.classes, other.recipe, other.task) == (net.classes, net.recipe, net.task)
        pairs = zip(other.net.state_dict().items(), net.net.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
        x = torch.from_numpy(np.random.default_rng(0).random((2, 3, 32, 32), np.float32))
        assert torch.equal(other.net(x), net.net(x))


def test_a_file_without_a_network_or_with_another_one_is_refused(work):
    before = compressing.write_original(work)
    net = load_network(before)
    tensors = net.net.state_dict()
    taken = json.loads(runs.read_file(before, "model/input.json"))
    for model, given, said in (
        ({}, taken, "tensors but no network"),
        (net.model, {}, "tensors but no network"),
        (net.model | {"width": 0.25}, taken, "not those of its network"),
        (net.model | {"width": 1000.0}, taken, "not those of its network"),
    ):
        with pytest.raises(UserError, match=said):
            load_slim(slim_file.encode(tensors, model, given), "model.slim")


@pytest.mark.parametrize("scheme", ["int8", "linear", "kmeans"])
def test_a_network_of_few_bits_is_coded_and_comes_back(work, scheme):
    before = compressing.write_original(work)
    net, model, taken = compressing.read_network(before)
    x = torch.randn(4, 3, 32, 32)
    made, record = quantization.prepare(net, x, None, (4, 8), scheme, trained=False)
    compressing.write_network(stage := work.stage("01-quantize"), made, model, taken, record)
    coded, _ = step_code.run(atomic(work.job.steps)[6][1], work, "02-code", stage)
    data = runs.read_file(coded, "model/model.slim")
    assert len(data) < 0.25 * len(runs.read_model(before)[0])
    with torch.no_grad():
        assert torch.equal(load_slim(data, "model.slim").net(x), made(x))
