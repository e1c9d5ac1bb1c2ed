"""The `slimray` command: check, run, look, predict. Exit codes: 0 done, 2 your mistake, 1 failed, 3 no retries left.

Everything that needs Ray or torch is imported inside the verbs, so that `--help` is quick and `predict` works on a
machine without Ray. `--json` prints what a program may read, and nothing else, to standard output.
"""

import dataclasses
import json
import os
import shlex
import shutil
import sys
import types
import webbrowser
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from rich.console import Console
from rich.table import Table

from slimray import __version__
from slimray.cli import cluster
from slimray.spec import RunFailed, UserError, did_you_mean, located, lookup, require_extra, set_value

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=(__doc__ or "").split("\n")[0]
)
app.add_typer(cluster.app)
WIDTH = 160  # of a file or a pipe, which have none of their own
PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}  # names are text, whatever is in them
console = Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH, **PLAIN)
out = Console(width=None if sys.stdout.isatty() else WIDTH, **PLAIN)

Files = Annotated[
    list[str], typer.Argument(help="Job files; several documents in one file run in order.", metavar="FILE...")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field: section.field=value, or NAME:section.field=value.")
]
Storage = Annotated[
    str | None, typer.Option(help="Where runs lie: a folder, s3:// or gs://. Default $SLIMRAY_STORAGE or ./runs.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Clear an unfinished or finished run of the same name first.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def _storage(given: str | None) -> str:
    return given or os.environ.get("SLIMRAY_STORAGE") or "runs"


def _emit(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def _say(text: str) -> None:
    """A line of its own, however long."""
    out.print(text, soft_wrap=True)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        _say(f"slimray {__version__}")
        raise typer.Exit


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to fill; must not hold files of these names.")],
) -> None:
    """Copy example jobs, dataset cards, cluster files and their schemas into FOLDER to start from."""
    from slimray.verbs import inputs

    pairs = [
        (file, folder / part / file.name)
        for part in ("jobs", "datasets")
        for pattern in ("*.yaml", "*.json")
        for file in sorted(inputs.packaged(part).glob(pattern))
    ]
    clusters = inputs.packaged("cluster")
    pairs += [(f, folder / "cluster" / f.relative_to(clusters)) for f in sorted(clusters.rglob("*")) if f.is_file()]
    if not pairs:
        raise UserError("init: this installation of slimray came without its examples: install it again")
    for _, target in pairs:
        if target.exists():
            raise UserError(f"{target}: exists already, choose an empty folder")
    for file, target in pairs:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    go = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))} && "
    _say(f"next: {go}slimray check jobs/quickstart.yaml && slimray run jobs/quickstart.yaml")


# ------------------------------------------------------------------------------------------------ check and run


@app.command()
def check(files: Files, set_: Sets = None, storage: Storage = None, as_json: AsJson = False) -> None:
    """Validate jobs without running them, and print parameters, MACs, batch, learning rate and steps.

    Exit code 0 means that `run` would start; else all that is wrong is printed, a line each.
    """
    from slimray import job

    facts = job.check(job.load(files, set_ or []), _storage(storage), look=True)
    if as_json:
        _emit(facts)
    for one in facts if not as_json else ():
        _say(f"{one['name']} ({one['kind']})")
        table = Table(show_header=False)
        for key, value in one.items():
            if key not in ("name", "kind", "problems"):
                table.add_row(key.replace("_", " "), _fact(key, value))
        out.print(table)
    job.require(facts)


def _fact(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(one)}" for name, one in value.items())
    if isinstance(value, list):
        return (" x " if key == "input" else ", ").join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else _cell(value)


