"""`kind: train`: train a network on a split, data-parallel on Ray Train, with an exact resume wherever it stopped.

Reads a dataset (a card with its root, or a finished `prepare` run), writes a run folder with checkpoints, metrics, the
model and a report. TSM: arXiv 1811.08383; linear scaling with warm-up: arXiv 1706.02677, at scale: arXiv 1910.00932.
"""

import time
from dataclasses import replace
from typing import Any

from slimray import runs
from slimray.verbs import checks, inputs
from slimray.verbs.context import CheckContext, Context, Made, trained_on
from slimray.verbs.specs import TrainJob

Job = TrainJob


def check(job: TrainJob, ctx: CheckContext) -> dict[str, Any]:
    """Return parameters, MACs, input, batch, learning rate and steps, as far as they are known before the job runs."""
    from slimray.verbs import networks

    cards: list[Any] = []

    def known(card: Any, num_train: int | None) -> dict[str, Any]:
        cards.append(card)
        there = networks.with_network_if_there(job, ctx, card)
        if there is None:
            return networks.schedule(job, num_train).to_plain()
        return networks.summary(there, card, num_train).to_plain()

    def network(card: Any) -> Any:
        there = networks.with_network_if_there(job, ctx, card)
        return networks.on_meta(there or job, card)

    out = checks.check_training(job, ctx, known, network)
    with ctx.noting():
        checks.check_teacher(job.teacher, ctx, cards[-1] if cards else None)
    return out


def makes(job: TrainJob) -> dict[str, Made]:
    """Return the network that is trained."""
    return {job.name: trained_on(job.data)}


def run(job: TrainJob, ctx: Context) -> None:
    """Train `job` in the run folder `ctx.run`; RunFailed with one sentence if it cannot be finished."""
    from slimray.train import connection

    connection.connect(ctx.cpus, ("slimray.verbs.stages", "slimray.report.pages", "slimray.train.calibrate"))

    from slimray.report import pages
    from slimray.tasks import TASKS
    from slimray.train import calibrate, loop, workers
    from slimray.train.health import goodput
    from slimray.train.progress import follow
    from slimray.verbs import networks, stages

    stages.connect(job.scale, ctx.cpus)
    ahead = workers.start_ahead(job.scale)
    job = networks.with_network(job, ctx.storage, ctx.run)
    splits = inputs.open_splits(job.data, ctx.where, ctx.storage, checks.split_names(job.data))
    config, summary = stages.config_of(job, ctx, ctx.run, stages.Data.of(splits))
    config = replace(config, feeder=ahead.feeder)
    bad = workers.preflight(job.scale, ctx.run.uri)
    for node, reason in bad.items():
        ctx.console.print(f"{job.name}: node {node[:8]} is left out, it {reason}", highlight=False, markup=False)
    with follow(config.progress_actor, job.name, ctx.console, ctx.tell):
        result = workers.launch(loop.fit, config, job.scale, job.name, config.progress_actor, bad)
    rows, restarts = runs.read_parts(ctx.run, "metrics"), runs.count_writers(ctx.run, "metrics") - 1
    repeated = workers.progress_state(config.progress_actor).get("repeated", 0)
    good = goodput(rows, ctx.started, time.time(), restarts, repeated)
    task = TASKS[config.task]
    card = {
        "goodput": good.to_dict(),
        "metrics": {"best": result["best"], "last": result["last"]},
        "metric": task.best.to_plain(),
        "steps": result["steps"],
        "dataset": {"name": splits.card.name, "fingerprint": splits.fingerprint},
        **{name: getattr(summary, name) for name in ("params", "macs", "batch", "peak_lr", "train_samples")},
        "init": None if job.init is None else job.init.source,
        "plan": calibrate.compared(job, summary, config, ctx),
    }
    results = {"task": task.name, "metrics": [metric.to_plain() for metric in task.metrics]}
    ctx.finish(card, results | {"classes": list(config.classes), "confusion": {job.name: result["confusion"]}})
    runs.write_report(ctx.run, pages.train_report(ctx.run))
