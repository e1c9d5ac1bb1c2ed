"""`kind: proxyless`: find a network by training a supernet (ProxylessNAS, arXiv 1812.00332), and train it from scratch.

Stages, each on the shared loop in a folder of its own that resumes exactly: `stages/00-warmup` trains uniform paths of
the mixed supernet; `01-search` trains its weights and, on held-out samples, its architecture parameters with the cost
in the loss; `02-retrain` trains the most likely path from scratch on the whole training split, which becomes the run
NAME-derived. Costs are latencies from a measured table, or MACs. With `sweep`: one warm-up, then a search and a
retraining per weight of the cost.
"""

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import pyarrow as pa
from pydantic import Field, model_validator
from rich.console import Console

from slimray import runs
from slimray.data.cards import Card
from slimray.data.spec import DataSpec
from slimray.runs.notify import NotifySpec
from slimray.runs.tracking import TrackingSpec
from slimray.spec import RunFailed, Spec, UserError, located
from slimray.storage import absolute
from slimray.train.spec import BatchSpec, CheckpointSpec, InitSpec, OptimSpec, ScaleSpec
from slimray.verbs import checks, inputs, path_costs
from slimray.verbs.context import CheckContext, Context, Made, trained_on
from slimray.verbs.specs import ModelSpec, SharedOptimSpec, TrainJob, WorkerJob

if TYPE_CHECKING:
    from slimray.models.supernets.mixed import MixedNet
    from slimray.train.config import FitConfig
    from slimray.train.methods.paths import Goal
    from slimray.verbs.stages import Data

SUPERNET, FOUND = "proxyless_supernet", "proxyless_found"  # rows of MODELS
WEIGHTS = {"add_linear": 0.1, "mul_log": 0.3, "reinforce": 0.1}  # published weights of the cost


class PhaseSpec(Spec):
    """Duration and learning rate of a stage."""

    epochs: int = Field(ge=1)
    """Passes over the training split."""
    lr: float = Field(gt=0)
    """Learning rate for a batch of `optim.reference_batch`."""
    warmup_epochs: float = Field(0, ge=0)
    """Epochs over which the rate rises to its peak."""


class SearchSpec(PhaseSpec):
    """Training in the search: the weights of sampled paths, and the architecture parameters."""

    gradient: Literal["two", "full_v2", "reinforce"] = "two"
    """Gradient of the architecture parameters: through the gates of two candidates of a block at a time (`two`), of all
    of them (`full_v2`), or by REINFORCE."""
    every: int = Field(5, ge=1)
    """Steps on weights between two steps on architecture parameters; the first epoch only trains weights."""
    arch_lr: float = Field(1e-3, gt=0)
    """Learning rate of the architecture parameters (Adam)."""
    nets: int = Field(10, ge=1, le=1000)
    """Paths that REINFORCE tries per batch."""

    @model_validator(mode="after")
    def _has_time(self) -> "SearchSpec":
        if self.epochs < 2:
            raise ValueError("epochs: must be at least 2, as the first one only trains weights")
        return self


class LatencySpec(Spec):
    """Costs of paths, and their weight in the loss."""

    cost: Literal["latency", "macs"] = "latency"
    """`latency`: milliseconds from `table`; `macs`: multiply-accumulates, which need no device."""
    table: str | None = None
    """Finished table that `slimray profile` wrote for `ofa_proxyless` of the same preset, width and classes, read as in
    a search. `data.size` must be one of its resolutions, or lie between two of them."""
    ref_ms: float | None = Field(None, gt=0)
    """Target latency in ms."""
    ref_macs: float | None = Field(None, gt=0)
    """Target MACs, with `cost: macs`."""
    regulariser: Literal["add_linear", "mul_log"] = "add_linear"
    """Combination of the expected cost E with the loss: `add_linear`, loss + weight x (E - ref) / ref, or `mul_log`,
    0.2 x loss x (log E / log ref)^weight. REINFORCE has its own: accuracy x (ref / cost)^weight."""
    weight: float | None = Field(None, ge=0)
    """Weight of the cost; default as published: add_linear 0.1, mul_log 0.3, reinforce 0.1."""

    @property
    def ref(self) -> float:
        """The target, in the unit of `cost`."""
        return cast(float, self.ref_ms if self.cost == "latency" else self.ref_macs)

    @model_validator(mode="after")
    def _fits(self) -> "LatencySpec":
        if self.cost == "latency":
            if self.table is None:
                raise ValueError("table: is required: measure one with `slimray profile`, or use cost: macs")
            if self.ref_ms is None or self.ref_macs is not None:
                raise ValueError("ref_ms: is required with cost: latency, and ref_macs is for cost: macs")
        elif self.table is not None or self.ref_ms is not None or self.ref_macs is None:
            raise ValueError("ref_macs: is required with cost: macs, and table and ref_ms are for cost: latency")
        if self.regulariser == "mul_log" and self.ref <= 1:
            raise ValueError("regulariser: mul_log takes logarithms of costs, which must be above 1: use add_linear")
        return self


