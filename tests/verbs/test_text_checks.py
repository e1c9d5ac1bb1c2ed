"""Jobs on texts are checked before machines are requested: one sentence for each mistake."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from slimray import job, runs
from slimray.data.cards import Card
from slimray.data.text.samples import TextRecipe
from slimray.data.text.vocabulary import train_vocabulary
from slimray.spec import UserError, parse
from slimray.tasks import TASKS
from slimray.verbs import checks, evaluate, prepare
from slimray.verbs.context import CheckContext, Context
from slimray.verbs.inputs import Splits
from slimray.verbs.prepare import PrepareJob

JOB = """
kind: prepare
name: tokens
data:
  card: {{name: mine, layout: texts, sample: text, labels: none, sides: 2, task: translate,
    splits: {{train: [a.en, a.de], val: [a.en, a.de]}}}}
  root: {root}
text: {{vocab_size: 30}}
---
kind: train
name: net
data: {{run: tokens, task: {{beam: 2}}}}
model: {{name: transformer, embed: 8, qkv: 8, ffn: 8, heads: 2, encoder_layers: 1, decoder_layers: 1}}
batch: {{tokens: 400, per_worker_tokens: 200}}
optim: {{optimizer: adam, lr: 0.001, reference_batch: 400, epochs: 1, groups: plain}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name in ("a.en", "a.de"):
        (tmp_path / name).write_text("a b c\nb\n")
    (tmp_path / "job.yaml").write_text(JOB.format(root=tmp_path))
    return tmp_path / "job.yaml"


def problems(file: Path, *sets: str) -> list[str]:
    known = job.check(job.load([str(file)], list(sets)), str(file.parent / "runs"))
    return [sentence for one in known for sentence in one.get("problems", [])]


def test_a_job_on_texts_is_right(file):
    known = job.check(job.load([str(file)]), str(file.parent / "runs"))
    assert not problems(file)
    assert (known[1]["batch"], known[1]["accumulation"]) == (400, 2)
    assert "steps" not in known[1]
    counted = ["net:optim={optimizer: adam, lr: 0.001, reference_batch: 400, steps: 70, groups: plain}"]
    known = job.check(job.load([str(file)], counted), str(file.parent / "runs"))
    assert known[1]["steps"] == 70
    assert "epochs" not in known[1]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("net:model={name: tsm_resnet18}", "model.name: tsm_resnet18 takes clips, the dataset has texts"),
        (
            "net:model={name: micronet_lm}",
            "micronet_lm takes plain texts (sides: 1), the dataset has texts with translations (sides: 2)",
        ),
        ("net:model.vocab_size=9", "model.vocab_size: is not an option here"),
        ("net:optim.class_weights=[1,2]", "optim.class_weights: are for classes, not for translate"),
        ("net:checkpoint.best_metric=val/top1", "checkpoint.best_metric: the task translate has no 'val/top1'"),
        ("net:data.task.beams=2", "data.task.beams: unknown field, did you mean 'beam'?"),
        ("tokens:pack={}", "pack: is for clips and images, mine has texts"),
    ],
)
def test_what_texts_do_not_have_is_a_sentence(file, setting, sentence):
    assert any(sentence in one for one in problems(file, setting)), problems(file, setting)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["net:scale.workers=3"], "batch.tokens: 400 leaves some of 3 workers without work"),
        (["net:batch.per_worker_tokens=300"], "batch.tokens: 400 must be a multiple of per_worker_tokens"),
        (["net:optim.precise_norm=100"], "optim.precise_norm: counts samples and cannot be combined with batch.tokens"),
        (["tokens:text.tokenizer=letters"], "text.tokenizer"),
    ],
)
def test_batches_that_do_not_fit_are_refused_at_once(file, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        job.load([str(file)], settings)


def test_a_tokenizer_is_trained_on_split_train(file):
    name = "tokens:data.card.splits={test: [a.en, a.de]}"
    assert any("data.card: mine has no split 'train' to train a tokenizer on: write text.like" in one
               for one in problems(file, name))  # fmt: skip
    prepared(file.parent, {"train": 9})
    runs.write_file(runs.open_run(str(file.parent / "runs"), "tokens"), "data/tokenizer.txt", b"words:abc")
    (file.parent / "like.yaml").write_text(yaml.safe_dump(like(file.parent).model_dump(mode="json")))
    assert not problems(file.parent / "like.yaml", "data.card.splits={test: [a.en, a.de]}")


def test_what_translations_are_scored_with_is_missed_before_they_are_made(file, monkeypatch):
    file.write_text(file.read_text() + "---\nkind: evaluate\nname: scored\nruns: [net]\n")
    assert not problems(file)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)  # as if it were not installed
    said = problems(file)
    assert any("the task translate needs sacrebleu, not installed here: pip install 'slimray[text]'" in s for s in said)
    with pytest.raises(UserError, match=r"x\.yaml: the task translate needs sacrebleu"):
        evaluate._require_modules("x.yaml", TASKS["translate"])
    evaluate._require_modules("x.yaml", TASKS["language"])


