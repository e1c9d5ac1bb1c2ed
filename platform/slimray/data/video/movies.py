"""Reads videos: a video file, a ZIP of numbered pictures, a picture. Returns exactly the requested frame, or none.

PyAV reads videos and finds frames by their timestamps. decord is optional (`data.reader: decord`; PyAV then reads the
files it cannot): decord 0.6 was slower, and silently returned other frames of intact files (open GOPs, MPEG-TS, AVI
with B-frames) and wrong pixels of damaged ones. Damage that ffmpeg does not notice (rare in H.264, common in HEVC and
VP9) is not detected.
"""

import io
import itertools
import json
import struct
import zipfile
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av import logging as av_logging
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from slimray.data.images.files import PNG, count_frames, read_frames, read_picture
from slimray.data.samples import MAX_BYTES, MAX_FRAMES, MAX_PIXELS, BadSample, check_size
from slimray.data.video.lengths import require_whole

DISPLAY_MATRIX = SideData.DISPLAYMATRIX
DROPPABLE = ("h264", "mpeg4", "mpeg2video", "mpeg1video", "vp9")  # no frame depends on their non-reference frames


class Video(ABC):
    """A video open for reading; frame n is shown at `ticks[n] * tick` seconds, `fps` is 0 if unknown."""

    num_frames: int
    fps: float
    codec: str
    ticks: Sequence[int]
    tick: Fraction

    @abstractmethod
    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Return the uint8 `[H, W, 3]` pictures at ascending, distinct `indices`; raise BadSample if one is damaged."""

    def walk(self) -> Iterator[np.ndarray]:
        """Yield all pictures in order; raise BadSample at the first that does not decode."""
        return (self.frames([i])[0] for i in range(self.num_frames))

    def check(self) -> tuple[int, int]:
        """Decode everything and return the width and height of a picture; raise BadSample like `walk`."""
        sizes = [picture.shape[1::-1] for picture in self.walk()]
        return sizes[-1]


@contextmanager
def open_video(data: bytes, reader: str = "pyav") -> Iterator[Video]:
    """Open a video, a picture, or a ZIP of numbered pictures. Errors of ffmpeg become BadSample, also in the block.

    With `reader` "decord", a video is read by decord if that can open it.
    """
    told, _ = av_logging.get_last_error()
    require_whole(data)
    try:
        if data[:4] == b"PK\x03\x04":
            yield _Pictures(data)
        elif data[:8] == PNG or data[8:12] == b"WEBP":
            yield _Animation(data)
        elif data[:3] == b"\xff\xd8\xff":
            yield _Still(data)
        else:
            yield (_decord(data) if reader == "decord" else None) or _Movie(data)
    except FFmpegError as error:
        count, log = av_logging.get_last_error()
        words = f": {log[2].strip()}" if log and count > told else ""
        raise BadSample(f"does not decode ({error.strerror}{words})") from None


class _Movie(Video):
    """A video file. Its packets are read once, then decoded from the last key frame before each requested frame."""

    def __init__(self, data: bytes):
        limits = {"max_pixels": str(MAX_PIXELS)}
        options = {**limits, "protocol_whitelist": "none"}  # a playlist must not open other files
        with av.open(io.BytesIO(data), options=options, metadata_errors="replace") as container:
            stream = _best_stream(container)
            self.context, self.codec = stream.codec_context, stream.codec_context.codec.canonical_name
            self.width, self.height = self.context.width, self.context.height
            if not self.width * self.height:
                raise BadSample("declares no size, or one that is too large to decode")
            check_size(self.width, self.height, 1)
            self.context.thread_count, self.context.options = 1, limits
            self.fps, self.tick = float(stream.average_rate or 0), stream.time_base
            self.packets = _read_packets(container, stream)
            times: list[Any] = [packet.pts for packet in self.packets]
            keys: list[Any] = [packet.pts for packet in self.packets if packet.is_keyframe]
            reordered_avi = container.format.name == "avi" and self.context.has_b_frames  # its timestamps are guesses
        if None in times or len({*times}) < len(times) or keys != sorted(keys) or reordered_avi:
            self._number_packets()
        shown = [(p.pts, n) for n, p in enumerate(self.packets) if p.pts is not None and not self._is_hidden(p)]
        self.keys = [(p.pts, n) for n, p in enumerate(self.packets) if p.is_keyframe and p.pts is not None]
        first = self.packets[0]  # frames shown before the first key frame depend on data before the file
        start = first.pts if first.is_keyframe and first.pts is not None else -float("inf")
        self.place = {pts: n for pts, n in shown if pts >= start}
        if not self.place:
            raise BadSample("holds no frames")
        self.ticks = sorted(self.place)
        self.num_frames = len(self.ticks)
        self.reformatter = VideoReformatter()

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        wanted = [self.ticks[i] for i in indices]
        check_size(self.width, self.height, len(wanted))
        found: dict[int, np.ndarray] = {}
        for start, group in itertools.groupby(wanted, self._start_of):
            self._pick(start, set(group), found, drop=self.codec in DROPPABLE)
        if len(found) < len(wanted):  # damage, or a frame that needs more than its key frame: decode from the start
            self._pick(0, set(wanted), found, drop=False)
        for index, pts in zip(indices, wanted, strict=True):
            if pts not in found:
                raise self._missing(index)
        return [found[pts] for pts in wanted]

    def walk(self) -> Iterator[np.ndarray]:
        return map(self._picture, self._shown())

    def check(self) -> tuple[int, int]:
        exchanged = False
        for frame in self._shown():
            exchanged = _display(frame)[0]
        return (self.height, self.width) if exchanged else (self.width, self.height)

    def _start_of(self, pts: int) -> int:
        """Return the number of the packet of the last key frame that is not shown after `pts`."""
        number = bisect_right(self.keys, (pts, len(self.packets)))
        return self.keys[number - 1][1] if number else 0

    def _pick(self, start: int, wanted: set[int], found: dict[int, np.ndarray], drop: bool) -> None:
        """Add the `wanted` frames to `found`, decoding from packet `start`, except those after a damaged frame."""
        end = max(self.place[pts] for pts in wanted) + 1
        taken, intact = {}, end
        with suppress(FFmpegError):
            for frame in self._decode(start, end, wanted if drop else None):
                if frame.is_corrupt:
                    intact = min(intact, self.place.get(frame.pts, end))
                elif frame.pts in wanted:
                    taken[frame.pts] = self._picture(frame)
        found.update({pts: picture for pts, picture in taken.items() if self.place[pts] < intact})

    def _shown(self) -> Iterator[av.VideoFrame]:
        """Yield all frames in order; raise BadSample at the first that is missing or damaged."""
        count = 0
        with suppress(FFmpegError):
            for frame in self._decode(0, len(self.packets)):
                if frame.pts not in self.place:
                    continue
                if frame.is_corrupt or frame.pts != self.ticks[count]:
                    break
                yield frame
                count += 1
        if count < self.num_frames:
            raise self._missing(count)

    def _decode(self, start: int, end: int, wanted: Collection[int] | None = None) -> Iterator[Any]:
        """Yield the frames of packets `start` to `end`; with `wanted`, skip others that no frame depends on."""
        self.context.flush_buffers()
        for packet in itertools.chain(self.packets[start:end], [None]):
            drop = packet is not None and wanted is not None and packet.pts not in wanted
            self.context.skip_frame = "NONREF" if drop else "DEFAULT"
            yield from self.context.decode(packet)

    def _number_packets(self) -> None:
        """Number the packets of a file without usable timestamps by the order in which their frames are decoded."""
        for number, packet in enumerate(self.packets):
            packet.pts = number
        came = [frame.pts for frame in self._decode(0, len(self.packets))]
        ranks = {number: rank for rank, number in enumerate(came)}
        if len(ranks) < len(came) or not came:
            raise BadSample("holds frames that cannot be distinguished" if came else "holds no frames")
        for number, packet in enumerate(self.packets):
            packet.pts = ranks.get(number)
        self.tick = 1 / Fraction(self.fps or 25).limit_denominator(100_000)

    def _is_hidden(self, packet: av.Packet) -> bool:
        """Return whether a packet's frame is not shown: cut off by an edit list, or marked as hidden in VP8."""
        return packet.is_discard or (self.codec == "vp8" and not bytes(packet)[0] & 16)

    def _picture(self, frame: av.VideoFrame) -> np.ndarray:
        """Return the pixels, rotated and mirrored as the file specifies, and scaled if frames vary in size."""
        image = self.reformatter.reformat(frame, self.width, self.height, "rgb24", threads=1).to_ndarray()
        exchanged, mirrored, overturned = _display(frame)
        image = image.transpose(1, 0, 2) if exchanged else image
        image = image[:, ::-1] if mirrored else image
        return np.ascontiguousarray(image[::-1] if overturned else image)

    def _missing(self, index: int) -> BadSample:
        return BadSample(f"frame {index} of {self.num_frames} is missing or damaged")


