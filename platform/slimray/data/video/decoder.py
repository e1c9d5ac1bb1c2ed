"""Decoding that cannot take a run down: one child process per decoder, killed when a file takes too long.

ffmpeg can hang in C code that no signal but SIGKILL ends, and can crash the process on odd files. So a `Decoder`
sends a file's bytes to a child (`python -m slimray.data.video.decoder`) over a socket and gets a small uint8 clip back;
a timeout or a death costs that one file (`BadSample`), which this decoder then refuses at once. PyAV reads videos and
finds frames by their timestamps: what comes back is the frame that was asked for, or nothing. decord is there for those
who ask for it (`data.reader: decord`; PyAV then reads what it cannot): decord 0.6 was slower and without a word gave
other frames of intact files (open GOPs, MPEG-TS, AVI with B-frames) and wrong pixels of damaged ones. Damage that
ffmpeg does not notice (rare in H.264, common in HEVC and VP9) stays unnoticed. PIL reads pictures, upright as their
EXIF says; a picture that breaks off is noticed, and wrong bits in a PNG, but hardly ever wrong bits within a JPEG.
"""

import ctypes
import io
import itertools
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import zipfile
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av import logging as av_logging
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from PIL import Image, UnidentifiedImageError

from slimray.data.images.pictures import ImageRecipe, make_image
from slimray.data.video.clips import ClipRecipe, frame_indices, generators, make_clip

MAX_PIXELS = 64_000_000  # a declared frame larger than this is refused before anything is allocated
MAX_FRAMES = 1_000_000
MAX_BYTES = 2_000_000_000  # of a file, and of the decoded frames of one request
MAX_HEADER_BYTES = 1_000_000
MAX_MEMORY = 8 << 30  # address space of a child; what needs more is refused
START_TIMEOUT_S = 120.0  # for a child to import its libraries on a busy machine; no file pays for that
PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")  # of those of PIL that run no program
PNG = b"\x89PNG\r\n\x1a\n"
EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DROPPABLE = ("h264", "mpeg4", "mpeg2video", "mpeg1video", "vp9")  # their non-reference frames serve no other frame


class BadSample(Exception):
    """A file that does not decode, with the reason in one sentence; it goes to the quarantine."""


@dataclass(frozen=True)
class Probe:
    """What a file really holds: frames that decode, frames per second (0 unknown), size in pixels, codec."""

    frames: int
    fps: float
    width: int
    height: int
    codec: str


@dataclass(frozen=True)
class Pack:
    """How a clip is stored for training: "h264" (gop, crf) or "jpeg" (quality); `short_side` None keeps the size."""

    format: str = "h264"
    short_side: int | None = 256
    gop: int = 12
    crf: int = 23
    quality: int = 90


# ------------------------------------------------------------------------------------------ the parent's side


