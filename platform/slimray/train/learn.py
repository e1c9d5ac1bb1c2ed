"""How a network learns: optimizer and its groups, schedules, losses, BatchNorm policy, averaged weights, scores.

Plain functions on torch modules, used by every verb that trains or evaluates; nothing here knows Ray or files. The
learning rate is a pure function of the samples seen (linear scaling with gradual warm-up, arXiv 1706.02677), never
scheduler state, so that a resumed or elastic run has the same one. The parameter groups "tsm" are those of the
published TSM runs (arXiv 1811.08383). torch's SGD keeps the rate out of its momentum buffer, so that a changing rate
needs no correction.
"""

import contextlib
import copy
import functools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimray.arch import Arch
from slimray.train.lars import Lars
from slimray.train.spec import OptimSpec

BatchNorm = nn.modules.batchnorm._BatchNorm
# dense bf16 (V100, T4: fp16) tensor FLOP/s of data sheets; other devices are measured by a matrix product
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "V100": 125e12, "T4": 65e12}


# ------------------------------------------------------------------------------------------------ learning rate


def peak_rate(optim: OptimSpec, batch_total: int) -> float:
    """The learning rate after the warm-up at a global batch of `batch_total`."""
    return optim.lr * batch_total / optim.reference_batch


def learning_rate(optim: OptimSpec, batch_total: int, num_samples: int, samples_seen: int) -> float:
    """The rate of the step that begins after `samples_seen` samples of an epoch of `num_samples`."""
    peak, epoch = peak_rate(optim, batch_total), samples_seen / num_samples
    if epoch < optim.warmup_epochs:
        start = min(optim.lr, peak / 10)
        return start + (peak - start) * epoch / optim.warmup_epochs
    if optim.schedule == "step":
        milestones = optim.milestones or (0.4 * optim.epochs, 0.8 * optim.epochs)
        return peak * optim.gamma ** sum(epoch >= milestone for milestone in milestones)
    if optim.schedule == "cosine":
        progress = min(1.0, (epoch - optim.warmup_epochs) / (optim.epochs - optim.warmup_epochs))
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of `optimizer` its multiple of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


# ---------------------------------------------------------------------------------------------------- optimizer


