"""Reads files, or ranges of them, from any storage with as few requests as possible: one per S3 object.

A bucket limits the requests per second and prefix, and pyarrow requests the size of an object before it reads any of
it. S3 objects are therefore read through botocore where it is installed (an extra 28 MB per process), with the options
of pyarrow's filesystem; anything else is read by pyarrow. Nothing is retried here: errors are of the kinds that
`storage.retry` recognizes.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs

ATTEMPTS = 3  # made by botocore per request
MISSING = ("404", "NoSuchKey")
BEYOND = ("416", "InvalidRange")  # the range starts beyond the end of the object


@dataclass(frozen=True)
class Opened:
    """An open file or range of it: `size` bytes, read from the beginning by `read(max_bytes)`."""

    size: int
    read: Callable[[int], bytes]
    close: Callable[[], None] = lambda: None


@contextlib.contextmanager
def open_range(fs: pafs.FileSystem, path: str, start: int = 0, size: int | None = None) -> Iterator[Opened]:
    """Open `size` bytes of a file from byte `start` on (fewer if the file ends earlier, None for all of them).

    Raises FileNotFoundError if the file is missing, OSError if it cannot be read.
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
    """Return the bytes that `open_range` opens; raises the same errors, and OSError if fewer bytes are received."""
    with open_range(fs, path, start, size) as opened:
        data = opened.read(opened.size)
    if len(data) != opened.size:
        raise OSError(f"received {len(data)} of {opened.size} bytes")
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
    """Translate the errors botocore raises in the block to those pyarrow would have raised."""
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
    """Return a botocore client for the S3 filesystem `fs`; None for other storages, or without botocore."""
    if not isinstance(fs, pafs.S3FileSystem):
        return None
    (options,) = fs.__reduce__()[1]  # pyarrow exposes its options only for pickling
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
        proxies={},  # like pyarrow, which takes none from the environment
        s3={"addressing_style": "path" if endpoint else "auto"},
        **options,
    )
    url = f"{scheme}://{endpoint}" if endpoint else None
    return botocore.session.get_session().create_client(
        "s3", region_name=region or None, endpoint_url=url, config=config
    )