class TradeOffSpec(Spec):
    """Several searches after one warm-up, to show the trade-off."""

    weights: tuple[float, ...] = Field(min_length=2, max_length=64)
    """Weights of the cost in place of `latency.weight`; each gives a network, NAME-derived-1, -2, ..."""
    concurrent: int = Field(1, ge=1)
    """Searches at once; each takes `scale.workers` workers."""


class ProxylessJob(WorkerJob):
    """Find a network by training a mixed supernet with its cost in the loss, then train the network from scratch."""

    kind: Literal["proxyless"]
    name: str
    """Name of the run, a folder of the storage; the network found becomes the run NAME-derived."""
    data: DataSpec
    model: ModelSpec = ModelSpec(name=SUPERNET)
    init: InitSpec | None = None
    """Weights of the supernet to start the warm-up from."""
    batch: BatchSpec
    optim: SharedOptimSpec
    """Optimizer of all stages; published: SGD with Nesterov momentum, 4e-5 decay, label smoothing 0.1, cosine."""
    warmup: PhaseSpec
    """The first stage: uniform paths (published: 40 epochs, rate 0.05 for a batch of 256)."""
    search: SearchSpec
    """The search (published: 120 epochs, rate 0.025 for a batch of 256)."""
    latency: LatencySpec
    retrain: PhaseSpec
    """Training of the network found, from scratch on the whole training split (published: 300 epochs)."""
    sweep: TradeOffSpec | None = None
    hold_out: int = Field(ge=1)
    """Training samples on which no weights are trained in warm-up and search, only the architecture parameters."""
    scale: ScaleSpec = ScaleSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    tracking: TrackingSpec = TrackingSpec()
    notify: NotifySpec | None = None
    seed: int = Field(0, ge=0)
    """Seed of order, augmentation, dropout, starting weights and sampled paths."""
    log_every: int = Field(10, ge=1)
    """Steps between metric rows."""

    @model_validator(mode="after")
    def _sections_fit(self) -> "ProxylessJob":
        if self.data.val is None:
            raise ValueError("data.val: is required to score the network found")
        if self.batch.tokens:
            raise ValueError("batch.tokens: the search counts batches in samples: write total and per_worker")
        if self.hold_out < self.batch.total:
            raise ValueError(f"hold_out: must be at least batch.total ({self.batch.total}), got {self.hold_out}")
        if self.optim.norm != "local":
            raise ValueError("optim.norm: must be local, as a supernet keeps statistics per worker")
        if self.search.gradient == "reinforce" and "regulariser" in self.latency.model_fields_set:
            raise ValueError(
                "latency.regulariser: does not apply to search.gradient: reinforce, which has its own: leave it out"
            )
        return self

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of the cost of each search."""
        if self.sweep is not None:
            return self.sweep.weights
        kind = "reinforce" if self.search.gradient == "reinforce" else self.latency.regulariser
        return (WEIGHTS[kind] if self.latency.weight is None else self.latency.weight,)


def stage_job(job: ProxylessJob, stage: str, init: InitSpec | None = None, blocks: str = "") -> TrainJob:
    """Return stage `warmup`, `search` or `retrain` of `job` as a training job; `retrain` trains `blocks`."""
    phase: PhaseSpec = getattr(job, stage)
    own = {"epochs": phase.epochs, "lr": phase.lr, "warmup_epochs": phase.warmup_epochs}
    model = {"name": FOUND, **job.model.options(), "blocks": blocks} if stage == "retrain" else job.model
    document = {
        "kind": "train",
        "name": job.name,
        "data": job.data,
        "model": model,
        "init": init,
        "batch": job.batch,
        "optim": OptimSpec.model_validate(job.optim.model_dump(exclude={"milestones"}) | own),
        "scale": job.scale.model_dump(),
        "checkpoint": job.checkpoint,
        "tracking": job.tracking,
        "seed": job.seed + ("warmup", "search", "retrain").index(stage),
        "log_every": job.log_every,
        "val_every": max(1, phase.epochs // 10) if stage == "retrain" else phase.epochs,
    }
    return TrainJob.model_validate(document)


Job = ProxylessJob


def check(job: ProxylessJob, ctx: CheckContext) -> dict[str, Any]:
    """Return what is known of the warm-up, the costs of paths, and the steps of all stages."""

    def known(card: Card | None, num_train: int | None) -> dict[str, Any]:
        for name in _derived_names(job):
            inputs.require_free(ctx.storage, name, job.name, "name")
        return overview(job, card, num_train)

    return checks.check_training(job, ctx, known)


def makes(job: ProxylessJob) -> dict[str, Made]:
    """Return the tables of the search, and a network for each weight of the cost."""
    return {job.name: Made("table")} | {name: trained_on(job.data) for name in _derived_names(job)}


def _derived_names(job: ProxylessJob) -> list[str]:
    """Return the names of the runs that the searches make, in order."""
    return [f"{job.name}-derived" + (f"-{n + 1}" if job.sweep else "") for n in range(len(job.weights))]


def overview(job: ProxylessJob, card: Card | None, num_train: int | None) -> dict[str, Any]:
    """Return what is known before the job runs; UserError for settings that do not fit together."""
    from slimray.verbs import networks

    if job.model.name != SUPERNET:
        raise UserError(f"model.name: must be {SUPERNET}, a mixed supernet (got {job.model.name!r})")
    if num_train is not None and job.hold_out >= num_train:
        raise UserError(f"hold_out: {job.hold_out} of {num_train} training samples leave none to train on")
    learned = None if num_train is None else num_train - job.hold_out
    out = networks.summary(stage_job(job, "warmup", job.init), card, learned).to_plain()
    for name in ("macs", "peak_lr", "epochs"):  # those of the first candidates, or of the warm-up, would mislead
        out.pop(name, None)
    if card is None:
        return out
    if job.search.gradient == "reinforce":
        from slimray.tasks import task_of_card

        if task_of_card(card).hits is None:
            raise UserError("search.gradient: reinforce needs a task that counts correct predictions: use two")
    net = _on_meta(job, card)
    goal = path_costs.make_goal(job, net, job.weights[0])
    out |= {"mixed_blocks": len(net.mixed), "cost": job.latency.cost, "cost_aim": job.latency.ref}
    out |= {"cost_lowest": goal.of(path_costs.cheapest(goal)), "cost_uniform": path_costs.of_uniform(goal)}
    if learned is not None:
        per_epoch, searches = out["steps_per_epoch"], len(job.weights)
        moves = (job.search.epochs - 1) * (learned // (job.search.every * job.batch.total))
        retrain = networks.summary(stage_job(job, "retrain"), card, num_train).steps or 0
        out["steps"] = per_epoch * job.warmup.epochs
        out["steps"] += searches * (per_epoch * job.search.epochs + moves + retrain)
        if not moves:
            raise UserError(
                f"search.every: no epoch has {job.search.every} full batches of {job.batch.total}, so that nothing "
                "would be searched: lower it, or batch.total"
            )
    return out


def _on_meta(job: ProxylessJob, card: Card | None) -> "MixedNet":
    from slimray import models
    from slimray.edge import cost
    from slimray.verbs import networks

    options = networks.model_options(stage_job(job, "warmup"), card)
    return cast("MixedNet", cost.build_on_meta(lambda: models.build(**options)))


# -------------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class _Plan:
    """Values that the searches of a run share: the job, its data for searching and for retraining, the URI of the
    warm-up, and the costs."""

    job: ProxylessJob
    searched: "Data"
    whole: "Data"
    warmup_uri: str
    costs: "Goal"

    def folder(self, place: str, number: int) -> str:
        """Return the name of a stage's folder."""
        return place + (f"-{number + 1}" if self.job.sweep is not None else "")


