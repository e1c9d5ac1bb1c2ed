"""The optimizer and its learning rate: parameter groups, schedules with scaling and warm-up, state for checkpoints.

The learning rate is a pure function of the samples seen (linear scaling with gradual warm-up, arXiv 1706.02677), never
scheduler state, so that a resumed or elastic run has the same rate. The parameter groups "tsm" are those of the
published TSM runs (arXiv 1811.08383). torch's SGD keeps the rate out of its momentum buffer, so that a changing rate
needs no correction.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimray.spec import UserError
from slimray.train.batchnorm import BatchNorm
from slimray.train.lars import Lars
from slimray.train.spec import OptimSpec


def peak_rate(optim: OptimSpec, batch_total: int) -> float:
    """Return the learning rate after the warm-up at a global batch of `batch_total`."""
    if optim.scaling == "sqrt":
        return optim.lr * math.sqrt(batch_total / optim.reference_batch)
    return optim.lr * batch_total / optim.reference_batch


def learning_rate(
    optim: OptimSpec, batch_total: int, num_samples: int, samples_seen: int, step: int = 0, num_steps: int = 1
) -> float:
    """Return the rate of the step that begins after `samples_seen` samples, with `num_samples` in an epoch.

    Schedules in steps go by `step`, the number of steps done, with `num_steps` in an epoch.
    """
    peak, epoch = peak_rate(optim, batch_total), samples_seen / num_samples
    if optim.warmup_steps or optim.steps:
        return _rate_by_steps(optim, peak, step, optim.steps or num_steps * optim.epochs)
    if epoch < optim.warmup_epochs:
        start = min(optim.lr, peak / 10)
        return start + (peak - start) * epoch / optim.warmup_epochs
    if optim.schedule == "step":
        milestones = optim.milestones or (0.4 * optim.epochs, 0.8 * optim.epochs)
        return peak * optim.gamma ** sum(epoch >= milestone for milestone in milestones)
    if optim.schedule == "cosine":
        begin = optim.warmup_epochs if optim.cosine_from == "warmup" else 0.0
        return _cosine(optim, peak, (epoch - begin) / (optim.epochs - begin))
    return peak


def _cosine(optim: OptimSpec, peak: float, progress: float) -> float:
    if optim.min_lr:
        return optim.min_lr + (peak - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _rate_by_steps(optim: OptimSpec, peak: float, step: int, last: int) -> float:
    """Return the rate after `step` of `last` steps, with a warm-up in steps."""
    warmup = optim.warmup_steps
    if warmup and step <= warmup:
        if not optim.warmup_from:
            return peak * max(step, 1) / warmup
        return optim.warmup_from + step * (peak - optim.warmup_from) / warmup
    if optim.schedule == "inverse_sqrt":
        return peak * math.sqrt(warmup / step)
    if optim.schedule == "cosine":
        begin = warmup if optim.cosine_from == "warmup" else 0
        return _cosine(optim, peak, (step - begin) / max(1, last - begin))
    if optim.schedule == "step":
        epochs = optim.epochs or 1  # 0 where the job gives steps: milestones are then shares of them
        milestones = optim.milestones or (0.4 * epochs, 0.8 * epochs)
        return peak * optim.gamma ** sum(step * epochs >= milestone * last for milestone in milestones)
    return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of `optimizer` its multiple of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


# ---------------------------------------------------------------------------------------------------- optimizer


def parameter_groups(net: nn.Module, groups: str) -> list[dict[str, Any]]:
    """Return the trainable parameters of `net` as groups with `name`, `params`, `lr_mult`, `decay_mult`.

    "tsm" finds the head under `net.head_name` and the first convolution under `net.first_conv_name`, whose weights
    learn at x5 if it does not take RGB (optical flow starts from averaged weights). UserError `optim.groups: ...` where
    the network does not name both.
    """
    if groups == "tsm" and not _names_its_ends(net):
        raise UserError(
            "optim.groups: tsm needs a network of clips or images with a head and a first convolution: use "
            "no_norm_decay or plain"
        )
    norms = {f"{name}." for name, module in net.named_modules() if isinstance(module, BatchNorm)}
    table: dict[str, tuple[float, float, list]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.endswith("bias")
        is_norm = f"{name.rpartition('.')[0]}." in norms or name.endswith(".input_range")  # no decay on ranges either
        kind, lr_mult, decay_mult = "all", 1.0, 1.0
        if groups == "no_norm_decay":
            kind, decay_mult = ("no_decay", 0.0) if is_bias or is_norm else ("weight", 1.0)
        elif groups == "tsm":
            kind, lr_mult, decay_mult = _tsm_group(net, name, parameter, is_bias, is_norm)
        table.setdefault(kind, (lr_mult, decay_mult, []))[2].append(parameter)
    return [{"name": k, "params": p, "lr_mult": lr, "decay_mult": decay} for k, (lr, decay, p) in table.items()]


def _tsm_group(net: nn.Module, name: str, value: Tensor, is_bias: bool, is_norm: bool) -> tuple[str, float, float]:
    if is_norm:
        return "norm", 1, 0
    if name.startswith(f"{net.head_name}."):
        return ("head_bias", 10, 0) if is_bias else ("head_weight", 5, 1)
    if name.startswith(f"{net.first_conv_name}."):
        flow = not is_bias and value.shape[1] != 3
        return ("first_conv_bias", 2, 0) if is_bias else ("first_conv_weight", 5 if flow else 1, 1)
    return ("bias", 2, 0) if is_bias else ("weight", 1, 1)


def groups_of(net: nn.Module, optim: OptimSpec) -> str:
    """Return `optim.groups`; by default "tsm" for SGD on a network that names its head and first convolution (those of
    clips and images), else "no_norm_decay"."""
    if optim.groups is not None:
        return optim.groups
    return "tsm" if optim.optimizer == "sgd" and _names_its_ends(net) else "no_norm_decay"


def _names_its_ends(net: nn.Module) -> bool:
    return hasattr(net, "head_name") and hasattr(net, "first_conv_name")


def make_optimizer(
    net: nn.Module, optim: OptimSpec, batch_total: int | None = None, queued: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer over the groups of `optim`; the rate is set before each step (`set_learning_rate`).

    `batch_total` (default `optim.reference_batch`) scales betas and eps with `scaling: sqrt`. With `queued`, its steps
    can be dropped on the device (`skip_unless`). UserError `optim.groups: ...` as in `parameter_groups`.
    """
    groups, fused = parameter_groups(net, groups_of(net, optim)), queued or None  # None: torch chooses
    for group in groups:
        group["weight_decay"] = optim.weight_decay * group["decay_mult"]
    if optim.optimizer == "lars":
        for group in groups:
            group["adapt"] = group["decay_mult"] > 0
        return Lars(groups, lr=optim.lr, momentum=optim.momentum)
    if optim.optimizer != "sgd":
        adam = torch.optim.AdamW if optim.optimizer == "adamw" else torch.optim.Adam
        ratio = (batch_total or optim.reference_batch) / optim.reference_batch if optim.scaling == "sqrt" else 1.0
        first, second = optim.betas or (optim.momentum, 0.999)
        if ratio != 1:
            first, second = (max(0.0, 1 - ratio * (1 - beta)) for beta in (first, second))
        return adam(groups, lr=optim.lr, betas=(first, second), eps=optim.eps / math.sqrt(ratio), fused=fused)
    sgd = torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov, fused=fused)
    if queued:
        _begin_momentum(sgd)
    return sgd


def skip_unless(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Make the next step of a `queued` optimizer change nothing unless `finite`, a flag on the device, is True.

    torch's GradScaler passes `found_inf` to fused optimizers in the same way; `Lars` supports it too.
    """
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Create the momentum buffers of a fused SGD as zeros: torch would use uninitialised memory if it drops step 1."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        for weight in group["params"] if group["momentum"] else ():
            if optimizer.state[weight].get("momentum_buffer") is None:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of `optimizer` as `<parameter number>.<name>` -> tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{key}": torch.as_tensor(value)
        for number, entries in state.items()
        for key, value in entries.items()
        if value is not None
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], queued: bool = False
) -> None:
    """Load the state that `optimizer_tensors` returned, whether that optimizer was `queued` or not."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if queued:
        _begin_momentum(optimizer)
