"""`slimray explain`, `schema`: every field of a job and every model, for people and for editors."""

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from rich.table import Table

from slimray.cli.terminal import AsJson, emit, out, say
from slimray.spec import UserError, did_you_mean, lookup

app = typer.Typer()


@app.command()
def explain(
    what: Annotated[
        str | None,
        typer.Argument(help="A kind, `card`, `models`, `tasks`; a section or field: train.optim, models.tsm_resnet50."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain the fields of a kind of job from their documentation, or list the models and their options."""
    from slimray import job
    from slimray.data.cards import Card

    topics: dict[str, Any] = {**job.SPECS, "card": Card, "models": None, "tasks": None}
    kind, *path = (what or "").split(".")
    if what is None:
        title = "slimray explain WHAT"
        rows = [{"what": name, "meaning": _first_line(spec)} for name, spec in job.SPECS.items()]
        rows.append({"what": "card", "meaning": _first_line(Card)})
        rows.append({"what": "models", "meaning": "The networks; models.NAME lists the options of one."})
        rows.append({"what": "tasks", "meaning": "The tasks, with their metrics and the fields of data.task."})
    elif lookup(topics, kind, "topic") is None:
        title, rows = what, _explain_tasks() if kind == "tasks" else _explain_models(path)
    else:
        title, rows = _explain_spec(topics[kind], kind, path)
    if as_json:
        emit(rows)
        return
    say(title)
    table = Table()
    for key in rows[0]:
        table.add_column(key)
    for row in rows:
        table.add_row(*[str(value) for value in row.values()])
    out.print(table)


def _explain_tasks() -> list[dict[str, str]]:
    from slimray.tasks import TASKS

    def metric(one: Any) -> str:
        return f"{one.name}{f' [{one.unit}]' if one.unit else ''}{', lower is better' if one.better == 'lower' else ''}"

    return [
        {
            "task": name,
            "metrics": "; ".join(metric(one) for one in task.metrics),
            "data.task": ", ".join(f"{key}: {field.default}" for key, field in task.spec.model_fields.items()),
        }
        for name, task in TASKS.items()
    ]


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
    """Return a title and a row per field of the section at `path`, or the single row of a field that holds a value."""
    from slimray import job

    for place, section in enumerate(path):
        fields = {field.alias or name: field for name, field in spec.model_fields.items()}
        if section not in fields:
            raise UserError(f"explain {what}: has no field {section!r}{did_you_mean(section, fields)}")
        inner = job.section_of(fields[section].annotation)
        if inner is None and place + 1 < len(path):
            raise UserError(f"explain {what}.{section}: is a value and has no fields")
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
    """Return a default as it is written in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type_name(annotation: Any) -> str:
    """Return the type of a field in plain words: text, number, list of ..., `a | b`."""
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
    card: Annotated[bool, typer.Option("--card", help="Print the schema of dataset cards instead.")] = False,
) -> None:
    """Print the JSON Schema of job files for editors (jobs/schema.json); --card: of datasets/card.schema.json."""
    from slimray import job

    emit(job.card_schema() if card else job.json_schema())
