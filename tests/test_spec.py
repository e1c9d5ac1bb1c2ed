"""What users write: YAML is read safely, and every mistake is one sentence with file, field and next step."""

import contextlib
import os
from typing import Literal

import pytest
from pydantic import ConfigDict, Field

from slimray import spec
from slimray.spec import (
    RunFailed,
    Spec,
    UserError,
    did_you_mean,
    dump_yaml,
    located,
    noting,
    parse,
    parse_yaml,
    read_yaml,
    set_value,
)


class Inner(Spec):
    """A section."""

    lr: float = Field(0.1, gt=0)
    """Rate."""
    steps: tuple[float, ...] = ()
    """Steps."""


class Source(Spec):
    """A section with a field of another name in YAML."""

    model_config = ConfigDict(populate_by_name=True)

    source: str = Field(alias="from")


class Outer(Spec):
    """A document."""

    name: str
    """Name."""
    workers: int = Field(1, ge=1, le=1000)
    norm: Literal["local", "sync"] = "local"
    weights: tuple[float, ...] | Literal["balanced"] | None = None
    card: str | dict[str, int] | None = None
    inner: Inner = Inner()
    init: Source | None = None


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({}, "x.yaml: name: is required"),
        ({"name": 5}, "x.yaml: name: must be a valid string (got 5)"),
        ({"name": "a", "worker": 2}, "x.yaml: worker: unknown field, did you mean 'workers'?"),
        ({"name": "a", "workers": 0}, "x.yaml: workers: must be >= 1 (got 0)"),
        ({"name": "a", "workers": 1001}, "x.yaml: workers: must be <= 1000 (got 1001)"),
        ({"name": "a", "workers": "many"}, "x.yaml: workers: must be a valid integer (got 'many')"),
        ({"name": "a", "norm": "snyc"}, "x.yaml: norm: must be 'local' or 'sync' (got 'snyc')"),
        ({"name": "a", "inner": {"lr": 0}}, "x.yaml: inner.lr: must be > 0 (got 0)"),
        ({"name": "a", "inner": {"lrr": 1}}, "x.yaml: inner.lrr: unknown field, did you mean 'lr'?"),
        ({"name": "a", "inner": 7}, "x.yaml: inner: must be a section of fields (got 7)"),
        ({"name": "a", "inner": {"steps": 7}}, "x.yaml: inner.steps: must be a list (got 7)"),
        ({"name": "a", "inner": {"steps": [1, "x"]}}, "x.yaml: inner.steps.1: must be a valid number (got 'x')"),
        ({"name": "a", "inner": {"lr": float("nan")}}, "x.yaml: inner.lr: must be a finite number (got nan)"),
        ({"name": "a", "weights": "all"}, "x.yaml: weights: must be a list or must be 'balanced' (got 'all')"),
        ({"name": "a", "card": 5}, "x.yaml: card: must be a valid string or must be a mapping (got 5)"),
        ({"name": "a", "init": {}}, "x.yaml: init.from: is required"),
        ({"name": "a", "init": {"from": "b", "fron": "c"}}, "x.yaml: init.fron: unknown field, did you mean 'from'?"),
    ],
)
def test_a_wrong_field_is_one_sentence(document, sentence):
    with pytest.raises(UserError) as caught:
        parse(Outer, document, "x.yaml")
    assert str(caught.value) == sentence


def test_a_wrong_item_of_a_list_is_not_told_a_second_time_as_a_list_too_short():
    class Several(Spec):
        """A list that is not empty."""

        items: tuple[Inner, ...] = Field(min_length=1)
        """Sections."""

    with pytest.raises(UserError) as error:
        parse(Several, {"items": [{"lr": -1}]}, "x.yaml")
    assert str(error.value) == "x.yaml: items.0.lr: must be > 0 (got -1)"
    with pytest.raises(UserError, match=r"x\.yaml: items: must have at least 1 item"):
        parse(Several, {"items": []}, "x.yaml")


