"""Point clouds in the same framework: prepared, trained exactly, shown in 3D, labelled; a kill changes no bit."""

import json

import numpy as np
import pytest
from tests.verbs.conftest import Shell, run_and_kill_a_worker, seen, weights

from slimray import runs
from slimray.data.points import files, shapes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

DATA = "{kind: prepare, name: shapes, data: {card: shapes, clips: 60, points: 256}}"
TRAIN = """
kind: train
name: {name}
data: {{run: shapes, record_samples: true, points: {{num_points: 128, rotate_z: 180, jitter: 0.01}}}}
model: {{name: pvcnn_s3dis, in_channels: 3, width: 0.0625, voxel: 0.25}}
batch: {{total: 8, per_worker: 4}}
optim: {{optimizer: adamw, lr: 0.002, reference_batch: 8, epochs: 3, schedule: cosine, groups: no_norm_decay}}
scale: {{workers: 2}}
checkpoint: {{every_steps: 2}}
log_every: 1
"""


@pytest.fixture(scope="module")
def parts(shell: Shell) -> str:
    """Return the digest of an undisturbed training on labelled parts, `parts`."""
    shell.ok("run", shell.write("shapes.yaml", DATA), shell.write("parts.yaml", TRAIN.format(name="parts")))
    return weights(shell, "parts")


def test_labels_per_point_are_learnt_and_counted(shell, parts):
    card = runs.read_card(runs.open_run(str(shell.storage), "parts"))
    assert card is not None
    assert {"val/miou", "val/overall_acc"} <= set(card["metrics"]["best"])
    assert seen(shell, "parts") == {epoch: list(range(48)) for epoch in range(3)}


def test_a_killed_worker_costs_no_bit(shell, parts):
    run_and_kill_a_worker(shell, shell.write("again.yaml", TRAIN.format(name="parts-killed")), "parts-killed")
    assert weights(shell, "parts-killed") == parts
    assert seen(shell, "parts-killed") == {epoch: list(range(48)) for epoch in range(3)}


def test_an_evaluation_shows_clouds_and_the_iou_of_every_part(shell, parts):
    done = shell.run("evaluate", "parts", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["rows"][0]
    assert row["num_samples"] == 12
    assert len(row["class_iou"]) == shapes.NUM_PARTS
    page = runs.read_file(runs.open_run(str(shell.storage), "parts-eval"), "report.html").decode()
    assert "script-src" in page
    assert "<h2>Clouds</h2>" in page
    assert "lamp shade" in page


def test_a_cloud_of_ones_own_is_labelled(shell, parts):
    coords, _, _ = shapes.make_cloud(7, 1, num_points=300)
    np.savetxt(shell.folder / "mine.xyz", coords)
    shell.ok("predict", "parts", "mine.xyz", "--out", "labelled")
    labelled = files.read_cloud("mine.labels.ply", (shell.folder / "labelled/mine.labels.ply").read_bytes())
    assert len(labelled) == 300
    assert labelled.labels is not None
    assert 0 <= labelled.labels.min() <= labelled.labels.max() < shapes.NUM_PARTS


@pytest.mark.benchmark
def test_votes_cover_every_point_and_peers_train(shell, parts):
    """Two draws of a cloud vote on every point; a network from mutual learning is an ordinary run."""
    peers = TRAIN.format(name="peers").replace("epochs: 3", "epochs: 1, mutual: 1")
    votes = "---\nkind: evaluate\nname: voted\nruns: [parts, peers]\nvotes: 2\nscale: {workers: 2}\n"
    shell.ok("run", shell.write("voted.yaml", peers + votes))
    results = json.loads(runs.read_file(runs.open_run(str(shell.storage), "voted"), "results.json"))
    assert [row["num_samples"] for row in results["rows"]] == [12, 12]
    for counts in results["confusion"].values():
        assert np.sum(counts) == 12 * 256  # each point of each cloud once
    tensors, _, _ = runs.read_model(runs.open_run(str(shell.storage), "peers"))
    assert b"second." not in tensors
