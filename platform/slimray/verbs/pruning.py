"""Implementation of the step `prune`: choose a policy or search for one, then cut, fit and recalibrate the network.

A trial of a search (agent_trials.py) cuts the network by its policy, recalibrates BatchNorm and scores the result; the
step itself does the same with the final policy.
"""

import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from slimray import runs
from slimray.compress import channels, criteria, latency, policies, reconstruction
from slimray.compress.groups import Groups, trace
from slimray.data.modalities import input_shape
from slimray.edge import comparing
from slimray.search import amc, ddpg
from slimray.search.agents import Climb, Learner, SearchSettings, Trial, best
from slimray.spec import UserError
from slimray.tasks import TASKS
from slimray.tasks.network import load_network, to_input
from slimray.train import batchnorm
from slimray.train.spec import OptimSpec
from slimray.verbs import agent_trials, subnets, trials
from slimray.verbs.compress_specs import ClimbSpec, TimingSpec
from slimray.verbs.compressing import Work, read_network, write_network

RETIMED = 10  # most policies of a search to time until one keeps the limit
ANY_TIMING = TimingSpec.model_validate({})
PLAIN_LOSS = {"lr": 1.0, "reference_batch": 1, "epochs": 1}  # no label smoothing, equal class weights


class Cutter:
    """The network of a run with its groups: cuts it by policies, fits the result to training samples, and scores it."""

    def __init__(self, uri: str, exhibits: Any, spec: Any, step: Any, device: str = "cpu"):
        self.judge, self.step = subnets.Judge(uri, exhibits, spec, device), step
        self.net = load_network(runs.run_at(uri)).net
        self.groups = groups_of(self.net, self.judge.network.recipe)
        self.scores = criteria.importance(self.net, self.groups, step.criterion, self._losses)

    def cut(self, counts: Mapping[str, int]) -> tuple[nn.Module, dict[str, Any]]:
        """Return the network of a policy, recalibrated, in eval mode on the judge's device, and its record."""
        kept = criteria.strongest(self.scores, counts)
        small, record = channels.cut(self.net, self.groups, kept)
        pixels, cpu = self.judge.network.pixels, torch.device("cpu")
        if self.step.reconstruct:
            batches = (to_input(part.numpy(), pixels, cpu) for part in self.judge.inputs)
            reconstruction.reconstruct(self.net, small, self.groups, kept, batches)
        small = small.to(self.judge.device)
        if any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in small.modules()):
            batches = (to_input(part.numpy(), pixels, self.judge.device) for part in self.judge.inputs)
            small = batchnorm.recalibrate_norms(small, batches)
        return small.eval(), record

    def _losses(self, net: nn.Module) -> Iterator[torch.Tensor]:
        """Yield the mean loss of `net`, on the CPU, on each batch of the calibration samples."""
        task, options = TASKS[self.judge.network.task], OptimSpec.model_validate(PLAIN_LOSS)
        for data, labels in self.judge.labelled():
            x = to_input(data, self.judge.network.pixels, torch.device("cpu"))
            targets = torch.from_numpy(labels)
            yield task.losses(net(x), targets, options).sum() / task.weights(targets, options).sum()

    def latency_ms(self, counts: Mapping[str, int], timing: TimingSpec, whole_ms: float | None = None) -> float:
        """Return the latency of a policy in ms, measured in turn with the whole network, whose latency is `whole_ms`.

        It is derived from the ratio of the two, so that policies are comparable although the machine's speed varies.
        """
        shape = input_shape(self.judge.network.recipe)
        x = torch.rand(timing.batch, *shape, generator=torch.Generator().manual_seed(0))
        small = channels.cut(self.net, self.groups, criteria.strongest(self.scores, counts))[0]
        found = comparing.compare(self.net, small, x, timing.hardware, timing.threads, timing.pairs)
        return (found["first_ms"] if whole_ms is None else whole_ms) / found["ratio"]

    def score(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Return the metrics of a policy on the samples to score."""
        return self.judge.metrics_of(self.cut(counts)[0])


def groups_of(net: nn.Module, recipe: Mapping[str, Any]) -> Groups:
    """Return the groups of a network on the CPU, found with random input."""
    generator = torch.Generator().manual_seed(0)
    return trace(net, torch.rand(2, *input_shape(dict(recipe)), generator=generator))


def prune(step: Any, work: Work, folder: str, before: runs.Run) -> tuple[runs.Run, dict[str, Any]]:
    """Prune the network of `before`; return the stage, and the policy with the data behind its choice."""

    def make(stage: runs.Run) -> None:
        net, model, taken = read_network(before)
        groups = groups_of(net, taken["recipe"])
        limits = limits_of(step, groups.costs({}))
        recipe, job = taken["recipe"], work.job
        source = work.data.tables[work.spec.train]
        count = min(job.judge.calibrate, source.num_samples)
        calibrate = subnets.decode(
            source, recipe | {"mode": "train"}, count, job.seed, True, work.spec.decode_timeout_s
        )
        chosen: dict[str, Any]
        if step.search is not None:
            exhibits = subnets.Exhibits(calibrate, work.judged)
            chosen = _searched(step, work, stage, before, groups, limits, exhibits)
        elif step.channels is not None:
            groups.row(step.channels)
            chosen = {"counts": dict(step.channels)}
        else:
            exhibits = subnets.Exhibits(calibrate, work.judged if step.policy == "sensitivity" else ())
            chosen = work.on_worker(_given, before.uri, exhibits, job.judge, step, job.timing or ANY_TIMING)
        done = work.on_worker(_final, before.uri, subnets.Exhibits(calibrate, ()), job.judge, step, chosen["counts"])
        small, record = done
        costs = groups.costs(chosen["counts"]) | chosen.pop("measured", {})
        told = {"limits": limits} | chosen | {"sizes": groups.sizes, "costs": costs}
        runs.write_file(stage, "data/policy.json", json.dumps(told).encode())
        write_network(stage, small, model, taken, record)

    stage = work.write(folder, step.model_dump(mode="json"), make)
    return stage, json.loads(runs.read_file(stage, "data/policy.json"))


def limits_of(step: Any, whole: Mapping[str, float]) -> dict[str, float]:
    """Return the limits of a step in numbers: `limits`, and `shares` of the network's costs that `whole` has."""
    return {**step.limits, **{name: share * whole[name] for name, share in step.shares.items() if name in whole}}


def _final(device: str, uri: str, exhibits: Any, spec: Any, step: Any, counts: dict[str, int]) -> Any:
    small, record = Cutter(uri, exhibits, spec, step, device).cut(counts)
    return small.cpu(), record


def _given(device: str, uri: str, exhibits: Any, spec: Any, step: Any, timing: TimingSpec) -> dict[str, Any]:
    """Return the policy `uniform`, `ranked` or `sensitivity` of a step, within the limits or by the share `keep`."""
    cutter = Cutter(uri, exhibits, spec, step, device)
    groups, whole, timed = cutter.groups, cutter.groups.costs({}), "latency_ms" in {**step.shares, **step.limits}
    if timed:
        whole["latency_ms"] = cutter.latency_ms({}, timing)
    limits, best = limits_of(step, whole), TASKS[cutter.judge.network.task].best
    sign = best.sign
    budget = policies.Budget(
        groups, limits, lambda counts: {"latency_ms": cutter.latency_ms(counts, timing, whole["latency_ms"])}
    )
    counts, curves = policies.choose(
        budget, step.policy, cutter.scores, step.round_to, step.keep, lambda c: sign * cutter.score(c)[best.name]
    )
    plain = {name: {str(count): value for count, value in curve.items()} for name, curve in curves.items()}
    found: dict[str, Any] = {"counts": counts, "limits": limits} | ({"sensitivity": plain} if plain else {})
    return found | ({"measured": {"latency_ms": budget.costs(counts)["latency_ms"]}} if timed else {})


# ------------------------------------------------------------------------------------------------ search


def _scorer(uri: str, exhibits: Any, spec: Any, step: Any) -> trials.Score:
    return Cutter(uri, exhibits, spec, step, trials.device()).score


def _scored(device: str, uri: str, exhibits: Any, spec: Any, step: Any, counts: dict[str, int]) -> dict[str, float]:
    """Return the metrics of a policy."""
    return Cutter(uri, exhibits, spec, step, device).score(counts)


def _searched(
    step: Any, work: Work, stage: runs.Run, before: runs.Run, groups: Groups, limits: dict[str, float], exhibits: Any
) -> dict[str, Any]:
    """Search for a policy by trials of Ray Tune; finished trials on storage are reused."""
    spec, job = step.search, work.job
    climbs = isinstance(spec, ClimbSpec)
    steps = [amc.GroupStep(**one) for one in policies.group_features(groups, step.round_to)]
    try:
        timed, limits, costs = _timed_costs(step, work, stage, before, groups, limits)
        walk = amc.GroupWalk(steps, costs, limits, spec.least, spends=climbs)
    except UserError as error:
        raise UserError(f"{work.ctx.where}: prune: {error}") from None
    metric = TASKS[subnets.task_of(runs.read_model(before)[2])].best
    if climbs:
        start, curves = _start(walk, step, work, stage, before, exhibits)
        agent = Climb(start, spec.spread)
    else:
        agent, curves = replace(ddpg.AMC, warmup=spec.warmup, decay=spec.decay, dummy=True), {}
    learner = Learner(walk, SearchSettings(spec.episodes, spec.population, agent), job.seed)
    make = functools.partial(_scorer, before.uri, exhibits, job.judge, step)
    reward = lambda told: amc.reward_of(metric.merit(told[metric.name]))  # noqa: E731
    done = agent_trials.run(work, stage, "prune", learner, reward, make)
    tried = done.trials
    if timed is None:
        found, retimed = best(tried), {}
    else:
        found, retimed = _kept_when_timed(work, step, before, tried, limits["latency_ms"], timed)
    costs_of = lambda counts: {name: float(one[0]) for name, one in costs(groups.row(counts)[None]).items()}  # noqa: E731
    even = policies.Budget(groups, limits, costs_of).largest(
        lambda share: policies.uniform(groups, share, step.round_to)
    )
    scored = work.on_worker(_scored, before.uri, exhibits, job.judge, step, even)
    return {
        "counts": found.policy,
        "episode": found.index,
        "rewards": [agent_trials.number_of(trial.reward) for trial in tried],
        "limits": limits,
        "candidates": done.candidates(metric.name, costs_of),
        "uniform": {"counts": even, "costs": costs_of(even), metric.name: scored[metric.name]},
        "searched": done.scored[repr(found.policy)][metric.name],
    } | curves | retimed  # fmt: skip


def _start(
    walk: amc.GroupWalk, step: Any, work: Work, stage: runs.Run, before: runs.Run, exhibits: Any
) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Return the actions `[groups]` that a search starts from, and {"sensitivity": curves} if those were measured.

    Found once and stored in `data/start.json` of the stage.
    """
    if not runs.exists(stage, "data/start.json"):
        given = step.model_copy(update={"search": None, "policy": step.search.start})
        timing = work.job.timing or ANY_TIMING
        found = work.on_worker(_given, before.uri, exhibits, work.job.judge, given, timing)
        runs.write_file(stage, "data/start.json", json.dumps(found).encode())
    found = json.loads(runs.read_file(stage, "data/start.json"))
    shares = tuple(found["counts"][one.name] / one.choices[-1] for one in walk.steps)
    return shares, {"sensitivity": found["sensitivity"]} if "sensitivity" in found else {}


# ------------------------------------------------------------------------------------- latency as a limit of a search


def _latencies(
    device: str,
    uri: str,
    spec: Any,
    step: Any,
    timing: TimingSpec,
    counts: list[dict[str, int]],
    whole_ms: float | None,
) -> list[float]:
    """Return the latencies of policies in ms, timed in turn with the whole network; its own comes first if `whole_ms`
    is None."""
    cutter = Cutter(uri, subnets.Exhibits((), ()), spec, _by_norms(step), device)
    first = cutter.latency_ms({}, timing) if whole_ms is None else whole_ms
    found = [cutter.latency_ms(one, timing, first) for one in counts]
    return found if whole_ms is not None else [first, *found]


def _by_norms(step: Any) -> Any:
    """Return the step without criteria that need samples: the choice of channels does not affect latency."""
    return step.model_copy(update={"criterion": "l1", "reconstruct": False})


def _timed_costs(
    step: Any, work: Work, stage: runs.Run, before: runs.Run, groups: Groups, limits: dict[str, float]
) -> tuple[dict[str, Any] | None, dict[str, float], Any]:
    """Return the timings for a limit on latency_ms (None without one), all limits in numbers, and the cost function.

    Timed once and stored in `data/latency.json` of the stage: a resumed search uses the same latency model.
    """
    if "latency_ms" not in {**step.shares, **step.limits}:
        return None, limits, groups.costs_of
    timing, spec = work.job.timing or ANY_TIMING, step.search
    if not runs.exists(stage, "data/latency.json"):
        drawn = latency.draw(groups, spec.timed, spec.least, step.round_to, work.job.seed)
        whole_ms, *found = work.on_worker(_latencies, before.uri, work.job.judge, step, timing, drawn, None)
        rows = [[counts, ms] for counts, ms in zip(drawn, found, strict=True)]
        runs.write_file(stage, "data/latency.json", json.dumps({"whole_ms": whole_ms, "policies": rows}).encode())
    told = json.loads(runs.read_file(stage, "data/latency.json"))
    whole_ms = told["whole_ms"]
    model = latency.fit(groups, [(counts, ms / whole_ms) for counts, ms in told["policies"]])
    work.ctx.console.print(
        f"{work.job.name}: latency of {len(told['policies'])} policies timed, mean error of others {model.error:.1f} %",
        highlight=False, markup=False,
    )  # fmt: skip
    limits = limits_of(step, groups.costs({}) | {"latency_ms": whole_ms})
    return told | {"error": model.error}, limits, lambda rows: {
        **groups.costs_of(rows), "latency_ms": whole_ms * model(rows)
    }  # fmt: skip


def _kept_when_timed(
    work: Work, step: Any, before: runs.Run, tried: list[Trial[Any]], limit: float, timed: dict[str, Any]
) -> tuple[Trial[Any], dict[str, Any]]:
    """Return the best trial whose measured latency keeps the limit, and that measurement. UserError if none of the best
    RETIMED policies does."""
    order = sorted((one for one in tried if math.isfinite(one.reward)), key=lambda one: (-one.reward, one.index))
    different: dict[str, Trial[Any]] = {}
    for trial in order:
        different.setdefault(repr(trial.policy), trial)
    timing, found = work.job.timing or ANY_TIMING, []
    for trial in list(different.values())[:RETIMED]:
        arguments = (before.uri, work.job.judge, step, timing, [trial.policy], timed["whole_ms"])
        found.append(work.on_worker(_latencies, *arguments)[0])
        if found[-1] <= limit:
            return trial, {"measured": {"latency_ms": found[-1]}, "latency_error": timed["error"]}
    raise UserError(
        f"{work.ctx.where}: prune: none of the {len(found)} best policies keeps the limit latency_ms {limit:.3g} when "
        f"timed (the fastest takes {min(found):.3g}): raise the limit, search.timed or search.episodes"
    )
