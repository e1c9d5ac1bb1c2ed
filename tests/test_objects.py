"""Objects of a bucket are read with one request each; failures are reported as for any other storage."""

import sys

import pyarrow.fs as pafs
import pytest

from slimray import objects, storage
from slimray.objects import open_range, read_range

DATA = bytes(range(256)) * 400


@pytest.fixture
def bucket(s3, monkeypatch):
    """(server, filesystem, path of an object)."""
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    fs, path = storage.open_uri(s3.uri("folder"))
    storage.write_atomic(fs, f"{path}/a b+ü.bin", DATA)
    yield s3, fs, f"{path}/a b+ü.bin"
    s3.heal()


RANGES = [(0, None), (100, None), (0, 1), (256, 512), (len(DATA) - 3, 3), (len(DATA) - 3, 9), (len(DATA), 5), (7, 0)]


@pytest.mark.parametrize(("start", "size"), RANGES)
def test_a_range_is_one_request_and_the_same_everywhere(bucket, tmp_path, start, size):
    s3, fs, path = bucket
    (tmp_path / "here").write_bytes(DATA)
    wanted = DATA[start:] if size is None else DATA[start : start + size]
    before = s3.done.total()
    assert read_range(fs, path, start, size) == wanted
    assert s3.done.total() - before == (size != 0)
    assert read_range(pafs.LocalFileSystem(), str(tmp_path / "here"), start, size) == wanted


def test_an_object_is_read_piece_by_piece_with_one_request(bucket):
    s3, fs, path = bucket
    before = s3.done.total()
    with open_range(fs, path) as opened:
        assert opened.size == len(DATA)
        assert opened.read(1000) + opened.read(5000) == DATA[:6000]
    assert s3.done.total() - before == 1


def test_without_botocore_pyarrow_reads_the_same(bucket, monkeypatch):
    s3, fs, path = bucket
    monkeypatch.setitem(sys.modules, "botocore", None)
    objects._client.cache_clear()
    try:
        before = s3.done.total()
        for start, size in RANGES:
            assert read_range(fs, path, start, size) == (DATA[start:] if size is None else DATA[start : start + size])
        assert s3.done.total() - before > len(RANGES)
    finally:
        objects._client.cache_clear()


def test_what_is_not_there_is_a_missing_file_at_once(bucket):
    _, fs, path = bucket
    with pytest.raises(FileNotFoundError, match=r"folder/none$"):
        storage.retry(lambda: read_range(fs, path.replace("a b+ü.bin", "none"), 0, 10), "read", path)
    with pytest.raises(storage.StorageError, match="NO_SUCH_BUCKET"):
        storage.retry(lambda: read_range(fs, "nobody/none"), "read", path)


def test_refused_credentials_are_final_and_an_outage_is_waited_for(bucket, monkeypatch):
    s3, fs, path = bucket
    monkeypatch.setattr(s3, "refused", "id")
    before = s3.done.total()
    with pytest.raises(storage.StorageError, match="ACCESS_DENIED"):
        storage.retry(lambda: read_range(fs, path), "read", path)
    assert s3.done.total() - before == 1
    s3.refused, asked = "", []

    def read() -> bytes:
        asked.append(1)
        if len(asked) > 2:
            s3.heal()
        return read_range(fs, path)

    for kind, said in (("throttle", "SLOW_DOWN"), ("refuse", "NETWORK_CONNECTION"), ("break answer", "received")):
        s3.fail(kind)
        with pytest.raises(OSError, match=said):
            read_range(fs, path)
        asked.clear()
        assert storage.retry(read, "read", path) == DATA
        assert len(asked) == 3