def _search(plan: _Plan, ctx: Context, number: int) -> dict[str, Any]:
    """Search, derive and retrain with the weight `number`; return the result as a plain row."""
    import safetensors.torch

    from slimray import models
    from slimray.train.methods.paths import PathSampling, entropy
    from slimray.verbs import networks, stages

    job, weight = plan.job, plan.job.weights[number]
    goal, spec = replace(plan.costs, weight=weight), job.search
    paths = PathSampling(goal, spec.gradient, spec.arch_lr, spec.nets, job.hold_out, spec.every)
    init = InitSpec.model_validate({"from": f"{plan.warmup_uri}/model/weights.safetensors"})
    title = f"{job.name}: search, weight {weight:g}"
    searching = stage_job(job, "search", init)
    stage = stages.train_stage(
        ctx, plan.folder("01-search", number), searching, plan.searched, title,
        lambda config: replace(config, method=paths), keep_metrics=True,
    )  # fmt: skip
    weights, model, _ = runs.read_model(stage)
    net: Any = models.build(**models.stored(model))
    net.load_state_dict(safetensors.torch.load(weights))
    path, alphas = net.most_likely(), [block.alphas.double() for block in net.mixed]
    blocks = net.describe(path)
    chances = [one.softmax(0).tolist() for one in alphas]
    ctx.console.print(f"{job.name}: weight {weight:g}: found {blocks}", highlight=False)
    retraining = stage_job(job, "retrain", blocks=blocks)
    title = f"{job.name}: retrain, weight {weight:g}"
    folder = plan.folder("02-retrain", number)
    retrained = stages.train_stage(ctx, folder, retraining, plan.whole, title, keep_metrics=True)
    numbers = json.loads(runs.read_file(retrained, "results.json"))["last"]
    params, macs = networks.summary(retraining, plan.whole.splits.card, None).counted
    metric = _metric(plan.whole.splits.card)
    row = {
        "run": _derived_names(job)[number],
        "weight": weight,
        metric: numbers[f"val/{metric}"],
        "cost": goal.of(path),
        "expected_cost": float(goal.expected(alphas)),
        "entropy": entropy(chances),
        "params": params,
        "macs": macs,
        "blocks": blocks,
        "choices": [dict(zip(block.codes, one, strict=True)) for block, one in zip(net.mixed, chances, strict=True)],
    }
    _write_derived(plan, ctx, row, numbers, retrained)
    return row


