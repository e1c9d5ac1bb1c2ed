"""`kind: evaluate`: score finished runs on a split, side by side, with pictures of samples.

Reads the model folders of `runs` and their dataset (or another one), writes results.json and a report. The test
protocols are those of arXiv 1811.08383 (views = clips x crops); `frame_orders: [natural, shuffled]` shows whether a
network uses motion: shuffled clips only keep the information of single frames.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from slimray import runs
from slimray.data.cards import Card
from slimray.data.modalities import MODALITIES, input_shape, modality_of
from slimray.data.spec import DataSpec
from slimray.runs.notify import NotifySpec
from slimray.runtime.folder import exports_of
from slimray.spec import RunFailed, UserError, lookup, parse, require_extra
from slimray.train.spec import ScaleSpec
from slimray.verbs import inputs
from slimray.verbs.context import CheckContext, Context, Made
from slimray.verbs.inputs import Splits, open_splits, root_of
from slimray.verbs.specs import WorkerJob

if TYPE_CHECKING:
    import pyarrow as pa

    from slimray.data.plan import Phase
    from slimray.tasks.network import Network
    from slimray.tasks.task import Task
    from slimray.verbs.scoring import Case


class EvaluateJob(WorkerJob):
    """Score finished training runs on one split."""

    kind: Literal["evaluate"]
    name: str
    """Name of this evaluation, a folder of the storage."""
    runs: tuple[str, ...] = Field(min_length=1)
    """Runs that hold a network, by name or URI, and exports, as RUN:FORMAT (`my-export:onnx`)."""
    data: DataSpec | None = None
    """Dataset to score on; default: the one that the first run was trained on."""
    split: str | None = None
    """Split to score on; default: the validation split."""
    clips: Literal[1, 2, 10] = 1
    """Clips per video: 1, 2 (centre and left edge of each segment) or 10 (dense sampling)."""
    crops: Literal[1, 3, 5, 10] = 1
    """Crops per frame or image: centre, three, five, or five and their mirror images."""
    size: int | None = Field(None, ge=16, le=1024)
    """Side of the crop in pixels, if it differs from training; the zoom stays the same. The published "full resolution"
    protocol, which takes all of a short side of 256, is `size: 256, resize: 256`."""
    resize: int | None = Field(None, ge=16)
    """Short side in pixels before the crop; default: that of training, in proportion to `size`."""
    average: Literal["logits", "prob"] = "logits"
    """Average the views of a sample as logits or as probabilities."""
    frame_orders: tuple[Literal["natural", "shuffled"], ...] = Field(("natural",), min_length=1)
    """Frame orders to score; `shuffled` removes motion."""
    votes: int = Field(0, ge=0, le=100)
    """Draws that vote on each point of a cloud; the most confident prediction wins (labels per point). Published: 1 for
    S3DIS, over the windows of a room at both offsets, 10 for ShapeNet part. 0 scores one draw, as in training."""
    missed: Literal["wrong", "last_class"] = "wrong"
    """Score of points of a room that no window votes on: `wrong` for their own class; `last_class`, as published for
    S3DIS, also counts them as predictions of the last class."""
    repeats: int = Field(1, ge=1, le=100)
    """Passes over the split with different random draws; mean, deviation and best are reported (KITTI as published:
    20)."""
    task: dict[str, Any] = {}
    """Options of decoding (beam search), in place of those of the runs: `{beam: 1}`; see `slimray explain tasks`."""
    batch: int = Field(16, ge=1)
    """Samples that a worker processes at once."""
    pictures: int = Field(12, ge=0, le=100)
    """Clips, images or clouds shown in the report, per run."""
    scale: ScaleSpec = ScaleSpec()
    notify: NotifySpec | None = None

    @model_validator(mode="after")
    def _sections_fit(self) -> "EvaluateJob":
        for field in ("runs", "frame_orders"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field}: one is named twice ({', '.join(values)})")
        if self.missed != "wrong" and not self.votes:
            raise ValueError("missed: requires votes: write how many")
        return self


Job = EvaluateJob


def check(job: EvaluateJob, ctx: CheckContext) -> dict[str, Any]:
    """Return the runs, views and frame orders, and the dataset that they are scored on, if it exists."""
    from slimray.tasks import TASKS, task_of_card
    from slimray.tasks.network import task_of

    out: dict[str, Any] = {"runs": list(job.runs), "views": job.clips * job.crops, "orders": list(job.frame_orders)}
    with ctx.noting():
        ahead = [name for name in job.runs if _require_ahead(ctx, name) is not None]
        for name in ahead:
            made = ctx.ahead[inputs.split_export(name)[0]]
            if made.data is not None and made.card is not None:  # otherwise checked when its run is opened
                card = parse(Card, made.card, f"{ctx.where}: data.card")
                samples = {"kind": card.sample, "sampling": made.data.sampling}
                _require_modules(ctx.where, task_of_card(card))
                _require_options(job, ctx.where, name, task_of_card(card), samples)
        found = _find(job, ctx.where, ctx.storage, ahead)
        known = {}
        for one in found:
            taken = inputs.read_input(one.run, f"{ctx.where}: runs", one.format)
            task = lookup(TASKS, task_of(taken), "task")
            _require_modules(ctx.where, task)
            _require_options(job, ctx.where, one.name, task, taken["recipe"])
            known[one.name] = tuple(taken["classes"]), taken["recipe"]
        if not (job.data.run in ctx.ahead if job.data is not None else job.runs[0] in ahead):
            _, split, splits = _open_data(job, ctx.where, ctx.storage, found)
            for name, (classes, recipe) in known.items():
                _require_classes(ctx.where, name, classes, splits)
                _require_tokens(ctx.where, name, recipe, splits)
            out |= {"dataset": splits.card.name, "split": split, "samples": splits.tables[split].num_rows}
    return out


def makes(job: EvaluateJob) -> dict[str, Made]:
    """Return the tables of the evaluation."""
    return {job.name: Made("table")}


@dataclass(frozen=True)
class Scored:
    """A network to score: that of a run, or, with a `format`, one of its exports."""

    name: str
    run: runs.Run
    format: str | None


def _require_ahead(ctx: CheckContext, name: str) -> Made | None:
    run, form = inputs.split_export(name)
    return ctx.require(run, ("network",) if form is None else ("export",), "runs")


def _find(job: EvaluateJob, where: str, storage: str, ahead: Sequence[str]) -> list[Scored]:
    """Return the networks that `job` scores, except those `ahead`; UserError if one is missing or two share a name."""
    found = []
    for name in job.runs:
        if name not in ahead:
            run, form = inputs.split_export(name)
            what = ("network", "export") if form is None else ("export",)
            one = inputs.finished_run(run, storage, what, f"{where}: runs")
            if form is None and inputs.held_by(one) == "export":
                there = ", ".join(f"{name}:{known}" for known in exports_of(one))
                raise UserError(f"{where}: runs: {name!r} holds an export, not a network: name its format ({there})")
            found.append(Scored(one.name if form is None else f"{one.name}:{form}", one, form))
    names = [*ahead, *(one.name for one in found)]
    for one in found:
        if names.count(one.name) > 1:
            raise UserError(f"{where}: runs: two of them are named {one.name!r}: score them separately")
        stored = any(runs.exists(one.run, f"model/{name}") for name in ("weights.safetensors", "model.slim"))
        if one.format is None and not stored:
            raise UserError(f"{where}: runs: {one.name!r} has lost its model/weights.safetensors: train it again")
        if one.format is not None and not runs.exists(one.run, f"export/{one.format}/export.json"):
            raise UserError(f"{where}: runs: {one.run.name!r} holds no export {one.format!r}: name one that it has")
    return found


def _open_data(job: EvaluateJob, where: str, storage: str, found: list[Scored]) -> tuple[DataSpec, str, Splits]:
    """Return the data section, the split and its index: those of the job, else of the first run or what it exported."""
    data = job.data
    if data is None:
        data = inputs.data_of(found[0].run, storage, f"{where}: runs")
    split = job.split or data.val or data.train
    return data, split, open_splits(data, where, storage, [split])


def _require_options(job: EvaluateJob, where: str, name: str, task: "Task", recipe: Mapping[str, Any]) -> None:
    """Raise UserError for a field of `job` that does not apply to the samples of a recipe, or to a task."""
    from slimray.tasks import TASKS
    from slimray.tasks.task import search_options

    kind = modality_of(recipe)
    views = {field for row in MODALITIES.values() for field in row.views}
    for field in sorted(views):
        if field not in kind.views and getattr(job, field) != EvaluateJob.model_fields[field].default:
            words = " and ".join(row.plural for row in MODALITIES.values() if field in row.views)
            raise UserError(f"{where}: {field}: is for {words}, {name!r} was trained on {kind.plural}: leave it out")
    for field in sorted({field for row in TASKS.values() for field in row.options} - task.options):
        if getattr(job, field) != EvaluateJob.model_fields[field].default:
            words = " and ".join(row.name for row in TASKS.values() if field in row.options)
            raise UserError(f"{where}: {field}: is for the task {words}, {name!r} is for {task.name}: leave it out")
    if job.average != "logits" and not task.logits:
        raise UserError(f"{where}: average: prob is for classes, {name!r} is for {task.name}: leave it out")
    search_options(task, job.task, f"{where}: task")
    reason = kind.views_fit(recipe, job.model_dump(), name)
    if reason:
        raise UserError(f"{where}: {reason}")


def _require_modules(where: str, task: "Task") -> None:
    """Raise UserError if a package needed to score a task is not installed."""
    if task.modules:
        require_extra(task.extra, f"{where}: the task {task.name}", *task.modules)


def _require_classes(where: str, name: str, classes: tuple[str, ...], splits: Splits) -> None:
    if classes != tuple(splits.card.class_names()):
        raise UserError(f"{where}: runs: {name!r} has other classes than {splits.card.name}: score it separately")


def _require_tokens(where: str, name: str, recipe: Mapping[str, Any], splits: Splits) -> None:
    """Raise UserError for texts with another tokenizer than the network's."""
    text = splits.card.text
    if text is not None and (text.tokenizer, text.lower) != (recipe.get("tokenizer"), recipe.get("lower", False)):
        raise UserError(
            f"{where}: runs: {name!r} has another tokenizer than {splits.card.name}: prepare it with `text.like`, the "
            "dataset that it was trained on"
        )