def test_all_wrong_fields_are_told_at_once():
    with pytest.raises(UserError) as caught:
        parse(Outer, {"workers": 0, "inner": {"lr": "fast"}}, "x.yaml")
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["name", "workers", "inner.lr"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("kind: train\n\tname: x\n", "x.yaml: line 2: a tab: indent YAML with spaces only"),
        ("a: [1, 2\nb: 3\n", "x.yaml: line 2: expected ',' or ']', but got ':'"),
        ("a: 1\na: 2\n", "x.yaml: line 2: 'a' is written twice"),
        ("b: {a: 1, a: 2}\n", "x.yaml: line 1: 'a' is written twice"),
        ("- a\n", "x.yaml: each document must be a mapping of names to values"),
        ("hello\n", "x.yaml: each document must be a mapping of names to values"),
        ("5: a\n", "x.yaml: each document must be a mapping of names to values"),
        ("a: b\0\n", "x.yaml: not valid YAML (unacceptable character #x0000: special characters are not allowed)"),
        ("a: " + "[" * 5000, "x.yaml: not valid YAML (maximum recursion depth exceeded"),
        ("a: !!python/name:os.system\n", "x.yaml: line 1: could not determine a constructor for the tag"),
        ("a: " + "x" * 1_000_001, "x.yaml: larger than 1000000 bytes, too large for a job or card"),
        ("a: &a 1\nb: [" + "*a, " * 51 + "]\n", "x.yaml: line 2: more than 50 aliases"),
        ("a: &a [*a]\n", "x.yaml: its aliases expand to more than 100000 values"),
    ],
)
def test_yaml_that_is_none_is_one_sentence_with_the_line(text, sentence):
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "x.yaml")
    assert str(caught.value).startswith(sentence)


def test_bombs_of_aliases_and_of_merges_do_not_go_off():
    aliases = "a0: &a0 [x, x, x, x, x, x, x, x]\n"
    merges = "a0: &a0 {k: 1, l: 2}\n"
    for i in range(12):
        aliases += f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}, *a{i}, *a{i}]\n"
    for i in range(24):
        merges += f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}], k{i}: 1}}\n"
    with pytest.raises(UserError, match="its aliases expand to more than 100000 values"):
        parse_yaml(aliases, "x.yaml")
    with contextlib.suppress(UserError):  # PyYAML of 2026 merges a key once, older ones are stopped by us
        assert len(parse_yaml(merges, "x.yaml")[0]["a24"]) == 26


def test_anchors_and_merges_that_a_person_writes_are_read():
    text = "x: &x {one: 0, two: 1}\na: {inner: &b {<<: *x, one: 1}}\nd: {<<: *b, two: 2}\n"
    found = parse_yaml(text, "x.yaml")[0]
    assert found["a"]["inner"] == {"one": 1, "two": 1}
    assert found["d"] == {"one": 1, "two": 2}


def test_documents_are_read_in_order_and_empty_ones_left_out():
    assert parse_yaml("\ufeff---\n---\na: 1e-3\n---\nb: 5.E+2\n---\n", "x.yaml") == [{"a": 0.001}, {"b": 500.0}]
    assert parse_yaml("", "x.yaml") == []


def test_what_is_dumped_reads_back_equal():
    document = {"lr": 1e-05, "text": "1e-3", "none": None, "yes": "yes", "list": [1, [2.5, True]], "ä": "ö: #"}
    assert parse_yaml(dump_yaml(document), "x.yaml") == [document]
    shared = [1, 2]
    assert "*" not in dump_yaml({"a": shared, "b": shared})


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "x.yaml").write_bytes("kind: train".encode("utf-16"))
    for path, reason in (
        ("gone.yaml", "no such file"),
        (".", "cannot be read (is a directory)"),
        ("x.yaml", "is not UTF-8 text (byte 0)"),
    ):
        with pytest.raises(UserError) as caught:
            read_yaml(tmp_path / path)
        assert str(caught.value) == f"{tmp_path / path}: {reason}"
    with pytest.raises(UserError, match="/dev/zero: larger than 1000000 bytes"):
        read_yaml("/dev/zero")


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("optim.lr=0.5", {"optim": {"lr": 0.5}}),
        ("optim.lr=1e-3", {"optim": {"lr": 0.001}}),
        ("optim.steps=[1, 2]", {"optim": {"lr": 0.1, "steps": [1, 2]}}),
        ("optim.steps=[1, 2", {"optim": {"lr": 0.1, "steps": "[1, 2"}}),
        ("data.root=/a=b", {"optim": {"lr": 0.1}, "data": {"root": "/a=b"}}),
        ("init.from=x", {"optim": {"lr": 0.1}, "init": {"from": "x"}}),
        ("optim=null", {"optim": None}),
        ("name=", {"optim": {"lr": 0.1}, "name": ""}),
        ("name=" + "[" * 5000, {"optim": {"lr": 0.1}, "name": "[" * 5000}),
    ],
)
def test_set_takes_any_yaml_value(assignment, expected):
    document = {"optim": {"lr": 0.1}, "init": None}
    set_value(document, assignment)
    assert document == {"init": None} | expected


