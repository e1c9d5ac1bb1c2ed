"""Channels pruned by `kind: compress`: policies and AMC keep their limits; a search is the same on any workers."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from tests.export import networks
from tests.verbs.conftest import Shell
from tests.verbs.test_compress import DATA, TRAIN

from slimray import job, runs
from slimray.search import amc
from slimray.search.agents import Learner, SearchSettings, search
from slimray.search.ddpg import Ddpg, DdpgSettings
from slimray.spec import UserError, parse
from slimray.train.spec import ScaleSpec
from slimray.verbs import trials
from slimray.verbs.agent_trials import Progress
from slimray.verbs.compress_specs import CompressJob

PRUNE = """
kind: compress
name: {name}
model: {{run: whole}}
steps:
  - step: prune
    shares: {{macs: 0.8}}
    search: {{name: climb, episodes: 3, population: 2}}
    criterion: taylor
    round_to: 4
  - step: prune
    shares: {{macs: 0.6}}
    search: {{name: amc, episodes: 4, population: 2, warmup: 2}}
    round_to: 2
hold_out: 12
judge: {{calibrate: 16, calibrate_batch: 8}}
timing: null
scale: {{workers: {workers}}}
"""


def walk() -> amc.GroupWalk:
    steps = [amc.GroupStep(f"g{i}", (8, 16, 24), False, 24, 24, 1, 3, 100.0, 1e6) for i in range(3)]
    return amc.GroupWalk(steps, lambda rows: {"macs": rows.sum(1)}, {"macs": 50.0})


def finish(progress: Progress, order: list[int]) -> None:
    """Run trials to the end; running ones finish in the `order` of a permutation."""
    number = 0
    while not progress.is_done:
        begun = []
        while (chosen := progress.start(f"trial-{number}")) is not None:
            begun.append((f"trial-{number}", chosen["tried"]))
            number += 1
        for place in [i for i in order if i < len(begun)]:
            name, counts = begun[place]
            progress.end(name, {} if counts["g0"] == 24 else {"top1": float(sum(counts.values()))})


def progress_of(run: runs.Run, settings: SearchSettings) -> Progress:
    return Progress(run, Learner(walk(), settings, 5), lambda metrics: amc.reward_of(metrics["top1"]))


def test_trials_on_storage_are_the_search_in_whatever_order_they_end(tmp_path):
    settings = SearchSettings(9, 3, DdpgSettings(warmup=3, decay=0.9, replay=100, batch=4, hidden=(8, 8), dummy=True))
    found = []
    for number, order in enumerate(([0, 1, 2], [2, 0, 1])):
        run = runs.open_run(str(tmp_path), f"stage-{number}")
        progress = progress_of(run, settings)
        finish(progress, order)
        again = progress_of(run, settings)
        assert again.is_done
        found.append([(t.policy, t.actions.tolist(), t.reward) for t in map(again.history.get, range(9)) if t])
    assert len(found[0]) == 9
    for one, other in zip(*found, strict=True):
        assert one[:2] == other[:2]
        assert one[2] == other[2] or math.isnan(one[2] + other[2])
    assert len({tuple(counts.values()) for counts, _, _ in found[0]}) > 2


def test_trials_on_storage_are_those_of_a_search_in_this_process_and_nothing_is_done_twice(tmp_path, monkeypatch):
    agent = DdpgSettings(warmup=4, decay=0.9, replay=100, batch=4, hidden=(8, 8), dummy=True)
    settings = SearchSettings(30, 2, agent)
    wanted = search(walk(), settings, lambda counts: amc.reward_of(float(sum(counts.values()))), 5)
    taken, tried = [], []
    take = Ddpg.take
    monkeypatch.setattr(Ddpg, "take", lambda self, episode: (taken.append(episode), take(self, episode)))
    run = runs.open_run(str(tmp_path), "stage")
    progress = progress_of(run, settings)
    while (chosen := progress.start("trial")) is not None:
        tried.append(tuple(chosen["tried"].values()))
        progress.end("trial", {"top1": float(sum(chosen["tried"].values()))})
    again = progress_of(run, settings)
    for index, trial in enumerate(wanted):
        for found in (progress.history[index], again.history[index]):
            assert (found.policy, found.reward) == (trial.policy, trial.reward)
            assert (found.actions == trial.actions).all()
    assert len(taken) == 28  # all generations except the last
    assert len(tried) == len(set(tried)) < 30


@pytest.mark.parametrize(("gpus", "given", "device"), [(0, [], "cpu"), (1, [0], "cuda")])
def test_a_trial_takes_what_a_worker_of_the_job_does_and_runs_on_the_gpu_that_it_was_given(
    gpus, given, device, monkeypatch
):
    scale = ScaleSpec.model_validate({"cpus_per_worker": 2, "gpus_per_worker": gpus})
    assert trials.resources_of(scale) == {"cpu": 2} | ({"gpu": gpus} if gpus else {})
    monkeypatch.setattr("ray.get_gpu_ids", lambda: given)
    assert trials.device() == device


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("", "write one of shares"),
        ("keep: 0.5, shares: {macs: 0.5}", "write one of shares"),
        ("keep: 0.5, search: amc", "search: needs shares or limits"),
        ("shares: {macs: 0.5}, search: haq", "amc"),
        ("shares: {macs: 0.5}, search: {name: climb, warmup: 5}", "warmup"),
        ("shares: {macs: 1.5}", "shares.macs"),
        ("shares: {mac: 0.5}", "macs"),
        ("shares: {latency_ms: 0.5}, search: {name: amc, timed: 5}", "timed"),
        ("keep: 0.5, criterion: tailor", "criterion"),
        ("shares: {macs: 0.5}, limits: {macs: 1}", "is also given in shares"),
        ("shares: {macs: 0.5}, policy: ranked, criterion: l1", "ranked needs criterion: group"),
        (
            "shares: {macs: 0.5}, policy: ranked, search: amc",
            "leave it out, or write search: {name: climb, start: ranked}",
        ),
        ("shares: {macs: 0.5}, criterion: l1, search: {name: climb, start: ranked}", "search.start: ranked needs"),
        ("keep: 0.5, policy: ranked", "keep: is for policy uniform"),
    ],
)
def test_steps_that_say_too_much_or_too_little_are_one_sentence(step, reason):
    body = yaml.safe_load(f"{{step: prune, {step}}}")
    with pytest.raises(UserError, match=reason):
        parse(CompressJob, {"kind": "compress", "name": "x", "model": {"run": "y"}, "steps": [body]}, "job.yaml")


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Return the result of `check` for the steps of a job that compresses a ResNet for images of 32 pixels."""
    folder = tmp_path_factory.mktemp("check")
    root = networks.pictures(folder / "pictures", per_class=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        networks.hold("runs", "net", "my_images", root, {"name": "resnet18", "width": 0.25}, size=32)

        def ask(*steps: str) -> list[str]:
            body = [yaml.safe_load(f"{{{step}}}") for step in steps]
            document = {"kind": "compress", "name": "small", "model": {"run": "net"}, "steps": body}
            return job.check(job.resolve([(Path("x.yaml"), document)]), "runs")[0]["problems"]

        yield ask


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("channels: {layer1.0.convl: 8}", "this network has no group 'layer1.0.convl', did you mean 'layer1.0.conv1'?"),
        ("channels: {layer1.0.conv1: 17}", "layer1.0.conv1: must be a number from 1 to 16 (got 17)"),
        ("limits: {macs: 1}", "the smallest policy has macs"),
        ("shares: {params: 0.001}, policy: sensitivity", "the smallest policy has params"),
        ("shares: {macs: 0.01}, search: amc", "the limits are out of reach"),
        ("channels: {layer1.0.conv1: 8}", ""),
        ("shares: {macs: 0.5, latency_ms: 0.01}", ""),
        ("shares: {macs: 0.5}, search: amc", ""),
    ],
)
def test_what_a_network_cannot_be_pruned_to_is_told_before_it_runs(problems, step, said):
    found = problems(f"step: prune, {step}")
    assert len(found) == bool(said), found
    assert all(line.startswith("x.yaml (small): steps.0: ") and said in line for line in found), found


