"""Implementation of the step `quantize`: bits given or found by HAQ's agent, ranges from samples, rounded layers.

A trial of a search (agent_trials.py) rounds the network by its policy, without training, and scores the result;
BatchNorm is folded and the inputs of all layers are observed once per process, for all of its trials.
"""

import copy
import functools
import json
from dataclasses import replace
from typing import Any

from torch import nn

from slimray import runs
from slimray.compress import quantization
from slimray.compress.fold import fold, norm_pairs
from slimray.compress.quantization import LayerInfo
from slimray.compress.quantized import Bits
from slimray.search import ddpg, haq
from slimray.search.agents import Learner, SearchSettings, best
from slimray.spec import UserError
from slimray.tasks import TASKS
from slimray.tasks.network import to_input
from slimray.verbs import agent_trials, subnets, trials
from slimray.verbs.bit_policies import Costs, named, uniform, walk_of
from slimray.verbs.compressing import Work, read_network, write_network


class Rounder:
    """The network of a run and the inputs of its layers on calibration samples: rounds it by policies and scores it."""

    def __init__(self, uri: str, exhibits: Any, spec: Any, step: Any, device: str = "cpu"):
        self.judge, self.step = subnets.Judge(uri, exhibits, spec, device), step
        network = self.judge.network
        self.net: nn.Module = network.net
        self.batches = [to_input(part.numpy(), network.pixels, self.judge.device) for part in self.judge.inputs]
        self.best = TASKS[network.task].best
        self.sign = self.best.sign

    @property
    def example(self) -> Any:
        """A batch of two inputs."""
        return self.batches[0][:2]

    @functools.cached_property
    def layers(self) -> list[LayerInfo]:
        """The layers that get bits."""
        return [layer for layer in quantization.layers_of(self.net, self.example) if layer.name not in self.step.keep]

    @functools.cached_property
    def observed(self) -> tuple[nn.Module, list[tuple[str, str]], dict[str, Any]]:
        """The folded network, the pairs that were folded, and values of the inputs of its layers."""
        pairs = norm_pairs(self.net, self.example)
        net = fold(copy.deepcopy(self.net).eval(), pairs)
        wanted = {id(net.get_submodule(layer.name)): layer.name for layer in self.layers}
        if self.step.scheme == "kmeans":
            return net, pairs, {}
        kept = quantization.kept_values(self.step.scheme, (self.step.search.low,))
        values = quantization.gather(net, wanted, self.batches, kept)
        return net, pairs, values

    @property
    def tables(self) -> dict[str, Bits]:
        """Bits of the embedding tables, except those in `keep`."""
        tables = quantization.tables_of(self.net, self.step.embeddings, self.step.scheme)
        return {name: pair for name, pair in tables.items() if name not in self.step.keep}

    def score(self, bits: haq.Policy) -> dict[str, float]:
        """Return the metrics of a policy on the samples to score."""
        net, pairs, values = self.observed
        chosen = named(self.layers, bits) | self.tables
        spans = quantization.spans_of(values, chosen, self.step.scheme)
        made, _ = quantization.assemble(copy.deepcopy(net), pairs, chosen, spans, self.step.scheme, "whole")
        return self.judge.metrics_of(made)


def quantize(step: Any, work: Work, folder: str, before: runs.Run) -> tuple[runs.Run, dict[str, Any]]:
    """Quantize the network of `before`; return the stage, and the bits by layer with the data behind their choice."""

    def make(stage: runs.Run) -> None:
        net, model, taken = read_network(before)
        records = model.get("compression", [])
        details: dict[str, Any] = {}
        if records and records[-1]["step"] == "quantize" and records[-1]["form"] == "trained":
            made, record = quantization.finish(net, records[-1])
            model = {**model, "compression": records[:-1]}
        elif any(record["step"] == "quantize" for record in records):
            raise UserError(f"{folder}: the network is quantized already: leave one of the two steps out")
        else:
            source, job = work.data.tables[work.spec.train], work.job
            count = min(step.samples, source.num_samples)
            samples = subnets.decode(source, taken["recipe"], count, job.seed, True, work.spec.decode_timeout_s)
            chooses = step.search is not None or step.max_loss is not None
            exhibits = subnets.Exhibits(samples, work.judged if chooses else ())
            if step.search is not None:
                details = _searched(step, work, stage, before, exhibits)
            bits = details["policy"] if details else None
            made, record, found = work.on_worker(_final, before.uri, exhibits, job.judge, step, bits)
            details |= found
        runs.write_file(stage, "data/policy.json", json.dumps(details).encode())
        write_network(stage, made, model, taken, record)

    stage = work.write(folder, step.model_dump(mode="json"), make)
    record = runs.read_model(stage)[1]["compression"][-1]
    details = json.loads(runs.read_file(stage, "data/policy.json"))
    return stage, {"bits": record["layers"]} | {name: one for name, one in details.items() if name != "policy"}