def run(job: EvaluateJob, ctx: Context) -> None:
    """Score every run of `job` and write the comparison to the run folder `ctx.run`."""
    from slimray.train import connection

    connection.connect(ctx.cpus, ("slimray.verbs.scoring", "slimray.report.pages"))

    import ray

    from slimray.data.pipeline import Source
    from slimray.report import pages
    from slimray.tasks import task_of_card
    from slimray.tasks.parts import part_ranges
    from slimray.tasks.task import search_options
    from slimray.train import workers
    from slimray.train.progress import follow
    from slimray.verbs import scoring

    slots = workers.decode_slots(job.scale)
    workers.require(job.scale, slots)
    ahead = workers.start_ahead(job.scale)
    found = _find(job, ctx.where, ctx.storage, ())
    networks = [scoring.load(one.run.uri, one.format) for one in found]
    data, split, splits = _open_data(job, ctx.where, ctx.storage, found)
    task, table = task_of_card(splits.card), splits.tables[split]
    _require_modules(ctx.where, task)
    for one, network in zip(found, networks, strict=True):
        _require_task(ctx.where, one.name, network.task, task)
        _require_classes(ctx.where, one.name, network.classes, splits)
        _require_tokens(ctx.where, one.name, network.recipe, splits)
        _require_options(job, ctx.where, one.name, task, network.recipe)
    actor = workers.make_progress_actor()
    cases, phases = zip(*_passes(job, found, networks, splits.card, table), strict=True)
    config = scoring.ScoreConfig(
        run_uri=ctx.run.uri,
        attempt=ctx.attempt,
        cases=cases,
        phases=phases,
        source=Source(root_of(splits, data), ray.put(table), table.num_rows),
        average=job.average,
        task=task.name,
        options=job.model_dump(include={"votes", "missed"}),
        search=search_options(task, job.task, f"{ctx.where}: task"),
        parts=part_ranges(splits.card.parts),
        batch=job.batch,
        pictures=job.pictures,
        scale=job.scale,
        decode_slots=slots,
        decode_timeout_s=data.decode_timeout_s,
        progress_actor=actor,
        feeder=ahead.feeder,
    )
    with follow(actor, job.name, ctx.console):
        result = workers.launch(scoring.score_cases, config, job.scale, job.name, actor)
    by_name = {one.name: (one, network) for one, network in zip(found, networks, strict=True)}
    recipes = {name: network.recipe for name, (_, network) in by_name.items()}
    examples = _finish(task, result, recipes, splits.root, split)
    rows = scoring.join_repeats(result["rows"])
    if not all(row["num_samples"] for row in rows):
        raise RunFailed(f"no file of split {split!r} decodes: see quarantine/ in the run folder")
    for row in rows:
        row |= _details(job, *by_name[row["run"]], row, splits, split)
    results = {
        "task": task.name,
        "metrics": [metric.to_plain() for metric in task.metrics],
        "rows": rows,
        "classes": list(splits.card.class_names()),
        "confusion": result["confusion"],
        "examples": examples,
    }
    ctx.finish(
        {"metrics": {"rows": rows}, "metric": task.best.to_plain(), "dataset": {"fingerprint": splits.fingerprint}},
        results,
    )
    runs.write_report(ctx.run, pages.evaluate_report(ctx.run))


