"""`kind: train`: a network trained on a split, data-parallel on Ray Train, resumed exactly wherever it stopped.

Reads a dataset (a card with its root, or a finished `prepare` run), writes a run folder with checkpoints, metrics, the
model and a report. TSM: arXiv 1811.08383; linear scaling with warm-up: arXiv 1706.02677, at scale: arXiv 1910.00932.
"""

import time
from collections.abc import Mapping
from typing import Any, Literal

import ray
from pydantic import ConfigDict, Field, model_validator

from slimray import models, runs
from slimray.data.cards import Card
from slimray.data.modalities import MODALITIES, input_shape
from slimray.data.pipeline import Source
from slimray.data.plan import ceil_div
from slimray.data.spec import DataSpec
from slimray.data.video.clips import DENSE_WINDOW
from slimray.edge import cost
from slimray.report import pages
from slimray.runs.notify import NotifySpec
from slimray.runs.tracking import TrackingSpec
from slimray.spec import Spec, UserError, did_you_mean, located, lookup
from slimray.tasks.predict import Input
from slimray.train import calibrate, learn, loop, optimizers, workers
from slimray.train.health import goodput
from slimray.train.methods.mutual import Mutual
from slimray.train.methods.plain import Plain
from slimray.train.progress import follow
from slimray.train.spec import BatchSpec, CheckpointSpec, InitSpec, LimitsSpec, OptimSpec, ScaleSpec
from slimray.verbs.inputs import Splits, make_recipe, open_splits

OWNED = {"num_classes": "the dataset says how many", "zero_gamma": "write optim.zero_gamma"}  # no options of `model`


class ModelSpec(Spec):
    """The network: its `name` in the MODELS table and the options of that row (`width`, `num_segments`, ...)."""

    model_config = ConfigDict(extra="allow")

    name: str
    """Row of the table of models; `slimray explain models` lists them."""

    def options(self) -> dict[str, Any]:
        """All that is written beside the name."""
        return dict(self.model_extra or {})


class TrainJob(Spec):
    """Train a network on a dataset."""

    kind: Literal["train"]
    name: str
    """Name of the run, a folder of the storage."""
    data: DataSpec
    model: ModelSpec
    init: InitSpec | None = None
    batch: BatchSpec
    optim: OptimSpec
    scale: ScaleSpec = ScaleSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    tracking: TrackingSpec = TrackingSpec()
    notify: NotifySpec | None = None
    limits: LimitsSpec = LimitsSpec.model_validate({})
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
        per_pass, elastic = self.scale.most * self.batch.per_worker, self.scale.most > self.scale.fewest
        if self.batch.total % per_pass and not elastic:
            raise ValueError(
                f"batch.total: {self.batch.total} must be a multiple of scale.workers x batch.per_worker "
                f"({self.scale.most} x {self.batch.per_worker} = {per_pass})"
            )
        if self.batch.total < self.scale.most:
            raise ValueError(f"batch.total: {self.batch.total} leaves some of {self.scale.most} workers without work")
        if self.optim.zero_gamma and self.init is not None:
            raise ValueError("optim.zero_gamma: would wipe out the weights of init, use one of the two")
        if self.optim.mutual and (self.init is not None or self.optim.groups == "tsm"):
            taken = "init" if self.init is not None else "optim.groups: tsm"
            raise ValueError(f"optim.mutual: two networks are trained from scratch, it does not go with {taken}")
        if self.optim.norm == "sync" and not self.scale.gpus_per_worker:
            raise ValueError("optim.norm: sync needs GPUs: set scale.gpus_per_worker, or take local")
        return self


def model_options(job: TrainJob, num_classes: int) -> dict[str, Any]:
    """What `models.build` takes for this job."""
    options = {"num_classes": num_classes, **job.model.options()}
    if job.optim.zero_gamma:
        options["zero_gamma"] = True
    return {"name": job.model.name, **options}


def facts(job: TrainJob, card: Card | None, num_train: int | None) -> dict[str, Any]:
    """What can be known before machines are asked for: parameters, MACs, batch, learning rate, steps.

    Without the number of classes (the dataset is not there) no parameters and MACs, without `num_train` no steps.
    UserError, with the field, for a network that cannot be built or does not fit the data.
    """
    num_classes = card.num_classes if card is not None else 0
    _require_weights(job, card)
    row = models.MODELS.get(job.model.name)
    if card is None and row is not None and MODALITIES[row.input].early_input is None:
        return {"model": job.model.name}  # what its samples are, only the dataset says
    net, macs = _measure(job, num_classes or 1, card)
    out: dict[str, Any] = {"model": job.model.name}
    if num_classes:
        out |= {"classes": num_classes, "params": cost.count_params(net), "macs": macs}
    out |= {
        "input": list(_input_shape(job, card, net)),
        "batch": job.batch.total,
        "accumulation": ceil_div(job.batch.total, job.scale.most * job.batch.per_worker),
        "peak_lr": optimizers.peak_rate(job.optim, job.batch.total),
        "epochs": job.optim.epochs,
    }
    if num_train is not None:
        steps = ceil_div(num_train, job.batch.total)
        out |= {"train_samples": num_train, "steps_per_epoch": steps, "steps": steps * job.optim.epochs}
    return out