def test_a_step_behind_another_one_that_prunes_is_not_judged_by_what_the_network_was(problems):
    shrunk = "step: prune, channels: {layer1.0.conv1: 8}"
    assert problems(shrunk, "step: prune, limits: {macs: 1}") == []
    assert len(problems("step: sparsify, keep: {layer9: 0.5}", "step: prune, limits: {macs: 1}")) == 2


@pytest.mark.ray
@pytest.mark.benchmark
@pytest.mark.timeout(900)
def test_a_network_is_pruned_by_climbing_and_by_amc_on_any_number_of_workers(shell: Shell):
    shell.ok("run", shell.write("pictures.yaml", DATA))
    shell.ok("run", shell.write("whole.yaml", TRAIN))
    found = []
    for workers in (1, 2):
        name = f"pruned-{workers}"
        shell.ok("run", shell.write(f"{name}.yaml", PRUNE.format(name=name, workers=workers)))
        run = runs.open_run(str(shell.storage), name)
        results = json.loads(runs.read_file(run, "results.json"))
        rows = [one["row"] for one in results["steps"]]
        assert [row["step"] for row in rows] == ["original", "prune", "prune"]
        assert rows[1]["macs"] <= 0.8 * rows[0]["macs"]
        assert rows[2]["macs"] <= 0.6 * rows[1]["macs"]
        assert [len(one["details"]["rewards"]) for one in results["steps"][1:]] == [3, 4]
        assert results["steps"][1]["details"]["sensitivity"], "the curves that the climb began with"
        for one in results["steps"][1:]:
            details = one["details"]
            tried, even = details["candidates"], details["uniform"]
            assert details["searched"] == max(candidate["top1"] for candidate in tried)
            assert 0 < even["costs"]["macs"] <= details["limits"]["macs"]
            assert 0 <= even["top1"] <= 100
            assert all(candidate["macs"] <= details["limits"]["macs"] for candidate in tried)
        assert "Policies of 01-prune" in runs.read_file(run, "report.html").decode()
        found.append([one["details"]["counts"] for one in results["steps"][1:]])
    assert found[0] == found[1]
    done = json.loads(shell.run("evaluate", "pruned-1", "--json").stdout)
    assert done["rows"][0]["macs"] == rows[2]["macs"]


def test_a_trial_computes_with_the_threads_of_a_worker_of_the_job():
    before = torch.get_num_threads()
    try:
        trial = trials.ScoreTrial.__new__(trials.ScoreTrial)
        trial.setup({"tried": ()}, make=lambda: lambda tried: {"threads": float(torch.get_num_threads())}, threads=3)
        assert trial.step()["metrics"] == {"threads": 3.0}
    finally:
        torch.set_num_threads(before)
