"""The bytes of one sample of an index: a file, pictures of a folder, all files of a folder, or a clip of a shard.

`read_whole` and `read_sample` fetch them: a video or point file, the numbered pictures of a folder
(`clip/{00001..00300}.jpg`, one path for all of them) or all its files (`room/{*}.txt`) as a stored ZIP, or one clip of
a packed shard. A shard holds one clip per row group, so that a clip takes one range read, whose offset is in the index
(for older datasets in the footer of the shard).
"""

import functools
import io
import posixpath
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from slimray import objects, storage
from slimray.data.images import image_sets
from slimray.data.images.files import zip_frames
from slimray.data.paths import ALL_FILES, GZIP_ENDING, NUMBERED, matching
from slimray.data.samples import MAX_BYTES, BadSample
from slimray.data.video.clips import ClipRecipe, frame_indices, generators
from slimray.storage import join

NUM_FOOTERS = 4096  # kept unparsed per process, about 11 kB for 64 clips; parsed they would take 170 kB
SHARD = pa.schema([("path", pa.string()), ("label", pa.int64()), ("data", pa.binary())])


def read_whole(fs: pafs.FileSystem, root: str, row: dict[str, Any]) -> bytes:
    """Return all bytes of the sample of an index row; numbered pictures, or files of `{*}`, as one stored ZIP.

    Raises FileNotFoundError if the file, folder or shard is missing, BadSample if the folder exists but lacks a picture
    (like a damaged file, that costs this one sample and not the run), and StorageError.
    """
    if row["shard"].endswith(".bin"):
        return image_sets.cifar_picture(_read_part(fs, join(root, row["shard"]), row["row"], image_sets.CIFAR_PIXELS))
    if row["shard"].endswith(image_sets.IDX_ENDINGS):
        return image_sets.gray_picture(_read_idx(fs, join(root, row["shard"]), row), row["width"], row["height"])
    if row["shard"]:
        return _read_packed(fs, join(root, row["shard"]), row)
    pictures = _pictures_of(fs, root, row)
    if pictures is not None:
        return _read_pictures(fs, pictures, range(pictures.count))
    if ALL_FILES not in posixpath.basename(row["path"]):
        return _read_file(fs, join(root, row["path"]))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in read_files(fs, root, row["path"]).items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def read_files(fs: pafs.FileSystem, root: str, path: str) -> dict[str, bytes]:
    """Return the files that match a row's path with `{*}`: name -> bytes, sorted by name. Raises like `read_whole`."""
    folder, _, form = join(root, path).rpartition("/")
    names = matching([info.base_name for info in storage.list_files(fs, folder)], form.replace(ALL_FILES, "*"))
    if not names:
        raise FileNotFoundError(join(folder, form))
    return {name: _read_file(fs, join(folder, name)) for name in names}


def read_sample(
    fs: pafs.FileSystem, root: str, row: dict[str, Any], recipe: ClipRecipe, key: tuple[int, int, int]
) -> bytes:
    """Return the bytes a decoder needs for the clip of `recipe` and `key` (seed, epoch, sample).

    Of a folder of pictures, only those the decoder will draw with the same key are read. Raises like `read_whole`.
    """
    pictures = None if row["shard"] else _pictures_of(fs, root, row)
    if pictures is None:
        return read_whole(fs, root, row)
    wanted = frame_indices(recipe, pictures.count, generators(key)[0])
    return _read_pictures(fs, pictures, sorted(set(wanted.tolist())))


def write_shard(fs: pafs.FileSystem, path: str, packed_rows: Iterable[dict[str, Any]]) -> list[tuple[int, int]]:
    """Write rows with path, label and data (bytes) as a Parquet shard atomically, one row group per row.

    Return (`offset`, `length`) of each for the index. Holds one row at a time in memory. Uses no compression,
    dictionary or statistics: videos do not shrink, and statistics would copy them into the footer.
    """
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    options |= {"store_schema": False, "write_page_checksum": True}
    with tempfile.TemporaryDirectory(prefix="slimray-") as folder:
        local = Path(folder) / "shard.parquet"
        with pq.ParquetWriter(local, SHARD, **options) as writer:
            for row in packed_rows:
                writer.write_table(pa.Table.from_pylist([row], schema=SHARD))
        storage.write_atomic(fs, path, local)
        footer, number = pq.read_metadata(local), SHARD.get_field_index("data")
    chunks = [footer.row_group(row).column(number) for row in range(footer.num_row_groups)]
    return [(chunk.data_page_offset, chunk.total_compressed_size) for chunk in chunks]


