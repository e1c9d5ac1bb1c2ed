"""The page of `slimray live`: on 127.0.0.1, for whoever has the printed link, without external content.

`/open/TOKEN` sets a cookie that every other request must send, because all users of a machine share 127.0.0.1; a
request with another Host or Origin is refused. Class names reach the page as JSON and become text there.
"""

import hmac
import io
import json
import secrets
import threading
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from slimray.runtime.live import KEPT, Live
from slimray.spec import UserError

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILES = {
    "/": ("live.html", "text/html"),
    "/live.js": ("live.js", "text/javascript"),
    "/live.css": ("live.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
LARGEST = 960  # largest side of the picture sent to the page, in pixels
LAST_LOOK_S = 3.0  # time after the last frame in which an open page may still poll


@dataclass(frozen=True, eq=False)
class Page:
    """A server bound to 127.0.0.1, not yet serving."""

    server: ThreadingHTTPServer
    token: str
    seen_end: threading.Event = field(default_factory=threading.Event)

    @property
    def port(self) -> int:
        """Return the port that it is bound to."""
        return int(self.server.server_address[1])

    @property
    def link(self) -> str:
        """Return the URL that opens the page, with its token."""
        return f"http://127.0.0.1:{self.port}/open/{self.token}"


def open_page(live: Live, about: str, port: int) -> Page:
    """Return the page of `live` bound to 127.0.0.1:`port` (0: any free one); UserError if it is not available."""
    token, seen = secrets.token_urlsafe(24), threading.Event()

    class Handler(_Handler):
        pass

    Handler.live, Handler.about, Handler.token, Handler.seen_end = live, about, token, seen
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"--port: {port} on 127.0.0.1 is not available ({reason}), choose another or 0") from None
    server.daemon_threads = True
    return Page(server, token, seen)


def serve(live: Live, about: str, port: int, open_browser: bool, say: Callable[[str], None] = print) -> None:
    """Show `live` until its frames end or it is interrupted; print statistics at the end."""
    page = open_page(live, about, port)
    serving = threading.Thread(target=page.server.serve_forever, args=(0.1,), daemon=True)
    say(f"{about}: {page.link} (only for you, on this machine; Ctrl-C stops it)")
    serving.start()
    live.start()
    if open_browser:
        threading.Thread(target=webbrowser.open, args=(page.link,), daemon=True).start()
    try:
        while not live.wait(1.0):
            pass
        page.seen_end.wait(LAST_LOOK_S)
    except KeyboardInterrupt:
        pass
    finally:
        live.stop()
        page.server.shutdown()
        page.server.server_close()
    view, (low, high, most) = live.view, live.view.latency_ms
    say(
        f"{view.number} frames labelled, {view.dropped} dropped, {view.fps:.1f} frames per second, "
        f"latency {low:.1f} / {high:.1f} / {most:.1f} ms (50, 90, 99 % of the last {KEPT})"
    )
    if view.trouble:
        raise UserError(f"live: {view.trouble}")


def as_jpeg(picture: np.ndarray) -> bytes:
    """Return a picture uint8 `[H, W, 3]` as JPEG, at most LARGEST pixels a side."""
    image, out = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((LARGEST, LARGEST))
    image.save(out, "JPEG", quality=80)
    return out.getvalue()


class _Handler(BaseHTTPRequestHandler):
    live: Live
    about: str
    token: str
    seen_end: threading.Event
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "slimray", ""
    timeout = 30

    def do_GET(self) -> None:
        port, path = self.server.server_address[1], self.path.partition("?")[0]  # type: ignore[index]
        hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in hosts or (origin and origin not in [f"http://{host}" for host in hosts]):
            return self._send(403, b"this page is served at 127.0.0.1 and localhost only\n")
        if hmac.compare_digest(path.encode(), f"/open/{self.token}".encode()):
            cookie = f"slimray-live-{port}={self.token}; HttpOnly; SameSite=Strict; Path=/"
            return self._send(302, b"", {"Location": "/", "Set-Cookie": cookie})
        try:
            cookies = SimpleCookie(self.headers.get("Cookie", ""))
        except CookieError:
            cookies = SimpleCookie()
        shown = cookies.get(f"slimray-live-{port}")
        if not hmac.compare_digest((shown.value if shown else "").encode(), self.token.encode()):
            return self._send(403, b"open the link that `slimray live` printed\n")
        if path in FILES:
            name, kind = FILES[path]
            return self._send(
                200, (Path(__file__).parent / name).read_bytes(), {"Content-Type": f"{kind}; charset=utf-8"}
            )
        view = self.live.view
        if path == "/view":
            body = json.dumps(view.to_plain() | {"about": self.about}).encode()
            self._send(200, body, {"Content-Type": "application/json"})
            return self.seen_end.set() if view.ended else None
        if path == "/picture" and view.picture is not None:
            return self._send(200, as_jpeg(view.picture), {"Content-Type": "image/jpeg"})
        return self._send(404, b"there is nothing at this address\n")

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        own = HEADERS | {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in (own | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""
