"""`slimray plan`: a plan for each training job of a file, a picture of it, and on request a calibration.

Nothing is started and no cluster is contacted: the rows follow from figures of the job (parameters, MACs, samples) and
a description of the machines. The dataset may be missing if `samples` gives its size.
"""

from collections.abc import Sequence
from pathlib import Path

from slimray.data.cards import Card
from slimray.data.modalities import MODALITIES
from slimray.spec import UserError, parse
from slimray.tasks import task_of_card
from slimray.train import calibrate, planner
from slimray.verbs import inputs, networks
from slimray.verbs.checks import split_names
from slimray.verbs.inputs import Splits, make_recipe, open_splits
from slimray.verbs.specs import TrainJob

INK, GRID = "#333333", "#dddddd"
PARTS = (("compute_ms", "compute", "#4477aa"), ("data_ms", "data", "#228833"))
PARTS += (("comm_ms", "all-reduce", "#ee6677"), ("straggler_ms", "stragglers", "#ccbb44"))
PARTS += (("control_ms", "control path", "#aa3377"),)


def plan_job(
    job: TrainJob,
    where: str,
    storage: str,
    workers: Sequence[int],
    cluster_name: str | None = None,
    samples: int | None = None,
    measuring: bool = False,
    pack: str = "",
) -> tuple[planner.Plan, str | None]:
    """Return the plan of a job, and the file to which its calibration was written if `measuring`.

    `samples` is the number of training samples if the dataset is missing; `pack` is the format of its packed clips.
    UserError with what is missing.
    """
    job = networks.with_network(job, storage)
    if job.batch.tokens:
        raise UserError(f"{where}: batch.tokens: a plan counts samples: write batch.total and batch.per_worker for it")
    val_samples = 0
    splits = _splits(job, where, storage, required=samples is None)
    card = splits.card if splits is not None else _card(job, where)
    summary = networks.summary(job, card, None)
    if summary.params is None:
        raise UserError(f"{where}: data: the number of classes is not known without the dataset: prepare it first")
    if splits is not None:
        counts = {name: table.num_rows for name, table in splits.tables.items()}
        samples, val_samples = samples or counts[job.data.train], counts.get(job.data.val or "", 0)
    on_gpu = bool(job.scale.gpus_per_worker)
    cluster = calibrate.find_cluster(cluster_name, _folders(where), on_gpu)
    work = calibrate.work(job, summary, samples or 0, val_samples, card.sample, cluster, pack)
    model = networks.model_options(job, card)
    recipe = make_recipe(job.data, card, summary.sides[0] if MODALITIES[card.sample].segmented else 0, "train")
    key, written = calibrate.key_of(model, recipe, job.batch.per_worker, calibrate.device_name(on_gpu)), None
    if measuring:
        table, root = (splits.tables[job.data.train], splits.root) if splits is not None else (None, "")
        threads = max(1, int(job.scale.cpus_per_worker))
        task, rows = task_of_card(card), job.batch.per_worker
        found = calibrate.measure(model, recipe, job.optim, rows, threads, on_gpu, table, root, task)
        written = calibrate.save(storage, key, found)
    found = calibrate.find(storage, key)
    if found is not None and (cluster.gpu in found.device if cluster.gpu else found.device == "cpu"):
        work = calibrate.calibrated(work, found)
    try:
        return planner.make_plan(work, cluster, workers or [job.scale.most]), written
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _folders(where: str) -> list[Path]:
    """Return the folders to search for cluster files: beside the job, ./cluster, the packaged ones."""
    beside = Path(where.partition(" (")[0]).resolve().parent
    return [beside, beside.parent / "cluster", Path("cluster"), inputs.packaged("cluster")]


def _splits(job: TrainJob, where: str, storage: str, required: bool) -> Splits | None:
    """Return the dataset of a job; None if it is missing and not `required`."""
    try:
        return open_splits(job.data, where, storage, split_names(job.data))
    except UserError as error:
        if not required:
            return None
        raise UserError(f"{error} (or give the number of samples: --samples)") from None


def _card(job: TrainJob, where: str) -> Card:
    if not isinstance(job.data.card, dict):
        raise UserError(f"{where}: data: without a dataset card the classes are not known: prepare the dataset first")
    return parse(Card, job.data.card, f"{where}: data.card")


# ------------------------------------------------------------------------------------------------- the picture


def draw(plan: planner.Plan, path: Path) -> None:
    """Draw the parts of a step and the rate over the number of workers, as PNG or SVG by the suffix of `path`."""
    import matplotlib
    from matplotlib.figure import Figure

    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--picture {path}: must end in .png or .svg")
    names = [f"{row.workers:,}" for row in plan.rows]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "plan", "text.parse_math": False}):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        steps, rates = figure.subplots(1, 2)
        below = [0.0] * len(names)
        for attribute, label, colour in PARTS:
            values = [100 * getattr(row, attribute) / row.step_ms for row in plan.rows]
            steps.bar(names, values, bottom=below, label=label, color=colour, width=0.6)
            below = [a + b for a, b in zip(below, values, strict=True)]
        steps.set_title("parts of a step, %", color=INK, loc="left", fontsize=11)
        first, xs = plan.rows[0], [row.workers for row in plan.rows]
        likely = [row.samples_per_s[1] for row in plan.rows]
        rates.plot(xs, [first.samples_per_s[1] * x / first.workers for x in xs], "--", color=GRID, label="ideal")
        low, high = [row.samples_per_s[0] for row in plan.rows], [row.samples_per_s[2] for row in plan.rows]
        rates.fill_between(xs, low, high, color=PARTS[0][2], alpha=0.25, linewidth=0, label="low to high")
        rates.plot(xs, likely, "o-", color=PARTS[0][2], label="likely")
        rates.set(xscale="log", yscale="log")
        rates.set_xticks(xs, names)
        rates.minorticks_off()
        rates.yaxis.set_major_formatter("{x:,g}")
        rates.set_title("samples per second", color=INK, loc="left", fontsize=11)
        for axes in (steps, rates):
            axes.set_xlabel("workers", color=INK)
            axes.legend(frameon=False, fontsize=9)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
        figure.suptitle(f"{plan.job} on {plan.cluster}", color=INK, fontsize=12)
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
