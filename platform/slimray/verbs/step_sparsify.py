"""The step `sparsify`: unstructured pruning of the smallest weights, by share, by threshold or by sensitivity."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slimray import runs
from slimray.verbs.compress_specs import SparsifyStep
from slimray.verbs.specs import JudgeSpec

if TYPE_CHECKING:
    from torch import nn

    from slimray.verbs.compressing import Work

FASTER = False  # dense kernels compute with zeros as with any number


def check(step: SparsifyStep, net: "nn.Module", sample: tuple[int, ...] | None) -> None:
    """Raise UserError for a layer that `net`, on the meta device, does not have."""
    from slimray.compress import sparsity

    for field in ("keep", "quality"):
        if getattr(step, field) is not None:
            sparsity.by_layer(net, getattr(step, field), field)


def run(step: SparsifyStep, work: "Work", folder: str, before: runs.Run) -> tuple[runs.Run, dict[str, Any]]:
    """Prune the network of `before`; return the stage, and the measured sensitivities if any."""
    from slimray.compress import sparsity
    from slimray.verbs.compressing import read_network, write_network

    def make(stage: runs.Run) -> None:
        net, model, input_json = read_network(before)
        table: Mapping[str, Any] = {}
        if step.quality is not None:
            record = sparsity.sparsify_below(net, sparsity.by_layer(net, step.quality, "quality"))
        elif step.keep is not None:
            record = sparsity.sparsify(net, sparsity.by_layer(net, step.keep, "keep"))
        else:
            assert step.sensitivity is not None  # one of the three is set
            table = work.on_worker(
                measure, before.uri, work.judged, work.job.judge, step.sensitivity.ratios, work.metric
            )
            record = sparsity.sparsify(net, choose(table, step.sensitivity.drop, step.sensitivity.ratios))
        runs.write_file(stage, "data/sensitivity.json", json.dumps(table).encode())
        write_network(stage, net, model, input_json, record)

    stage = work.write(folder, step.model_dump(mode="json"), make)
    table = json.loads(runs.read_file(stage, "data/sensitivity.json"))
    return stage, {"sensitivity": table} if table else {}


def measure(
    device: str, uri: str, samples: tuple[Any, ...], spec: JudgeSpec, ratios: tuple[float, ...], metric: str
) -> dict[str, dict[str, float]]:
    """Return the metric by layer and kept share (as text), only that layer pruned; under "" that of the network."""
    import torch

    from slimray.compress import sparsity
    from slimray.tasks import TASKS
    from slimray.verbs import subnets

    judge = subnets.Judge(uri, subnets.Exhibits((), samples), spec, device)
    net = judge.network.net
    sign = TASKS[judge.network.task].best.sign
    out = {"": {"1": sign * judge.metrics_of(net)[metric]}}
    for name, weight in sparsity.layers_of(net).items():
        whole, share = weight.detach().clone(), sparsity.density(net)[name]
        out[name] = {}
        for ratio in ratios:
            if ratio < share[0] / share[1]:
                sparsity.sparsify(net, {name: ratio})
                out[name][f"{ratio:g}"] = sign * judge.metrics_of(net)[metric]
                with torch.no_grad():
                    weight.copy_(whole)
    return out


def choose(table: Mapping[str, Mapping[str, float]], drop: float, ratios: tuple[float, ...]) -> dict[str, float]:
    """Return the smallest share of each layer that loses at most `drop`; layers without such a share are left out."""
    whole, keep = table[""]["1"], {}
    for name, scores in table.items():
        fits = [ratio for ratio in ratios if scores.get(f"{ratio:g}", float("-inf")) >= whole - drop]
        if name and fits:
            keep[name] = fits[0]
    return keep
