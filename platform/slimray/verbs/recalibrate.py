"""`kind: recalibrate`: recompute the BatchNorm statistics of a finished network on batches of training samples.

Reads a run that holds a network and its dataset; writes a run with the same weights, new statistics (as in
Once-for-All, arXiv 1908.09791) and scores before and after on the validation split. The old run does not change. Needed
for networks that earlier versions shipped with a fault (shipped.py), and after a change of weights without statistics.
"""

from typing import Any, Literal

from slimray import runs
from slimray.train.spec import ScaleSpec
from slimray.verbs import inputs, shipped
from slimray.verbs.checks import split_names
from slimray.verbs.context import CheckContext, Context, Made
from slimray.verbs.specs import JudgeSpec, WorkerJob


class RecalibrateJob(WorkerJob):
    """Recompute the BatchNorm statistics of a finished network."""

    kind: Literal["recalibrate"]
    name: str
    """Name of the run, a folder of the storage."""
    run: str
    """Name or URI of the run with the network."""
    judge: JudgeSpec = JudgeSpec.model_validate({})
    """Samples for recalibration and scoring."""
    scale: ScaleSpec = ScaleSpec()
    seed: int = 0
    """Seed of the choice of samples for recalibration."""


Job = RecalibrateJob


def check(job: RecalibrateJob, ctx: CheckContext) -> dict[str, Any]:
    """Return the run, and the dataset if it exists."""
    out: dict[str, Any] = {"run": job.run}
    with ctx.noting():
        if ctx.require(job.run, ("network",), "run") is None:
            found = _find(job, ctx.where, ctx.storage)
            data = inputs.data_of(found, ctx.storage, f"{ctx.where}: run")
            splits = inputs.open_splits(data, ctx.where, ctx.storage, split_names(data))
            out |= {"dataset": splits.card.name, "train_samples": splits.tables[data.train].num_rows}
    return out


def makes(job: RecalibrateJob) -> dict[str, Made]:
    """Return the network with new statistics."""
    return {job.name: Made("network", like=job.run)}


def _find(job: RecalibrateJob, where: str, storage: str) -> runs.Run:
    return inputs.finished_run(job.run, storage, ("network",), f"{where}: run")


def run(job: RecalibrateJob, ctx: Context) -> None:
    """Recalibrate and score in a process of the cluster, and write the network to the run folder `ctx.run`."""
    from slimray.report import pages
    from slimray.train import workers
    from slimray.verbs import subnets

    found = _find(job, ctx.where, ctx.storage)
    data = inputs.data_of(found, ctx.storage, f"{ctx.where}: run")
    splits = inputs.open_splits(data, ctx.where, ctx.storage, split_names(data))
    _, model, input_json = runs.read_model(found)
    recipe = shipped.corrected_recipe(runs.read_job(found), input_json["recipe"])
    workers.connect(ctx.cpus)
    workers.require(job.scale, 0)
    train = (subnets.put_table(splits.root, splits.tables[data.train]), recipe | {"mode": "train"})
    score = (subnets.put_table(splits.root, splits.tables[data.val or data.train]), recipe)
    exhibits = subnets.make_exhibits(job.judge, train, score, job.seed, data.decode_timeout_s)
    weights, before, after = subnets.recalibrate(found.uri, exhibits, job.judge, job.scale)
    runs.write_model(ctx.run, weights, model, input_json | {"recipe": recipe})
    rows = [{"run": found.name, **before}, {"run": ctx.run.name, **after}]
    dataset = {"name": splits.card.name, "fingerprint": splits.fingerprint}
    ctx.finish({"metrics": {"rows": rows, "last": after}, "dataset": dataset, "run": found.uri})
    runs.write_report(ctx.run, pages.train_report(ctx.run))