@pytest.mark.parametrize("assignment", ["optim", "optim.lr", "=3", "optim.=3", ".lr=3", "optim..lr=3"])
def test_set_without_field_or_value_says_how_it_looks(assignment):
    with pytest.raises(UserError, match=r"must look like section\.field=value"):
        set_value({"optim": {"lr": 0.1}}, assignment)


def test_set_into_a_value_is_refused():
    with pytest.raises(UserError, match=r"--set optim\.lr\.x=3: 'lr' is a value and has no fields"):
        set_value({"optim": {"lr": 0.1}}, "optim.lr.x=3")


def test_the_closest_name_is_offered_else_all():
    assert did_you_mean("trian", ["train", "evaluate"]) == ", did you mean 'train'?"
    assert did_you_mean("foo", ["train", "evaluate"]) == " (known: evaluate, train)"
    assert did_you_mean("foo", []) == " (known: none)"


def test_problems_are_collected_with_the_file_in_front_once():
    problems: list[str] = []
    for text in ("a: is wrong", "x.yaml (b): c: is wrong", "d: no\ne: no"):
        with noting(problems, "x.yaml (b)"):
            raise UserError(text)
    with noting(problems, "x.yaml"):
        pass
    assert problems == [f"x.yaml (b): {text}" for text in ("a: is wrong", "c: is wrong", "d: no", "e: no")]
    assert located("x.yaml: a", "x.yaml") == "x.yaml: a"
    assert issubclass(spec.RunFailed, Exception)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: !!bool maybe", "x.yaml: line 1: 'maybe' is not a value of !!bool"),
        ("a: !!int ''", "x.yaml: line 1: '' is not a value of !!int"),
        ("a: !!float .", "x.yaml: line 1: '.' is not a value of !!float"),
        ("b: 1\na: !!timestamp x", "x.yaml: line 2: 'x' is not a value of !!timestamp"),
        ("a: 2024-13-45", "x.yaml: line 1: '2024-13-45' is not a value of !!timestamp"),
        ("a: " + "9" * 400, "x.yaml: line 1: a number of more than 100 characters"),
        ("a: " + "1:" * 50_000 + "1", "x.yaml: line 1: a number of more than 100 characters"),
        ('a: [{b: "\\ud800"}]', r"x.yaml: '\ud800' contains half a character"),
        ('"\\udfff": 1', r"x.yaml: '\udfff' contains half a character"),
    ],
)
def test_values_that_yaml_cannot_make_are_one_sentence(text, sentence):
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "x.yaml")
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_a_pipe_is_read_and_one_that_nobody_writes_is_given_up(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.write(writing, b"a: 1\n")
    os.close(writing)
    assert read_yaml(f"/dev/fd/{reading}") == [{"a": 1}]
    os.close(reading)
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(spec, "PIPE_PATIENCE_S", 0.2)
    with pytest.raises(UserError, match="it is a pipe that has delivered nothing"):
        read_yaml(tmp_path / "pipe")


def test_a_path_that_cannot_be_one_is_one_sentence():
    for path in ("a\0b", "x" * 5000, "/nowhere/\udcff"):
        with pytest.raises(UserError) as caught:
            read_yaml(path)
        assert str(caught.value).isprintable()


def test_messages_hold_neither_credentials_nor_control_characters():
    for kind in (UserError, RunFailed):
        said = str(kind("https://me:hunter2@host/x: \x1b[31mred\x1b[0m \udcff\nsecond line"))
        assert said == "https://***@host/x: \\x1b[31mred\\x1b[0m \\udcff\nsecond line"


@pytest.mark.parametrize(
    "value",
    ["https://host/w.pth?token=hunter2", "s3://id:hunter2/a@bucket/x", "ghp_" + "hunter2" * 4, "PGPASS=hunter2"],
)
def test_a_credential_in_what_a_user_writes_is_refused_with_its_field_and_not_shown(value):
    with pytest.raises(UserError) as caught:
        parse(Outer, {"name": "a", "init": {"from": value}}, "x.yaml")
    assert str(caught.value).startswith("x.yaml: init.from: holds what looks like a secret (")
    assert "hunter2" not in str(caught.value)
