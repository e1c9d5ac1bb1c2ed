"""Scoring of subnets of a supernet, for `shrink` and `search`: a judge extracts, recalibrates and scores a subnet.

The samples are decoded once into the object store and shared by all judges of a node. A judge is an ordinary object
that maps an arch to its metrics. The result does not depend on the number of judges, because one judge does all the
work of an arch: extraction, BatchNorm statistics from whole batches of training samples (Once-for-All, arXiv
1908.09791), scoring.
"""

import functools
import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import safetensors.torch
import torch
from ray import exceptions
from ray.util import ActorPool

from slimray import runs
from slimray.arch import Arch, Space
from slimray.data.decode import decode_block
from slimray.data.index import INDEX
from slimray.data.modalities import pads_of
from slimray.data.permutation import permuted
from slimray.data.pipeline import Batch, FeedConfig, Source, decode_config, failure_of, map_rows, rows_of
from slimray.data.plan import SHUFFLE, Phase, blocks
from slimray.data.ragged import joined
from slimray.report import pages
from slimray.spec import RunFailed
from slimray.tasks import TASKS
from slimray.tasks.network import load_network, predict_outputs, task_of, to_input
from slimray.tasks.task import Metric, Outputs
from slimray.train import batchnorm, connection, learn
from slimray.train.spec import ScaleSpec
from slimray.verbs import trials
from slimray.verbs.context import Context
from slimray.verbs.specs import JudgeSpec

ROWS = 64  # samples decoded by one task
LARGE = 2_000_000  # size of a split above which samples are drawn by position; below, by arrays, as in old versions
HELD_OUT = 0x4E1D  # key that, with a seed, selects the held-out samples


@dataclass(frozen=True)
class Exhibits:
    """Samples for judges: references to decoded blocks, of training samples for recalibration and samples to score."""

    calibrate: tuple[Any, ...]
    score: tuple[Any, ...]


def decode(source: Source, recipe: dict[str, Any], count: int, seed: int, shuffle: bool, timeout_s: float) -> tuple:
    """Return references to `count` decoded samples of a split: the first of the index, or, with `shuffle`, of epoch 0
    of `seed`."""
    phase = drawn(source.num_samples, shuffle, recipe)
    plan = list(itertools.takewhile(lambda block: block.lo < count, blocks([phase], 1, [0], ROWS)))
    config = FeedConfig((phase,), {"split": source}, seed, 1, ROWS, 1, timeout_s)
    cut = [replace(block, hi=min(block.hi, count)) for block in plan]
    rows, shared = rows_of(cut, config), decode_config(cut, config)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True
    try:
        dataset = map_rows(rows, lambda block: decode_block(block, shared))
        return tuple(entry.ref for bundle in dataset.iter_internal_ref_bundles() for entry in bundle.blocks)
    except exceptions.RayTaskError as error:
        raise failure_of(error) from error


def drawn(num_samples: int, shuffle: bool, recipe: dict[str, Any]) -> Phase:
    """Return the pass over a split whose first samples are decoded for judges."""
    version = SHUFFLE if num_samples > LARGE else 1
    return Phase("judge", "split", 0, num_samples, ROWS, shuffle, recipe, version=version)


def make_exhibits(
    spec: JudgeSpec,
    train: tuple[Source, dict[str, Any]],
    score: tuple[Source, dict[str, Any]],
    seed: int,
    timeout_s: float,
) -> Exhibits:
    """Decode the samples for judges, once: samples of `train` for recalibration, and the first of `score` for scoring.

    Each is the index of a split and the recipe of its samples.
    """
    count = min(spec.calibrate, train[0].num_samples)
    calibrate = decode(*train, count, seed, True, timeout_s)
    count = min(spec.samples or score[0].num_samples, score[0].num_samples)
    return Exhibits(calibrate, decode(*score, count, seed, False, timeout_s))


def put_table(root: str, table: pa.Table) -> Source:
    """Put an index into the object store, with only the columns needed to read its samples."""
    return Source(root, ray.put(table.select(INDEX.names)), table.num_rows)


def hold_out(table: pa.Table, count: int, seed: int) -> tuple[pa.Table, pa.Table | None]:
    """Split the training index `table` into the samples to train on and the `count` samples held out.

    The choice is a function of the seed. The second is None if `count` is 0.
    """
    if not count:
        return table, None
    if table.num_rows > LARGE:
        is_out = np.zeros(table.num_rows, bool)
        is_out[permuted(np.arange(count), table.num_rows, (seed, HELD_OUT))] = True
        return table.filter(pa.array(~is_out)), table.filter(pa.array(is_out))
    order = list(range(table.num_rows))
    random.Random(f"hold-out-{seed}").shuffle(order)
    return table.take(sorted(order[count:])), table.take(sorted(order[:count]))


