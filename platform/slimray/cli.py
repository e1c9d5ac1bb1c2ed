"""The `slimray` command: check, run, look, predict. Exit codes: 0 done, 2 the user's mistake, 1 a run that failed.

Everything that needs Ray or torch is imported inside the verbs, so that `--help` is quick and `predict` works on a
machine without Ray. `--json` prints what a program may read, and nothing else, to standard output.
"""

import json
import os
import shutil
import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from slimray.spec import RunFailed, UserError

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=(__doc__ or "").split("\n")[0]
)
WIDTH = None if sys.stdout.isatty() else 160  # a file or a pipe has no width of its own
console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
out = Console(width=WIDTH)

Files = Annotated[list[str], typer.Argument(help="Job files; several documents in one file run in order.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field: section.field=value, or NAME:section.field=value.")
]
Storage = Annotated[
    str | None, typer.Option(help="Where runs lie: a folder, s3:// or gs://. Default $SLIMRAY_STORAGE or ./runs.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def _storage(given: str | None) -> str:
    return given or os.environ.get("SLIMRAY_STORAGE") or "runs"


def _emit(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to fill; must not hold other files of these names.")],
) -> None:
    """Copy example jobs and dataset cards into FOLDER to start from."""
    from slimray import job

    for part in ("jobs", "datasets"):
        source = job.packaged(part)
        for file in sorted(source.glob("*.yaml")):
            target = folder / part / file.name
            if target.exists():
                raise UserError(f"{target}: exists already, choose an empty folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    out.print(
        f"next: cd {folder} && slimray check jobs/quickstart.yaml && slimray run jobs/quickstart.yaml", highlight=False
    )


@app.command()
def check(files: Files, set_: Sets = None, storage: Storage = None, as_json: AsJson = False) -> None:
    """Validate jobs without running them, and print parameters, MACs, batch, learning rate and steps."""
    from slimray import job

    facts = job.check(job.load(files, set_ or []), _storage(storage))
    if as_json:
        _emit(facts)
        return
    for one in facts:
        table = Table(title=f"{one.pop('name')} ({one.pop('kind')})", show_header=False, title_justify="left")
        for key, value in one.items():
            table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
        out.print(table)


@app.command()
def run(
    files: Files,
    set_: Sets = None,
    storage: Storage = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Clear an unfinished or finished run of the same name first.")
    ] = False,
) -> None:
    """Run the jobs of FILES in order; a finished one is skipped, an unfinished one resumes where it stopped."""
    from slimray import job, runs

    loaded, where = job.load(files, set_ or []), _storage(storage)
    job.check(loaded, where)
    cpus = job.local_cpus(loaded)
    for one in loaded:
        try:
            job.run(one, where, console, restart, cpus)
        except UserError:
            raise
        except (RunFailed, OSError) as error:
            logs = f"{runs.open_run(where, one.job.name).uri}/logs"
            sentence = str(error).strip().splitlines()[0]
            raise RunFailed(f"{one.where}: {sentence} (logs: {logs}; the same command resumes the run)") from error
    _summary(loaded[-1].job.name, where)


def _summary(name: str, storage: str) -> None:
    from slimray import runs

    run = runs.find_run(name, storage)
    _print_run(run)
    if runs.exists(run, "report.html"):
        out.print(f"report: {run.uri}/report.html", highlight=False, soft_wrap=True)


COLUMNS = ("top1", "top5", "mean_class_accuracy", "loss", "epoch", "num_samples", "num_quarantined", "chance", "macs")


def _print_run(run: Any) -> None:
    """The final numbers of a run, best and last of a training, a row for each run of an evaluation."""
    from slimray import runs

    metrics = (runs.read_card(run) or {}).get("metrics") or {}
    rows = metrics.get("rows") or [{"run": which, **row} for which, row in metrics.items() if isinstance(row, dict)]
    if not rows:
        return
    rows = [{key.removeprefix("val/"): value for key, value in row.items()} for row in rows]
    keys = [key for key in ("run", "variant", *COLUMNS, "clips", "quarantined") if any(key in row for row in rows)]
    table = Table(title=run.name, title_justify="left")
    for key in keys:
        table.add_column(key.replace("_", " "), justify="left" if key in ("run", "variant") else "right")
    for row in rows:
        table.add_row(*[_cell(row.get(key)) for key in keys])
    out.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


@app.command()
def evaluate(
    names: Annotated[list[str], typer.Argument(help="Finished training runs, by name or URI.", metavar="RUN...")],
    name: Annotated[str | None, typer.Option(help="Name of the evaluation; default RUN-eval.")] = None,
    set_: Sets = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Score finished runs side by side, without writing a YAML; --set takes any field of an evaluate job."""
    from slimray import job, runs
    from slimray.jobs import evaluate as verb
    from slimray.spec import parse, set_value

    document: dict[str, Any] = {
        "kind": "evaluate",
        "name": name or f"{names[0].rstrip('/').rpartition('/')[2]}-eval",
        "runs": names,
    }
    for assignment in set_ or []:
        set_value(document, assignment)
    where = _storage(storage)
    one = job.Loaded(parse(verb.EvaluateJob, document, "evaluate"), "evaluate")
    job.run(one, where, console)
    if as_json:
        _emit((runs.read_card(runs.find_run(one.job.name, where)) or {}).get("metrics"))
    else:
        _summary(one.job.name, where)


@app.command()
def predict(
    name: Annotated[str, typer.Argument(help="A finished training run, by name or URI.", metavar="RUN")],
    files: Annotated[list[Path], typer.Argument(help="Videos.")],
    top: Annotated[int, typer.Option(help="Classes shown per file.", min=1)] = 5,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Print the best classes of each clip with their probabilities. Needs no Ray."""
    from slimray import predict as use
    from slimray import runs

    network = use.load_network(runs.find_run(name, _storage(storage)))
    bad, rows = 0, []
    for path, best, reason in use.predict_files(network, files, top):
        bad += bool(reason)
        rows.append({"file": str(path), "top": best, "reason": reason})
        if not as_json:
            shown = reason or "  ".join(f"{label} {100 * p:.1f} %" for label, p in best)
            out.print(f"{path}: {shown}", highlight=False, soft_wrap=True, markup=False)
    if as_json:
        _emit(rows)
    if bad:
        raise UserError(f"{bad} of {len(rows)} files could not be read, the others are above")


@app.command()
def runs(storage: Storage = None, as_json: AsJson = False) -> None:
    """List the runs of a storage folder: kind, state, best result, age."""
    from slimray import runs as folder

    rows = [folder.describe(run) for run in folder.list_runs(_storage(storage))]
    if as_json:
        _emit(rows)
        return
    table = Table()
    for key in ("name", "kind", "state", "result", "updated", "message"):
        table.add_column(key)
    for row in rows:
        table.add_row(*[str(row.get(key) or "") for key in ("name", "kind", "state", "result", "updated", "message")])
    out.print(table if rows else f"no runs in {_storage(storage)}")


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
    described = folder.describe(run) | {"card": folder.read_card(run)}
    if as_json:
        _emit(described)
        return
    for key in ("kind", "state", "message", "updated"):
        if described.get(key):
            out.print(f"{key}: {described[key]}", highlight=False, markup=False)
    _print_run(run)
    if not folder.exists(run, "report.html"):
        out.print("no report yet")
        return
    out.print(f"report: {run.uri}/report.html", highlight=False, soft_wrap=True)
    if open_:
        local = Path(f"{run.uri.removeprefix('file://')}/report.html")
        if not local.is_file():
            raise UserError(f"{run.uri}/report.html: lies on remote storage, copy it here to open it")
        webbrowser.open(local.resolve().as_uri())


@app.command()
def explain(
    what: Annotated[str | None, typer.Argument(help="A kind, a section as kind.section, or `models`.")] = None,
) -> None:
    """Explain the fields of a kind of job from their documentation, or list the models."""
    from slimray import job, models
    from slimray.spec import did_you_mean, lookup

    if what is None:
        for kind, spec in job.SPECS.items():
            out.print(f"{kind:10} {(spec.__doc__ or '').splitlines()[0]}", highlight=False)
        return
    if what == "models":
        table = Table()
        for key in ("name", "what", "options"):
            table.add_column(key)
        for name, row in models.MODELS.items():
            table.add_row(name, row.description, ", ".join(f"{k}={v}" for k, v in row.defaults.items()))
        out.print(table)
        return
    kind, *sections = what.split(".")
    spec: Any = lookup(job.SPECS, kind, "kind")
    for section in sections:
        if section not in spec.model_fields:
            raise UserError(f"explain {what}: no field {section!r}{did_you_mean(section, spec.model_fields)}")
        spec = _spec_inside(spec.model_fields[section].annotation)
        if spec is None:
            raise UserError(f"explain {what}: {section!r} is a value, it has no fields")
    table = Table(title=f"{what}: {(spec.__doc__ or '').splitlines()[0]}", title_justify="left")
    for key in ("field", "type", "default", "meaning"):
        table.add_column(key)
    for name, field in spec.model_fields.items():
        default = "required" if field.is_required() else _default(field)
        kind_of = _spec_inside(field.annotation)
        meaning = field.description or (f"section, see `slimray explain {what}.{name}`" if kind_of else "")
        shown = (
            kind_of.__name__
            if kind_of
            else str(field.annotation).replace("typing.", "").removeprefix("<class '").removesuffix("'>")
        )
        table.add_row(field.alias or name, shown, default, meaning)
    out.print(table)


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return "" if hasattr(value, "model_fields") else repr(value)


def _spec_inside(annotation: Any) -> Any:
    from pydantic import BaseModel

    kinds = [annotation, *getattr(annotation, "__args__", ())]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


@app.command()
def schema(
    card: Annotated[bool, typer.Option("--card", help="The schema of dataset cards in place of jobs.")] = False,
) -> None:
    """Print the JSON Schema of job files, for editors."""
    from pydantic import TypeAdapter

    from slimray import job
    from slimray.data.cards import Card

    _emit(Card.model_json_schema() if card else TypeAdapter(job.Job).json_schema(by_alias=True))


def main() -> None:
    """Entry point: turns the two kinds of errors into one sentence each and an exit code."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        app(standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        console.print("stopped: the same command resumes the run")
        sys.exit(1)
    except UserError as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except RunFailed as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        show = getattr(error, "show", None)
        if show is None or not type(error).__module__.startswith(("click", "typer")):
            raise
        show()  # a wrong option or argument
        sys.exit(2)


if __name__ == "__main__":
    main()
