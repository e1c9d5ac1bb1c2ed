"""Segmentation of clouds of points: a class for each point (S3DIS), and how good the predictions are, as published.

Outputs are logits `[n, C, N]`, targets int64 `[n, N]`, -1 unknown. Scores are percent, 0-100, merged over ranks by
summing `tensors()`; a point whose logits are not finite has no prediction, which is wrong. The protocol is that of
PointNet (arXiv 1612.00593) and Point-Voxel CNN (1907.03739).
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from slimray import storage
from slimray.data.modalities import Target, read_recipe
from slimray.data.own_files import Readers, check_cloud_options, read_own_cloud
from slimray.data.points.clouds import Cloud
from slimray.data.points.recipe import PointSample
from slimray.runs.examples import CloudView
from slimray.tasks.answers import Answer, Answerer, AnswerOptions, require_apart
from slimray.tasks.classify import class_losses, class_weights, likeliest
from slimray.tasks.evaluation import Pass, Samples, Setting
from slimray.tasks.network import Network, Outputs, joined, predict_outputs
from slimray.tasks.responses import responses
from slimray.tasks.task import LOSS, LossOptions, Metric, Table, Task, chance_of_classes, class_arguments
from slimray.tasks.votes import SceneVotes

PALETTE = (  # of Okabe and Ito, safe for the colour-blind, grey in place of black; further classes get darker shades
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (153, 153, 153),
)  # fmt: skip
LABELS = "labels of its points"


def losses(logits: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    """Return the loss of each cloud `[n]`: the mean cross-entropy over its labelled points, 0 if there is none."""
    return class_losses(logits, labels, options).sum(1) / (labels >= 0).sum(1).clamp(min=1)


def weights(labels: Tensor, options: LossOptions) -> Tensor:
    """Return the weight of each cloud `[n]`: the mean over its labelled points, 1 without class weights."""
    by_class = class_weights(options, labels.device)
    if by_class is None:
        return torch.ones(len(labels), device=labels.device)
    return torch.where(labels >= 0, by_class[labels.clamp(min=0)], 0.0).sum(1) / (labels >= 0).sum(1).clamp(min=1)


def target(recipe: Mapping[str, Any]) -> Target:
    """A label per point; in mode "test" the labels and the rows of the cloud of every view `[2, V, N]`."""
    known = read_recipe(dict(recipe))
    views = (2, known.num_views()) if known.mode == "test" else ()
    return Target((*views, known.num_points))


class SegmentationScore:
    """Counts of labelled points, to be summed over ranks: `confusion[truth, predicted]`, `missed[truth]`, loss.

    Points whose label is `ignore_label` or negative are left out. `missed` are those that never got a prediction.
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
        """Count classes `[n, N]`, or `[N]` of one cloud, against labels; -1 is no prediction. Adds no loss."""
        labels = as_rows(labels)
        predicted = as_rows(predicted).to(labels.device)
        known, num_classes = self._known(labels), len(self.missed)
        pairs = labels[known].long() * (num_classes + 1) + predicted[known].long() + 1
        if len(pairs) and int(labels[known].max()) >= num_classes:
            raise ValueError(f"label {int(labels[known].max())}: there are {num_classes} classes")
        counts = torch.bincount(pairs, minlength=num_classes * (num_classes + 1)).cpu().view(num_classes, -1)
        self.missed += counts[:, 0]
        self.confusion += counts[:, 1:]
        self.sums[1] += known.any(1).sum().cpu()

    def _known(self, labels: Tensor) -> Tensor:
        return labels >= 0 if self.ignore_label is None else (labels >= 0) & (labels != self.ignore_label)

    def tensors(self) -> tuple[Tensor, ...]:
        """What must be summed over ranks, in place."""
        return self.confusion, self.missed, self.sums

    def result(self, absent: Literal["skip", "one"] = "skip", missed_as_last: bool = False) -> dict[str, Any]:
        """overall_acc, mean_class_accuracy, miou (percent), class_iou (a list), loss (per point), num_samples (clouds).

        With `absent="skip"` a class without a true point has no accuracy, and one that is not predicted either has no
        IoU (None in the list); "one" is the published meter during training: 1 for both if there is no true point.
        `missed_as_last` is the published evaluation of S3DIS: points without prediction count as predicted to be of
        the last class, though never rightly.
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
    """`[N]` as `[1, N]`; `[n, N]` as it is."""
    tensor = torch.as_tensor(values)
    return tensor if tensor.ndim > 1 else tensor[None]


def loss_sum(scores: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """The cross-entropy of scores `[n, C, N]`, summed over the known of labels `[n, N]`, on the CPU."""
    scores = scores.float()
    own = scores.gather(1, labels.long().where(known, 0)[:, None])[:, 0]
    return (scores.logsumexp(1) - own)[known].double().sum().cpu()


def percent(part: Tensor, whole: Tensor) -> Tensor:
    """100 part / whole in float64, nan where `whole` is 0."""
    return 100 * part.double() / whole.double()


def mean_known(percent: Tensor) -> float:
    """The mean of what is not nan, 0 if that is nothing."""
    return float(percent.nanmean().nan_to_num())


def listed(percent: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in percent.tolist()]


def point_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of each cloud's labelled points that are right `[n]`."""
    right = (likeliest(logits) == labels) & (labels >= 0)
    return right.sum(1) / (labels >= 0).sum(1).clamp(min=1)


