"""`prune`: structured pruning of any `nn.Module`, which reports the gain before anything is trained.

It traces the groups of the network, makes a policy within the limits, selects channels by a criterion, and cuts a
smaller copy. Nothing is trained. The copy is run before it is returned: its outputs must equal those of the whole
network with the removed channels at zero. Latency is measured, in pairs, because fewer MACs do not always mean fewer
milliseconds; if the gain is not significant, the result says so.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimray.compress import precision
from slimray.compress.channels import cut, masked
from slimray.compress.criteria import Losses, importance, strongest
from slimray.compress.groups import trace
from slimray.compress.policies import Budget, Counts, Meter, choose
from slimray.compress.reconstruction import reconstruct
from slimray.models.modes import called, evaluating
from slimray.runtime.pairs import alternate
from slimray.spec import UserError

PAIRS = 9  # pairs of timings
SLIGHT = 1.05  # ratio of latencies below which there is no gain
EXACT = 1e-3  # largest relative difference of pruned and masked outputs that float32 rounding explains


@dataclass(frozen=True)
class Gain:
    """Latency of the whole network over that of the pruned one: the median over pairs and its interval."""

    ratio: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """True if the pruned network is faster with 95 % confidence."""
        return self.low > 1


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned network: the module, its record, costs before and after, and the gain in latency (None: not timed).

    `before` and `after` have `macs` (per sample), `params` and `size_mb`. `str()` returns a summary for people.
    """

    net: nn.Module
    record: dict[str, Any]
    counts: Counts
    before: dict[str, float]
    after: dict[str, float]
    gain: Gain | None

    def __str__(self) -> str:
        lines = []
        for name in ("macs", "params", "size_mb"):
            before, after = self.before[name], self.after[name]
            lines.append(f"{name}: {before:,.6g} -> {after:,.6g} ({100 * after / before:.1f} %)")
        gain = self.gain
        if gain is not None:
            lines.append(f"latency here, eager: {gain.ratio:.2f} times as fast ({gain.low:.2f} to {gain.high:.2f})")
            if gain.ratio < SLIGHT:
                lines.append("latency does not improve: fewer channels do not make these layers faster here")
            elif not gain.clear:
                lines.append("it is not clear whether latency improves: measure it with nothing else running")
        return "\n".join(lines)


def prune(
    module: nn.Module,
    example: Any,
    *,
    policy: str | Mapping[str, int] = "uniform",
    limits: Mapping[str, float] | None = None,
    shares: Mapping[str, float] | None = None,
    keep: float | None = None,
    criterion: str = "l1",
    round_to: int = 8,
    score: Callable[[nn.Module], float] | None = None,
    losses: Losses | None = None,
    data: Iterable[Any] | None = None,
    meter: Meter | None = None,
    timed: bool = True,
) -> Pruned:
    """Return a smaller copy of `module`; `module` is unchanged, and nothing is trained.

    `example` is an input (a tensor with a batch, or a tuple of arguments). The amount is set by `limits` (at most so
    many `macs` per sample, `params`, `size_mb`; `latency_ms` with a `meter`), by `shares` of the network's costs
    ({"macs": 0.5}), or by `keep`, the share of channels. `policy` distributes it: "uniform"; "ranked", by the criterion
    over all groups; "sensitivity", by curves measured with `score` (of a network, higher is better); or a number of
    channels per group. `criterion` selects the channels (criteria.py); "taylor" needs `losses`.
    With `data`, batches of inputs, the layers that lost inputs are refitted by least squares (reconstruction.py).
    Raises UserError for incompatible options, limits that cannot be reached, or a network that cannot be pruned or has
    half precision, whose rounding would hide a wrong cut.
    """
    floats = ((name.rpartition(".")[0], one) for name, one in module.named_parameters() if one.is_floating_point())
    precision.require("prune", floats, torch.float32, torch.float64)
    groups = trace(module, example)
    if isinstance(policy, str) and (limits is None and shares is None) == (keep is None):
        raise UserError("prune: pass `limits`, `shares` or `keep` to set the amount, such as shares={'macs': 0.5}")
    limits = {**(limits or {}), **_numbers(shares or {}, groups.costs({}))}
    if policy == "ranked" and criterion != "group":
        raise UserError('policy: ranked needs the criterion "group", whose scores are comparable across groups')
    if not isinstance(policy, str):
        groups.row(policy)
    scores = importance(module, groups, criterion, losses)
    if isinstance(policy, str):
        scored = None if score is None else lambda counts: score(cut(module, groups, strongest(scores, counts))[0])
        counts, _ = choose(Budget(groups, limits, meter), policy, scores, round_to, keep, scored)
    else:
        counts = dict(policy)
    kept = strongest(scores, counts)
    small, record = cut(module, groups, kept)
    _verify(module, masked(module, groups, kept), small, example)
    if data is not None:
        reconstruct(module, small, groups, kept, data)
    before, after = (Budget(groups, {}).costs(one) for one in ({}, counts))
    return Pruned(small, record, counts, before, after, compare(module, small, example) if timed else None)


def _numbers(shares: Mapping[str, float], whole: Mapping[str, float]) -> dict[str, float]:
    """Return shares as limits; UserError for costs that must be measured, and shares out of range."""
    for name, share in shares.items():
        if name not in whole:
            raise UserError(
                f"shares: {name}: cannot be counted, only {', '.join(whole)} can: pass `limits` and `meter` instead"
            )
        if not 0 < share <= 1:
            raise UserError(f"shares: {name}: must be above 0 and at most 1 (got {share!r})")
    return {name: share * whole[name] for name, share in shares.items()}


def _outputs(net: nn.Module, example: Any) -> Tensor:
    """Return all outputs of a network in eval mode as one row, with the same random numbers every time."""
    with evaluating(net), torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        out = called(net, example)
    return torch.cat([leaf.detach().double().flatten() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)])


def _verify(whole: nn.Module, zeroed: nn.Module, small: nn.Module, example: Any) -> None:
    """Raise UserError unless the cut network computes the same as the masked one."""
    try:
        got = _outputs(small, example)
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(
            "prune: this network cannot be pruned, because its forward relies on fixed numbers of channels "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from None
    wanted = _outputs(zeroed, example)
    error = float((got - wanted).norm() / wanted.norm().clamp_min(1e-12)) if got.shape == wanted.shape else float("inf")
    if not error <= EXACT:
        raise UserError(
            "prune: this network cannot be pruned, because without the removed channels it computes something else "
            f"than with zeros in their place (relative difference {error:.1e})"
        )


def compare(whole: nn.Module, small: nn.Module, example: Any, pairs: int = PAIRS) -> Gain:
    """Time both networks in eager mode on `example` in alternating pairs; on a GPU with synchronisation."""
    arguments = example if isinstance(example, tuple) else (example,)
    devices = {leaf.device for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.is_cuda}

    def timed(net: nn.Module) -> float:
        start = time.perf_counter()
        net(*arguments)
        for device in devices:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with evaluating(whole, small), torch.no_grad(), torch.random.fork_rng([]):
        for net in (whole, small):
            timed(net)
        found = alternate(lambda: timed(whole), lambda: timed(small), pairs)
    return Gain(found.ratio, *found.interval)