def _metric(card: Card) -> str:
    """Return the name of the metric that compares the networks found."""
    from slimray.tasks import task_of_card

    return task_of_card(card).best.name


def _write_derived(
    plan: _Plan, ctx: Context, row: dict[str, Any], numbers: dict[str, Any], retrained: runs.Run
) -> None:
    """Write the retrained network as a finished run."""
    from slimray.verbs import stages, subnets

    if stages.is_finished(runs.open_run(ctx.storage, row["run"])):
        return
    source = {"search": plan.job.name, "supernet": ctx.run.uri, "blocks": row["blocks"]}
    source |= {"data": plan.job.data.model_dump(mode="json", by_alias=True)}
    costs = {name: row[name] for name in ("params", "macs", "cost")}
    subnets.write_subnet(ctx, row["run"], source, runs.read_model(retrained), numbers, costs)


def run(job: ProxylessJob, ctx: Context) -> None:
    """Search, derive and retrain in the run folder `ctx.run`."""
    from slimray.report import pages
    from slimray.train.methods.paths import PathSampling
    from slimray.verbs import stages, subnets

    splits = inputs.open_splits(job.data, ctx.where, ctx.storage, checks.split_names(job.data))
    try:
        overview(job, splits.card, splits.tables[job.data.train].num_rows)
        costs = path_costs.make_goal(job, _on_meta(job, splits.card), job.weights[0])
    except UserError as error:
        raise UserError(located(str(error), ctx.where)) from None
    kept, out = subnets.hold_out(splits.tables[name := job.data.train], job.hold_out, job.seed)
    stages.connect(job.scale, ctx.cpus, 0 if job.sweep is None else job.sweep.concurrent)
    learning = stages.Data.of(splits, {name: kept})

    def uniform(config: "FitConfig") -> "FitConfig":  # no validation: the most likely path means nothing yet
        return replace(config, sources={"train": config.sources["train"]}, method=PathSampling())

    warmup, title = stage_job(job, "warmup", job.init), f"{job.name}: warm-up"
    stage = stages.train_stage(ctx, "00-warmup", warmup, learning, title, uniform, keep_metrics=True)
    searched = stages.Data.of(splits, {name: pa.concat_tables([kept, cast(pa.Table, out)])})
    plan = _Plan(job, searched, stages.Data.of(splits), stage.uri, costs)
    for derived in _derived_names(job):
        inputs.require_free(ctx.storage, derived, job.name, f"{ctx.where}: name")
    rows = [_search(plan, ctx, 0)] if job.sweep is None else _sweep(plan, ctx)
    shown = ("run", "weight", metric := _metric(splits.card), "cost", "macs")
    results = {"metric": metric, "cost": job.latency.cost, "ref": job.latency.ref, "rows": rows}
    metrics = {"rows": [{key: row[key] for key in shown} for row in rows]}
    ctx.finish({"metrics": metrics, "dataset": plan.whole.description}, results)
    runs.write_report(ctx.run, pages.proxyless_report(ctx.run))


