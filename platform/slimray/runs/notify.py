"""Notifies a webhook how a run ended, with a plain JSON message or one for Slack.

In: a `NotifySpec`, part of a job, and an event: a mapping with `state` and further fields such as name, kind, message
and uri. Out: one POST of JSON. The address is a secret (anyone who has it can post), so the job only holds the name of
an environment variable, and no log or error here ever shows its value. Surprising: nothing is raised, and a call takes
no longer than two attempts of TIMEOUT_S, because a run must not fail over a message about it.
"""

import json
import logging
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any, Literal

from pydantic import Field

from slimray.credentials import redact
from slimray.spec import Spec

Event = Literal["finished", "failed", "preempted"]
TIMEOUT_S = 10.0
PAUSE_S = 0.5  # before the second attempt
MAX_TEXT = 2000  # characters of one value
ICONS = {"finished": ":white_check_mark:", "failed": ":x:", "preempted": ":warning:"}

log = logging.getLogger(__name__)


class NotifySpec(Spec):
    """Webhook that receives a message when the run ends."""

    url_env: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable that holds the webhook's address (http or https); it is a secret."""
    on: tuple[Event, ...] = Field(("finished", "failed", "preempted"), min_length=1)
    """Events that are reported: `finished`, `failed`, `preempted`."""
    format: Literal["json", "slack"] = "json"
    """`json`: the event itself. `slack`: a message for an incoming webhook of Slack or a compatible service."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirects: a redirected POST would become a GET without its message."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def send(spec: NotifySpec, event: Mapping[str, Any]) -> None:
    """POST `event` to the webhook if its `state` is among `spec.on`; after two failed attempts, log one warning.

    Raises nothing. Returns after at most 2 x TIMEOUT_S + PAUSE_S, unless a name server does not respond.
    """
    if event.get("state") not in spec.on:
        return
    reason = "not tried"
    try:
        url = os.environ.get(spec.url_env, "").strip()
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            reason = "the variable is not set" if not url else "the variable does not hold an http or https address"
        else:
            body = json.dumps(message(spec, event), allow_nan=False).encode()
            for attempt in range(2):
                time.sleep(PAUSE_S * attempt)
                reason = _post(url, body)
                if not reason:
                    return
                if reason.startswith("HTTP 4"):
                    break  # the same message would be refused again
    except Exception as error:  # noqa: BLE001 a message must never end a run
        reason = type(error).__name__
    log.warning("notify: could not send %r to the webhook in $%s (%s)", event.get("state"), spec.url_env, reason)


def message(spec: NotifySpec, event: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body to post: the event as JSON values with credentials hidden; for Slack, a text without markup."""
    plain = redact({str(key): _plain(value) for key, value in event.items()})
    if spec.format == "json":
        return plain
    state, name = plain.get("state"), plain.get("name", "run")
    lines = [f"{ICONS.get(str(state), '')} {_slack(name)} {_slack(state)}".strip()]
    lines += [
        f"{_slack(key)}: {_slack(value)}" for key, value in plain.items() if key not in ("state", "name") and value
    ]
    return {"text": "\n".join(lines)}


def _post(url: str, body: bytes) -> str:
    """Return why the message was not delivered, "" if it was; never contains the address, as errors of urllib may."""
    headers = {"Content-Type": "application/json", "User-Agent": "slimray"}
    try:
        request = urllib.request.Request(url, body, headers, method="POST")  # noqa: S310 http and https only, see above
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=TIMEOUT_S) as response:
            return "" if response.status < 300 else f"HTTP {response.status}"
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        timed_out = isinstance(cause, TimeoutError)
        return f"no response within {TIMEOUT_S:g} s" if timed_out else type(cause if cause != "" else error).__name__


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)[:MAX_TEXT]


def _slack(value: Any) -> str:
    """Return a value escaped for Slack, so that `<!channel>` and links are text, not markup."""
    said = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return said[:MAX_TEXT].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
