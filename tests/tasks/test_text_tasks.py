"""Translation and language modelling as tasks: losses weighted by tokens, scores, answers, examples."""

import json
import math
import zlib
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from slimray import models
from slimray.data.index import index_table
from slimray.data.samples import BadSample
from slimray.data.text.samples import TextRecipe, pair_arrays, write_text_shard
from slimray.data.text.vocabulary import EOS, PAD, train_vocabulary
from slimray.models.text.decoding import continued
from slimray.runtime.inputs import Input
from slimray.spec import RunFailed, UserError
from slimray.tasks import TASKS, language
from slimray.tasks.evaluation import Samples, Setting
from slimray.tasks.network import Network
from slimray.tasks.predict import answer_lines
from slimray.tasks.task import PassResult, search_options
from slimray.tasks.tokens import TokenScore, losses, token_losses, weights
from slimray.train.spec import OptimSpec

TEXTS = ["a b c d", "b c e", "c a", "e e b a d"]
WORDS = train_vocabulary(TEXTS, "words", 20)


def optim(smoothing: float = 0.0) -> OptimSpec:
    return OptimSpec.model_validate({"lr": 1, "reference_batch": 1, "epochs": 1, "label_smoothing": smoothing})


def network(task: str, name: str, sides: int, **options: Any) -> Network:
    torch.manual_seed(0)
    recipe = TextRecipe(sides, 6, WORDS.size, WORDS.to_text(), limit=6, max_length=8, max_tokens=5, mode="val")
    model = {"name": name, "vocab_size": WORDS.size, **options}
    return Network(models.build(**model).eval(), Input(), recipe.to_dict(), (), model, task)


def translator() -> Network:
    return network("translate", "transformer", 2, embed=16, qkv=16, ffn=16, heads=2, encoder_layers=1, decoder_layers=1)


def pairs(texts: list[tuple[str, str]]) -> Samples:
    made = [pair_arrays(*(np.array(WORDS.encode(text), np.int32) for text in pair)) for pair in texts]
    length = max(len(wanted) for _, wanted in made)
    data, targets = np.full((len(made), 1, 2, length), PAD, np.int32), np.full((len(made), length), PAD)
    for row, (sample, wanted) in enumerate(made):
        data[row, ..., : len(wanted)], targets[row, : len(wanted)] = sample, wanted
    return Samples(data, targets, [f"t#{n}" for n in range(len(made))], list(range(len(made))))


def test_the_smoothed_loss_is_the_published_one(shared):
    known = json.loads((shared / "parity/language/hat_recipe.json").read_text())["label_smoothing"]
    state = np.random.RandomState(zlib.crc32(b"ls_logits"))
    logits = torch.from_numpy(state.standard_normal((2, 5, 13)).astype(np.float32)).double()
    targets = torch.tensor(known["target"])
    assert known["pad"] == PAD
    assert float(losses(logits, targets, optim(known["eps"])).sum()) == pytest.approx(known["sum_loss"], rel=1e-6)
    assert float(token_losses(logits, targets).sum()) == pytest.approx(known["sum_nll"], rel=1e-6)
    assert weights(targets, optim()).sum() == known["ntokens"]
    score = TokenScore()
    score.add(logits, targets)
    assert score.result()["perplexity"] == pytest.approx(known["ppl_2_pow_nll"], rel=1e-6)


@pytest.mark.parametrize("task", ["translate", "language"])
def test_to_a_search_a_percent_of_perplexity_is_a_point_however_large_it_is(task):
    metric = TASKS[task].best
    for perplexity in (2.0, 7.0, 9000.0):
        assert metric.merit(perplexity) - metric.merit(1.01 * perplexity) == pytest.approx(1, rel=0.01)
    assert TASKS["classify"].best.merit(71.5) == 71.5


def test_a_step_is_the_mean_over_its_tokens_however_they_are_cut():
    logits, targets = (
        torch.randn(3, 4, 7, dtype=torch.float64),
        torch.tensor([[4, 5, 2, 1], [2, 1, 1, 1], [6, 6, 6, 2]]),
    )
    whole = losses(logits, targets, optim()).sum() / weights(targets, optim()).sum()
    parts = [(logits[:1, :3], targets[:1, :3]), (logits[1:], targets[1:])]
    sums = sum(losses(a, b, optim()).sum() for a, b in parts), sum(weights(b, optim()).sum() for _, b in parts)
    assert float(sums[0] / sums[1]) == pytest.approx(float(whole), rel=1e-12)
    kept = targets != PAD
    plain = torch.nn.functional.cross_entropy(logits[kept], targets[kept])
    assert float(whole) == pytest.approx(float(plain), rel=1e-12)
    given = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert torch.allclose(token_losses(given, targets), token_losses(logits, targets))
    with pytest.raises(
        RunFailed, match=r"optim\.label_smoothing: this network returns only the probability of the target"
    ):
        losses(given, targets, optim(0.1))