# --------------------------------------------------------------------------------------------------------- sweep


def _sweep(plan: _Plan, ctx: Context) -> list[dict[str, Any]]:
    """Run the searches of all weights as Tune trials, `sweep.concurrent` at once; return their rows in order."""
    from ray import tune

    from slimray.verbs import trials

    sweep = cast(TradeOffSpec, plan.job.sweep)
    folder = (ctx.run.uri, absolute(ctx.storage), ctx.attempt, ctx.where, ctx.cpus)  # a trial has a folder of its own
    trial = tune.with_parameters(_trial, plan=plan, folder=folder)
    ctx.console.print(f"{plan.job.name}: {len(sweep.weights)} searches, {sweep.concurrent} at once", highlight=False)
    waiting = tune.with_resources(trial, {"cpu": 0.1})  # it waits for the workers it starts, which have their own
    setup = tune.TuneConfig(max_concurrent_trials=sweep.concurrent)
    space = {"number": tune.grid_search(list(range(len(sweep.weights))))}
    metrics = [result.metrics or {} for result in trials.run_trials(plan.job.name, waiting, setup, space)]
    told = {one["number"]: one for one in metrics if "number" in one}
    for number, weight in enumerate(sweep.weights):
        if number not in told:
            raise RunFailed(f"weight {weight:g}: Tune ended before its search did; the same command resumes it")
        if told[number]["failed"]:
            raise RunFailed(f"weight {weight:g}: {told[number]['failed']}")
    return [json.loads(told[number]["row"]) for number in range(len(sweep.weights))]


def _trial(config: dict[str, Any], plan: _Plan, folder: tuple[str, str, int, str, int]) -> None:
    """Run one search of a sweep; report its row as JSON, or the sentence that ended it."""
    from ray import tune

    uri, storage, attempt, where, cpus = folder
    ctx = Context(runs.run_at(uri), storage, attempt, where, Console(quiet=True), cpus)
    told = {"number": config["number"], "row": "", "failed": ""}
    try:
        told["row"] = json.dumps(_search(plan, ctx, config["number"]))
    except (RunFailed, UserError) as error:
        told["failed"] = str(error).splitlines()[0]
    tune.report(told)
