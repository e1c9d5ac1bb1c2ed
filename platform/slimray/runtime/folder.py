"""An export folder: the file of a network, and `export.json`, which describes its inputs and outputs.

Both may come from anywhere. Only files that `export.json` names in its own folder are read; their size and SHA-256 must
be those written there, and no library opens them before they are checked.
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
    """A part of export.json; further fields are for people and are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Tensor(_Part):
    """An input or output: its shape, with null for dynamic sizes, and its numpy type."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"


class State(_Part):
    """A tensor that an online network hands from one frame to the next, initially zeros of this shape."""

    input: str
    output: str
    shape: tuple[int, ...] = Field(max_length=8)
    dtype: Literal["float32"] = "float32"


class Verification(_Part):
    """Result of the comparison with torch: `passed`, or the `reason` why not."""

    passed: bool = True
    reason: str = ""


class Step(_Part):
    """A file with a graph beside export.json: its size and digest, its inputs and outputs."""

    file: str
    bytes: int = Field(gt=0, le=MAX_MODEL_BYTES)
    sha256: str
    inputs: tuple[Tensor, ...] = Field(min_length=1)
    outputs: tuple[Tensor, ...] = Field(min_length=1)


class Facts(Step):
    """Content of export.json that is needed to run the network.

    A network that answers token by token is an encoder, with a `step` of its decoder in a separate file.
    """

    format: str
    step: Step | None = None
    states: tuple[State, ...] = ()
    input: dict[str, Any]
    """`model/input.json` of the run: recipe, pixels, classes, task."""
    verification: Verification = Verification()


def is_export(where: str) -> bool:
    """Return True if `where` (a path or URI) is an export folder."""
    if "/" not in where and not Path(where).is_dir():
        return False
    fs, path = storage.open_uri(where)
    return storage.exists(fs, join(path, "export.json"))


def exports_of(run: runs.Run) -> dict[str, str]:
    """Return the exports of a run, format -> URI of the folder, first those that an engine can run."""
    folder = join(run.path, "export")
    names = [name for name in storage.list_folders(run.fs, folder) if is_plain_name(name)]
    there = [name for name in names if storage.exists(run.fs, join(folder, name, "export.json"))]
    order = [*[name for name in RUN_HERE if name in there], *sorted(set(there) - set(RUN_HERE))]
    return {name: join(run.uri, "export", name) for name in order}


def preferred_export(run: runs.Run) -> str | None:
    """Return the folder of the export of a run that is used when no format is given; None if it has no export.

    Raises UserError if it has exports, but no engine can run any of them.
    """
    found = exports_of(run)
    return _first_run_here(run, found) if found else None


def _first_run_here(run: runs.Run, found: dict[str, str]) -> str:
    name, where = next(iter(found.items()))
    if name not in RUN_HERE:
        raise UserError(
            f"{run.name}: its exports are of formats that cannot be run here ({', '.join(found)}): make one that can "
            f"with `slimray export RUN --format {RUN_HERE[0]}`"
        )
    return where


def find_export(name: str, where: str, format: str | None = None) -> str:
    """Return the export folder `name`, or that of the run `name` in the storage `where`; UserError if there is none.

    Of several exports it is the one of `format`, otherwise the first that an engine can run, ONNX before others.
    """
    if is_export(name):
        return name
    run = runs.find_run(name, where)
    found = exports_of(run)
    if not found:
        raise UserError(f"{name}: has no export, make one with `slimray export {name} --format onnx`")
    if format is None:
        return _first_run_here(run, found)
    if format not in found:
        hint = did_you_mean(format, found)
        raise UserError(f"{name}: has no export of format {format!r}{hint} (it has: {', '.join(found)})")
    return found[format]


def read_facts(where: str) -> Facts:
    """Return export.json of the folder `where`; UserError if it is not an export, invalid or not verified."""
    fs, path = storage.open_uri(where)
    place = join(where, "export.json")
    try:
        data = storage.read_bytes(fs, join(path, "export.json"), first=MAX_JSON_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{where}: is not an export folder (it has no export.json)") from None
    if len(data) > MAX_JSON_BYTES:
        raise UserError(f"{place}: is larger than {MAX_JSON_BYTES} bytes, so slimray did not write it")
    plain = runs.parse_json(data, place)
    if not isinstance(plain, dict) or plain.get("version") != VERSION:
        raise UserError(f"{place}: is not an export of version {VERSION}, export the run again with this slimray")
    try:
        facts = Facts.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"{place}: {field}: {first['msg'].lower()}, export the run again") from None
    for field, part in (("file", facts), ("step.file", facts.step)):
        if part is not None and not is_plain_name(part.file):
            raise UserError(f"{place}: {field}: {part.file!r} must be the name of a file beside it")
    if not facts.verification.passed:
        reason = " ".join(facts.verification.reason.split())[:200] or "no reason is given"
        raise UserError(f"{place}: the export does not agree with torch ({reason}), export the run again")
    return facts


def read_export(where: str) -> tuple[Facts, bytes]:
    """Return export.json and the bytes of the network; UserError if they do not match."""
    facts = read_facts(where)
    return facts, read_graph(where, facts)


def read_graph(where: str, part: Step) -> bytes:
    """Return the bytes of a file of the export folder `where`; UserError unless size and SHA-256 match."""
    fs, path = storage.open_uri(where)
    place = join(where, part.file)
    try:
        data = storage.read_bytes(fs, join(path, part.file), first=part.bytes + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{place}: is missing, copy the whole export folder") from None
    if digest(data) != (part.bytes, part.sha256.lower()):
        raise UserError(
            f"{place}: differs from the exported file (size or SHA-256 in export.json), copy the folder again"
        )
    return data