def _passes(
    job: EvaluateJob, found: Sequence[Scored], networks: Sequence["Network"], card: Card, table: "pa.Table"
) -> "list[tuple[Case, Phase]]":
    """Return the passes over the split: for each network, order of frames and repeat."""
    from slimray.data.plan import Phase
    from slimray.verbs.scoring import Case

    out, total = [], job.batch * job.scale.most
    for one, network in zip(found, networks, strict=True):
        for order in job.frame_orders:
            recipe = _recipe(job, network, order, card, table)
            for repeat in range(job.repeats):
                case = Case(one.run.uri, one.name, order, repeat, one.format)
                out.append((case, Phase("eval", "eval", repeat, table.num_rows, total, False, recipe)))
    return out


def _finish(
    task: "Task", result: dict[str, Any], recipes: Mapping[str, Mapping[str, Any]], root: str, split: str
) -> list[dict[str, Any]]:
    """Add the results that need all ranks or all rows to the rows; return the examples of each network."""
    from slimray.tasks.task import PassResult

    examples: list[dict[str, Any]] = []
    for row, found, shown in zip(result["rows"], result["found"], result["examples"], strict=True):
        if task.finish is not None:
            shown = task.finish(row, PassResult(found, shown, root, split, recipes[row["run"]]))
        examples += [{**one, "run": row["run"]} for one in shown] if row["repeat"] == 0 else []
    if task.compare is not None:
        task.compare(result["rows"])
    return examples


