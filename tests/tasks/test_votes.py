"""Votes on scenes: the surest answer wins, independent of the number of ranks that saw the windows."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.ranks import run_ranks

from slimray.data.plan import Phase, rank_slice
from slimray.tasks.parts import ShapeScore
from slimray.tasks.segment import SegmentationScore
from slimray.tasks.votes import SceneVotes
from slimray.verbs.evaluate import EvaluateJob

CLASSES, BATCH = 5, 4
PATHS = [f"room{room}#zero-{window:04d}" for room, count in enumerate([3, 1, 6]) for window in range(count)]


def window(sample: int) -> tuple[torch.Tensor, np.ndarray]:
    """Return scores `[2, C, 20]`, labels and rows `[2, 2, 20]` of a window of its room's 60 points."""
    rng = np.random.default_rng(sample)
    room = int(PATHS[sample][4])
    rows = rng.integers(0, 60, (2, 20))
    truth = np.random.default_rng(100 + room).integers(-1, CLASSES, 60)
    return torch.from_numpy(rng.normal(size=(2, CLASSES, 20)) * 3), np.stack([truth[rows], rows])


def counted(rank: int, world: int) -> SegmentationScore:
    score = SegmentationScore(CLASSES, ignore_label=-1)
    votes = SceneVotes(PATHS, BATCH, lambda predicted, labels, _: score.add_predictions(predicted, labels))
    phase = Phase("eval", "eval", 0, len(PATHS), BATCH, False, {})
    for step in range(phase.num_steps):
        for sample in range(*rank_slice(phase, step, rank, world)):
            votes.add(sample, *window(sample))
        votes.settle(step, world, torch.device("cpu"))
        assert len(votes.open) <= 1
    return score


def rank_of_two(rank: int, folder: str) -> None:
    torch.save(list(counted(rank, 2).tensors()), f"{folder}/{rank}.pt")


def test_a_point_gets_the_class_of_its_surest_view():
    wanted = SegmentationScore(CLASSES, ignore_label=-1)
    for room in range(3):
        best, predicted, labels = np.zeros(60), np.full(60, -1), np.full(60, -1)
        for sample in (i for i, path in enumerate(PATHS) if path.startswith(f"room{room}")):
            scores, (truth, rows) = window(sample)
            sure, chosen = scores.float().softmax(1).max(1)
            for row, probability, answer in zip(rows.flat, sure.flatten().tolist(), chosen.flatten().tolist()):
                if probability > best[row]:
                    best[row], predicted[row] = probability, answer
            labels[rows] = truth
        wanted.add_predictions(predicted, labels)
    score = counted(0, 1)
    assert torch.equal(score.confusion, wanted.confusion)
    assert int(score.confusion.sum()) > 60
    assert score.result()["num_samples"] == 3


def test_two_ranks_count_what_one_counts(tmp_path):
    run_ranks(rank_of_two, str(tmp_path))
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    together = [sum(pair) for pair in zip(*parts, strict=True)]
    for mine, alone in zip(together, counted(0, 1).tensors(), strict=True):
        assert torch.allclose(mine.double(), alone.double())


def test_points_that_no_window_votes_on_may_count_as_published():
    job = {"kind": "evaluate", "name": "e", "runs": ["r"], "missed": "last_class"}
    with pytest.raises(ValidationError, match="missed: requires votes"):
        EvaluateJob.model_validate(job)
    assert EvaluateJob.model_validate(job | {"votes": 1}).missed == "last_class"
    score = SegmentationScore(3, ignore_label=-1)
    votes = SceneVotes(["room#0"], 1, lambda predicted, labels, _: score.add_predictions(predicted, labels))
    scores = torch.eye(3)[[0, 1]].T[None] * 9  # two of the room's three points are in the window
    votes.add(0, scores, np.array([[[0, 1]], [[0, 1]]]))
    votes.open["room"].grow(3)
    votes.open["room"].truth[2] = 1
    votes.settle(0, 1, torch.device("cpu"))
    ours, published = score.result(), score.result(missed_as_last=True)
    assert ours["class_iou"] == [100.0, 50.0, None]
    assert published["class_iou"] == [100.0, 50.0, 0.0]


def test_a_shape_is_judged_among_its_own_parts():
    parts = {"a": range(0, 2), "b": range(2, 5)}
    score = ShapeScore(parts)
    votes = SceneVotes(["a.txt", "b.txt"], 2, score.add_predictions, tuple(parts.values()))
    truth = np.array([[2, 3, 4, 2]])
    scores = torch.zeros(1, 5, 4)
    scores[0, 0] = 9  # the surest class does not belong to the second shape
    scores[0, truth[0], range(4)] = 5
    votes.add(1, scores, np.stack([truth, np.arange(4)[None]]))
    votes.settle(0, 1, torch.device("cpu"))
    result = score.result()
    assert result["instance_miou"] == pytest.approx(100)
    assert result["num_samples"] == 1
    assert result["category_iou"] == {"a": None, "b": pytest.approx(100)}