def test_images_have_no_tokens(tmp_path):
    text = """
kind: prepare
name: pictures
data: {card: image_shapes, clips: 20, size: 32}
text: {}
---
kind: train
name: net
data: {run: pictures, size: 32}
model: {name: resnet18, width: 0.125}
batch: {tokens: 400, per_worker_tokens: 200}
optim: {lr: 0.001, reference_batch: 400, epochs: 1}
"""
    (tmp_path / "job.yaml").write_text(text)
    said = problems(tmp_path / "job.yaml")
    assert any("batch.tokens: is for texts, image_shapes has images: write total" in one for one in said), said


def prepared(folder: Path, lengths: dict[str, int], **text: object) -> None:
    run = runs.open_run(str(folder / "runs"), "tokens")
    runs.begin(run, {"kind": "prepare", "name": "tokens"}, 1)
    card = {"name": "mine", "layout": "index", "sample": "text", "labels": "none", "sides": 2, "task": "translate",
            "splits": {"train": "train.parquet", "val": "val.parquet"},
            "text": {"tokenizer": "tokenizer.txt", "vocab_size": 30, "lengths": lengths, **text}}  # fmt: skip
    runs.write_file(run, "data/card.yaml", yaml.safe_dump(card).encode())
    runs.end(run, "finished")


def test_a_dataset_without_its_tokenizer_is_damaged(file):
    prepared(file.parent, {"train": 9})
    (file.parent / "train.yaml").write_text(JOB.format(root="x").split("---\n")[1])
    assert any(
        "its tokenizer is missing or damaged: run prepare again" in s for s in problems(file.parent / "train.yaml")
    )


def test_a_network_is_scored_on_its_own_tokens_only():
    text = {"tokenizer": "words:abc", "vocab_size": 9, "lengths": {"val": 5}}
    card = Card.model_validate({"name": "mine", "layout": "index", "sample": "text", "labels": "none", "sides": 2,
                                "splits": {"val": "val.parquet"}, "text": text})  # fmt: skip
    splits = Splits("", card, {})
    evaluate._require_tokens("x.yaml", "net", {"tokenizer": "words:abc"}, splits)
    with pytest.raises(UserError, match=r"runs: 'net' has another tokenizer than mine: prepare it with `text\.like`"):
        evaluate._require_tokens("x.yaml", "net", {"tokenizer": "words:abd"}, splits)
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate._require_tokens("x.yaml", "net", {"tokenizer": "words:abc", "lower": True}, splits)


LIKE = {"kind": "prepare", "name": "like", "text": {"like": "tokens"}}


def like(folder: Path, **text: object) -> PrepareJob:
    card = yaml.safe_load(JOB.format(root=folder).split("---")[0])["data"]
    return parse(PrepareJob, LIKE | {"data": card, "text": {**LIKE["text"], **text}}, "x.yaml")


