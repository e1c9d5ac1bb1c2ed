"""Where the weights lie that a job starts from: a file, a URL fetched once, or the model of a finished run."""

import hashlib
import os
import re
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from slimray import storage
from slimray.runs.folder import find_run
from slimray.spec import UserError
from slimray.storage import join


def weights_source(source: str, where: str, sha256: str | None = None) -> str:
    """Return the path or URI of the weights `source` means: a file, a URL (fetched once), or a run by name or URI.

    `where` is the storage in which names are looked up. UserError if there is none or its SHA-256 is not `sha256`.
    """
    if source.startswith(("http://", "https://")):
        found = str(_download(source))
    elif Path(source).expanduser().is_file():
        found = str(Path(source).expanduser().absolute())
    elif re.search(r"\.(safetensors|pth|pt|ckpt|tar|bin)(\?.*)?$", source):
        found = source
    else:
        found = join(find_run(source, where).uri, "model/weights.safetensors")
    try:
        data = storage.read_bytes(*storage.open_uri(found)) if sha256 else b""
        there = bool(data) or storage.exists(*storage.open_uri(found))
    except FileNotFoundError:
        there = False
    if not there:
        raise UserError(f"{source}: no such weights: give a checkpoint file, a URL or a finished training run")
    if sha256 and (digest := hashlib.sha256(data).hexdigest()) != sha256.lower():
        raise UserError(f"{source}: has SHA-256 {digest}, not {sha256}: it is damaged or another file")
    return found


def _download(url: str) -> Path:
    """Fetch `url` into the user's cache once, atomically; UserError when it cannot be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slimray" / "weights"
    target = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.rpartition('/')[2].partition('?')[0]}"
    if target.is_file():
        return target
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:  # noqa: S310 http(s) only
            while chunk := response.read(1 << 20):
                file.write(chunk)
        part.replace(target)
    except (OSError, urllib.error.URLError) as error:
        raise UserError(f"{url}: cannot be fetched ({getattr(error, 'reason', error)}): download it by hand") from None
    finally:
        part.unlink(missing_ok=True)
    return target
