"""The device agent: times networks that are sent to it, for `slimray profile --device`. Executes nothing else.

    GET  /about              device, versions, limits          GET  /conditions        temperature, throttling, watts
    PUT  /networks/SHA256    check and store an ONNX file      GET  /networks/SHA256   whether it is stored
    POST /time               JSON: chains of networks and numbers of runs; returns the ms of every step

Every request needs a token (`Authorization: Bearer`, compared in constant time). Bodies, networks and seconds are
limited; a process of its own computes, and is killed if it takes too long (worker.py). Needs only the standard library
and the runtime's own dependencies. Listens on 127.0.0.1 unless configured otherwise, because it uses plain HTTP: use
`ssh -L 8060:127.0.0.1:8060 DEVICE`.
"""

import hashlib
import hmac
import json
import os
import platform
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from slimray import __version__
from slimray.data.samples import BadSample
from slimray.runtime import conditions, engines
from slimray.runtime.onnx_file import DTYPES, check_onnx
from slimray.runtime.worker import ENGINE, Worker
from slimray.spec import UserError

TOKEN_VARIABLE = "SLIMRAY_AGENT_TOKEN"  # noqa: S105  (the name of a variable)
PROTOCOL = 1
MAX_JSON_BYTES = 4 << 20
MAX_NETWORKS = 20_000
MAX_RUNS = 10_000  # of steps in one request
MAX_THREADS = 256
WAIT_S = 120.0  # for another measurement to end
SOCKET_S = 60.0
DRAIN_S = 2.0
SHA256 = re.compile(r"/networks/([0-9a-f]{64})")


@dataclass(frozen=True)
class Limits:
    """Limits of an agent: MB of a network and of all networks together, seconds of a measurement."""

    max_mb: int = 512
    total_mb: int = 4096
    max_seconds: float = 120.0


class Refused(Exception):
    """A refused request: HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


@dataclass(eq=False)
class Agent:
    """State of an agent: the stored networks, the process that computes, and a lock for one measurement at a time."""

    token: str
    limits: Limits
    folder: Path
    worker: Worker
    turn: threading.Lock = field(default_factory=threading.Lock)
    storing: threading.Lock = field(default_factory=threading.Lock)
    loaded: tuple[int | None, set[tuple[str, int]]] = (None, set())  # process id, (network, threads) loaded there

    def about(self) -> dict[str, Any]:
        """Return the device, versions and limits."""
        own = {"slimray": __version__, "python": platform.python_version(), ENGINE: engines.version(ENGINE)}
        return conditions.device() | {"protocol": PROTOCOL, "versions": own, "limits": vars(self.limits)}

    def path(self, name: str) -> Path:
        """Return the path of a network."""
        return self.folder / f"{name}.onnx"

    def keep(self, name: str, data: bytes) -> None:
        """Store a network; Refused if its SHA-256 is not `name`, if it must not be opened or does not fit."""
        if hashlib.sha256(data).hexdigest() != name:
            raise Refused(400, "the network is not the announced one (its SHA-256 differs): send it again")
        try:
            check_onnx(data, "the network")
        except UserError as error:
            raise Refused(422, str(error)) from None
        with self.storing:
            there = [path.stat().st_size for path in self.folder.iterdir()]
            if len(there) >= MAX_NETWORKS or sum(there) + len(data) > self.limits.total_mb << 20:
                raise Refused(507, f"the agent is full with {len(there)} networks: restart it")
            part = self.folder / f".{secrets.token_hex(4)}"
            part.write_bytes(data)
            part.replace(self.path(name))

    def time(self, plain: Any) -> dict[str, Any]:
        """Time chains of networks (see worker.py), one measurement at a time; Refused if that is not possible."""
        request = checked(plain)
        names = {name for chain in request["chains"] for name, _ in chain["steps"]}
        missing = sorted(name for name in names if not self.path(name).is_file())
        if missing:
            raise Refused(404, f"{len(missing)} networks are missing here: send them first")
        if not self.turn.acquire(timeout=WAIT_S):
            raise Refused(409, "the device is busy with another measurement: try again later")
        try:
            before = conditions.throttle_count()
            for name in sorted(names):
                self._load(name, request["threads"])
            found = self.worker.time(request)
            after = conditions.throttle_count()
            slowed = None if before is None or after is None else after > before
            return found | ({} if slowed is None else {"throttled": slowed})
        except BadSample as error:
            raise Refused(422, str(error)) from None
        finally:
            self.turn.release()

    def _load(self, name: str, threads: int) -> None:
        pid, known = self.loaded
        if self.worker.pid is None or self.worker.pid != pid:
            known = set()
        if (name, threads) not in known:
            self.worker.load(name, self.path(name).read_bytes(), threads)
            self.loaded = self.worker.pid, {*known, (name, threads)}


def checked(plain: Any) -> dict[str, Any]:
    """Return a timing request reduced to its known fields; Refused if one is missing or invalid."""
    try:
        threads, chains, total = plain["threads"], [], 0
        if not (isinstance(threads, int) and 1 <= threads <= MAX_THREADS):
            raise ValueError("threads")
        for chain in plain["chains"]:
            skip, runs, steps = chain["skip"], chain["runs"], []
            if not (isinstance(skip, int) and isinstance(runs, int) and 0 <= skip <= 1000 and 1 <= runs <= 1000):
                raise ValueError("runs")
            for name, given in chain["steps"]:
                if not re.fullmatch(r"[0-9a-f]{64}", name):
                    raise ValueError("network")
                if not isinstance(given, str):
                    given = {str(key): [list(map(int, shape)), kind] for key, (shape, kind) in given.items()}
                    if not all(kind in DTYPES.values() for _, kind in given.values()):
                        raise ValueError("type of an input")
                steps.append([name, given])
            total += len(steps) * (skip + runs)
            chains.append({"skip": skip, "runs": runs, "steps": steps})
        if not chains or not all(chain["steps"] for chain in chains) or total > MAX_RUNS:
            raise ValueError("chains")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refused(400, f"the request is not a valid timing request ({error})") from None
    return {"threads": threads, "chains": chains}


class _Handler(BaseHTTPRequestHandler):
    """One connection; `agent` is set by `open_agent`."""

    agent: Agent
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "slimray-agent", ""
    timeout = SOCKET_S

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _get(self) -> dict[str, Any]:
        if self.path == "/about":
            return self.agent.about()
        if self.path == "/conditions":
            return conditions.conditions()
        if found := SHA256.fullmatch(self.path):
            return {"here": self.agent.path(found[1]).is_file()}
        raise Refused(404, "there is nothing at this address")

    def _put(self) -> dict[str, Any]:
        found = SHA256.fullmatch(self.path)
        if not found:
            raise Refused(404, "there is nothing at this address")
        self.agent.keep(found[1], self._body(self.agent.limits.max_mb << 20))
        return {"here": True}

    def _post(self) -> dict[str, Any]:
        if self.path != "/time":
            raise Refused(404, "there is nothing at this address")
        try:
            plain = json.loads(self._body(MAX_JSON_BYTES))
        except (ValueError, RecursionError):
            raise Refused(400, "the request is not JSON") from None
        return self.agent.time(plain)

    def _body(self, most: int) -> bytes:
        """Return the body, which must declare its length; Refused, without reading it, if it is larger than `most`."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,12}", length) or self.headers.get("Transfer-Encoding"):
            raise Refused(411, "the request does not declare its length")
        if int(length) > most:
            raise Refused(413, f"{int(length):,} bytes are more than the agent accepts ({most:,})")
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise Refused(400, "the request is incomplete")
        return data

    def _answer(self, act: Callable[[], dict[str, Any]]) -> None:
        status: int
        try:
            shown = self.headers.get("Authorization", "").encode("utf-8", "replace")
            if not hmac.compare_digest(shown, f"Bearer {self.agent.token}".encode()):
                raise Refused(401, f"wrong token: set {TOKEN_VARIABLE} to the one that `slimray agent` printed")
            status, found = 200, act()
        except Refused as error:
            status, found = error.status, {"error": str(error)}
            self.close_connection = True  # the body may not have been read
        except (RuntimeError, OSError) as error:
            status, found = 500, {"error": f"the agent failed ({error})"}
            self.close_connection = True
        body = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        if self.close_connection:
            self._drain()

    def _drain(self) -> None:
        """Let a client that is still sending read the response, which closing with unread bytes would discard."""
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(DRAIN_S)
            end = time.monotonic() + DRAIN_S
            while time.monotonic() < end and self.rfile.read1(1 << 16):
                pass

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, to keep the terminal free of requests."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of a connection, such as a client that has disconnected."""


