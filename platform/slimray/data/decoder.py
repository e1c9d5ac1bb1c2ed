"""Decoding that cannot take a run down: one child process per decoder, killed when a file takes too long.

decord and ffmpeg can hang in C code that no signal but SIGKILL ends, and can crash the process on odd files. So a
`Decoder` sends a file's bytes to a child (`python -m slimray.data.decoder`) over pipes and gets a small uint8 clip back;
a timeout or a death costs that one file (`BadSample`), which this decoder then refuses at once. In the child decord
reads first, PyAV what decord cannot (AV1, GIF, no decord on this platform), PIL packed JPEG frames. A frame that does
not decode is never replaced by another one.
"""

import contextlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slimray.data.video import ClipRecipe, frame_indices, generators, make_clip

MAX_PIXELS = 64_000_000  # a declared frame larger than this is refused before anything is allocated
MAX_FRAMES = 1_000_000
MAX_CLIP_BYTES = 2_000_000_000  # decoded frames of one request
CHUNK = 16  # frames decoded at once when all are wanted


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
        self._exchanges = ThreadPoolExecutor(1, thread_name_prefix="decoder")

    def clip(self, path: str, data: bytes, recipe: ClipRecipe, key: tuple[int, int, int]) -> tuple[np.ndarray, bool]:
        """Decode the frames that `recipe` asks for: uint8 `[V, T, size, size, 3]`, and whether it was mirrored.

        `key` is (seed, epoch, sample). Raises BadSample.
        """
        header, body = self._ask(path, {"do": "clip", "recipe": recipe.to_dict(), "key": list(key)}, data)
        return np.frombuffer(body, np.uint8).reshape(header["shape"]), header["flipped"]

    def probe(self, path: str, data: bytes) -> Probe:
        """Decode the whole file and say what it holds. Raises BadSample if not every frame decodes."""
        return Probe(**self._ask(path, {"do": "probe"}, data)[0]["probe"])

    def repack(self, path: str, data: bytes, pack: Pack) -> tuple[bytes, Probe, float | None]:
        """The file re-encoded with every frame kept, what it now holds, and the PSNR in dB against what went in.

        The PSNR is None for frames that are stored without loss. Raises BadSample.
        """
        header, body = self._ask(path, {"do": "repack", "pack": asdict(pack)}, data)
        return body, Probe(**header["probe"]), header["psnr"]

    @property
    def pid(self) -> int | None:
        """The child's process id while it lives."""
        return None if self._child is None else self._child.pid

    def close(self) -> None:
        """End the child."""
        self._kill()
        self._exchanges.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, path: str, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        if path in self.refused:
            raise BadSample(self.refused[path])
        if not data:
            raise BadSample("the file is empty")
        if self._child is None:
            self._child = _start_child()
        exchange = self._exchanges.submit(_exchange, self._child, {"path": path, **request}, data)
        try:
            header, body = exchange.result(self.timeout_s)
        except FutureTimeout:
            self._kill()
            self.refused[path] = f"decoding took over {self.timeout_s:g} s"
            raise BadSample(self.refused[path]) from None
        except (EOFError, OSError):
            self.refused[path] = f"the decoder {self._death()}"
            raise BadSample(self.refused[path]) from None
        if "error" in header:
            raise BadSample(header["error"])
        return header, body

    def _death(self) -> str:
        """How the child ended, in words."""
        assert self._child is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(5)
        code = self._child.returncode
        self._kill()
        return f"died with {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self._child = None


def _start_child() -> subprocess.Popen:
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DECORD_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "slimray.data.decoder", str(os.getpid())]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, cwd="/"
    )


