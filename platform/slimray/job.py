"""From a YAML file to a run: load, resolve, check, run. A job is one document; its `kind` names its verb.

`load` reads the documents of the files, `resolve` applies `extends:` and `--set` and embeds the dataset cards, so that
a job is complete in itself. `check` finds the problems that can be found before machines are requested. `run` claims
the run folder (same name: finished is skipped, unfinished resumes, other settings are refused), does the work and
records the outcome in the folder. `json_schema` is for editors.
"""

import contextlib
import copy
import functools
import operator
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from slimray import runs
from slimray.data.cards import Card
from slimray.runs import notify
from slimray.runtime.energy import Meter
from slimray.spec import RunFailed, Spec, UserError, did_you_mean, lookup, noting, parse, read_yaml, set_value
from slimray.storage import SHORT_PATIENCE_S, StorageError, open_uri, patient
from slimray.train.spec import ScaleSpec
from slimray.verbs import VERBS, inputs
from slimray.verbs.context import CheckContext, Context, Made
from slimray.verbs.specs import OWNED

SPECS: dict[str, type[Spec]] = {kind: verb.Job for kind, verb in VERBS.items()}
MAY_CHANGE = (
    "scale",
    "limits",
    "notify",
    "tracking",
    "checkpoint",
    "log_every",
    "tasks",
    "max_bad_fraction",
    "decode_timeout_s",
    "data.max_bad_fraction",
    "data.decode_timeout_s",
    "data.record_samples",
    "data.cache",
    "data.card.description",
    "data.card.source",
    "data.card.licence",
)  # sections and fields that may change when a run resumes
SUBMISSION = "SLIMRAY_SUBMISSION"  # environment variable: the `submit --restart` that a scheduler starts, maybe again
LEFT_OPEN = (("optim", "groups"), ("data", "short_clips"))  # fields whose value follows from others if they are null
BEFORE = (("data", "short_clips", "published"),)  # values of fields for runs begun before the fields existed


@dataclass(frozen=True)
class Loaded:
    """A job, and the text `where` that names it in messages."""

    job: Any
    where: str

    @property
    def document(self) -> dict[str, Any]:
        """The resolved job: all defaults explicit, the dataset card embedded."""
        return self.job.model_dump(mode="json", by_alias=True)


# ---------------------------------------------------------------------------------------------- from YAML to jobs


def load(paths: Sequence[str | Path], sets: Sequence[str] = ()) -> list[Loaded]:
    """Read, complete and parse the documents of `paths` in order; UserError with file and field if that fails."""
    documents: list[tuple[Path, dict[str, Any]]] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file (`slimray init DIR` writes examples to start from)")
        found = read_yaml(path)
        if not found:
            raise UserError(f"{path}: holds no job (`slimray init DIR` writes examples to start from)")
        documents += [(path, document) for document in found]
    return resolve(documents, sets)


def resolve(documents: Sequence[tuple[Path, dict[str, Any]]], sets: Sequence[str] = ()) -> list[Loaded]:
    """Return the jobs of plain documents, given with their files; UserError with all problems, a line each."""
    merged: list[tuple[Path, dict[str, Any]]] = []
    by_name: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for path, document in documents:
        with noting(problems, str(path)):
            merged.append((path, _extend(document, by_name)))
            by_name[str(merged[-1][1].get("name"))] = merged[-1][1]
    _raise(problems)
    for assignment in sets:
        _set([document for _, document in merged], assignment)
    loaded: list[Loaded] = []
    prepared: dict[str, dict[str, Any]] = {}
    for path, document in merged:
        with noting(problems, str(path)):
            one = _parse(document, path, prepared)
            if any(one.job.name == other.job.name for other in loaded):
                raise UserError(f"{path}: name: {one.job.name!r} is used twice: each document needs a name of its own")
            made = VERBS[one.job.kind].makes(one.job)
            prepared |= {name: dict(m.card) for name, m in made.items() if m.what == "dataset" and m.card is not None}
            loaded.append(one)
    _raise(problems)
    return loaded