def _measure(job: TrainJob, num_classes: int, card: Card | None) -> tuple[Any, int]:
    """The network on the meta device and its MACs; UserError `model.width: ...` if it cannot be or does not fit."""
    name, options = job.model.name, job.model.options()
    try:
        row = lookup(models.MODELS, name, "model")
    except UserError as error:
        raise UserError(f"model.name: {error} (`slimray explain models` lists them)") from None
    sample = row.input if card is None else card.sample
    modality = MODALITIES[sample]
    if job.optim.mutual and sample == "frustum":
        raise UserError("optim.mutual: is for classes of samples or points, not for boxes: leave it out")
    if row.input != sample:
        raise UserError(f"model.name: {name} wants {MODALITIES[row.input].plural}, the dataset gives {modality.plural}")
    known = models.options_of(name)
    for option in options:
        if option in OWNED:
            raise UserError(f"model.{option}: is no option here, {OWNED[option]}")
        if option not in known:
            raise UserError(f"model.{option}: {name} has no such option{did_you_mean(option, set(known) - set(OWNED))}")
    side = (options.get("arch") or {}).get("resolution")
    if side is not None and job.data.size != side:
        raise UserError(f"data.size: must be {side}, the resolution of model.arch (got {job.data.size})")
    if sample in ("clip", "image") and options.get("in_channels", 3) != 3:
        raise UserError(f"model.in_channels: the {modality.plural} have 3 channels (got {options['in_channels']!r})")
    try:
        net = cost.build_on_meta(lambda: models.build(**model_options(job, num_classes)))
    except UserError as error:
        raise UserError(f"model.{str(error).removeprefix(f'model {name}: ')}") from None
    except (RuntimeError, ValueError) as error:
        raise UserError(f"model: {name} cannot be built with these options ({_first_line(error)})") from None
    shape = _input_shape(job, card, net)
    if modality.segmented and job.data.sampling == "dense" and shape[0] > DENSE_WINDOW:
        raise UserError(f"model.num_segments: at most {DENSE_WINDOW} frames with data.sampling: dense (got {shape[0]})")
    try:
        return net, cost.count_macs(net, (1, *shape))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"model: {name} does not take {modality.plural} of {' x '.join(map(str, shape))}: change data or its "
            f"options ({_first_line(error)})"
        ) from None


