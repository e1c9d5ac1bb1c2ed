"""Code that the steps of `compress` share: `Work`, the stage folders, scoring, timing, and the rows of the table.

A step reads the finished stage before it and writes a stage that is a run: its model folder holds the network with the
records of all steps so far, so that every verb can read it. Imports Ray.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import safetensors.torch
import torch
from ray import exceptions
from torch import nn

from slimray import compress, runs
from slimray.compress import sharing, sparsity
from slimray.data.modalities import MODALITIES, input_shape
from slimray.data.pipeline import Source, failure_of
from slimray.data.spec import DataSpec
from slimray.edge import comparing, cost
from slimray.models import published
from slimray.spec import UserError, located
from slimray.tasks import task_of_card
from slimray.tasks.network import Input, load_network
from slimray.train import connection
from slimray.train.spec import InitSpec, OptimSpec, TeacherSpec
from slimray.verbs import inputs, networks, stages, subnets
from slimray.verbs.compress_specs import CompressJob, TrainedSpec
from slimray.verbs.context import Context
from slimray.verbs.specs import ModelSpec, TrainJob

ORIGINAL = "00-original"


@dataclass(frozen=True)
class Work:
    """A compression in progress: its job, its dataset, and the samples held out of training, if any."""

    job: CompressJob
    ctx: Context
    spec: DataSpec
    data: stages.Data
    held_out: Source | None

    def stage(self, folder: str) -> runs.Run:
        """Return the folder of a step, `stages/FOLDER` of the run."""
        return runs.run_at(f"{self.ctx.run.uri}/stages/{folder}")

    @property
    def original(self) -> runs.Run:
        """The stage with the uncompressed network, a run."""
        return self.stage(ORIGINAL)

    def write(self, folder: str, step: Mapping[str, Any], make: Callable[[runs.Run], None]) -> runs.Run:
        """Call `make` to write the model of a step that does not train, unless that is finished; return its folder."""
        stage = self.stage(folder)
        if not stages.is_finished(stage):
            document = {"kind": "step", "name": f"{self.ctx.run.name}-{folder}", **step}
            runs.begin(
                stage, document | {"data": self.spec.model_dump(mode="json", by_alias=True)}, self._attempt(stage)
            )
            make(stage)
            runs.end(stage, "finished")
        return stage

    def _attempt(self, stage: runs.Run) -> int:
        status = runs.read_status(stage) if runs.exists(stage, "status.json") else None
        return max(self.ctx.attempt, 1 if status is None else status.attempt + 1)

    def train(
        self, folder: str, step: TrainedSpec, before: runs.Run, change: Callable[[Any], Any], title: str = ""
    ) -> runs.Run:
        """Train the network of the stage `before` with the settings of `step`; return the folder of the new stage.

        `change` sets the training method in the config.
        """
        job = training(self.job, self.spec, step, before, self.original, self.ctx.storage)
        where = f"{self.ctx.run.name}: {title or folder}"
        stage = stages.train_stage(self.ctx, folder, job, self.data, where, change)
        return stage

    # --------------------------------------------------------------------------------- scoring on a worker

    @functools.cached_property
    def judged(self) -> tuple[Any, ...]:
        """Decoded samples on which steps make choices: those held out, else those of the validation split."""
        return self.exhibits if self.held_out is None else self._decode(self.held_out)

    @functools.cached_property
    def exhibits(self) -> tuple[Any, ...]:
        """Decoded samples of the validation split, for the table."""
        return self._decode(self.data.tables[self.spec.val or self.spec.train])

    def _decode(self, source: Source) -> tuple[Any, ...]:
        recipe = runs.read_model(self.original)[2]["recipe"]
        count = min(self.job.judge.samples or source.num_samples, source.num_samples)
        return subnets.decode(source, recipe, count, self.job.seed, False, self.spec.decode_timeout_s)

    def judge(self, stage: runs.Run, samples: tuple[Any, ...]) -> dict[str, float]:
        """Return the metrics of the network of `stage` on decoded `samples`."""
        return self.on_worker(_score, stage.uri, subnets.Exhibits((), samples), self.job.judge)

    def on_worker(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(device, *arguments)`, called in a process with the resources of a worker of `scale`.

        An error there is raised here as RunFailed, StorageError or UserError with one sentence.
        """
        scale = self.job.scale
        resources = {"num_cpus": scale.cpus_per_worker, "num_gpus": scale.gpus_per_worker}
        task: Any = ray.remote(_called).options(**resources, runtime_env=connection.environment(scale))
        try:
            return ray.get(task.remote(function, "cuda" if scale.gpus_per_worker else "cpu", arguments))
        except exceptions.RayTaskError as error:
            raise failure_of(error) from error

    @property
    def metric(self) -> str:
        """The first metric of the task."""
        return subnets.metric_of(runs.read_model(self.original)[2])