@dataclass(frozen=True)
class Place:
    """A path on a filesystem, usable as the key of a cache."""

    path: str
    fs: pafs.FileSystem = field(hash=False)  # filesystems can be compared but not hashed


@dataclass(frozen=True)
class _Pictures:
    """Numbered files: `head`, a number of at least `digits` digits counted from `first`, `tail`."""

    head: str
    tail: str
    digits: int
    first: int
    count: int

    def path(self, index: int) -> str:
        return f"{self.head}{self.first + index:0{self.digits}d}{self.tail}"


def _read_file(fs: pafs.FileSystem, path: str) -> bytes:
    if isinstance(fs, pafs.LocalFileSystem):
        try:
            return storage.read_bytes(fs, path)
        except FileNotFoundError:
            raise FileNotFoundError(path) from None
    return storage.retry(lambda: _range(fs, path), "read", path)


def _range(fs: pafs.FileSystem, path: str, start: int = 0, size: int | None = None) -> bytes:
    try:
        return objects.read_range(fs, path, start, size)
    except FileNotFoundError:
        raise FileNotFoundError(path) from None


def _read_part(fs: pafs.FileSystem, path: str, start: int, size: int) -> bytes:
    """Return `size` bytes of a file from `start` on."""

    def read() -> bytes:
        data = _range(fs, path, start, size) if start >= 0 else b""
        if len(data) < size:
            raise OSError(f"it ends before byte {start + size}, where the index has a picture")
        return data

    return storage.retry(read, "read", path)


def _read_idx(fs: pafs.FileSystem, path: str, row: dict[str, Any]) -> bytes:
    """Return the pixels of a picture of an idx file, from byte `row` of its array on; a gzipped file is cached."""
    start, size = row["row"], row["width"] * row["height"]
    if not path.endswith(GZIP_ENDING):
        return _read_part(fs, path, image_sets.IDX_START + start, size)

    def read() -> bytes:
        data = _unpacked_idx(Place(path, fs))[start : start + size] if start >= 0 else b""
        if len(data) < size:
            raise OSError(f"it ends before byte {start + size}, where the index has a picture")
        return data

    return storage.retry(read, "read", path)


@functools.lru_cache(maxsize=2)
def _unpacked_idx(at: Place) -> bytes:
    """Return the bytes of the array of a gzipped idx file of pictures."""
    try:
        return image_sets.read_idx(_read_file(at.fs, at.path), 3).tobytes()
    except ValueError as error:
        raise OSError(str(error)) from None


def _read_packed(fs: pafs.FileSystem, path: str, row: dict[str, Any]) -> bytes:
    """Return the data of one row group by its offset in the index, else by the footer; its checksum is verified."""
    offset, length = row.get("offset", -1), row.get("length", 0)
    if offset >= 0 and 0 < length <= MAX_BYTES:
        chunk = storage.retry(lambda: _range(fs, path, offset, length), "read", path)
        if (data := _only_value(chunk)) is not None:
            return data
    return _read_row_group(fs, path, row["row"])  # reports the error, or reads a shard that was rewritten