# ------------------------------------------------------------------------------------------------ evaluation


class VotePass(Pass):
    """A pass whose views are votes on the points of scenes: see votes.py."""

    def __init__(self, setting: Setting, score: Any, count: Any):
        super().__init__(setting, score)
        parts = tuple(setting.parts.values())
        self.votes = SceneVotes(setting.paths, setting.batch, count, parts)

    def take(self, samples: Samples) -> Outputs | None:
        """Vote on the points of samples; returns the logits of the first view of each."""
        first = []
        for data, target, number in zip(samples.data, samples.targets, samples.numbers, strict=True):
            real = target[1, :, 0] >= 0  # the others are blank views
            logits = _logits(self.setting.network, data[real][:, None], self.setting.rows)
            self.votes.add(int(number), logits, target[:, real])
            first.append(logits[:1])
        return joined(first)

    def settle(self, step: int, world: int) -> None:
        """Count the scenes that are over. A collective where a scene has several rows."""
        self.votes.settle(step, world, self.setting.network.device)

    def result(self) -> dict[str, Any]:
        """Return the metrics; points without a vote are wrong, or as published for S3DIS of the last class too."""
        if self.setting.options.get("missed") == "last_class":
            return self.score.result(missed_as_last=True)  # type: ignore[call-arg]
        return self.score.result()


def start(setting: Setting) -> Pass:
    """A pass of one draw of each cloud, or of votes on scenes."""
    score = SegmentationScore(len(setting.network.classes), ignore_label=-1)
    if not setting.options.get("votes"):
        return Pass(setting, score)
    return VotePass(setting, score, lambda predicted, labels, _: score.add_predictions(predicted, labels))


def examples(
    network: Network, views: np.ndarray, outputs: Tensor, targets: np.ndarray, shown: int
) -> Iterable[dict[str, Any]]:
    """Yield clouds with the label and the class of each point; of votes the first view."""
    for number, (view, logits, labels) in enumerate(zip(views, outputs, targets, strict=True), shown):
        truth = labels[0, 0] if labels.ndim == 3 else labels  # of votes: labels and rows of several views
        chosen = likeliest(logits[None])[0].cpu().numpy()
        explained = responses(network, view, number)
        yield CloudView("", view[:3].T, truth, chosen, network.classes, responses=explained).to_plain()


