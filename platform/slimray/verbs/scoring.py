"""Scoring of finished networks on a split, on the workers of an evaluation: metrics, votes, boxes, examples.

In: a `ScoreConfig` with a case for each network, frame order and repeat. Out, from rank 0: a row per case, its
confusion matrix, and examples of the first samples. Imports Ray.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from slimray import runs
from slimray.data.modalities import sample_shape
from slimray.data.pipeline import Batch, FeedConfig, Source
from slimray.data.plan import Phase
from slimray.export import exported
from slimray.tasks import TASKS
from slimray.tasks.evaluation import Pass, Samples, Setting
from slimray.tasks.network import Network, load_network
from slimray.tasks.task import require_finite
from slimray.train import learn, loop, ranks, workers
from slimray.train.spec import ScaleSpec


@dataclass(frozen=True)
class Case:
    """One pass over the split: a run (with a `format`, one of its exports), a frame order and a repeat number."""

    run_uri: str
    run_name: str
    order: str
    repeat: int
    format: str | None = None


@dataclass(frozen=True)
class ScoreConfig:
    """Everything the workers of an evaluation need."""

    run_uri: str
    attempt: int
    cases: tuple[Case, ...]
    phases: tuple[Phase, ...]
    source: Source
    average: str
    task: str
    options: dict[str, Any]
    search: dict[str, Any]
    parts: dict[str, range]
    batch: int
    pictures: int
    scale: ScaleSpec
    decode_slots: int
    decode_timeout_s: float
    progress_actor: Any
    feeder: str = ""


def load(run_uri: str, form: str | None, device: torch.device | str = "cpu") -> Network:
    """Return the network of a run, or, with `form`, one of its exports, which runs on the CPU."""
    run = runs.run_at(run_uri)
    if form is None:
        return load_network(run, device)
    return exported.load_exported(run, form, torch.get_num_threads())


def _start(config: ScoreConfig, number: int, device: torch.device, rows: int) -> Pass:
    """Return the pass of a case on this rank."""
    case, phase, task = config.cases[number], config.phases[number], TASKS[config.task]
    network = load(case.run_uri, case.format, device)
    network = replace(network, pixels=replace(network.pixels, average=config.average))
    network = replace(network, recipe=network.recipe | config.search)

    def paths() -> list[str]:
        return ray.get(config.source.index, timeout=300).column("path").to_pylist()

    setting = Setting(task, network, phase.recipe, paths, phase.batch, rows, config.options, config.parts)
    return task.start(setting)


def _end(current: Pass, case: Case, world: int, device: torch.device) -> tuple[dict[str, Any], Any, list[Any]]:
    """Return the row of the table, the confusion matrix if any, and the findings of all ranks. A collective."""
    ranks.merge_scores(current.score, world, device)
    found = [current.found]
    if world > 1:
        found = [[] for _ in range(world)]
        dist.all_gather_object(found, current.found)
    row = {"run": case.run_name, "variant": case.order, "repeat": case.repeat}
    counted = current.result()
    require_finite(counted, case.run_name)
    tables = current.setting.task.in_tables
    numbers = {k: v for k, v in counted.items() if isinstance(v, int | float) or k in tables}
    return row | numbers, loop.confusion_of(current.score), [one for part in found for one in part]


def score_cases(config: ScoreConfig) -> dict[str, Any]:
    """Score all cases on this rank's share of the split; rank 0 returns the merged results."""
    context, device = ray.train.get_context(), get_device()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, int(config.scale.cpus_per_worker)))
    views = max(sample_shape(phase.recipe)[0] for phase in config.phases)
    rows = max(1, config.batch // views)  # views of a sample are scored together
    feed = FeedConfig(
        phases=config.phases,
        sources={"eval": config.source},
        seed=0,
        world=world,
        max_rows=rows,
        decode_slots=config.decode_slots,
        decode_timeout_s=config.decode_timeout_s,
        wait_timeout_s=config.scale.data_timeout_s,
    )
    out: dict[str, Any] = {"rows": [], "confusion": {}, "found": [], "examples": []}
    current, number = None, -1
    bad: dict[int, dict[str, Any]] = {}  # sample -> its row of the quarantine
    quarantine = runs.PartWriter(runs.run_at(config.run_uri), "quarantine", config.attempt, rank)
    with workers.open_stream(feed, config.feeder, config.progress_actor) as stream, contextlib.closing(quarantine):
        for phase, step, batch in stream:
            if current is None:
                number += 1
                current = _start(config, number, device, rows)
                out["examples"].append([])
            case = config.cases[number]
            if batch is not None:
                for i in np.flatnonzero(~batch.valid):
                    if int(batch.sample[i]) not in bad:
                        bad[int(batch.sample[i])] = {"path": batch.path[i], "reason": batch.reason[i]}
                        quarantine.write(bad[int(batch.sample[i])])
                if batch.valid.any():
                    learn.seed_step(case.repeat, step, rank)  # for networks that draw points at random
                    samples = _samples(batch)
                    outputs = current.take(samples)
                    if rank == 0 and case.order == "natural" and case.repeat == 0:
                        shown = out["examples"][-1]
                        shown += current.show(samples, outputs, shown, config.pictures)
            current.settle(step, world)
            if rank == 0:
                state = {"phase": case.run_name, "epoch": number, "epochs": len(config.cases)}
                config.progress_actor.update.remote(**state, step=step + 1, steps=phase.num_steps)
            if step + 1 == phase.num_steps:
                row, confusion, found = _end(current, case, world, device)
                out["rows"].append(row)
                out["found"].append(found)
                if confusion is not None:
                    out["confusion"][f"{case.run_name} ({case.order})"] = confusion
                current = None
    return out


def _samples(batch: Batch) -> Samples:
    """Return the samples of a batch that decoded."""
    valid = np.flatnonzero(batch.valid)
    paths = [batch.path[i] for i in valid]
    return Samples(batch.data[valid], batch.label[valid], paths, batch.sample[valid].tolist())


# ------------------------------------------------------------------------------------------------- on the driver


def join_repeats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per run and frame order: the mean over repeats, with `repeats` (mean, std, max) if several.

    `ap`, which holds numbers by name, always becomes mean, std and max.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["run"], row["variant"]), []).append(row)
    out = []
    for same in groups.values():
        row = {k: v for k, v in same[0].items() if k != "repeat"}
        if "ap" in row:
            row["ap"] = summary([one["ap"] for one in same])
        if len(same) > 1:
            numbers = [{k: v for k, v in one.items() if isinstance(v, float)} for one in same]
            several = summary(numbers)
            row |= {name: value["mean"] for name, value in several.items()} | {"repeats": several}
        out.append(row)
    return out


def summary(repeats: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return mean, standard deviation and maximum of each number over repeats."""
    out = {}
    for name in repeats[0]:
        values = np.array([one[name] for one in repeats])
        out[name] = {"mean": float(values.mean()), "std": float(values.std()), "max": float(values.max())}
    return out
