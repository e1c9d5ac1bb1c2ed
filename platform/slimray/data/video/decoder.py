"""Decoding that cannot take a run down: one child process per decoder, killed when a file takes too long.

ffmpeg can hang in C code that no signal but SIGKILL ends, and can crash the process on odd files. So a `Decoder`
sends a file's bytes to a child (`python -m slimray.data.video.decoder`) over a socket and gets a small uint8 clip back;
a timeout or a death costs that one file (`BadSample`), which this decoder then refuses at once. What the child reads
videos with is in movies.py, what it stores them with in repack.py.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from av import logging as av_logging

from slimray.data.images.files import read_picture
from slimray.data.images.pictures import ImageRecipe, make_image
from slimray.data.samples import MAX_BYTES, BadSample
from slimray.data.video.clips import ClipRecipe, frame_indices, generators, make_clip
from slimray.data.video.movies import open_video
from slimray.data.video.repack import Pack, Probe, repack, shrink

MAX_HEADER_BYTES = 1_000_000
MAX_MEMORY = 8 << 30  # address space of a child; what needs more is refused
START_TIMEOUT_S = 120.0  # for a child to import its libraries on a busy machine; no file pays for that


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
        picture = read_picture(data)
        try:
            views, flipped = make_image(
                picture, ImageRecipe.from_dict(request["recipe"]), generators(request["key"])[1]
            )
        except ValueError as error:
            raise BadSample(str(error)) from None
        return {"shape": views.shape, "flipped": bool(flipped)}, np.ascontiguousarray(views).data.cast("B")
    if request["do"] == "shrink":
        return shrink(read_picture(data), request["short_side"], request["quality"])
    with open_video(data) as video:
        if request["do"] == "probe":
            return {"probe": asdict(Probe(video.num_frames, video.fps, *video.check(), video.codec))}, b""
        return repack(video, Pack(**request["pack"]))


if __name__ == "__main__":
    main()
