"""`kind: train`: a network trained on a split, data-parallel on Ray Train, resumed exactly wherever it stopped.

Reads a dataset (a card with its root, or a finished `prepare` run), writes a run folder with checkpoints, metrics, the
model and a report. TSM: arXiv 1811.08383; linear scaling with warm-up: arXiv 1706.02677, at scale: arXiv 1910.00932.
"""

from typing import Any, Literal

import ray
from pydantic import ConfigDict, Field, model_validator

from slimray import learn, loop, models, report, runs, workers
from slimray.data.cards import Card
from slimray.data.pipeline import Source
from slimray.data.plan import ceil_div
from slimray.edge import cost
from slimray.jobs.inputs import DataSpec, Splits, make_recipe, open_splits
from slimray.predict import Input
from slimray.progress import follow
from slimray.spec import Spec
from slimray.tracking import TrackingSpec


class ModelSpec(Spec):
    """The network: its `name` in the MODELS table and the options of that row (`width`, `num_segments`, ...)."""

    model_config = ConfigDict(extra="allow")

    name: str
    """Row of the table of models; `slimray explain models` lists them."""

    def options(self) -> dict[str, Any]:
        """All that is written beside the name."""
        return dict(self.model_extra or {})


class BatchSpec(Spec):
    """The global batch; accumulation is total / (workers x per_worker) and must divide."""

    total: int = Field(ge=1)
    """Samples per optimizer step over all workers; the learning rate depends on it."""
    per_worker: int = Field(ge=1)
    """Samples a worker handles at once (a microbatch)."""


class InitSpec(Spec):
    """Where the weights start from. A head of another class count is left out, with a word."""

    model_config = ConfigDict(populate_by_name=True)

    source: str = Field(alias="from")
    """A checkpoint file (TSM, torchvision, safetensors), or the name or URI of a run."""
    exclude: tuple[str, ...] = ()
    """Prefixes of names that are not loaded."""
    freeze: tuple[str, ...] = ()
    """Prefixes of parameters that are not trained."""
    sha256: str | None = None
    """Digest the file must have."""


class TrainJob(Spec):
    """Train a network on a dataset."""

    kind: Literal["train"]
    name: str
    """Name of the run, a folder of the storage."""
    data: DataSpec
    model: ModelSpec
    init: InitSpec | None = None
    batch: BatchSpec
    optim: learn.OptimSpec
    scale: workers.ScaleSpec = workers.ScaleSpec()
    checkpoint: loop.CheckpointSpec = loop.CheckpointSpec()
    tracking: TrackingSpec = TrackingSpec()
    average: Literal["logits", "prob"] = "logits"
    """How the views of a validation sample become one score."""
    seed: int = Field(0, ge=0)
    """Seed of order, augmentation, dropout and starting weights."""
    log_every: int = Field(10, ge=1)
    """Steps between metric rows."""
    val_every: int = Field(1, ge=1)
    """Epochs between validations; the last epoch is always validated."""

    @model_validator(mode="after")
    def _sections_fit(self) -> "TrainJob":
        per_pass = self.scale.workers * self.batch.per_worker
        if self.batch.total % per_pass:
            raise ValueError(
                f"batch.total: {self.batch.total} must be a multiple of scale.workers x batch.per_worker "
                f"({self.scale.workers} x {self.batch.per_worker} = {per_pass})"
            )
        if self.optim.zero_gamma and self.init is not None:
            raise ValueError("optim.zero_gamma: would wipe out the weights of init, use one of the two")
        return self


def model_options(job: TrainJob, num_classes: int) -> dict[str, Any]:
    """What `models.build` takes for this job; UserError for an unknown model or option."""
    options = {"num_classes": num_classes, **job.model.options()}
    if job.optim.zero_gamma:
        options["zero_gamma"] = True
    return {"name": job.model.name, **options}


