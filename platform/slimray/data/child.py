"""Processes untrusted bytes in a child process that can be killed: decoding videos, parsing point clouds.

C code can hang so that only SIGKILL ends it, can crash its process, and can allocate any amount of memory. So the
parent's side, `Child`, sends a file's bytes over a socket to a separate process (`python -m MODULE`, whose `main` calls
`serve(answer)`) and gets a small answer back. A timeout or a crash costs that one file (`BadSample`), which is refused
at once from then on; the child's address space is limited. Standard library only, to keep the start of a child fast.
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
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from slimray.data.samples import MAX_BYTES, BadSample

MAX_HEADER_BYTES = 1_000_000
MAX_MEMORY = 8 << 30  # address space of a child; files that need more are refused
START_TIMEOUT_S = 120.0  # for a child to import its libraries on a busy machine; not counted against a file


# ------------------------------------------------------------------------------------------ the parent's side


class Child:
    """A child process whose answers have a time limit; a context manager. Requests of several threads are serialized.

    `module` is run as the child; `doing` names its work in messages ("decoding took over 30 s").
    """

    module = ""
    doing = "reading"

    def __init__(self, timeout_s: float = 30.0):
        self.timeout_s = timeout_s
        self.refused: dict[str, str] = {}  # files that once hung or crashed the child
        self._child: subprocess.Popen | None = None
        self._link: socket.socket | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="child")  # starts the child and talks to it
        self._turn = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process id of the child, or None if it is not running."""
        return None if self._child is None else self._child.pid

    def close(self) -> None:
        """End the child."""
        self._end()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, path: str, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytearray]:
        """Return the child's answer to `request` about the bytes of the file `path`: header and body.

        Raises BadSample with the child's complaint about the file, or with how the child ended.
        """
        if path in self.refused:
            raise BadSample(self.refused[path])
        if not 0 < len(data) <= MAX_BYTES:
            raise BadSample("the file is empty" if not data else f"the file is larger than {MAX_BYTES:,} bytes")
        with self._turn:
            self._be_ready()
            try:
                header, body = self._talk(self.timeout_s, _exchange, {"path": path, **request}, data)
            except _Gone as gone:
                self.refused[path] = f"{self.doing} {gone}"
                raise BadSample(self.refused[path]) from None
        if "error" in header:
            raise BadSample(header["error"])
        return header, body

    def _be_ready(self) -> None:
        """Make sure a child is waiting for requests, replacing one that died; raise RuntimeError if none starts."""
        if self._link is not None:
            try:
                self._link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:  # the child is alive and idle: the link is open, with no unread data
                return
            self._end()
        self._child, self._link = self._thread.submit(_start_child, self.module).result()
        try:
            self._talk(START_TIMEOUT_S, _receive)
        except _Gone as gone:
            raise RuntimeError(f"starting a {self.doing} process {gone}") from None

    def _talk(self, timeout_s: float, talk: Callable[..., Any], *args: Any) -> Any:
        """Return `talk(link, *args)`; end the child if it is interrupted, also by Ctrl-C, as it would answer late."""
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
        """End the child, after `grace_s` in which it may end by itself, and return how it ended, in words."""
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
    """The child was killed or has ended; the message follows the name of its work ("decoding took over 30 s")."""


def _start_child(module: str) -> tuple[subprocess.Popen, socket.socket]:
    ours, theirs = socket.socketpair()
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(os.getpid())]
    null = subprocess.DEVNULL
    with theirs:  # a separate socket, so that output of libraries cannot corrupt messages
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
    """Return a header and a body; raise EOFError at the end of the stream or for an invalid message."""
    header_size, body_size = struct.unpack("<IQ", _take(link, 12))
    if header_size > MAX_HEADER_BYTES or body_size > MAX_BYTES:
        raise EOFError
    return json.loads(_take(link, header_size)), _take(link, body_size)


def _take(link: socket.socket, size: int) -> bytearray:
    """Receive exactly `size` bytes; raise EOFError if the stream ends before."""
    data = bytearray(size)
    left = memoryview(data)
    while left:
        count = link.recv_into(left)
        if count == 0:
            raise EOFError
        left = left[count:]
    return data


# ------------------------------------------------------------------------------------------- the child's side

Answer = tuple[dict[str, Any], bytes | memoryview]


def serve(answer: Callable[[dict[str, Any], bytes], Answer], doing: str) -> None:
    """Answer requests on the inherited socket until it closes or the parent is gone.

    `answer` takes a request and the bytes of a file; `doing` ("decode") names its work in messages.
    """
    link = socket.socket(fileno=int(sys.argv[1]))
    _be_bound(int(sys.argv[2]))
    _send(link, {"ready": True})
    with suppress(EOFError, OSError):
        while True:
            request, data = _receive(link)
            try:
                header, body = answer(request, bytes(data))
            except BadSample as error:
                header, body = {"error": str(error)}, b""
            except MemoryError:
                header, body = {"error": f"needs more than {MAX_MEMORY >> 30} GiB to {doing}"}, b""
            except Exception as error:  # noqa: BLE001  (any error of a library quarantines the file)
                words = " ".join(str(error).split())[-200:]
                header, body = {"error": f"does not {doing} ({type(error).__name__}: {words})"}, b""
            _send(link, header, body)


def _be_bound(parent: int) -> None:
    """Die with the parent, even when hanging in C; leave Ctrl-C and SIGTERM to it; limit memory to MAX_MEMORY."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: applies to the parent thread, kept by `Child`
    if os.getppid() != parent:
        sys.exit()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with suppress(ValueError, OSError):  # a lower limit is already set
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