def _only_value(chunk: bytes) -> bytes | None:
    """Return the value in a column chunk that `write_shard` wrote; None for anything else or a wrong checksum.

    A chunk is a page header in Thrift's compact protocol, then the page with its levels and one value.
    """
    try:
        header, at = [], 0
        for _ in range(4):  # page type, size, compressed size, checksum: zigzag-encoded 32-bit integers
            if chunk[at] != 0x15:
                return None
            number, shift, at = 0, 0, at + 1
            while True:
                number |= (chunk[at] & 127) << shift
                shift, at = shift + 7, at + 1
                if chunk[at - 1] < 128:
                    break
            header.append((number >> 1) ^ -(number & 1))
        _, _, size, checksum = header
        page = memoryview(chunk)[max(at, len(chunk) - size) :]
        (levels,) = struct.unpack_from("<I", page)
        (length,) = struct.unpack_from("<I", page, 4 + levels)
    except (IndexError, struct.error):
        return None
    data = page[8 + levels :]
    if len(page) != size or len(data) != length or zlib.crc32(page) != checksum & 0xFFFFFFFF:
        return None
    return bytes(data)


def _read_row_group(fs: pafs.FileSystem, path: str, row: int) -> bytes:
    """Return the data of one row group; its checksum is verified, and an outdated footer is read again."""
    at = Place(path, fs)

    def read() -> bytes:
        try:
            footer = pq.read_metadata(pa.BufferReader(_footer(at)))
            if not 0 <= row < footer.num_row_groups:
                raise OSError(f"it holds {footer.num_row_groups} clips, but the index names number {row}")
            with fs.open_input_file(path) as file:
                shard = pq.ParquetFile(file, metadata=footer, page_checksum_verification=True)
                return shard.read_row_group(row, columns=["data"], use_threads=False).column("data")[0].as_py()
        except FileNotFoundError:
            raise FileNotFoundError(path) from None
        except (OSError, pa.ArrowException) as error:
            _footer.cache_clear()
            raise error if isinstance(error, OSError) else OSError(str(error)) from error

    return storage.retry(read, "read", path)


@functools.lru_cache(maxsize=NUM_FOOTERS)
def _footer(at: Place) -> bytes:
    """Return the footer of a Parquet file, as a file of its own."""
    with at.fs.open_input_file(at.path) as file:
        footer = pq.read_metadata(file)
    sink = pa.BufferOutputStream()
    footer.write_metadata_file(sink)
    return sink.getvalue().to_pybytes()


def _pictures_of(fs: pafs.FileSystem, root: str, row: dict[str, Any]) -> _Pictures | None:
    """Return the pictures that a row's path stands for, None if it is a file; raise BadSample for an empty folder."""
    path = join(root, row["path"])
    match = NUMBERED.search(path)
    if match is None:
        return None
    first = int(match[1])
    count = int(match[2]) - first + 1 if match[2] else row["frames"] or _count_pictures(Place(path, fs))
    if count < 1:
        raise BadSample("the folder has no pictures")
    return _Pictures(path[: match.start()], path[match.end() :], len(match[1]), first, count)


@functools.lru_cache(maxsize=1 << 17)
def _count_pictures(at: Place) -> int:
    """Count the pictures from the first to the highest number, for a path that does not give the last one."""
    folder, _, name = at.path.rpartition("/")
    match = NUMBERED.search(name)
    assert match is not None
    form = re.compile(re.escape(name[: match.start()]) + r"(\d+)" + re.escape(name[match.end() :]))
    found = [form.fullmatch(info.base_name) for info in storage.list_files(at.fs, folder)]
    numbers = [int(one[1]) for one in found if one is not None]
    if not numbers and not storage.exists(at.fs, folder):
        raise FileNotFoundError(folder)
    return max(numbers, default=int(match[1]) - 1) - int(match[1]) + 1


def _read_pictures(fs: pafs.FileSystem, pictures: _Pictures, wanted: Sequence[int]) -> bytes:
    frames: dict[int, bytes] = {}
    for index in wanted:
        path = pictures.path(index)
        try:
            frames[index] = _read_file(fs, path)
        except FileNotFoundError:
            folder, _, name = path.rpartition("/")
            if not storage.exists(fs, folder):
                raise FileNotFoundError(folder) from None
            raise BadSample(f"frame {index} of {pictures.count} is missing ({name})") from None
    return zip_frames(frames, num_frames=pictures.count)
