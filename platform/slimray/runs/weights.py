"""Location of the weights that a job starts from: a file, a URL that is fetched once, or the model of a finished run.

A download gets its final name in the user's cache only if it has the length the server announced and, if one is given,
the expected digest; its size and SHA-256 are stored beside it and verified whenever the file is used again.
"""

import hashlib
import json
import os
import re
import time
import uuid
from pathlib import Path

from slimray import storage
from slimray.credentials import held
from slimray.runs.folder import Run, digest, exists, find_run, read_file, read_weights, write_file
from slimray.spec import UserError
from slimray.storage import join

FETCH_ATTEMPTS = 3
FETCH_PAUSE_S = 1.0
FETCH_TIMEOUT_S = 30.0  # without a byte received
CHUNK_BYTES = 1 << 20


def weights_source(source: str, where: str, sha256: str | None = None, run: Run | None = None) -> str:
    """Return the path or URI of the weights `source` means: a file, a URL (fetched once), or a run by name or URI.

    `where` is the storage in which run names are looked up. If a `run` is given, a download is kept in its `init/`,
    where other machines read it and a resumed run finds it. Raises UserError if there are no such weights or their
    SHA-256 is not `sha256`, StorageError if those of a run are damaged.
    """
    if source.startswith(("http://", "https://")):
        return str(_download(source, sha256)) if run is None else _kept(source, sha256, run)
    if _is_file(source) or re.search(r"\.(safetensors|pth|pt|ckpt|tar|bin)(\?.*)?$", source):
        found, data = storage.absolute(source), None
    else:
        run = find_run(source, where)
        try:
            found, data = join(run.uri, "model/weights.safetensors"), read_weights(run)
        except UserError:
            raise UserError(_no_weights(source)) from None
    fs, path = storage.open_uri(found)
    if data is None and not storage.exists(fs, path):
        raise UserError(_no_weights(source))
    if sha256:
        _compare(source, sha256, digest(storage.read_bytes(fs, path) if data is None else data)[1])
    return found


def _kept(url: str, sha256: str | None, run: Run) -> str:
    """Return the URI of the download of `url` in the run folder, fetching it first if it is not there yet."""
    name = f"init/{_file_name(url)}"
    if not exists(run, name):
        write_file(run, name, _download(url, sha256))
    elif sha256:
        _compare(url, sha256, digest(read_file(run, name))[1])
    return join(run.uri, name)


def _is_file(source: str) -> bool:
    try:
        return Path(source).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):
        return False


def _no_weights(source: str) -> str:
    return f"{source}: no such weights: give a checkpoint file, a URL or a finished training run"


def _compare(source: str, wanted: str, found: str) -> None:
    if found != wanted.lower():
        raise UserError(f"{source}: has SHA-256 {found}, not {wanted}: it is damaged or a different file")


def _download(url: str, sha256: str | None) -> Path:
    """Fetch `url` into the user's cache unless it is complete there; raise UserError if it cannot be fetched."""
    import urllib.error
    from http.client import HTTPException

    if what := held(url):
        raise UserError(f"{url}: holds {what}, which would be stored and shown: download the file and give its path")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slimray" / "weights"
    target = cache / _file_name(url)
    if _is_whole(target, sha256):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{uuid.uuid4().hex[:8]}.tmp")
    try:
        for attempt in range(1, FETCH_ATTEMPTS + 1):
            try:
                is_known = _fetch(url, part)
                break
            except urllib.error.HTTPError as error:
                raise UserError(f"{url}: cannot be fetched (HTTP {error.code} {error.reason}): fix the URL") from None
            except (OSError, HTTPException, ValueError) as error:
                if attempt == FETCH_ATTEMPTS or isinstance(error, ValueError):
                    reason = getattr(error, "reason", None) or str(error) or type(error).__name__
                    raise UserError(f"{url}: cannot be fetched ({reason}): download it and give its path") from None
            time.sleep(FETCH_PAUSE_S * attempt)
        size, found = digest(part)
        if sha256:
            _compare(url, sha256, found)
        _note(target).unlink(missing_ok=True)
        part.replace(target)
        if is_known or sha256:  # otherwise the file may be incomplete, and is fetched again the next time
            _note(target).write_text(json.dumps({"url": url, "bytes": size, "sha256": found}))
    finally:
        part.unlink(missing_ok=True)
    return target


def _file_name(url: str) -> str:
    name = re.sub(r"[^\w.-]", "_", url.partition("?")[0].partition("#")[0].rpartition("/")[2])[-100:]
    return f"{hashlib.sha256(url.encode('utf-8', 'replace')).hexdigest()[:16]}-{name}"


def _fetch(url: str, part: Path) -> bool:
    """Download `url` to `part`; return whether it is known to be complete, raise OSError if it is known not to be."""
    import urllib.request

    with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT_S) as response, open(part, "wb") as file:  # noqa: S310 http(s)
        if response.headers.get_content_type() == "text/html":
            raise UserError(f"{url}: returned a web page instead of a file: give the address of the file itself")
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)
        length = response.headers.get("Content-Length", "")
        chunked = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
        size = file.tell()
    if not size:
        raise OSError("the server sent nothing")
    if length.isdigit() and not chunked and size != int(length):
        raise OSError(f"the transfer broke off after {size} of {length} bytes")
    return chunked or length.isdigit()


def _note(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _is_whole(target: Path, sha256: str | None) -> bool:
    """Return whether the file in the cache is complete and has the digest asked for."""
    try:
        noted = json.loads(_note(target).read_bytes())
        size, found = digest(target)
        return (size, found) == (noted["bytes"], noted["sha256"]) and (not sha256 or found == sha256.lower())
    except (OSError, ValueError, KeyError, TypeError):
        return False