def test_scores_of_tokens_add_up_over_ranks_and_count_words():
    logits, targets = torch.randn(4, 5, WORDS.size), torch.tensor([[4, 5, 2, 1, 1], [2, 1, 1, 1, 1], [6, 7, 8, 5, 2],
                                                                   [1, 1, 1, 1, 1]])  # fmt: skip
    whole, first, second = TokenScore(WORDS), TokenScore(WORDS), TokenScore(WORDS)
    whole.add(logits, targets)
    first.add(logits[:1], targets[:1])
    second.add(logits[1:], targets[1:])
    first.sums += second.sums
    assert first.result() == pytest.approx(whole.result())
    row = whole.result()
    assert (row["num_tokens"], row["num_samples"]) == (9, 3)
    assert row["word_perplexity"] == row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    pieces = train_vocabulary(["lange Worte werden zerlegt"] * 9, "bpe", 30)
    tokens = torch.tensor([[*pieces.encode("lange Worte"), EOS]])
    score = TokenScore(pieces)
    score.add(torch.zeros(1, tokens.shape[1], pieces.size), tokens)
    found = score.result()
    assert found["word_perplexity"] == pytest.approx(pieces.size ** (tokens.shape[1] / 3))  # two words and the end
    assert found["perplexity"] == pytest.approx(pieces.size)


def test_outputs_that_are_not_finite_are_counted_and_are_no_perplexity():
    logits, targets = torch.zeros(2, 2, 5), torch.tensor([[4, 2], [4, 2]])
    logits[1, 0, 3] = torch.nan
    score = TokenScore()
    score.add(logits, targets)
    row = score.result()
    assert (row["num_samples"], row["num_not_finite"]) == (2, 1)
    assert math.isnan(row["perplexity"])


@pytest.mark.parametrize("name", ["translate", "language"])
def test_lower_perplexity_is_the_best(name):
    best = TASKS[name].best
    assert best.name == "perplexity"
    assert best.improves(3.0, 4.0)
    assert not best.improves(5.0, 4.0)
    assert not best.improves(math.nan, 4.0)


def test_translations_are_scored_against_the_texts_as_they_were_written(tmp_path):
    net, texts = translator(), [("a b", "B  c! d, e f"), ("c a", "e, e"), ("b c e", "c")]
    rows = [{"path": f"t#{n}", "data": json.dumps({"tokens": [], "target": [], "text": a, "translation": b})}
            for n, (a, b) in enumerate(texts)]  # fmt: skip
    write_text_shard(pafs.LocalFileSystem(), str(tmp_path / "shards/x.parquet"), rows)
    index = [{"path": f"t#{n}", "label": 0, "shard": "shards/x.parquet", "row": n} for n in range(3)]
    pq.write_table(index_table(index), tmp_path / "val.parquet")
    task = TASKS["translate"]
    current = task.start(Setting(task, net, net.recipe, batch=2, rows=2))
    samples = pairs([("a b", "b c"), ("c a", "e e"), ("b c e", "c")])
    assert current.take(samples) is None
    shown = current.show(samples, None, [], 2)
    assert [one["type"] for one in shown] == ["texts"] * 2
    assert [name for name, _ in shown[0]["texts"]] == ["source", "network", "reference"]
    assert (shown[0]["texts"][0][1], shown[1]["texts"][2][1]) == ("a b", "e e")
    said = dict(current.found)
    assert sorted(said) == [0, 1, 2]
    row: dict[str, Any] = {"run": "r"}
    assert task.finish is not None

    def result(found: list[Any], **recipe: Any) -> PassResult:
        return PassResult(found, shown, str(tmp_path), "val", net.recipe | recipe)

    task.finish(row, result([(0, "B  c! d, e f"), (2, "c"), (1, "e, e")]))
    assert (row["bleu"], row["chrf"]) == (pytest.approx(100), pytest.approx(100))
    assert "tok:13a" in row["signatures"]["bleu"]
    worse = dict(row)
    task.finish(worse, result([(0, "B c"), (2, "c"), (1, "e e")]))
    assert 0 < worse["chrf"] < 100
    said = [(0, "b  c! d, e f"), (2, "c"), (1, "e, e")]
    for lower, case in ((False, "case:mixed"), (True, "case:lc")):
        cased: dict[str, Any] = {}
        task.finish(cased, result(said, lower=lower))
        assert case in cased["signatures"]["bleu"]
        assert (cased["bleu"] == pytest.approx(100)) == lower
        assert (cased["chrf"] == pytest.approx(100)) == lower
    (table,) = task.tables([row], ())
    assert [cells[1] for cells in table.rows] == ["bleu", "chrf"]
    assert task.compare is not None
    rows = [row, worse | {"run": "worse"}, cased | {"run": "lower"}, {"run": "export"}]
    task.compare(rows)
    assert ["bleu_gain" in one for one in rows] == [False, True, False, False], "without case is another metric"
    gain = rows[1]["bleu_gain"]
    assert gain["difference"] == pytest.approx(worse["bleu"] - row["bleu"])
    assert (gain["over"], gain["low"] <= gain["difference"] < gain["high"]) == ("r", True)
    assert not any("counted" in one for one in rows), "what is stored are plain values"
    _, differences = task.tables(rows, ())
    assert [cells[:3] for cells in differences.rows] == [("worse", "r", gain["difference"])]
    assert task.tables([{"run": "export"}], ()) == []


