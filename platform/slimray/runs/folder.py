"""The run folder: everything one verb leaves for the next, on any storage (`<storage>/<name>/`, a disk or a bucket).

It holds job.yaml (the resolved job), status.json, lock, card.json (final numbers, versions), results.json, report.html,
model/, checkpoints/ and append-only records (metrics/, quarantine/, ...) as immutable numbered JSONL parts, because
object stores cannot append. Everything is bytes, JSON or YAML; nothing is ever unpickled. This file finds the folder of
a run, and reads and writes its plain files.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from slimray import storage
from slimray.credentials import redact, redact_text
from slimray.spec import MAX_YAML_BYTES, UserError, did_you_mean, dump_yaml, parse_yaml
from slimray.storage import StorageError, join

FILES = ("job.yaml", "status.json", "card.json", "results.json", "front.json", "report.html", "tracking.json")
MARKER = ".slimray"  # marks the folder as slimray's, even if its other files are lost
MAX_JSON_BYTES = 64 << 20
MAX_STATE_BYTES = 1 << 20  # for status.json, lock and markers
TEXT_FILES = (".json", ".yaml", ".txt", ".log")
FOLDERS = (
    "metrics",
    "quarantine",
    "samples",
    "checkpoints",
    "model",
    "export",
    "stages",
    "trials",
    "logs",
    "data",
    "tensorboard",
    "wandb",
    "init",
)


class DamagedFile(StorageError):
    """A file of a run does not hold what slimray writes: one sentence. Exit code 2."""

    def __init__(self, sentence: str):
        super().__init__(sentence, code=2)


@dataclass(frozen=True)
class Run:
    """Location of one run: a filesystem, the path of its folder there, its name, and a URI valid on any machine."""

    fs: pafs.FileSystem
    path: str
    name: str
    uri: str


# ------------------------------------------------------------------------------------------------ locations


def open_run(where: str, name: str) -> Run:
    """Return the run `name` in the storage folder or URI `where`; it need not exist. UserError for an invalid name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise UserError(
            f"run name {name!r}: letters, digits, '.', '_' and '-' only, at most 128 of them and not '.', '_' or '-' "
            "first, as it becomes a folder"
        )
    return run_at(join(where, name))


def run_at(uri: str) -> Run:
    """Return the run whose folder is `uri`, a local path or a URI; it need not exist."""
    fs, path = storage.open_uri(uri)
    return Run(fs, path.rstrip("/"), path.rstrip("/").rpartition("/")[2], uri if _is_bucket(uri) else path.rstrip("/"))


def find_run(name_or_uri: str, where: str) -> Run:
    """Return an existing run by name in the storage `where`, or by URI or path.

    Raises UserError, with the closest name, if there is none.
    """
    if "/" in name_or_uri:
        run = run_at(name_or_uri)
        if not _is_run(run):
            raise UserError(f"{name_or_uri}: is not a run (it has neither status.json nor job.yaml)")
        return run
    run = open_run(where, name_or_uri)
    if not _is_run(run):
        names = [run.name for run in list_runs(where)]
        hint = did_you_mean(name_or_uri, names) if names else ", nor any other: set --storage to where the runs are"
        raise UserError(f"{where}: no run {name_or_uri!r}{hint}")
    return run


def list_runs(where: str) -> list[Run]:
    """Return all runs of a storage folder, sorted by name; none if the folder is missing.

    A folder that cannot be read is included: `describe` reports what is wrong with it.
    """
    fs, path = storage.open_uri(where)
    names = [name for name in storage.list_folders(fs, path) if not name.startswith(".")]
    uri = where if _is_bucket(where) else path
    runs = [Run(fs, join(path, name), name, join(uri, name)) for name in names]

    def may_be_run(run: Run) -> bool:
        try:
            return _is_run(run)
        except StorageError:
            return True

    with ThreadPoolExecutor(16) as pool:
        return [run for run, found in zip(runs, pool.map(may_be_run, runs), strict=True) if found]


# ---------------------------------------------------------------------------------------------------- files


def exists(run: Run, name: str) -> bool:
    """Return whether the run has the file or folder `name`."""
    return storage.exists(run.fs, inside(run, name))


def read_file(run: Run, name: str) -> bytes:
    """Return the content of the file `name` of the run.

    Raises FileNotFoundError if it does not exist, StorageError if the name leads out of the run folder.
    """
    return storage.read_bytes(run.fs, inside(run, name))


def write_file(run: Run, name: str, data: bytes | Path) -> None:
    """Write the file `name` of the run atomically; credentials in a text file are replaced by `***`.

    Raises ValueError for a name that is not in FILES or FOLDERS, because `--restart` would not clear it.
    """
    if isinstance(data, bytes) and name.endswith(TEXT_FILES):
        text = data.decode("utf-8", "surrogateescape")
        redacted = redact_text(text)
        data = data if redacted == text else redacted.encode("utf-8", "surrogateescape")
    storage.write_atomic(run.fs, join(run.path, known_name(name)), data)


def list_names(run: Run, folder: str) -> list[str]:
    """Return the sorted names of the files in `folder` of the run; none if it is missing."""
    return [info.base_name for info in storage.list_files(run.fs, inside(run, folder))]


