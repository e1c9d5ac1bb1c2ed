"""Caches files of a bucket on a disk of this machine: the first process to read a file stores it for all others.

`Cache.open` wraps a filesystem so that each of its files is read once; `root` and `cache_of` carry the settings of a
job to the processes that read samples, as options of the root's URI. Whole files are cached, so that a shard costs one
request whichever clips are needed, and none from the second epoch on. Files belong to a `version` of the dataset, and
are written under a temporary name and renamed, by one process at a time; beyond `max_gb` the least recently used are
deleted. A killed process leaves at most a partial file, which the next sweep removes. If the disk is full, the bucket
is read instead.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from slimray.objects import Opened, open_range

PART_BYTES = 32 << 20  # read at a time
LOCKS = 4096  # lock files shared by all files: a process rarely waits for one that fetches a different file
KEPT = 0.9  # fraction of the size limit that a sweep keeps
DIR, GB, VERSION = "cache_dir", "cache_gb", "cache_version"  # options of a URI

log = logging.getLogger(__name__)


def root(uri: str, folder: str, max_gb: float, version: str) -> str:
    """Return the URI of a dataset in a bucket with the cache as its options; a local path is returned unchanged."""
    if "://" not in uri or uri.startswith("file:"):
        return uri
    options = urllib.parse.urlencode({DIR: folder, GB: f"{max_gb:g}", VERSION: version})
    return f"{uri}{'&' if '?' in uri else '?'}{options}"


def cache_of(uri: str) -> tuple[str, "Cache | None"]:
    """Return the URI without cache options, and the cache they describe; None if there are none."""
    head, _, query = uri.partition("?") if "://" in uri else (uri, "", "")
    found = dict(urllib.parse.parse_qsl(query))
    if DIR not in found:
        return uri, None
    left = [pair for pair in query.split("&") if pair.partition("=")[0] not in (DIR, GB, VERSION)]
    plain = f"{head}?{'&'.join(left)}" if left else head
    return plain, Cache(Path(found[DIR]).expanduser(), int(float(found[GB]) * 1e9), f"{plain} {found[VERSION]}")


@dataclass(frozen=True)
class Cache:
    """Files of one `version` of a dataset in `folder`, which datasets may share; at most `max_bytes` in total."""

    folder: Path
    max_bytes: int
    version: str

    def open(self, fs: pafs.FileSystem) -> pafs.FileSystem:
        """Return a filesystem like `fs` that reads files from the cache, storing them there first if necessary."""
        return pafs.PyFileSystem(_Handler(fs, self))

    def place(self, path: str) -> Path:
        """Return the location of the file `path` in the cache."""
        key = hashlib.sha256(f"{self.version}\0{path}".encode()).hexdigest()
        return self.folder / "files" / key[:2] / key

    def fetch(self, fs: pafs.FileSystem, path: str) -> Path | None:
        """Return the local copy of `path`, fetched if necessary; None if it does not fit into the cache.

        Raises FileNotFoundError if there is no such file, OSError if it cannot be read.
        """
        place = self.place(path)
        if _touched(place):
            return place
        try:
            with self._alone(f"{int(place.name[:8], 16) % LOCKS:04d}"):
                if _touched(place):  # another process was faster
                    return place
                with open_range(fs, path) as source:
                    if source.size > self.max_bytes:
                        return None
                    size = _write(source, place)
            self._count(size)
        except _NoRoom as error:
            log.warning("%s: cannot cache files (%s), reading the bucket instead", self.folder, error)
            return None
        return place

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Let one process at a time into the block of a `name`; the lock of a process that dies is released."""
        with _room():
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            file = open(self.folder / "locks" / name, "a")  # noqa: SIM115
        with file:
            with _room():
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _count(self, size: int) -> None:
        """Add `size` bytes to the counter of the cache, and sweep if it exceeds the limit."""
        with self._alone("size"):
            counter = self.folder / "size"
            try:
                total = int(counter.read_text()) + size
            except (OSError, ValueError):  # no counter yet, or one damaged by a crash: count the files
                total = self.max_bytes + 1
            if total > self.max_bytes:
                total = _sweep(self.folder / "files", self.max_bytes)
            with _room():
                counter.write_text(str(total))


class _NoRoom(Exception):
    """The disk of the cache is full, or cannot be written to."""


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """Raise OSErrors of the block as _NoRoom, so that they are not mistaken for errors of the bucket."""
    try:
        yield
    except OSError as error:
        raise _NoRoom(str(error)) from None


def _touched(place: Path) -> bool:
    """Mark a file as used now, and return whether it exists."""
    try:
        os.utime(place)
    except OSError:
        return False
    return True


def _write(source: Opened, place: Path) -> int:
    """Copy a file to `place` atomically, and return its size."""
    part = place.with_name(f"{place.name}.{os.getpid()}.part")
    size, have = source.size, 0
    with _room():
        place.parent.mkdir(parents=True, exist_ok=True)
        file = open(part, "wb")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)  # a sweep removes partial files that are not locked
    try:
        with file:
            while have < size:
                data = source.read(min(PART_BYTES, size - have))
                if not data:
                    raise OSError(f"it ends after {have} of {size} bytes")
                with _room():
                    file.write(data)
                have += len(data)
            with _room():
                file.flush()
                os.fsync(file.fileno())
                part.replace(place)
    finally:
        part.unlink(missing_ok=True)
    return size


def _sweep(folder: Path, max_bytes: int) -> int:
    """Remove abandoned partial files and, beyond `max_bytes`, the least recently used; return the remaining bytes."""
    found = []
    for file in folder.glob("*/*"):
        with contextlib.suppress(OSError):
            if file.suffix == ".part":
                _remove_part(file)
                continue
            info = file.stat()
            found.append((info.st_mtime_ns, info.st_size, file))
    total = sum(size for _, size, _ in found)
    if total > max_bytes:
        for _, size, file in sorted(found, key=lambda one: one[0]):
            if total <= KEPT * max_bytes:
                break
            file.unlink(missing_ok=True)
            total -= size
    return total


def _remove_part(part: Path) -> None:
    with open(part, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError while its writer is alive
        part.unlink(missing_ok=True)


class _Handler(pafs.FileSystemHandler):
    """Reads files through a cache, and passes everything else on to the wrapped filesystem."""

    def __init__(self, fs: pafs.FileSystem, cache: Cache):
        self.fs, self.cache = fs, cache

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Handler) and (self.fs, self.cache) == (other.fs, other.cache)

    def open_input_file(self, path: str) -> pa.NativeFile:
        for _ in range(3):
            place = self.cache.fetch(self.fs, path)
            if place is None:
                break
            with contextlib.suppress(FileNotFoundError):  # swept in the meantime
                return pa.OSFile(str(place), "rb")
        return self.fs.open_input_file(path)

    open_input_stream = open_input_file

    def get_type_name(self) -> str:
        return f"cached {self.fs.type_name}"

    def normalize_path(self, path: str) -> str:
        return self.fs.normalize_path(path)

    def get_file_info(self, paths: list[str]) -> Any:
        return self.fs.get_file_info(paths)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> Any:
        return self.fs.get_file_info(selector)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, "is read-only, because it is read through a cache")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = _refuse
    move = copy_file = open_output_stream = open_append_stream = _refuse
