"""`slimray check`, `run`, `evaluate`, `recalibrate`, `export`, `plan`: the commands that check, run and plan jobs."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from slimray.cli.look import cell, print_numbers
from slimray.cli.terminal import AsJson, Files, Restart, Sets, Storage, console, emit, out, say, storage_of
from slimray.spec import RunFailed, UserError, located

app = typer.Typer()


@app.command()
def check(files: Files, set_: Sets = None, storage: Storage = None, as_json: AsJson = False) -> None:
    """Validate jobs without running them, and print parameters, MACs, batch, learning rate and steps.

    Exit code 0 means that `run` would start; otherwise every problem is printed on a line of its own.
    """
    from slimray import job

    facts = job.check(job.load(files, set_ or []), storage_of(storage), look=True)
    if as_json:
        emit(facts)
    for one in facts if not as_json else ():
        say(f"{one['name']} ({one['kind']})")
        table = Table(show_header=False)
        for key, value in one.items():
            if key not in ("name", "kind", "problems"):
                table.add_row(key.replace("_", " "), fact(key, value))
        out.print(table)
    job.require(facts)


def fact(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(one)}" for name, one in value.items())
    if isinstance(value, list):
        return (" x " if key == "input" else ", ").join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else cell(value)


@app.command()
def run(
    files: Files,
    set_: Sets = None,
    storage: Storage = None,
    restart: Restart = False,
    wait_s: Annotated[
        float, typer.Option(help="Seconds to wait for another process that is writing the run to end.", min=0)
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Run the jobs of FILES in order; a finished job is skipped, an unfinished one resumes where it stopped."""
    from slimray import job

    rows = _run(job.load(files, set_ or []), storage_of(storage), restart, show=not as_json, wait_s=wait_s)
    if as_json:
        emit(rows)


