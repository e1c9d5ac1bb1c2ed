"""`slimray predict` on texts: one answer per line as lines arrive, reasons on stderr, foreign options refused."""

import gzip
import io
import json
import sys
from typing import Any

import pytest
import safetensors.torch
from tests.cli.test_cli import shell  # noqa: F401 a fixture
from tests.tasks.test_text_tasks import network

from slimray import runs
from slimray.cli import texts
from slimray.data.samples import BadSample
from slimray.runtime.inputs import Input


def finished(name: str, task: str, model: str, sides: int, **options: Any) -> None:
    """Write a run that holds a small untrained network."""
    net, run = network(task, model, sides, **options), runs.open_run("runs", name)
    runs.begin(run, {"kind": "train", "name": name}, 1)
    taken = {"recipe": net.recipe, "pixels": vars(Input()), "classes": [], "task": task}
    runs.write_model(run, safetensors.torch.save(net.net.state_dict()), net.model, taken)
    runs.end(run, "finished")


@pytest.fixture
def translator(shell):  # noqa: F811
    small = {"embed": 16, "qkv": 16, "ffn": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    finished("net", "translate", "transformer", 2, **small)
    return shell


def test_each_line_has_an_answer_and_what_has_none_is_told(translator, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a b\n\nb c a b c d e a\nc\xff\nc a")
    done = translator("predict", "net", "a.txt")
    assert done.code == 2
    said = done.out.split("\n")
    assert (len(said), said[1], said[2], said[3]) == (6, "", "", "")
    assert {*said[0].split(), *said[4].split()} <= {*"abcde", "<unk>"}
    assert done.err.splitlines() == [
        "a.txt line 3: has 9 tokens, but the network was trained on at most 6: split it",
        "a.txt line 4: is not UTF-8 (byte 1)",
        "2 lines or files could not be answered; the reasons are above",
    ]


def test_how_a_translation_is_searched_may_be_said(translator, tmp_path):
    (tmp_path / "a.txt").write_text("a b\nc a\n")
    short = translator("predict", "net", "a.txt", "--set", "beam=1", "--set", "max_length=2")
    assert short.code == 0, short.err
    assert all(len(line.split()) <= 2 for line in short.out.splitlines())
    assert short.out != translator("predict", "net", "a.txt").out
    for assignment, said in (("beam=0", "--set: beam: "), ("beams=2", "did you mean 'beam'")):
        done = translator("predict", "net", "a.txt", "--set", assignment)
        assert done.code == 2
        assert said in done.err


def test_gzip_the_standard_input_and_json(translator, tmp_path, monkeypatch):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"a b\nc a\n"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a b\nc a\n")))
    typed, plain = translator("predict", "net", "-"), translator("predict", "net", "a.gz")
    assert (typed.code, typed.out, typed.err) == (0, plain.out, "")
    rows = translator("predict", "net", "a.gz", "gone.txt", "--json")
    found = json.loads(rows.out)
    assert [row["line"] for row in found] == [1, 2, 0]
    assert "\n".join(row["answer"] for row in found[:2]) == plain.out.strip("\n")
    assert found[2]["reason"] == "no such file or directory"
    assert rows.code == 2


def test_files_that_are_no_text_are_a_sentence(translator, tmp_path):
    (tmp_path / "wide.txt").write_bytes("a b\n".encode("utf-16"))
    whole = gzip.compress(b"a b\n" * 900)
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    done = translator("predict", "net", "wide.txt", "cut.gz", ".")
    assert done.code == 2
    assert "wide.txt: is UTF-16: convert it to UTF-8" in done.err
    assert "cut.gz: the gzip file is truncated after line" in done.err
    assert ".: is a directory" in done.err
    for option in (["--columns", "x y z"], ["--shape", "1"], ["--out", "here"]):
        refused = translator("predict", "net", "wide.txt", *option)
        assert (refused.code, "do not apply to text" in refused.err) == (2, True)


def test_a_language_model_goes_on(shell, tmp_path):  # noqa: F811
    finished("speaker", "language", "micronet_lm", 1, preset="tiny")
    (tmp_path / "a.txt").write_text("a b\n")
    done = shell("predict", "speaker", "a.txt")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("a b")


def test_lines_are_answered_as_they_come(tmp_path, capsys):
    asked: list[str] = []

    def answer(text: str) -> str:
        asked.append(capsys.readouterr().out)
        if text == "bad":
            raise BadSample("is bad")
        return text.upper()

    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    texts.answer_lines(answer, [tmp_path / "a.txt"], False)
    assert asked == ["", "ONE\n", "TWO\n"]
