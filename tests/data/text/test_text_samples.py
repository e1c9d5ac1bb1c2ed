"""Text as stored by `prepare` and as seen by networks: pairs, windows of a stream, lines left out."""

import dataclasses
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from slimray import storage
from slimray.data.cards import Card
from slimray.data.conversion import Made, Raw
from slimray.data.index import index_table
from slimray.data.lists import read_split
from slimray.data.modalities import MODALITIES
from slimray.data.spec import DataSpec
from slimray.data.text import samples
from slimray.data.text.conversion import convert_text, learn_vocabulary
from slimray.data.text.samples import TextRecipe, load_text, raw_texts
from slimray.data.text.spec import PreparedText, TextSpec
from slimray.data.text.vocabulary import EOS, PAD, vocabulary_of
from slimray.spec import RunFailed, UserError, parse
from slimray.verbs import prepare

DISK = pafs.LocalFileSystem()
WORDS = {"tokenizer": "words", "vocab_size": 100}


def card(sides: int, splits: dict[str, Any], **fields: Any) -> Card:
    document = {"name": "mine", "layout": "texts", "sample": "text", "labels": "none", "sides": sides}
    return parse(Card, document | {"splits": splits} | fields, "mine.yaml")


class Prepared:
    """Result of the task of one chunk, without Ray."""

    def __init__(self, card: Card, split: str, root: Path, **text: Any):
        document = {"card": card.model_dump(exclude_none=True), "root": str(root)}
        fields = {"kind": "prepare", "name": "x", "data": document, "text": {**WORDS, **text}}
        job = parse(prepare.PrepareJob, fields, "x.yaml")
        assert job.text is not None
        self.vocabulary = learn_vocabulary(card, str(root), job.text)
        table = read_split(card, split, str(root))
        chunk = prepare._Chunk(split, 0, 0, table.num_rows)
        out = root / "out"
        work = prepare._Work(str(out), str(root), card, job.data, None, 30, job.text, self.vocabulary)
        part: dict[str, Any] = {"rows": [], "bad": [], "left_out": [], "bytes_in": 0, "bytes_out": 0, "psnr": []}
        prepare._convert(work, chunk, table.to_pylist(), part, DISK, str(out))
        self.root, self.rows, self.tried = f"{out}/data", index_table(part["rows"]).to_pylist(), part["tried"]
        self.bad = {item["path"]: item["reason"] for item in part["bad"]}
        self.left_out = {item["path"]: item["reason"] for item in part["left_out"]}

    def words(self, tokens: Any) -> str:
        return vocabulary_of(self.vocabulary).decode(tokens)


def test_pairs_are_stored_with_the_numbers_of_their_lines_and_what_is_no_pair_is_left_out(tmp_path):
    source = "a b c\n\nb\na b c d e f g h\nc a\nB c\n"
    target = "x y\nx\ny x z\nx\nz z z z z\nz Y"
    (tmp_path / "t.en.gz").write_bytes(gzip.compress(source.encode()))
    (tmp_path / "t.de").write_text(target)
    pairs = card(2, {"train": ["t.en.gz", "t.de"], "val": ["t.en.gz", "t.de"]})
    made = Prepared(pairs, "train", tmp_path, max_tokens=7, max_ratio=2.4, lower=True)
    assert [row["path"] for row in made.rows] == [f"t.en.gz#{number}" for number in (1, 6)]
    assert [row["frames"] for row in made.rows] == [4, 3]
    assert list(made.bad) == ["t.en.gz#2"]
    assert made.bad["t.en.gz#2"].endswith("t.en.gz: is empty")
    assert made.left_out == {
        "t.en.gz#3": "one side is more than 2.4 times as long as the other",
        "t.en.gz#4": "has 9 tokens, text.max_tokens is 7",
        "t.en.gz#5": "one side is more than 2.4 times as long as the other",
    }
    assert made.tried == 6
    recipe = TextRecipe(2, 8, 100, made.vocabulary)
    (sample, wanted) = load_text(made.rows[1], made.root, recipe, (0, 0, 0), 30)
    assert (sample.shape, sample.dtype, wanted.dtype) == ((1, 2, 3), np.int32, np.int64)
    assert (made.words(sample[0, 0]), made.words(wanted)) == ("b c", "z y")
    assert (sample[0, 0, -1], sample[0, 1, 0], wanted[-1]) == (EOS, EOS, EOS)
    assert sample[0, 1, 1:].tolist() == wanted[:-1].tolist()
    assert raw_texts(made.root, made.rows) == [("a b c", "x y"), ("B c", "z Y")]  # as they were written
    judged = Prepared(pairs, "val", tmp_path, max_tokens=4)
    assert [row["frames"] for row in judged.rows] == [4, 4, 4, 4, 3]
    sample, wanted = load_text(judged.rows[2], judged.root, recipe, (0, 0, 0), 30)
    assert judged.words(sample[0, 0]) == "a b c"  # cut, and its translation is whole in the text
    assert raw_texts(judged.root, judged.rows[3:4]) == [("c a", "z z z z z")]


