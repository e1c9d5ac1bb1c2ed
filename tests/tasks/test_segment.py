"""Scores of labelled points equal the recorded ones and results by hand, and do not depend on the split of the work."""

import numpy as np
import pytest
import torch

from slimray.data.points.point_sets import SHAPENET_PARTS
from slimray.tasks import votes
from slimray.tasks.parts import ShapeScore, part_ranges
from slimray.tasks.segment import SegmentationScore
from slimray.tasks.votes import Scene


@pytest.fixture(scope="module")
def recorded(shared):
    return np.load(shared / "parity/pvcnn_conventions.npz", allow_pickle=False)


def summed(a, b):
    """Return `a` after an all-reduce with `b`."""
    for mine, other in zip(a.tensors(), b.tensors(), strict=True):
        mine += other
    return a


# ------------------------------------------------------------------------------------------------ segments


def test_the_meter_of_s3dis_is_the_recorded_one(recorded):
    score = SegmentationScore(13)
    score.add(torch.as_tensor(recorded["s3dis_logits"]), torch.as_tensor(recorded["s3dis_targets"]))
    result = score.result(absent="one")
    assert result["miou"] == pytest.approx(100 * float(recorded["s3dis_iou"]), abs=1e-6)
    assert result["overall_acc"] == pytest.approx(100 * float(recorded["s3dis_overall"]), abs=1e-6)
    assert result["mean_class_accuracy"] == pytest.approx(100 * float(recorded["s3dis_class"]), abs=1e-6)
    assert result["num_samples"] == 4


def test_segments_of_two_ranks_are_those_of_one(recorded):
    scores, labels = torch.as_tensor(recorded["s3dis_logits"]), torch.as_tensor(recorded["s3dis_targets"])
    one, a, b = (SegmentationScore(13) for _ in range(3))
    one.add(scores, labels)
    a.add(scores[:1], labels[:1])
    b.add(scores[1:], labels[1:])
    assert torch.equal(summed(a, b).confusion, one.confusion)
    ours, theirs = a.result(), one.result()
    assert ours.pop("class_iou") == theirs.pop("class_iou")
    assert ours == pytest.approx(theirs)


def test_loss_is_the_cross_entropy_of_the_points_that_count():
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 4, 50), torch.randint(0, 4, (2, 50))
    labels[0, :20], labels[1, :10] = 255, -1
    score = SegmentationScore(4, ignore_label=255)
    score.add(scores, labels)
    expected = torch.nn.functional.cross_entropy(scores, torch.where(labels == 255, -1, labels), ignore_index=-1)
    assert score.result()["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert int(score.confusion.sum()) == 70


def test_segments_by_hand():
    score = SegmentationScore(4)
    score.add_predictions(np.array([0, 0, 1, -1, 2]), np.array([0, 1, 1, 1, 0]))
    result = score.result()
    assert result["overall_acc"] == pytest.approx(40)
    assert result["class_iou"] == pytest.approx([100 / 3, 100 / 3, 0, None])  # class 3 neither occurs nor is predicted
    assert result["miou"] == pytest.approx(200 / 9)
    assert result["mean_class_accuracy"] == pytest.approx((100 / 2 + 100 / 3) / 2)
    assert score.missed.tolist() == [0, 1, 0, 0]


def test_a_score_without_points_is_zero():
    score = SegmentationScore(3)
    score.add(torch.randn(1, 3, 5), torch.full((1, 5), -1))
    assert score.result() == {
        "overall_acc": 0.0,
        "mean_class_accuracy": 0.0,
        "miou": 0.0,
        "class_iou": [None] * 3,
        "loss": 0.0,
        "num_samples": 0,
    }
    assert ShapeScore({"mug": (0, 1)}).result()["instance_miou"] == 0.0


def test_a_label_beyond_the_classes_is_refused():
    with pytest.raises(ValueError, match="label 3: there are only 3 classes"):
        SegmentationScore(3).add(torch.zeros(1, 3, 2), torch.tensor([[0, 3]]))


def test_the_parts_of_shapenet_are_fifty_in_a_row():
    parts = part_ranges(SHAPENET_PARTS)
    assert [label for labels in parts.values() for label in labels] == list(range(50))
    assert (list(parts), parts["Motorbike"]) == (sorted(parts), range(30, 36))


def test_the_meter_of_shapenet_is_the_recorded_one(recorded):
    score = ShapeScore(part_ranges(SHAPENET_PARTS))
    score.add(torch.as_tensor(recorded["shapenet_logits"]), torch.as_tensor(recorded["shapenet_targets"]))
    result = score.result()
    assert result["instance_miou"] == pytest.approx(100 * float(recorded["shapenet_iou"]), abs=1e-6)
    assert result["num_samples"] == 6


def test_shapes_of_two_ranks_are_those_of_one(recorded):
    scores, labels = torch.as_tensor(recorded["shapenet_logits"]), torch.as_tensor(recorded["shapenet_targets"])
    one, a, b = (ShapeScore(part_ranges(SHAPENET_PARTS)) for _ in range(3))
    one.add(scores, labels)
    a.add(scores[:2], labels[:2])
    b.add(scores[2:], labels[2:])
    ours, theirs = summed(a, b).result(), one.result()
    assert ours.pop("category_iou") == pytest.approx(theirs.pop("category_iou"))
    assert ours == pytest.approx(theirs)


def test_instances_and_categories_by_hand():
    score = ShapeScore({"mug": (0, 1), "lamp": (2, 3)})
    score.add_predictions(np.array([0, 0, 0, 0]), np.array([0, 0, 0, 0]), 0)  # no handle, none predicted: 1
    score.add_predictions(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]), 0)  # (2/3 + 1/2) / 2
    score.add_predictions(np.array([3, 3, 2]), np.array([2, 2, -1]), 1)  # 0, and one point without a label
    result = score.result()
    assert result["instance_miou"] == pytest.approx(100 * (1 + 7 / 12 + 0) / 3)
    assert result["category_iou"] == pytest.approx({"mug": 100 * (1 + 7 / 12) / 2, "lamp": 0})
    assert result["category_miou"] == pytest.approx(100 * (1 + 7 / 12) / 4)
    assert result["overall_acc"] == pytest.approx(100 * 7 / 10)