def _details(
    job: EvaluateJob, one: Scored, network: "Network", row: Mapping[str, Any], splits: Splits, split: str
) -> dict[str, Any]:
    """Return the entries of a row besides its scores: size of the network, split, training settings."""
    from slimray import compress
    from slimray.edge import cost
    from slimray.tasks import task_of_card

    task, table = task_of_card(splits.card), splits.tables[split]
    shape = input_shape(_recipe(job, network, row["variant"], splits.card, table))
    counted = compress.build(**network.model) if one.format else network.net
    details = {"params": cost.count_params(counted), "macs": cost.count_macs(counted, (1, *shape))}
    details |= {"chance": task.chance(len(splits.card.class_names()))} if task.chance else {}
    details |= {"views": job.clips * job.crops, "split": split}
    details |= {"num_quarantined": table.num_rows - row["num_samples"]}
    trained_with = runs.read_card(one.run) or {}
    return details | {key: trained_with[key] for key in ("batch", "peak_lr") if key in trained_with}


def _require_task(where: str, run: str, named: str, task: "Task") -> None:
    """Raise UserError for a network of another task, unless both tasks have the same target."""
    from slimray.tasks import TASKS

    if lookup(TASKS, named, "task").target is not task.target:
        raise UserError(
            f"{where}: runs: {run!r} is for the task {named}, the data for {task.name}: score it separately"
        )


def _recipe(job: EvaluateJob, network: "Network", order: str, card: Card, table: "pa.Table") -> dict[str, Any]:
    """Return the run's recipe with the views and the frame order of this evaluation, and the resulting target."""
    from slimray.tasks import TASKS, with_target

    options = job.model_dump(include={"clips", "crops", "size", "resize", "votes"}) | {"frame_order": order}
    if job.votes:  # windows are drawn equally often, shapes by their number of points
        options |= {"num_points": int(np.max(table.column("frames").to_numpy())), "fill": not card.parts}
    recipe = modality_of(network.recipe).view_recipe(network.recipe, options)
    return with_target(lookup(TASKS, network.task, "task"), recipe)