def test_a_tokenizer_of_another_run_comes_with_its_lower_case(file):
    prepared(file.parent, {"train": 9}, lower=True)
    vocabulary = train_vocabulary(["a b c"], "words", 30).to_text()
    runs.write_file(runs.open_run(str(file.parent / "runs"), "tokens"), "data/tokenizer.txt", vocabulary.encode())
    made = like(file.parent)
    ctx = Context(runs.open_run(str(file.parent / "runs"), "like"), str(file.parent / "runs"), 1, "x", Console(), 1)
    card = Card.model_validate(made.data.card)
    made = prepare._with_text(made, ctx, card)
    assert prepare._learn(made, ctx, card, str(file.parent)) == vocabulary
    part = {"rows": [{"path": "a.en#1", "label": 0, "frames": 4, "shard": "shards/x.parquet", "row": 0}]}
    part |= {"bad": [], "left_out": [], "bytes_in": 1, "bytes_out": 1, "psnr": []}
    chunk = prepare._Chunk("val", 0, 0, 1)
    runs.write_file(ctx.run, f"data/parts/{prepare._part_name(chunk)}", json.dumps(part).encode())
    prepare._write_indexes(made, ctx, card, [chunk], str(file.parent), vocabulary)
    written = yaml.safe_load(runs.read_file(ctx.run, "data/card.yaml"))["text"]
    assert (written["lower"], written["vocab_size"]) == (True, 7)


@pytest.mark.parametrize("field", [{"tokenizer": "unigram"}, {"vocab_size": 8000}, {"lower": False}])
def test_what_the_other_run_says_of_its_tokenizer_is_not_said_again(file, field):
    with pytest.raises(
        UserError, match=rf"x\.yaml: text\.{next(iter(field))}: is taken from the run that `like` names"
    ):
        like(file.parent, **field)
    made = like(file.parent)
    assert parse(PrepareJob, made.model_dump(mode="json"), "x.yaml") == made  # a resolved job is a job again


def test_a_tokenizer_is_taken_from_a_run_that_is_there_and_holds_texts(file):
    (file.parent / "like.yaml").write_text(yaml.safe_dump(like(file.parent).model_dump(mode="json")))
    assert any("text.like: " in one for one in problems(file.parent / "like.yaml"))
    run = runs.open_run(str(file.parent / "runs"), "tokens")
    runs.begin(run, {"kind": "prepare", "name": "tokens"}, 1)
    shapes = {"name": "shapes", "layout": "index", "labels": "none", "splits": {"val": "val.parquet"}}
    runs.write_file(run, "data/card.yaml", yaml.safe_dump(shapes).encode())
    runs.end(run, "finished")
    assert any("text.like: 'tokens' holds no texts" in one for one in problems(file.parent / "like.yaml"))


@pytest.mark.parametrize(("task", "sides"), [("translate", 2), ("language", 1)])
def test_a_teacher_has_the_tokenizer_of_the_dataset(tmp_path, task, sides):
    text = {"tokenizer": "words:abc", "vocab_size": 9, "lengths": {"val": 5}}
    card = Card.model_validate({"name": "mine", "layout": "index", "sample": "text", "labels": "none", "sides": sides,
                                "task": task, "splits": {"val": "val.parquet"}, "text": text})  # fmt: skip
    run = runs.open_run(str(tmp_path), "wise")
    runs.begin(run, {"kind": "train", "name": "wise"}, 1)
    runs.end(run, "finished")
    for tokenizer, fits in (("words:abc", True), ("words:abd", False)):
        taken = {"recipe": TextRecipe(tokenizer=tokenizer).to_dict(), "pixels": {}, "classes": [], "task": task}
        runs.write_file(run, "model/input.json", json.dumps(taken).encode())
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="'wise' has another tokenizer"):
            checks.check_teacher("wise", CheckContext("x.yaml", str(tmp_path)), card)