def _final(device: str, uri: str, exhibits: Any, spec: Any, step: Any, bits: Any) -> tuple[nn.Module, Any, Any]:
    """Return the quantized network on the CPU, its record, and with `max_loss` the loss of each layer alone."""
    rounder = Rounder(uri, exhibits, spec, step, device)
    net, keep, rows = rounder.net, list(step.keep), []
    if step.max_loss is not None:
        bits_of_all = 8 if isinstance(step.bits, dict) else step.bits
        score = lambda one: rounder.sign * rounder.judge.metrics_of(one)[rounder.best.name]  # noqa: E731
        rows = quantization.sensitivity(net, rounder.example, rounder.batches, score, bits_of_all, step.scheme)
        keep += [row.layer for row in rows if row.loss > step.max_loss and row.layer not in keep]
    given = step.bits if bits is None else {name: tuple(pair) for name, pair in bits.items()}
    made, record = quantization.prepare(
        net, rounder.example, rounder.batches, given, step.scheme, keep, step.finetune is not None, step.embeddings
    )
    table = {row.layer: {"loss": row.loss, "score": row.score, "saved_mb": row.saved_mb} for row in rows}
    return made.cpu(), record, {"sensitivity": table} if table else {}


# ---------------------------------------------------------------------------------------------------------- search


def _scorer(uri: str, exhibits: Any, spec: Any, step: Any) -> trials.Score:
    return Rounder(uri, exhibits, spec, step, trials.device()).score


def _layers(device: str, uri: str, exhibits: Any, spec: Any, step: Any) -> list[LayerInfo]:
    return Rounder(uri, exhibits, spec, step, device).layers


def _scores(device: str, uri: str, exhibits: Any, spec: Any, step: Any, bits: haq.Policy) -> Any:
    """Return the metrics of the float network, and those of a policy."""
    rounder = Rounder(uri, exhibits, spec, step, device)
    return rounder.judge.metrics_of(rounder.net), rounder.score(bits)


def _searched(step: Any, work: Work, stage: runs.Run, before: runs.Run, exhibits: Any) -> dict[str, Any]:
    """Search for bits by trials of Ray Tune, and score the best uniform policy; finished trials are reused."""
    spec, job = step.search, work.job
    arguments = (before.uri, exhibits, job.judge, step)
    layers = work.on_worker(_layers, *arguments)
    costs = Costs(step, layers)
    try:
        walk = walk_of(step, layers, costs)
    except UserError as error:
        raise UserError(f"{work.ctx.where}: quantize: {error}") from None
    even = uniform(walk)
    whole, metrics = work.on_worker(_scores, *arguments, even)
    metric = TASKS[subnets.task_of(runs.read_model(before)[2])].best
    agent = replace(ddpg.HAQ, warmup=spec.warmup, decay=spec.decay)
    learner = Learner(walk, SearchSettings(spec.episodes, spec.population, agent), job.seed)
    reward = lambda told: haq.reward_of(metric.merit(told[metric.name]), metric.merit(whole[metric.name]))  # noqa: E731
    done = agent_trials.run(work, stage, "quantize", learner, reward, functools.partial(_scorer, *arguments))
    found = best(done.trials)
    searched, same = done.scored[repr(found.policy)][metric.name], metrics[metric.name]
    if metric.improves(same, searched):
        said = f"the same bits everywhere are better, {metric.label} {same:.2f} against {searched:.2f} by the search"
        work.ctx.console.print(f"{job.name}: quantize: {said}: try more episodes, or write bits", highlight=False)
    return {
        "policy": named(layers, found.policy),
        "episode": found.index,
        "rewards": [agent_trials.number_of(trial.reward) for trial in done.trials],
        "limits": costs.limits,
        "costs": costs.all(found.policy),
        "candidates": done.candidates(metric.name, costs.all),
        "searched": searched,
        "uniform": {"bits": named(layers, even), "costs": costs.all(even), metric.name: same},
    }
