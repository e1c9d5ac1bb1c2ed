"""Compares the length a video file declares with the bytes that are there, before anything is decoded.

ffmpeg reads a truncated file as a shorter one, but containers declare sizes: of boxes (MP4), elements (Matroska, WebM),
chunks (AVI, WebP), tags (FLV), packets (MPEG-TS), pages (Ogg), blocks (GIF), objects (WMV). A size that is left open,
as in a live recording, declares nothing. Only headers are read here; their content is left to ffmpeg.
"""

import struct
from collections.abc import Iterator

from slimray.data.samples import MAX_FRAMES, BadSample

EBML, SEGMENT, CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"sidx", b"moof", b"uuid", b"meta")
NESTED = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
TS_SIZES = (188, 192, 204)


def require_whole(data: bytes) -> None:
    """Raise BadSample if a video file declares more bytes, or more frames, than it can hold."""
    if data[4:8] in BOXES:
        _mp4(data)
    elif data[:4] == b"\x1a\x45\xdf\xa3":
        _matroska(data)
    elif data[:4] == b"RIFF" and data[8:12] in (b"AVI ", b"WEBP"):
        _riff(data)
    elif data[:4] == b"FLV\x01":
        _flv(data)
    elif data[:4] == b"OggS":
        _ogg(data)
    elif data[:6] in (b"GIF87a", b"GIF89a"):
        _gif(data)
    elif data[:16] == ASF_HEADER:
        _asf(data)
    elif data[:1] == b"G" or data[4:5] == b"G":
        _transport(data)


def _require(end: int, data: bytes) -> None:
    if end > len(data):
        raise BadSample(f"is truncated: it declares {end:,} bytes or more, but {len(data):,} are there")


# ---------------------------------------------------------------------------------------------------------- MP4


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and declared end of the content of each box; the end exceeds `end` if the file is truncated."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        content = start + 8
        if size == 1 and content + 8 <= end:
            size, content = struct.unpack_from(">Q", data, content)[0], content + 8
        if size == 0:  # up to the end of the file
            size = end - start
        if size < content - start:
            return  # not a box: left to ffmpeg
        yield kind, content, start + size
        start += size


def _mp4(data: bytes) -> None:
    boxes = list(_boxes(data, 0, len(data)))
    fragmented = any(kind == b"moof" for kind, _, _ in boxes)
    for kind, start, end in boxes:
        if fragmented or kind != b"mdat":  # for a truncated mdat, missing frames are counted by the index
            _require(end, data)
        if kind == b"moov":
            _sample_sizes(data, start, min(end, len(data)))
        elif kind == b"sidx":
            _segments(data, start, min(end, len(data)), end)


def _segments(data: bytes, start: int, end: int, after: int) -> None:
    """Check the sizes of the segments that follow a `sidx` box, which lists them."""
    if end - start < 12:
        return
    wide = data[start] == 1
    place = start + 12 + (16 if wide else 8)
    if place + 4 > end:
        return
    first = struct.unpack_from(">Q" if wide else ">I", data, place - (8 if wide else 4))[0]
    count = struct.unpack_from(">H", data, place + 2)[0]
    sizes = [struct.unpack_from(">I", data, at)[0] for at in range(place + 4, min(end - 3, place + 4 + 12 * count), 12)]
    if not any(size >> 31 for size in sizes):  # otherwise it refers to further tables
        _require(after + first + sum(sizes), data)


def _sample_sizes(data: bytes, start: int, end: int) -> None:
    """Raise BadSample for a table of too many samples, because ffmpeg would allocate memory for it."""
    for kind, inner, after in _boxes(data, start, end):
        if kind in NESTED:
            _sample_sizes(data, inner, min(after, end))
        elif kind == b"stsz" and inner + 12 <= end:
            size, count = struct.unpack_from(">II", data, inner + 4)
            if size == 0 and count > (min(after, end) - inner) // 4:
                raise BadSample(f"declares {count:,} samples, more than fit into its table")
            if size and count > max(MAX_FRAMES, len(data)):
                raise BadSample(f"declares {count:,} samples in a file of {len(data):,} bytes")