@app.command()
def run(
    files: Files,
    set_: Sets = None,
    storage: Storage = None,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Run the jobs of FILES in order; a finished one is skipped, an unfinished one resumes where it stopped."""
    from slimray import job

    rows = _run(job.load(files, set_ or []), _storage(storage), restart, show=not as_json)
    if as_json:
        _emit(rows)


@app.command()
def evaluate(
    names: Annotated[list[str], typer.Argument(help="Finished training runs, by name or URI.", metavar="RUN...")],
    name: Annotated[str | None, typer.Option(help="Name of the evaluation; default RUN-eval.")] = None,
    set_: Sets = None,
    storage: Storage = None,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Score finished runs side by side, without writing a YAML; --set takes any field of an evaluate job."""
    from slimray import job, runs

    where = _storage(storage)
    document = {"kind": "evaluate", "name": name or f"{runs.find_run(names[0], where).name}-eval", "runs": names}
    rows = _run(job.resolve([(Path("evaluate"), document)], set_ or []), where, restart, show=not as_json)
    if as_json:
        _emit(rows[0]["metrics"])


def _run(loaded: list[Any], storage: str, restart: bool, show: bool) -> list[dict[str, Any]]:
    """Check everything, then do the jobs in order; returns a row for each, and on `show` prints what the last found."""
    from slimray import job, runs

    job.require(job.check(loaded, storage, restart))
    cpus, rows = job.local_cpus(loaded), []
    for one in loaded:
        done = _do(one, storage, restart, cpus)
        run = runs.open_run(storage, one.job.name)
        metrics = (runs.read_card(run) or {}).get("metrics")
        rows.append({"name": run.name, "kind": one.job.kind, "result": done, "uri": run.uri, "metrics": metrics})
    if show:
        run = runs.open_run(storage, loaded[-1].job.name)
        _print_numbers(run.name, rows[-1])
        if runs.exists(run, "report.html"):
            _say(f"report: {run.uri}/report.html")
    return rows


def _do(one: Any, storage: str, restart: bool, cpus: int) -> str:
    """Do one job: "finished" or "skipped"; what goes wrong says which job, where its log is and how to go on."""
    from slimray import job, runs

    try:
        return job.run(one, storage, console, restart, cpus)
    except UserError as error:
        raise UserError(located(str(error), one.where)) from None
    except KeyboardInterrupt:
        raise RunFailed(f"{one.where}: stopped: the same command resumes the run") from None
    except (RunFailed, OSError) as error:
        logs = f"{runs.open_run(storage, one.job.name).uri}/logs"
        sentence = (str(error).strip().splitlines() or [type(error).__name__])[0]
        code = error.code if isinstance(error, RunFailed) else 1
        raise RunFailed(f"{one.where}: {sentence} (logs: {logs}; the same command resumes the run)", code) from error


@app.command()
def plan(
    files: Files,
    workers: Annotated[
        str | None, typer.Option(help="Numbers of workers to plan for: 6,96,768. Default: the job's.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Cluster file (a name or a path) with a machine section. Default: this machine.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Training samples, where the dataset is not at hand.", min=1)
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="First measure one worker on this machine.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the plan into FILE.png or FILE.svg.")] = None,
    set_: Sets = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Predict step time, throughput, hours and cost of training jobs, what bounds them and what to change.

    --measure times a dozen steps and some decoding here and keeps that in STORAGE/calibration.json for later plans.
    """
    from slimray import job
    from slimray.verbs import plan as planning
    from slimray.verbs.specs import TrainJob

    where, loaded = _storage(storage), job.load(files, set_ or [])
    counts = _worker_counts(workers)
    known = {one["name"]: one for one in job.check(loaded, where, restart=True)}
    plans = []
    for one in loaded:
        if not isinstance(one.job, TrainJob):
            continue
        count = samples or known[one.job.name].get("train_samples")
        prepared = next((other.job for other in loaded if other.job.name == one.job.data.run), None)
        pack = getattr(getattr(prepared, "pack", None), "format", "")
        plans.append(planning.plan_job(one.job, one.where, where, counts, cluster, count, measure, pack))
    if not plans:
        raise UserError(f"{files[0]}: holds no job of kind train, only those are planned")
    if picture is not None:
        planning.draw(plans[-1][0], picture)
    if as_json:
        _emit([dataclasses.asdict(found) | {"calibration": written} for found, written in plans])
        return
    for found, written in plans:
        _print_plan(found)
        if written:
            _say(f"measured, for later plans too: {written}")
    if picture is not None:
        _say(f"picture: {picture}")


def _worker_counts(text: str | None) -> list[int]:
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--workers {text}: must be whole numbers above 0 with commas, such as 6,96,768")
    return sorted({int(word) for word in words})


def _print_plan(found: Any) -> None:
    """A row for each number of workers, what to change, and where the figures are from."""
    _say(f"{found.job} on {found.cluster}: likely [low, high]")
    table = Table()
    names = ["workers", "step ms", "compute", "data", "all-reduce", "stragglers"]
    for name in (*names, "samples/s", "efficiency", "hours", "USD", "bottleneck"):
        table.add_column(name, justify="left" if name == "bottleneck" else "right")
    for row in found.rows:
        parts = (row.step_ms, row.compute_ms, row.data_ms, row.comm_ms, row.straggler_ms)
        table.add_row(
            f"{row.workers:,}", *[f"{value:.1f}" for value in parts], _interval(row.samples_per_s, "{:,.1f}"),
            _interval([100 * value for value in row.efficiency], "{:.0f}") + " %", _interval(row.hours, "{:,.2f}"),
            _interval(row.usd, "{:,.0f}") if row.usd else "", row.bottleneck,
        )  # fmt: skip
    out.print(table)
    for row in found.rows:
        _say(
            f"{row.workers:,} workers: {row.advice}; {row.decode_cores:.1f} cores to decode, "
            f"{row.storage_mb_s:.1f} MB/s of storage, {row.algorithm} all-reduce, a checkpoint every "
            f"{row.checkpoint_every_s:.0f} s (goodput {100 * row.goodput:.1f} %)"
        )
    _say(f"times: {found.basis}")
    for note in found.notes:
        _say(f"note: {note}")


def _interval(values: Any, form: str) -> str:
    low, likely, high = map(form.format, values)
    return f"{likely} [{low}, {high}]"


# ---------------------------------------------------------------------------------------------- look at what is there


COLUMNS = (
    "top1",
    "top5",
    "miou",
    "instance_miou",
    "category_miou",
    "overall_acc",
    "class_found_3d",
    "mean_iou_3d",
    "mask_acc",
    "mean_class_accuracy",
    "loss",
    "epoch",
    "num_samples",
    "num_quarantined",
    "chance",
    "macs",
)


def _print_numbers(title: str, card: dict[str, Any]) -> None:
    """The final numbers of a run: best and last of a training, a row for each run of an evaluation."""
    metrics = card.get("metrics") or {}
    rows = metrics.get("rows") or [{"run": which, **row} for which, row in metrics.items() if isinstance(row, dict)]
    if not rows:
        return
    rows = [{key.removeprefix("val/"): value for key, value in row.items()} for row in rows]
    keys = [key for key in ("run", "variant", *COLUMNS, "clips", "quarantined") if any(key in row for row in rows)]
    _say(title)
    table = Table()
    for key in keys:
        table.add_column(key.replace("_", " "), justify="left" if key in ("run", "variant") else "right")
    for row in rows:
        table.add_row(*[_cell(row.get(key)) for key in keys])
    out.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return (
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else "" if value is None else str(value)
    )


DAMAGED = (AttributeError, KeyError, TypeError, ValueError)  # what a file with other content than we wrote ends in


def _describe(run: Any) -> dict[str, Any]:
    """A line about a run; `damaged` if its folder does not hold what slimray writes."""
    from slimray import runs

    try:
        return runs.describe(run)
    except (UserError, RunFailed, *DAMAGED) as error:
        message = (
            str(error)
            if isinstance(error, UserError | RunFailed)
            else f"is no run folder as slimray writes it ({error})"
        )
        return {
            "name": run.name, "kind": None, "state": "damaged", "result": None, "updated": None,
            "message": message, "uri": run.uri,
        }  # fmt: skip


@app.command()
def runs(storage: Storage = None, as_json: AsJson = False) -> None:
    """List the runs of a storage folder: kind, state, best result, age."""
    from slimray import runs as folder

    where = _storage(storage)
    rows = [_describe(run) for run in folder.list_runs(where)]
    if as_json:
        _emit(rows)
        return
    if not rows:
        _say(f"no runs in {where} (--storage looks elsewhere)")
        return
    table = Table()
    for key in ("name", "kind", "state", "result", "updated", "message"):
        table.add_column(key)
    for row in rows:
        table.add_row(*[str(row.get(key) or "") for key in ("name", "kind", "state", "result", "updated", "message")])
    out.print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A run, by name or URI.", metavar="RUN")],
    open_: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Show the numbers of a run and where its report lies."""
    from slimray import runs as folder

    run = folder.find_run(name, _storage(storage))
    described, card, latest = _describe(run), None, {}
    if described["state"] != "damaged":
        card = folder.read_card(run)
        latest = {} if card else _latest(run)
    if as_json:
        _emit(described | {"card": card, "latest": latest})
    else:
        for key in ("kind", "state", "message", "updated"):
            if described.get(key):
                _say(f"{key}: {described[key]}")
        _print_numbers(run.name, card or {})
        if isinstance(good := (card or {}).get("goodput"), dict):
            _say(
                f"goodput: {100 * good['goodput']:.0f} %, {good['useful_s']:g} s of steps in {good['wall_s']:g} s"
                f" ({good['restarts']} restarts, {good['repeated_steps']} steps done again)"
            )
        for phase, row in latest.items():
            numbers = [
                f"{key.removeprefix(f'{phase}/')} {value:.4g}"
                for key, value in row.items()
                if key.startswith(f"{phase}/") and isinstance(value, int | float)
            ]
            _say(f"{phase}: epoch {row['epoch']:.2f}, {', '.join(numbers)}")
        if described["state"] in ("failed", "stopped"):
            _say(f"logs: {run.uri}/logs (the command that started it resumes it)")
        if folder.exists(run, "report.html"):
            _say(f"report: {run.uri}/report.html")
        elif not open_:
            _say("report: none yet, it is written when the run has finished")
    if open_:
        local = Path(run.uri.removeprefix("file://"), "report.html")
        if "://" in run.uri.removeprefix("file://"):
            raise UserError(f"{run.uri}/report.html: lies on remote storage, copy it here to open it")
        if not local.is_file():
            raise UserError(f"{local}: there is no report yet, it is written when the run has finished")
        webbrowser.open(local.resolve().as_uri())


def _latest(run: Any) -> dict[str, dict[str, Any]]:
    """The newest row of each phase in the newest part of the metrics of a run that has not finished."""
    from slimray import runs

    parts = runs.list_names(run, "metrics")
    try:
        lines = runs.read_file(run, f"metrics/{parts[-1]}").splitlines() if parts else []
        return {str(row["phase"]): row for row in map(json.loads, lines) if isinstance(row["epoch"], int | float)}
    except DAMAGED:
        return {}


@app.command()
def dashboard(
    where: Annotated[
        str | None, typer.Argument(help="Where runs lie, a folder or URI. Default: that of --storage.", metavar="URI")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of 127.0.0.1; 0 takes a free one.", min=0, max=65535)] = 8050,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    storage: Storage = None,
) -> None:
    """Serve a web page over a storage folder, live while runs write; only this machine can reach it."""
    require_extra("dashboard", "slimray dashboard", "dash", "plotly")
    from slimray.report.dashboard import app as page

    page.serve(where or _storage(storage), port, open_, _say)
    sys.stdout.flush()
    os._exit(0)  # the interpreter would wait for a reader whose storage does not answer


@app.command()
def predict(
    name: Annotated[str, typer.Argument(help="A finished training run, by name or URI.", metavar="RUN")],
    files: Annotated[list[Path], typer.Argument(help="Videos, images, or clouds of points.", metavar="FILE...")],
    top: Annotated[int, typer.Option(help="Classes shown per file.", min=1)] = 5,
    columns: Annotated[
        str | None,
        typer.Option(
            help='Of clouds: "x y z nx ny nz r g b"; "-" leaves one out; label=NAME, decimal=comma, delimiter=tab.'
        ),
    ] = None,
    shape: Annotated[
        int | None, typer.Option(help="Class of the clouds, from 0, for a network trained with one_hot.", min=0)
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for labels of points. Default: beside each file.")
    ] = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Print the best classes of each clip, image or cloud with their probabilities. Needs no Ray.

    A network that labels points writes NAME.labels.npz and NAME.labels.ply; printed are the classes' shares of points.
    """
    from safetensors import SafetensorError

    from slimray import runs
    from slimray.tasks import predict as use

    run = runs.find_run(name, _storage(storage))
    try:
        network = use.load_network(run)
    except UserError as error:
        raise UserError(located(str(error), run.uri)) from None
    except (RuntimeError, SafetensorError, FileNotFoundError, *DAMAGED) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{run.uri}/model: is damaged or of another version ({reason}): train it again") from None
    there = [path for path in files if path.is_file()]
    names = (columns or "").replace(",", " ").split()
    answers = use.predict_files(network, there, top, columns=names, shape=shape, out=folder)
    rows: list[dict[str, Any]] = []
    for path in files:
        found = next(answers) if path in there else use.Answer(path, reason="no such file")
        written = [str(one) for one in found.written]
        row = {"file": str(path), "top": found.top, "reason": found.reason, "written": written}
        rows.append(row | ({"notes": found.notes} if found.notes else {}))
        if not as_json:
            _say(f"{path}: {found.reason or '  '.join(f'{label} {100 * p:.1f} %' for label, p in found.top)}")
        if found.notes and not as_json:
            _say(f"  {found.notes}")
        if written and not as_json:
            _say(f"  labels of its points: {', '.join(written)}")
    if as_json:
        _emit(rows)
    bad = sum(bool(row["reason"]) for row in rows)
    if bad:
        raise UserError(f"{bad} of {len(rows)} files could not be read, the reasons are above")


@app.command()
def profile(
    what: Annotated[str, typer.Argument(help="A finished shrink run, or an ofa_ model.", metavar="RUN_OR_MODEL")],
    hardware: Annotated[str, typer.Option(help="cpu-eager, cpu-compiled, cpu-onnx or cuda.")] = "cpu-eager",
    threads: Annotated[int, typer.Option(help="Threads of the network on a CPU.", min=1)] = 1,
    table: Annotated[str | None, typer.Option("--out", help="The table; default WHAT.HARDWARE.json here.")] = None,
    preset: Annotated[str | None, typer.Option(help="Of a model: its space.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Option of a model: width=1.2, num_classes=10.")
    ] = None,
    resolutions: Annotated[
        str | None, typer.Option(help="Measured ones: 128,176,224; costs in between are interpolated. Default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Readings of every operator.", min=2)] = 15,
    calibrate: Annotated[int, typer.Option(help="Subnets measured whole, to calibrate.", min=4)] = 12,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Measure how long every operator of a supernet takes on this machine, as a table for the targets of a search.

    Minutes with cpu-eager; cpu-compiled and cpu-onnx take seconds for every operator and so few resolutions by default.
    The same command goes on with a table that was cut off. One thread is timed by the processor time that it got.
    Needs no Ray. In a job: `targets: [{name: here, hardware: TABLE.json, limits: {latency_ms: 12}}]`.
    """
    from slimray import models
    from slimray.edge import latency_table, profiler
    from slimray.verbs import inputs

    num_points, options = None, dict[str, Any](name=what, num_classes=1000)
    if what in models.MODELS:
        if not models.MODELS[what].supernet or models.MODELS[what].input == "points":
            raise UserError(f"profile {what}: must be an ofa_ model of images or clips, or a run of kind shrink")
        for assignment in [*([f"preset={preset}"] if preset else []), *(set_ or [])]:
            set_value(options, assignment)
    else:
        if preset or set_:
            raise UserError(f"profile {what}: --preset and --set are for models, a run says what it holds")
        where = f"profile {what}"
        run = inputs.finished_run(what, _storage(storage), ("supernet",), where)
        options, recipe = inputs.read_model(run, where), inputs.read_input(run, where)["recipe"]
        num_points = recipe["num_points"] if recipe["kind"] == "points" else None
    words = [word.strip() for word in (resolutions or "").split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--resolutions {resolutions}: must be whole numbers with commas, such as 128,176,224")
    path = table or f"{what.rstrip('/').rpartition('/')[2]}.{hardware}.json"
    found = profiler.profile(
        models.build(**options).eval(), options, path, hardware=hardware, threads=threads, num_points=num_points,
        resolutions=[int(word) for word in words] or None, rounds=rounds, calibrate=calibrate,
        say=lambda text: console.print(f"{path}: {text}", soft_wrap=True),
    )  # fmt: skip
    facts = latency_table.summary(found)
    if as_json:
        _emit({"table": path} | facts)
        return
    for key, value in facts.items():
        _say(f"{key.replace('_', ' ')}: {_fact(key, value)}")
    _say(f"table: {path}")


# --------------------------------------------------------------------------------------------------------- help


@app.command()
def explain(
    what: Annotated[
        str | None,
        typer.Argument(help="A kind, `card`, `models`; a section or field of them: train.optim, models.tsm_resnet50."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain the fields of a kind of job from their documentation, or list the models and their options."""
    from slimray import job
    from slimray.data.cards import Card

    topics: dict[str, Any] = {**job.SPECS, "card": Card, "models": None}
    kind, *path = (what or "").split(".")
    if what is None:
        title = "slimray explain WHAT"
        rows = [{"what": name, "meaning": _first_line(spec)} for name, spec in job.SPECS.items()]
        rows.append({"what": "card", "meaning": _first_line(Card)})
        rows.append({"what": "models", "meaning": "The networks; models.NAME: the options of one."})
    elif lookup(topics, kind, "topic") is None:
        title, rows = what, _explain_models(path)
    else:
        title, rows = _explain_spec(topics[kind], kind, path)
    if as_json:
        _emit(rows)
        return
    _say(title)
    table = Table()
    for key in rows[0]:
        table.add_column(key)
    for row in rows:
        table.add_row(*[str(value) for value in row.values()])
    out.print(table)


def _explain_models(path: list[str]) -> list[dict[str, str]]:
    from slimray import models
    from slimray.verbs.specs import OWNED

    if not path:
        return [
            {"name": name, "what": row.description, "takes": row.input, "options": _options_text(row.defaults)}
            for name, row in models.MODELS.items()
        ]
    options = models.options_of(".".join(path))
    return [
        {"option": name, "type": _type_name(type(value)), "default": _literal(value)}
        for name, value in options.items()
        if name not in OWNED
    ]


def _options_text(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in options.items())


def _explain_spec(spec: Any, what: str, path: list[str]) -> tuple[str, list[dict[str, str]]]:
    """A title and a row per field of the section at `path`, or the one row of a field that holds a value."""
    from slimray import job

    for place, section in enumerate(path):
        fields = {field.alias or name: field for name, field in spec.model_fields.items()}
        if section not in fields:
            raise UserError(f"explain {what}: there is no field {section!r}{did_you_mean(section, fields)}")
        inner = job.section_of(fields[section].annotation)
        if inner is None and place + 1 < len(path):
            raise UserError(f"explain {what}.{section}: is a value, it has no fields")
        if inner is None:
            return what, [_explain_field(section, fields[section], what)]
        spec, what = inner, f"{what}.{section}"
    title = f"{what}: {_first_line(spec)}"
    fields = {field.alias or name: field for name, field in spec.model_fields.items()}
    return title, [_explain_field(name, field, what) for name, field in fields.items()]


def _explain_field(name: str, field: Any, what: str) -> dict[str, str]:
    from slimray import job

    inner = job.section_of(field.annotation)
    default = "required"
    if not field.is_required():
        value = field.get_default(call_default_factory=True)
        default = "" if hasattr(value, "model_fields") else _literal(value)
    meaning = field.description or (f"{_first_line(inner)} See `slimray explain {what}.{name}`." if inner else "")
    return {
        "field": name,
        "type": _type_name(field.annotation),
        "default": default,
        "meaning": " ".join(meaning.split()),
    }


def _first_line(spec: Any) -> str:
    return (spec.__doc__ or "").split("\n")[0]


def _literal(value: Any) -> str:
    """A default as one would write it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type_name(annotation: Any) -> str:
    """The type of a field in a user's words: text, number, list of ..., `a | b`."""
    names = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true | false",
        type(None): "null",
        Any: "anything",
    }
    if annotation in names:
        return names[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(one) for one in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_type_name(arguments[0])}"
        return f"[{', '.join(_type_name(one) for one in arguments)}]"
    return "mapping" if origin is dict else "section"


@app.command()
def schema(
    card: Annotated[bool, typer.Option("--card", help="The schema of dataset cards in place of jobs.")] = False,
) -> None:
    """Print the JSON Schema of job files, for editors: jobs/schema.json, and datasets/card.schema.json by --card."""
    from slimray import job

    _emit(job.card_schema() if card else job.json_schema())


def main() -> None:
    """Entry point: turns the two kinds of errors into one sentence each and an exit code."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        app(standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("stopped", 1)
    except UserError as error:
        _fail(str(error), 2)
    except RunFailed as error:
        _fail(str(error), error.code)
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'slimray'}: {(error.strerror or str(error)).lower()}", 2)
    except Exception as error:
        show = getattr(error, "show", None)
        if show is None or not type(error).__module__.startswith(("click", "typer")):
            raise
        show()  # a wrong option or argument
        sys.exit(2)


def _fail(sentence: str, code: int) -> None:
    console.print(sentence, style="red", soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
