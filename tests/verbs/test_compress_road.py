"""The whole chain in one file: prepared, trained, pruned by AMC, rounded to 8 bits, evaluated; and killed meanwhile."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.verbs.conftest import Shell, end_session, has_checkpoint, weights
from tests.waits import wait_for

from slimray import job, runs

ROAD = """
kind: prepare
name: {name}-data
data: {{card: {card}, clips: {samples}, size: 32, frames: 6, points: 128}}
---
kind: train
name: {name}-whole
data: {{run: {name}-data, {data}}}
model: {{{model}}}
batch: {{total: 8, per_worker: 8}}
optim: {{lr: 0.01, reference_batch: 8, epochs: 1, groups: no_norm_decay}}
checkpoint: {{every_steps: 1}}
scale: {{workers: 1}}
---
kind: compress
name: {name}-pruned
model: {{run: {name}-whole}}
batch: {{total: 8, per_worker: 8}}
optim: {{reference_batch: 8, groups: no_norm_decay}}
steps:
  - step: prune
    shares: {{macs: 0.6}}
    search: {{name: amc, episodes: {episodes}, warmup: 1, timed: 10}}
    round_to: 2{limit}
  - {{step: finetune, epochs: 1, lr: 0.001, teacher: {{}}}}
judge: {{calibrate: 16, calibrate_batch: 8, samples: 8}}
timing: null
checkpoint: {{every_steps: 1}}
scale: {{workers: 1}}
---
kind: compress
name: {name}-int8
model: {{run: {name}-pruned}}
steps: [{{step: quantize, samples: 8, max_loss: 1000}}]
judge: {{calibrate_batch: 8, samples: 8}}
timing: null
scale: {{workers: 1}}
---
kind: evaluate
name: {name}-scores
runs: [{name}-whole, {name}-pruned, {name}-int8]
pictures: 1
scale: {{workers: 1}}
"""
KINDS = {
    "pictures": {"card": "image_shapes", "data": "size: 32", "model": "name: lenet5, in_channels: 3, side: 32"},
    "clips": {
        "card": "moving_shapes", "data": "size: 32",
        "model": "name: tsm_resnet18, width: 0.125, num_segments: 4",
    },
    "clouds": {
        "card": "shapes", "data": "points: {num_points: 64}",
        "model": "name: pvcnn_s3dis, in_channels: 3, width: 0.0625, voxel: 0.25",
    },
}  # fmt: skip


def road(kind: str, name: str, samples: int = 20, episodes: int = 2) -> str:
    """`pictures` also has a limit on latency, which every policy keeps."""
    limit = "\n    limits: {latency_ms: 100000}" if kind == "pictures" else ""
    return ROAD.format(name=name, samples=samples, episodes=episodes, limit=limit, **KINDS[kind])


def results(shell: Shell, name: str) -> Any:
    return json.loads(runs.read_file(runs.open_run(str(shell.storage), name), "results.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_road_whose_runs_do_not_exist_yet_passes_the_check(kind, tmp_path):
    path = tmp_path / "road.yaml"
    path.write_text(road(kind, "road"))
    assert [one["problems"] for one in job.check(job.load([path]), str(tmp_path / "runs"))] == [[]] * 5


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kinds", [("clips",), pytest.param(("pictures", "clouds"), marks=pytest.mark.benchmark)])
def test_the_whole_road_goes_in_one_file(kinds, shell: Shell):
    text = "---".join(road(kind, f"road-{kind}") for kind in kinds)
    shell.ok("run", shell.write("road.yaml", text))
    for kind in kinds:
        pruned, rounded = (results(shell, f"road-{kind}-{what}")["steps"] for what in ("pruned", "int8"))
        rows = [one["row"] for one in (*pruned, rounded[-1])]
        assert [row["step"] for row in rows] == ["original", "prune", "finetune", "quantize"]
        assert rows[1]["macs"] <= 0.6 * rows[0]["macs"]
        assert rows[3]["macs"] == rows[2]["macs"] == rows[1]["macs"]
        assert rows[3]["bytes"] < 0.5 * rows[2]["bytes"] < 0.5 * rows[0]["bytes"]
        assert len(pruned[1]["details"]["rewards"]) == 2
        assert pruned[1]["details"]["uniform"]["costs"]["macs"] <= 0.6 * rows[0]["macs"]
        timed = pruned[1]["details"]["costs"].get("latency_ms")
        assert timed is None if kind != "pictures" else 0 < timed < pruned[1]["details"]["limits"]["latency_ms"]
        layers = rounded[1]["details"]["sensitivity"]
        assert layers.keys() == rounded[1]["details"]["bits"].keys()
        scores = results(shell, f"road-{kind}-scores")["rows"]
        assert [row["run"] for row in scores] == [f"road-{kind}-{what}" for what in ("whole", "pruned", "int8")]
        assert [row["macs"] for row in scores] == [rows[0]["macs"], rows[1]["macs"], rows[1]["macs"]]


def is_finished(shell: Shell, name: str) -> bool:
    status = json.loads((shell.storage / name / "status.json").read_text())
    return status["state"] == "finished"


@pytest.mark.ray
@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_a_road_that_is_killed_in_every_step_ends_in_the_same_bits(tmp_path):
    """Kill the driver and everything below it, six times in one chain."""
    text = road("clips", "road", samples=60, episodes=3)
    straight, killed = Shell(tmp_path / "straight"), Shell(tmp_path / "killed")
    for shell in (straight, killed):
        shell.folder.mkdir()
        shell.write("road.yaml", text)
    straight.ok("run", "road.yaml")

    def there(path: str) -> Any:
        return lambda: (Path(killed.storage) / path).exists()

    places = {
        "road-data": there("road-data/status.json"),
        "road-whole": lambda: has_checkpoint(killed, "road-whole", 2),
        "road-pruned/stages/01-prune": there("road-pruned/stages/01-prune/trials/000001.json"),
        "road-pruned/stages/02-finetune": lambda: has_checkpoint(killed, "road-pruned/stages/02-finetune", 2),
        "road-int8/stages/01-quantize": there("road-int8/stages/01-quantize/status.json"),
        "road-scores": there("road-scores/status.json"),
    }
    for name, condition in places.items():
        child = killed.start("run", "road.yaml")
        wait_for(f"work in {name}", condition, 200)
        end_session(child)
        assert not is_finished(killed, name), f"{name} was over before it was killed"
    killed.ok("run", "road.yaml")
    for name in ("road-whole", "road-pruned", "road-int8"):
        assert weights(killed, name) == weights(straight, name), name
    found, wanted = (results(shell, "road-pruned")["steps"][1]["details"] for shell in (killed, straight))
    assert found == wanted
    found, wanted = (results(shell, "road-scores")["rows"] for shell in (killed, straight))
    for one, other in zip(found, wanted, strict=True):
        assert one["top1"] == other["top1"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
