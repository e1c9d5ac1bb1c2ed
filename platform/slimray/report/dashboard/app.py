"""Local web page about a storage folder, updated while runs write: `serve` binds to 127.0.0.1 until interrupted.

In: a storage folder or URI, read by watch.py. Out: the pages of views.py: `/` lists the runs, `/run/NAME` shows one of
them, `/compare?runs=a,b` compares several. There is one layout and one callback; the URL determines the page. A page
runs no code except Dash's own files, served from here (content security policy, no eval), and content read from a
folder becomes text, never a component. Surprising: every request needs the token of the printed link, because other
users of this machine can reach 127.0.0.1 too; requests with another Host or Origin are refused, because a foreign web
site can make its name resolve to this machine; reports are sandboxed, because somebody else may have written them. Dash
rebuilds everything below a changed list of children (losing focus and zoom), so pages are compared here and only the
differences are sent.
"""

import hashlib
import logging
import os
import secrets
import socket
import threading
import webbrowser
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl, unquote

import dash
import flask
import werkzeug.serving
from dash import Input, Output, State, dcc, html
from dash.development.base_component import Component

from slimray.report.dashboard import views as views
from slimray.report.dashboard.watch import POLL_S, Watch
from slimray.spec import RunFailed, UserError
from slimray.storage import StorageError

MAX_COMPARED = 12
KEPT_PAGES = 32
MAX_CHANGES = 1000  # of a page; beyond that, the whole page is sent
CSS = Path(__file__).with_name("dashboard.css")
PAGE = """<!DOCTYPE html>
<html lang="en"><head>{%metas%}<title>{%title%}</title><link rel="icon" href="data:,">{%css%}<style>CSS</style></head>
<body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body></html>
"""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
OF_REPORTS = (  # reports have a stricter policy of their own; this one covers reports that others wrote
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)

log = logging.getLogger(__name__)


def build(watch: Watch, token: str) -> dash.Dash:
    """Return the application for `watch`: one layout, one callback, the route of reports, and access control.

    `/open/TOKEN` sets a cookie, which every other request must send.
    """
    server = flask.Flask("slimray-dashboard", static_folder=None)
    app = dash.Dash(
        __name__,
        server=cast(Any, server),
        title="slimray",
        update_title=cast(str, None),
        serve_locally=True,
        include_assets_files=False,
        suppress_callback_exceptions=True,
        add_log_handler=False,
        index_string=PAGE.replace("CSS", CSS.read_text(encoding="utf-8")),
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
    )
    app.layout = _layout(watch.where)
    _answer(app, watch)
    _serve_reports(server, watch)
    _guard(server, token, ["script-src 'self'", *app.csp_hashes()])
    return app


def _layout(where: str) -> html.Div:
    """Return the constant part of all pages: the header with the filter, and the container of the page."""
    return html.Div(
        [
            html.A("skip to content", href="#page", className="skip"),
            dcc.Location(id="url", refresh=False),
            dcc.Interval(id="tick", interval=1000 * POLL_S),
            dcc.Store(id="seen"),
            html.Header(
                [
                    dcc.Link("slimray", href="/", className="brand"),
                    html.Span(where, className="where"),
                    html.Label(
                        [html.Span("filter"), dcc.Input(id="words", type="search", debounce=0.25)],
                        id="filter",
                        className="",
                    ),
                    html.P(id="trouble", className="trouble", role="status"),
                ]
            ),
            html.Main(html.P("reading…", className="soft"), id="page", tabIndex="-1"),
        ]
    )