def test_what_a_network_says_does_not_depend_on_the_sentences_beside_it():
    net = translator()
    answer = answer_lines(net)
    assert answer is not None
    task = TASKS["translate"]
    current = task.start(Setting(task, net, net.recipe, batch=3, rows=3))
    current.take(pairs([("a b", "b"), ("c a d e", "e e"), ("b", "c c c c")]))
    assert [text for _, text in current.found] == [answer("a b"), answer("c a d e"), answer("b")]


def test_a_line_that_is_too_long_is_a_sentence_and_an_empty_one_has_no_answer():
    answer = answer_lines(translator())
    assert answer is not None
    assert answer("  ") == ""
    with pytest.raises(BadSample, match="has 7 tokens, but the network was trained on at most 6: split it"):
        answer("a b c d e a")


def test_a_language_model_goes_on_where_a_line_ends():
    net = network("language", "micronet_lm", 1, preset="tiny")
    answer = answer_lines(net)
    assert answer is not None
    said = answer("a b")
    assert said.startswith("a b")
    assert len(said.split()) <= 7
    task = TASKS["language"]
    current = task.start(Setting(task, net, net.recipe, batch=2, rows=2))
    stream = np.array([[EOS, *WORDS.encode("a b c d e"), EOS]], np.int32)
    samples = Samples(stream[:, None], stream[:, 1:].astype(np.int64), ["t#0"], [0])
    outputs = current.take(samples)
    assert isinstance(outputs, Tensor)
    assert outputs.shape == (1, 6)
    row = current.result()
    assert (row["num_tokens"], row["num_samples"]) == (6, 1)
    assert 1 < row["perplexity"] < 10 * WORDS.size
    (shown,) = current.show(samples, outputs, [], 3)
    assert shown["texts"][0] == ("text", "a b c d e")


def test_a_report_goes_on_with_a_stream_as_it_is_up_to_the_end_of_a_line():
    net = network("language", "micronet_lm", 1, preset="tiny")
    long, short, stream = "a b c d e a b c d e", "b c a e", [EOS]
    for line in (long, short, long, long):  # 24 tokens reach the seventh word of the second long line
        stream += [*WORDS.encode(line), EOS]
    data = np.full((2, 1, len(stream)), PAD, np.int32)
    data[0, 0], data[1, 0, :9] = stream, stream[4:13]
    task = TASKS["language"]
    current = task.start(Setting(task, net, net.recipe, batch=2, rows=2))
    samples = Samples(data, data[:, 0, 1:].astype(np.int64), ["t#0", "t#1"], [0, 1])
    for given, rest, shown in zip(
        (stream[:24], stream[4:13]), ("c d e", ""), current.show(samples, None, [], 2), strict=True
    ):
        said = continued(net.net, torch.tensor([given]), 5)[0].tolist()
        said = said[: said.index(EOS)] if EOS in said else said
        assert shown["texts"] == [("text", WORDS.decode(given)), ("network", WORDS.decode(said)), ("truth", rest)]


def test_the_arguments_of_a_network_are_known_once_the_dataset_is_prepared():
    from slimray.data.cards import Card

    plain = {"name": "x", "layout": "texts", "sample": "text", "labels": "none", "splits": {"train": "a"}}
    assert TASKS["language"].arguments(Card.model_validate(plain), {}) is None
    text = {"tokenizer": "tokenizer.txt", "vocab_size": 99, "lengths": {"train": 5}}
    prepared = Card.model_validate(plain | {"layout": "index", "text": text})
    assert TASKS["translate"].arguments(prepared, {}) == {"vocab_size": 99}


def test_a_giant_line_is_not_gone_on_with(monkeypatch):
    monkeypatch.setattr(language, "LONGEST", 4)
    answer = answer_lines(network("language", "transformer_lm", 1, embed=8, ffn=8, heads=2, layers=1))
    assert answer is not None
    assert answer("a b c d").startswith("a b c d")
    with pytest.raises(BadSample, match="has 5 tokens, more than 4: give only the end of it"):
        answer("a b c d e")


def test_options_of_a_search_are_those_of_tasks_that_search():
    assert search_options(TASKS["translate"], {"beam": 2}, "task") == {"beam": 2}
    assert search_options(TASKS["classify"], {}, "task") == {}
    with pytest.raises(
        UserError, match=r"task: applies only to networks that search their answers, not to the task classify"
    ):
        search_options(TASKS["classify"], {"beam": 2}, "task")
    with pytest.raises(UserError, match="beam"):
        search_options(TASKS["language"], {"beam": 2}, "task")