def _called(function: Callable[..., Any], device: str, arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(int(os.environ[connection.THREADS]))
    return function(device, *arguments)


def _score(device: str, uri: str, exhibits: subnets.Exhibits, spec: Any) -> dict[str, float]:
    judge = subnets.Judge(uri, exhibits, spec, device)
    return judge.metrics_of(judge.network.net)


# --------------------------------------------------------------------------------------------------- networks


def read_network(stage: runs.Run) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Return the network of a stage in eval mode, and the contents of its model.json and input.json."""
    _, model, input_json = runs.read_model(stage)
    return load_network(stage).net, model, input_json


def write_network(
    stage: runs.Run,
    net: nn.Module,
    model: Mapping[str, Any],
    input_json: Mapping[str, Any],
    *records: Mapping[str, Any],
) -> None:
    """Write `net` as the model of a stage, and append `records` of compression steps to those of `model`."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    whole = {**model, "compression": [*model.get("compression", []), *records]}
    runs.write_model(stage, safetensors.torch.save(tensors), whole, input_json)


def write_original(work: Work) -> runs.Run:
    """Write the network to compress, from a run or published weights, as the first stage; return the stage."""

    def make(stage: runs.Run) -> None:
        job, where = work.job, work.ctx.where
        if job.model.run is not None:
            found = inputs.finished_run(job.model.run, work.ctx.storage, ("network",), f"{where}: model.run")
            runs.write_model(stage, *runs.read_model(found))
            return
        assert job.init is not None
        card = work.data.splits.card
        as_training = training(job, work.spec, None, None, None, work.ctx.storage)
        model = networks.model_options(as_training, card)
        net = compress.build(**model)
        try:
            path = runs.weights_source(job.init.source, work.ctx.storage, job.init.sha256)
            report = published.load(net, path, exclude=job.init.exclude)
        except UserError as error:
            raise UserError(located(str(error), f"{where}: init.from")) from None
        work.ctx.console.print(f"{job.name}: {report}", highlight=False, markup=False, soft_wrap=True)
        sides = networks.summary(as_training, card, None).sides
        segments = sides[0] if MODALITIES[card.sample].segmented else 0
        input_json = {
            "recipe": inputs.make_recipe(work.spec, card, segments, "val"),
            "pixels": vars(Input.of_channels(card.channels)),
            "classes": card.class_names(),
            "task": task_of_card(card).name,
        }
        write_network(stage, net, model, input_json)

    return work.write(ORIGINAL, {"step": "original"}, make)


def training(
    job: CompressJob,
    data: DataSpec,
    step: TrainedSpec | None,
    before: runs.Run | None,
    original: runs.Run | None,
    storage: str,
) -> TrainJob:
    """Return a step that trains as a training job that starts from the network of the stage `before`.

    Without `step` and `before`, it is a training of the job's network, for checks and counts only.
    """
    optim: dict[str, Any] = {"lr": 1.0, "reference_batch": 1, "epochs": 1}
    document: dict[str, Any] = {
        "kind": "train",
        "name": job.name,
        "data": data,
        "model": job.model,
        "batch": job.batch or {"total": job.scale.most, "per_worker": 1},
        "scale": job.scale.model_dump(),
        "checkpoint": job.checkpoint,
        "tracking": job.tracking,
        "seed": job.seed,
        "log_every": job.log_every,
    }
    if step is not None and job.optim is not None:
        optim = job.optim.model_dump(exclude={"milestones"})
        optim |= {"epochs": step.epochs, "lr": step.lr, "warmup_epochs": step.warmup_epochs, "zero_gamma": False}
        document["val_every"] = max(1, step.epochs // 5)
    document["optim"] = OptimSpec.model_validate(optim)
    if step is not None and step.teacher is not None and original is not None:
        told = step.teacher.model_dump() | {"run": step.teacher.run or original.uri}
        document["teacher"] = TeacherSpec.model_validate(told)
    if before is not None:
        document["model"] = ModelSpec.model_validate({"run": before.uri})
        document["init"] = InitSpec.model_validate({"from": f"{before.uri}/model/weights.safetensors"})
    found = networks.with_network(TrainJob.model_validate(document), storage)
    if before is None:
        return found
    records = runs.read_model(before)[1].get("compression", [])
    model = {**found.model.model_dump(), "compression": records}  # all: this training keeps zeros and centroids
    return found.model_copy(update={"model": ModelSpec.model_validate(model)})


# ------------------------------------------------------------------------------------------------ the table


def finish(work: Work, stage: runs.Run, step: str, details: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Score, count and time the network of a stage; write the results with its row to results.json and return them."""
    net, model, input_json = read_network(stage)
    shape = input_shape(input_json["recipe"])
    counts = sparsity.density(net)
    row: dict[str, Any] = {"run": stage.uri.rpartition("/")[2], "step": step}
    row |= work.judge(stage, work.exhibits)
    row |= {
        "weights": sum(total for _, total in counts.values()),
        "kept": sum(kept for kept, _ in counts.values()),
        "params": cost.count_params(net),
        "macs": cost.count_macs(net, (1, *shape)),
        "bytes": size_of(stage),
        "seconds": round(seconds, 1),
    }
    row |= timed(work, net, shape)
    layers = {name: {"kept": kept, "weights": total} for name, (kept, total) in counts.items()}
    records = model.get("compression", [])
    whole = {"row": row, "layers": layers, "details": dict(details), "records": records}
    if shared := [one["bits"] for one in records if one["step"] == "share"][-1:]:
        whole["codebooks"] = sharing.codebooks(net, shared[0])
    runs.write_file(stage, "results.json", json.dumps(whole).encode())
    return whole


def size_of(stage: runs.Run) -> int:
    """Return the size in bytes of the file that a stage would ship: `model.slim` if it has one, else its weights."""
    name = "model/model.slim" if runs.exists(stage, "model/model.slim") else "model/weights.safetensors"
    return len(runs.read_file(stage, name))


def timed(work: Work, net: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the latency of `net` and its speedup over the original with its interval; {} if timing is off."""
    spec = work.job.timing
    if spec is None:
        return {}
    torch.manual_seed(0)
    x = torch.randn(spec.batch, *shape)
    first = load_network(work.original).net
    found = comparing.compare(first, net, x, spec.hardware, spec.threads, spec.pairs)
    return {
        "latency_ms": found["second_ms"],
        "speedup": found["ratio"],
        "speedup_low": found["low"],
        "speedup_high": found["high"],
    }


def verdict(row: Mapping[str, Any]) -> str:
    """Return a sentence comparing the speed of the network of a row with the original; "" if it was not timed."""
    if "speedup" not in row:
        return ""
    ratio = f"{row['speedup']:.2f} times as fast [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"
    if row["speedup_low"] > 1:
        return f"it runs {ratio} on this machine"
    if row["speedup_high"] < 1:
        return f"it is SLOWER than the original on this machine: {ratio}"
    return f"it is not faster than the original on this machine: {ratio}"