def _raise(problems: list[str]) -> None:
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def _parse(document: dict[str, Any], path: Path, prepared: Mapping[str, dict[str, Any]]) -> Loaded:
    kind, name = document.get("kind"), document.get("name")
    where = f"{path} ({name})" if name and isinstance(name, str) else str(path)
    if kind is None and "layout" in document:
        raise UserError(f"{where}: is a dataset card, not a job: name it in `data: {{card: ...}}` of a job")
    if not isinstance(kind, str):
        raise UserError(f"{where}: kind: must be one of {', '.join(SPECS)} (got {kind!r})")
    try:
        spec = lookup(SPECS, kind, "kind")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    job: Any = parse(spec, document, where)
    try:
        runs.open_run(".", job.name)
    except UserError as error:
        raise UserError(f"{where}: name: {error}") from None
    data = getattr(job, "data", None)
    if data is not None:
        beside = path.resolve().parent
        search = [beside, beside.parent / "datasets", Path("datasets"), inputs.packaged("datasets")]
        job = job.model_copy(update={"data": inputs.embed(data, where, search, prepared)})
    return Loaded(job, where)


def _extend(document: dict[str, Any], by_name: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the document with `extends: NAME` resolved: an earlier document of the same command, overridden field by
    field."""
    if "extends" not in document:
        return document
    parent = document["extends"]
    if not isinstance(parent, str) or parent not in by_name:
        raise UserError(f"extends: no earlier document is named {parent!r}{did_you_mean(str(parent), by_name)}")
    return _merge(by_name[parent], {k: v for k, v in document.items() if k != "extends"})


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def _set(documents: list[dict[str, Any]], assignment: str) -> None:
    """Apply one --set to its documents: `NAME:a.b=c` to one, `a.b=c` to all whose kind has such a field.

    If some of these contain section `a`, or always have it, only those change: `init.from` does not add an `init` to a
    document without one. `data.root` and `data.card` do not apply to documents that read a run.
    """
    path, equals, _ = assignment.partition("=")
    target, colon, _ = path.partition(":")
    if colon:
        names = [str(d.get("name")) for d in documents]
        if target.strip() not in names:
            raise UserError(f"--set {assignment}: no document is named {target!r}{did_you_mean(target, names)}")
        return set_value(documents[names.index(target.strip())], assignment.partition(":")[2])
    keys = path.strip().split(".")
    if not equals:
        set_value({}, assignment)  # raises
    specs = [SPECS.get(str(d.get("kind"))) for d in documents]
    chosen = [d for d, spec in zip(documents, specs, strict=True) if spec is not None and keys[0] in spec.model_fields]
    if not chosen:
        known = {name for spec in specs if spec is not None for name in spec.model_fields}
        raise UserError(f"--set {assignment}: no document has a field {keys[0]!r}{did_you_mean(keys[0], known)}")
    chosen = [d for d in chosen if _has_field(SPECS[str(d["kind"])], keys)] or chosen
    if len(keys) > 1:
        chosen = [d for d in chosen if keys[0] in d or not _is_optional(d, keys[0])] or chosen
    if keys in (["data", "root"], ["data", "card"]):
        chosen = [d for d in chosen if not isinstance(d.get("data"), dict) or "run" not in d["data"]] or chosen
    for document in chosen:
        set_value(document, assignment)


def _has_field(spec: Any, keys: Sequence[str]) -> bool:
    """Return True if a kind of job, or a section, has the field at `keys`; a section with free options has any."""
    fields = {field.alias or name: field for name, field in spec.model_fields.items()}
    if keys[0] not in fields:
        return spec.model_config.get("extra") == "allow"
    inner = section_of(fields[keys[0]].annotation)
    return len(keys) == 1 or (inner is not None and _has_field(inner, keys[1:]))


def _is_optional(document: dict[str, Any], section: str) -> bool:
    return type(None) in get_args(SPECS[str(document["kind"])].model_fields[section].annotation)


def section_of(annotation: Any) -> type[Spec] | None:
    """Return the Spec class of a field with this type annotation if it is a section, else None."""
    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Spec)), None)


# ---------------------------------------------------------------------------------------------------------- check


def check(
    loaded: Sequence[Loaded], storage: str, restart: bool = False, look: bool = False, to_run: bool = False
) -> list[dict[str, Any]]:
    """Validate everything that can be validated now; return what is known of each job, with what to fix in `problems`.

    `state` is what `run` would do: "new", "resume", or "finished" (skipped, so that nothing is a problem). `restart`
    ignores existing runs. `look` opens a few files of each split. `to_run` omits the details of finished jobs, which
    take time. UserError if the storage cannot be reached.
    """
    open_uri(storage)
    out: list[dict[str, Any]] = []
    ahead: dict[str, Made] = {}
    for one in loaded:
        ctx, verb = CheckContext(one.where, storage, dict(ahead), look), VERBS[one.job.kind]
        known: dict[str, Any] = {"name": one.job.name, "kind": one.job.kind}
        with ctx.noting():
            one = one if restart else _as_begun(one, storage)
            known["state"] = "new" if restart else _state(one, storage)
        is_finished = known.get("state") == "finished"
        known |= {} if to_run and is_finished else verb.check(one.job, ctx)
        if is_finished:
            ctx.problems.clear()
        else:
            made = {name: one.resolved(ahead) for name, one in verb.makes(one.job).items()}
            ahead |= {name: m.with_samples(known.get("samples")) for name, m in made.items()}
        out.append(known | {"problems": ctx.problems})
    return out


def require(checked: Sequence[dict[str, Any]]) -> None:
    """Raise UserError with all `problems` that `check` found, a line each."""
    _raise([problem for one in checked for problem in one["problems"]])


def _state(one: Loaded, storage: str) -> str:
    folder = runs.open_run(storage, one.job.name)
    try:
        claim = _claim(one, folder)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder.uri}: holds files that slimray did not write ({error}): choose another name, or delete it"
        ) from None
    return "finished" if claim.finished else "resume" if claim.attempt > 1 else "new"


# ------------------------------------------------------------------------------------------------------------ run


def _as_begun(one: Loaded, storage: str) -> Loaded:
    """Return the job with its open choices (null) set to those that its run, if there is one, began with."""
    folder = runs.open_run(storage, one.job.name)
    began: Any = _as_then(one.job, runs.read_job(folder)) if runs.exists(folder, "job.yaml") else {}
    job = one.job
    for section, name in LEFT_OPEN:
        ours, theirs = getattr(job, section, None), began.get(section) if isinstance(began, dict) else None
        if ours is not None and getattr(ours, name, "") is None and isinstance(theirs, dict) and theirs.get(name):
            with contextlib.suppress(UserError):  # not a valid section: the claim reports that
                begun = parse(type(ours), ours.model_dump(exclude_defaults=True) | {name: theirs[name]}, section)
                job = job.model_copy(update={section: begun})
    return Loaded(job, one.where)


def _as_then(job: Any, stored: Any) -> Any:
    """Return the stored job of a run with the values of fields that did not exist when it was written."""
    if not isinstance(stored, dict):
        return stored
    out = dict(stored)
    for section, name, value in BEFORE:
        if isinstance(out.get(section), dict) and hasattr(getattr(job, section, None), name):
            out[section] = {name: value} | out[section]
    return out


def _claim(one: Loaded, folder: runs.Run, restart: bool = False) -> runs.Claim:
    """Return the claim of a job on the folder of its name: what is to be done."""
    again = os.environ.get(SUBMISSION, "")
    return runs.claim(folder, one.document, restart, _may_change(one), partial(_completed, one), again)


def _completed(one: Loaded, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the stored job of a run as this version reads it, with defaults for fields that it lacks.

    It is returned unchanged if it is not a job of this kind.
    """
    try:
        job: Any = type(one.job).model_validate(_as_then(one.job, stored))
        data = getattr(job, "data", None)
        if data is not None and isinstance(data.card, dict):
            card = Card.model_validate(data.card).model_dump(mode="json", exclude_defaults=True)
            job = job.model_copy(update={"data": data.model_copy(update={"card": card})})
    except ValidationError:
        return stored
    return Loaded(job, one.where).document


def _may_change(one: Loaded) -> tuple[str, ...]:
    """Return the fields that may change when a run resumes. The card of a prepared dataset may too, as it is embedded
    only if both jobs are in the same file."""
    reads_run = getattr(getattr(one.job, "data", None), "run", None) is not None
    return (*MAY_CHANGE, "data.card") if reads_run else MAY_CHANGE


def local_cpus(loaded: Sequence[Loaded]) -> int:
    """Return the logical CPUs that a local cluster needs for each of the jobs."""
    return max((one.job.local_cpus for one in loaded), default=1)


def storage_s(one: Loaded) -> float:
    """Return the job's longest wait for a storage that is out of service, in seconds: by `scale`, or the default."""
    return (getattr(one.job, "scale", None) or ScaleSpec()).storage_s


def run(one: Loaded, storage: str, console: Console, restart: bool = False, cpus: int = 0) -> str:
    """Run one job; return "finished" or "skipped". The run folder records the outcome, its `logs/` any traceback.

    UserError and RunFailed are passed on; any other error becomes a RunFailed.
    """
    folder = runs.open_run(storage, one.job.name)
    one = one if restart else _as_begun(one, storage)
    claim = _claim(one, folder, restart)
    if claim.finished:
        console.print(f"{one.job.name}: already finished, skipped", highlight=False)
        return "skipped"
    with runs.hold(folder), Meter() as meter:
        runs.begin(folder, one.document, claim.attempt, os.environ.get(SUBMISSION, ""))
        tell, cpus = partial(_tell, one, folder), max(cpus, local_cpus([one]))
        context = Context(folder, storage, claim.attempt, one.where, console, cpus, tell, energy=meter.told)
        started = time.time()
        try:
            VERBS[one.job.kind].run(one.job, context)
        except BaseException as error:
            _note_failure(folder, claim.attempt, error)
            tell({"state": "failed", "message": _sentence(error)})
            if isinstance(error, UserError | RunFailed | KeyboardInterrupt):
                raise
            raise RunFailed(_sentence(error)) from error
        runs.end(folder, "finished", "")
        tell({"state": "finished", "metrics": ((runs.read_card(folder) or {}).get("metrics") or {}).get("last")})
    console.print(f"{one.job.name}: done in {time.time() - started:.0f} s", highlight=False)
    return "finished"


def _tell(one: Loaded, folder: runs.Run, event: Mapping[str, Any]) -> None:
    """Write what the run waits for to its status, or send another event to the webhook of its job, if it has one."""
    if event["state"] == "waiting":
        with contextlib.suppress(StorageError):
            runs.note(folder, event["message"])
        return
    spec = getattr(one.job, "notify", None)
    if spec is not None:
        notify.send(spec, {"name": folder.name, "kind": one.job.kind, "uri": folder.uri, **event})


def _note_failure(folder: runs.Run, attempt: int, error: BaseException) -> None:
    """Write the traceback to the run's logs and its sentence to the status."""
    text = "".join(traceback.format_exception(error))
    # the storage itself may have failed, after a wait; the sentence is printed anyway
    with contextlib.suppress(StorageError), patient(SHORT_PATIENCE_S):
        runs.write_file(folder, f"logs/{attempt:04d}-driver.log", text.encode())
        runs.end(folder, "failed", _sentence(error))


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped by the user"
    if isinstance(error, SystemExit):
        return "stopped by SIGTERM"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------------- for editors


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 7, which editors know) of one document of a job file, with help texts.

    `kind` decides which fields there are; a document with `extends` may leave out any of them.
    """
    union = TypeAdapter(functools.reduce(operator.or_, SPECS.values())).json_schema(
        by_alias=True, ref_template="#/definitions/{model}"
    )
    full = {name: _draft_7(part) for name, part in union["$defs"].items()}
    full["ModelSpec"] |= {"properties": _model_properties(full["ModelSpec"]), "additionalProperties": False}
    parts = {f"{name}Part": _as_part(part) for name, part in full.items()}
    extends = {"type": "string", "description": "Name of an earlier document, whose fields this one overrides."}
    for spec in SPECS.values():
        parts[f"{spec.__name__}Part"]["properties"] |= {"extends": extends}
    kinds = {"enum": list(SPECS), "description": "The verb of the job, which decides the other fields."}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "slimray job",
        "description": "One document of a job file; the documents of a file run in order.",
        "type": "object",
        "properties": {"kind": kinds, "extends": extends},
        "if": {"required": ["extends"]},
        "then": {"allOf": [_for_kind(kind, f"{spec.__name__}Part") for kind, spec in SPECS.items()]},
        "else": {"required": ["kind"], "allOf": [_for_kind(kind, spec.__name__) for kind, spec in SPECS.items()]},
        "definitions": full | parts,
    }


def card_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 7) of a dataset card."""
    whole = Card.model_json_schema(ref_template="#/definitions/{model}")
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "slimray dataset card", **_draft_7(whole)}


