"""A real S3 server (moto) on loopback behind a proxy that throttles, breaks and delays, as object stores do."""

import contextlib
import http.client
import http.server
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pyarrow.fs as pafs
from moto.server import ThreadedMotoServer
from tests.waits import patience

SLOW_DOWN = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
)
DENIED = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
FAULTS = ("throttle", "break", "break answer", "slow")


class FaultyS3:
    """Where it is, how often it fails (`rate` of the requests, may be changed at any time), and what it did."""

    def __init__(self, port: int, behind: int, seed: int):
        self.port, self.behind, self.rate, self.done, self.parts = port, behind, 0.0, Counter(), 0
        self.kinds, self.slow_s = list(FAULTS), 1.0
        self.refused = ""  # the access key of a machine without rights
        self.asked: Counter[str] = Counter()  # requests for each path
        self.per_second = 0.0  # requests that it answers for each folder of keys, as far as it is bounded
        self._left: dict[str, tuple[float, float]] = {}  # of folders: when asked last, and requests they have left
        self._random, self._lock = random.Random(seed), threading.Lock()

    def uri(self, folder: str) -> str:
        """The URI of a folder in its bucket."""
        return f"s3://team/{folder}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def fail(self, kind: str = "refuse") -> None:
        """Be down until `heal`: every request is answered with 503 ("throttle"), or its connection is closed."""
        self.kinds, self.rate = [kind], 1.0

    def heal(self) -> None:
        """Answer every request again."""
        self.rate = 0.0

    def choose(self, path: str) -> str:
        """What happens to the next request."""
        with self._lock:
            what = "ok"
            self.asked[path.partition("?")[0]] += 1
            if self.per_second and not self._has_left(path.partition("?")[0].rpartition("/")[0]):
                what = "throttle"
            elif self._random.random() < self.rate:
                what = self._random.choice(self.kinds)
            self.done[what] += 1
            return what

    def _has_left(self, folder: str) -> bool:
        """Whether a folder may be asked once more: it saves the requests of a second."""
        now = time.monotonic()
        then, left = self._left.get(folder, (now, self.per_second))
        left = min(self.per_second, left + (now - then) * self.per_second)
        self._left[folder] = now, left - (left >= 1)
        return left >= 1


@contextlib.contextmanager
def faulty_s3(seed: int = 0) -> Iterator[FaultyS3]:
    """The server for as long as the block lasts; the environment must hold AWS credentials of any kind."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, behind = server.get_host_and_port()
    direct = pafs.S3FileSystem(endpoint_override=f"http://127.0.0.1:{behind}", allow_bucket_creation=True)
    direct.create_dir("team")
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    proxy.daemon_threads = True
    faults = FaultyS3(proxy.server_address[1], int(behind), seed)
    proxy.faults = faults  # type: ignore[attr-defined]
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield faults
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        faults: FaultyS3 = self.server.faults  # type: ignore[attr-defined]
        what, size = faults.choose(self.path), int(self.headers.get("Content-Length") or 0)
        if what == "refuse":  # nothing is read: as from a server that is not there
            self.close_connection = True
            self.connection.close()
            return
        if faults.refused and f"Credential={faults.refused}/" in (self.headers.get("Authorization") or ""):
            self.rfile.read(size)
            self._answer(403, {"Content-Type": "application/xml"}, DENIED)
            return
        if what == "break":  # in the middle of an upload
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(size) if size else b""
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            body = b"".join(iter(self._chunk, b""))
        faults.parts += "partNumber=" in self.path and self.command == "PUT"
        if what == "throttle":
            self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
            return
        if what == "slow":
            time.sleep(faults.slow_s)
        upstream = http.client.HTTPConnection("127.0.0.1", faults.behind, timeout=patience(30))
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "content-length")}
        upstream.request(self.command, self.path, body=body, headers=headers)
        reply = upstream.getresponse()
        data = reply.read()
        kept = {k: v for k, v in reply.getheaders() if k.lower() not in ("transfer-encoding", "content-length")}
        length = int(reply.getheader("Content-Length") or 0) if self.command == "HEAD" else len(data)
        upstream.close()
        if what == "break answer" and len(data) > 1:  # fewer bytes than are announced
            self._answer(reply.status, kept, data[: len(data) // 2], length)
            self.close_connection = True
            self.connection.close()
            return
        self._answer(reply.status, kept, data, length)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline().split(b";")[0], 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _answer(self, status: int, headers: dict[str, str], data: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