def _answer(app: dash.Dash, watch: Watch) -> None:
    """Add the callback, which turns a URL, or the next tick, into the changes of the page."""
    drawn: OrderedDict[str, tuple[str, list[Any]]] = OrderedDict()  # pages shown by browsers, by their `seen` hash
    lock = threading.Lock()

    @app.callback(
        Output("page", "children"),
        Output("seen", "data"),
        Output("filter", "className"),
        Output("trouble", "children"),
        Input("url", "pathname"),
        Input("url", "search"),
        Input("words", "value"),
        Input("tick", "n_intervals"),
        State("seen", "data"),
    )
    def show(pathname: str | None, search: str | None, words: str | None, ticks: int | None, seen: str | None) -> Any:
        path, words = pathname or "/", words or ""
        hidden = "" if path == "/" else "hidden"
        try:
            version, draw = _page(watch, path, dict(parse_qsl((search or "").lstrip("?"))), words)
        except (RunFailed, UserError, OSError, ValueError) as error:  # ValueError: a name that is not valid text
            return dash.no_update, dash.no_update, hidden, f"{error} (retried every {POLL_S:g} s)"
        now = hashlib.sha256(repr((path, search, words, version)).encode("utf-8", "replace")).hexdigest()
        if now == seen:
            return dash.no_update, now, hidden, ""
        page = named(as_text(draw()), "page")
        with lock:
            before = drawn.get(seen or "")
            drawn[now] = path, page
            drawn.move_to_end(now)
            while len(drawn) > KEPT_PAGES:
                drawn.popitem(last=False)
        changed = changes(before[1], page, "page") if before is not None and before[0] == path else None
        if changed is None or len(changed) > MAX_CHANGES or "page" in changed:
            return page, now, hidden, ""
        for name, properties in changed.items():
            dash.set_props(name, properties)
        return dash.no_update, now, hidden, ""


def _serve_reports(server: flask.Flask, watch: Watch) -> None:
    """Add the route that serves reports."""

    @server.route("/report/<name>")
    def report_page(name: str) -> flask.Response:
        try:
            found = watch.report(name)
        except (RunFailed, OSError):
            found = None
        if found is None:
            flask.abort(404)
        response = flask.Response(found, mimetype="text/html")
        response.headers["Content-Security-Policy"] = OF_REPORTS
        return response


