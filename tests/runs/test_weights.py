"""Weights by URL: fetched once and completely, from a server that breaks off, sends wrong lengths and fails."""

import hashlib
import http.server
import threading

import pytest

from slimray import runs, storage
from slimray.runs import weights
from slimray.spec import UserError

DATA = bytes(range(256)) * 4096


class Server(http.server.ThreadingHTTPServer):
    """Serves DATA at any path; the first answers break off after the numbers of bytes in `breaks`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.breaks: list[int] = []
        self.num_asked = 0
        self.kind, self.code, self.tells_length = "application/octet-stream", 200, True
        self.data = DATA

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/net.pth"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.num_asked += 1
        self.send_response(server.code)
        self.send_header("Content-Type", server.kind)
        if server.tells_length:
            self.send_header("Content-Length", str(len(server.data)))
        self.end_headers()
        self.wfile.write(server.data[: server.breaks.pop(0) if server.breaks else None])

    def log_message(self, *_): ...


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "FETCH_PAUSE_S", 0.01)
    found = Server()
    threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def fetch(server, sha256=None) -> bytes:
    with open(runs.weights_source(server.url, "/nowhere", sha256), "rb") as file:
        return file.read()


def cached(tmp_path) -> list[str]:
    return sorted(path.name for path in tmp_path.glob("cache/slimray/weights/*"))


def test_a_file_is_fetched_once(server):
    assert fetch(server) == DATA
    assert fetch(server) == DATA
    assert server.num_asked == 1


def test_a_transfer_that_breaks_off_is_tried_again(server):
    server.breaks = [1000, 0]
    assert fetch(server) == DATA
    assert server.num_asked == 3


def test_a_transfer_that_always_breaks_off_leaves_nothing(server, tmp_path):
    server.breaks = [5000] * 3
    with pytest.raises(
        UserError, match=r"the transfer broke off after 5000 of 1048576 bytes.*: download it and give its path"
    ):
        fetch(server)
    assert cached(tmp_path) == []
    assert fetch(server) == DATA


def test_a_cached_file_that_is_not_whole_is_fetched_again(server, tmp_path):
    fetch(server)
    (path,) = tmp_path.glob("cache/slimray/weights/*.pth")
    path.write_bytes(DATA[:-1])
    assert fetch(server) == DATA
    path.with_name(path.name + ".json").unlink()  # as written by a version that did not store lengths
    path.write_bytes(DATA[:-1])
    assert fetch(server) == DATA


def test_the_digest_is_compared_before_the_file_gets_its_name(server, tmp_path):
    with pytest.raises(UserError, match="damaged or a different file"):
        fetch(server, "0" * 64)
    assert cached(tmp_path) == []
    assert fetch(server, hashlib.sha256(DATA).hexdigest().upper()) == DATA


def test_a_file_that_was_replaced_behind_its_url_is_fetched_again_for_its_digest(server):
    fetch(server)
    server.data = DATA[::-1]
    assert fetch(server, hashlib.sha256(DATA[::-1]).hexdigest()) == DATA[::-1]


def test_an_answer_without_a_length_is_used_and_not_kept_unless_its_digest_is_known(server):
    server.tells_length = False
    assert fetch(server) == DATA
    assert fetch(server) == DATA
    assert server.num_asked == 2
    for _ in range(2):
        fetch(server, hashlib.sha256(DATA).hexdigest())
    assert server.num_asked == 3


def test_a_web_page_and_an_error_are_no_file(server, tmp_path):
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(UserError, match="returned a web page instead of a file"):
        fetch(server)
    server.kind, server.code = "text/plain", 404
    with pytest.raises(UserError, match=r"cannot be fetched \(HTTP 404 Not Found\)"):
        fetch(server)
    assert cached(tmp_path) == []


@pytest.mark.parametrize(
    "url",
    ["https://me:hunter2@host/w.pth", "https://host/w.pth?token=hunter2", "https://host/w?X-Amz-Signature=hunter2"],
)
def test_a_credential_in_the_address_is_refused_and_not_shown(url):
    with pytest.raises(UserError, match="download the file and give its path") as caught:
        runs.weights_source(url, "/nowhere")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://[::1/x", "http://", "http:// /x", "http://127.0.0.1:99999/x", "http://a\udcff/x"]
)
def test_what_is_no_address_is_one_sentence(url, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "FETCH_PAUSE_S", 0.01)
    with pytest.raises(UserError, match="cannot be fetched"):
        runs.weights_source(url, "/nowhere")


@pytest.mark.parametrize("source", ["~nosuchuser/x.pth", "x" * 5000 + ".pth", "a\0b.pth", "/\udcff.pth", "nothing.pth"])
def test_what_is_no_path_is_one_sentence(source, tmp_path):
    with pytest.raises(UserError) as caught:
        runs.weights_source(source, str(tmp_path))
    assert str(caught.value).isprintable()


def test_what_a_url_names_is_kept_in_the_run_for_other_machines_and_later_attempts(
    server, bucket, monkeypatch, tmp_path
):
    run = runs.open_run(bucket("kept"), "a")
    digest = hashlib.sha256(DATA).hexdigest()
    found = runs.weights_source(server.url, "/nowhere", digest, run)
    assert found.startswith("s3://team/kept/a/init/")
    assert storage.read_bytes(*storage.open_uri(found)) == DATA
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    server.code = 500
    assert runs.weights_source(server.url, "/nowhere", digest, run) == found
    assert server.num_asked == 1
    with pytest.raises(UserError, match="has SHA-256"):
        runs.weights_source(server.url, "/nowhere", "0" * 64, run)
