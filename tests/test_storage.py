"""Storage: a real disk, a real S3 server on loopback, and servers that do not answer."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading

import pyarrow.fs as pafs
import pytest
from tests.faulty_s3 import faulty_s3
from tests.waits import as_in_a_terminal, patience, wait_for

from slimray import storage
from slimray.spec import UserError
from slimray.storage import StorageError


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    """(filesystem, path) of an empty folder on a disk and in a bucket."""
    name = f"{tmp_path.name}-files"
    return storage.open_uri(tmp_path if request.param == "disk" else request.getfixturevalue("bucket")(name))


class Failing:
    """A filesystem whose first `times` reads fail with `error`."""

    def __init__(self, times: int, error: OSError):
        self.left, self.error = times, error

    def open_input_file(self, path):
        if self.left:
            self.left -= 1
            raise self.error
        return pafs.LocalFileSystem().open_input_file(path)


def test_what_is_written_is_read_listed_and_deleted(place, tmp_path):
    fs, path = place
    local = tmp_path / "source.bin"
    local.write_bytes(os.urandom(300_000))
    storage.write_atomic(fs, storage.join(path, "a", "one.txt"), b"one")
    storage.write_atomic(fs, storage.join(path, "a", "b", "two.bin"), local)
    storage.write_atomic(fs, storage.join(path, "a", "one.txt"), b"again")
    folder = storage.join(path, "a")
    assert storage.read_bytes(fs, storage.join(folder, "one.txt")) == b"again"
    assert storage.read_bytes(fs, storage.join(folder, "b", "two.bin")) == local.read_bytes()
    assert [file.base_name for file in storage.list_files(fs, folder)] == ["one.txt"]
    assert [file.size for file in storage.list_files(fs, folder, recursive=True)] == [300_000, 5]
    assert storage.list_folders(fs, folder) == ["b"]
    storage.delete(fs, storage.join(folder, "one.txt"))
    storage.delete(fs, storage.join(folder, "never-there"))
    assert not storage.exists(fs, storage.join(folder, "one.txt"))
    storage.delete(fs, folder)
    assert not storage.exists(fs, folder)


def test_a_missing_file_is_file_not_found_and_a_missing_folder_is_empty(place):
    fs, path = place
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(fs, storage.join(path, "none"))
    assert storage.list_files(fs, storage.join(path, "none")) == []
    assert storage.list_folders(fs, storage.join(path, "none")) == []


def test_a_source_that_cannot_be_read_leaves_nothing(place, tmp_path):
    fs, path = place
    with pytest.raises(FileNotFoundError):
        storage.write_atomic(fs, storage.join(path, "new"), tmp_path / "no-source")
    assert not storage.exists(fs, storage.join(path, "new"))


def test_a_reader_sees_the_old_file_or_the_new_one_whole(tmp_path):
    fs, path = storage.open_uri(tmp_path / "file")
    contents = [bytes([i]) * 200_000 for i in range(40)]
    storage.write_atomic(fs, path, contents[0])
    seen, done = [], threading.Event()

    def read():
        while not done.is_set():
            seen.append(storage.read_bytes(fs, path))

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        storage.write_atomic(fs, path, content)
    done.set()
    reader.join()
    assert seen
    assert set(seen) <= set(contents)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_failures_that_pass_are_retried_and_others_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.02)
    (tmp_path / "x").write_bytes(b"there")
    path = str(tmp_path / "x")
    assert storage.read_bytes(Failing(1, OSError("AWS Error SLOW_DOWN: reduce your rate")), path) == b"there"
    with pytest.raises(storage.StorageError, match=r"x: cannot read it after \d+ attempts? \(SLOW_DOWN\)"):
        storage.read_bytes(Failing(9, OSError("AWS Error SLOW_DOWN")), path, patience=0.3)
    with pytest.raises(storage.StorageError, match=r"x: cannot read it after 1 attempt \(SLOW_DOWN\)"):
        storage.read_bytes(Failing(9, OSError("AWS Error SLOW_DOWN")), path, patience=0)
    failing = Failing(99, OSError("received 2 of 5 bytes"))
    with pytest.raises(storage.StorageError, match=r"x: cannot read it after 4 attempts \(received 2 of 5 bytes\)"):
        storage.read_bytes(failing, path, patience=1000)
    assert failing.left == 95  # a file that is damaged is not an outage, which may take minutes
    failing = Failing(9, OSError(errno.EACCES, "no"))
    with pytest.raises(storage.StorageError, match=r"cannot read it \(permission denied\)"):
        storage.read_bytes(failing, path)
    assert failing.left == 8  # what cannot pass is not asked for again


def test_a_full_disk_is_one_sentence_and_keeps_the_old_file(tmp_path):
    code = (
        "import sys; from slimray import storage\n"
        "fs, path = storage.open_uri(sys.argv[1] + '/file')\n"
        "storage.write_atomic(fs, path, b'old')\n"
        "try: storage.write_atomic(fs, path, bytes(1_000_000))\n"
        "except storage.StorageError as error: print(error)\n"
        "print(storage.read_bytes(fs, path), [f.base_name for f in storage.list_files(fs, sys.argv[1])])\n"
    )
    mounted = 'mount -t tmpfs -o size=128k none "$1" || exit 77; "$2" -c "$3" "$1"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted, "sh"]
    try:
        done = subprocess.run(
            [*command, str(tmp_path), sys.executable, code], capture_output=True, text=True, timeout=patience(60)
        )
    except FileNotFoundError:
        pytest.skip("no unshare on this machine")
    if "Operation not permitted" in done.stderr or done.returncode == 77:
        pytest.skip("this machine lets nobody mount a small disk")
    assert "file: cannot write it (the disk is full)" in done.stdout
    assert "b'old' ['file']" in done.stdout


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("s4://team/x", "unknown storage 's4://' (known: file, gs, s3)"),
        ("s3:/team/x", "did you mean 's3'?"),
        ("https://host/x", "unknown storage 'https://'"),
        ("s3://id:hunter2@team/x", "s3://***@team/x: credentials do not belong in a URI"),
        ("s3:///x", "names no bucket"),
        ("s3://team/x?endpont_override=a", "unknown option 'endpont_override', did you mean 'endpoint_override'?"),
        ("file://host/x", "three slashes"),
        ("", "the path is empty"),
    ],
)
def test_a_uri_that_cannot_be_meant_is_one_sentence(uri, sentence):
    with pytest.raises(UserError) as caught:
        storage.open_uri(uri)
    assert sentence in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_local_paths_are_absolute_and_file_uris_are_decoded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.open_uri("runs")[1] == str(tmp_path / "runs")
    assert storage.open_uri("file:///data/my%20clips")[1] == "/data/my clips"
    assert storage.join("s3://team/runs?scheme=http", "a", "b") == "s3://team/runs/a/b?scheme=http"
    assert storage.join("/runs/", "a") == "/runs/a"


def test_a_missing_bucket_is_the_users_mistake(bucket):
    with pytest.raises(UserError, match="bucket 'tame' does not exist"):
        storage.open_uri(bucket("x").replace("team", "tame"))


def test_the_endpoint_of_the_environment_is_honoured(bucket, monkeypatch):
    endpoint = bucket("x").partition("endpoint_override=")[2].partition("&")[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
    fs, path = storage.open_uri("s3://team/from-environment")
    storage.write_atomic(fs, path, b"x")
    assert storage.read_bytes(*storage.open_uri(bucket("from-environment"))) == b"x"


def test_a_server_that_is_not_there_or_never_answers_is_asked_a_bounded_number_of_times(monkeypatch):
    """That it does not answer is nothing that the user did wrong."""
    monkeypatch.setenv(storage.PATIENCE, "0")
    monkeypatch.setattr(storage, "SDK_ATTEMPTS", 1)
    monkeypatch.setattr(storage, "REQUEST_TIMEOUT_S", 1)
    with socket.socket() as silent, socket.socket() as closed:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.setblocking(False)
        closed.bind(("127.0.0.1", 0))
        for port in (silent.getsockname()[1], closed.getsockname()[1]):
            with pytest.raises(StorageError, match=r"s3://team/x: cannot reach it after 1 attempt .* check the name"):
                storage.open_uri(f"s3://team/x?endpoint_override=127.0.0.1:{port}&scheme=http&anonymous=true")
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):  # asked once, for REQUEST_TIMEOUT_S: SDK_ATTEMPTS are all there are
            silent.accept()


def test_refused_credentials_are_one_sentence(monkeypatch):
    """A server of a few lines that refuses everyone, as S3 does."""
    import http.server

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(403)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"s3://team/x?endpoint_override=127.0.0.1:{server.server_port}&scheme=http"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(UserError, match="access denied, the credentials found were refused"):
        storage.open_uri(uri)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(UserError, match="access denied, no credentials were found: set AWS_ACCESS_KEY_ID"):
        storage.open_uri(uri + "&anonymous=true")
    server.shutdown()


def test_a_store_that_throttles_breaks_and_delays_loses_nothing(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.02)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with faulty_s3(seed=1) as faults:
        fs, path = storage.open_uri(faults.uri("runs"))
        faults.rate, faults.slow_s = 0.3, 0.2
        wanted = {f"{number:02d}": bytes([number]) * (20_000 * number) for number in range(24)}
        for name, data in wanted.items():
            storage.write_atomic(fs, f"{path}/{name}", data)
        found = {info.base_name: storage.read_bytes(fs, info.path) for info in storage.list_files(fs, path)}
        assert found == wanted
        assert {"throttle", "break", "slow"} <= {what for what, count in faults.done.items() if count}
        faults.rate, faults.kinds = 1.0, ["throttle"]
        with pytest.raises(StorageError, match="runs/00"):
            storage.read_bytes(fs, f"{path}/00", patience=1)


@pytest.mark.parametrize("kind", ["throttle", "refuse"])
def test_an_outage_is_waited_for_by_all_callers_alike(monkeypatch, kind):
    """Opening, looking up, listing, reading, writing and deleting while the bucket is down, and after it is back."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(storage, "LONGEST_WAIT_S", 0.5)
    with faulty_s3() as faults, storage.patient(patience(60)):
        fs, path = storage.open_uri(faults.uri("runs"))
        for name in ("read", "gone"):
            storage.write_atomic(fs, f"{path}/{name}", b"before")
        calls = {
            "open": lambda: storage.open_uri(faults.uri("runs"))[1],
            "look": lambda: storage.exists(fs, f"{path}/read"),
            "list": lambda: [info.base_name for info in storage.list_files(fs, path)][-1],
            "read": lambda: storage.read_bytes(fs, f"{path}/read"),
            "write": lambda: storage.write_atomic(fs, f"{path}/written", b"new"),
            "delete": lambda: storage.delete(fs, f"{path}/gone"),
        }
        answers: dict[str, object] = {}
        faults.fail(kind)
        threads = [threading.Thread(target=lambda n=n, c=c: answers.update({n: c()})) for n, c in calls.items()]
        for thread in threads:
            thread.start()
        wait_for("every caller to have failed", lambda: faults.done[kind] >= 3 * len(calls))
        assert not answers  # nobody has given up, nobody has taken an outage for an answer
        faults.heal()
        for thread in threads:
            thread.join(patience(60))
        assert answers == {
            "open": path, "look": True, "list": answers["list"], "read": b"before", "write": None, "delete": None,
        }  # fmt: skip
        assert storage.read_bytes(fs, f"{path}/written") == b"new"
        assert not storage.exists(fs, f"{path}/gone")
        faults.fail(kind)
        with storage.patient(1), pytest.raises(StorageError, match=r"runs/read: cannot read it after \d+ attempts?"):
            storage.read_bytes(fs, f"{path}/read")