@dataclass(frozen=True)
class Serving:
    """An agent bound to an address, not yet serving."""

    server: ThreadingHTTPServer
    agent: Agent

    @property
    def url(self) -> str:
        """Return its address."""
        host, port = self.server.server_address[:2]
        return f"http://{host!s}:{port}"

    def close(self) -> None:
        """Release the port, end the process and delete the networks."""
        self.server.server_close()
        self.agent.worker.close()
        shutil.rmtree(self.agent.folder, ignore_errors=True)


def open_agent(host: str, port: int, token: str | None = None, limits: Limits | None = None) -> Serving:
    """Return an agent bound to `host`:`port` (0: any free port); UserError if that is not available.

    Its token is `token`, otherwise that of the environment, otherwise a new one.
    """
    limits = limits or Limits()
    token = token or os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)
    if len(token) < 16:
        raise UserError(f"{TOKEN_VARIABLE}: must have at least 16 characters, because others may try to guess it")
    folder = Path(tempfile.mkdtemp(prefix="slimray-agent-"))
    agent = Agent(token, limits, folder, Worker(timeout_s=limits.max_seconds))
    try:
        server = _Server((host, port), type("Handler", (_Handler,), {"agent": agent}))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"--host, --port: {host}:{port} is not available ({(error.strerror or str(error)).lower()})"
        ) from None
    return Serving(server, agent)


def serve(host: str, port: int, limits: Limits, say: Callable[[str], None] = print) -> None:
    """Serve until interrupted; the token is printed once, or comes from the environment."""
    given = bool(os.environ.get(TOKEN_VARIABLE))
    serving = open_agent(host, port, limits=limits)
    say(f"agent of {serving.agent.about()['device']} at {serving.url}, Ctrl-C stops it")
    if not given:
        say(f"on the machine that profiles: export {TOKEN_VARIABLE}={serving.agent.token}")
    if host not in ("127.0.0.1", "::1", "localhost"):
        say("anyone who can listen on this network can read the token: an SSH tunnel to 127.0.0.1 is safer")
    try:
        serving.server.serve_forever()
    finally:
        serving.close()
