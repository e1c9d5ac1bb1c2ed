"""Generated shapes: every cloud is a function of its number, and a point's position says little about its part."""

import numpy as np
import pytest

from slimray.data.points import shapes
from slimray.data.points.recipe import normalized
from slimray.data.points.shapes import CLASSES, NUM_PARTS, make_cloud, part_range


def test_a_cloud_is_a_function_of_seed_and_number():
    first, again, other = make_cloud(7, 3), make_cloud(7, 3), make_cloud(7, 4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_classes_are_balanced_and_parts_run_through_them():
    labels = [make_cloud(i, 0, 16)[2] for i in range(20)]
    assert labels == [*range(len(CLASSES))] * 4
    assert [part for label in range(len(CLASSES)) for part in part_range(label)] == list(range(NUM_PARTS))


@pytest.mark.parametrize("num_points", [100, 513, 1024])
def test_every_part_of_a_shape_has_its_share(num_points):
    for number in range(15):
        coords, parts, label = make_cloud(number, 1, num_points)
        assert coords.shape == (num_points, 3)
        assert (coords.dtype, parts.dtype) == (np.float32, np.int64)
        assert np.isfinite(coords).all()
        counts = np.bincount(parts, minlength=NUM_PARTS)
        inside = list(part_range(label))
        assert counts[inside].min() >= shapes.MIN_SHARE * num_points - 1
        assert counts.sum() == counts[inside].sum() == num_points


def test_shapes_stand_lie_and_differ_in_size():
    for label in range(len(CLASSES)):
        sizes = np.array([np.ptp(make_cloud(i, 0, 256)[0], 0) for i in range(label, 200, len(CLASSES))])
        assert sizes.max() > 2 * sizes.min()
        upright = sizes[:, 2] / sizes.max(1)
        assert upright.min() < 0.7
        assert upright.max() > 0.9


def features(coords: np.ndarray) -> np.ndarray:
    """Cells of (radius about z, height) of normalized points: the part of a position invariant to rotation about z."""
    coords = normalized(coords, "sphere")
    radius, height = np.hypot(coords[:, 0], coords[:, 1]), coords[:, 2]
    return np.minimum((radius * 20).astype(int), 19) * 40 + np.clip(((height + 1) * 20).astype(int), 0, 39)


def test_the_best_guess_from_a_points_own_place_stays_below_50_miou():
    seen = np.zeros((len(CLASSES), 800, NUM_PARTS))
    for number in range(1000):
        coords, parts, label = make_cloud(number, 0, 512)
        np.add.at(seen, (label, features(coords), parts), 1)
    ious = []
    for number in range(200):
        coords, parts, label = make_cloud(number, 1, 512)
        guess = seen[label, features(coords)].argmax(1)  # even the class is told
        inside = [((guess == p) & (parts == p)).sum() / ((guess == p) | (parts == p)).sum() for p in part_range(label)]
        ious.append(np.mean(inside))
    assert 25 < 100 * np.mean(ious) < 48