def read_job(run: Run) -> dict[str, Any]:
    """Return the resolved job; raise UserError if the run has none, or if it is not a YAML mapping."""
    try:
        data = storage.read_bytes(run.fs, join(run.path, "job.yaml"), first=MAX_YAML_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{run.uri}: has no job.yaml, so it is not a run") from None
    documents = parse_yaml(data.decode("utf-8", "replace"), join(run.uri, "job.yaml"))
    return documents[0] if documents else {}


def write_job(run: Run, document: Mapping[str, Any]) -> None:
    """Write the resolved job as job.yaml, with all defaults explicit and without credentials."""
    write_file(run, "job.yaml", dump_yaml(redact(plain(document))).encode())


def read_card(run: Run) -> dict[str, Any] | None:
    """Return card.json, or None while the run has not finished; raise DamagedFile if it is not a JSON object."""
    return read_json(run, "card.json")


def write_card(run: Run, card: Mapping[str, Any]) -> None:
    """Write card.json: final numbers, parent, commit, dataset fingerprint, versions, machine, seconds."""
    write_file(run, "card.json", to_json(card))


def write_report(run: Run, html: str) -> None:
    """Write report.html."""
    write_file(run, "report.html", html.encode())


def write_model(run: Run, weights: bytes | Path, model: Mapping[str, Any], input_json: Mapping[str, Any]) -> None:
    """Write model/: `weights` (safetensors), `model` (build name, options), `input_json` (the input the network takes).

    `model/weights.json` holds the size and SHA-256 of the weights, which readers verify.
    """
    size, sha256 = digest(weights)
    write_file(run, "model/weights.safetensors", weights)
    write_file(run, "model/weights.json", to_json({"bytes": size, "sha256": sha256}))
    write_file(run, "model/input.json", to_json(input_json))
    write_file(run, "model/model.json", to_json(model))


def read_model(run: Run) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """Return (weights, model, input) as passed to `write_model`.

    Raises UserError if the run has no model (yet), DamagedFile if the weights have changed since they were written.
    """
    model, input_json = read_json(run, "model/model.json"), read_json(run, "model/input.json")
    if model is None or input_json is None:
        raise UserError(f"{run.uri}: has no model: it is not a training run, or it has not finished (run it again)")
    return read_weights(run), model, input_json


def read_weights(run: Run) -> bytes:
    """Return model/weights.safetensors, verified against its digest; runs of older versions have none to verify.

    Raises UserError if there are no weights, DamagedFile if they are damaged.
    """
    try:
        data, written = read_file(run, "model/weights.safetensors"), read_json(run, "model/weights.json")
    except FileNotFoundError:
        raise UserError(f"{run.uri}: has no model/weights.safetensors: run it again, or restore the file") from None
    if written is not None and digest(data) != (written.get("bytes"), written.get("sha256")):
        raise DamagedFile(
            f"{join(run.uri, 'model/weights.safetensors')}: has changed since it was written (its size or SHA-256 "
            "differs from model/weights.json): restore the file, or run the job again with --restart"
        )
    return data


def digest(data: bytes | Path) -> tuple[int, str]:
    """Return the size in bytes and the SHA-256 of `data`, or of the local file it names."""
    if isinstance(data, bytes):
        return len(data), hashlib.sha256(data).hexdigest()
    with open(data, "rb") as file:
        return data.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------------- helpers


def _is_bucket(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def _is_run(run: Run) -> bool:
    return exists(run, "status.json") or exists(run, "job.yaml")


def known_name(name: str) -> str:
    """Return `name` if it belongs to a run folder; raise ValueError otherwise, as `--restart` would not clear it."""
    if name not in (*FILES, MARKER) and name.partition("/")[0] not in FOLDERS:
        raise ValueError(f"{name!r} is not a file of a run folder: add it to FILES or FOLDERS in runs/folder.py")
    return name


def inside(run: Run, name: str) -> str:
    """Return the path of `name` in the run folder; raise StorageError for a name that leads out of it."""
    parts = name.split("/")
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise StorageError(
            f"{run.uri}: {name!r} cannot be the name of a file in it: the folder is damaged or was changed"
        )
    return join(run.path, name)


def is_plain_name(name: Any) -> bool:
    """Return whether `name` is a plain file name, which cannot lead to another folder."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,250}", name) is not None


def read_json(
    run: Run, name: str, max_bytes: int = MAX_JSON_BYTES, complaint: str = "is not a JSON object"
) -> dict[str, Any] | None:
    """Return the JSON object in the file `name`, None if the file is missing; raise DamagedFile for other content."""
    where = join(run.uri, name)
    try:
        data = storage.read_bytes(run.fs, inside(run, name), first=max_bytes + 1)
    except FileNotFoundError:
        return None
    if len(data) > max_bytes:
        raise DamagedFile(f"{where}: is larger than {max_bytes} bytes, so slimray did not write it")
    found = parse_json(data, where)
    if not isinstance(found, dict):
        raise DamagedFile(f"{where}: {complaint}")
    return found


def parse_json(data: bytes, where: str) -> Any:
    """Return the value of JSON `data`; raise DamagedFile, with `where`, if it is not JSON or is nested too deeply.

    Integers beyond 64 bits become floats, and surrogates (half characters) become `?`, so that the value can be shown.
    """
    try:
        found = _DECODER.decode(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DamagedFile(f"{where}: is not JSON ({reason})") from None
    return _without_surrogates(found) if b"\\ud" in data or b"\\uD" in data else found


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) <= 19 else float(digits)


_DECODER = json.JSONDecoder(parse_int=_parse_int)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(one) for key, one in value.items()}
    return [_without_surrogates(one) for one in value] if isinstance(value, list) else value


def to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(value), indent=2, default=json_value).encode() + b"\n"


def json_value(value: Any) -> Any:
    """Return numpy scalars and arrays as plain numbers and lists, anything else (paths) as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def plain(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return `document` as JSON values only, as it would be read back from job.yaml."""
    return json.loads(to_json(document))
