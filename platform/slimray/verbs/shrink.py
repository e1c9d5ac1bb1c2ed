"""`kind: shrink`: train a supernet by progressive shrinking (Once-for-All, arXiv 1908.09791), teacher included.

The first stage trains the largest subnet alone; it is the teacher of the following stages, each of which frees some
dimensions. A stage is a data-parallel training on the shared loop in a folder of its own, `stages/01-kernel`, which
starts from the weights of the stage before (with channels sorted by importance if `sort_channels` is set) and resumes
exactly; a finished stage is not repeated. After each stage a fixed sample of subnets is scored. The run's model folder
holds the supernet, which `search` reads.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from slimray import runs
from slimray.arch import Arch, Space
from slimray.data.cards import Card
from slimray.data.spec import DataSpec
from slimray.runs.notify import NotifySpec
from slimray.runs.tracking import TrackingSpec
from slimray.spec import RunFailed, Spec, UserError, did_you_mean
from slimray.train.spec import BatchSpec, CheckpointSpec, InitSpec, OptimSpec, ScaleSpec
from slimray.verbs import checks, inputs
from slimray.verbs.context import CheckContext, Context, Made, trained_on
from slimray.verbs.specs import JudgeSpec, ModelSpec, SharedOptimSpec, SweepSpec, TrainJob, WorkerJob

if TYPE_CHECKING:
    from slimray.train.config import FitConfig
    from slimray.verbs.stages import Data
    from slimray.verbs.subnets import Exhibits
    from slimray.verbs.trials import Tell

TUNED = ("lr", "warmup_epochs", "distill_weight", "subnets")  # fields that a sweep over a stage may change


class StageSpec(Spec):
    """A stage: the dimensions it frees, its duration and learning rate."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,30}$")
    """Name of the stage, part of the name of its folder."""
    free: dict[str, tuple[float, ...]] = {}
    """Dimension -> values that it may take from this stage on: `{kernel: [3, 5, 7]}`. The first stage frees nothing."""
    epochs: int = Field(ge=1)
    """Passes over the training split."""
    lr: float = Field(gt=0)
    """Learning rate for a batch of `optim.reference_batch`."""
    warmup_epochs: float = Field(0, ge=0)
    """Epochs over which the rate rises to its peak."""
    subnets: int = Field(1, ge=1, le=16)
    """Subnets per step, whose gradients are summed."""
    sandwich: bool = False
    """Always include the largest and the smallest subnet (needs `subnets: 2` or more)."""
    distill_weight: float = Field(1.0, ge=0)
    """Weight of the teacher's outputs in the loss, besides the labels."""
    sort_channels: bool = False
    """Sort channels by importance before the stage, so that narrow subnets keep the most important ones."""
    tune: SweepSpec | None = None
    """Train the stage several times with different settings; the next stage starts from the best trial. Trials are
    scored on the held-out samples if there are any, else on the validation split."""

    @model_validator(mode="after")
    def _tunes_what_is_there(self) -> "StageSpec":
        for name in self.tune.over if self.tune else ():
            if name not in TUNED:
                raise ValueError(f"tune.over: no field {name!r}: use one of {', '.join(TUNED)}")
        return self

    def with_settings(self, settings: Mapping[str, float]) -> "StageSpec":
        """Return the stage with other values; ValueError if they are not valid."""
        plain = self.model_dump(exclude={"tune"}) | dict(settings)
        return StageSpec.model_validate(plain | {"subnets": int(plain["subnets"])})


