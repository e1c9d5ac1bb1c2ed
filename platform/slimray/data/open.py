"""Resources that a process keeps open while it makes samples: its decoder, and the filesystems of its datasets."""

import functools
from typing import TYPE_CHECKING, Any

from slimray.data.cache import cache_of
from slimray.storage import open_uri

if TYPE_CHECKING:
    from slimray.data.video.decoder import Decoder


@functools.cache
def decoder(timeout_s: float) -> "Decoder":
    """Return the decoding child of this process, kept between tasks; it dies with the process."""
    from slimray.data.video.decoder import Decoder  # PyAV is slow to import, and checking a job does not need it

    return Decoder(timeout_s=timeout_s)


@functools.lru_cache(maxsize=8)
def filesystem(root: str) -> tuple[Any, str]:
    """Return the filesystem of a dataset's root, through the cache in its options if there is one, and its path."""
    plain, cache = cache_of(root)
    fs, path = open_uri(plain)
    return (fs if cache is None else cache.open(fs)), path
