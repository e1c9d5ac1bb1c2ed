"""The step `prune`: structured pruning of whole channels, by a given policy or one found by a search."""

from typing import TYPE_CHECKING, Any

from slimray import runs
from slimray.verbs.compress_specs import PruneStep

if TYPE_CHECKING:
    from torch import nn

    from slimray.verbs.compressing import Work

FASTER = True


def check(step: PruneStep, net: "nn.Module", sample: tuple[int, ...] | None) -> None:
    """Raise UserError for groups and numbers that `net`, on the meta device, does not have, and limits out of reach.

    `sample` is the shape of an input. Without it, and for networks that index points by their values, nothing can be
    checked before the step runs.
    """
    import torch

    from slimray.compress import groups, policies
    from slimray.search import amc

    if sample is None:
        return
    try:
        found = groups.trace(net, torch.empty(2, *sample, device="meta"))
    except (RuntimeError, IndexError):
        return
    if step.channels is not None:
        found.row(step.channels)
    whole, given = found.costs({}), step.limits | step.shares
    limits = {name: given[name] * (whole[name] if name in step.shares else 1) for name in given if name in whole}
    if step.search is not None:
        features = policies.group_features(found, step.round_to)
        amc.GroupWalk([amc.GroupStep(**one) for one in features], found.costs_of, limits, step.search.least)
    elif limits:
        policies.Budget(found, limits).largest(lambda share: policies.uniform(found, share, step.round_to))


def run(step: PruneStep, work: "Work", folder: str, before: runs.Run) -> tuple[runs.Run, dict[str, Any]]:
    """Prune the network of `before`; return the stage, and the policy with the data behind its choice."""
    from slimray.verbs import pruning

    return pruning.prune(step, work, folder, before)