def _for_kind(kind: str, definition: str) -> dict[str, Any]:
    condition = {"properties": {"kind": {"const": kind}}, "required": ["kind"]}
    return {"if": condition, "then": {"$ref": f"#/definitions/{definition}"}}


def _model_properties(model_spec: dict[str, Any]) -> dict[str, Any]:
    """Return the properties of a model: `name` from the table, and the options of all models with their owners."""
    from slimray import models

    name = {"description": model_spec["properties"]["name"]["description"], "enum": list(models.MODELS)}
    properties = model_spec["properties"] | {"name": name}
    known_by: dict[str, dict[str, Any]] = {}
    for name in models.MODELS:
        for option, default in models.options_of(name).items():
            if option not in OWNED:
                known_by.setdefault(option, {})[name] = default
    types = {bool: "boolean", int: "integer", float: "number", str: "string"}
    for option, defaults in known_by.items():
        found = {types.get(type(default)) for default in defaults.values()}
        kind = {"type": found.pop()} if len(found) == 1 and None not in found else {}
        values = ", ".join(dict.fromkeys(str(default) for default in defaults.values()))
        who = f" Used by {', '.join(defaults)}." if len(defaults) <= 6 else " Not every network has it."
        who = "" if len(defaults) == len(models.MODELS) else who
        properties[option] = {**kind, "description": f"Option of the network, default {values}.{who}"}
    return properties


def _draft_7(node: Any) -> Any:
    """Convert a schema of pydantic to draft 7, where fixed arrays have `items`, and remove generated titles."""
    if isinstance(node, list):
        return [_draft_7(one) for one in node]
    if not isinstance(node, dict):
        return node
    kept = {key: value for key, value in node.items() if key != "title" or not isinstance(value, str)}
    return {"items" if key == "prefixItems" else key: _draft_7(value) for key, value in kept.items()}


def _as_part(node: Any) -> Any:
    """Return a copy of a schema that requires nothing, neither itself nor in its references."""
    if isinstance(node, list):
        return [_as_part(one) for one in node]
    if not isinstance(node, dict):
        return f"{node}Part" if isinstance(node, str) and node.startswith("#/definitions/") else node
    return {key: _as_part(value) for key, value in node.items() if key != "required"}
