"""Functions that training steps share: distillation losses, inputs of subnets, class weights, the seed of a step.

Plain functions on torch tensors, used by every verb that trains or evaluates; nothing here knows Ray or files.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from slimray.arch import Arch, Space

# --------------------------------------------------------------------------------------------------------- loss


def distill_losses(teacher: Tensor, logits: Tensor) -> Tensor:
    """Return the cross-entropy `[n]` of `logits` `[n, C, ...]` against the teacher's outputs, averaged over the rest.

    The gradient goes to `logits` alone (Hinton et al., arXiv 1503.02531, at temperature 1, as in Once-for-All).
    """
    given, own = teacher.detach().float().softmax(1), logits.float().log_softmax(1)
    return -(given * own).sum(1).reshape(len(logits), -1).mean(1)


def fit_input(x: Tensor, space: Space, arch: Arch) -> Tensor:
    """Return inputs of the largest size as `arch` of `space` takes them: `[n, (T,) 3, H, W]`, resized, with its frames.

    The frames chosen are the middle ones of equal parts of T. Point clouds stay as they are, and so does an input whose
    size or frames are not dimensions of `arch`.
    """
    frames, side = space.input_of(arch, "frames"), space.input_of(arch, "side")
    if frames is not None and frames != x.shape[1]:
        x = x[:, ((torch.arange(frames, device=x.device) + 0.5) * (x.shape[1] / frames)).long()]
    if side is None or x.shape[-1] == side:
        return x
    flat = nn.functional.interpolate(x.flatten(0, -4), (side, side), mode="bilinear", antialias=True)
    return flat.view(*x.shape[:-2], side, side)


def divergences(target: Tensor, logits: Tensor) -> Tensor:
    """Return KL(softmax(`target`) || softmax(`logits`)) `[n]` of `[n, C, ...]`: summed over classes, mean of the rest.

    Deep Mutual Learning (arXiv 1706.00384) adds this to the loss of each of two networks. The gradient goes to `logits`
    alone: `target` is a constant.
    """
    given, own = target.detach().float().log_softmax(1), logits.float().log_softmax(1)
    return (given.exp() * (given - own)).sum(1).view(len(logits), -1).mean(1)


def balanced_weights(labels: Sequence[int] | np.ndarray, num_classes: int) -> tuple[float, ...]:
    """Return a weight per class, inverse to its count in `labels`: mean 1 over the classes that occur, 0 elsewhere."""
    counts = torch.bincount(torch.as_tensor(labels, dtype=torch.int64), minlength=num_classes).double()
    inverse = torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)
    return tuple((inverse / inverse[counts > 0].mean()).tolist())


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make torch's randomness (dropout) of a step a function of (seed, step, rank)."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % (1 << 63))
