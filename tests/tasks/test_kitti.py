"""Boxes, their counts and KITTI's AP equal the recorded ones, those of the protocol, and results by hand."""

import math

import numpy as np
import pytest
import torch

from slimray.tasks import boxes, frustum_boxes, kitti
from slimray.tasks.frustum_boxes import FrustumScore
from slimray.tasks.kitti import Detections, Labels


@pytest.fixture(scope="module")
def recorded(shared):
    return np.load(shared / "parity/pvcnn_conventions.npz", allow_pickle=False)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def summed(a, b):
    """Return `a` after an all-reduce with `b`."""
    for mine, other in zip(a.tensors(), b.tensors(), strict=True):
        mine += other
    return a


# ------------------------------------------------------------------------------------------------ boxes


def box(x=0.0, y=0.0, z=0.0, length=4.0, width=2.0, height=1.5, heading=0.0):
    return np.array([[x, y, z, length, width, height, heading]])


def random_boxes(rng, num, spread=3.0):
    boxes = rng.uniform([-spread, -1, -spread, 0.3, 0.3, 0.5, -7], [spread, 1, spread, 5, 3, 3, 7], (num, 7))
    return boxes + np.array([40, 1.5, 60, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("other", "flat", "solid"),
    [
        (box(), 1, 1),
        (box(heading=math.pi), 1, 1),
        (box(heading=math.pi / 2), 4 / 12, 4 / 12),
        (box(x=2), 1 / 3, 1 / 3),
        (box(z=2), 0, 0),  # a shared side
        (box(x=4.1), 0, 0),
        (box(length=2, width=1), 1 / 4, 1 / 4),  # inside
        (box(y=-0.75), 1, 1 / 3),
        (box(y=-1.5), 1, 0),
        (box(height=0.75), 1, 1 / 2),  # stands on the same ground
        (box(length=-1), 0, 0),
        (box(height=0), 1, 0),
    ],
)
def test_overlaps_by_hand(other, flat, solid):
    for a, b in ((box(), other), (other, box())):
        assert np.array(boxes.box_ious(a, b))[:, 0] == pytest.approx([flat, solid], abs=1e-12)


def test_two_squares_at_45_degrees_share_an_octagon():
    a, b = box(length=2, width=2), box(length=2, width=2, heading=math.pi / 4)
    octagon = 8 * (math.sqrt(2) - 1)
    assert boxes.box_ious(a, b)[0][0] == pytest.approx(octagon / (8 - octagon), abs=1e-12)


def test_overlaps_are_those_of_shapely(rng):
    shapely = pytest.importorskip("shapely")
    a, b = random_boxes(rng, 3000), random_boxes(rng, 3000)
    b[:500, 6] = a[:500, 6] + rng.integers(0, 4, 500) * math.pi / 2  # parallel
    b[500:700] = a[500:700]
    b[700:900, [0, 2, 3, 4, 6]] = a[700:900, [0, 2, 3, 4, 6]] + rng.normal(0, 1e-13, (200, 5))  # almost equal

    def outlines(boxes):
        cos, sin = np.cos(boxes[:, 6:]), np.sin(boxes[:, 6:])
        u, v = boxes[:, 3:4] / 2 * [1, 1, -1, -1], boxes[:, 4:5] / 2 * [1, -1, -1, 1]
        return shapely.polygons(np.stack([boxes[:, :1] + cos * u + sin * v, boxes[:, 2:3] + cos * v - sin * u], 2))

    common = shapely.area(shapely.intersection(outlines(a), outlines(b), grid_size=0))
    expected = common / (a[:, 3] * a[:, 4] + b[:, 3] * b[:, 4] - common)
    assert np.abs(boxes.box_ious(a, b)[0] - expected).max() < 1e-9
    assert (expected > 0).mean() > 0.3


def test_overlaps_in_space_are_the_share_of_random_points_in_both(rng):
    a, b = random_boxes(rng, 20, spread=0.7), random_boxes(rng, 20, spread=0.7)
    points = rng.uniform([35, -3, 55], [45, 3, 65], (200_000, 3))

    def inside(one):
        x, y, z = (points - one[:3]).T
        cos, sin = np.cos(one[6]), np.sin(one[6])
        level = (y <= 0) & (y >= -one[5])
        return level & (abs(cos * x - sin * z) <= one[3] / 2) & (abs(sin * x + cos * z) <= one[4] / 2)

    for i, iou in enumerate(boxes.box_ious(a, b)[1]):
        one, other = inside(a[i]), inside(b[i])
        assert iou == pytest.approx((one & other).sum() / max((one | other).sum(), 1), abs=0.02)


def test_all_pairs_are_the_pairs_one_by_one(rng, monkeypatch):
    monkeypatch.setattr(boxes, "MAX_PAIRS", 7)
    a, b = random_boxes(rng, 9, spread=8), random_boxes(rng, 5, spread=8)
    pairs = boxes.box_ious(np.repeat(a, 5, 0), np.tile(b, (9, 1)))
    for matrix, flat in zip(boxes.box_iou_matrix(a, b), pairs, strict=True):
        assert np.allclose(matrix.ravel(), flat, atol=1e-12)
    assert boxes.box_iou_matrix(a[:0], b)[0].shape == (0, 5)
    assert boxes.box_iou_matrix(a, np.zeros((0, 7)))[1].shape == (9, 0)


TEMPLATES = np.array([[4.0, 1.6, 1.5], [0.8, 0.6, 1.7]])


def outputs_of(heading_id, residual, center, size_id=0):
    n = len(heading_id)
    scores, residuals = np.zeros((n, 12)), np.full((n, 12), 9.0)
    scores[np.arange(n), heading_id], residuals[np.arange(n), heading_id] = 1, residual
    sizes = np.zeros((n, 2, 3))
    sizes[:, size_id] = [0.1, -0.1, 0.3]
    return {
        "center": center,
        "heading_scores": scores,
        "heading_residuals": residuals,
        "size_scores": np.eye(2)[np.full(n, size_id)],
        "size_residuals": sizes,
    }


def test_headings_come_back_from_their_recorded_bins(recorded):
    angles = recorded["angles"]
    boxes = frustum_boxes.decode_boxes(
        outputs_of(recorded["bin_id"], recorded["residual"], np.zeros((len(angles), 3))), TEMPLATES
    )
    assert np.abs(np.exp(1j * boxes[:, 6]) - np.exp(1j * angles)).max() < 1e-6
    assert (np.abs(boxes[:, 6]) <= math.pi).all()


def test_centers_turn_back_from_the_recorded_rotation(recorded):
    turned, n = recorded["rot_out"][:, :3], len(recorded["rot_out"])
    angle = np.full(n, float(recorded["rot_angle"]))
    outputs = outputs_of(np.full(n, 2), np.full(n, 0.1), turned, size_id=1)
    boxes = frustum_boxes.decode_boxes({k: torch.as_tensor(v) for k, v in outputs.items()}, TEMPLATES, angle)
    assert np.abs(boxes[:, [0, 2]] - recorded["rot_in"][:, [0, 2]]).max() < 1e-6
    assert np.allclose(boxes[:, 3:6], [0.9, 0.5, 2.0])
    assert np.allclose(boxes[:, 1], recorded["rot_in"][:, 1] + 1.0)  # the bottom is half a height below the centre
    assert np.allclose(boxes[:, 6], 2 * math.pi / 6 + 0.1 + 0.7)


def test_frustums_of_two_ranks_are_those_of_one():
    torch.manual_seed(0)
    size_id, heading_id = torch.tensor([0, 1, 0]), torch.tensor([3, 0, 11])
    targets = {
        "center": torch.zeros(3, 3),
        "heading_id": heading_id,
        "heading_residual": torch.zeros(3),
        "size_id": size_id,
        "size_residual": torch.zeros(3, 3),
        "mask": torch.tensor([[1, 0], [1, 1], [0, 0]]),
    }
    outputs = {
        "center": torch.tensor([[0.0, 0, 0], [0.0, 0.4, 0], [9.0, 0, 0]]),
        "heading_scores": torch.nn.functional.one_hot(heading_id, 12).float(),
        "heading_residuals": torch.zeros(3, 12),
        "size_scores": torch.nn.functional.one_hot(size_id, 2).float(),
        "size_residuals": torch.zeros(3, 2, 3),
        "mask_logits": torch.tensor([[[0.0, 0], [1, -1]], [[0, 0], [1, 0]], [[0, 0], [-1, -1]]]),  # equal: background
    }
    one, a, b = (FrustumScore((0.7, 0.5)) for _ in range(3))
    one.compare(outputs, targets, torch.tensor([0, 1, 0]), TEMPLATES)
    a.compare({k: v[:2] for k, v in outputs.items()}, {k: v[:2] for k, v in targets.items()}, [0, 1], TEMPLATES)
    b.compare({k: v[2:] for k, v in outputs.items()}, {k: v[2:] for k, v in targets.items()}, [0], TEMPLATES)
    iou = 1.3 / 2.1  # 0.4 of 1.7 m too low: enough for a pedestrian
    expected = {
        "mask_acc": 500 / 6,
        "mean_iou_3d": 100 * (1 + iou) / 3,
        "found_3d": 100 / 3,
        "class_found_3d": 75,
        "num_known": 3,
        "num_samples": 3,
    }
    assert one.result() == pytest.approx(expected, rel=1e-6)
    assert summed(a, b).result() == pytest.approx(one.result())
    one.add_unknown(2)  # from a detector: they count as samples, and change nothing else
    assert one.result() == pytest.approx(expected | {"num_samples": 5}, rel=1e-6)


# ------------------------------------------------------------------------------------------------ KITTI's AP


def labels_of(boxes, names=None, heights=50.0, occlusion=0, truncation=0.0):
    n = len(boxes)
    full = [np.broadcast_to(x, n) for x in (heights, occlusion, truncation)]
    return Labels(names or ["Car"] * n, np.asarray(boxes), *full)


def found(boxes, scores, names=None, heights=50.0):
    n = len(boxes)
    return Detections(names or ["Car"] * n, np.asarray(boxes), np.broadcast_to(heights, n), np.asarray(scores))


def ap(frames, points=40, name="Car", level="moderate", metric="3d"):
    curve = kitti.precision_curve(frames, name, metric, kitti.KITTI_DIFFICULTIES[level], kitti.KITTI_MIN_IOU[name])
    return kitti.average_precision(curve, points)


CARS = np.concatenate([box(x=10.0 * i) for i in range(100)])
NONE = np.zeros((0, 7))


def test_a_detector_that_finds_all_and_no_more_has_100():
    frames = [kitti.compare_frame(labels_of(CARS[i : i + 1]), found(CARS[i : i + 1], [i])) for i in range(100)]
    for points in (11, 40):
        assert ap(frames, points) == pytest.approx(100)
    numbers = kitti.kitti_ap(frames)
    assert len(numbers) == 3 * 2 * 3 * 2
    assert numbers["ap11_bev_car_easy"] == pytest.approx(100)
    assert numbers["ap40_3d_cyclist_hard"] == 0


def test_a_single_object_is_worth_one_recall_of_eleven():
    frames = [kitti.compare_frame(labels_of(box()), found(box(), [1.0]))]
    assert ap(frames, 11) == pytest.approx(100 / 11)
    assert ap(frames, 40) == 0


def test_half_of_the_objects_give_half_of_the_recalls():
    frames = [kitti.compare_frame(labels_of(CARS), found(CARS[:50], np.linspace(1, 2, 50)))]
    assert ap(frames, 11) == pytest.approx(100 * 6 / 11)
    assert ap(frames, 40) == pytest.approx(100 * 20 / 40)


def test_sure_errors_lower_precision_at_every_recall():
    wrong = box(z=50.0) + np.arange(100)[:, None] * [10, 0, 0, 0, 0, 0, 0]
    detections = found(np.concatenate([CARS, wrong]), np.r_[np.ones(100), np.full(100, 2.0)])
    assert ap([kitti.compare_frame(labels_of(CARS), detections)]) == pytest.approx(50)
    assert ap([kitti.compare_frame(labels_of(CARS), found(CARS, np.ones(100)))]) == pytest.approx(100)
    unsure = found(np.concatenate([CARS, wrong]), np.r_[np.ones(100), np.full(100, 0.5)])
    assert ap([kitti.compare_frame(labels_of(CARS), unsure)]) == pytest.approx(100)


def test_a_second_detection_of_an_object_is_an_error():
    twice = found(np.concatenate([CARS, CARS]), np.full(200, 1.0))
    assert ap([kitti.compare_frame(labels_of(CARS), twice)]) == pytest.approx(50)


@pytest.mark.parametrize(
    "odd",
    [
        {"names": ["Car"] * 50 + ["Van"] * 50},
        {"heights": np.r_[np.full(50, 50.0), np.full(50, 25.0)]},
        {"occlusion": np.r_[np.zeros(50), np.full(50, 2)]},
        {"truncation": np.r_[np.zeros(50), np.full(50, 0.31)]},
    ],
)
def test_neutral_objects_may_be_found_or_not(odd):
    for detected in (CARS, CARS[:50]):
        frames = [kitti.compare_frame(labels_of(CARS, **odd), found(detected, np.ones(len(detected))))] * 3
        assert ap(frames) == pytest.approx(100)


def test_a_person_that_sits_is_neutral_and_a_truck_is_none_of_ours():
    names = ["Pedestrian"] * 50 + ["Person_sitting"] * 50
    frames = [kitti.compare_frame(labels_of(CARS, names), found(CARS, np.ones(100), ["Pedestrian"] * 100))]
    assert ap(frames * 2, name="Pedestrian") == pytest.approx(100)
    frames = [kitti.compare_frame(labels_of(CARS, ["Car"] * 50 + ["Truck"] * 50), found(CARS, np.ones(100)))]
    assert ap(frames * 2) == pytest.approx(50)


def test_detections_too_low_in_the_image_are_no_errors():
    low = found(CARS, np.ones(100), heights=np.r_[np.full(50, 50.0), np.full(50, 24.0)])
    assert ap([kitti.compare_frame(labels_of(CARS[:50]), low)] * 2) == pytest.approx(100)


def test_classes_have_their_own_least_overlap():
    off = CARS + box(x=0.8, length=0, width=0, height=0)  # IoU 2/3
    for name, expected in (("Car", 0), ("Cyclist", 100)):
        frame = kitti.compare_frame(labels_of(CARS, [name] * 100), found(off, np.ones(100), [name] * 100))
        assert ap([frame], name=name) == pytest.approx(expected)


def test_what_stands_too_high_is_found_from_above_only():
    frames = [kitti.compare_frame(labels_of(CARS), found(CARS - [0, 1, 0, 0, 0, 0, 0], np.ones(100)))]
    assert (ap(frames), ap(frames, metric="bev")) == (0, pytest.approx(100))


def test_frames_without_objects_or_detections_count():
    nothing, errors = labels_of(NONE), found(CARS, np.ones(100))
    frames = [
        kitti.compare_frame(labels_of(CARS), errors),
        kitti.compare_frame(nothing, errors),
        kitti.compare_frame(nothing, found(NONE, [])),
    ]
    assert ap(frames) == pytest.approx(50)
    frames.append(kitti.compare_frame(labels_of(CARS), found(NONE, [])))
    assert ap(frames) == pytest.approx(25)
    assert ap([]) == 0


def devkit_curve(frames, name, metric, difficulty, min_iou):
    """The protocol implemented literally, one detection at a time."""
    neutral = kitti.KITTI_NEUTRAL.get(name)

    def match(frame, threshold):
        truth, detected, ious = frame.labels, frame.detections, frame.ious[metric]
        roles = []
        for n, height in zip(detected.names, detected.heights):
            roles.append(1 if height < difficulty.min_height else 0 if n == name else -1)
        taken = [False] * len(roles)
        out = [s < threshold for s in detected.scores] if threshold is not None else [False] * len(roles)
        hits, objects, right = [], 0, 0
        for g, n in enumerate(truth.names):
            hidden = (
                truth.heights[g] <= difficulty.min_height
                or truth.occlusion[g] > difficulty.max_occlusion
                or truth.truncation[g] > difficulty.max_truncation
            )
            if n not in (name, neutral):
                continue
            ignored = n == neutral or hidden
            objects += not ignored
            best, best_score, best_iou, best_low = None, -math.inf, 0.0, False
            for d, role in enumerate(roles):
                if role == -1 or taken[d] or out[d] or not ious[d, g] > min_iou:
                    continue
                if threshold is None:
                    if detected.scores[d] > best_score:
                        best, best_score = d, detected.scores[d]
                elif role == 0 and (ious[d, g] > best_iou or best_low):
                    best, best_iou, best_low = d, ious[d, g], False
                elif role == 1 and best is None:
                    best, best_low = d, True
            if best is None:
                continue
            taken[best] = True
            if not ignored and roles[best] == 0:
                right += 1
                hits.append(detected.scores[best])
        wrong = sum(role == 0 and not t and not o for role, t, o in zip(roles, taken, out))
        return hits, objects, right, wrong

    first = [match(frame, None) for frame in frames]
    scores = sorted((s for hits, *_ in first for s in hits), reverse=True)
    objects, thresholds, recall = sum(one[1] for one in first), [], 0.0
    for i, score in enumerate(scores):
        left = (i + 1) / objects
        right = (i + 2) / objects if i < len(scores) - 1 else left
        if right - recall < recall - left and i < len(scores) - 1:
            continue
        thresholds.append(score)
        recall += 1 / 40
    precision = np.zeros(41)
    for i, threshold in enumerate(thresholds):
        counts = [match(frame, threshold)[2:] for frame in frames]
        right, wrong = np.sum(counts, 0)
        precision[i] = right / (right + wrong)
    return np.array([precision[i:].max() for i in range(41)])


@pytest.mark.parametrize("name", ["Car", "Pedestrian"])
def test_curves_are_those_of_the_protocol_word_by_word(rng, name):
    names, frames = ["Car", "Van", "Pedestrian", "Person_sitting", "Truck"], []
    for _ in range(60):
        n, m = rng.integers(0, 6), rng.integers(0, 4)
        boxes = random_boxes(rng, n, spread=6)
        truth = Labels(
            list(rng.choice(names, n)), boxes, rng.uniform(20, 80, n), rng.integers(0, 4, n), rng.uniform(0, 0.6, n)
        )
        near = np.repeat(boxes, 2, 0) + rng.normal(0, 0.08, (2 * n, 7))
        guesses = np.concatenate([near, random_boxes(rng, m, spread=6)])
        guessed = list(np.repeat(truth.names, 2)) + list(rng.choice(names, m))
        guessed = [g if rng.random() < 0.8 else str(rng.choice(names)) for g in guessed]
        scores = rng.integers(0, 30, len(guesses)) / 30  # with ties
        frames.append(
            kitti.compare_frame(truth, Detections(guessed, guesses, rng.uniform(20, 80, len(guesses)), scores))
        )
    for difficulty in kitti.KITTI_DIFFICULTIES.values():
        for metric in ("3d", "bev"):
            ours = kitti.precision_curve(frames, name, metric, difficulty, 0.5)
            assert np.allclose(ours, devkit_curve(frames, name, metric, difficulty, 0.5), atol=1e-12)
            assert 0 < ours.mean() < 1
    halves = kitti.precision_curve(frames[30:] + frames[:30], name, "3d", difficulty, 0.5)
    assert np.array_equal(halves, kitti.precision_curve(frames, name, "3d", difficulty, 0.5))
