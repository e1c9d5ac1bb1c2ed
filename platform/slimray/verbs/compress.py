"""`kind: compress`: make a trained network smaller, step by step; the result is a network that every other verb takes.

Reads a run with a network (or published weights) and its dataset. A step is a folder of the run, `stages/01-sparsify`,
that resumes and, once finished, is not repeated; each is scored on the validation split, counted, and timed in turn
with the original. Deep Compression: arXiv 1506.02626, 1510.00149. `STEPS` is the table of steps: a new step is a file
and a row.
"""

import json
import time
from types import ModuleType
from typing import Any

from slimray import runs
from slimray.data.cards import Card
from slimray.data.spec import DataSpec
from slimray.spec import RunFailed, UserError, located, noting, parse
from slimray.verbs import checks, inputs, step_code, step_finetune, step_prune, step_quantize, step_share, step_sparsify
from slimray.verbs.compress_specs import CompressJob, FinetuneStep, atomic
from slimray.verbs.context import CheckContext, Context, Made, trained_on

STEPS: dict[str, ModuleType] = {
    "prune": step_prune,
    "sparsify": step_sparsify,
    "finetune": step_finetune,
    "quantize": step_quantize,
    "share": step_share,
    "code": step_code,
}

Job = CompressJob
INT8 = "; torch computes rounded numbers as floats: `slimray export {} --format onnx,onnx_int8` times int8 kernels"


def check(job: CompressJob, ctx: CheckContext) -> dict[str, Any]:
    """Return the network, the dataset and the steps, as far as they are known before the job runs."""
    steps = atomic(job.steps)
    out: dict[str, Any] = {"model": job.model.run or job.model.name, "steps": [name for name, _ in steps]}
    notes = []
    if not any(STEPS[step.step].FASTER for step in job.steps):
        notes.append("no step of this job makes the network faster, only smaller: every layer keeps its shape")
    made = None
    with ctx.noting():
        made = ctx.require(job.model.run, ("network",), "model.run") if job.model.run is not None else None
    if made is not None:
        return out | ({"notes": notes} if notes else {})
    with ctx.noting():
        out |= _known(job, ctx)
    return out | ({"notes": notes} if notes else {})


