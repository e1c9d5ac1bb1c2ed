"""A prepared index is read and checked in pieces, with the same result for any size and storage."""

import gc
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from slimray.data import index, index_file
from slimray.data.index import INDEX, fingerprint, index_table
from slimray.data.index_file import IndexWriter, read_parquet, repeated, require_sound
from slimray.data.paths import inside
from slimray.spec import UserError
from slimray.storage import open_uri

NUM = 700


def table(**changed) -> pa.Table:
    rows = [
        {"path": f"é{i}.mp4", "label": i % 5, "frames": i, "fps": 25.0, "shard": f"s{i // 64}.parquet", "row": i % 64}
        for i in range(NUM)
    ]
    for name, values in changed.items():
        for number, value in values.items():
            rows[number][name] = value
    return index_table(rows)


@pytest.fixture
def in_small_pieces(monkeypatch):
    """Pieces of 100 rows, and files mapped from 500 rows on."""
    for module in (index, index_file):
        monkeypatch.setattr(module, "PIECE", 100)
    monkeypatch.setattr(index_file, "MAPPED", 500)
    monkeypatch.setattr(index_file, "PART_BYTES", 1000)


def test_a_large_index_is_mapped_and_its_file_is_gone_with_it(tmp_path, monkeypatch, in_small_pieces):
    monkeypatch.setattr(index_file.tempfile, "tempdir", str(tmp_path))
    pq.write_table(table(), tmp_path / "train.parquet", row_group_size=90)
    before = pa.total_allocated_bytes()
    found = read_parquet(pafs.LocalFileSystem(), str(tmp_path / "train.parquet"))
    assert os.listdir(tmp_path) == ["train.parquet"]
    assert found.equals(table())
    assert found.schema == INDEX
    assert found.column("path").num_chunks > 3
    assert pa.total_allocated_bytes() - before < found.nbytes / 10, "it lies in memory, not in the file"
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "slimray-index-" in line]
    assert mapped
    del found
    gc.collect()
    left = [line for line in Path("/proc/self/maps").read_text().splitlines() if "slimray-index-" in line]
    assert not left


@pytest.mark.parametrize("mapped", [False, True])
def test_an_index_of_before_places_were_known_is_the_same_dataset(tmp_path, monkeypatch, mapped):
    monkeypatch.setattr(index_file, "MAPPED", 500 if mapped else 10**6)
    pq.write_table(table().drop_columns(["offset", "length"]), tmp_path / "old.parquet")
    found = read_parquet(pafs.LocalFileSystem(), str(tmp_path / "old.parquet"))
    assert found.equals(table())
    assert set(found.column("offset").to_pylist()) == {-1}
    assert fingerprint(table(offset={3: 77}, length={3: 5})) == fingerprint(found)


def test_an_index_in_a_bucket_is_read_in_parts(tmp_path, bucket, in_small_pieces):
    fs, path = open_uri(bucket("large-index"))
    pq.write_table(table(), tmp_path / "train.parquet", row_group_size=90)
    with fs.open_output_stream(f"{path}/train.parquet") as out:
        out.write((tmp_path / "train.parquet").read_bytes())
    assert read_parquet(fs, f"{path}/train.parquet").equals(table())
    with pytest.raises(FileNotFoundError):
        read_parquet(fs, f"{path}/val.parquet")


def test_the_fingerprint_is_the_same_in_pieces(in_small_pieces, monkeypatch):
    in_pieces = fingerprint(table())
    monkeypatch.setattr(index, "PIECE", 1 << 20)
    assert fingerprint(table()) == in_pieces


def test_a_path_that_is_listed_twice_is_found_wherever_it_stands(in_small_pieces):
    assert repeated(table().column("path")) is None
    assert repeated(table(path={650: "é3.mp4"}).column("path")) == "é3.mp4"
    require_sound(table(), "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: lists a path twice"):
        require_sound(table(path={650: "é649.mp4"}), "x.parquet")


def test_strings_with_the_same_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(index_file, "hash", lambda text: len(text), raising=False)
    assert repeated(table().column("path")) is None
    assert repeated(table(path={650: "é3.mp4"}).column("path")) == "é3.mp4"


@pytest.mark.parametrize(
    "path", ["", "/a", "..", "a/..", "../a", "a/../b", "s3://a", "a\nb", "a\x00b", "a\x7f", "a", "a..b/c", "é/ü", "a b"]
)
def test_the_columnar_check_of_paths_refuses_what_the_other_one_refuses(path, in_small_pieces):
    try:
        inside(path, "x.parquet")
        refused = False
    except UserError as error:
        refused = str(error)
    changed = table(path={NUM - 2: path})
    if not refused:
        require_sound(changed, "x.parquet")
        return
    with pytest.raises(UserError) as told:
        require_sound(changed, "x.parquet")
    assert str(told.value) == refused


@pytest.mark.parametrize("sizes", [[NUM], [30] * 23 + [10], [64, 0, 636]])
def test_an_index_is_written_as_its_rows_come(tmp_path, in_small_pieces, sizes):
    writer, start = IndexWriter(tmp_path / "train.parquet"), 0
    for size in sizes:
        writer.add(table().slice(start, size))
        start += size
    assert writer.num_rows == NUM
    assert writer.close() == tmp_path / "train.parquet"
    assert read_parquet(pafs.LocalFileSystem(), str(tmp_path / "train.parquet")).equals(table())
    assert len(writer.waiting) == 0