def write_subnet(
    ctx: Context,
    name: str,
    source: Mapping[str, Any],
    model: tuple[bytes, Mapping[str, Any], Mapping[str, Any]],
    metrics: Mapping[str, float],
    costs: Mapping[str, float],
) -> runs.Run:
    """Write a subnet as the finished run `name`, which all verbs accept as a network; return it.

    `source` records its origin in `job.yaml` (`search`, `supernet`, ..., and the `data` it was trained on), `model`
    holds the arguments of `runs.write_model`.
    """
    run = runs.open_run(ctx.storage, name)
    runs.begin(run, {"kind": "subnet", "name": name, **source}, ctx.attempt)
    runs.write_model(run, *model)
    runs.write_card(run, {"metrics": {"last": dict(metrics)}, "costs": dict(costs), "supernet": source["supernet"]})
    runs.write_report(run, pages.train_report(run))
    runs.end(run, "finished")
    return run


class Judge:
    """A supernet with the samples on which its subnets are recalibrated and scored."""

    def __init__(self, run_uri: str, exhibits: Exhibits, spec: JudgeSpec, device: str = "cpu"):
        self.network, self.spec = load_network(runs.run_at(run_uri), device), spec
        self.device, self.exhibits = torch.device(device), exhibits

    @property
    def space(self) -> Space:
        """Space of the archs of the supernet."""
        return self.network.net.space  # type: ignore[return-value]

    @functools.cached_property
    def inputs(self) -> list[torch.Tensor]:
        """Batches for recalibration, as raw arrays; the last one may be small, a single sample is left out."""
        return list(self._inputs())

    def _inputs(self) -> Iterator[torch.Tensor]:
        whole = [_fetch(ref) for ref in self.exhibits.calibrate]
        data = joined([batch.data[batch.valid] for batch in whole], pads_of(self.network.recipe)[0])
        if len(data) < 2:
            raise RunFailed("no training sample to calibrate with decodes: see quarantine/ of the training run")
        for start in range(0, len(data), self.spec.calibrate_batch):
            piece = data[start : start + self.spec.calibrate_batch]
            if len(piece) > 1:
                yield torch.from_numpy(np.ascontiguousarray(piece[:, :1]))

    def labelled(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the samples for recalibration and their targets, `[n, 1, ...]` and `[n, ...]`, batch by batch."""
        for ref in self.exhibits.calibrate:
            batch = _fetch(ref)
            kept = np.flatnonzero(batch.valid)
            for start in range(0, len(kept), self.spec.calibrate_batch):
                rows = kept[start : start + self.spec.calibrate_batch]
                yield batch.data[rows][:, :1], batch.label[rows]

    def subnet(self, arch: Arch) -> torch.nn.Module:
        """Return the extracted subnet `arch`, recalibrated, in eval mode."""
        pixels = self.network.pixels
        whole = (to_input(part.numpy(), pixels, self.device) for part in self.inputs)
        batches = (learn.fit_input(x, self.space, arch) for x in whole)
        return batchnorm.recalibrate_norms(self.network.net.extract(arch), batches).eval()  # type: ignore[operator]

    def score(self, arch: dict[str, Any]) -> dict[str, float]:
        """Return the metrics of an arch on the samples to score, in the units of its task: top1, ... or miou, ..."""
        return self.try_out(arch)[1]

    def try_out(self, arch: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, float]]:
        """Return the extracted subnet of an arch, and its metrics."""
        known = self.space.arch(arch)
        net = self.subnet(known)
        return net, self.metrics_of(lambda x: net(learn.fit_input(x, self.space, known)))

    def try_whole(self) -> tuple[torch.nn.Module, dict[str, float], dict[str, float]]:
        """Return the whole network, recalibrated, and its metrics before and after; for a run without a supernet."""
        net, pixels = self.network.net, self.network.pixels
        before = self.metrics_of(net)
        batches = (to_input(part.numpy(), pixels, self.device) for part in self.inputs)
        net = batchnorm.recalibrate_norms(net, batches).eval()
        return net, before, self.metrics_of(net)

    def metrics_of(self, forward: Callable[[torch.Tensor], Outputs]) -> dict[str, float]:
        """Return the metrics of `forward` on the samples to score."""
        score = TASKS[self.network.task].score(len(self.network.classes), self.network.recipe)
        for ref in self.exhibits.score:
            batch = _fetch(ref)
            kept = np.flatnonzero(batch.valid)
            for start in range(0, len(kept), self.spec.batch):
                rows = kept[start : start + self.spec.batch]
                data, pixels = batch.data[rows], self.network.pixels
                outputs = predict_outputs(forward, data, pixels, self.device, self.spec.batch, self.network.precision)
                score.add(outputs, torch.from_numpy(batch.label[rows]).to(self.device))
        return {name: value for name, value in score.result().items() if isinstance(value, int | float)}


def recalibrate(
    run_uri: str, exhibits: Exhibits, spec: JudgeSpec, scale: ScaleSpec
) -> tuple[bytes, dict[str, float], dict[str, float]]:
    """Return the weights of a run's network with new BatchNorm statistics (safetensors), and its metrics before and
    after.

    One worker of `scale` does the work.
    """
    resources = {"num_cpus": scale.cpus_per_worker, "num_gpus": scale.gpus_per_worker}
    task: Any = ray.remote(_recalibrate).options(**resources, runtime_env=connection.environment(scale))
    try:
        return ray.get(task.remote(run_uri, exhibits, spec, "cuda" if scale.gpus_per_worker else "cpu"))
    except exceptions.RayTaskError as error:
        raise failure_of(error) from error


def _recalibrate(run_uri: str, exhibits: Exhibits, spec: JudgeSpec, device: str) -> tuple[bytes, Any, Any]:
    torch.set_num_threads(int(os.environ[connection.THREADS]))
    net, before, after = Judge(run_uri, exhibits, spec, device).try_whole()
    tensors = {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
    return safetensors.torch.save(tensors), before, after


def scorer(run_uri: str, exhibits: Exhibits, spec: JudgeSpec) -> trials.Score:
    """Return the function that scores archs in a trial: a judge of the supernet at `run_uri`, on the trial's device."""
    return Judge(run_uri, exhibits, spec, trials.device()).score


def best_of(input_json: Mapping[str, Any]) -> Metric:
    """Return the metric that compares subnets, from a run's `model/input.json`."""
    return TASKS[task_of(input_json)].best


def metric_of(input_json: Mapping[str, Any]) -> str:
    """Return the name of the metric that compares subnets, from a run's `model/input.json`."""
    return best_of(input_json).name


def judge_all(
    run_uri: str,
    exhibits: Exhibits,
    spec: JudgeSpec,
    archs: Sequence[Arch],
    scale: ScaleSpec,
    weights: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Yield (number, metrics) of each arch as they finish, from one actor per worker of `scale`.

    With `weights`, metrics become (metrics, weights of the recalibrated subnet as safetensors bytes). RunFailed if a
    judge fails, or if none finishes an arch within `scale.data_timeout_s`.
    """
    resources = {"num_cpus": scale.cpus_per_worker, "num_gpus": scale.gpus_per_worker}
    make: Any = ray.remote(_Numbered).options(**resources, runtime_env=connection.environment(scale)).remote
    device = "cuda" if scale.gpus_per_worker else "cpu"
    actors = [make(run_uri, exhibits, spec, device) for _ in range(min(scale.most, len(archs)))]
    pool: Any = ActorPool(actors)
    for number, arch in enumerate(archs):
        pool.submit(lambda actor, one: actor.judge.remote(*one), (number, arch.to_dict(), weights))
    try:
        while pool.has_next():
            yield pool.get_next_unordered(timeout=scale.data_timeout_s)
    except TimeoutError:
        raise RunFailed(
            f"no subnet was scored for {scale.data_timeout_s:g} s (scale.data_timeout_s): score on fewer samples, or "
            "wait longer"
        ) from None
    except exceptions.RayTaskError as error:
        raise failure_of(error) from error
    except exceptions.RayActorError as error:
        raise RunFailed(f"a judge of subnets died ({str(error).splitlines()[0]}): check its memory") from error
    finally:
        for actor in actors:
            ray.kill(actor)


class _Numbered:
    """A judge as an actor."""

    def __init__(self, *arguments: Any):
        torch.set_num_threads(int(os.environ[connection.THREADS]))
        self.of = Judge(*arguments)

    def judge(self, number: int, arch: dict[str, Any], weights: bool) -> tuple[int, Any]:
        net, metrics = self.of.try_out(arch)
        if not weights:
            return number, metrics
        tensors = {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
        return number, (metrics, safetensors.torch.save(tensors))


def _fetch(ref: Any) -> Batch:
    return Batch([ray.get(ref, timeout=300)])