def _exchange(child: subprocess.Popen, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    assert child.stdin is not None
    assert child.stdout is not None
    _write(child.stdin, request, data)
    return _read(child.stdout)


def _write(pipe: Any, header: dict[str, Any], body: bytes | memoryview) -> None:
    text = json.dumps(header).encode()
    pipe.write(struct.pack("<IQ", len(text), len(body)) + text)
    pipe.write(body)
    pipe.flush()


def _read(pipe: Any) -> tuple[dict[str, Any], bytes]:
    head = pipe.read(12)
    if len(head) < 12:
        raise EOFError
    header_size, body_size = struct.unpack("<IQ", head)
    header, body = pipe.read(header_size), pipe.read(body_size)
    if len(header) < header_size or len(body) < body_size:
        raise EOFError
    return json.loads(header), body


# ------------------------------------------------------------------------------------------- the child's side


def main() -> None:
    """Answer requests from standard input until it closes or the parent is gone."""
    threading.Thread(target=_leave_with_parent, args=(int(sys.argv[1]),), daemon=True).start()
    pipe_in, pipe_out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not reach the protocol
    while True:
        try:
            request, data = _read(pipe_in)
        except EOFError:
            return
        try:
            header, body = _answer(request, data)
        except BadSample as error:
            header, body = {"error": str(error)}, b""
        except Exception as error:  # noqa: BLE001  (any complaint of a decoder is the reason a file is quarantined)
            words = " ".join(str(error).split())[-200:]
            header, body = {"error": f"does not decode ({type(error).__name__}: {words})"}, b""
        _write(pipe_out, header, body)


def _leave_with_parent(parent: int) -> None:
    """End this process when its parent is gone, even while a decoder hangs (the C code runs without the GIL)."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _answer(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes | memoryview]:
    if request["do"] == "clip":
        recipe = ClipRecipe.from_dict(request["recipe"])
        frames_rng, crop_rng = generators(request["key"])
        with open_video(data) as video:
            wanted = frame_indices(recipe, video.num_frames, frames_rng)
            unique, place = np.unique(wanted, return_inverse=True)
            pictures = video.frames(unique.tolist())
            clip, flipped = make_clip([pictures[i] for i in place], recipe, crop_rng)
        return {"shape": clip.shape, "flipped": bool(flipped)}, memoryview(np.ascontiguousarray(clip)).cast("B")
    with open_video(data) as video:
        if request["do"] == "probe":
            return {"probe": asdict(_probe(video))}, b""
        return _repack(video, Pack(**request["pack"]))


class _Video:
    """A video open for reading: `num_frames` as declared, `frames(indices)` in ascending order, `fps`, `codec`."""

    num_frames: int
    fps: float
    codec: str

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        """The uint8 `[H, W, 3]` pictures of ascending `indices`; raises when one does not decode."""
        raise NotImplementedError

    def walk(self) -> Iterator[np.ndarray]:
        """All frames in order."""
        for start in range(0, self.num_frames, CHUNK):
            yield from self.frames(range(start, min(start + CHUNK, self.num_frames)))


@contextlib.contextmanager
def open_video(data: bytes) -> Iterator[_Video]:
    """Open a video file, an image, or a stored ZIP of JPEG frames, by the first reader that can read it to its end."""
    if data[:4] == b"PK\x03\x04":
        yield _Jpegs(data)
        return
    if data[:3] == b"\xff\xd8\xff" or data[:8] == b"\x89PNG\r\n\x1a\n":
        yield _Still(data)
        return
    try:
        video: _Video = _Decord(data)
        video.frames([0])
    except Exception:  # noqa: BLE001  (decord's errors have no common class; PyAV gives the verdict)
        video = _PyAv(data)
    yield _Fallback(video, data)


class _Fallback(_Video):
    """decord's answer, or PyAV's where decord fails on a frame; PyAV refuses what is damaged."""

    def __init__(self, video: _Video, data: bytes):
        self.video, self.data = video, data
        self.num_frames, self.fps, self.codec = video.num_frames, video.fps, video.codec

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        try:
            return self.video.frames(indices)
        except Exception:
            if isinstance(self.video, _PyAv):
                raise
            self.video = _PyAv(self.data)
            if self.video.num_frames < self.num_frames:
                raise BadSample(f"{self.video.num_frames} of {self.num_frames} declared frames decode") from None
            return self.video.frames(indices)


class _Decord(_Video):
    def __init__(self, data: bytes):
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self.reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        self.num_frames, self.fps, self.codec = len(self.reader), float(self.reader.get_avg_fps()), ""
        if not 0 < self.num_frames <= MAX_FRAMES:
            raise BadSample(f"declares {self.num_frames} frames")

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        indices = list(indices)
        first = self.reader[indices[0]].asnumpy()
        _check_size(first.shape[1], first.shape[0], len(indices))
        if len(indices) == 1:
            return [first]
        return [first, *self.reader.get_batch(indices[1:]).asnumpy()]


class _PyAv(_Video):
    """Reads from start to end, twice: once to count, once to pick. For what decord cannot read."""

    def __init__(self, data: bytes):
        self.data = data
        with self._open() as (_, stream):
            self.fps, self.codec = float(stream.average_rate or 0), stream.codec_context.name
        self.num_frames = sum(1 for _ in self._pictures(convert=False))
        if self.num_frames == 0:
            raise BadSample("no frame decodes")

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        import av

        av.logging.set_level(av.logging.PANIC)
        with av.open(io.BytesIO(self.data)) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise BadSample("holds no video stream")
            stream.thread_count = 1
            _check_size(stream.codec_context.width, stream.codec_context.height, 1)
            yield container, stream

    def _pictures(self, convert: bool = True) -> Iterator[np.ndarray | None]:
        with self._open() as (container, stream):
            for frame in container.decode(stream):
                yield _upright(frame) if convert else None

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        wanted, found = set(indices), {}
        with self._open() as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    found[number] = _upright(frame)
                    _check_size(frame.width, frame.height, len(found))
                if len(found) == len(wanted):
                    break
        if len(found) < len(wanted):
            raise BadSample(f"frame {min(wanted - set(found))} does not decode")
        return [found[i] for i in indices]

    def walk(self) -> Iterator[np.ndarray]:
        for picture in self._pictures():
            assert picture is not None
            yield picture


def _upright(frame: Any) -> np.ndarray:
    """RGB pixels of a PyAV frame, turned as its metadata asks (decord does the same)."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), getattr(frame, "rotation", 0) // 90))


class _Jpegs(_Video):
    """A stored ZIP of JPEG frames, named by number; frames that were left out are missing, not shifted."""

    def __init__(self, data: bytes):
        self.zip = zipfile.ZipFile(io.BytesIO(data))
        names = self.zip.namelist()
        comment = json.loads(self.zip.comment or b"{}")
        self.num_frames, self.fps, self.codec = comment.get("frames", len(names)), comment.get("fps", 0.0), "jpeg"
        self.names = {int(Path(name).stem): name for name in names}

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        return [_picture(self.zip.read(self._name(i))) for i in indices]

    def _name(self, index: int) -> str:
        if index not in self.names:
            raise BadSample(f"frame {index} is missing")
        return self.names[index]


class _Still(_Video):
    num_frames, fps, codec = 1, 0.0, "image"

    def __init__(self, data: bytes):
        self.data = data

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        return [_picture(self.data) for _ in indices]


def _picture(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        _check_size(image.width, image.height, 1)
        return np.asarray(image.convert("RGB"))


def _check_size(width: int, height: int, count: int) -> None:
    if width * height > MAX_PIXELS or width * height * 3 * count > MAX_CLIP_BYTES:
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


def _probe(video: _Video) -> Probe:
    """Decode everything; the number of frames is what came out."""
    count, shape = 0, (0, 0)
    for frame in video.walk():
        count, shape = count + 1, frame.shape[:2]
    if count < video.num_frames:
        raise BadSample(f"{count} of {video.num_frames} declared frames decode")
    return Probe(count, video.fps, shape[1], shape[0], video.codec)


def _repack(video: _Video, pack: Pack) -> tuple[dict[str, Any], bytes]:
    """Re-encode every frame; PSNR is over all pixels, against the resized frames that went into the encoder."""
    frames = (_small(frame, pack.short_side) for frame in video.walk())
    kept: list[np.ndarray] = []
    encoded = (
        _encode_jpeg(frames, kept, video, pack) if pack.format == "jpeg" else _encode_h264(frames, kept, video, pack)
    )
    if len(kept) < video.num_frames:
        raise BadSample(f"{len(kept)} of {video.num_frames} declared frames decode")
    squared, count = 0.0, 0
    with open_video(encoded) as again:
        if again.num_frames != len(kept):
            raise BadSample(f"re-encoding kept {again.num_frames} of {len(kept)} frames")
        for before, after in zip(kept, again.walk(), strict=True):
            squared += float(np.square(before.astype(np.int32) - after).sum())
            count += before.size
    height, width = kept[0].shape[:2]
    psnr = None if squared == 0 else 10 * np.log10(255**2 * count / squared)
    return {"probe": asdict(Probe(len(kept), video.fps, width, height, pack.format)), "psnr": psnr}, encoded


def _small(frame: np.ndarray, short_side: int | None) -> np.ndarray:
    """The frame with its short side at most `short_side`, both sides even."""
    height, width = frame.shape[:2]
    scale = 1.0 if short_side is None else min(1.0, short_side / min(height, width))
    w, h = (max(2, round(side * scale / 2) * 2) for side in (width, height))
    if (h, w) == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((w, h), Image.Resampling.BILINEAR))


def _encode_h264(frames: Iterator[np.ndarray], kept: list[np.ndarray], video: _Video, pack: Pack) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": str(pack.crf), "preset": "veryfast", "threads": "1", "bf": "0", "g": str(pack.gop)}
        stream = container.add_stream("libx264", rate=max(1, round(video.fps or 25)), options=options)
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for frame in frames:
            if not kept:
                stream.height, stream.width = frame.shape[:2]
            kept.append(frame)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _encode_jpeg(frames: Iterator[np.ndarray], kept: list[np.ndarray], video: _Video, pack: Pack) -> bytes:
    encoded = {}
    for number, frame in enumerate(frames):
        kept.append(frame)
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=pack.quality)
        encoded[number] = buffer.getvalue()
    return zip_frames(encoded, len(encoded), video.fps)


if __name__ == "__main__":
    main()