class ShrinkJob(WorkerJob):
    """Train a supernet by progressive shrinking."""

    kind: Literal["shrink"]
    name: str
    """Name of the run, a folder of the storage."""
    data: DataSpec
    model: ModelSpec
    init: InitSpec | None = None
    """Weights of the largest subnet to start the first stage from."""
    batch: BatchSpec
    optim: SharedOptimSpec
    """Optimizer settings of all stages."""
    stages: tuple[StageSpec, ...] = Field(min_length=2)
    """The stages: first the teacher, then those that free dimensions, in order."""
    hold_out: int = Field(0, ge=0)
    """Training samples held out of training, on which `search` scores subnets, so that the test split is used once."""
    judge: JudgeSpec = JudgeSpec.model_validate({})
    judged: int = Field(6, ge=2, le=64)
    """Subnets to score after each stage: the largest, the smallest, and random ones of the whole space."""
    scale: ScaleSpec = ScaleSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    tracking: TrackingSpec = TrackingSpec()
    notify: NotifySpec | None = None
    seed: int = Field(0, ge=0)
    """Seed of order, augmentation, dropout, starting weights and the choice of subnets."""
    log_every: int = Field(10, ge=1)
    """Steps between metric rows."""

    @model_validator(mode="after")
    def _stages_fit(self) -> "ShrinkJob":
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError("stages: two have the same name")
        if self.stages[0].free:
            raise ValueError(f"stages.{names[0]}.free: the first stage trains the largest subnet and frees nothing")
        for stage in self.stages:
            if stage.sandwich and stage.subnets < 2:
                raise ValueError(f"stages.{stage.name}.sandwich: needs subnets: 2 or more")
            if stage is not self.stages[0] and not stage.free:
                raise ValueError(f"stages.{stage.name}.free: frees nothing: name a dimension, or leave the stage out")
        return self


