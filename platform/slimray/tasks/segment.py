"""Segmentation of point clouds: a class for each point (S3DIS), scored by the published protocol.

Outputs are logits `[n, C, N]`, targets int64 `[n, N]`, -1 if unknown. Scores are percent, 0-100, merged over ranks by
summing `tensors()`; a point whose logits are not finite has no prediction and counts as wrong. The protocol is that of
PointNet (arXiv 1612.00593) and Point-Voxel CNN (1907.03739).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from slimray.data.modalities import Target, read_recipe
from slimray.runs.examples import CloudView
from slimray.runtime import segment as files
from slimray.tasks.classify import class_losses, class_weights, likeliest
from slimray.tasks.evaluation import Pass, Samples, Setting
from slimray.tasks.network import Network, Outputs, joined, predict_outputs
from slimray.tasks.responses import responses
from slimray.tasks.task import LOSS, LossOptions, Metric, Table, Task, chance_of_classes, class_arguments
from slimray.tasks.votes import SceneVotes


def losses(logits: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    """Return the loss of each cloud `[n]`: the mean cross-entropy over its labelled points, 0 if there is none."""
    return class_losses(logits, labels, options).sum(1) / (labels >= 0).sum(1).clamp(min=1)


def weights(labels: Tensor, options: LossOptions) -> Tensor:
    """Return the weight of each cloud `[n]`: the mean over its labelled points, or 1 without class weights."""
    by_class = class_weights(options, labels.device)
    if by_class is None:
        return torch.ones(len(labels), device=labels.device)
    return torch.where(labels >= 0, by_class[labels.clamp(min=0)], 0.0).sum(1) / (labels >= 0).sum(1).clamp(min=1)


def target(recipe: Mapping[str, Any]) -> Target:
    """Return the target: a label per point; in mode "test", labels and cloud rows of every view, `[2, V, N]`."""
    known = read_recipe(dict(recipe))
    views = (2, known.num_views()) if known.mode == "test" else ()
    return Target((*views, known.num_points))


class SegmentationScore:
    """Counts of labelled points, summed over ranks: `confusion[truth, predicted]`, `missed[truth]`, loss.

    Points whose label is `ignore_label` or negative are ignored. `missed` are the points without a prediction.
    """

    def __init__(self, num_classes: int, ignore_label: int | None = None):
        self.ignore_label = ignore_label
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.missed = torch.zeros(num_classes, dtype=torch.int64)
        self.sums = torch.zeros(2, dtype=torch.float64)  # loss, clouds

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count scores `[n, C, N]` against labels int64 `[n, N]`, on their device."""
        self.add_predictions(likeliest(scores), labels)
        self.sums[0] += loss_sum(scores, labels, self._known(labels))

    def add_predictions(self, predicted: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> None:
        """Count classes `[n, N]`, or `[N]` of one cloud, against labels; -1 means no prediction. Adds no loss."""
        labels = as_rows(labels)
        predicted = as_rows(predicted).to(labels.device)
        known, num_classes = self._known(labels), len(self.missed)
        pairs = labels[known].long() * (num_classes + 1) + predicted[known].long() + 1
        if len(pairs) and int(labels[known].max()) >= num_classes:
            raise ValueError(f"label {int(labels[known].max())}: there are only {num_classes} classes")
        counts = torch.bincount(pairs, minlength=num_classes * (num_classes + 1)).cpu().view(num_classes, -1)
        self.missed += counts[:, 0]
        self.confusion += counts[:, 1:]
        self.sums[1] += known.any(1).sum().cpu()

    def _known(self, labels: Tensor) -> Tensor:
        return labels >= 0 if self.ignore_label is None else (labels >= 0) & (labels != self.ignore_label)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what must be summed over ranks, in place."""
        return self.confusion, self.missed, self.sums

    def result(self, absent: Literal["skip", "one"] = "skip", missed_as_last: bool = False) -> dict[str, Any]:
        """Return overall_acc, mean_class_accuracy, miou (percent), class_iou (list), loss (per point), num_samples
        (clouds).

        With `absent="skip"`, a class without a true point has no accuracy, and if it is not predicted either, no IoU
        (None in the list); "one" is the published meter during training: both are 100 if there is no true point.
        `missed_as_last` is the published evaluation of S3DIS: points without a prediction count as predictions of the
        last class, but never as correct ones.
        """
        own, truth = self.confusion.diagonal(), self.confusion.sum(1) + self.missed
        positive = self.confusion.sum(0)
        if missed_as_last:
            positive[-1] += self.missed.sum()
        recall = percent(own, truth)
        iou = percent(own, truth + positive - own)
        if absent == "one":
            recall[truth == 0], iou[truth == 0] = 100, 100
        total = int(truth.sum())
        return {
            "overall_acc": 100 * int(own.sum()) / max(total, 1),
            "mean_class_accuracy": mean_known(recall),
            "miou": mean_known(iou),
            "class_iou": listed(iou),
            "loss": float(self.sums[0]) / max(total, 1),
            "num_samples": int(self.sums[1]),
        }


def as_rows(values: Tensor | np.ndarray) -> Tensor:
    """Return `[N]` as `[1, N]`, and `[n, N]` unchanged."""
    tensor = torch.as_tensor(values)
    return tensor if tensor.ndim > 1 else tensor[None]


def loss_sum(scores: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Return the cross-entropy of scores `[n, C, N]`, summed over the known labels of `[n, N]`, on the CPU."""
    scores = scores.float()
    own = scores.gather(1, labels.long().where(known, 0)[:, None])[:, 0]
    return (scores.logsumexp(1) - own)[known].double().sum().cpu()


def percent(part: Tensor, whole: Tensor) -> Tensor:
    """Return 100 part / whole in float64, nan where `whole` is 0."""
    return 100 * part.double() / whole.double()


def mean_known(percent: Tensor) -> float:
    """Return the mean of the values that are not nan, 0 if there are none."""
    return float(percent.nanmean().nan_to_num())


def listed(percent: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in percent.tolist()]


def point_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of each cloud's labelled points that are correct, `[n]`."""
    right = (likeliest(logits) == labels) & (labels >= 0)
    return right.sum(1) / (labels >= 0).sum(1).clamp(min=1)


# ------------------------------------------------------------------------------------------------ evaluation


class VotePass(Pass):
    """A pass whose views are votes on the points of scenes, see votes.py."""

    def __init__(self, setting: Setting, score: Any, count: Any):
        super().__init__(setting, score)
        parts = tuple(setting.parts.values())
        self.votes = SceneVotes(setting.paths(), setting.batch, count, parts)

    def take(self, samples: Samples) -> Outputs | None:
        """Vote on the points of samples; return the logits of the first view of each."""
        first = []
        for data, target, number in zip(samples.data, samples.targets, samples.numbers, strict=True):
            real = target[1, :, 0] >= 0  # other views are blank
            logits = _logits(self.setting.network, data[real][:, None], self.setting.rows)
            self.votes.add(int(number), logits, target[:, real])
            first.append(logits[:1])
        return joined(first)

    def settle(self, step: int, world: int) -> None:
        """Count the scenes that are complete. A collective if a scene has several rows."""
        self.votes.settle(step, world, self.setting.network.device)

    def result(self) -> dict[str, Any]:
        """Return the metrics; points without a vote are wrong, or, as published for S3DIS, also of the last class."""
        if self.setting.options.get("missed") == "last_class":
            return self.score.result(missed_as_last=True)  # type: ignore[call-arg]
        return self.score.result()


def _logits(network: Network, data: np.ndarray, rows: int) -> Tensor:
    outputs = predict_outputs(network.net, data, network.pixels, network.device, rows, network.precision)
    assert isinstance(outputs, Tensor)
    return outputs


def start(setting: Setting) -> Pass:
    """Return a pass with one draw of each cloud, or with votes on scenes."""
    score = SegmentationScore(len(setting.network.classes), ignore_label=-1)
    if not setting.options.get("votes"):
        return Pass(setting, score)
    return VotePass(setting, score, lambda predicted, labels, _: score.add_predictions(predicted, labels))


def examples(
    network: Network, views: np.ndarray, outputs: Tensor, targets: np.ndarray, shown: int
) -> Iterable[dict[str, Any]]:
    """Yield clouds with the label and the predicted class of each point; with votes, the first view."""
    for number, (view, logits, labels) in enumerate(zip(views, outputs, targets, strict=True), shown):
        truth = labels[0, 0] if labels.ndim == 3 else labels  # with votes: labels and rows of several views
        chosen = likeliest(logits[None])[0].cpu().numpy()
        explained = responses(network, view, number)
        yield CloudView("", view[:3].T, truth, chosen, network.classes, responses=explained).to_plain()


def class_tables(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[Table]:
    """Return tables of the IoU of each class in rows with `class_iou`, and of each category in rows with
    `category_iou`.

    The weakest, by their mean over the rows, come first. `class_iou` is a list, one value for each of `classes`;
    `category_iou` is a mapping by name; None is unknown.
    """
    note = "Percent of the points with a class as true or predicted label that have both. –: there were none."
    shapes = "Mean over shapes of the mean IoU of their parts, percent. –: there were none."
    judged = {_key(row): dict(zip(classes, row["class_iou"])) for row in rows if row.get("class_iou")}
    categories = {_key(row): row["category_iou"] for row in rows if row.get("category_iou")}
    return [*_ious("IoU per class", "class", judged, note), *_ious("IoU per category", "category", categories, shapes)]


def _ious(title: str, kind: str, judged: Mapping[str, Mapping[str, float | None]], note: str) -> list[Table]:
    """Return a table of row -> name -> IoU, [] without rows."""
    names = list(dict.fromkeys(name for ious in judged.values() for name in ious))
    cells = [(name, *(ious.get(name) for ious in judged.values())) for name in names]
    known = [[value for value in ious if value is not None] for _, *ious in cells]
    order = sorted(range(len(cells)), key=lambda i: float(np.mean(known[i])) if known[i] else math.inf)
    lines = [cells[i] for i in order]
    fold = len(cells) > 40
    return [Table(title, (kind, *judged), lines, note, tuple(judged), fold, chart=True)] if cells else []


def _key(row: Mapping[str, Any]) -> str:
    return " · ".join(str(row[name]) for name in ("run", "variant") if row.get(name))


SEGMENT = Task(
    name="segment",
    metrics=(
        Metric("miou", "mIoU"),
        Metric("overall_acc", "overall accuracy"),
        Metric("mean_class_accuracy", "mean class accuracy"),
        LOSS,
    ),
    target=target,
    arguments=class_arguments,
    losses=losses,
    weights=weights,
    score=lambda num_classes, recipe: SegmentationScore(num_classes, ignore_label=-1),
    start=start,
    examples=examples,
    answer=files.answer,
    options=frozenset({"missed"}),
    tables=class_tables,
    in_tables=frozenset({"class_iou", "category_iou"}),
    chance=chance_of_classes,
    hits=point_hits,
    logits=True,
    writes=True,
)
