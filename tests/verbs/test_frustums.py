"""Boxes in frustums in the same framework: raw KITTI files prepared, trained, scored with AP, drawn from above."""

import json

import pytest
from tests.kitti_scenes import write_kitti
from tests.verbs.conftest import Shell

from slimray import runs

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

JOBS = """
kind: prepare
name: streets
data: {{card: kitti, root: {root}, copies: 2}}
---
kind: train
name: boxes
data: {{run: streets, points: {{num_points: 256, replace: true, flip: true}}}}
model: {{name: frustum_pointnet, width: 0.125, num_points: 64}}
batch: {{total: 8, per_worker: 4}}
optim: {{optimizer: adam, lr: 0.002, reference_batch: 8, epochs: 2, schedule: cosine, groups: plain}}
scale: {{workers: 2}}
---
kind: evaluate
name: boxes-eval
runs: [boxes]
repeats: 2
batch: 4
scale: {{workers: 2}}
"""


@pytest.fixture(scope="module")
def trained(shell: Shell) -> Shell:
    write_kitti(shell.folder / "kitti", num_train=8, num_val=4)
    (shell.folder / "kitti/training/label_2/000009.txt").write_text("Car 0 0\n")
    shell.ok("run", shell.write("streets.yaml", JOBS.format(root=shell.folder / "kitti")))
    return shell


def test_scans_become_frustums_and_a_bad_label_file_is_named(trained):
    run = runs.open_run(str(trained.storage), "streets")
    card = runs.read_card(run)
    assert card is not None
    assert card["metrics"]["train"]["clips"] > 40  # 3 objects in 8 scans, twice each
    assert card["metrics"]["val"]["quarantined"] == 1
    objects = json.loads(runs.read_file(run, "data/val.objects.json"))
    assert [len(one["objects"]) for one in objects] == [3, 3, 3]
    (bad,) = [row for row in runs.read_parts(run, "quarantine") if row["split"] == "val"]
    assert "000009" in bad["path"]
    assert "words" in bad["reason"]


def test_boxes_are_learnt_and_counted_as_kitti_counts_them(trained):
    card = runs.read_card(runs.open_run(str(trained.storage), "boxes"))
    assert card is not None
    assert {"val/class_found_3d", "val/mean_iou_3d", "val/mask_acc"} <= set(card["metrics"]["best"])
    results = json.loads(runs.read_file(runs.open_run(str(trained.storage), "boxes-eval"), "results.json"))
    (row,) = results["rows"]
    assert row["num_samples"] == 9
    assert {f"ap{n}_{m}_car_moderate" for n in (11, 40) for m in ("3d", "bev")} <= set(row["ap"])
    assert row["repeats"]["mean_iou_3d"]["max"] >= row["mean_iou_3d"] > 0
    shown = [one for one in results["examples"] if one["type"] == "boxes"]
    assert 1 <= len(shown) <= 3  # images with a frustum on the first rank


def test_the_report_shows_boxes_from_above(trained):
    page = runs.read_file(runs.open_run(str(trained.storage), "boxes-eval"), "report.html").decode()
    assert "training/velodyne/0000" in page
    assert "<svg" in page or "data:image/png" in page