INTERRUPTED = """
import sys
from pathlib import Path
from slimray import storage
fs, path = storage.open_uri(sys.argv[1])
data = Path(sys.argv[2]) if sys.argv[3] == "file" else Path(sys.argv[2]).read_bytes()
print("begins", flush=True)
storage.write_atomic(fs, path, data)
"""


@pytest.mark.parametrize(
    ("sent", "given"), [(signal.SIGINT, "file"), (signal.SIGINT, "bytes"), (signal.SIGKILL, "file")]
)
def test_an_upload_that_is_interrupted_is_whole_or_never_seen(monkeypatch, tmp_path, sent, given):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(40 << 20))
    with faulty_s3() as faults:
        fs, path = storage.open_uri(faults.uri("runs/large.bin"))
        storage.write_atomic(fs, path, b"old")
        faults.rate, faults.kinds, before = 1.0, ["slow"], faults.parts
        command = [sys.executable, "-c", INTERRUPTED, faults.uri("runs/large.bin"), str(source), given]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal)
        wait_for("parts of the file to arrive", lambda: faults.parts >= before + 2)
        child.send_signal(sent)
        child.communicate(timeout=patience(120))
        assert child.returncode != 0
        faults.rate = 0.0
        found = storage.read_bytes(fs, path)
        assert found in (b"old", source.read_bytes()), f"{len(found)} of {40 << 20} bytes are published"


