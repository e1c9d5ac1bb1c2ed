"""What a network learns from: the losses of samples, the randomness and the arithmetic of a step, and its scores.

Plain functions on torch tensors, used by every verb that trains or evaluates; nothing here knows Ray or files.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from slimray.arch import Arch, Space

# --------------------------------------------------------------------------------------------------------- loss


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
        x = x[:, ((torch.arange(frames, device=x.device) + 0.5) * (x.shape[1] / frames)).long()]
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


def balanced_weights(labels: Sequence[int] | np.ndarray, num_classes: int) -> tuple[float, ...]:
    """A weight per class inverse to its count in `labels`, mean 1 over the classes that occur; 0 for the others."""
    counts = torch.bincount(torch.as_tensor(labels, dtype=torch.int64), minlength=num_classes).double()
    inverse = torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)
    return tuple((inverse / inverse[counts > 0].mean()).tolist())


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make torch's randomness (dropout) of a step a function of (seed, step, rank)."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % (1 << 63))
