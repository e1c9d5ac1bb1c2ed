"""A cache on this machine: files of a bucket are read once by all processes, within a limit, even if some die."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from tests.waits import patience

from slimray.data import cache
from slimray.data.bytes import read_whole, write_shard
from slimray.data.cache import Cache, cache_of
from slimray.data.index import index_table
from slimray.data.open import filesystem
from slimray.objects import Opened
from slimray.storage import open_uri

SHARDS, CLIPS, BYTES = 4, 16, 30_000


@pytest.fixture(scope="module")
def clips(s3):
    """(URI of a bucket with clips in shards, their rows, their bytes)."""
    draw = np.random.default_rng(0)
    data = [draw.bytes(BYTES) for _ in range(SHARDS * CLIPS)]
    rows = [{"path": f"{i}", "label": 0, "shard": f"s{i // CLIPS}.parquet", "row": i % CLIPS} for i in range(len(data))]
    fs, path = open_uri(s3.uri("clips"))
    for shard in range(SHARDS):
        own = range(shard * CLIPS, (shard + 1) * CLIPS)
        places = write_shard(fs, f"{path}/s{shard}.parquet", ({**rows[i], "data": data[i]} for i in own))
        for i, (offset, length) in zip(own, places, strict=True):
            rows[i] |= {"offset": offset, "length": length}
    return s3.uri("clips"), index_table(rows).to_pylist(), data


def read(root: str, rows: list, order: np.ndarray) -> list[bytes]:
    fs, path = filesystem(root)
    return [read_whole(fs, path, rows[i]) for i in order]


def files(folder: Path) -> list[Path]:
    return list(folder.glob("files/*/*"))


def test_the_first_epoch_reads_a_shard_once_and_the_second_one_nothing(s3, clips, tmp_path):
    uri, rows, data = clips
    root = cache.root(uri, str(tmp_path), 1, "v1")
    for epoch in range(2):
        order = np.random.default_rng(epoch).permutation(len(rows))
        filesystem(root)  # checks that the bucket exists
        before = s3.done.total()
        assert read(root, rows, order) == [data[i] for i in order]
        asked = s3.done.total() - before
        assert asked == (SHARDS if epoch == 0 else 0)
    assert len(files(tmp_path)) == SHARDS


def test_without_a_cache_a_clip_is_one_request_and_more_where_the_index_does_not_know_its_place(s3, clips):
    uri, rows, data = clips
    filesystem(uri)
    before = s3.done.total()
    assert read(uri, rows, np.arange(len(rows))) == data
    assert s3.done.total() - before == len(rows)
    before, old = s3.done.total(), [{**row, "offset": -1, "length": 0} for row in rows]
    assert read(uri, old, np.arange(len(rows))) == data
    assert s3.done.total() - before >= 2 * len(rows)


def test_other_versions_and_datasets_have_files_of_their_own(clips, tmp_path):
    uri, rows, data = clips
    for version in ("v1", "v2"):
        assert read(cache.root(uri, str(tmp_path), 1, version), rows, np.arange(2)) == data[:2]
    assert len(files(tmp_path)) == 2


def test_the_root_carries_the_cache_and_only_that_of_a_bucket():
    uri = "s3://team/a b?region=eu-west-1"
    plain, found = cache_of(cache.root(uri, "/mnt/nvme ü", 1.5, "v&1"))
    assert plain == uri
    assert found == Cache(Path("/mnt/nvme ü"), 1_500_000_000, f"{uri} v&1")
    assert cache_of(cache.root("gs://team/x", "/c", 2, "v"))[0] == "gs://team/x"
    for local in ("/data/x", "file:///data/x", "data?x"):
        assert cache.root(local, "/c", 1, "v") == local
        assert cache_of(local) == (local, None)
    assert cache_of(uri) == (uri, None)


def test_the_folder_stays_within_its_bound_and_what_was_used_longest_ago_goes(clips, tmp_path):
    uri, rows, data = clips
    size = CLIPS * BYTES
    fs, path = open_uri(uri)
    small = Cache(tmp_path, int(3.5 * size), "v")
    for shard in (0, 1, 2, 0, 3):  # s1 is what was used longest ago
        assert small.fetch(fs, f"{path}/s{shard}.parquet") is not None
        time.sleep(0.02)
    assert sum(file.stat().st_size for file in files(tmp_path)) <= 3.5 * size
    there = [small.place(f"{path}/s{shard}.parquet").exists() for shard in range(SHARDS)]
    assert there == [True, False, True, True]
    assert int((tmp_path / "size").read_text()) == sum(file.stat().st_size for file in files(tmp_path))
    (tmp_path / "size").write_text("")  # after a machine crashed
    assert small.fetch(fs, f"{path}/s1.parquet") is not None
    assert int((tmp_path / "size").read_text()) == sum(file.stat().st_size for file in files(tmp_path))
    tiny = Cache(tmp_path / "tiny", size // 2, "v")
    assert tiny.fetch(fs, f"{path}/s0.parquet") is None
    root = cache.root(uri, str(tmp_path / "tiny"), size / 2e9, "v")
    assert read(root, rows, np.arange(3)) == data[:3]
    assert files(tmp_path / "tiny") == []


def test_a_file_that_is_not_there_is_told_as_ever_and_a_folder_without_room_is_passed_over(clips, tmp_path):
    uri, rows, data = clips
    root = cache.root(uri, str(tmp_path / "a"), 1, "v")
    with pytest.raises(FileNotFoundError, match=r"none\.parquet"):
        read(root, [{**rows[0], "shard": "none.parquet"}], np.arange(1))
    (tmp_path / "file").write_text("no folder")
    root = cache.root(uri, str(tmp_path / "file"), 1, "v")
    assert read(root, rows, np.arange(3)) == data[:3]


def test_an_answer_that_breaks_off_leaves_nothing(s3, clips, tmp_path):
    uri, rows, data = clips
    root = cache.root(uri, str(tmp_path), 1, "broken")
    filesystem(root)
    s3.kinds, s3.rate = ["break answer"], 0.4
    try:
        assert read(root, rows, np.arange(0, 64, 16)) == data[::16]
    finally:
        s3.heal()
    assert len(files(tmp_path)) == SHARDS
    assert not list(tmp_path.glob("files/*/*.part"))


@pytest.fixture
def spawn(monkeypatch):
    """A context of spawned processes that find the tests' modules wherever pytest was started."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    return multiprocessing.get_context("spawn")


