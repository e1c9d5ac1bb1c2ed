"""Accuracy of a nearest-neighbour classifier on point clouds: the number that a learned classifier must beat.

`python -m tests.benchmarks.knn [folder]`: the folder holds single objects as `.xyz` files named in `train.txt` and
`val.txt` (`file label name`); default: the DALES objects. Shape features come from clouds on the unit sphere with a
fixed number of points, so they contain no size; beside them the size alone: extents and number of points.
"""

import os
from pathlib import Path

import numpy as np

NUM_POINTS, NUM_PAIRS, NUM_BINS = 1024, 4096, 16
FOLDS, REPEATS = 5, 5


def unit_sphere(coords: np.ndarray, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """Points `[N, 3]` around their mean, the furthest at 1, `num_points` of them; each at most once if that will do."""
    centred = coords - coords.mean(0)
    centred /= np.linalg.norm(centred, axis=1).max()
    return centred[rng.choice(len(centred), num_points, replace=len(centred) < num_points)]


def shape_features(coords: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Features `[40]` of a cloud `[N, 3]` on the unit sphere, not changed by a turn about z.

    Four of the covariance (linear, planar, round, how upright its longest axis is), four of the covariance seen from
    above, and histograms of heights and of distances between random points (D2).
    """
    values, vectors = np.linalg.eigh(np.cov(coords.T))
    small, middle, large = np.maximum(values, 1e-9)
    flat = np.maximum(np.linalg.eigvalsh(np.cov(coords[:, :2].T)), 1e-9)
    spread = [(large - middle) / large, (middle - small) / large, small / large, abs(vectors[2, 2])]
    above = [flat[0] / flat[1], flat[1] / large, coords[:, 2].std(), np.ptp(coords[:, 2])]
    heights = np.histogram(coords[:, 2], NUM_BINS, (-1, 1))[0] / len(coords)
    a, b = coords[rng.integers(len(coords), size=(2, NUM_PAIRS))]
    distances = np.histogram(np.linalg.norm(a - b, axis=1), NUM_BINS, (0, 2))[0] / NUM_PAIRS
    return np.concatenate([spread, above, heights, distances])


def size_features(coords: np.ndarray) -> np.ndarray:
    """Extents along x, y, z and the number of points, as logarithms: `[4]`."""
    return np.log(np.r_[np.ptp(coords, axis=0) + 1e-3, len(coords)])


def knn_accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, num_neighbors: int = 5
) -> float:
    """Percent of `test` `[m, F]` that the majority of its neighbours in `train` `[n, F]` names rightly.

    Features are scaled to variance 1 over `train`; of equally many votes the nearer neighbours' class wins.
    """
    scale = train.std(0) + 1e-9
    distances = np.linalg.norm((test[:, None] - train) / scale, axis=2)
    nearest = train_labels[distances.argsort(1, kind="stable")[:, :num_neighbors]]
    votes = (nearest[:, :, None] == np.arange(train_labels.max() + 1)) * (1 - 1e-3 * np.arange(num_neighbors))[:, None]
    return 100 * float((votes.sum(1).argmax(1) == test_labels).mean())


def folds(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The fold of each object, `[n]`; every class is spread evenly."""
    fold = np.empty(len(labels), int)
    order = rng.permutation(len(labels))
    order = order[labels[order].argsort(kind="stable")]
    fold[order] = np.arange(len(labels)) % FOLDS
    return fold


def main() -> None:
    shared = Path(os.environ.get("SLIMRAY_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    folder = shared / "data/pointcloud/dales_objects"
    lists = {split: [line.split() for line in (folder / f"{split}.txt").open()] for split in ("train", "val")}
    rows = [row for split in lists.values() for row in split]
    is_val = np.repeat([False, True], [len(lists["train"]), len(lists["val"])])
    labels = np.array([int(row[1]) for row in rows])
    clouds = [np.loadtxt(folder / row[0], ndmin=2)[:, :3] for row in rows]
    rng = np.random.default_rng(0)
    size = np.stack([size_features(cloud) for cloud in clouds])
    shape = np.stack([shape_features(unit_sphere(cloud, NUM_POINTS, rng), rng) for cloud in clouds])
    tables = {
        f"shape, unit sphere, {NUM_POINTS} points": shape,
        "extents and number of points": size,
        "both": np.concatenate([shape, size], 1),
    }
    print(f"{len(labels)} objects, classes {np.bincount(labels).tolist()}, {FOLDS} folds x {REPEATS}", flush=True)
    for k in (1, 5):
        for name, features in tables.items():
            repeats = []
            for seed in range(REPEATS):
                fold = folds(labels, np.random.default_rng(seed))
                parts = [
                    (features[fold != f], labels[fold != f], features[fold == f], labels[fold == f])
                    for f in range(FOLDS)
                ]
                repeats.append([knn_accuracy(*part, k) for part in parts])
            val = knn_accuracy(features[~is_val], labels[~is_val], features[is_val], labels[is_val], k)
            print(
                f"{k}-NN {name}: {np.mean(repeats):.1f} % (of single folds {np.min(repeats):.1f} to "
                f"{np.max(repeats):.1f}, of repeats {np.mean(repeats, 1).min():.1f} to {np.mean(repeats, 1).max():.1f})"
                f", train -> val {val:.1f} %",
                flush=True,
            )


if __name__ == "__main__":
    main()
