"""The run folder: all that one verb leaves for the next, on any storage (`<storage>/<name>/`, a disk or a bucket).

job.yaml (the resolved job), status.json, lock, card.json (final numbers, versions), results.json, report.html, model/,
checkpoints/ and append-only records (metrics/, quarantine/, ...) as immutable numbered JSONL parts, because object
stores cannot append. Everything is bytes, JSON or YAML; nothing is ever unpickled. This file says which folder a run
is, and reads and writes its plain files.
"""

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
from slimray.spec import UserError, did_you_mean, dump_yaml, parse_yaml
from slimray.storage import StorageError, join

FILES = ("job.yaml", "status.json", "card.json", "results.json", "front.json", "report.html")
TEXT_FILES = (".json", ".yaml", ".txt", ".log")
FOLDERS = (
    "metrics",
    "quarantine",
    "samples",
    "checkpoints",
    "model",
    "stages",
    "trials",
    "logs",
    "data",
    "tensorboard",
    "wandb",
)


@dataclass(frozen=True)
class Run:
    """Where one run lies: a filesystem, the path of its folder there, its name, and the URI that names it anywhere."""

    fs: pafs.FileSystem
    path: str
    name: str
    uri: str


# ------------------------------------------------------------------------------------------------ which run


def open_run(where: str, name: str) -> Run:
    """Return the run `name` in the storage folder or URI `where`; it need not exist yet. UserError for a bad name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise UserError(f"run name {name!r}: letters, digits, '.', '_' and '-' only, as it becomes a folder")
    return run_at(join(where, name))


def run_at(uri: str) -> Run:
    """Return the run whose folder is `uri`, a local path or a URI; it need not exist."""
    fs, path = storage.open_uri(uri)
    return Run(fs, path.rstrip("/"), path.rstrip("/").rpartition("/")[2], uri if _is_bucket(uri) else path.rstrip("/"))


def find_run(name_or_uri: str, where: str) -> Run:
    """Return an existing run by name in the storage `where`, or by URI or path; UserError with the closest name."""
    if "/" in name_or_uri:
        run = run_at(name_or_uri)
        if not _is_run(run):
            raise UserError(f"{name_or_uri}: there is no run (it holds neither status.json nor job.yaml)")
        return run
    run = open_run(where, name_or_uri)
    if not _is_run(run):
        names = [run.name for run in list_runs(where)]
        hint = did_you_mean(name_or_uri, names) if names else ", nor any other: --storage says where runs lie"
        raise UserError(f"{where}: no run {name_or_uri!r}{hint}")
    return run


def list_runs(where: str) -> list[Run]:
    """Return all runs of a storage folder, sorted by name; none if the folder is missing."""
    fs, path = storage.open_uri(where)
    names = [name for name in storage.list_folders(fs, path) if not name.startswith(".")]
    uri = where if _is_bucket(where) else path
    runs = [Run(fs, join(path, name), name, join(uri, name)) for name in names]
    with ThreadPoolExecutor(16) as pool:
        return [run for run, found in zip(runs, pool.map(_is_run, runs), strict=True) if found]


# ------------------------------------------------------------------------------------------------ its files


def exists(run: Run, name: str) -> bool:
    """Return whether the run has the file or folder `name`."""
    return storage.exists(run.fs, join(run.path, name))


def read_file(run: Run, name: str) -> bytes:
    """Return the file `name` of the run; FileNotFoundError if it has none."""
    return storage.read_bytes(run.fs, join(run.path, name))


def write_file(run: Run, name: str, data: bytes | Path) -> None:
    """Write the file `name` of the run atomically; credentials in a text file are replaced by `***`.

    ValueError for a name that `--restart` would not know to clear.
    """
    if isinstance(data, bytes) and name.endswith(TEXT_FILES):
        text = data.decode("utf-8", "surrogateescape")
        redacted = redact_text(text)
        data = data if redacted == text else redacted.encode("utf-8", "surrogateescape")
    storage.write_atomic(run.fs, join(run.path, known_name(name)), data)


def list_names(run: Run, folder: str) -> list[str]:
    """Return the sorted names of the files in `folder` of the run; none if it is missing."""
    return [info.base_name for info in storage.list_files(run.fs, join(run.path, folder))]


def read_job(run: Run) -> dict[str, Any]:
    """Return the resolved job; UserError if the run has none or it is no YAML mapping."""
    try:
        documents = parse_yaml(read_file(run, "job.yaml").decode("utf-8", "replace"), join(run.uri, "job.yaml"))
    except FileNotFoundError:
        raise UserError(f"{run.uri}: has no job.yaml, so it is not a run") from None
    return documents[0] if documents else {}


def write_job(run: Run, document: Mapping[str, Any]) -> None:
    """Write the resolved job, all defaults explicit and without credentials, as job.yaml."""
    write_file(run, "job.yaml", dump_yaml(redact(plain(document))).encode())


def read_card(run: Run) -> dict[str, Any] | None:
    """Return card.json, None while the run has not finished."""
    return read_json(run, "card.json")


def write_card(run: Run, card: Mapping[str, Any]) -> None:
    """Write card.json: final numbers, parent, commit, dataset fingerprint, versions, machine, seconds."""
    write_file(run, "card.json", to_json(card))


def write_report(run: Run, html: str) -> None:
    """Write report.html."""
    write_file(run, "report.html", html.encode())


def write_model(run: Run, weights: bytes | Path, model: Mapping[str, Any], taken: Mapping[str, Any]) -> None:
    """Write model/: `weights` (safetensors), `model` (build name, options), `taken` (the input the network takes)."""
    write_file(run, "model/weights.safetensors", weights)
    write_file(run, "model/input.json", to_json(taken))
    write_file(run, "model/model.json", to_json(model))


def read_model(run: Run) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """Return (weights, model, input) as `write_model` took them; UserError if the run has no model (yet)."""
    model, taken = read_json(run, "model/model.json"), read_json(run, "model/input.json")
    if model is None or taken is None:
        raise UserError(f"{run.uri}: has no model: it is not a training run, or it has not finished (run it again)")
    return read_file(run, "model/weights.safetensors"), model, taken


# -------------------------------------------------------------------------------------------------- helpers


def _is_bucket(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def _is_run(run: Run) -> bool:
    return exists(run, "status.json") or exists(run, "job.yaml")


def known_name(name: str) -> str:
    if name not in FILES and name.partition("/")[0] not in FOLDERS:
        raise ValueError(f"{name!r} is no file of a run folder: add it to FILES or FOLDERS in runs.py")
    return name


def read_json(run: Run, name: str) -> dict[str, Any] | None:
    """The JSON object in the file `name`, None if there is no such file; StorageError if it is not JSON."""
    try:
        return json.loads(read_file(run, name))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StorageError(f"{join(run.uri, name)}: is not JSON ({error})") from None


def to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(value), indent=2, default=json_value).encode() + b"\n"


def json_value(value: Any) -> Any:
    """numpy scalars and arrays as plain numbers and lists, paths as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def plain(document: Mapping[str, Any]) -> dict[str, Any]:
    """`document` as JSON values only, as it reads back from job.yaml."""
    return json.loads(to_json(document))