def _known(job: CompressJob, ctx: CheckContext) -> dict[str, Any]:
    """Return what is known of a job whose network exists already."""
    from slimray.edge import cost
    from slimray.verbs import compressing, networks

    data = _data(job, ctx.where, ctx.storage)
    card, counts = None, {}
    if isinstance(data.card, dict):
        card = parse(Card, data.card, f"{ctx.where}: data.card")
    if data.run is None or ctx.require(data.run, ("dataset",), "data.run") is None:
        splits = inputs.open_splits(data, ctx.where, ctx.storage, checks.split_names(data))
        card, counts = splits.card, {name: table.num_rows for name, table in splits.tables.items()}
    job = job.model_copy(update={"data": data})
    as_training = compressing.training(job, data, None, None, None, ctx.storage)
    summary = networks.summary(as_training, card, None)
    net = networks.on_meta(as_training, card)
    sample = summary.input
    for number, step in enumerate(job.steps):
        with noting(ctx.problems, f"{ctx.where}: steps.{number}"):
            STEPS[step.step].check(step, net, sample)
        sample = None if STEPS[step.step].FASTER else sample  # channels left by such a step are not known yet
    out = {"params": cost.count_params(net), "macs": summary.macs} if summary.macs is not None else {}
    if counts:
        rows = counts[data.train] - job.hold_out
        if rows < 1:
            raise UserError(f"hold_out: {job.hold_out} of {counts[data.train]} training samples leave none to train on")
        out |= {"dataset": card.name if card else "", "train_samples": rows}
        epochs = sum(step.epochs for _, step in atomic(job.steps) if isinstance(step, FinetuneStep))
        if epochs and job.batch is not None and not job.batch.tokens:
            out["train_steps"] = epochs * -(-rows // job.batch.total)
    if job.init is not None:
        try:
            runs.weights_source(job.init.source, ctx.storage, job.init.sha256)
        except UserError as error:
            raise UserError(located(str(error), "init.from")) from None
    return out


def makes(job: CompressJob) -> dict[str, Made]:
    """Return the compressed network, with the card and data of the one it is made from."""
    if job.data is not None:
        return {job.name: trained_on(job.data)}
    return {job.name: Made("network", like=job.model.run)}


def _data(job: CompressJob, where: str, storage: str) -> DataSpec:
    """Return the data section of the job, or else of the network's run."""
    if job.data is not None:
        return job.data
    found = inputs.finished_run(str(job.model.run), storage, ("network",), f"{where}: model.run")
    return inputs.data_of(found, storage, f"{where}: model.run")


def run(job: CompressJob, ctx: Context) -> None:
    """Compress the network of `job` in the run folder `ctx.run`, step by step."""
    from slimray.report import pages
    from slimray.tasks import TASKS
    from slimray.verbs import compressing, stages, subnets

    data = _data(job, ctx.where, ctx.storage)
    splits = inputs.open_splits(data, ctx.where, ctx.storage, checks.split_names(data))
    kept, out = subnets.hold_out(splits.tables[data.train], job.hold_out, job.seed)
    stages.connect(job.scale, ctx.cpus)
    held = None if out is None else subnets.put_table(splits.root, out)
    work = compressing.Work(job, ctx, data, stages.Data.of(splits, {data.train: kept}), held)
    before = compressing.write_original(work)
    done = [_finished(work, before, "original", {}, time.time())]
    for folder, step in atomic(job.steps):
        started = time.time()
        before, details = STEPS[step.step].run(step, work, folder, before)
        done.append(_finished(work, before, step.step, details, started))
        _say(work, done[0]["row"], done[-1]["row"])
        if STEPS[step.step].FASTER and (said := compressing.verdict(done[-1]["row"])):  # before training is spent on it
            ctx.console.print(f"{job.name}: {done[-1]['row']['run']}: {said}", highlight=False, markup=False)
    weights, model, taken = runs.read_model(before)
    runs.write_model(ctx.run, weights, model, taken)
    if runs.exists(before, "model/model.slim"):
        runs.write_file(ctx.run, "model/model.slim", runs.read_file(before, "model/model.slim"))
    if said := compressing.verdict(done[-1]["row"]):
        rounded = any(record["step"] == "quantize" for record in model.get("compression", []))
        said += INT8.format(job.name) if rounded else ""
        ctx.console.print(f"{job.name}: {said}", highlight=False, markup=False, soft_wrap=True)
    rows, task = [one["row"] for one in done], TASKS[subnets.task_of(taken)]
    card = {"metrics": {"rows": rows, "last": rows[-1]}, "metric": task.best.to_plain()}
    results = {"steps": done, "task": task.name, "metrics": [metric.to_plain() for metric in task.metrics]}
    ctx.finish(card | {"dataset": work.data.description, "model": job.model.run or job.model.name}, results)
    runs.write_report(ctx.run, pages.compress_report(ctx.run))


def _finished(work: Any, stage: runs.Run, step: str, details: dict[str, Any], started: float) -> dict[str, Any]:
    """Return the contents of the results.json of a stage, after writing it if it does not exist yet."""
    from slimray.verbs import compressing

    if runs.exists(stage, "results.json"):
        found = json.loads(runs.read_file(stage, "results.json"))
        if "row" in found:
            return found
    found = compressing.finish(work, stage, step, details, time.time() - started)
    if not found["row"].get("num_samples"):
        raise RunFailed("no sample of the validation split decodes: see quarantine/ of the run of the network")
    return found


def _say(work: Any, first: dict[str, Any], row: dict[str, Any]) -> None:
    share, metric = 100 * row["bytes"] / first["bytes"], work.metric
    text = f"{metric} {row[metric]:.2f} ({row[metric] - first[metric]:+.2f}), {row['bytes']:,} bytes ({share:.1f} %)"
    text += f", {100 * row['kept'] / first['weights']:.1f} % of the weights"
    work.ctx.console.print(f"{work.job.name}: {row['run']}: {text}", highlight=False, markup=False)
