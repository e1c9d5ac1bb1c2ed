"""A network whose outputs are not finite scores nothing, in every task, and a step on NaN is dropped, not a crash."""

import numpy as np
import pytest
import torch

from slimray import models
from slimray.spec import RunFailed
from slimray.tasks import TASKS
from slimray.tasks.classify import ClassScore, likeliest
from slimray.tasks.frustum_boxes import FrustumScore
from slimray.tasks.network import Input
from slimray.tasks.parts import ShapeScore
from slimray.tasks.segment import SegmentationScore
from slimray.tasks.task import require_finite
from slimray.tasks.votes import SceneVotes
from slimray.train.methods.method import Piece, Setup
from slimray.train.methods.plain import PlainReplica
from slimray.train.spec import OptimSpec

BROKEN = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("value", BROKEN)
def test_broken_logits_are_no_class(value):
    logits = torch.tensor([[value, value, value], [1.0, 3.0, 2.0]])
    assert likeliest(logits).tolist() == [-1, 1]
    masked = torch.tensor([[-torch.inf, 1.0]])  # an impossible class
    assert likeliest(masked).tolist() == [1]


@pytest.mark.parametrize("value", BROKEN)
def test_samples_with_broken_logits_are_wrong_and_counted(value):
    score = ClassScore(3)
    logits = torch.eye(3)[[0, 1, 0]] * 9
    logits[0] = value  # of class 0, which argmax would have returned
    score.add(logits, torch.tensor([0, 1, 0]))
    result = score.result()
    assert result["top1"] == result["top5"] == pytest.approx(200 / 3)
    assert result["mean_class_accuracy"] == pytest.approx(75)
    assert (result["num_samples"], result["num_not_finite"]) == (3, 1)
    assert "num_not_finite" not in ClassScore(3).result()


def test_a_network_that_gives_nothing_finite_fails_with_a_sentence():
    score = ClassScore(3)
    score.add(torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.int64))
    assert score.result()["top1"] == 0
    with pytest.raises(RunFailed, match="net: the network's outputs are not finite for all 4 samples"):
        require_finite(score.result(), "net")


@pytest.mark.parametrize("value", BROKEN)
def test_points_with_broken_logits_are_wrong(value):
    score = SegmentationScore(2)
    logits = torch.tensor([[[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]]])
    logits[0, :, 0] = value
    score.add(logits, torch.tensor([[0, 0, 1, 1]]))
    assert score.result()["overall_acc"] == 75
    assert score.result()["class_iou"] == [50.0, 100.0]


def test_shapes_with_broken_logits_have_no_part():
    score = ShapeScore({"chair": [0, 1], "lamp": [2]})
    logits = torch.full((1, 3, 4), torch.nan)
    score.add(logits, torch.tensor([[0, 0, 1, 1]]))
    assert score.result()["instance_miou"] == 0
    assert score.result()["overall_acc"] == 0


def test_a_broken_vote_is_no_vote_and_outvotes_nobody():
    score = SegmentationScore(2, ignore_label=-1)
    votes = SceneVotes(["a#0", "a#1"], 2, lambda predicted, labels, _: score.add_predictions(predicted, labels))
    rows, truth = np.array([[0, 1]]), np.array([[1, 0]])
    good = torch.tensor([[[0.0, 9.0], [9.0, 0.0]]])
    votes.add(0, good, np.stack([truth, rows]))
    votes.add(1, torch.full_like(good, torch.nan), np.stack([truth, rows]))
    votes.settle(0, 1, torch.device("cpu"))
    assert score.result()["overall_acc"] == 100


def test_boxes_that_are_not_finite_are_not_found_and_masks_not_right():
    net = models.build("frustum_pointnet", num_classes=3, width=0.0625, num_points=16).eval()
    truth = torch.zeros(2, 20 + 11)
    truth[:, 20:27] = torch.tensor([1.0, 2.0, 10.0, 4.0, 1.7, 1.5, 0.6])
    with torch.no_grad():
        outputs = {name: torch.full_like(value, torch.nan) for name, value in net(torch.randn(2, 7, 20)).items()}
    score = FrustumScore()
    score.add(outputs, truth)
    result = score.result()
    assert (result["mask_acc"], result["mean_iou_3d"], result["found_3d"]) == (0, 0, 0)


@pytest.mark.parametrize("name", ["frustum_pointnet", "frustum_pvcnn_complete"])
def test_a_step_on_coordinates_that_are_not_finite_is_dropped(name):
    torch.manual_seed(0)
    net = models.build(name, num_classes=3, width=0.125, num_points=16)
    optim = OptimSpec(lr=0.1, reference_batch=2, epochs=1, groups="plain")
    setup = Setup(optim, Input(), (7, 32), torch.device("cpu"), task=TASKS["frustum_boxes"])
    replica = PlainReplica(net, setup)
    before = {key: value.clone() for key, value in replica.net.state_dict().items()}
    points = np.random.default_rng(0).normal(size=(2, 1, 7, 32)).astype(np.float32)
    points[:, :, 4:] = np.array([1, 0, 0])[:, None]
    points[0, 0, 0, 3] = np.nan
    truth = np.zeros((2, 32 + 11), np.float32)
    truth[:, 32:39] = [1, 2, 10, 4, 1.7, 1.5, 0.6]
    assert not replica.step([Piece(points, truth)], 2, 0.1, (0, 0)).finite
    for key, value in replica.net.state_dict().items():
        assert torch.equal(value, before[key]), key