@app.command()
def evaluate(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Finished runs that hold a network, by name or URI, and exports as RUN:FORMAT.", metavar="RUN..."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Name of the evaluation. Default: RUN-eval.")] = None,
    set_: Sets = None,
    storage: Storage = None,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Score finished runs and exports in one table, without a YAML file; --set takes any field of an evaluate job."""
    from slimray import runs
    from slimray.verbs import inputs

    where, first = storage_of(storage), inputs.split_export(names[0])[0]
    document = {"kind": "evaluate", "name": name or f"{runs.find_run(first, where).name}-eval", "runs": names}
    _run_document(document, set_, where, restart, as_json)


@app.command()
def recalibrate(
    run: Annotated[str, typer.Argument(help="A finished run that holds a network, by name or URI.", metavar="RUN")],
    name: Annotated[str | None, typer.Option(help="Name of the new run. Default: RUN-recalibrated.")] = None,
    set_: Sets = None,
    storage: Storage = None,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Write a new run in which a finished network has correct BatchNorm statistics, and its pictures their zoom.

    For networks that earlier versions stored incorrectly; `show` and `runs` name them.
    """
    from slimray import runs

    where = storage_of(storage)
    new = name or f"{runs.find_run(run, where).name}-recalibrated"
    document = {"kind": "recalibrate", "name": new, "run": run}
    _run_document(document, set_, where, restart, as_json)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A finished run that holds a network, by name or URI.", metavar="RUN")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="onnx, onnx_int8, openvino, executorch, executorch_int8, ncnn, litert, torch; several with commas.",
        ),
    ] = "onnx",
    online: Annotated[bool, typer.Option("--online", help="Export a causal TSM as a step per frame.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the new run. Default: RUN-export or RUN-online.")] = None,
    set_: Sets = None,
    storage: Storage = None,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Write a network in formats that run without torch, verified on real samples and timed; needs no Ray."""
    from slimray import runs

    where = storage_of(storage)
    formats = [one.strip() for one in format_.split(",") if one.strip()]
    document = {"kind": "export", "run": run, "formats": formats, "online": online}
    document["name"] = name or f"{runs.find_run(run, where).name}-{'online' if online else 'export'}"
    _run_document(document, set_, where, restart, as_json)


def _run_document(document: dict[str, Any], set_: list[str] | None, storage: str, restart: bool, as_json: bool) -> None:
    """Run the single job that a command has composed; `as_json` prints its metrics and nothing else."""
    from slimray import job

    rows = _run(job.resolve([(Path(document["kind"]), document)], set_ or []), storage, restart, show=not as_json)
    if as_json:
        emit(rows[0]["metrics"])


def _run(loaded: list[Any], storage: str, restart: bool, show: bool, wait_s: float = 0) -> list[dict[str, Any]]:
    """Check all jobs, then run them in order; return a row for each. With `show`, print the metrics of the last one."""
    from slimray import job, runs
    from slimray.storage import patient

    with patient(max(job.storage_s(one) for one in loaded)):  # nobody may be there to start the command again
        for one in loaded if wait_s else ():
            runs.wait_for_writer(runs.open_run(storage, one.job.name), wait_s, console.print)
        job.require(job.check(loaded, storage, restart, to_run=True))
    cpus, rows = job.local_cpus(loaded), []
    for one in loaded:
        with patient(job.storage_s(one)):
            done = _do(one, storage, restart, cpus)
        run = runs.open_run(storage, one.job.name)
        metrics = (runs.read_card(run) or {}).get("metrics")
        rows.append({"name": run.name, "kind": one.job.kind, "result": done, "uri": run.uri, "metrics": metrics})
    if show:
        run = runs.open_run(storage, loaded[-1].job.name)
        print_numbers(run.name, rows[-1])
        if runs.exists(run, "report.html"):
            say(f"report: {run.uri}/report.html")
    return rows


def _do(one: Any, storage: str, restart: bool, cpus: int) -> str:
    """Run one job and return "finished" or "skipped"; errors name the job, its logs and the next step."""
    from slimray import job
    from slimray.storage import absolute, join

    try:
        return job.run(one, storage, console, restart, cpus)
    except UserError as error:
        raise UserError(located(str(error), one.where)) from None
    except KeyboardInterrupt:
        raise RunFailed(f"{one.where}: stopped (the same command resumes the run)") from None
    except (RunFailed, OSError) as error:
        logs = join(absolute(storage), one.job.name, "logs")
        sentence = (str(error).strip().splitlines() or [type(error).__name__])[0]
        code = error.code if isinstance(error, RunFailed) else 1
        raise RunFailed(f"{one.where}: {sentence} (logs: {logs}; the same command resumes the run)", code) from error


@app.command()
def plan(
    files: Files,
    workers: Annotated[
        str | None, typer.Option(help="Numbers of workers to plan for, such as 6,96,768. Default: the job's.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Cluster file (a name or a path) with a machine section. Default: this machine.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Number of training samples, if the dataset is not here to be counted.", min=1)
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="First measure one worker on this machine.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the plan to FILE.png or FILE.svg.")] = None,
    set_: Sets = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Predict step time, throughput, hours and cost of jobs of kind train, their bottleneck and what to change.

    Jobs of other kinds that train (shrink, proxyless) are listed but not planned: their steps train several networks.

    --measure times a dozen steps and some decoding here and stores them in STORAGE/calibration.json for later plans.
    """
    from slimray import job
    from slimray.verbs import plan as planning
    from slimray.verbs.specs import TrainJob

    where, loaded = storage_of(storage), job.load(files, set_ or [])
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
    others = [one.job for one in loaded if hasattr(one.job, "optim") and not isinstance(one.job, TrainJob)]
    if not plans:
        kinds = "".join(f"; {other.name} is of kind {other.kind}" for other in others)
        raise UserError(f"{files[0]}: has no job of kind train, and only those can be planned{kinds}")
    if picture is not None:
        planning.draw(plans[-1][0], picture)
    if as_json:
        emit([dataclasses.asdict(found) | {"calibration": written} for found, written in plans])
        return
    for found, written in plans:
        _print_plan(found)
        if written:
            say(f"measured, and stored for later plans: {written}")
    for other in others:
        say(f"{other.name}: not planned, only jobs of kind train are (its kind: {other.kind})")
    if picture is not None:
        say(f"picture: {picture}")


def _worker_counts(text: str | None) -> list[int]:
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--workers {text}: must be whole numbers above 0, separated by commas, such as 6,96,768")
    return sorted({int(word) for word in words})


def _print_plan(found: Any) -> None:
    """Print a row for each number of workers, what to change, and where the figures come from."""
    say(f"{found.job} on {found.cluster}: likely [low, high]")
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
        asked = f" ({row.requests_s:,.0f} requests/s to a bucket)" if row.requests_s else ""
        say(
            f"{row.workers:,} workers: {row.advice}; {row.decode_cores:.1f} cores to decode, "
            f"{row.storage_mb_s:.1f} MB/s from storage{asked}, {row.algorithm} all-reduce, {row.control_ms:.2f} ms of "
            f"control path per step, {row.blocks_s:.1f} blocks/s through a feeder, a checkpoint every "
            f"{row.checkpoint_every_s:.0f} s (goodput {100 * row.goodput:.1f} %)"
        )
    say(f"times: {found.basis}")
    for note in found.notes:
        say(f"note: {note}")


def _interval(values: Any, form: str) -> str:
    low, likely, high = map(form.format, values)
    return f"{likely} [{low}, {high}]"