def _guard(server: flask.Flask, token: str, scripts: list[str]) -> None:
    """Admit only requests from this machine with the token, and add the content security policy to every response.

    `scripts` are the words of the policy's script-src directive.
    """

    @server.before_request
    def only_from_here() -> Any:
        request = flask.request
        hosts = [f"{name}:{request.environ['SERVER_PORT']}" for name in ("127.0.0.1", "localhost")]
        origin = request.headers.get("Origin")
        if request.host not in hosts or (origin is not None and origin not in [f"http://{host}" for host in hosts]):
            return flask.Response("this page is served at 127.0.0.1 and localhost only\n", 403, mimetype="text/plain")
        cookie = f"slimray-{request.environ['SERVER_PORT']}"  # all ports of a host share their cookies
        if secrets.compare_digest(request.cookies.get(cookie, "").encode(), token.encode()):
            return flask.redirect("/") if request.path.startswith("/open/") else None
        if not secrets.compare_digest(request.path.encode(), f"/open/{token}".encode()):
            return flask.Response("open the link that `slimray dashboard` printed\n", 403, mimetype="text/plain")
        response = flask.redirect("/")
        response.set_cookie(cookie, token, httponly=True, samesite="Strict")
        return response

    policy = "; ".join(
        [
            "default-src 'none'",
            " ".join(scripts),
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "frame-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )

    @server.after_request
    def guarded(response: flask.Response) -> flask.Response:
        response.headers.setdefault("Content-Security-Policy", policy)
        response.headers.update(HEADERS)
        if "Cache-Control" not in response.headers:
            response.headers["Cache-Control"] = "no-store"
        return response


def _page(watch: Watch, path: str, query: dict[str, str], words: str) -> tuple[Any, Callable[[], list[Any]]]:
    """Return the version of the page at this URL, and a function that draws it."""
    if path == "/":
        rows = watch.rows()
        return rows, lambda: views.runs_page(rows, query, words, watch.where)
    if path == "/compare":
        names = list(dict.fromkeys(filter(None, query.get("runs", "").split(","))))[:MAX_COMPARED]
        found = {name: watch.look(name) for name in names}
        looks = [look for look in found.values() if look is not None]
        missing = [name for name, look in found.items() if look is None]
        return [look.version for look in looks], lambda: views.compare_page(looks, missing)
    if path.startswith("/run/"):
        name = unquote(path.removeprefix("/run/"))
        look = watch.look(name)
        if look is not None:
            return look.version, lambda: views.run_page(look, query)
        return None, lambda: views.problem_page("No such run", f"{watch.where} has no run {name!r}.")
    return None, lambda: views.problem_page("No such page", f"There is nothing at {path}.")


def as_text(tree: Any) -> Any:
    """Return `tree` with every child that is neither a component nor a list turned into text.

    In the browser, a dict among the children of a component would become whatever component it names.
    """
    if isinstance(tree, Component):
        if hasattr(tree, "children"):
            cast(Any, tree).children = as_text(tree.children)
        return tree
    if isinstance(tree, list | tuple):
        return [as_text(child) for child in tree]
    return tree if tree is None or isinstance(tree, str | bool | int | float) else str(tree)


def named(tree: Any, name: str) -> Any:
    """Return `tree` (components, lists, text) with an id for every component, made of its place below `name`."""
    for place, child in enumerate(tree if isinstance(tree, list) else [tree]):
        if isinstance(child, Component):
            if getattr(child, "id", None) is None:
                cast(Any, child).id = f"{name}-{place}"
            named(getattr(child, "children", None), f"{name}-{place}")
    return tree


def changes(old: Any, new: Any, name: str) -> dict[str, dict[str, Any]]:
    """Return component -> properties that differ between `old` and `new`, which are children of component `name`.

    If the types or the number of children differ, the changed property is `children` of their parent.
    """
    olds, news = (tree if isinstance(tree, list) else [tree] for tree in (old, new))
    if isinstance(old, list) != isinstance(new, list) or list(map(_kind, olds)) != list(map(_kind, news)):
        return {name: {"children": new}}
    out: dict[str, dict[str, Any]] = {}
    for before, after in zip(olds, news, strict=True):
        if not isinstance(after, Component):
            if before != after:
                return {name: {"children": new}}
            continue
        was, now = ({**one.to_plotly_json()["props"]} for one in (before, after))
        inner = changes(was.pop("children", None), now.pop("children", None), now["id"])
        if was.keys() != now.keys():
            return {name: {"children": new}}
        own = {key: value for key, value in now.items() if value != was[key]}
        out |= inner
        if own:
            out[now["id"]] = own | out.get(now["id"], {})
    return out


def _kind(child: Any) -> Any:
    return (type(child), cast(Any, child).id) if isinstance(child, Component) else type(child)


class _Quiet(werkzeug.serving.WSGIRequestHandler):
    """Request handler that logs nothing and keeps connections open."""

    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log nothing, because URLs may contain names."""


@dataclass(frozen=True)
class Dashboard:
    """A server bound to 127.0.0.1, not yet serving, and the token that its pages require."""

    server: werkzeug.serving.BaseWSGIServer
    token: str

    @property
    def port(self) -> int:
        """Return the port that it is bound to."""
        return self.server.port

    @property
    def link(self) -> str:
        """Return the URL that opens the page, with its token."""
        return f"http://127.0.0.1:{self.port}/open/{self.token}"

    @property
    def cookie(self) -> tuple[str, str]:
        """Return name and value of the cookie that a browser sends once it has opened the link."""
        return f"slimray-{self.port}", self.token


def open_server(where: str, port: int) -> Dashboard:
    """Return a dashboard bound to 127.0.0.1:`port` (0: any free one), not yet serving; UserError if it cannot bind."""
    watch = Watch(where)
    try:
        watch.rows(0)  # starts reading
    except StorageError as error:
        log.warning("%s", error)
    token = secrets.token_urlsafe(24)
    app = build(watch, token)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(("127.0.0.1", port))
        except OSError as error:
            reason = os.strerror(error.errno or 0).lower()
            raise UserError(f"--port: {port} on 127.0.0.1 is not available ({reason}), choose another or 0") from None
        bound.listen(128)
        at = bound.getsockname()[1]
        server = werkzeug.serving.make_server(
            "127.0.0.1", at, app.server, threaded=True, request_handler=_Quiet, fd=os.dup(bound.fileno())
        )
        return Dashboard(server, token)


def serve(where: str, port: int = 8050, open_browser: bool = False, say: Callable[[str], None] = print) -> None:
    """Serve the dashboard of the storage `where` until interrupted; UserError if storage or port are not available."""
    dashboard = open_server(where, port)
    say(f"dashboard of {where}: {dashboard.link} (only for you, on this machine; Ctrl-C stops it)")
    if open_browser:
        threading.Thread(target=webbrowser.open, args=(dashboard.link,), daemon=True).start()
    try:
        dashboard.server.serve_forever()
    finally:
        dashboard.server.server_close()
