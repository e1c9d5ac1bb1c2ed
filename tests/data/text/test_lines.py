"""Lines of text: numbered like in other tools, left out with their number, or one sentence for the whole file."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slimray.data.text.lines import MAX_LINE_BYTES, read_lines, read_pairs, read_texts
from slimray.spec import RunFailed


def bad(lines) -> dict[int, str]:
    return {line.number: line.reason for line in lines if line.reason}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_end_at_newlines_alone_and_a_byte_order_mark_is_no_text(pack):
    data = pack("\ufeffa\u2028b \r\nc\x0bd\n\n  e".encode())
    found = list(read_lines("x", data))
    assert [(line.number, *line.texts) for line in found] == [(1, "a\u2028b"), (2, "c\x0bd"), (3, ""), (4, "e")]
    assert bad(found) == {3: "is empty"}


def test_damaged_lines_are_left_out_with_their_numbers():
    giant = b"x" * (MAX_LINE_BYTES + 1)
    edge = b"y" * MAX_LINE_BYTES
    data = b"\n".join([b"one", b"caf\xe9", b"a\0b", giant, edge, giant * 30, b"last"])
    found = list(read_lines("x", data))
    assert [line.number for line in found] == list(range(1, 8))
    assert bad(found) == {
        2: "is not UTF-8 (byte 3)", 3: "holds a zero byte", 4: "is longer than 100,000 bytes",
        6: "is longer than 100,000 bytes",
    }  # fmt: skip
    assert (len(found[4].texts[0]), found[6].texts) == (MAX_LINE_BYTES, ("last",))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_refused_in_a_sentence(encoding):
    data = "\ufeffeins\nzwei\n".encode(encoding) if encoding.endswith("be") else "eins\n".encode(encoding)
    with pytest.raises(RunFailed, match=r"a\.txt: is UTF-16: convert it to UTF-8"):
        list(read_lines("a.txt", data))


def test_a_cut_or_damaged_gzip_file_is_refused_with_the_line_it_reaches():
    whole = gzip.compress("\n".join(f"line {n * n}" for n in range(5000)).encode())
    with pytest.raises(RunFailed, match=r"a\.gz: the gzip file is truncated after line [\d,]+: copy it again"):
        list(read_lines("a.gz", whole[: len(whole) // 2]))
    spoiled = bytearray(whole)
    spoiled[-6] ^= 255
    with pytest.raises(RunFailed, match="the gzip file is damaged after line"):
        list(read_lines("a.gz", bytes(spoiled)))


def test_unequal_counts_are_refused_with_both():
    with pytest.raises(RunFailed, match=r"a\.en has 3 lines, but a\.de has 2, and line N of one"):
        list(read_pairs(("a.en", "a.de"), (b"a\nb\nc\n", b"a\nb\n")))
    with pytest.raises(RunFailed, match=r"a\.en has 1 lines, but a\.de has 4, "):
        list(read_pairs(("a.en", "a.de"), (b"a\n", b"a\nb\nc\nd")))


def test_a_pair_is_left_out_if_either_side_is_bad():
    found = list(read_pairs(("a", "b"), (b"x\n\ny\n", b"1\n2\n\xff\n")))
    assert bad(found) == {2: "a: is empty", 3: "b: is not UTF-8 (byte 0)"}
    assert found[0].texts == ("x", "1")


def test_tables_give_their_columns_by_number_or_name():
    data = b"id\tde\ten\n1\tHallo\thello\n2\tTag\n3\t\tday\n"
    by_name = list(read_texts(["a.tsv"], [data], ("en", "de")))
    assert by_name[0].texts == ("hello", "Hallo")
    assert bad(by_name) == {3: "has 2 columns, needs 3", 4: "is empty"}
    assert next(iter(read_texts(["a.tsv.gz"], [gzip.compress(data)], ("3", "2")))).texts == ("en", "de")
    with pytest.raises(RunFailed, match=r"a\.tsv: has no column 'fr' \(it has: id, de, en\)"):
        list(read_texts(["a.tsv"], [data], ("fr",)))


def test_parquet_gives_its_rows():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"source": ["a", None, "c"], "target": ["1", "2", "3"]}), sink)
    data = sink.getvalue().to_pybytes()
    found = list(read_texts(["a.parquet"], [data], ("source", "target")))
    assert [line.texts for line in found] == [("a", "1"), ("", "2"), ("c", "3")]
    assert bad(found) == {2: "is empty"}
    for broken in (data[: len(data) // 2], b"PAR1"):
        with pytest.raises(RunFailed, match=r"a\.parquet: is not a complete Parquet file"):
            list(read_texts(["a.parquet"], [broken], ("source", "target")))


def test_damaged_files_of_a_parallel_corpus(shared: Path):
    folder = shared / "data/text/damaged"

    def read(name: str) -> bytes:
        return (folder / name).read_bytes()

    found = list(read_pairs(("en", "ja"), (read("empty_lines.en"), read("empty_lines.ja"))))
    assert sorted(bad(found)) == list(range(1, 101, 7))
    assert sorted(bad(read_lines("bad", read("bad_utf8.ja")))) != []
    with pytest.raises(RunFailed, match="en has 100 lines, but ja has 97"):
        list(read_pairs(("en", "ja"), (read("count_mismatch.en"), read("count_mismatch.ja"))))
