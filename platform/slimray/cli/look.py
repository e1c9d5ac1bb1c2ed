"""`slimray runs`, `show`, `dashboard`: the contents of a storage folder."""

import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from slimray.cli.terminal import AsJson, Storage, emit, out, say, storage_of
from slimray.spec import UserError, require_extra
from slimray.storage import StorageError

app = typer.Typer()

LAST = ("loss", "epoch", "num_samples", "num_quarantined", "chance", "macs")  # columns after the metrics of a task
HIDDEN = ("step", "params", "views", "batch", "peak_lr", "repeat", "attempt", "rank")


def print_numbers(title: str, card: dict[str, Any]) -> None:
    """Print the final numbers of a run: best and last of a training, or a row for each run of an evaluation."""
    metrics = card.get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    listed = metrics["rows"] if isinstance(metrics.get("rows"), list) else []
    rows = [row for row in listed if isinstance(row, dict)]
    rows = rows or [{"run": which, **row} for which, row in metrics.items() if isinstance(row, dict)]
    if not rows:
        return
    rows = [{key.removeprefix("val/"): value for key, value in row.items()} for row in rows]
    numbers = [key for row in rows for key, value in row.items() if isinstance(value, int | float)]
    first = [key for key in dict.fromkeys(numbers) if key not in LAST + HIDDEN]
    keys = [key for key in ("run", "variant", *first, *LAST) if any(key in row for row in rows)]
    say(title)
    table = Table()
    for key in keys:
        table.add_column(key.replace("_", " "), justify="left" if key in ("run", "variant") else "right")
    for row in rows:
        table.add_row(*[cell(row.get(key)) for key in keys])
    out.print(table)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


DAMAGED = (AttributeError, KeyError, TypeError, ValueError)  # raised by files whose content is not what we wrote


@app.command()
def runs(storage: Storage = None, as_json: AsJson = False) -> None:
    """List the runs of a storage folder: kind, state, best result, age."""
    from slimray import runs as folder

    where = storage_of(storage)
    rows = [_described(run) for run in folder.list_runs(where)]
    if as_json:
        emit(rows)
        return
    if not rows:
        say(f"no runs in {where} (--storage names another folder)")
        return
    table = Table()
    for key in ("name", "kind", "state", "result", "updated", "message"):
        table.add_column(key)
    for row in rows:
        table.add_row(*[cell(row.get(key)) for key in ("name", "kind", "state", "result", "updated", "message")])
    out.print(table)


def _described(run: Any) -> dict[str, Any]:
    """Return the row about a run; its message warns of a network that an earlier version stored incorrectly."""
    from slimray import runs
    from slimray.verbs import shipped

    found = runs.describe(run)
    said = shipped.warning(run) if found["state"] == "finished" else ""
    return found | {"message": said} if said else found


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A run, by name or URI.", metavar="RUN")],
    open_: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Show the numbers of a run and where its report is."""
    from slimray import runs as folder

    run = folder.find_run(name, storage_of(storage))
    described, card, latest = _described(run), None, {}
    if described["state"] != "damaged":
        card = folder.read_card(run)
        latest = {} if card else _latest(run)
        described |= spent(run)
    if as_json:
        emit(described | {"card": card, "latest": latest})
    else:
        for key in ("kind", "state", "message", "updated"):
            if described.get(key):
                say(f"{key}: {described[key]}")
        if told := in_words(described):
            say(f"so far: {told}")
        print_numbers(run.name, card or {})
        _say_goodput((card or {}).get("goodput"))
        for phase, row in latest.items():
            numbers = [
                f"{key.removeprefix(f'{phase}/')} {value:.4g}"
                for key, value in row.items()
                if key.startswith(f"{phase}/") and isinstance(value, int | float)
            ]
            say(f"{phase}: epoch {row['epoch']:.2f}, {', '.join(numbers)}")
        if described["state"] in ("failed", "stopped"):
            say(f"logs: {run.uri}/logs (the command that started it resumes it)")
        if folder.exists(run, "report.html"):
            say(f"report: {run.uri}/report.html")
        elif not open_:
            say("report: none yet, it is written when the run finishes")
    if open_:
        local = Path(run.uri.removeprefix("file://"), "report.html")
        if "://" in run.uri.removeprefix("file://"):
            raise UserError(f"{run.uri}/report.html: is on remote storage, copy it here to open it")
        if not local.is_file():
            raise UserError(f"{local}: there is no report yet, it is written when the run finishes")
        webbrowser.open(local.resolve().as_uri())


def spent(run: Any, worker_hour: float | None = None) -> dict[str, Any]:
    """Return the worker_hours of a training up to its newest checkpoint, and their cost where a price is known.

    `worker_hour` is the price per worker-hour if the job itself gives none. Returns {} if the run cannot be read.
    """
    from slimray import runs

    try:
        hours = runs.worker_hours(run)
        limits = (runs.read_job(run) if hours is not None else {}).get("limits")
    except (StorageError, UserError, *DAMAGED):
        return {}
    priced = limits.get("worker_hour") if isinstance(limits, dict) else None
    price = priced if isinstance(priced, int | float) else worker_hour
    if hours is None:
        return {}
    return {"worker_hours": round(hours, 3)} | ({} if price is None else {"cost": round(hours * price, 2)})


def in_words(found: dict[str, Any]) -> str:
    """Return the result of `spent` as text, `12.5 worker-hours, at a cost of 31.25`, or "" if it is empty."""
    if "worker_hours" not in found:
        return ""
    cost = f", at a cost of {found['cost']:.2f}" if "cost" in found else ""
    return f"{found['worker_hours']:.3g} worker-hours{cost}"


def _say_goodput(good: Any) -> None:
    """Print the share of time that went into steps, if the card of the run holds it."""
    keys = ("goodput", "useful_s", "wall_s", "restarts", "repeated_steps")
    found = [good.get(key) if isinstance(good, dict) else None for key in keys]
    numbers = [number for number in found if isinstance(number, int | float)]
    if len(numbers) == len(keys):
        share, useful, wall, restarts, repeated = numbers
        say(
            f"goodput: {100 * share:.0f} %, {useful:g} s of steps in {wall:g} s"
            f" ({restarts} restarts, {repeated} steps repeated)"
        )


def _latest(run: Any) -> dict[str, dict[str, Any]]:
    """Return the newest row of each phase, from the newest metrics file of a run that has not finished."""
    from slimray import runs

    try:
        parts = runs.list_names(run, "metrics")
        lines = runs.read_file(run, f"metrics/{parts[-1]}").splitlines() if parts else []
        rows = [runs.parse_json(line, f"{run.uri}/metrics/{parts[-1]}") for line in lines]
        return {str(row["phase"]): row for row in rows if isinstance(row["epoch"], int | float)}
    except (StorageError, *DAMAGED):
        return {}


@app.command()
def dashboard(
    where: Annotated[
        str | None, typer.Argument(help="Where runs are, a folder or URI. Default: that of --storage.", metavar="URI")
    ] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 picks a free one.", min=0, max=65535)] = 8050,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    storage: Storage = None,
) -> None:
    """Serve a web page about a storage folder, updated while runs write; only this machine can reach it."""
    require_extra("dashboard", "slimray dashboard", "dash", "plotly")
    from slimray.report.dashboard import app as page

    page.serve(where or storage_of(storage), port, open_, say)
    sys.stdout.flush()
    os._exit(0)  # a normal exit would wait for reader threads whose storage does not respond
