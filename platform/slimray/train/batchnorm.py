"""The BatchNorm layers of a network: which ones are trained, merging statistics over ranks, and recalibration.

Statistics are kept per rank while training; `norm_state` and `merge_norm_states` merge them into one set.
`recalibrate_norms` replaces them with statistics computed on samples (Once-for-All, arXiv 1908.09791).
"""

import copy
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm


def set_norm_policy(net: nn.Module, norm: str) -> None:
    """Prepare the BatchNorm layers of `net`, once: the parameters of frozen layers are no longer trained."""
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


def guard_lone_values(net: nn.Module, world: int = 1) -> None:
    """Make every BatchNorm layer of `net` use its running statistics, unchanged, whenever a training batch has only one
    value per channel: one value has no variance, and torch raises an error. SyncBatchNorm is exempt if `world` > 1, as
    it gathers the values of all ranks."""
    for module in net.modules():
        if isinstance(module, BatchNorm) and (world == 1 or not isinstance(module, nn.SyncBatchNorm)):
            module.register_forward_pre_hook(_rest_on_a_lone_value)
            module.register_forward_hook(_resume_training, always_call=True)


def _rest_on_a_lone_value(module: Any, args: tuple[Tensor, ...]) -> None:
    x = args[0]
    if module.training and module.running_mean is not None and x.numel() == x.shape[1]:
        module.rests = True
        module.eval()


def _resume_training(module: Any, args: Any, output: Any) -> None:
    if getattr(module, "rests", False):
        module.rests = False
        module.train()


def snapshot(net: nn.Module) -> list[Tensor]:
    """Return copies of all buffers of the BatchNorm layers, `num_batches_tracked` included, as one vector per dtype."""
    return [torch.cat([buffer.reshape(-1) for buffer in buffers]) for buffers in _memory(net)]


def restore(net: nn.Module, taken: list[Tensor], unless: Tensor) -> None:
    """Write back what `snapshot` returned, unless the flag `unless` is True. The flag stays on the device."""
    for buffers, before in zip(_memory(net), taken, strict=True):
        now = torch.cat([buffer.reshape(-1) for buffer in buffers])
        parts = torch.where(unless, now, before).split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [one.view_as(buffer) for one, buffer in zip(parts, buffers, strict=True)])  # type: ignore


def _memory(net: nn.Module) -> list[list[Tensor]]:
    """Return the buffers of the BatchNorm layers, grouped by dtype."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for norm in _tracking(net):
        for buffer in norm.buffers(recurse=False):
            found.setdefault(buffer.dtype, []).append(buffer)
    return list(found.values())


def norm_state(net: nn.Module) -> Tensor:
    """Return the running statistics of all BatchNorm layers as one vector `[K]`: per layer, means, then variances."""
    parts = [buffer.flatten() for module in _tracking(net) for buffer in (module.running_mean, module.running_var)]
    return torch.cat(parts) if parts else torch.zeros(0)


def load_norm_state(net: nn.Module, vector: Tensor) -> None:
    """Load running statistics from a vector in the layout of `norm_state`."""
    at = 0
    for module in _tracking(net):
        for buffer in (module.running_mean, module.running_var):
            buffer.copy_(vector[at : at + buffer.numel()].view_as(buffer))
            at += buffer.numel()


def merge_norm_states(states: Tensor, net: nn.Module) -> Tensor:
    """Merge `norm_state` vectors of equal weight, `[world, K]` -> `[K]`: the statistics of the joint distribution.

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


def layers_at_once(net: nn.Module, most: int) -> Iterator[nn.ModuleList]:
    """Yield the BatchNorm layers of `net` in the order of `norm_state`, in groups that hold at most `most` of its
    numbers, but at least one layer each."""
    group, size = nn.ModuleList(), 0
    for module in _tracking(net):
        numbers = 2 * module.running_mean.numel()
        if len(group) and size + numbers > most:
            yield group
            group, size = nn.ModuleList(), 0
        group.append(module)
        size += numbers
    if len(group):
        yield group


def _tracking(net: nn.Module) -> list[Any]:
    return [m for m in net.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]


# -------------------------------------------------------------------------------------------------- recalibration


@torch.no_grad()
def recalibrate_norms(subnet: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Return a copy of `subnet` with the BatchNorm statistics of `batches` (inputs `[n, ...]`).

    As in Once-for-All (arXiv 1908.09791): every batch is normalised by its own statistics, and a layer gets the mean
    over the batches, weighted by their sample counts, of its input's mean and of its biased variance in the batch (not
    the variance of all samples together). Dropout is off. ValueError without batches, or for a supernet: extract a
    subnet first. Several workers sum their `norm_sums` instead; the result does not depend on how batches are split.
    """
    out = copy.deepcopy(subnet)
    load_norm_sums(out, norm_sums(subnet, batches))
    return out


@torch.no_grad()
def norm_sums(net: nn.Module, batches: Iterable[Tensor], pooled: bool = False) -> Tensor:
    """Return the sums from which `recalibrate_norms` computes statistics, float64 `[K]`. They may be added up over
    workers before `load_norm_sums`.

    For each BatchNorm in order: samples, the sum over batches of samples x mean, and of samples x variance. With
    `pooled`, mean squares take the place of variances and give the variance of all samples together (precise BatchNorm,
    arXiv 2105.07576).
    """
    probe = copy.deepcopy(net).eval()
    norms = _tracking(probe)
    parts = [norm.running_mean.new_zeros(1 + 2 * norm.num_features, dtype=torch.float64) for norm in norms]
    samples = 0

    def collect(part: Tensor, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].transpose(0, 1).flatten(1).float()  # [C, everything else]
        second = x.square().mean(1) if pooled else x.var(1, correction=0)
        part += samples * torch.cat([part.new_ones(1), x.mean(1), second])

    for norm, part in zip(norms, parts, strict=True):
        norm.running_mean = norm.running_var = None  # without statistics, torch normalises by the batch
        norm.register_forward_pre_hook(functools.partial(collect, part))
    device = next(iter(probe.parameters())).device
    for batch in batches:
        samples = len(batch)
        probe(batch.to(device))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


@torch.no_grad()
def load_norm_sums(net: nn.Module, sums: Tensor, pooled: bool = False) -> None:
    """Set the BatchNorm statistics of `net` in place from `sums`, which `norm_sums` returned.

    ValueError if a BatchNorm layer saw no input.
    """
    at = 0
    for norm in _tracking(net):
        samples, mean, var = sums[at : at + 1 + 2 * norm.num_features].split([1, norm.num_features, norm.num_features])
        if not samples:
            raise ValueError("recalibrate_norms: a BatchNorm saw no input: give batches, and an extracted subnet")
        mean, var = mean / samples, var / samples
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((var - mean.square()).clamp(min=0) if pooled else var)
        at += 1 + 2 * norm.num_features
