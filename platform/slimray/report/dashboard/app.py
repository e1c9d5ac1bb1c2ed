"""A local web page over a storage folder, live while runs write: `serve` binds to 127.0.0.1 until it is interrupted.

In: a storage folder or URI, read by watch.py. Out: the pages of views.py: `/` the runs, `/run/NAME` one of them,
`/compare?runs=a,b`. One layout, one callback; all that one sees is in the address. A page runs no code but Dash's own
files, which come from here (content security policy, no eval), and what was read from a folder is text in it, never a
component. Surprising: every request needs the token of the printed link, as other users of this machine reach 127.0.0.1
too; one by another Host or Origin is refused, as a web site elsewhere can make its name resolve to this machine; the
page of a report is shut into a sandbox, as somebody else may have written it. Dash rebuilds all that is below a list
of children that changed (focus and zoom are lost): pages are compared here, and only what differs is sent.
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
MAX_CHANGES = 1000  # of a page; with more it is sent as a whole
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
OF_REPORTS = (  # a report carries its own, stricter one; this holds for a report that somebody else wrote
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)

log = logging.getLogger(__name__)


def build(watch: Watch, token: str) -> dash.Dash:
    """Return the application over `watch`: one layout, one callback, the report's route, the guards of all of them.

    `/open/TOKEN` gives the browser a cookie, which every other request shows.
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
    """Return what stays whatever is shown: the header with the filter, and the place of the page."""
    return html.Div(
        [
            html.A("to the content", href="#page", className="skip"),
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
    """Add the one callback: an address, or the next tick, to what has changed on the page."""
    drawn: OrderedDict[str, tuple[str, list[Any]]] = OrderedDict()  # what a browser shows, by what it calls `seen`
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
        except (RunFailed, UserError, OSError, ValueError) as error:  # the last: a name that is no text
            return dash.no_update, dash.no_update, hidden, f"{error}: asked again every {POLL_S:g} s"
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
    """Add the route of reports."""

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
    """Let only those in who know the token, from this machine, and say in every answer what a page may load.

    `scripts` is that part of the policy for scripts, word by word.
    """

    @server.before_request
    def only_from_here() -> Any:
        request = flask.request
        hosts = [f"{name}:{request.environ['SERVER_PORT']}" for name in ("127.0.0.1", "localhost")]
        origin = request.headers.get("Origin")
        if request.host not in hosts or (origin is not None and origin not in [f"http://{host}" for host in hosts]):
            return flask.Response("this page answers to 127.0.0.1 and localhost only\n", 403, mimetype="text/plain")
        cookie = f"slimray-{request.environ['SERVER_PORT']}"  # cookies of all ports of a host are one
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
    """Return what the address shows: its version, and how to draw it if that is new."""
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
    """`tree` with everything among its children that is not a component, or a list of them, as text.

    A dict among the children of a component would become whatever component it names once the browser has it.
    """
    if isinstance(tree, Component):
        if hasattr(tree, "children"):
            cast(Any, tree).children = as_text(tree.children)
        return tree
    if isinstance(tree, list | tuple):
        return [as_text(child) for child in tree]
    return tree if tree is None or isinstance(tree, str | bool | int | float) else str(tree)


def named(tree: Any, name: str) -> Any:
    """`tree` (components, lists, text) with an id for every component, made of its place below `name`."""
    for place, child in enumerate(tree if isinstance(tree, list) else [tree]):
        if isinstance(child, Component):
            if getattr(child, "id", None) is None:
                cast(Any, child).id = f"{name}-{place}"
            named(getattr(child, "children", None), f"{name}-{place}")
    return tree


def changes(old: Any, new: Any, name: str) -> dict[str, dict[str, Any]]:
    """Component -> its properties that are other in `new` than in `old`, both the children of component `name`.

    Where not the properties but the kinds or the number of children differ, it is `children` of the one above.
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
    """Says nothing about requests, and keeps a connection for the next one."""

    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: the address of a page may hold names."""


@dataclass(frozen=True)
class Dashboard:
    """A server bound to 127.0.0.1, not yet serving, and the token that its pages ask for."""

    server: werkzeug.serving.BaseWSGIServer
    token: str

    @property
    def port(self) -> int:
        """The port that it is bound to."""
        return self.server.port

    @property
    def link(self) -> str:
        """The address that opens the page, with its token."""
        return f"http://127.0.0.1:{self.port}/open/{self.token}"

    @property
    def cookie(self) -> tuple[str, str]:
        """Name and value of the cookie that a browser shows once it has opened the link."""
        return f"slimray-{self.port}", self.token


def open_server(where: str, port: int) -> Dashboard:
    """Return a dashboard bound to 127.0.0.1:`port` (0: any that is free), not yet serving; UserError if it is taken."""
    watch = Watch(where)
    try:
        watch.rows(0)  # begins to read
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
            raise UserError(f"--port: {port} of 127.0.0.1 cannot be had ({reason}): choose another, or 0") from None
        bound.listen(128)
        at = bound.getsockname()[1]
        server = werkzeug.serving.make_server(
            "127.0.0.1", at, app.server, threaded=True, request_handler=_Quiet, fd=os.dup(bound.fileno())
        )
        return Dashboard(server, token)


def serve(where: str, port: int = 8050, open_browser: bool = False, say: Callable[[str], None] = print) -> None:
    """Serve the dashboard of the storage `where` until interrupted; UserError: no storage or port to be had."""
    dashboard = open_server(where, port)
    say(f"dashboard of {where}: {dashboard.link} (only for you, on this machine; Ctrl-C ends it)")
    if open_browser:
        threading.Thread(target=webbrowser.open, args=(dashboard.link,), daemon=True).start()
    try:
        dashboard.server.serve_forever()
    finally:
        dashboard.server.server_close()