def stage_job(job: ShrinkJob, number: int, init: InitSpec | None) -> TrainJob:
    """Return stage `number` of `job` as a training job."""
    stage = job.stages[number]
    own = {"epochs": stage.epochs, "lr": stage.lr, "warmup_epochs": stage.warmup_epochs}
    optim = job.optim.model_dump(exclude={"milestones"}) | own
    if number:
        optim |= {"zero_gamma": False}
    document = {
        "kind": "train",
        "name": job.name,
        "data": job.data,
        "model": job.model,
        "init": init,
        "batch": job.batch,
        "optim": OptimSpec.model_validate(optim),
        "scale": job.scale.model_dump(),
        "checkpoint": job.checkpoint,
        "tracking": job.tracking,
        "seed": job.seed + number,
        "log_every": job.log_every,
        "val_every": stage.epochs if number else max(1, stage.epochs // 10),
    }
    return TrainJob.model_validate(document)


def spaces(job: ShrinkJob, space: Space) -> list[Space]:
    """Return the space of each stage, freed from `space` by the stages so far; UserError for values not in `space`."""
    known = {name: {value for gene in genes for value in gene} for name, genes in space.choices}
    allowed: dict[str, tuple] = {name: (max(values),) for name, values in known.items()}
    for name in space.input_names:
        allowed.pop(name, None)  # free from the start, as published
    out = []
    for stage in job.stages:
        for name, values in stage.free.items():
            if name not in known:
                raise UserError(f"stages.{stage.name}.free: no dimension {name!r}{did_you_mean(name, known)}")
            for value in values:
                if value not in known[name]:
                    listed = ", ".join(f"{one:g}" for one in sorted(known[name]))
                    raise UserError(f"stages.{stage.name}.free.{name}: {value:g} is not one of {listed}")
            allowed[name] = values
        first = stage is job.stages[0]
        inputs = {n: (max(known[n]),) for n in space.input_names} if first else {}
        out.append(space.restrict(**allowed, **inputs))
    return out


Job = ShrinkJob


def check(job: ShrinkJob, ctx: CheckContext) -> dict[str, Any]:
    """Return what is known of the first stage, the number of archs of each stage, and the steps of all of them."""
    from slimray.verbs import networks

    def known(card: Card | None, num_train: int | None) -> dict[str, Any]:
        there = networks.with_network_if_there(job, ctx, card)
        if there is None:
            return {"model": f"that of {job.model.run}"}
        return overview(there, card, num_train)

    return checks.check_training(job, ctx, known)


def makes(job: ShrinkJob) -> dict[str, Made]:
    """Return the supernet that is trained."""
    return {job.name: trained_on(job.data, "supernet", job.hold_out)}


def overview(job: ShrinkJob, card: Card | None, num_train: int | None) -> dict[str, Any]:
    """Return what is known before the job runs; UserError for settings that do not fit together."""
    from slimray.edge import cost
    from slimray.verbs import networks

    out = networks.summary(stage_job(job, 0, job.init), card, num_train).to_plain()
    net = _on_meta(job, card)
    side = net.space.input_of(net.space.largest(), "side")
    if side is not None and job.data.size != side:
        raise UserError(f"data.size: must be {side:g}, the largest resolution of the space (got {job.data.size})")
    steps = 0
    for number, space in enumerate(spaces(job, net.space)):
        steps += networks.summary(stage_job(job, number, None), card, num_train).steps or 0
        out[f"archs of {job.stages[number].name}"] = space.num_archs()
    if num_train is not None:
        if job.hold_out >= num_train:
            raise UserError(f"hold_out: {job.hold_out} of {num_train} training samples leave none to train on")
        out["steps"] = steps
    smallest = net.space.smallest()
    out["smallest_params"] = cost.count_params(cost.build_on_meta(lambda: net.extract(smallest)))
    return out


def _on_meta(job: ShrinkJob, card: Card | None) -> Any:
    from slimray import models
    from slimray.edge import cost
    from slimray.verbs import networks

    options = networks.model_options(stage_job(job, 0, None), card)
    if not models.is_supernet(options):
        rows = ", ".join(name for name, row in models.MODELS.items() if row.supernet)
        field = "run" if job.model.run else "name"
        raise UserError(f"model.{field}: {options['name']} is not a supernet: use one of {rows}")
    return cost.build_on_meta(lambda: models.build(**options))


def sample_archs(space: Space, count: int, seed: int) -> list[Arch]:
    """Return the subnets to score after every stage: largest, smallest and random ones, all at the largest input."""
    rng = random.Random(f"judged-{seed}")
    inputs = {name: space.largest()[name] for name in space.input_names}
    archs = [space.largest(), space.smallest().replace(**inputs)]
    while len(archs) < count:
        archs.append(space.sample(rng).replace(**inputs))
    return archs


@dataclass(frozen=True)
class _Shrinking:
    """A shrink run in progress: its data, held-out samples (`out`), supernet, and the archs scored after each stage."""

    job: ShrinkJob
    ctx: Context
    data: "Data"
    out: pa.Table | None
    net: Any
    archs: tuple[Arch, ...]


def run(job: ShrinkJob, ctx: Context) -> None:
    """Train `job` in the run folder `ctx.run`, stage by stage."""
    from slimray.report import pages
    from slimray.verbs import networks, stages, subnets

    job = networks.with_network(job, ctx.storage, ctx.run)
    splits = inputs.open_splits(job.data, ctx.where, ctx.storage, checks.split_names(job.data))
    kept, out = subnets.hold_out(splits.tables[job.data.train], job.hold_out, job.seed)
    net = _on_meta(job, splits.card)
    at_once = max((stage.tune.concurrent for stage in job.stages if stage.tune), default=0)
    stages.connect(job.scale, ctx.cpus, at_once)
    data = stages.Data.of(splits, {job.data.train: kept})
    work = _Shrinking(job, ctx, data, out, net, tuple(sample_archs(net.space, job.judged, job.seed)))
    exhibits: Exhibits | None = None
    done: list[dict[str, Any]] = []
    previous: runs.Run | None = None
    for number, space in enumerate(spaces(job, net.space)):
        stage = _train_stage(work, number, space, previous)
        if not runs.exists(stage, "results.json"):
            exhibits = exhibits or _exhibits(work, stage)
            _judge_stage(work, stage, exhibits)
        done.append({"stage": job.stages[number].name, **json.loads(runs.read_file(stage, "results.json"))})
        if job.stages[number].tune:
            done[-1]["trials"] = json.loads(runs.read_file(stage, "data/sweep.json"))
        previous = stage
    assert previous is not None
    weights, model, input_json = runs.read_model(previous)
    runs.write_model(ctx.run, weights, model, input_json)
    if out is not None:
        sink = pa.BufferOutputStream()
        pq.write_table(out, sink)
        runs.write_file(ctx.run, "data/held_out.parquet", sink.getvalue().to_pybytes())
    metric = subnets.metric_of(input_json)
    last = {
        f"{which}_{metric}": row[metric] for which, row in zip(("largest", "smallest"), done[-1]["rows"], strict=False)
    }
    card = {"metrics": {"last": last}, "dataset": data.description}
    ctx.finish(
        card | {"archs": net.space.num_archs()},
        {"stages": done, "metric": metric, "metrics": [subnets.best_of(input_json).to_plain()]},
    )
    runs.write_report(ctx.run, pages.shrink_report(ctx.run))


def _train_stage(work: _Shrinking, number: int, space: Space, previous: runs.Run | None) -> runs.Run:
    """Train one stage in its own folder, or resume it; if it is tuned, several times with different settings."""
    from slimray.train.methods.supernet import Supernet
    from slimray.verbs import stages

    job, ctx, spec = work.job, work.ctx, work.job.stages[number]
    folder = f"{number:02d}-{spec.name}"
    stage = runs.run_at(f"{ctx.run.uri}/stages/{folder}")
    init = job.init
    if previous is not None and not stages.is_finished(stage):
        start = f"{stage.uri}/data/start.safetensors"
        if not runs.exists(stage, "data/start.safetensors"):
            freed = {name: values for one in job.stages[:number] for name, values in one.free.items()}
            runs.write_file(
                stage, "data/start.safetensors", _start_weights(previous, freed if spec.sort_channels else None)
            )
        init = InitSpec.model_validate({"from": start})
    teacher = f"{ctx.run.uri}/stages/00-{job.stages[0].name}" if number else None
    method = Supernet(space, spec.subnets, spec.sandwich, spec.distill_weight, teacher)

    def change(config: "FitConfig") -> "FitConfig":
        # once smaller subnets are trained, scores mean nothing before recalibration, which the judge does
        sources = {"train": config.sources["train"]} if number else config.sources
        return replace(config, method=method, sources=sources)

    title = f"{job.name}: {spec.name} ({number + 1} of {len(job.stages)})"
    sweep = partial(_sweep, work, number, stage, title) if spec.tune is not None else None
    return stages.train_stage(ctx, folder, stage_job(job, number, init), work.data, title, change, work=sweep)


def _sweep(work: _Shrinking, number: int, stage: runs.Run, title: str, config: "FitConfig") -> None:
    """Train a stage with the settings of its sweep; the model of the best trial becomes the model of the stage."""
    from slimray.verbs import subnets, trials

    job, spec = work.job, work.job.stages[number]
    assert spec.tune is not None
    work.ctx.console.print(f"{title}: {spec.tune.count} trials", highlight=False)
    recipe, tables = config.recipes["train"], work.data.tables
    score = tables[job.data.val or job.data.train]
    if work.out is not None:
        score = subnets.put_table(work.data.splits.root, work.out)
    scored = (score, config.recipes.get("val") or recipe | {"mode": "val"})
    train = (tables[job.data.train], recipe)
    exhibits = subnets.make_exhibits(job.judge, train, scored, job.seed, job.data.decode_timeout_s)
    judged = work.archs[:1] if number == 0 else work.archs
    trial = partial(_trial, job, number, config, exhibits, judged)
    records = trials.sweep(spec.tune, stage, trial, spec.epochs, job.seed)
    runs.write_model(stage, *runs.read_model(runs.run_at(records[0]["uri"])))
    runs.write_file(stage, "data/sweep.json", json.dumps(records).encode())
    settings = ", ".join(f"{name} {value:g}" for name, value in records[0]["settings"].items())
    work.ctx.console.print(f"{title}: best with {settings}: {abs(records[0]['score']):.1f}", highlight=False)


def _trial(
    job: ShrinkJob,
    number: int,
    base: "FitConfig",
    exhibits: "Exhibits",
    archs: Sequence[Arch],
    settings: dict[str, float],
    uri: str,
    tell: "Tell",
) -> dict[str, Any]:
    """Train stage `number` with `settings` in the run `uri`, or resume it, and score it. Runs in a trial's process."""
    from slimray.train import loop, workers
    from slimray.verbs import stages, subnets, trials

    run, stage = runs.run_at(uri), job.stages[number].with_settings(settings)
    changed = job.model_copy(update={"stages": (*job.stages[:number], stage, *job.stages[number + 1 :])})
    as_training = stage_job(changed, number, None)
    if not stages.is_finished(run):
        status = runs.read_status(run)
        attempt = 1 if status is None else status.attempt + 1
        runs.begin(run, as_training.model_dump(mode="json"), attempt)
        method = replace(cast(Any, base.method), count=stage.subnets, distill_weight=stage.distill_weight)
        optim = as_training.optim.model_copy(update={"class_weights": base.optim.class_weights})
        actor = workers.make_progress_actor()
        plain = as_training.model_dump(mode="json")
        config = replace(
            base, run_uri=uri, attempt=attempt, optim=optim, method=method, job=plain, progress_actor=actor
        )
        trials.watch_losses(actor, tell, lambda: workers.launch(loop.fit, config, job.scale, run.name, actor))
        runs.end(run, "finished")
    _, _, input_json = runs.read_model(run)
    metric, judge = subnets.best_of(input_json), subnets.Judge(uri, exhibits, job.judge)
    tune = job.stages[number].tune
    chosen = {"largest": archs[:1], "smallest": archs[min(1, len(archs) - 1) :][:1]}
    scores = [
        metric.sign * judge.score(arch.to_dict())[metric.name]
        for arch in chosen.get(tune.by if tune else "mean", archs)
    ]
    return {"score": sum(scores) / len(scores), "scores": scores}


def _start_weights(previous: runs.Run, freed: Mapping[str, Sequence[float]] | None) -> bytes:
    """Return the weights of the previous stage, with channels sorted by importance if `freed` names the dimensions
    freed so far."""
    weights, model, _ = runs.read_model(previous)
    if freed is None:
        return weights
    import safetensors.torch

    from slimray import models
    from slimray.models.supernets.elastic import sort_channels

    net = models.build(**models.stored(model))
    net.load_state_dict(safetensors.torch.load(weights))
    sort_channels(net, freed)
    return safetensors.torch.save({name: value.contiguous() for name, value in net.state_dict().items()})


def _exhibits(work: _Shrinking, stage: runs.Run) -> "Exhibits":
    """Return training samples for recalibration and validation samples for scoring, decoded once."""
    from slimray.verbs import subnets

    job, tables = work.job, work.data.tables
    _, _, input_json = runs.read_model(stage)
    train = (tables[job.data.train], input_json["recipe"] | {"mode": "train"})
    score = (tables[job.data.val or job.data.train], input_json["recipe"])
    return subnets.make_exhibits(job.judge, train, score, job.seed, job.data.decode_timeout_s)


def _judge_stage(work: _Shrinking, stage: runs.Run, exhibits: "Exhibits") -> None:
    """Score the sample of subnets with the weights of a stage and write `results.json`."""
    from slimray.edge import cost
    from slimray.verbs import subnets

    job, archs, net = work.job, work.archs, work.net
    rows: list[dict[str, Any]] = [{} for _ in archs]
    for number, metrics in subnets.judge_all(stage.uri, exhibits, job.judge, archs, job.scale):
        rows[number] = {"arch": archs[number].to_dict(), **metrics}
    if not all(row.get("num_samples") for row in rows):
        raise RunFailed("no sample of the validation split decodes: see quarantine/ in the run folder")
    names = ["largest", "smallest", *(f"sample {number}" for number in range(1, len(archs) - 1))]
    for name, row, arch in zip(names, rows, archs, strict=True):
        row |= {"subnet": name, "params": cost.count_params(cost.build_on_meta(lambda arch=arch: net.extract(arch)))}
    runs.write_file(stage, "results.json", json.dumps({"rows": rows}).encode())
    metric = subnets.metric_of(runs.read_model(stage)[2])
    text = ", ".join(f"{row['subnet']} {row[metric]:.1f}" for row in rows)
    work.ctx.console.print(f"{job.name}: {stage.uri.rpartition('/')[2]}: {metric} {text}", highlight=False)