class Decoder:
    """A decoding child and the patience with it; a context manager. Not for use from several threads at once."""

    def __init__(self, timeout_s: float = 30.0):
        self.timeout_s = timeout_s
        self.refused: dict[str, str] = {}  # files that once hung or crashed the child
        self._child: subprocess.Popen | None = None
        self._link: socket.socket | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")  # starts the child and talks to it

    def clip(self, path: str, data: bytes, recipe: ClipRecipe, key: tuple[int, int, int]) -> tuple[np.ndarray, bool]:
        """Decode the frames that `recipe` asks for: uint8 `[V, T, size, size, 3]`, and whether it was mirrored.

        `key` is (seed, epoch, sample). Raises BadSample.
        """
        header, body = self._ask(path, {"do": "clip", "recipe": recipe.to_dict(), "key": list(key)}, data)
        return np.frombuffer(body, np.uint8).reshape(header["shape"]), header["flipped"]

    def image(self, path: str, data: bytes, recipe: ImageRecipe, key: tuple[int, int, int]) -> tuple[np.ndarray, bool]:
        """Decode a picture as `recipe` says: uint8 `[V, size, size, 3]`, and whether it was mirrored.

        `key` is (seed, epoch, sample). Raises BadSample.
        """
        header, body = self._ask(path, {"do": "image", "recipe": recipe.to_dict(), "key": list(key)}, data)
        return np.frombuffer(body, np.uint8).reshape(header["shape"]), header["flipped"]

    def shrink(
        self, path: str, data: bytes, short_side: int | None, quality: int = 90
    ) -> tuple[bytes, Probe, float | None]:
        """A picture's file as it is, or, if its short side is longer than `short_side`, as a smaller JPEG.

        Also what it now holds and, of a smaller one, the PSNR as `repack` has it. Raises BadSample.
        """
        header, body = self._ask(path, {"do": "shrink", "short_side": short_side, "quality": quality}, data)
        return bytes(body) or data, Probe(**header["probe"]), header["psnr"]

    def probe(self, path: str, data: bytes) -> Probe:
        """Decode the whole file and say what it holds. Raises BadSample if not every frame decodes."""
        return Probe(**self._ask(path, {"do": "probe"}, data)[0]["probe"])

    def repack(self, path: str, data: bytes, pack: Pack) -> tuple[bytes, Probe, float | None]:
        """The file re-encoded with every frame kept, what it now holds, and the PSNR in dB against what went in.

        The PSNR is None for frames that are stored without loss. Raises BadSample.
        """
        header, body = self._ask(path, {"do": "repack", "pack": asdict(pack)}, data)
        return bytes(body), Probe(**header["probe"]), header["psnr"]

    @property
    def pid(self) -> int | None:
        """The child's process id while it lives."""
        return None if self._child is None else self._child.pid

    def close(self) -> None:
        """End the child."""
        self._end()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, path: str, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytearray]:
        if path in self.refused:
            raise BadSample(self.refused[path])
        if not 0 < len(data) <= MAX_BYTES:
            raise BadSample("the file is empty" if not data else f"the file is larger than {MAX_BYTES:,} bytes")
        self._be_ready()
        try:
            header, body = self._talk(self.timeout_s, _exchange, {"path": path, **request}, data)
        except _Gone as gone:
            self.refused[path] = f"decoding {gone}"
            raise BadSample(self.refused[path]) from None
        if "error" in header:
            raise BadSample(header["error"])
        return header, body

    def _be_ready(self) -> None:
        """See to a child that waits for a request, one that died idle is replaced. RuntimeError if none starts."""
        if self._link is not None:
            try:
                self._link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:  # neither an end nor an answer that nobody asked for
                return
            self._end()
        self._child, self._link = self._thread.submit(_start_child).result()
        try:
            self._talk(START_TIMEOUT_S, _receive)
        except _Gone as gone:
            raise RuntimeError(f"the start of a decoding process {gone}") from None

    def _talk(self, timeout_s: float, talk: Callable[..., Any], *args: Any) -> Any:
        """The result of `talk(link, *args)`; what cuts it short, Ctrl-C too, ends the child: it would answer late."""
        try:
            return self._thread.submit(talk, self._link, *args).result(timeout_s)
        except FutureTimeout:
            self._end()
            raise _Gone(f"took over {timeout_s:g} s") from None
        except (EOFError, OSError, ValueError):
            raise _Gone(self._end(grace_s=5)) from None
        except BaseException:
            self._end()
            raise

    def _end(self, grace_s: float = 0) -> str:
        """End the child, after `grace_s` in which it may do so itself; how it ended, in words."""
        if self._child is None or self._link is None:
            return ""
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(grace_s)
        self._child.kill()
        code = self._child.wait()
        self._link.close()
        self._child = self._link = None
        return f"ended with {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


class _Gone(Exception):
    """The child was ended or has ended; the words go behind what it was doing."""


