"""An export folder: one file that holds a network, and `export.json`, which says what it takes and gives.

Both may come from anywhere. Read is only the file that `export.json` names beside itself, as large and with the SHA-256
that is written there, and nothing of it is opened before it is checked.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slimray import runs, storage
from slimray.runs.folder import digest, is_plain_name
from slimray.runtime.engines import ENGINES
from slimray.spec import UserError, did_you_mean
from slimray.storage import join

VERSION = 1
MAX_JSON_BYTES = 64 << 20
MAX_MODEL_BYTES = (2 << 30) - 1
RUN_HERE = tuple(sorted({one for engine in ENGINES.values() for one in engine.formats}))  # ONNX is first


class _Part(BaseModel):
    """A part of export.json; what it holds beyond this is for people."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Tensor(_Part):
    """An input or output: shape with null where it is dynamic, numpy type."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"


class State(_Part):
    """What an online network hands from a frame to the next: it begins as zeros of this shape."""

    input: str
    output: str
    shape: tuple[int, ...] = Field(max_length=8)
    dtype: Literal["float32"] = "float32"


class Verification(_Part):
    """How the export compares with torch: whether it agrees, and if not why."""

    passed: bool = True
    reason: str = ""


class Step(_Part):
    """A file beside export.json with a graph: its size and digest, what it takes and gives."""

    file: str
    bytes: int = Field(gt=0, le=MAX_MODEL_BYTES)
    sha256: str
    inputs: tuple[Tensor, ...] = Field(min_length=1)
    outputs: tuple[Tensor, ...] = Field(min_length=1)


class Facts(Step):
    """What export.json says, as far as running the network needs it.

    A network that answers token by token is an encoder, and a `step` of its decoder in a file of its own.
    """

    format: str
    step: Step | None = None
    states: tuple[State, ...] = ()
    input: dict[str, Any]
    """`model/input.json` of the run: recipe, pixels, classes, task."""
    verification: Verification = Verification()


def is_export(where: str) -> bool:
    """Return whether `where` (a path or URI) is an export folder."""
    if "/" not in where and not Path(where).is_dir():
        return False
    fs, path = storage.open_uri(where)
    return storage.exists(fs, join(path, "export.json"))


def exports_of(run: runs.Run) -> dict[str, str]:
    """Return the exports of a run by format, those that an engine runs first: format -> URI of the folder."""
    folder = join(run.path, "export")
    names = [name for name in storage.list_folders(run.fs, folder) if is_plain_name(name)]
    there = [name for name in names if storage.exists(run.fs, join(folder, name, "export.json"))]
    order = [*[name for name in RUN_HERE if name in there], *sorted(set(there) - set(RUN_HERE))]
    return {name: join(run.uri, "export", name) for name in order}


def preferred_export(run: runs.Run) -> str | None:
    """Return the folder of the export of a run that is taken when no format is asked for; None if it has no export.

    UserError if it has some, and no engine runs any of them.
    """
    found = exports_of(run)
    return _first_run_here(run, found) if found else None


def _first_run_here(run: runs.Run, found: dict[str, str]) -> str:
    name, where = next(iter(found.items()))
    if name not in RUN_HERE:
        raise UserError(
            f"{run.name}: its exports are of formats that are not run here ({', '.join(found)}): make one that is with "
            f"`slimray export RUN --format {RUN_HERE[0]}`"
        )
    return where


def find_export(name: str, where: str, format: str | None = None) -> str:
    """Return the folder of an export: `name` is one, or a run in the storage `where` that has some; UserError if none.

    Of several the one of `format`, else the first that an engine runs, ONNX before others.
    """
    if is_export(name):
        return name
    run = runs.find_run(name, where)
    found = exports_of(run)
    if not found:
        raise UserError(f"{name}: has no export: make one with `slimray export {name} --format onnx`")
    if format is None:
        return _first_run_here(run, found)
    if format not in found:
        hint = did_you_mean(format, found)
        raise UserError(f"{name}: has no export of format {format!r}{hint} (it has: {', '.join(found)})")
    return found[format]


def read_facts(where: str) -> Facts:
    """Return export.json of the folder `where`; UserError for no export or a wrong one."""
    fs, path = storage.open_uri(where)
    place = join(where, "export.json")
    try:
        data = storage.read_bytes(fs, join(path, "export.json"), first=MAX_JSON_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{where}: is no export folder (it has no export.json)") from None
    if len(data) > MAX_JSON_BYTES:
        raise UserError(f"{place}: is larger than {MAX_JSON_BYTES} bytes, which slimray does not write")
    plain = runs.parse_json(data, place)
    if not isinstance(plain, dict) or plain.get("version") != VERSION:
        raise UserError(f"{place}: is no export of version {VERSION}: export the run again with this slimray")
    try:
        facts = Facts.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"{place}: {field}: {first['msg'].lower()}: export the run again") from None
    for field, part in (("file", facts), ("step.file", facts.step)):
        if part is not None and not is_plain_name(part.file):
            raise UserError(f"{place}: {field}: {part.file!r} must be the name of a file beside it")
    if not facts.verification.passed:
        reason = " ".join(facts.verification.reason.split())[:200] or "no reason is given"
        raise UserError(f"{place}: the export does not agree with torch ({reason}): export the run again")
    return facts


def read_export(where: str) -> tuple[Facts, bytes]:
    """Return export.json and the bytes of the network, compared with it; UserError if they do not fit."""
    facts = read_facts(where)
    return facts, read_graph(where, facts)


def read_graph(where: str, part: Step) -> bytes:
    """Return the bytes of a file of the export folder `where`; UserError unless it is what was written."""
    fs, path = storage.open_uri(where)
    place = join(where, part.file)
    try:
        data = storage.read_bytes(fs, join(path, part.file), first=part.bytes + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{place}: is missing: copy the whole export folder") from None
    if digest(data) != (part.bytes, part.sha256.lower()):
        raise UserError(
            f"{place}: is not what was exported (its size or SHA-256 differs from export.json): copy the folder again"
        )
    return data
