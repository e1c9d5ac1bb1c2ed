"""Files of any storage, or ranges of them, with as few requests as there can be: of an object of S3 one.

A bucket answers so many requests a second and prefix, and pyarrow asks for the size of an object before it reads any of
it. So objects of S3 are asked for by botocore where that is installed (an extra 28 MB a process), with the options of
pyarrow's filesystem; anything else is read by pyarrow. Nothing is tried again here: errors are those that
`storage.retry` knows.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs

ATTEMPTS = 3  # of botocore at a request
MISSING = ("404", "NoSuchKey")
BEYOND = ("416", "InvalidRange")  # nothing of an object is in the range


@dataclass(frozen=True)
class Opened:
    """A file or a range of it, to be read from its beginning: `size` bytes, by `read(at most so many)`."""

    size: int
    read: Callable[[int], bytes]
    close: Callable[[], None] = lambda: None


@contextlib.contextmanager
def open_range(fs: pafs.FileSystem, path: str, start: int = 0, size: int | None = None) -> Iterator[Opened]:
    """Open the bytes of a file from `start` on: `size` of them, or fewer where it ends before; None for all.

    FileNotFoundError if it is not there, OSError where it cannot be read.
    """
    client = _client_of(fs)
    if client is None:
        with fs.open_input_file(path) as file:
            left = max(0, file.size() - start)
            if start:
                file.seek(min(start, file.size()))
            yield Opened(left if size is None else min(size, left), file.read)
        return
    with _as_os_errors(path):
        opened = _get(client, path, start, size)
        try:
            yield opened
        finally:
            opened.close()


def read_range(fs: pafs.FileSystem, path: str, start: int = 0, size: int | None = None) -> bytes:
    """Return the bytes that `open_range` opens, and raise as that does, also if fewer come."""
    with open_range(fs, path, start, size) as opened:
        data = opened.read(opened.size)
    if len(data) != opened.size:
        raise OSError(f"{len(data)} of {opened.size} bytes came")
    return data


# ---------------------------------------------------------------------------------------------------------- S3


def _get(client: Any, path: str, start: int, size: int | None) -> Opened:
    from botocore.exceptions import ClientError

    bucket, _, key = path.partition("/")
    asked: dict[str, Any] = {"Bucket": bucket, "Key": key}
    if size == 0:
        return Opened(0, lambda _: b"")
    if start or size is not None:
        asked["Range"] = f"bytes={start}-{'' if size is None else start + size - 1}"
    try:
        answer = client.get_object(**asked)
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in BEYOND:
            return Opened(0, lambda _: b"")
        raise
    return Opened(int(answer["ContentLength"]), answer["Body"].read, answer["Body"].close)


@contextlib.contextmanager
def _as_os_errors(path: str) -> Iterator[None]:
    """Raise what botocore raises in the block as pyarrow would have raised it."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in MISSING:
            raise FileNotFoundError(path) from None
        named = {"403": "ACCESS_DENIED"}.get(code) or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", code).upper()
        raise OSError(f"AWS Error {named}: {error.response.get('Error', {}).get('Message', '')}") from error
    except NoCredentialsError as error:
        raise OSError(f"AWS Error ACCESS_DENIED: {error}") from error
    except BotoCoreError as error:
        raise OSError(f"AWS Error NETWORK_CONNECTION: {str(error).splitlines()[0]}") from error


def _client_of(fs: pafs.FileSystem) -> Any:
    """A client of the S3 that `fs` is; None for another storage, or without botocore."""
    if not isinstance(fs, pafs.S3FileSystem):
        return None
    (options,) = fs.__reduce__()[1]  # by which it is pickled: pyarrow tells them nowhere else
    names = ("anonymous", "region", "scheme", "endpoint_override", "connect_timeout", "request_timeout")
    return _client(*(options[name] for name in names))


@functools.lru_cache(maxsize=8)
def _client(
    anonymous: bool, region: str, scheme: str, endpoint: str, connect_timeout: float, request_timeout: float
) -> Any:
    try:
        import botocore
        import botocore.config
        import botocore.session
    except ImportError:
        return None
    options: dict[str, Any] = {"signature_version": botocore.UNSIGNED} if anonymous else {}
    config = botocore.config.Config(
        connect_timeout=connect_timeout,
        read_timeout=request_timeout,
        retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
        response_checksum_validation="when_required",
        proxies={},  # as pyarrow, which takes none from the environment
        s3={"addressing_style": "path" if endpoint else "auto"},
        **options,
    )
    url = f"{scheme}://{endpoint}" if endpoint else None
    return botocore.session.get_session().create_client(
        "s3", region_name=region or None, endpoint_url=url, config=config
    )
