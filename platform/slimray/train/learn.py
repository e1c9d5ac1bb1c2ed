"""What a network learns from: the losses of samples, the randomness and the arithmetic of a step, and its scores.

Plain functions on torch tensors, used by every verb that trains or evaluates; nothing here knows Ray or files.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from slimray.arch import Arch, Space
from slimray.train.spec import OptimSpec

# --------------------------------------------------------------------------------------------------------- loss


def sample_losses(logits: Tensor, labels: Tensor, optim: OptimSpec) -> Tensor:
    """Cross-entropy of each sample, `[n]`: logits `[n, C]`, labels int64 `[n]`; smoothed and weighted as told.

    With logits `[n, C, N]` and labels `[n, N]` the mean over a sample's points; points with label -1 do not count.
    """
    weights = optim.class_weights
    weight = None
    if weights is not None and weights != "balanced":
        weight = torch.tensor(weights, dtype=torch.float32, device=logits.device)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = nn.functional.cross_entropy(
        logits, labels, weight=weight, label_smoothing=optim.label_smoothing, reduction="none", ignore_index=-1
    )
    return losses if losses.ndim == 1 else losses.sum(1) / (labels >= 0).sum(1).clamp(min=1)


def sample_weights(labels: Tensor, optim: OptimSpec) -> Tensor:
    """Return the weight of each sample in `sample_losses`, `[n]`: that of its class, the mean over its labelled points
    where labels are `[n, N]`; 1 without class weights."""
    weights = optim.class_weights
    if weights is None or weights == "balanced" or labels.is_floating_point():  # boxes: no classes to weigh
        return torch.ones(len(labels), device=labels.device)
    known = labels >= 0
    each = torch.tensor(weights, dtype=torch.float32, device=labels.device)[labels.clamp(min=0)] * known
    return each if each.ndim == 1 else each.sum(1) / known.sum(1).clamp(min=1)


def distill_losses(teacher: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy of each sample of `logits` `[n, C, ...]` against the teacher's answers, mean of the rest.

    The gradient goes to `logits` alone (Hinton et al., arXiv 1503.02531, at temperature 1, as Once-for-All has it).
    """
    given, own = teacher.detach().float().softmax(1), logits.float().log_softmax(1)
    return -(given * own).sum(1).reshape(len(logits), -1).mean(1)


def fit_input(x: Tensor, space: Space, arch: Arch) -> Tensor:
    """Inputs of the largest size as `arch` of `space` takes them: `[n, (T,) 3, H, W]` resized, T cut to its frames.

    Frames are the middle ones of equal parts. Clouds, and dimensions that the arch has not, stay as they are.
    """
    frames, side = space.input_of(arch, "frames"), space.input_of(arch, "side")
    if frames is not None and frames != x.shape[1]:
        x = x[:, ((torch.arange(frames) + 0.5) * (x.shape[1] / frames)).long().to(x.device)]
    if side is None or x.shape[-1] == side:
        return x
    flat = nn.functional.interpolate(x.flatten(0, -4), (side, side), mode="bilinear", antialias=True)
    return flat.view(*x.shape[:-2], side, side)


def divergences(target: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(`target`) || softmax(`logits`)) of each sample of `[n, C, ...]`: over the classes, mean of the rest.

    What Deep Mutual Learning (arXiv 1706.00384) adds to the loss of each of two networks. The gradient goes to `logits`
    alone: `target` counts as given.
    """
    given, own = target.detach().float().log_softmax(1), logits.float().log_softmax(1)
    return (given.exp() * (given - own)).sum(1).view(len(logits), -1).mean(1)


def balanced_weights(labels: Sequence[int], num_classes: int) -> tuple[float, ...]:
    """A weight per class inverse to its count in `labels`, mean 1 over the classes that occur; 0 for the others."""
    counts = torch.bincount(torch.as_tensor(labels, dtype=torch.int64), minlength=num_classes).double()
    inverse = torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)
    return tuple((inverse / inverse[counts > 0].mean()).tolist())


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make torch's randomness (dropout) of a step a function of (seed, step, rank)."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % (1 << 63))


@contextlib.contextmanager
def autocast(device: torch.device) -> Iterator[None]:
    """bf16 autocast on a GPU that has it; elsewhere nothing changes."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        with torch.autocast("cuda", torch.bfloat16):
            yield
    else:
        yield


# ------------------------------------------------------------------------------------------------------- scores


def merge_views(logits: Tensor, num_views: int, average: str) -> Tensor:
    """Scores `[n, C, ...]` from logits `[n*V, C, ...]` of V views: their mean, or the log of mean probabilities."""
    views = logits.view(-1, num_views, *logits.shape[1:])
    if average == "prob":
        return torch.logsumexp(torch.log_softmax(views, 2), 1) - math.log(num_views)
    return views.mean(1)


class Score:
    """Counts of an evaluation, to be summed over ranks: `confusion[truth, predicted]`, top-5 hits, loss."""

    def __init__(self, num_classes: int):
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.sums = torch.zeros(2, dtype=torch.float64)  # top-5 hits, loss

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count scores `[n, C]` against labels int64 `[n]`; samples with label -1 (unknown) are left out."""
        known = labels >= 0
        scores, labels = scores[known].float().cpu(), labels[known].cpu()
        if not len(labels):
            return
        num_classes = len(self.confusion)
        pairs = labels * num_classes + scores.argmax(1)
        self.confusion += torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
        best = scores.topk(min(5, num_classes), 1).indices
        self.sums[0] += (best == labels[:, None]).any(1).sum()
        self.sums[1] += nn.functional.cross_entropy(scores, labels, reduction="sum")

    def tensors(self) -> tuple[Tensor, Tensor]:
        """What must be summed over ranks, in place."""
        return self.confusion, self.sums

    def result(self) -> dict[str, float | int]:
        """top1, top5, mean_class_accuracy (percent; the latter over classes that occur), loss, num_samples."""
        total, own = int(self.confusion.sum()), self.confusion.diagonal().double()
        per_class = self.confusion.sum(1).double()
        seen = per_class > 0
        return {
            "top1": 100 * float(own.sum()) / max(total, 1),
            "top5": 100 * float(self.sums[0]) / max(total, 1),
            "mean_class_accuracy": 100 * float((own[seen] / per_class[seen]).mean()) if total else 0.0,
            "loss": float(self.sums[1]) / max(total, 1),
            "num_samples": total,
        }