def _input_shape(job: TrainJob, card: Card | None, net: Any) -> tuple[int, ...]:
    """A sample as the network takes it: (T, 3, H, W), (3, H, W) or (C, N)."""
    modality = MODALITIES[models.MODELS[job.model.name].input]
    segments = net.num_segments if modality.segmented else 0
    if modality.early_input is not None:
        return modality.early_input(job.data, segments)
    assert card is not None  # `facts` asks for no network before there is a dataset
    return input_shape(make_recipe(job.data, card, segments, "train"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _require_weights(job: TrainJob, card: Card | None) -> None:
    weights, num_classes = job.optim.class_weights, card.num_classes if card is not None else 0
    if weights == "balanced" and card is not None and card.labels == "point":
        raise UserError("optim.class_weights: balanced counts samples, here labels belong to points: write numbers")
    if not isinstance(weights, tuple):
        return
    if num_classes and len(weights) != num_classes:
        raise UserError(f"optim.class_weights: {len(weights)} weights, the dataset has {num_classes} classes")
    if min(weights, default=0) < 0 or not any(weights):
        raise UserError("optim.class_weights: must be numbers >= 0, at least one of them above 0")


def resolve_weights(optim: OptimSpec, table: Any, num_classes: int) -> OptimSpec:
    """`optim` with class weights as numbers: `balanced` is counted in the labels of the training index `table`."""
    if optim.class_weights != "balanced":
        return optim
    weights = learn.balanced_weights(table.column("label").to_pylist(), num_classes)
    return optim.model_copy(update={"class_weights": weights})


def check_init(job: Any, storage: str, ahead: Mapping[str, Any]) -> None:
    """Raise UserError if the weights of `init` are not there. A URL is not fetched for that.

    `ahead` are the jobs by name that will have run before this one.
    """
    if job.init is None or job.init.source.startswith(("http://", "https://")):
        return
    if job.init.source in ahead:
        kind = ahead[job.init.source].kind
        if kind != "train":
            raise UserError(f"init.from: {job.init.source!r} is of kind {kind}, it makes no weights")
        return
    try:
        runs.weights_source(job.init.source, storage, job.init.sha256)
    except UserError as error:
        raise UserError(located(str(error), "init.from")) from None


def split_names(job: Any) -> list[str]:
    """The splits that a job with a `data` section trains and validates on."""
    return [name for name in (job.data.train, job.data.val) if name is not None]


def run(job: TrainJob, ctx: Any) -> None:
    """Train `job` in the run folder `ctx.run`; RunFailed with one sentence if it cannot be finished."""
    splits = open_splits(job.data, ctx.where, ctx.storage, split_names(job))
    known = facts(job, splits.card, splits.tables[job.data.train].num_rows)
    workers.connect(ctx.cpus)
    workers.require(job.scale, workers.decode_slots(job.scale))
    config = fit_config(job, ctx, ctx.run.uri, splits, put_tables(splits), known)
    bad = workers.preflight(job.scale, ctx.run.uri)
    for node, reason in bad.items():
        ctx.console.print(f"{job.name}: node {node[:8]} is left out, it {reason}", highlight=False, markup=False)
    with follow(config.board, job.name, ctx.console, ctx.tell):
        result = workers.launch(loop.fit, config, job.scale, job.name, config.board, bad)
    rows, restarts = runs.read_parts(ctx.run, "metrics"), runs.count_writers(ctx.run, "metrics") - 1
    repeated = workers.board_state(config.board).get("repeated", 0)
    good = goodput(rows, ctx.started, time.time(), restarts, repeated)
    card = {
        "goodput": good.to_dict(),
        "metrics": {"best": result["best"], "last": result["last"]},
        "steps": result["steps"],
        "dataset": {"name": splits.card.name, "fingerprint": splits.fingerprint},
        **{key: known[key] for key in ("params", "macs", "batch", "peak_lr", "train_samples")},
        "init": None if job.init is None else job.init.source,
        "plan": calibrate.compared(job, known, config, ctx),
    }
    ctx.finish(card, {"classes": list(config.classes), "confusion": {job.name: result["confusion"]}})
    runs.write_report(ctx.run, pages.train_report(ctx.run))


def put_tables(splits: Splits) -> dict[str, Source]:
    """The indexes of all splits in the object store, by split."""
    return {name: Source(splits.root, ray.put(table), table.num_rows) for name, table in splits.tables.items()}


def fit_config(
    job: TrainJob, ctx: Any, run_uri: str, splits: Splits, tables: Mapping[str, Source], known: Mapping[str, Any]
) -> loop.FitConfig:
    """What the workers of `job` need to train in the run at `run_uri`; `known` are its `facts`, the board is new."""
    segments = known["input"][0] if MODALITIES[splits.card.sample].segmented else 0
    names = {"train": job.data.train} | ({"val": job.data.val} if job.data.val else {})
    return loop.FitConfig(
        run_uri=run_uri,
        attempt=ctx.attempt,
        model=model_options(job, splits.card.num_classes),
        init=None if job.init is None else job.init.model_dump(by_alias=True) | {"from": _start(job.init, ctx)},
        optim=resolve_weights(job.optim, splits.tables[job.data.train], splits.card.num_classes),
        batch_total=job.batch.total,
        per_worker=job.batch.per_worker,
        scale=job.scale,
        checkpoint=job.checkpoint,
        tracking=job.tracking,
        pixels=Input(average=job.average),
        classes=tuple(splits.card.class_names()),
        dataset=splits.fingerprint,
        sources={role: tables[name] for role, name in names.items()},
        recipes={role: make_recipe(job.data, splits.card, segments, role) for role in names},
        decode_slots=workers.decode_slots(job.scale),
        decode_timeout_s=job.data.decode_timeout_s,
        max_bad_fraction=job.data.max_bad_fraction,
        seed=job.seed,
        log_every=job.log_every,
        val_every=job.val_every,
        macs=known["macs"],
        record_samples=job.data.record_samples,
        job=job.model_dump(mode="json"),
        board=workers.make_board(),
        method=Mutual(job.optim.mutual) if job.optim.mutual else Plain(),
        limits=job.limits,
    )


def _start(init: InitSpec, ctx: Any) -> str:
    """The file that `init.from` means: itself, or the weights of a run. Its digest is checked if one is given."""
    return runs.weights_source(init.source, ctx.storage, init.sha256)
