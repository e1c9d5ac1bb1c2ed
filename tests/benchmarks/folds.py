"""How well `pvcnn_cls` distinguishes lidar objects by their shape alone: five folds over all of them, last epoch.

`python -m tests.benchmarks.folds [folder]` runs the shipped job `jobs/my_clouds.yaml` once per fold, with clouds on the
unit sphere and a fixed number of points, so that size does not help. The folds are the first repeat of `knn.py`, whose
nearest neighbours on shape features are the number to beat.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tests.benchmarks.knn import FOLDS, NUM_POINTS, folds, knn_accuracy, shape_features, size_features, unit_sphere

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "data.points": "{num_points: 512, normalize: sphere, rotate_z: 180, scale: [0.8, 1.25], jitter: 0.01}",
    "model": "{name: pvcnn_cls, width: 0.25, voxel: 0.5}",
    "optim.epochs": "40",
    "optim.label_smoothing": "0.1",
}


def neighbours(folder: Path, rows: list[list[str]], fold: np.ndarray) -> dict[str, list[float]]:
    """Percent right of 5 nearest neighbours in each fold: on shape features of unit-sphere clouds, and on sizes."""
    rng = np.random.default_rng(0)
    labels = np.array([int(row[1]) for row in rows])
    clouds = [np.loadtxt(folder / row[0], ndmin=2)[:, :3] for row in rows]
    shape = np.stack([shape_features(unit_sphere(cloud, NUM_POINTS, rng), rng) for cloud in clouds])
    size = np.stack([size_features(cloud) for cloud in clouds])
    return {
        name: [
            knn_accuracy(table[fold != f], labels[fold != f], table[fold == f], labels[fold == f]) for f in range(FOLDS)
        ]
        for name, table in (("5-NN on shapes", shape), ("5-NN on extents and number of points", size))
    }


def trained(folder: Path, rows: list[list[str]], fold: np.ndarray, number: int, work: Path) -> float:
    """Percent right of the last epoch on fold `number`, trained on the others by the shipped job."""
    root, storage = work / f"fold{number}", work / "runs"
    root.mkdir()
    for path, *_ in rows:
        (root / path).symlink_to((folder / path).resolve())
    for split, chosen in (("train", fold != number), ("val", fold == number)):
        lines = [f"{row[0]} {row[1]}" for row, take in zip(rows, chosen, strict=True) if take]
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    job = (ROOT / "jobs/my_clouds.yaml").read_text().replace("my-clouds", f"fold{number}")
    train = job.split("\n---\n")
    (work / f"fold{number}.yaml").write_text("\n---\n".join(train[:2]))
    sets = [f"--set=fold{number}-pvcnn:{key}={value}" for key, value in SETTINGS.items()]
    command = [sys.executable, "-m", "slimray.cli", "run", f"fold{number}.yaml", f"--storage={storage}"]
    command += [f"--set=data.root={root}", *sets]
    subprocess.run(command, cwd=work, check=True, timeout=3600, stdout=subprocess.DEVNULL)
    card = json.loads((storage / f"fold{number}-pvcnn/card.json").read_text())
    return card["metrics"]["last"]["val/top1"]


def main() -> None:
    shared = Path(os.environ.get("SLIMRAY_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    folder = shared / "data/pointcloud/dales_objects"
    rows = [line.split() for split in ("train", "val") for line in (folder / f"{split}.txt").open()]
    fold = folds(np.array([int(row[1]) for row in rows]), np.random.default_rng(0))
    for name, percents in neighbours(folder, rows, fold).items():
        print(f"{name}: {np.mean(percents):.1f} % (folds {', '.join(f'{p:.1f}' for p in percents)})", flush=True)
    with tempfile.TemporaryDirectory() as work:
        percents = []
        for number in range(FOLDS):
            percents.append(trained(folder, rows, fold, number, Path(work)))
            print(f"fold {number}: pvcnn_cls {percents[-1]:.1f} %", flush=True)
    print(f"pvcnn_cls, last epoch: {np.mean(percents):.1f} % (folds {min(percents):.1f} to {max(percents):.1f})")


if __name__ == "__main__":
    main()
