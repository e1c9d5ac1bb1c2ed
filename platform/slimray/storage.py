"""Files on any storage a job may name: a local folder, `s3://bucket/...` or `gs://bucket/...`, by one code path.

`open_uri` turns what the user wrote into a pyarrow filesystem and a path; the functions below it read, write, list and
delete there. All of them retry under one policy (`retry`): they wait up to `patience_s` for an outage to end, then
raise a one-sentence StorageError, so that an outage is never mistaken for a missing file. Credentials come from the
environment (AWS_*, GOOGLE_*), never from the URI, because URIs are written into run folders. A file appears atomically:
by one put to an object store, by a rename on a disk.
"""

import contextlib
import errno
import itertools
import logging
import os
import random
import re
import stat
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from slimray.credentials import held
from slimray.spec import RunFailed, UserError, did_you_mean

CONNECT_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 10  # without a byte received
SDK_ATTEMPTS = 3
PATIENCE = "SLIMRAY_STORAGE_TIMEOUT_S"  # environment variable that workers inherit: seconds, see `patience_s`
SHORT_PATIENCE_S = 10.0  # for interactive commands
ATTEMPTS = 4  # for errors not known to be an outage, such as a file that ends too early
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 15.0  # average wait between attempts, growing fourfold
SCHEMES = ("file", "gs", "s3")
OPTIONS = ("anonymous", "endpoint_override", "region", "scheme")
CHUNK_BYTES = 8 << 20
FINAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR,
                errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP)  # fmt: skip
OUTAGE_ERRNOS = (errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE,
                 errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
                 errno.ENETUNREACH)  # fmt: skip
OUTAGE_WORDS = ("AWS Error", "google::cloud", "curl", "Could not connect", "Couldn't resolve", "Retry policy")
FINAL_WORDS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN")
DENIED_WORDS = ("ACCESS_DENIED", "403", "INVALID_ACCESS_KEY_ID", "SIGNATURE", "TOKEN")

log = logging.getLogger(__name__)

T = TypeVar("T")


class StorageError(RunFailed):
    """A storage operation failed despite retries: one sentence. Not a mistake of the user."""


def patience_s() -> float:
    """Return how many seconds to wait for a storage outage to end: SLIMRAY_STORAGE_TIMEOUT_S, else SHORT_PATIENCE_S.

    A run sets the variable to its `scale.storage_timeout_s` for the driver (`patient`), its ranks and their decoding
    tasks.
    """
    try:
        return max(0.0, float(os.environ[PATIENCE]))
    except (KeyError, ValueError):
        return SHORT_PATIENCE_S


