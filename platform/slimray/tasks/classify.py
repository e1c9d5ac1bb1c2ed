"""Classification: one class per sample, for samples of any modality.

Outputs are logits `[n, C]`, targets int64 `[n]`, -1 if unknown. Accuracies are in percent, 0-100.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimray.data.modalities import Target, modality_of
from slimray.runtime import classify as files
from slimray.tasks.evaluation import Pass, Setting
from slimray.tasks.network import Network, top_classes
from slimray.tasks.responses import responses
from slimray.tasks.task import LOSS, LossOptions, Metric, Table, Task, chance_of_classes, class_arguments


def class_weights(options: LossOptions, device: torch.device) -> Tensor | None:
    """Return the weight of each class `[C]`, None if all are equal."""
    weights = options.class_weights
    if weights is None or isinstance(weights, str):  # "balanced" is replaced by weights before training starts
        return None
    return _weights_on(tuple(weights), device)


@functools.cache
def _weights_on(weights: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the weights on a device, copied only once, because a copy waits for the GPU; usable with gradients."""
    with torch.inference_mode(False):
        return torch.tensor(weights, dtype=torch.float32, device=device)


def class_losses(logits: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    """Return the cross-entropy at each label, 0 at -1: logits `[n, C, ...]`, labels int64 `[n, ...]`.

    Label smoothing and class weights are those of the options.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(
        logits,
        labels,
        weight=class_weights(options, logits.device),
        label_smoothing=options.label_smoothing,
        reduction="none",
        ignore_index=-1,
    )


def losses(logits: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    """Return the cross-entropy of each sample `[n]`: logits `[n, C]`, labels int64 `[n]`."""
    return class_losses(logits, labels, options)


def weights(labels: Tensor, options: LossOptions) -> Tensor:
    """Return the weight of each sample `[n]`: that of its class, or 1 without class weights."""
    by_class = class_weights(options, labels.device)
    if by_class is None:
        return torch.ones(len(labels), device=labels.device)
    return torch.where(labels >= 0, by_class[labels.clamp(min=0)], 0.0)


def likeliest(scores: Tensor) -> Tensor:
    """Return the class with the largest score of `[n, C, ...]`, int64 `[n, ...]`; -1 if that score is not finite."""
    best, chosen = scores.max(1)
    return torch.where(best.isfinite(), chosen, -1)


class ClassScore:
    """Counts of an evaluation, summed over ranks: `confusion[truth, predicted]`, top-5 hits, loss, and samples whose
    scores are not finite (`missed[truth]`), which count as wrong."""

    def __init__(self, num_classes: int):
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.sums = torch.zeros(2, dtype=torch.float64)  # top-5 hits, loss
        self.missed = torch.zeros(num_classes, dtype=torch.int64)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count scores `[n, C]` against labels int64 `[n]`; samples with label -1 (unknown) are ignored."""
        known = labels >= 0
        scores, labels = scores[known].float().cpu(), labels[known].cpu()
        if not len(labels):
            return
        num_classes, chosen = len(self.confusion), likeliest(scores)
        found = chosen >= 0
        pairs = labels[found] * num_classes + chosen[found]
        self.confusion += torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
        self.missed += torch.bincount(labels[~found], minlength=num_classes)
        best = scores[found].topk(min(5, num_classes), 1).indices
        self.sums[0] += (best == labels[found][:, None]).any(1).sum()
        self.sums[1] += nn.functional.cross_entropy(scores, labels, reduction="sum")

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what must be summed over ranks, in place."""
        return self.confusion, self.sums, self.missed

    def result(self) -> dict[str, float | int]:
        """Return top1, top5, mean_class_accuracy (percent; the last over classes that occur), loss, num_samples.

        num_not_finite is added if the scores of some samples are not finite.
        """
        missed, own = int(self.missed.sum()), self.confusion.diagonal().double()
        total = int(self.confusion.sum()) + missed
        per_class = (self.confusion.sum(1) + self.missed).double()
        seen = per_class > 0
        return {
            "top1": 100 * float(own.sum()) / max(total, 1),
            "top5": 100 * float(self.sums[0]) / max(total, 1),
            "mean_class_accuracy": 100 * float((own[seen] / per_class[seen]).mean()) if total else 0.0,
            "loss": float(self.sums[1]) / max(total, 1),
            "num_samples": total,
        } | ({"num_not_finite": missed} if missed else {})


def start(setting: Setting) -> Pass:
    """Return a pass that scores samples, averaged over views."""
    return Pass(setting, ClassScore(len(setting.network.classes)))


def examples(
    network: Network, views: np.ndarray, outputs: Tensor, targets: np.ndarray, shown: int
) -> Iterable[dict[str, Any]]:
    """Yield samples in the form of their modality, with the true class and the three likeliest classes."""
    draw = modality_of(network.recipe).example
    assert draw is not None
    for number, (view, scores, label) in enumerate(zip(views, outputs, targets, strict=True), shown):
        top = top_classes(scores, network.classes, 3)
        yield draw(view, network.classes[int(label)], top, responses(network, view, number))


def tables(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[Table]:
    """Return a table of top1 with frames in natural and in shuffled order, for runs that were scored on both."""
    top1 = {(row.get("run"), row.get("variant")): row.get("top1") for row in rows}
    names = list(dict.fromkeys(row.get("run") for row in rows))
    pairs = [(name, top1.get((name, "natural")), top1.get((name, "shuffled"))) for name in names]
    cells = [(name, a, b, a - b) for name, a, b in pairs if a is not None and b is not None]
    note = "Points of top1 lost when frames are in random order; near 0, the network does not use motion."
    return [Table("Value of frame order", ("run", "natural", "shuffled", "lost"), cells, note)] if cells else []


CLASSIFY = Task(
    name="classify",
    metrics=(
        Metric("top1", "top-1", share=True),
        Metric("top5", "top-5"),
        Metric("mean_class_accuracy", "mean class accuracy"),
        LOSS,
    ),
    target=lambda recipe: Target(),
    arguments=class_arguments,
    losses=losses,
    weights=weights,
    score=lambda num_classes, recipe: ClassScore(num_classes),
    start=start,
    examples=examples,
    answer=files.answer,
    tables=tables,
    chance=chance_of_classes,
    hits=lambda logits, labels: (likeliest(logits) == labels).float(),
    logits=True,
    index_labels=True,
)