def class_tables(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[Table]:
    """Return the IoU of each class in the rows with `class_iou`, and of each category in those of `category_iou`.

    The weakest, by their mean over the rows, are first. `class_iou` is a list, one for each of `classes`;
    `category_iou` has names; None is unknown.
    """
    note = "Percent of the points that are of a class or were taken for it which are both. –: there were none."
    shapes = "Mean over shapes of the mean IoU of their parts, percent. –: there were none."
    judged = {_key(row): dict(zip(classes, row["class_iou"])) for row in rows if row.get("class_iou")}
    categories = {_key(row): row["category_iou"] for row in rows if row.get("category_iou")}
    return [*_ious("IoU per class", "class", judged, note), *_ious("IoU per category", "category", categories, shapes)]


def _ious(title: str, kind: str, judged: Mapping[str, Mapping[str, float | None]], note: str) -> list[Table]:
    """A table out of row -> name -> IoU, [] without rows."""
    names = list(dict.fromkeys(name for ious in judged.values() for name in ious))
    cells = [(name, *(ious.get(name) for ious in judged.values())) for name in names]
    known = [[value for value in ious if value is not None] for _, *ious in cells]
    order = sorted(range(len(cells)), key=lambda i: float(np.mean(known[i])) if known[i] else math.inf)
    lines = [cells[i] for i in order]
    fold = len(cells) > 40
    return [Table(title, (kind, *judged), lines, note, tuple(judged), fold, chart=True)] if cells else []


def _key(row: Mapping[str, Any]) -> str:
    return " · ".join(str(row[name]) for name in ("run", "variant") if row.get(name))


# ------------------------------------------------------------------------------------------------ labels of points


def answer(network: Network, options: AnswerOptions) -> Answerer:
    """The labels of a file's points, written beside it or into `out`, and the shares of the classes."""
    recipe = read_recipe(network.recipe | {"mode": "val"})
    check_cloud_options(recipe, options.file)
    require_apart(options.paths, lambda path: label_files(path, options.out), "labels")
    recipe = replace(recipe, mode="test", votes=1, max_points=0)  # views that hold every point

    def one(path: Path, readers: Readers) -> Answer:
        cloud, sample, notes = read_own_cloud(str(path), path.read_bytes(), recipe, options.file, readers)
        scores = score_points(network, sample, len(cloud), options.rows)
        found = _write_labels(cloud, scores, network.classes, options.top, path, label_files(path, options.out))
        return replace(found, notes=notes)

    return one


def _logits(network: Network, data: np.ndarray, rows: int) -> Tensor:
    outputs = predict_outputs(network.net, data, network.pixels, network.device, rows)
    assert isinstance(outputs, Tensor)
    return outputs


def label_files(path: Path, out: Path | None = None) -> tuple[Path, Path]:
    """Where the labels of the points of `path` go: NAME.labels.npz and NAME.labels.ply, beside it or in `out`."""
    stem = (path.parent if out is None else out) / path.stem
    return Path(f"{stem}.labels.npz"), Path(f"{stem}.labels.ply")


def score_points(network: Network, sample: PointSample, num_points: int, rows: int) -> Tensor:
    """Scores `[num_points, C]` on the CPU of a cloud whose views hold every point: a point's logits are averaged."""
    total = torch.zeros(num_points, len(network.classes))
    for i in range(0, len(sample.points), rows):
        scores = _logits(network, sample.points[i : i + rows, None], rows)
        places = torch.from_numpy(sample.indices[i : i + rows].reshape(-1))
        total.index_add_(0, places, scores.movedim(1, 2).flatten(0, 1).float().cpu())  # [v, C, N] -> [v*N, C]
    seen = torch.from_numpy(np.bincount(sample.indices.reshape(-1), minlength=num_points))
    return total / seen[:, None]


def class_colors(num_classes: int) -> np.ndarray:
    """A colour for each class, uint8 `[num_classes, 3]`, the same whatever their number."""
    number = np.arange(num_classes)
    return (np.array(PALETTE)[number % len(PALETTE)] * 0.6 ** (number // len(PALETTE))[:, None]).astype(np.uint8)


def _write_labels(
    cloud: Cloud, scores: Tensor, classes: Sequence[str], k: int, path: Path, targets: tuple[Path, Path]
) -> Answer:
    """Write the labels of a cloud as .npz for programs and .ply for viewers, in the coordinates of its file."""
    import plyfile

    best, places = torch.softmax(scores, 1).max(1)
    labels, coords = places.numpy(), cloud.coords + cloud.origin  # float64
    rows = np.arange(len(cloud)) if cloud.rows is None else cloud.rows
    arrays = io.BytesIO()
    np.savez_compressed(
        arrays, coords=coords, labels=labels, confidence=best.numpy(), rows=rows, classes=np.array(classes)
    )
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
    answer=answer,
    options=frozenset({"missed"}),
    tables=class_tables,
    in_tables=frozenset({"class_iou", "category_iou"}),
    chance=chance_of_classes,
    hits=point_hits,
    logits=True,
    writes=True,
)