def facts(job: TrainJob, splits: Splits | None, card: Card) -> dict[str, Any]:
    """What can be known before machines are asked for: parameters, MACs, batch, learning rate, steps."""
    options = model_options(job, card.num_classes)
    net = cost.build_on_meta(lambda: models.build(**options))
    segments: Any = net.num_segments
    shape = (segments, options.get("in_channels", 3), job.data.size, job.data.size)
    out: dict[str, Any] = {
        "model": job.model.name,
        "classes": card.num_classes,
        "params": cost.count_params(net),
        "macs": cost.count_macs(net, (1, *shape)),
        "input": list(shape),
        "batch": job.batch.total,
        "accumulation": job.batch.total // (job.scale.workers * job.batch.per_worker),
        "peak_lr": job.optim.lr * job.batch.total / job.optim.reference_batch,
        "epochs": job.optim.epochs,
    }
    if splits is not None:
        out["train_samples"] = splits.tables[job.data.train].num_rows
        out["steps_per_epoch"] = ceil_div(out["train_samples"], job.batch.total)
        out["steps"] = out["steps_per_epoch"] * job.optim.epochs
        out["dataset"] = splits.fingerprint
    return out


def split_names(job: TrainJob) -> list[str]:
    """The splits a training job reads."""
    return [name for name in (job.data.train, job.data.val) if name is not None]


def run(job: TrainJob, ctx: Any) -> None:
    """Train `job` in the run folder `ctx.run`; RunFailed with one sentence if it cannot be finished."""
    splits = open_splits(job.data, ctx.where, ctx.storage, split_names(job))
    known = facts(job, splits, splits.card)
    segments = known["input"][0]
    workers.connect(ctx.cpus)
    slots = workers.decode_slots(job.scale)
    workers.require(job.scale, slots)
    names = {"train": job.data.train} | ({"val": job.data.val} if job.data.val else {})
    sources = {
        role: Source(splits.root, ray.put(splits.tables[name]), splits.tables[name].num_rows)
        for role, name in names.items()
    }
    board = workers.make_board()
    config = loop.FitConfig(
        run_uri=ctx.run.uri,
        attempt=ctx.attempt,
        model=model_options(job, splits.card.num_classes),
        init=None if job.init is None else job.init.model_dump(by_alias=True) | {"from": _start(job.init, ctx)},
        optim=job.optim,
        batch_total=job.batch.total,
        per_worker=job.batch.per_worker,
        scale=job.scale,
        checkpoint=job.checkpoint,
        tracking=job.tracking,
        pixels=Input(average=job.average),
        classes=tuple(splits.card.class_names()),
        sources=sources,
        recipes={role: make_recipe(job.data, splits.card, segments, role) for role in names},
        decode_slots=slots,
        decode_timeout_s=job.data.decode_timeout_s,
        max_bad_fraction=job.data.max_bad_fraction,
        seed=job.seed,
        log_every=job.log_every,
        val_every=job.val_every,
        macs=known["macs"],
        record_samples=job.data.record_samples,
        job=job.model_dump(mode="json"),
        board=board,
    )
    with follow(board, job.name, ctx.console):
        result = workers.launch(loop.fit, config, job.scale, job.name, board)
    card = {
        "metrics": {"best": result["best"], "last": result["last"]},
        "steps": result["steps"],
        "dataset": {"name": splits.card.name, "fingerprint": splits.fingerprint},
        **{key: known[key] for key in ("params", "macs", "batch", "peak_lr", "train_samples")},
        "init": None if job.init is None else job.init.source,
    }
    ctx.finish(card, {"classes": list(config.classes), "confusion": {job.name: result["confusion"]}})
    runs.write_report(ctx.run, report.train_report(ctx.run))


def _start(init: InitSpec, ctx: Any) -> str:
    """The file that `init.from` means: itself, or the weights of a run. Its digest is checked if one is given."""
    return runs.weights_source(init.source, ctx.storage, init.sha256)
