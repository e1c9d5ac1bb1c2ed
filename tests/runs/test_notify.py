"""A webhook, a real server on loopback, is notified how a run ended; its address is never shown, nothing is raised."""

import json
import logging
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.waits import patience

from slimray.runs import notify
from slimray.runs.notify import NotifySpec, send
from slimray.spec import UserError, parse

SECRET = "T000-very-secret"
EVENT = {"state": "finished", "name": "my-run", "kind": "train", "metrics": {"val/top1": 91.5}, "message": ""}


class Hook(ThreadingHTTPServer):
    """Records requests; answers with `codes` in turn, then always with the last."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.got: list[tuple[str, str, str, bytes]] = []
        self.codes, self.location, self.wait_s = [200], "", 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hooks/{SECRET}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        hook = self.server
        assert isinstance(hook, Hook)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hook.got.append((self.command, self.path, self.headers["Content-Type"], body))
        time.sleep(hook.wait_s)
        code = hook.codes.pop(0) if len(hook.codes) > 1 else hook.codes[0]
        self.send_response(code)
        if hook.location:
            self.send_header("Location", hook.location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST  # a redirect that was followed would be seen

    def log_message(self, *args):
        pass


@pytest.fixture
def hook(monkeypatch):
    server = Hook()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("MY_HOOK", server.url)
    yield server
    server.shutdown()
    server.server_close()


def spec(**fields) -> NotifySpec:
    return parse(NotifySpec, {"url_env": "MY_HOOK", **fields}, "job: notify")


def test_the_event_arrives_as_json(hook):
    send(spec(), EVENT)
    ((command, path, kind, body),) = hook.got
    assert (command, path, kind) == ("POST", f"/hooks/{SECRET}", "application/json")
    assert json.loads(body) == EVENT


def test_slack_gets_a_text_in_which_nothing_of_the_run_is_markup(hook):
    send(spec(format="slack"), EVENT | {"state": "failed", "name": "a<!channel>&b", "message": "no <http://x|card>"})
    text = json.loads(hook.got[0][3])["text"]
    assert text.splitlines()[0] == ":x: a&lt;!channel&gt;&amp;b failed"
    assert "message: no &lt;http://x|card&gt;" in text
    assert "<" not in text


def test_only_what_was_asked_for_is_told(hook):
    for state in ("finished", "failed", "preempted", "running"):
        send(spec(on=["failed"]), {"state": state})
    assert [json.loads(body)["state"] for *_, body in hook.got] == ["failed"]


def test_numbers_that_json_does_not_have_and_other_objects_are_told_as_they_can_be(hook):
    send(
        spec(),
        {"state": "finished", "loss": float("nan"), "rows": [(1, float("inf"))], "where": ValueError("x" * 9000)},
    )
    told = json.loads(hook.got[0][3])
    assert told["loss"] is None
    assert told["rows"] == [[1, None]]
    assert told["where"] == "x" * notify.MAX_TEXT


def test_a_server_that_fails_once_is_asked_again(hook, monkeypatch, caplog):
    monkeypatch.setattr(notify, "PAUSE_S", 0.01)
    hook.codes = [503, 200]
    send(spec(), EVENT)
    assert len(hook.got) == 2
    assert not caplog.records


@pytest.mark.parametrize(("code", "num_tries"), [(500, 2), (404, 1), (302, 2)])
def test_a_webhook_that_refuses_leaves_one_warning_without_its_address(hook, monkeypatch, caplog, code, num_tries):
    monkeypatch.setattr(notify, "PAUSE_S", 0.01)
    hook.codes, hook.location = [code], hook.url + "/elsewhere" if code == 302 else ""
    with caplog.at_level(logging.DEBUG):
        send(spec(), EVENT)
    assert len(hook.got) == num_tries
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"could not send 'finished' to the webhook in $MY_HOOK (HTTP {code})" in record.getMessage()
    assert SECRET not in caplog.text


def test_a_webhook_that_does_not_answer_is_given_up(hook, monkeypatch, caplog):
    monkeypatch.setattr(notify, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(notify, "PAUSE_S", 0.01)
    hook.wait_s = patience(1.0)
    send(spec(), EVENT)
    assert "no response within 0.2 s" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "is not set"),
        ("file:///etc/passwd", "does not hold an http or https address"),
        (f"http://[{SECRET}", "ValueError"),
        (f"http://127.0.0.1:port-{SECRET}/", "InvalidURL"),
        (f"http://127.0.0.1:PORT/{SECRET}", "ConnectionRefusedError"),
        (f"http://127.0.0.1/{SECRET}\n/x y", "InvalidURL"),
    ],
)
def test_an_address_that_cannot_be_used_leaves_one_warning_without_it(monkeypatch, caplog, value, reason):
    monkeypatch.setattr(notify, "PAUSE_S", 0.01)
    with socket.socket() as free:  # a port that is bound but not listened on refuses connections
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MY_HOOK", value.replace("PORT", str(free.getsockname()[1])))
        send(spec(), EVENT)
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert SECRET not in caplog.text


def test_an_event_that_is_none_raises_nothing_either(hook, caplog):
    deep: list = []
    deep.append(deep)
    send(spec(), {"state": "finished", "deep": deep})
    assert hook.got == []
    assert "RecursionError" in caplog.text


@pytest.mark.parametrize(
    "fields", [{"url_env": "https://x"}, {"on": ["done"]}, {"on": []}, {"format": "teams"}, {"url": "x"}]
)
def test_what_is_no_notify_section_is_refused_with_its_field(fields):
    with pytest.raises(UserError, match=f"^job: notify: {next(iter(fields))}"):
        spec(**fields)
