"""Segmentation of a user's point cloud: writes a label for every point, for programs (.npz) and for viewers (.ply)."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from slimray import storage
from slimray.data.modalities import read_recipe
from slimray.data.own_files import Readers, check_cloud_options, read_own_cloud
from slimray.data.points.clouds import Cloud
from slimray.data.points.recipe import PointSample
from slimray.runtime.answers import (
    Answer,
    Answerer,
    AnswerOptions,
    Answers,
    Model,
    only_array,
    require_apart,
    softmax,
)

PALETTE = (  # by Okabe and Ito, safe for the colour-blind, grey instead of black; further classes get darker shades
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (153, 153, 153),
)  # fmt: skip
LABELS = "labels of its points"


def answer(model: Model, options: AnswerOptions) -> Answerer:
    """Return a function of a file that writes the labels of its points, beside it or to `out`, and returns the shares
    of the classes."""
    recipe = read_recipe({**model.recipe, "mode": "val"})
    check_cloud_options(recipe, options.file)
    require_apart(options.paths, lambda path: label_files(path, options.out), "labels")
    recipe = replace(recipe, mode="test", votes=1, max_points=0)  # views that hold every point

    def one(path: Path, readers: Readers) -> Answer:
        cloud, sample, notes = read_own_cloud(str(path), path.read_bytes(), recipe, options.file, readers)
        scores = score_points(model, sample, len(cloud), options.rows)
        found = _write_labels(cloud, scores, model.classes, options.top, path, label_files(path, options.out))
        return replace(found, notes=notes)

    return one


def label_files(path: Path, out: Path | None = None) -> tuple[Path, Path]:
    """Return the paths of the labels of `path`: NAME.labels.npz and NAME.labels.ply, beside it or in `out`."""
    stem = (path.parent if out is None else out) / path.stem
    return Path(f"{stem}.labels.npz"), Path(f"{stem}.labels.ply")


def score_points(model: Model, sample: PointSample, num_points: int, rows: int) -> np.ndarray:
    """Return scores float32 `[num_points, C]`, the mean logits of each point; the views must cover every point."""
    total = np.zeros((num_points, len(model.classes)), np.float32)
    for i in range(0, len(sample.points), rows):
        scores = only_array(model.outputs(sample.points[i : i + rows, None], rows))
        places = sample.indices[i : i + rows].reshape(-1)
        flat = np.moveaxis(scores, 1, 2).reshape(len(places), -1)  # [v, C, N] -> [v*N, C]
        np.add.at(total, places, flat)
    seen = np.bincount(sample.indices.reshape(-1), minlength=num_points)
    return total / seen[:, None].astype(np.float32)


def class_colors(num_classes: int) -> np.ndarray:
    """Return a colour for each class, uint8 `[num_classes, 3]`, independent of the number of classes."""
    number = np.arange(num_classes)
    return (np.array(PALETTE)[number % len(PALETTE)] * 0.6 ** (number // len(PALETTE))[:, None]).astype(np.uint8)


def _write_labels(
    cloud: Cloud, scores: np.ndarray, classes: Sequence[str], k: int, path: Path, targets: tuple[Path, Path]
) -> Answer:
    """Write the labels of a cloud as .npz for programs and .ply for viewers, in the coordinates of its file."""
    import plyfile

    probabilities = softmax(scores, 1)
    labels = probabilities.argmax(1)
    best, coords = probabilities[np.arange(len(labels)), labels], cloud.coords + cloud.origin  # float64
    rows = np.arange(len(cloud)) if cloud.rows is None else cloud.rows
    arrays = io.BytesIO()
    np.savez_compressed(arrays, coords=coords, labels=labels, confidence=best, rows=rows, classes=np.array(classes))
    columns = [*coords.T, labels, *class_colors(len(classes))[labels].T]
    types = [("x", "f8"), ("y", "f8"), ("z", "f8"), ("label", "i4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")]
    vertices = plyfile.PlyElement.describe(np.asarray(np.rec.fromarrays(columns, types)), "vertex")
    legend = [f"class {number} {name!a}" for number, name in enumerate(classes)]
    picture = io.BytesIO()
    plyfile.PlyData([vertices], byte_order="<", comments=legend).write(picture)
    for target, buffer in zip(targets, (arrays, picture), strict=True):
        storage.write_atomic(*storage.open_uri(target), buffer.getvalue())
    shares = np.bincount(labels, minlength=len(classes)) / len(labels)
    order = [int(number) for number in np.argsort(-shares, kind="stable")[:k] if shares[number]]
    found = [(classes[number], float(shares[number])) for number in order]
    return Answer(path, found, written=targets, what=LABELS)


SEGMENT = Answers("segment", answer, writes=True)
PARTS = replace(SEGMENT, name="parts")
