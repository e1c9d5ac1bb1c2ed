"""Codebooks: a few values that represent many, found by k-means in one dimension (Deep Compression, 1510.00149)."""

import numpy as np

MAX_STEPS = 300


def kmeans(values: np.ndarray, count: int, steps: int = MAX_STEPS) -> np.ndarray:
    """Return the centroids, ascending float64, of at most `count` clusters of `values` (any shape, finite).

    Runs Lloyd's iterations, from centroids spread evenly over [min, max], until nothing changes; an empty cluster keeps
    its centroid. In one dimension the midpoints between neighbours determine the nearest centroid; a value at a
    midpoint goes to the lower one.
    """
    flat = np.sort(np.asarray(values, np.float64).reshape(-1))
    if not len(flat):
        return np.zeros(0)
    centroids = np.linspace(flat[0], flat[-1], count) if count > 1 else np.array([flat.mean()])
    sums = np.concatenate([[0.0], np.cumsum(flat)])
    for _ in range(steps):
        borders = np.searchsorted(flat, (centroids[1:] + centroids[:-1]) / 2, side="right")
        edges = np.concatenate([[0], borders, [len(flat)]])
        sizes = np.diff(edges)
        new = np.where(sizes > 0, np.diff(sums[edges]) / np.maximum(sizes, 1), centroids)
        if np.array_equal(new, centroids):
            break
        centroids = new
    return centroids


def nearest(values: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return the index of the nearest of the ascending `centroids` for each of `values`, int64 of the same shape."""
    return np.searchsorted((centroids[1:] + centroids[:-1]) / 2, np.asarray(values, np.float64), side="left")
