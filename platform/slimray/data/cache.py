"""Files of a bucket on a disk of this machine: whatever process reads one first leaves it there for all.

`Cache.open` gives a filesystem that reads each file of another one once; `root` and `cache_of` carry the settings of a
job to the processes that read samples, as options of the root's URI. Files are whole, so that a shard costs one
request, whoever needs a clip of it, and from the second epoch on none. They are of a `version` of the dataset, written
beside and renamed, one process at a time; what was used longest ago goes when there are more than `max_gb`. A process
that is killed leaves at most a part that the next sweep removes. A full disk reads the bucket.
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
LOCKS = 4096  # lock files, for all files: few processes wait for one that fetches another file
KEPT = 0.9  # of the largest size is left by a sweep
DIR, GB, VERSION = "cache_dir", "cache_gb", "cache_version"  # options of a URI

log = logging.getLogger(__name__)


def root(uri: str, folder: str, max_gb: float, version: str) -> str:
    """Return the URI of a dataset in a bucket with the cache to use; a local path is returned as it is."""
    if "://" not in uri or uri.startswith("file:"):
        return uri
    options = urllib.parse.urlencode({DIR: folder, GB: f"{max_gb:g}", VERSION: version})
    return f"{uri}{'&' if '?' in uri else '?'}{options}"


def cache_of(uri: str) -> tuple[str, "Cache | None"]:
    """Return the URI without its cache, and the cache; None if it names none."""
    head, _, query = uri.partition("?") if "://" in uri else (uri, "", "")
    found = dict(urllib.parse.parse_qsl(query))
    if DIR not in found:
        return uri, None
    left = [pair for pair in query.split("&") if pair.partition("=")[0] not in (DIR, GB, VERSION)]
    plain = f"{head}?{'&'.join(left)}" if left else head
    return plain, Cache(Path(found[DIR]).expanduser(), int(float(found[GB]) * 1e9), f"{plain} {found[VERSION]}")


@dataclass(frozen=True)
class Cache:
    """Files of a `version` of a dataset in `folder`, which they may share with others', at most `max_bytes` in all."""

    folder: Path
    max_bytes: int
    version: str

    def open(self, fs: pafs.FileSystem) -> pafs.FileSystem:
        """Return `fs` as one that reads a file from here, and leaves it here first where it is not."""
        return pafs.PyFileSystem(_Handler(fs, self))

    def place(self, path: str) -> Path:
        """Return where the file `path` lies here."""
        key = hashlib.sha256(f"{self.version}\0{path}".encode()).hexdigest()
        return self.folder / "files" / key[:2] / key

    def fetch(self, fs: pafs.FileSystem, path: str) -> Path | None:
        """Return the local file of `path`, fetched if need be; None where it does not fit in.

        FileNotFoundError if there is no such file, OSError where it cannot be read.
        """
        place = self.place(path)
        if _touched(place):
            return place
        try:
            with self._alone(f"{int(place.name[:8], 16) % LOCKS:04d}"):
                if _touched(place):  # by a process that was quicker
                    return place
                with open_range(fs, path) as source:
                    if source.size > self.max_bytes:
                        return None
                    size = _write(source, place)
            self._count(size)
        except _NoRoom as error:
            log.warning("%s: %s: the bucket is read instead", self.folder, error)
            return None
        return place

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One process at a time is in the block of a `name`; the lock of one that dies is free."""
        with _room():
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            file = open(self.folder / "locks" / name, "a")  # noqa: SIM115
        with file:
            with _room():
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _count(self, size: int) -> None:
        """Note that `size` bytes came, and sweep if that makes too many."""
        with self._alone("size"):
            counter = self.folder / "size"
            try:
                total = int(counter.read_text()) + size
            except (OSError, ValueError):  # none yet, or a machine died: count what is there
                total = self.max_bytes + 1
            if total > self.max_bytes:
                total = _sweep(self.folder / "files", self.max_bytes)
            with _room():
                counter.write_text(str(total))


class _NoRoom(Exception):
    """The disk of the cache is full, or cannot be written to."""


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """What goes wrong in the block is the cache's matter, and nothing that is said of the bucket or its files."""
    try:
        yield
    except OSError as error:
        raise _NoRoom(str(error)) from None


def _touched(place: Path) -> bool:
    """Note that a file is used, and return whether it is there."""
    try:
        os.utime(place)
    except OSError:
        return False
    return True


def _write(source: Opened, place: Path) -> int:
    """Copy a file to `place`, all of it or nothing, and return its size."""
    part = place.with_name(f"{place.name}.{os.getpid()}.part")
    size, have = source.size, 0
    with _room():
        place.parent.mkdir(parents=True, exist_ok=True)
        file = open(part, "wb")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)  # a sweep removes a part that nobody holds
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
    """Remove parts that nobody writes, and files, those used longest ago first; return the bytes that are left."""
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
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError where its writer lives
        part.unlink(missing_ok=True)


class _Handler(pafs.FileSystemHandler):
    """Reads files through a cache; everything else is the other filesystem's."""

    def __init__(self, fs: pafs.FileSystem, cache: Cache):
        self.fs, self.cache = fs, cache

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Handler) and (self.fs, self.cache) == (other.fs, other.cache)

    def open_input_file(self, path: str) -> pa.NativeFile:
        for _ in range(3):
            place = self.cache.fetch(self.fs, path)
            if place is None:
                break
            with contextlib.suppress(FileNotFoundError):  # swept since
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
        raise OSError(errno.EROFS, "is read through a cache")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = _refuse
    move = copy_file = open_output_stream = open_append_stream = _refuse