def test_a_shape_is_judged_by_the_best_part_of_its_own_category():
    scores = torch.tensor([[[0.0], [1.0], [9.0], [0.0]]])
    score = ShapeScore({"mug": (0, 1), "lamp": (2, 3)})
    score.add(scores, torch.tensor([[1]]), torch.tensor([0]))
    assert score.result()["overall_acc"] == 100
    assert score.result()["loss"] > 5  # among all parts


def test_a_part_of_another_category_is_refused():
    with pytest.raises(ValueError, match="does not belong to its shape's category"):
        ShapeScore({"mug": (0, 1), "lamp": (2, 3)}).add_predictions(np.array([0]), np.array([2]), 0)
    with pytest.raises(ValueError, match="label 4: there are only 4 parts"):
        ShapeScore({"mug": (0, 1), "lamp": (2, 3)}).add_predictions(np.array([[0], [0]]), np.array([[4], [0]]), [0, 0])


# ------------------------------------------------------------------------------------------------ votes


def test_votes_are_merged_as_recorded_but_where_two_answers_are_equally_sure(recorded):
    truth, scene = recorded["vote_gt"], Scene()
    at = np.take_along_axis(recorded["vote_map"], recorded["vote_shuffled"], 1).ravel()
    sure, chosen = recorded["vote_conf"].ravel(), recorded["vote_pred"].ravel()
    scene.grow(len(truth))
    scene.add(at, sure, chosen, truth[at])
    found, labels = scene.result()
    highest = recorded["vote_scene_conf"]
    lowest = np.full(len(truth), 13)
    np.minimum.at(lowest, at, np.where(sure == highest[at], chosen, 13))
    assert np.array_equal((scene.best >> 16).astype(np.int32).view(np.float32), highest)
    assert np.array_equal(found, np.where(lowest < 13, lowest, -1))
    tied = found != recorded["vote_scene_pred"]  # there the first answer was recorded, which depends on their order
    assert np.flatnonzero(tied).tolist() == [0, 19, 493]
    assert np.array_equal(labels[found >= 0], truth[found >= 0])
    assert (found == -1).sum() == 232


def test_points_without_votes_count_as_the_last_class_on_request(recorded):
    score = SegmentationScore(13)
    score.add_predictions(recorded["vote_scene_pred"], recorded["vote_gt"])
    truth, positive, own = recorded["vote_stats"][..., 0]
    published = score.result(missed_as_last=True)
    assert published["class_iou"] == pytest.approx((100 * own / (truth + positive - own)).tolist())
    assert published["overall_acc"] == pytest.approx(100 * own.sum() / truth.sum())
    plain = score.result()
    assert plain["class_iou"][:12] == published["class_iou"][:12]
    assert plain["class_iou"][12] == pytest.approx(100 * own[12] / (truth[12] + positive[12] - 232 - own[12]))


def test_of_equally_sure_votes_the_lower_class_stays_whatever_their_order():
    rows, sure, chosen = np.array([0, 0, 0, 1]), np.float32([0.5, 0.7, 0.7, np.nan]), np.array([1, 3, 2, 4])
    for order in (slice(None), slice(None, None, -1)):
        found = Scene()
        found.add(rows[order], sure[order], chosen[order], np.array([6, 6, 6, 7])[order])
        assert [one.tolist() for one in found.result()] == [[2, -1], [6, 7]]


def test_confidence_is_that_among_all_classes():
    scores = torch.log(torch.tensor([[[0.1], [0.2], [0.7]]]))
    confidence, predicted = votes.confident(scores)
    assert (confidence.item(), predicted.item()) == (pytest.approx(0.7), 2)
    confidence, predicted = votes.confident(scores, range(2))
    assert (confidence.item(), predicted.item()) == (pytest.approx(0.2), 1)