def test_a_pair_of_unequal_sides_is_filled_up():
    sample, wanted = samples.pair_arrays(np.array([7, 8, 9], np.int32), np.array([5], np.int32))
    assert sample.tolist() == [[[7, 8, 9, EOS], [EOS, 5, PAD, PAD]]]
    assert wanted.tolist() == [5, EOS, PAD, PAD]
    alone, _ = samples.pair_arrays(np.array([7], np.int32), None)
    assert alone.tolist() == [[[7, EOS], [EOS, PAD]]]


def test_windows_predict_every_token_of_a_stream_once(tmp_path):
    words = [f"w{number}" for number in range(43)]
    lines = [words[:10], [], words[10:12], words[12:43]]
    (tmp_path / "t.txt").write_text("\n".join(" ".join(line) for line in lines) + "\n")
    plain = card(1, {"train": "t.txt", "val": "t.txt"})
    stream = " ".join([*words[:10], "#", *words[10:12], "#", *words[12:43], "#"])
    made = Prepared(plain, "train", tmp_path, length=8, stream=20)
    assert (len(made.rows), made.bad) == (6, {})
    assert [row["frames"] for row in made.rows] == [8, 8, 8, 8, 8, 6]

    def text(rows: list[dict[str, Any]], recipe: TextRecipe, epoch: int) -> str:
        wanted = [load_text(row, made.root, recipe, (3, epoch, n), 30)[1] for n, row in enumerate(rows)]
        return " ".join(made.words([t]) or "#" for t in np.concatenate(wanted) if t != PAD)

    judged = TextRecipe(1, 8, 100, made.vocabulary, mode="val")
    assert text(made.rows, judged, 0) == stream
    first, _ = load_text(made.rows[0], made.root, judged, (0, 0, 0), 30)
    assert (first.shape, first[0, 0]) == ((1, 9), EOS)
    starts = {text(made.rows, TextRecipe(1, 8, 100, made.vocabulary), epoch) for epoch in range(30)}
    assert len(starts) > 4
    assert all(stream.endswith(one) and len(one.split()) > 46 - 8 for one in starts)
    other = Prepared(plain, "val", tmp_path, length=8, stream=20)
    assert [row["frames"] for row in other.rows] == [20, 20, 6]
    made = other
    assert text(other.rows, TextRecipe(1, 20, 100, other.vocabulary, mode="val"), 0) == stream


@pytest.mark.parametrize("stored", [256, 4096])
@pytest.mark.parametrize(
    "trained", [{"length": 256}, {"length": 4096}, {"length": 999}, {"length": 4096, "mode": "train"}]
)
def test_an_evaluation_counts_every_token_once_whatever_the_network_was_trained_on(tmp_path, stored, trained):
    stream = list(range(9001))
    (tmp_path / "t.txt").write_text(" ".join(f"w{number}" for number in stream))
    made = Prepared(card(1, {"train": "t.txt", "val": "t.txt"}), "val", tmp_path, vocab_size=9999, stream=stored)
    recipe = TextRecipe(1, vocab_size=9005, tokenizer=made.vocabulary, **{"mode": "val", **trained})
    plain = MODALITIES["text"].view_recipe(recipe.to_dict(), {})
    judged = TextRecipe.from_dict(plain)
    samples = [load_text(row, made.root, judged, (0, 0, n), 30) for n, row in enumerate(made.rows)]
    wanted = made.words(token for _, targets in samples for token in targets)
    assert wanted == (tmp_path / "t.txt").read_text()
    assert [len(targets) for _, targets in samples] == [row["frames"] for row in made.rows]
    assert (samples[0][0][0, 0], samples[-1][1][-1]) == (EOS, EOS)


def test_a_window_is_stored_with_the_next_one_for_training_only(tmp_path):
    (tmp_path / "t.txt").write_text("a b c d e f g h i j " * 4)
    plain = card(1, {"train": "t.txt", "val": "t.txt"})
    held = {}
    for split in ("train", "val"):
        made = Prepared(plain, split, tmp_path, length=8)
        table = pq.read_table(f"{made.root}/{made.rows[0]['shard']}")
        held[split] = [len(tokens) for tokens in table.column("tokens").to_pylist()]
    assert held == {"train": [17, 17, 17, 17, 10, 2], "val": [9, 9, 9, 9, 9, 2]}
    text = {"tokenizer": "words:", "vocab_size": 9, "lengths": {"train": 8, "val": 8}}
    prepared = plain.model_copy(update={"text": PreparedText.model_validate(text)})
    for split, mode in (("train", "train"), ("val", "val")):  # training on another split reads it as it was cut
        data = DataSpec.model_validate({"run": "x", "train": split, "val": None})
        assert MODALITIES["text"].make_recipe(data, prepared, 0, "train")["mode"] == mode