# ----------------------------------------------------------------------------------------------------- Matroska


def _element(data: bytes, start: int) -> tuple[int, int, int | None] | None:
    """Return id, start and declared size (None: open) of the content of the element at `start`; None at the end."""
    if start >= len(data) or not data[start]:
        return None
    width = 9 - data[start].bit_length()
    name, place = int.from_bytes(data[start : start + width], "big"), start + width
    if place >= len(data) or not data[place]:
        return None
    length = 9 - data[place].bit_length()
    size = int.from_bytes(data[place : place + length], "big") & ((1 << 7 * length) - 1)
    return name, place + length, None if size == (1 << 7 * length) - 1 else size


def _matroska(data: bytes) -> None:
    place, inside = 0, False
    while found := _element(data, place):
        name, content, size = found
        if not inside and name not in (EBML, SEGMENT):
            return  # other data after the segment
        if name in (SEGMENT, CLUSTER) and size is None:
            place, inside = content, True
            continue
        assert size is None or size >= 0
        if size is None:
            return
        _require(content + size, data)
        place = content + size


# ---------------------------------------------------------------------------------------------------- the others


def _riff(data: bytes) -> None:
    place = 0
    while data[place : place + 4] == b"RIFF" and place + 8 <= len(data):  # several, in files above 1 GB
        size = struct.unpack_from("<I", data, place + 4)[0]
        if size in (0, 0xFFFFFFFF):
            return  # written as a stream
        _require(place + 8 + size, data)
        place += 8 + size + size % 2


def _flv(data: bytes) -> None:
    place = struct.unpack_from(">I", data, 5)[0] + 4 if len(data) >= 9 else 0
    while 0 < place < len(data):
        if data[place] & 0x1F not in (8, 9, 18):
            return
        end = place + 11 + int.from_bytes(data[place + 1 : place + 4], "big")
        _require(end, data)
        if data[place] & 0x1F == 18 and (at := data.find(b"\0\x08filesize\0", place, end)) > 0:
            declared = struct.unpack_from(">d", data, at + 11)[0]
            if 0 < declared < 1 << 62:
                _require(int(declared), data)
        place = end + 4


def _ogg(data: bytes) -> None:
    place, ended = 0, True
    while data[place : place + 4] == b"OggS":
        segments = data[place + 26] if place + 26 < len(data) else 0
        end = place + 27 + segments + sum(data[place + 27 : place + 27 + segments])
        _require(max(end, place + 27 + segments), data)
        ended, place = bool(data[place + 5] & 4), end
    if not ended:
        raise BadSample("is truncated: its last page is missing")


def _gif(data: bytes) -> None:
    def colours(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    place = 13 + (colours(data[10]) if len(data) > 10 else 0)
    while place < len(data):
        if data[place] == 0x3B:
            return
        if data[place] == 0x21:
            place += 2
        elif data[place] == 0x2C:
            flags = data[place + 9] if place + 9 < len(data) else 0
            place += 11 + colours(flags)
        elif data[place] == 0:
            place += 1  # padding, which readers skip
            continue
        else:
            return  # left to ffmpeg
        while place < len(data) and data[place]:
            place += 1 + data[place]
        place += 1
    raise BadSample("is truncated: its end mark is missing")


def _asf(data: bytes) -> None:
    place = data.find(ASF_FILE, 0, 10_000)
    if place < 0 or place + 92 > len(data):
        return
    size, flags = struct.unpack_from("<Q", data, place + 40)[0], struct.unpack_from("<I", data, place + 88)[0]
    if not flags & 1:  # otherwise written as a stream
        _require(size, data)


def _transport(data: bytes) -> None:
    for size in TS_SIZES:
        first = 4 if size == 192 else 0
        if len(data) > 4 * size and all(data[first + size * n] == 0x47 for n in range(4)):
            if len(data) % size and data[len(data) // size * size + first :][:1] in (b"G", b""):
                raise BadSample(f"is truncated: {len(data):,} bytes are not a whole number of packets of {size} bytes")
            return