def _start_child() -> tuple[subprocess.Popen, socket.socket]:
    ours, theirs = socket.socketpair()
    package = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", "slimray.data.video.decoder", str(theirs.fileno()), str(os.getpid())]
    null = subprocess.DEVNULL
    with theirs:  # a socket of its own: whatever a library prints never reaches it
        child = subprocess.Popen(
            command, stdin=null, stdout=null, stderr=null, pass_fds=[theirs.fileno()], cwd="/",
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    return child, ours


def _exchange(link: socket.socket, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytearray]:
    _send(link, request, data)
    return _receive(link)


def _send(link: socket.socket, header: dict[str, Any], body: bytes | memoryview = b"") -> None:
    text = json.dumps(header).encode()
    link.sendall(struct.pack("<IQ", len(text), len(body)) + text)
    link.sendall(body)


def _receive(link: socket.socket) -> tuple[dict[str, Any], bytearray]:
    """A header and a body; EOFError at the end, or when what comes is no message."""
    header_size, body_size = struct.unpack("<IQ", _take(link, 12))
    if header_size > MAX_HEADER_BYTES or body_size > MAX_BYTES:
        raise EOFError
    return json.loads(_take(link, header_size)), _take(link, body_size)


def _take(link: socket.socket, size: int) -> bytearray:
    """Exactly `size` bytes."""
    data = bytearray(size)
    left = memoryview(data)
    while left:
        count = link.recv_into(left)
        if count == 0:
            raise EOFError
        left = left[count:]
    return data


# ------------------------------------------------------------------------------------------- the child's side


def main() -> None:
    """Answer requests on the inherited socket until it closes or the parent is gone."""
    link = socket.socket(fileno=int(sys.argv[1]))
    _be_bound(int(sys.argv[2]))
    _send(link, {"ready": True})
    with suppress(EOFError, OSError):
        while True:
            request, data = _receive(link)
            try:
                header, body = _answer(request, bytes(data))
            except BadSample as error:
                header, body = {"error": str(error)}, b""
            except MemoryError:
                header, body = {"error": f"needs more than {MAX_MEMORY >> 30} GiB to decode"}, b""
            except Exception as error:  # noqa: BLE001  (any complaint of a decoder is the reason of a quarantine)
                words = " ".join(str(error).split())[-200:]
                header, body = {"error": f"does not decode ({type(error).__name__}: {words})"}, b""
            _send(link, header, body)


def _be_bound(parent: int) -> None:
    """Live no longer than the parent, even hanging in C; leave Ctrl-C and SIGTERM to it; keep to MAX_MEMORY."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; the parent is a thread, which the decoder keeps
    if os.getppid() != parent:
        sys.exit()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with suppress(ValueError, OSError):  # a lower bound that is set already
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    av_logging.set_level(av_logging.PANIC)


def _answer(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes | memoryview]:
    if request["do"] == "clip":
        recipe = ClipRecipe.from_dict(request["recipe"])
        frames_rng, crop_rng = generators(request["key"])
        with open_video(data, recipe.reader) as video:
            wanted = frame_indices(recipe, video.num_frames, frames_rng)
            unique, place = np.unique(wanted, return_inverse=True)
            pictures = video.frames(unique.tolist())
        if len({picture.shape for picture in pictures}) > 1:
            raise BadSample("its frames differ in size")
        clip, flipped = make_clip([pictures[i] for i in place], recipe, crop_rng)
        return {"shape": clip.shape, "flipped": bool(flipped)}, clip.data.cast("B")
    if request["do"] == "image":
        picture = _picture(data)
        try:
            views, flipped = make_image(
                picture, ImageRecipe.from_dict(request["recipe"]), generators(request["key"])[1]
            )
        except ValueError as error:
            raise BadSample(str(error)) from None
        return {"shape": views.shape, "flipped": bool(flipped)}, np.ascontiguousarray(views).data.cast("B")
    if request["do"] == "shrink":
        return _shrink(_picture(data), request["short_side"], request["quality"])
    with open_video(data) as video:
        if request["do"] == "probe":
            return {"probe": asdict(Probe(video.num_frames, video.fps, *video.check(), video.codec))}, b""
        return _repack(video, Pack(**request["pack"]))


# ------------------------------------------------------------------------------------------------- what is read


class _Video(ABC):
    """A video open for reading; frame n is shown at `ticks[n] * tick` seconds, `fps` is 0 if unknown."""

    num_frames: int
    fps: float
    codec: str
    ticks: Sequence[int]
    tick: Fraction

    @abstractmethod
    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        """The uint8 `[H, W, 3]` pictures of ascending `indices`, each once. BadSample when one does not decode."""

    def walk(self) -> Iterator[np.ndarray]:
        """All pictures in order. BadSample at the first that does not decode."""
        return (self.frames([i])[0] for i in range(self.num_frames))

    def check(self) -> tuple[int, int]:
        """Decode everything; the width and height of a picture. BadSample as in `walk`."""
        sizes = [picture.shape[1::-1] for picture in self.walk()]
        return sizes[-1]


@contextmanager
def open_video(data: bytes, reader: str = "pyav") -> Iterator[_Video]:
    """Open a video, a picture, or a ZIP of numbered pictures. Errors of ffmpeg become BadSample, also in the block.

    `reader` "decord" reads a video with decord, as far as decord opens it.
    """
    told, _ = av_logging.get_last_error()
    try:
        if data[:4] == b"PK\x03\x04":
            yield _Pictures(data)
        elif data[:3] == b"\xff\xd8\xff" or data[:8] == PNG:
            yield _Still(data)
        else:
            yield (_decord(data) if reader == "decord" else None) or _Movie(data)
    except FFmpegError as error:
        count, log = av_logging.get_last_error()
        words = f": {log[2].strip()}" if log and count > told else ""
        raise BadSample(f"does not decode ({error.strerror}{words})") from None


class _Movie(_Video):
    """A video file. Its packets are read once, then decoded from the key frame before each frame that is wanted."""

    def __init__(self, data: bytes):
        limits = {"max_pixels": str(MAX_PIXELS)}
        options = {**limits, "protocol_whitelist": "none"}  # a playlist opens no other file
        with av.open(io.BytesIO(data), options=options, metadata_errors="replace") as container:
            stream: Any = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise BadSample("holds no video that can be decoded")
            self.context, self.codec = stream.codec_context, stream.codec_context.codec.canonical_name
            self.width, self.height = self.context.width, self.context.height
            if not self.width * self.height:
                raise BadSample("declares no size, or one that is larger than what is decoded")
            _check_size(self.width, self.height, 1)
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
        first = self.keys[0][0] if self.keys else -float("inf")  # what is shown before needs what was cut off
        self.place = {pts: n for pts, n in shown if pts >= first}
        if not self.place:
            raise BadSample("holds no frames")
        self.ticks = sorted(self.place)
        self.num_frames = len(self.ticks)
        self.reformatter = VideoReformatter()

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        wanted = [self.ticks[i] for i in indices]
        _check_size(self.width, self.height, len(wanted))
        found: dict[int, np.ndarray] = {}
        for start, group in itertools.groupby(wanted, self._start_of):
            self._pick(start, set(group), found, drop=self.codec in DROPPABLE)
        if len(found) < len(wanted):  # damage, or a frame that needs more than its key frame: the whole way decides
            self._pick(0, set(wanted), found, drop=False)
        for index, pts in zip(indices, wanted, strict=True):
            if pts not in found:
                raise self._missing(index)
        return [found[pts] for pts in wanted]

    def walk(self) -> Iterator[np.ndarray]:
        return map(self._picture, self._shown())

    def check(self) -> tuple[int, int]:
        turned = False
        for frame in self._shown():
            turned = bool(_quarter_turns(frame) % 2)
        return (self.height, self.width) if turned else (self.width, self.height)

    def _start_of(self, pts: int) -> int:
        """The packet of the last key frame that is not shown after `pts`."""
        return self.keys[max(0, bisect_right(self.keys, (pts, len(self.packets))) - 1)][1] if self.keys else 0

    def _pick(self, start: int, wanted: set[int], found: dict[int, np.ndarray], drop: bool) -> None:
        """Add the `wanted` frames to `found`, decoding from packet `start`; none that decodes after a damaged one."""
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
        """All frames in order; BadSample at the first that is missing or damaged."""
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
        """The frames of packets `start` to `end`; with `wanted`, others that serve no other frame are left out."""
        self.context.flush_buffers()
        for packet in itertools.chain(self.packets[start:end], [None]):
            drop = packet is not None and wanted is not None and packet.pts not in wanted
            self.context.skip_frame = "NONREF" if drop else "DEFAULT"
            yield from self.context.decode(packet)

    def _number_packets(self) -> None:
        """Give the packets of a file without usable timestamps the rank at which their frames come out."""
        for number, packet in enumerate(self.packets):
            packet.pts = number
        came = [frame.pts for frame in self._decode(0, len(self.packets))]
        ranks = {number: rank for rank, number in enumerate(came)}
        if len(ranks) < len(came) or not came:
            raise BadSample("holds frames that cannot be told apart" if came else "holds no frames")
        for number, packet in enumerate(self.packets):
            packet.pts = ranks.get(number)
        self.tick = 1 / Fraction(self.fps or 25).limit_denominator(100_000)

    def _is_hidden(self, packet: av.Packet) -> bool:
        """Whether the frame of a packet only serves others: cut off by an edit list, or marked so in VP8."""
        return packet.is_discard or (self.codec == "vp8" and not bytes(packet)[0] & 16)

    def _picture(self, frame: av.VideoFrame) -> np.ndarray:
        """The pixels, turned as the file asks, and scaled if the frames of the file change their size."""
        image = self.reformatter.reformat(frame, self.width, self.height, "rgb24", threads=1).to_ndarray()
        turns = _quarter_turns(frame)
        return np.ascontiguousarray(np.rot90(image, turns)) if turns else image

    def _missing(self, index: int) -> BadSample:
        return BadSample(f"frame {index} of {self.num_frames} is missing or damaged")


def _read_packets(container: Any, stream: Any) -> list[av.Packet]:
    """The packets of a stream in decoding order, from the first key frame on."""
    packets = [packet for packet in itertools.islice(container.demux(stream), MAX_FRAMES + 1) if packet.size]
    declared = len(stream.index_entries) if container.format.name.startswith("mov") else len(packets)
    whole = sum(not packet.is_corrupt for packet in packets)
    if whole < max(declared, len(packets), 1):
        raise BadSample(f"breaks off: {whole} of {declared} frames are there" if declared else "holds no frames")
    if len(packets) > MAX_FRAMES:
        raise BadSample(f"holds more than {MAX_FRAMES:,} frames")
    return packets[next((n for n, packet in enumerate(packets) if packet.is_keyframe), 0) :]


def _quarter_turns(frame: av.VideoFrame) -> int:
    """How often the frame is to be turned left by 90 degrees to stand upright."""
    return frame.rotation // 90 % 4 if frame.rotation % 90 == 0 else 0


class _Decord(_Video):
    """A video file as decord sees it; fps and codec are not asked for."""

    fps, codec = 0.0, ""

    def __init__(self, reader: Any):
        self.reader, self.num_frames = reader, len(reader)

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        try:
            return list(self.reader.get_batch(list(indices)).asnumpy())
        except Exception as error:  # noqa: BLE001  (DECORDError is no common class)
            raise BadSample(f"decord does not decode it ({str(error).splitlines()[0][-120:]})") from None


def _decord(data: bytes) -> _Decord | None:
    """The video opened by decord, None where decord cannot (AV1, GIF, no decord on this platform)."""
    try:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        height, width = reader[0].shape[:2]
    except Exception:  # noqa: BLE001  (whatever it is: PyAV reads the file, and has the last word)
        return None
    _check_size(width, height, 1)
    return _Decord(reader) if len(reader) else None


class _Pictures(_Video):
    """A ZIP of pictures named by number; frames that were left out are missing, not shifted."""

    codec = "jpeg"

    def __init__(self, data: bytes):
        self.zip = zipfile.ZipFile(io.BytesIO(data))
        files = self.zip.infolist()
        try:
            notes = json.loads(self.zip.comment or b"{}")
            self.names = {int(Path(file.filename).stem): file.filename for file in files}
            self.num_frames, self.fps = int(notes.get("frames", len(files))), float(notes.get("fps", 0))
        except ValueError:
            raise BadSample("is a ZIP of something else than numbered pictures") from None
        if not 0 < self.num_frames <= MAX_FRAMES or sum(file.file_size for file in files) > MAX_BYTES:
            raise BadSample(f"declares {self.num_frames} pictures, more or larger ones than are decoded")
        self.ticks, self.tick = range(self.num_frames), 1 / Fraction(self.fps or 25).limit_denominator(100_000)

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        for index in indices:
            if index not in self.names:
                raise BadSample(f"frame {index} of {self.num_frames} is missing")
        return [_picture(self.zip.read(self.names[index])) for index in indices]


class _Still(_Video):
    """A picture as a video of one frame."""

    num_frames, fps, codec, ticks, tick = 1, 0.0, "image", (0,), Fraction(1, 25)

    def __init__(self, data: bytes):
        self.data = data

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        return [_picture(self.data) for _ in indices]


def _picture(data: bytes) -> np.ndarray:
    """The pixels of a picture file, uint8 `[H, W, 3]`, upright; of a moving picture the first. Read by its content."""
    try:
        if data[:8] == PNG:
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                image.verify()  # the checksums, which decoding passes over
        with Image.open(io.BytesIO(data), formats=PICTURES) as image:
            _check_size(image.width, image.height, 1)
            turn = TURNS.get(_orientation(image))
            image = _of_eight_bits(image).convert("RGB")
            return np.asarray(image if turn is None else image.transpose(turn))
    except UnidentifiedImageError:
        raise BadSample("is no picture that can be read") from None
    except (OSError, SyntaxError) as error:  # PIL calls a damaged PNG a wrong syntax
        raise BadSample(f"does not decode ({error})") from None


def _orientation(image: Image.Image) -> int:
    """How the camera was held, as EXIF numbers it; 1 (upright) where that is not said, or its note is damaged."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  (a damaged note is no damage to the picture)
        return 1


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """16 bits a value become their upper 8, which PIL would cut off at 255."""
    if image.mode == "F":
        raise BadSample("holds real numbers, not brightness in 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() >= 1 << 16:
        raise BadSample("holds numbers of more than 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _check_size(width: int, height: int, count: int) -> None:
    if width * height > MAX_PIXELS or width * height * 3 * count > MAX_BYTES:
        raise BadSample(f"{count} frames of {width} x {height} pixels are larger than what is decoded")


def zip_frames(frames: dict[int, bytes], num_frames: int, fps: float = 0.0) -> bytes:
    """Encoded pictures by frame number as a stored ZIP; `num_frames` is the length of the video they are from."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for number, data in frames.items():
            archive.writestr(zipfile.ZipInfo(f"{number:06d}.jpg"), data)
        archive.comment = json.dumps({"frames": num_frames, "fps": fps}).encode()
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------- probe and repack


class _Loss:
    """What encoding cost so far, over all pixels; it holds no pictures, videos may be long."""

    def __init__(self) -> None:
        self.squares, self.values, self.frames = 0.0, 0, 0

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        difference = (before.astype(np.float32) - after).ravel()
        self.squares, self.values = self.squares + float(difference @ difference), self.values + before.size
        self.frames, (self.height, self.width) = self.frames + 1, before.shape[:2]

    @property
    def psnr(self) -> float | None:
        """In dB; None if nothing was lost."""
        return None if self.squares == 0 else 10 * float(np.log10(255**2 * self.values / self.squares))


def _repack(video: _Video, pack: Pack) -> tuple[dict[str, Any], bytes]:
    """Re-encode every frame; PSNR is over all pixels, against the resized frames that went into the encoder."""
    loss = _Loss()
    encoded = (_encode_jpeg if pack.format == "jpeg" else _encode_h264)(video, pack, loss)
    with open_video(encoded) as again:
        if not video.num_frames == loss.frames == again.num_frames:
            raise BadSample(f"re-encoding kept {again.num_frames} of {video.num_frames} frames")
    found = Probe(loss.frames, video.fps, loss.width, loss.height, pack.format)
    return {"probe": asdict(found), "psnr": loss.psnr}, encoded


def _small(frame: np.ndarray, short_side: int | None, step: int) -> np.ndarray:
    """The frame with its short side at most `short_side`, both sides multiples of `step`: cut, if it keeps its size."""
    height, width = frame.shape[:2]
    scale = 1.0 if short_side is None else min(1.0, short_side / min(height, width))
    if scale == 1 and min(height, width) >= step:
        return frame[: height // step * step, : width // step * step]
    w, h = (max(step, round(side * scale / step) * step) for side in (width, height))
    return np.asarray(Image.fromarray(frame).resize((w, h), Image.Resampling.BILINEAR))


def _shrink(picture: np.ndarray, short_side: int | None, quality: int) -> tuple[dict[str, Any], bytes]:
    """The answer of `Decoder.shrink`; no bytes if the file stays as it is."""
    small, encoded, loss = _small(picture, short_side, step=1), b"", _Loss()
    if small.shape != picture.shape:
        buffer = io.BytesIO()
        Image.fromarray(small).save(buffer, "JPEG", quality=quality)
        encoded = buffer.getvalue()
        loss.add(small, _picture(encoded))
    found = Probe(1, 0.0, small.shape[1], small.shape[0], "image")
    return {"probe": asdict(found), "psnr": loss.psnr if encoded else None}, encoded


def _encode_h264(video: _Video, pack: Pack, loss: _Loss) -> bytes:
    """An mp4 file with the timestamps of `video`. No lookahead: x264's makes the bytes differ from run to run."""
    buffer, waiting = io.BytesIO(), deque[np.ndarray]()
    back: Any = av.CodecContext.create("h264", "r")
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": str(pack.crf), "g": str(pack.gop), "bf": "0", "rc-lookahead": "0", "threads": "1"}
        rate = Fraction(video.fps or 25).limit_denominator(100_000)
        stream: Any = container.add_stream("libx264", rate=rate, options={**options, "preset": "veryfast"})
        stream.pix_fmt, stream.thread_count, stream.codec_context.time_base = "yuv420p", 1, video.tick

        def put(frame: av.VideoFrame | None) -> None:
            for packet in stream.encode(frame):
                back.extradata = back.extradata or stream.codec_context.extradata
                compare(back.decode(packet))
                container.mux(packet)

        def compare(frames: list[av.VideoFrame]) -> None:
            for frame in frames:
                loss.add(waiting.popleft(), frame.to_ndarray(format="rgb24"))

        for pts, picture in zip(video.ticks, video.walk(), strict=True):
            waiting.append(np.ascontiguousarray(_small(picture, pack.short_side, step=2)))
            if not stream.codec_context.is_open:
                stream.height, stream.width = waiting[-1].shape[:2]
            frame = av.VideoFrame.from_ndarray(waiting[-1], format="rgb24")
            frame.pts, frame.time_base = pts - video.ticks[0], video.tick
            put(frame)
        put(None)
        compare(back.decode(None))
    return buffer.getvalue()


def _encode_jpeg(video: _Video, pack: Pack, loss: _Loss) -> bytes:
    """A ZIP of JPEG pictures."""
    encoded = {}
    for number, picture in enumerate(video.walk()):
        small, buffer = _small(picture, pack.short_side, step=1), io.BytesIO()
        Image.fromarray(small).save(buffer, "JPEG", quality=pack.quality)
        encoded[number] = buffer.getvalue()
        loss.add(small, _picture(encoded[number]))
    return zip_frames(encoded, len(encoded), video.fps)


if __name__ == "__main__":
    main()