def test_a_long_file_becomes_several_shards(tmp_path, monkeypatch):
    (tmp_path / "t.tsv").write_text("".join(f"a{n}\tb{n}\n" for n in range(25)))
    small = dataclasses.replace(MODALITIES["text"], rows_per_shard=10)
    monkeypatch.setitem(MODALITIES, "text", small)
    made = Prepared(card(2, {"train": "t.tsv"}), "train", tmp_path)
    assert [row["row"] for row in made.rows] == [*range(10), *range(10), *range(5)]
    assert len({row["shard"] for row in made.rows}) == 3
    for number, row in enumerate(made.rows):
        assert raw_texts(made.root, [row]) == [(f"a{number}", f"b{number}")]


def test_files_that_do_not_fit_are_a_sentence(tmp_path):
    (tmp_path / "a.en").write_text("a\nb\n")
    (tmp_path / "a.de").write_text("a\n")
    with pytest.raises(RunFailed, match=r"a\.en has 2 lines, but .*a\.de has 1"):
        Prepared(card(2, {"train": ["a.en", "a.de"]}), "train", tmp_path)
    with pytest.raises(UserError, match=r"splits\.train: a\.en has no partner: write \[SOURCE, TRANSLATION\]"):
        read_split(card(2, {"train": "a.en"}), "train", str(tmp_path))
    with pytest.raises(UserError, match=r"a\.fr: no such file, gzipped or not \(split 'train' of mine\)"):
        read_split(card(2, {"train": ["a.en", "a.fr"]}), "train", str(tmp_path))
    with pytest.raises(RunFailed, match="has no split 'train'"):
        Prepared(card(2, {"val": ["a.en", "a.en"]}), "val", tmp_path)


@pytest.mark.parametrize(("named", "stored"), [(".gz", ""), ("", ".gz")])
def test_a_file_is_found_packed_by_gzip_or_not_whatever_the_card_says(tmp_path, named, stored):
    for name, text in (("t.en", "a b\nc\n"), ("t.de", "x\ny z\n")):
        data = text.encode()
        (tmp_path / f"{name}{stored}").write_bytes(gzip.compress(data) if stored else data)
    pairs = card(2, {"train": [f"t.en{named}", f"t.de{named}"]})
    made = Prepared(pairs, "train", tmp_path)
    assert [row["path"] for row in made.rows] == [f"t.en{stored}#{number}" for number in (1, 2)]
    assert raw_texts(made.root, made.rows) == [("a b", "x"), ("c", "y z")]
    (tmp_path / f"t.de{named}").write_bytes(b"")
    with pytest.raises(UserError, match=r"splits\.train: t\.de and t\.de\.gz both exist: move one of them away"):
        read_split(pairs, "train", str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"labels": "sample"}, "labels: must be none for sample: text"),
        ({"layout": "files"}, "layout: must be texts"),
        ({"text_columns": ["a"]}, "text_columns: must be 2, as many as sides"),
        ({"sample": "image"}, "sample: must be text for layout texts"),
    ],
)
def test_cards_that_do_not_fit_are_a_sentence(fields, reason):
    with pytest.raises(UserError, match=reason):
        card(2, {"train": ["a", "b"]}, **fields)


def test_the_recipe_of_a_card_and_its_plain_form():
    assert TextRecipe.from_dict({**TextRecipe(1, 9).to_dict(), "beam": 4}) == TextRecipe(1, 9)
    with pytest.raises(UserError, match="the tokenizer is damaged"):
        _ = TextRecipe().vocabulary


def test_texts_and_their_shards_may_lie_in_a_bucket(bucket):
    where = bucket("corpus")
    fs, folder = storage.open_uri(where)
    storage.write_atomic(fs, f"{folder}/t.en", b"a b\nc\n")
    storage.write_atomic(fs, f"{folder}/t.de.gz", gzip.compress(b"x\ny z\n"))
    pairs = card(2, {"train": ["t.en", "t.de.gz"]})
    assert read_split(pairs, "train", where).column("path").to_pylist() == ["t.en"]
    spec = TextSpec.model_validate(WORDS)
    vocabulary = learn_vocabulary(pairs, where, spec)
    raw = Raw(where, pairs, None, 1, 0, text=spec, vocabulary=vocabulary)
    made = [one for one in convert_text(raw, {"path": "t.en", "split": "train"}, None) if isinstance(one, Made)]
    samples.write_text_shard(fs, f"{folder}/shards/0.parquet", [{"path": one.path, "data": one.data} for one in made])
    rows = [{"path": one.path, "shard": "shards/0.parquet", "row": n} for n, one in enumerate(made)]
    sample, _ = load_text(rows[1], where, TextRecipe(2, 8, 99, vocabulary), (0, 0, 0), 30)
    assert vocabulary_of(vocabulary).decode(sample[0, 0]) == "c"
    assert raw_texts(where, rows) == [("a b", "x"), ("c", "y z")]
    with pytest.raises(FileNotFoundError, match=r"shards/1\.parquet"):
        load_text({**rows[0], "shard": "shards/1.parquet"}, where, TextRecipe(2, 8, 99, vocabulary), (0, 0, 0), 30)