@contextlib.contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Within the block, wait up to `seconds` for storage outages, in this process and in those it starts."""
    before = os.environ.get(PATIENCE)
    os.environ[PATIENCE] = f"{seconds:g}"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(PATIENCE, None)
        else:
            os.environ[PATIENCE] = before


def open_uri(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """Return (filesystem, path) of a local path, `file://`, `s3://` or `gs://` URI; a bucket must be reachable.

    Query options of a bucket: `endpoint_override`, `scheme`, `region`, `anonymous=true`; AWS_ENDPOINT_URL_S3 and
    AWS_ENDPOINT_URL are honoured. The path itself need not exist. Raises UserError for an unknown scheme or option,
    credentials inside the URI, and a bucket that is missing or denies access; StorageError if it does not respond.
    """
    text = str(uri)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/{1,2}", text)
    if isinstance(uri, Path) or scheme is None:
        if not text:
            raise UserError("storage: the path is empty: write a local path, s3://... or gs://...")
        return pafs.LocalFileSystem(), local_path(text)
    if scheme[1] not in SCHEMES or not scheme[0].endswith("//"):
        hint = did_you_mean(scheme[1], SCHEMES)
        raise UserError(f"{text}: unknown storage {scheme[0]!r}{hint}; a local path needs no scheme")
    try:
        parts = urllib.parse.urlsplit(text)
    except ValueError as error:
        raise UserError(f"{text}: is not a valid URI ({error}): write {scheme[1]}://bucket/folder") from None
    if scheme[1] == "file":
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"{text}: a file URI has three slashes, file:///folder")
        return pafs.LocalFileSystem(), local_path(urllib.parse.unquote(parts.path))
    if what := held(text):
        raise UserError(
            f"{text}: credentials do not belong in a URI ({what}), which is written to run folders: "
            "use the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS)"
        )
    if not parts.netloc:
        raise UserError(f"{text}: names no bucket, write {scheme[1]}://bucket/folder")
    options = _options(parts.query, text)
    path = urllib.parse.unquote(parts.netloc + parts.path).strip("/")
    where = f"{scheme[1]}://{path}"

    def connect() -> pafs.FileSystem:
        try:
            fs = _s3(parts.netloc, options) if scheme[1] == "s3" else _gcs(options)
            _require_bucket(fs, path, where)
            return fs
        except FileNotFoundError:
            raise UserError(_no_bucket(where)) from None
        except (OSError, pa.ArrowException) as error:
            if any(word in str(error) for word in DENIED_WORDS):
                raise UserError(_denied(where)) from error
            raise error if isinstance(error, OSError) else OSError(str(error)) from error

    try:
        return retry(connect, "reach", where), path
    except StorageError as error:
        raise StorageError(f"{error}: check the name, the network and AWS_ENDPOINT_URL") from error.__cause__


def local_path(text: str | Path) -> str:
    """Return a local path as an absolute path with `~` expanded; raise UserError if it is not a valid UTF-8 path."""
    try:
        path = str(Path(text).expanduser().absolute())
        path.encode()
    except RuntimeError:
        raise UserError(f"{text}: this machine has no such user: write the path in full") from None
    except UnicodeEncodeError:
        raise UserError(f"{text}: its name is not UTF-8: rename it, or reach it through a link") from None
    if "\0" in path:
        raise UserError(f"{text}: a path cannot contain a zero byte: fix its name")
    if len(path) > 4000 or any(len(part.encode()) > 255 for part in path.split("/")):
        raise UserError(f"{str(text)[:100]}...: is too long for a file name: shorten it")
    return path


def absolute(uri: str) -> str:
    """Return a local path as an absolute path, and a URI unchanged."""
    return uri if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", uri) else local_path(uri)


def join(base: str, *names: str) -> str:
    """Return `base/name/...` for a path or a URI; the query of a URI stays at the end."""
    head, mark, query = base.partition("?") if "://" in base else (base, "", "")
    return "/".join([head.rstrip("/"), *names]) + mark + query


def read_bytes(fs: pafs.FileSystem, path: str, first: int | None = None, patience: float | None = None) -> bytes:
    """Return the whole file, or at most its `first` bytes; `patience` as for `retry`.

    Raises FileNotFoundError if it is missing, StorageError if it cannot be read completely or is not a regular file.
    """

    def read() -> bytes:
        if isinstance(fs, pafs.LocalFileSystem):
            kind = os.stat(path).st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # reading from a pipe could block forever
                raise OSError(errno.EINVAL, "not a file but a pipe, socket or device")
        with fs.open_input_file(path) as file:
            size = file.size() if first is None else min(first, file.size())
            data = file.read(size)
        if len(data) != size:
            raise OSError(f"received {len(data)} of {size} bytes")
        return data

    return retry(read, "read", path, patience)


def write_atomic(fs: pafs.FileSystem, path: str, data: bytes | Path, patience: float | None = None) -> None:
    """Write `data`, or the content of the local file it names, so that a reader sees the old file or the whole new one.

    A local file is streamed. On a disk: temporary file in the same folder, fsync, rename; missing folders are created.
    In a bucket: one put, or a multipart upload that either completes or never becomes visible, whatever interrupts this
    process; an interrupt is raised once the upload has ended. `patience` as for `retry`. Raises StorageError, at once
    when the disk is full.
    """
    put = _put_local if isinstance(fs, pafs.LocalFileSystem) else _put_object
    retry(lambda: put(fs, path, data), "write", path, patience)


def list_files(fs: pafs.FileSystem, path: str, recursive: bool = False) -> list[pafs.FileInfo]:
    """Return the files under folder `path` sorted by path (`.path`, `.base_name`, `.size`); none if it is missing.

    Names that are not UTF-8 are skipped with a warning, here and in `list_folders`.
    """
    return [info for info in _list(fs, path, recursive) if info.type == pafs.FileType.File]


def list_folders(fs: pafs.FileSystem, path: str) -> list[str]:
    """Return the sorted names of the folders directly under `path`; none if it is missing."""
    return [info.base_name for info in _list(fs, path, False) if info.type == pafs.FileType.Directory]


def exists(fs: pafs.FileSystem, path: str) -> bool:
    """Return whether a file or folder exists; raise StorageError if the storage does not respond."""
    return retry(lambda: fs.get_file_info(path), "look up", path).type != pafs.FileType.NotFound


def delete(fs: pafs.FileSystem, path: str) -> None:
    """Delete the file or the whole folder at `path`; do nothing if it is missing."""

    def remove() -> None:
        kind = fs.get_file_info(path).type
        with contextlib.suppress(FileNotFoundError):
            if kind == pafs.FileType.Directory:
                fs.delete_dir(path)
            elif kind != pafs.FileType.NotFound:
                fs.delete_file(path)

    retry(remove, "delete", path)


def retry(action: Callable[[], T], verb: str, path: str, patience: float | None = None) -> T:
    """Return `action()`, retried while it raises an OSError that may be temporary; all callers share this policy.

    Waits grow fourfold from FIRST_WAIT_S to LONGEST_WAIT_S, each multiplied by a random factor of 0.5 to 1.5, so that a
    thousand ranks do not retry in unison. An outage (no response, throttling, a server error) is retried for `patience`
    seconds, `patience_s()` by default; any other error for ATTEMPTS attempts within `patience`. After that StorageError
    `path: cannot VERB it ...` is raised. FileNotFoundError is an answer and is raised at once.
    """
    limit_s, began, wait_s = patience_s() if patience is None else patience, time.monotonic(), FIRST_WAIT_S
    for attempt in itertools.count(1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            final = error.errno in FINAL_ERRNOS or any(word in str(error) for word in FINAL_WORDS)
            left_s = limit_s - (time.monotonic() - began)
            if final or left_s <= 0 or (attempt >= ATTEMPTS and not _is_outage(error)):
                spent_s = time.monotonic() - began
                spent = f" within {spent_s:.0f} s" if spent_s > 10 else ""
                tried = "" if final else f" after {attempt} attempt{'s' * (attempt > 1)}{spent}"
                raise StorageError(f"{path}: cannot {verb} it{tried} ({_reason(error)})") from error
            if wait_s >= LONGEST_WAIT_S:
                log.warning("%s: cannot %s it yet (%s), retrying for %.0f s", path, verb, _reason(error), left_s)
        time.sleep(min(wait_s * random.uniform(0.5, 1.5), left_s))
        wait_s = min(4 * wait_s, LONGEST_WAIT_S)
    raise AssertionError("counts without end")


# ------------------------------------------------------------------------------------------------ internals


def _is_outage(error: OSError) -> bool:
    return error.errno in OUTAGE_ERRNOS or any(word in str(error) for word in OUTAGE_WORDS)


def _options(query: str, uri: str) -> dict[str, str]:
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in OPTIONS:
            raise UserError(f"{uri}: unknown option {name!r}{did_you_mean(name, OPTIONS)}")
    return options


def _s3(bucket: str, options: dict[str, str]) -> pafs.FileSystem:
    told = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    endpoint = options.get("endpoint_override") or told
    scheme, _, host = endpoint.rpartition("://")
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return pafs.S3FileSystem(
        anonymous=options.get("anonymous", "").lower() == "true",
        endpoint_override=host.rstrip("/") or None,
        scheme=options.get("scheme") or scheme or "https",
        region=region or ("us-east-1" if host else pafs.resolve_s3_region(bucket)),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=SDK_ATTEMPTS),
        allow_delayed_open=True,  # a small file is then one put instead of a multipart upload
    )


def _gcs(options: dict[str, str]) -> pafs.FileSystem:
    if "region" in options:
        raise UserError("storage: option 'region' is for s3:// only, remove it")
    return pafs.GcsFileSystem(
        anonymous=options.get("anonymous", "").lower() == "true",
        endpoint_override=options.get("endpoint_override"),
        scheme=options.get("scheme"),
        retry_time_limit=timedelta(seconds=CONNECT_TIMEOUT_S + REQUEST_TIMEOUT_S),
    )


def _require_bucket(fs: pafs.FileSystem, path: str, where: str) -> None:
    bucket = path.partition("/")[0]
    missing = all(fs.get_file_info(place).type == pafs.FileType.NotFound for place in dict.fromkeys((path, bucket)))
    if missing:
        raise UserError(_no_bucket(where))


def _no_bucket(where: str) -> str:
    bucket = where.partition("://")[2].partition("/")[0]
    return f"{where}: bucket {bucket!r} does not exist: create it, or fix its name"


def _denied(where: str) -> str:
    found = "the credentials found were refused" if _credentials_in_sight() else "no credentials were found"
    return (
        f"{where}: access denied, {found}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or for "
        "gs:// GOOGLE_APPLICATION_CREDENTIALS, to an identity that may list, read and write there"
    )


def _credentials_in_sight() -> bool:
    names = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN", "GOOGLE_APPLICATION_CREDENTIALS")
    return any(os.environ.get(name) for name in names) or Path("~/.aws/credentials").expanduser().is_file()


def _list(fs: pafs.FileSystem, path: str, recursive: bool) -> list[pafs.FileInfo]:
    selector = pafs.FileSelector(path, allow_not_found=True, recursive=recursive)
    found: list[pafs.FileInfo] = []
    for _ in range(5):
        try:
            found = retry(lambda: fs.get_file_info(selector), "list", path)
            break
        except FileNotFoundError:  # a folder appeared or vanished while it was listed
            continue
    named = [info for info in found if _is_utf8(info)]
    if len(named) < len(found):
        log.warning("%s: skipped %d names in it that are not UTF-8: rename them", path, len(found) - len(named))
    return sorted((info for info in named if not info.base_name.endswith(".tmp")), key=lambda info: info.path)


def _is_utf8(info: pafs.FileInfo) -> bool:
    try:
        return bool(info.path)
    except UnicodeDecodeError:
        return False


def _put_local(fs: pafs.FileSystem, path: str, data: bytes | Path) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(part, "xb") as file:
            file.writelines(_chunks(data))
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _put_object(fs: pafs.FileSystem, path: str, data: bytes | Path) -> None:
    """Put all of `data` or nothing, although closing or dropping a stream publishes whatever was written to it.

    The stream therefore gets everything in one call (a local file through a memory map), in a thread of its own that
    Python's signals do not interrupt. A killed process leaves an upload that is never completed.
    """
    whole: Any = data
    if isinstance(data, Path):  # an empty file cannot be mapped
        whole = pa.memory_map(str(data)).read_buffer() if data.stat().st_size else b""
    failures: list[BaseException] = []

    def put() -> None:
        try:
            with fs.open_output_stream(path, compression=None) as out:  # not chosen by the file's extension
                out.write(whole)
        except BaseException as error:  # noqa: BLE001 raised again in the calling thread
            failures.append(error)

    thread = threading.Thread(target=put, name=f"put {path}"[:100])
    thread.start()
    interrupt: BaseException | None = None
    while thread.is_alive():
        try:
            thread.join()
        except BaseException as error:  # noqa: BLE001 raised again when the upload has ended
            interrupt = error
    if interrupt is not None:
        raise interrupt
    if failures:
        raise failures[0]


def _chunks(data: bytes | Path) -> Iterator[bytes]:
    if isinstance(data, bytes):
        yield data
        return
    with open(data, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _reason(error: BaseException) -> str:
    """Return the cause in a few words, as reported by the operating system or storage client, without request ids."""
    number = getattr(error, "errno", None)
    if number == errno.ENOSPC:
        return "the disk is full"
    if number == errno.EINVAL:
        return str(getattr(error, "strerror", error))
    if number:
        return os.strerror(number).lower()
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    for mark in ("AWS Error ", "Details: ", "last message of "):
        text = text.rpartition(mark)[2]
    return re.sub(r"\s*(\(Request ID: \w+\)|error_info=.*)", "", text)[:200]