def _fetch(uri: str, folder: str, names: list[str], out) -> None:
    fs, path = open_uri(uri)
    for name in names:
        place = Cache(Path(folder), 10**9, "v").fetch(fs, f"{path}/{name}")
        assert place is not None
        out.put((name, place.stat().st_size))


def test_processes_that_want_the_same_file_fetch_it_once(s3, clips, tmp_path, spawn):
    uri, _, _ = clips
    out = spawn.Queue()
    names = [f"s{shard}.parquet" for shard in range(SHARDS)]
    before = s3.done.total()
    processes = [spawn.Process(target=_fetch, args=(uri, str(tmp_path), names, out)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [out.get(timeout=patience(60)) for _ in range(3 * SHARDS)]
    for process in processes:
        process.join(patience(30))
        assert process.exitcode == 0
    assert len(set(found)) == SHARDS
    opened = 3 * 2  # each checks the bucket
    assert s3.done.total() - before <= opened + SHARDS


def _write_half(folder: str, ready) -> None:
    """Write part of a file as `fetch` does, and wait to be killed."""

    def read(size: int) -> bytes:
        if ready.is_set():
            signal.pause()
        ready.set()
        return b"x" * 50

    cache._write(Opened(100, read), Cache(Path(folder), 10**9, "v").place("half"))


def test_a_process_that_is_killed_leaves_a_part_that_nobody_reads_and_a_sweep_removes(clips, tmp_path, spawn):
    uri, rows, data = clips
    ready = spawn.Event()
    process = spawn.Process(target=_write_half, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(patience(30))
    end = time.monotonic() + patience(30)
    while not list(tmp_path.glob("files/*/*.part")) and time.monotonic() < end:
        time.sleep(0.01)
    (part,) = tmp_path.glob("files/*/*.part")
    cache._sweep(tmp_path / "files", 10**9)
    assert part.exists(), "its writer lives"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not Cache(tmp_path, 10**9, "v").place("half").exists()
    cache._sweep(tmp_path / "files", 10**9)
    assert not part.exists()
    assert read(cache.root(uri, str(tmp_path), 1, "v"), rows, np.arange(2)) == data[:2]