def parameter_groups(net: nn.Module, groups: str) -> list[dict[str, Any]]:
    """The trainable parameters of `net` as groups with `name`, `params`, `lr_mult`, `decay_mult`.

    The head is what lies under `net.head_name`, the first convolution `net.first_conv_name` (x5 and x10 if it does not
    take RGB: optical flow starts from averaged weights).
    """
    norms = {f"{name}." for name, module in net.named_modules() if isinstance(module, BatchNorm)}
    table: dict[str, tuple[float, float, list]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.endswith("bias")
        is_norm = f"{name.rpartition('.')[0]}." in norms
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


def make_optimizer(net: nn.Module, optim: OptimSpec) -> torch.optim.Optimizer:
    """The optimizer over the groups of `optim`; the rate is set before each step (`set_learning_rate`)."""
    groups = parameter_groups(net, optim.groups)
    for group in groups:
        group["weight_decay"] = optim.weight_decay * group["decay_mult"]
    if optim.optimizer == "lars":
        return Lars(groups, lr=optim.lr, momentum=optim.momentum)
    if optim.optimizer != "sgd":
        adam = torch.optim.AdamW if optim.optimizer == "adamw" else torch.optim.Adam
        return adam(groups, lr=optim.lr, betas=(optim.momentum, 0.999))
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of `optimizer` as `<parameter number>.<what>` -> tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{key}": torch.as_tensor(value)
        for number, entries in state.items()
        for key, value in entries.items()
        if value is not None
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take over the state that `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


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


def distill_losses(teacher: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy of each sample of `logits` `[n, C, ...]` against the teacher's answers, mean of the rest.

    The gradient goes to `logits` alone (Hinton et al., arXiv 1503.02531, at temperature 1, as Once-for-All has it).
    """
    given, own = teacher.detach().float().softmax(1), logits.float().log_softmax(1)
    return -(given * own).sum(1).reshape(len(logits), -1).mean(1)


def fit_input(x: Tensor, arch: Arch) -> Tensor:
    """Inputs of the largest size as `arch` takes them: `[n, (T,) 3, H, W]` resized to its resolution, T to its frames.

    Frames are the middle ones of equal parts. Clouds, and dimensions that the arch has not, stay as they are.
    """
    frames, side = arch.get("frames"), arch.get("resolution")
    if frames is not None and frames != x.shape[1]:
        x = x[:, ((torch.arange(frames) + 0.5) * (x.shape[1] / frames)).long().to(x.device)]
    if side is None or x.ndim < 4 or x.shape[-1] == side:
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


# ---------------------------------------------------------------------------------------------------- BatchNorm


def set_norm_policy(net: nn.Module, norm: str) -> None:
    """Prepare the BatchNorm layers of `net`, once: parameters of frozen ones are no longer trained."""
    if norm == "sync":
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in _frozen_norms(net, norm):
        for parameter in module.parameters():
            parameter.requires_grad_(False)


def train_mode(net: nn.Module, norm: str) -> None:
    """`net.train()`, but frozen BatchNorm layers keep their running statistics."""
    net.train()
    for module in _frozen_norms(net, norm):
        module.eval()


def _frozen_norms(net: nn.Module, norm: str) -> list[nn.Module]:
    if norm not in ("partial", "frozen"):
        return []
    norms: list[nn.Module] = [module for module in net.modules() if isinstance(module, BatchNorm)]
    return norms[1:] if norm == "partial" else norms


def norm_state(net: nn.Module) -> Tensor:
    """The running means and variances of all BatchNorm layers as one vector `[K]`, means first layer by layer."""
    parts = [buffer.flatten() for module in _tracking(net) for buffer in (module.running_mean, module.running_var)]
    return torch.cat(parts) if parts else torch.zeros(0)


def load_norm_state(net: nn.Module, vector: Tensor) -> None:
    """Write a vector of `norm_state` back."""
    at = 0
    for module in _tracking(net):
        for buffer in (module.running_mean, module.running_var):
            buffer.copy_(vector[at : at + buffer.numel()].view_as(buffer))
            at += buffer.numel()


def merge_norm_states(states: Tensor, net: nn.Module) -> Tensor:
    """One vector of `norm_state` for several of equal weight, `[world, K]` -> `[K]`: those of the joint distribution.

    The joint variance is the mean of the variances plus the variance of the means.
    """
    if len(states) == 1:
        return states[0].clone()
    out, at = torch.empty_like(states[0]), 0
    for module in _tracking(net):
        size = module.running_mean.numel()
        means, variances = states[:, at : at + size], states[:, at + size : at + 2 * size]
        out[at : at + size] = means.mean(0)
        out[at + size : at + 2 * size] = variances.mean(0) + means.var(0, correction=0)
        at += 2 * size
    return out


def _tracking(net: nn.Module) -> list[Any]:
    return [m for m in net.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]


# ---------------------------------------------------------------------------------------------- averaged weights


class Ema:
    """An exponential moving average of the parameters of a network; buffers are not averaged."""

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in net.named_parameters()}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Move the average towards the parameters of `net`."""
        for name, value in net.named_parameters():
            self.average[name].lerp_(value, 1 - self.decay)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return dict(self.average)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over averages of `tensors`."""
        for name, value in tensors.items():
            self.average[name].copy_(value)

    @torch.no_grad()
    def copy_to(self, net: nn.Module) -> None:
        """Give `net` the averaged parameters."""
        for name, value in net.named_parameters():
            value.copy_(self.average[name])


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


# ------------------------------------------------------------------------------------------------------- speed


def mfu(macs: int, samples_per_s: float, device: torch.device) -> float:
    """Model FLOPs utilisation of one worker, 0-1: 6 x MACs x samples/s (forward and backward) over the peak."""
    return 6 * macs * samples_per_s / peak_flops(device)


def peak_flops(device: torch.device) -> float:
    """Peak FLOP/s of `device`: a GPU's data sheet (PEAK_FLOPS), else the best of a few matrix products of this one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x{torch.get_num_threads()}"
    for part, peak in PEAK_FLOPS.items():
        if part in name:
            return peak
    return _measured_flops(device, name)


@functools.cache
def _measured_flops(device: torch.device, name: str, size: int = 768, rounds: int = 20) -> float:
    """Measured once per process and device as `name` tells it."""
    a = torch.ones(size, size, device=device)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


# ------------------------------------------------------------------------------------------------- re-calibration


@torch.no_grad()
def recalibrate_norms(subnet: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy of `subnet` with the BatchNorm statistics of `batches` (inputs `[n, ...]`); `subnet` stays as it is.

    As in Once-for-All (arXiv 1908.09791): every batch is normalised by its own statistics, and a layer gets the mean
    over the batches, weighted by their samples, of its input's mean and of its biased variance in the batch (not the
    variance of all samples together). Dropout is off. ValueError without batches, or for a supernet: extract first.
    Several workers add up their `norm_sums` instead, for the same result however the batches are dealt out.
    """
    out = copy.deepcopy(subnet)
    load_norm_sums(out, norm_sums(subnet, batches))
    return out


@torch.no_grad()
def norm_sums(net: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """What `recalibrate_norms` learns from `batches`, float64 `[K]`: may be added up over workers (`load_norm_sums`).

    For each BatchNorm in order: samples, the sum over batches of samples x mean, and of samples x variance.
    """
    probe = copy.deepcopy(net).eval()
    norms = _tracking(probe)
    parts = [norm.running_mean.new_zeros(1 + 2 * norm.num_features, dtype=torch.float64) for norm in norms]
    samples = 0

    def collect(part: Tensor, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].transpose(0, 1).flatten(1).float()  # [C, everything else]
        part += samples * torch.cat([part.new_ones(1), x.mean(1), x.var(1, correction=0)])

    for norm, part in zip(norms, parts, strict=True):
        norm.running_mean = norm.running_var = None  # torch normalises by the batch where there are no statistics
        norm.register_forward_pre_hook(functools.partial(collect, part))
    device = next(iter(probe.parameters())).device
    for batch in batches:
        samples = len(batch)
        probe(batch.to(device))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


@torch.no_grad()
def load_norm_sums(net: nn.Module, sums: Tensor) -> None:
    """Give the BatchNorms of `net` in place the statistics that `sums` hold; ValueError if one of them saw no input."""
    at = 0
    for norm in _tracking(net):
        samples, mean, var = sums[at : at + 1 + 2 * norm.num_features].split([1, norm.num_features, norm.num_features])
        if not samples:
            raise ValueError("recalibrate_norms: a BatchNorm saw no input: give batches, and an extracted subnet")
        norm.running_mean.copy_(mean / samples)
        norm.running_var.copy_(var / samples)
        at += 1 + 2 * norm.num_features