def test_names_that_are_not_utf8_are_left_out_of_a_listing_with_a_word(tmp_path, caplog):
    for name in (b"caf\xe9.mp4", b"\xff", "café.mp4".encode(), "動画".encode()):
        open(bytes(tmp_path) + b"/" + name, "wb").close()
    os.mkdir(bytes(tmp_path) + b"/run\xe9")
    (tmp_path / "run").mkdir()
    fs, path = storage.open_uri(tmp_path)
    assert [info.base_name for info in storage.list_files(fs, path, recursive=True)] == ["café.mp4", "動画"]
    assert storage.list_folders(fs, path) == ["run"]
    assert f"{tmp_path}: skipped 3 names in it that are not UTF-8: rename them" in caplog.text
    storage.delete(fs, path)
    assert not tmp_path.exists()


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("~nosuchuser/runs", "~nosuchuser/runs: this machine has no such user"),
        ("s3://[::1/x", "s3://[::1/x: is not a valid URI"),
        ("gs://bu]cket[/x", "is not a valid URI"),
        ("/data/\udcff/x", r"/data/\udcff/x: its name is not UTF-8"),
        ("file:///data/%00", "a path cannot contain a zero byte"),
        ("a\0b", "a path cannot contain a zero byte"),
        ("x" * 300, "xxx...: is too long for a file name"),
        ("x/" * 3000, "is too long for a file name"),
        ("/data/\x1b[31mred\x1b[0m\0", r"/data/\x1b[31mred\x1b[0m\x00: a path"),
    ],
)
def test_what_is_no_path_and_no_uri_is_one_sentence(uri, sentence):
    for read in (storage.open_uri, *([] if ":" in uri else [storage.absolute])):
        with pytest.raises(UserError) as caught:
            read(uri)
        assert sentence in str(caught.value)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "uri",
    [
        "s3://id:hunter2/with/slashes@team/x",
        "s3://team/x?secret_key=hunter2",
        "s3://team/x?endpoint_override=h&X-Amz-Signature=hunter2",
        "gs://team/x?access_token=hunter2",
        "gs://hunter2@team/x",
        "s4://id:hunter2@team/x",
        "https://host/x?token=hunter2",
    ],
)
def test_credentials_in_a_uri_are_refused_and_never_shown(uri):
    with pytest.raises(UserError) as caught:
        storage.open_uri(uri)
    assert "hunter2" not in str(caught.value)
    assert "***" in str(caught.value)


def test_a_pipe_in_place_of_a_file_is_one_sentence_and_nobody_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(storage.StorageError, match=r"pipe: cannot read it \(not a file but a pipe, socket or device\)"):
        storage.read_bytes(*storage.open_uri(tmp_path / "pipe"))
    with pytest.raises(storage.StorageError, match="not a file but a pipe"):
        storage.read_bytes(*storage.open_uri("/dev/zero"))
    storage.delete(*storage.open_uri(tmp_path / "pipe"))
    assert not (tmp_path / "pipe").exists()