def _best_stream(container: Any) -> Any:
    """Return the best video stream of a file; raise BadSample if there is none, or only a cover picture."""
    covers = [stream for stream in container.streams.video if stream.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    if best in covers:
        others = [stream for stream in container.streams.video if stream not in covers and stream.codec_context]
        best = max(others, key=lambda stream: stream.codec_context.width * stream.codec_context.height, default=None)
    if best is None or best.codec_context is None:
        raise BadSample("holds no video, only a cover picture" if covers else "holds no video that can be decoded")
    return best


def _read_packets(container: Any, stream: Any) -> list[av.Packet]:
    """Return the packets of a stream in decoding order, from the first key frame on; raise BadSample if one is lost."""
    packets = [packet for packet in itertools.islice(container.demux(stream), MAX_FRAMES + 1) if packet.size]
    kind = container.format.name
    declared = sum(entry.size > 0 for entry in stream.index_entries) if kind.startswith("mov") else len(packets)
    broken = [number for number, packet in enumerate(packets) if packet.is_corrupt]
    if kind == "mpegts" and broken and all(_is_joint(packets, number) for number in broken):
        broken = [] if _decodes_quietly(packets, stream.codec_context) else broken  # joined streams are not damage
    whole = len(packets) - len(broken)
    if whole < max(declared, len(packets), 1):
        raise BadSample(f"is truncated: {whole} of {declared} frames are there" if declared else "holds no frames")
    if len(packets) > MAX_FRAMES:
        raise BadSample(f"holds more than {MAX_FRAMES:,} frames")
    return packets[next((n for n, packet in enumerate(packets) if packet.is_keyframe), 0) :]


def _is_joint(packets: Sequence[av.Packet], number: int) -> bool:
    """Return whether transport streams may have been joined near a packet, which explains a gap in the numbering.

    A joined stream begins with a key frame, and its time continues evenly, restarts, or jumps by seconds. A shorter gap
    means that a frame was lost.
    """
    near = range(max(1, number - 1), min(len(packets), number + 4))
    times: list[Any] = [packet.dts for packet in packets]
    if None in times or not any(packets[n].is_keyframe for n in near):
        return False
    steps = sorted(b - a for a, b in itertools.pairwise(times))
    usual, second = steps[len(steps) // 2], 1 / packets[number].time_base
    even = [abs(times[n] - times[n - 1] - usual) <= usual / 2 for n in near]
    restarts = [packets[n].is_keyframe and not 0 < times[n] - times[n - 1] < second for n in near]
    return all(a or b for a, b in zip(even, restarts, strict=True))


def _decodes_quietly(packets: Sequence[av.Packet], context: Any) -> bool:
    """Return whether every packet decodes to a frame without any message of the decoder."""
    level = av_logging.get_level()
    av_logging.set_level(av_logging.ERROR)
    try:
        with av_logging.Capture() as said:
            count = sum(len(context.decode(packet)) for packet in [*packets, None])
    except FFmpegError:
        return False
    finally:
        av_logging.set_level(level)
    return count == len(packets) and not said


def _display(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Return which steps make a picture upright: exchange axes, then mirror horizontally, then vertically.

    They follow from the display matrix, which shows (x, y) at (a x + c y, b x + d y). A matrix that, apart from its
    scale, is not made of rotations by 90 degrees and mirrors is ignored.
    """
    side_data: Any = frame.side_data
    found = side_data.get(DISPLAY_MATRIX)
    if found is None:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(found)[:36])
    if min(abs(a), abs(d)) > 100 * max(abs(b), abs(c)):
        return False, a < 0, d < 0
    if min(abs(b), abs(c)) > 100 * max(abs(a), abs(d)):
        return True, c < 0, b < 0
    return False, False, False


class _Decord(Video):
    """A video file read by decord; fps and codec are not provided."""

    fps, codec = 0.0, ""

    def __init__(self, reader: Any):
        self.reader, self.num_frames = reader, len(reader)

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        try:
            return list(self.reader.get_batch(list(indices)).asnumpy())
        except Exception as error:  # noqa: BLE001  (decord raises several unrelated classes)
            raise BadSample(f"decord does not decode it ({str(error).splitlines()[0][-120:]})") from None


def _decord(data: bytes) -> _Decord | None:
    """Open a video with decord; return None if that fails (AV1, GIF, no decord on this platform)."""
    try:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        height, width = reader[0].shape[:2]
    except Exception:  # noqa: BLE001  (PyAV reads the file instead, and reports any error)
        return None
    check_size(width, height, 1)
    return _Decord(reader) if len(reader) else None


class _Pictures(Video):
    """A ZIP of pictures named by number; frames that were left out are missing, they do not shift others."""

    codec = "jpeg"

    def __init__(self, data: bytes):
        self.zip = zipfile.ZipFile(io.BytesIO(data))
        files = self.zip.infolist()
        try:
            notes = json.loads(self.zip.comment or b"{}")
            self.names = {int(Path(file.filename).stem): file.filename for file in files}
            self.num_frames, self.fps = int(notes.get("frames", len(files))), float(notes.get("fps", 0))
        except ValueError:
            raise BadSample("is a ZIP that does not hold numbered pictures") from None
        if not 0 < self.num_frames <= MAX_FRAMES or sum(file.file_size for file in files) > MAX_BYTES:
            raise BadSample(f"declares {self.num_frames} pictures: none, too many or too large to decode")
        self.ticks, self.tick = range(self.num_frames), 1 / Fraction(self.fps or 25).limit_denominator(100_000)

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        for index in indices:
            if index not in self.names:
                raise BadSample(f"frame {index} of {self.num_frames} is missing")
        return [read_picture(self.zip.read(self.names[index])) for index in indices]


class _Still(Video):
    """A picture as a video of one frame."""

    num_frames, fps, codec, ticks, tick = 1, 0.0, "image", (0,), Fraction(1, 25)

    def __init__(self, data: bytes):
        self.data = data

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        return [read_picture(self.data) for _ in indices]


class _Animation(Video):
    """A PNG or WebP file, animated or not; all frames get the duration of the first."""

    codec = "image"

    def __init__(self, data: bytes):
        self.data = data
        self.num_frames, duration_ms = count_frames(data)
        self.fps = 1000 / duration_ms if duration_ms > 0 else 0.0
        self.ticks, self.tick = range(self.num_frames), 1 / Fraction(self.fps or 25).limit_denominator(100_000)

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        return read_frames(self.data, indices)
