"""`slimray micronet`: the published score, and one sentence for networks without a score."""

import json
import sys

import pytest

from slimray.cli import main


def command(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["slimray", "micronet", *arguments])
    try:
        main.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_submission_is_told_part_by_part(monkeypatch, capsys):
    assert command(monkeypatch, "submitted") == 0
    text = capsys.readouterr().out
    assert "score 0.0387481" in text
    assert "layers.7.fc2" in text
    assert command(monkeypatch, "--all-heads", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["score"] == pytest.approx(0.0393244, rel=1e-6)
    assert {row["name"] for row in told["terms"]} >= {"cache", "words.2", "softmax.clusters"}


def test_a_run_that_is_not_there_is_one_sentence(monkeypatch, capsys, tmp_path):
    assert command(monkeypatch, "nothing", "--storage", str(tmp_path)) == 2
    assert "nothing" in capsys.readouterr().err
