"""A training in a run folder: build the config of its workers, start them, and mark the run as finished.

`train` is one such training; `shrink`, `proxyless` and `compress` have one per stage, with a method of its own, in a
folder of its own that resumes exactly. A finished stage is not trained again. Imports Ray.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray

from slimray import runs
from slimray.data.modalities import MODALITIES
from slimray.data.pipeline import Source
from slimray.data.plan import Phase, ceil_div
from slimray.data.token_plan import Bags
from slimray.tasks import task_of_card
from slimray.tasks.network import Input
from slimray.train import learn, loop, workers
from slimray.train.methods.distilled import Distilled
from slimray.train.methods.hebbian import Hebbian
from slimray.train.methods.method import Method
from slimray.train.methods.mutual import Mutual
from slimray.train.methods.plain import Plain
from slimray.train.planner import Summary
from slimray.train.progress import follow
from slimray.train.spec import InitSpec, OptimSpec, ScaleSpec, TeacherSpec
from slimray.verbs import networks
from slimray.verbs.context import Context
from slimray.verbs.inputs import Splits, make_recipe, root_of
from slimray.verbs.specs import TrainJob


@dataclass(frozen=True)
class Data:
    """A dataset with its indexes in the object store, by split."""

    splits: Splits
    tables: Mapping[str, Source]

    @classmethod
    def of(cls, splits: Splits, changed: Mapping[str, pa.Table] | None = None) -> "Data":
        """Put the indexes of `splits` into the object store; `changed` replaces the indexes of some splits."""
        splits = Splits(splits.root, splits.card, {**splits.tables, **(changed or {})})
        tables = {name: Source(splits.root, ray.put(table), table.num_rows) for name, table in splits.tables.items()}
        return cls(splits, tables)

    @property
    def description(self) -> dict[str, str]:
        """Name and fingerprint, for the card of a run."""
        return {"name": self.splits.card.name, "fingerprint": self.splits.fingerprint}


def connect(scale: ScaleSpec, cpus: int, at_once: int = 0) -> None:
    """Join the cluster, or start one with at least `cpus` logical CPUs, and enough for `at_once` trainings in trials.

    UserError if the workers of `scale` can never be placed.
    """
    workers.connect(max(cpus, at_once * scale.local_cpus + min(1, at_once)))
    workers.require(scale, workers.decode_slots(scale))


def is_finished(run: runs.Run) -> bool:
    """Return True if the training in the folder `run` has finished."""
    status = runs.read_status(run) if runs.exists(run, "status.json") else None
    return status is not None and status.state == "finished"


def config_of(job: TrainJob, ctx: Context, stage: runs.Run, data: Data) -> tuple[loop.FitConfig, Summary]:
    """Return the config of the workers that train `job` in the folder `stage`, and the summary of the training.

    UserError if the network does not fit the data.
    """
    summary = networks.summary(job, data.splits.card, data.splits.tables[job.data.train].num_rows)
    return fit_config(job, ctx, stage.uri, data, summary), summary


def train_stage(
    ctx: Context,
    folder: str,
    job: TrainJob,
    data: Data,
    title: str,
    change: Callable[[loop.FitConfig], loop.FitConfig] = lambda config: config,
    keep_metrics: bool = False,
    work: Callable[[loop.FitConfig], Any] | None = None,
) -> runs.Run:
    """Train `job` in the folder `stages/FOLDER` of the run, or resume it, unless it has finished; return the folder.

    `change` sets the training method in the config. `keep_metrics` writes `results.json` with the metrics, best and
    last. With `work`, that is called in place of one training.
    """
    stage = runs.run_at(f"{ctx.run.uri}/stages/{folder}")
    if is_finished(stage):
        return stage
    if not runs.exists(stage, "status.json"):
        runs.begin(stage, job.model_dump(mode="json"), ctx.attempt)
    ahead = workers.Ahead() if work is not None else workers.start_ahead(job.scale)
    config = replace(change(config_of(job, ctx, stage, data)[0]), feeder=ahead.feeder)
    if work is not None:
        work(config)
    else:
        with follow(config.progress_actor, title, ctx.console, ctx.tell):
            result = workers.launch(loop.fit, config, job.scale, job.name, config.progress_actor)
        if keep_metrics:
            metrics = {"best": result["best"], "last": result["last"]}
            runs.write_file(stage, "results.json", json.dumps(metrics).encode())
    runs.end(stage, "finished")
    return stage


def resolve_weights(optim: OptimSpec, table: Any, num_classes: int) -> OptimSpec:
    """Return `optim` with class weights as numbers: `balanced` is counted in the labels of the training index."""
    if optim.class_weights != "balanced":
        return optim
    weights = learn.balanced_weights(table.column("label").to_numpy().copy(), num_classes)
    return optim.model_copy(update={"class_weights": weights})


def fit_config(job: TrainJob, ctx: Context, run_uri: str, data: Data, summary: Summary) -> loop.FitConfig:
    """Return the config of the workers that train `job` in the run at `run_uri`; `summary` is from `networks`."""
    splits = data.splits
    segments = summary.sides[0] if MODALITIES[splits.card.sample].segmented else 0
    names = {"train": job.data.train} | ({"val": job.data.val} if job.data.val else {})
    root = root_of(splits, job.data)
    config = loop.FitConfig(
        run_uri=run_uri,
        attempt=ctx.attempt,
        model=networks.model_options(job, splits.card),
        init=None if job.init is None else job.init.model_dump(by_alias=True) | {"from": _start(job.init, ctx)},
        optim=resolve_weights(job.optim, splits.tables[job.data.train], splits.card.num_classes),
        batch_total=job.batch.size,
        per_worker=job.batch.microbatch,
        scale=job.scale,
        checkpoint=job.checkpoint,
        tracking=job.tracking,
        task=task_of_card(splits.card).name,
        pixels=Input.of_channels(splits.card.channels, job.average),
        classes=tuple(splits.card.class_names()),
        dataset=splits.fingerprint,
        sources={role: replace(data.tables[name], root=root) for role, name in names.items()},
        recipes={role: make_recipe(job.data, splits.card, segments, role) for role in names},
        decode_slots=workers.decode_slots(job.scale),
        decode_timeout_s=job.data.decode_timeout_s,
        max_bad_fraction=job.data.max_bad_fraction,
        seed=job.seed,
        log_every=job.log_every,
        val_every=job.val_every,
        macs=summary.counted[1],
        record_samples=job.data.record_samples,
        job=job.model_dump(mode="json"),
        progress_actor=workers.make_progress_actor(),
        method=_method(job, ctx),
        drop_last=job.batch.drop_last,
        limits=job.limits,
        compile=job.scale.compile,
        bags=_bags(job, {role: splits.tables[name] for role, name in names.items()}),
    )
    return replace(config, optim=with_epochs(config))


def with_epochs(config: loop.FitConfig) -> OptimSpec:
    """Return the optimizer's section; if it gives `steps`, with the number of epochs that they take."""
    optim = config.optim
    if optim.steps is None:
        return optim
    numbers = (0, config.sources["train"].num_samples, config.window)
    whole = Phase("train", "train", *numbers, True, {}, drop_last=config.drop_last, bags=config.bags.get("train"))
    return optim.model_copy(update={"epochs": ceil_div(optim.steps, max(1, whole.num_steps))})


def _bags(job: TrainJob, tables: Mapping[str, pa.Table]) -> dict[str, Bags]:
    """Return the bags of each split; {} where batches are counted in samples."""
    most = job.batch.per_worker_tokens
    if most is None:
        return {}
    return {role: Bags.of(table.column("frames").to_numpy(), most, job.seed) for role, table in tables.items()}


def _method(job: TrainJob, ctx: Context) -> Method:
    """Return the training method of `job`."""
    if job.teacher is not None:
        spec = TeacherSpec.model_validate({"run": job.teacher}) if isinstance(job.teacher, str) else job.teacher
        teacher = runs.find_run(spec.run, ctx.storage)
        return Distilled(teacher.uri, spec.weight, spec.labels, spec.temperature)
    if job.optim.hebbian:
        return Hebbian(job.optim.hebbian)
    return Mutual(job.optim.mutual) if job.optim.mutual else Plain()


def _start(init: InitSpec, ctx: Context) -> str:
    """Return the file of `init.from`: the file itself, or the weights of a run; its digest is checked if given."""
    return runs.weights_source(init.source, ctx.storage, init.sha256, ctx.run)
