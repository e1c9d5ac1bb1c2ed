"""Text in the same framework: damaged lines left out, exact training by tokens, scores, predictions line by line."""

import json
import math
import random

import numpy as np
import pytest
import safetensors.numpy
from tests.verbs.conftest import Shell, end_session, has_checkpoint, run_and_kill_a_worker, seen, weights
from tests.waits import wait_for

from slimray import models, runs
from slimray.edge import hardware
from slimray.edge.arch_costs import Prices

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

NAMES = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "acht"}
DATA = """
kind: prepare
name: pairs
data:
  card: {name: numbers, layout: texts, sample: text, labels: none, sides: 2, task: translate,
    splits: {train: [train.en, train.de], val: [val.en, val.de]}}
  root: texts
text: {tokenizer: words, vocab_size: 50}
"""
TRAIN = """
kind: train
name: {name}
data: {{run: pairs, record_samples: true, task: {{beam: 2, max_length: 9}}}}
model: {{name: transformer, embed: 32, qkv: 32, ffn: 64, heads: 2, encoder_layers: 1, decoder_layers: 1,
  pre_norm: true, dropout: 0.0}}
batch: {{tokens: 80, per_worker_tokens: 40}}
optim: {{optimizer: adam, lr: 0.01, reference_batch: 80, epochs: 2, betas: [0.9, 0.98], warmup_steps: 10,
  schedule: inverse_sqrt, groups: plain, weight_decay: 0, label_smoothing: 0.1}}
scale: {{workers: 2}}
checkpoint: {{every_steps: 2}}
log_every: 1
"""
STREAM = """
kind: prepare
name: stream
data: {card: {name: plain, layout: texts, sample: text, labels: none, task: language,
  splits: {train: train.en, val: val.en}}, root: texts}
text: {tokenizer: words, vocab_size: 50, length: 16, stream: 48}
---
kind: train
name: speaker
data: {run: stream, task: {max_tokens: 4}}
model: {name: micronet_lm, preset: tiny, cache: 8}
batch: {total: 8, per_worker: 4}
optim: {optimizer: adam, lr: 0.01, reference_batch: 8, epochs: 1, warmup_steps: 2, schedule: cosine, cosine_from: start,
  groups: plain, weight_decay: 0, clip_norm: 0.5}
scale: {workers: 2}
---
kind: evaluate
name: spoken
runs: [speaker]
batch: 2
scale: {workers: 2}
---
kind: evaluate
name: spoken-alone
runs: [speaker]
batch: 3
"""


def write_pairs(shell: Shell) -> None:
    """Write numbers in English, and reversed in German; three of 100 training lines are damaged."""
    folder, rng = shell.folder / "texts", random.Random(0)
    folder.mkdir()
    for split, count in (("train", 97), ("val", 12)):
        sentences = [rng.choices(list(NAMES), k=rng.randint(1, 5)) for _ in range(count)]
        lines = [(" ".join(s).encode(), " ".join(NAMES[word] for word in reversed(s)).encode()) for s in sentences]
        if split == "train":
            lines[10:10] = [(b"", b"eins"), (b"one", b"caf\xe9"), (b"one\0", b"eins")]
        for side, ending in enumerate(("en", "de")):
            (folder / f"{split}.{ending}").write_bytes(b"\n".join(line[side] for line in lines) + b"\n")


@pytest.fixture(scope="module")
def calm(shell: Shell) -> str:
    """Return the digest of an undisturbed training, `calm-text`."""
    write_pairs(shell)
    calm = shell.write("calm-text.yaml", TRAIN.format(name="calm-text"))
    out = shell.ok("run", shell.write("pairs.yaml", DATA), calm)
    assert "train 97 texts (3 quarantined)" in out
    return weights(shell, "calm-text")


def test_lines_that_are_no_text_are_quarantined_with_their_numbers(shell, calm):
    bad = runs.read_parts(runs.open_run(str(shell.storage), "pairs"), "quarantine")
    assert sorted((row["path"], row["reason"].rpartition(": ")[2]) for row in bad) == [
        ("train.en#11", "is empty"), ("train.en#12", "is not UTF-8 (byte 3)"), ("train.en#13", "holds a zero byte"),
    ]  # fmt: skip


def test_every_pair_is_seen_once_per_epoch(shell, calm):
    assert seen(shell, "calm-text") == {epoch: list(range(97)) for epoch in range(2)}
    card = runs.read_card(runs.open_run(str(shell.storage), "calm-text"))
    assert card is not None
    rows = runs.read_parts(runs.open_run(str(shell.storage), "calm-text"), "metrics")
    judged = [row["val/perplexity"] for row in rows if row["phase"] == "val"]
    assert card["metrics"]["best"]["val/perplexity"] == min(judged)
    losses = [row["train/loss"] for row in rows if row["phase"] == "train"]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_a_killed_worker_costs_no_bit(shell, calm):
    name = "killed-text"
    run_and_kill_a_worker(shell, shell.write("killed-text.yaml", TRAIN.format(name=name)), name)
    assert weights(shell, name) == calm
    assert seen(shell, name) == {epoch: list(range(97)) for epoch in range(2)}


def test_a_training_of_so_many_steps_ends_with_them_also_after_a_kill(shell, calm):
    name, steps = "counted-text", 11
    text = TRAIN.format(name=name).replace("epochs: 2", f"steps: {steps}")
    run_and_kill_a_worker(shell, shell.write("counted-text.yaml", text), name)
    run, whole = (runs.open_run(str(shell.storage), one) for one in (name, "calm-text"))
    card = runs.read_card(run)
    assert card is not None
    assert card["steps"] == steps
    taken, wanted = {}, {}
    for one, ids in ((run, taken), (whole, wanted)):
        for row in runs.read_parts(one, "samples"):  # one from each rank
            ids[row["step"]] = sorted(ids.get(row["step"], []) + row["ids"])
    assert steps < len(wanted) < 2 * steps, "the last of its passes is cut"
    assert taken == {step: wanted[step] for step in range(steps)}
    rows = [row for row in runs.read_parts(run, "metrics") if row["phase"] == "val"]
    assert rows[-1]["step"] == steps, "its last pass ends with a validation"


def test_a_killed_driver_resumes_on_another_number_of_workers_and_ends_in_the_same_weights(shell, calm):
    """Without dropout, which differs from rank to rank, they are the same except for rounding."""
    name = shell.write("elastic-text.yaml", TRAIN.format(name="elastic-text"))
    child = shell.start("run", name)
    wait_for("a checkpoint in mid-epoch", lambda: has_checkpoint(shell, "elastic-text", 8))
    end_session(child)
    shell.ok("run", name, "--set", "scale.workers=1")
    assert seen(shell, "elastic-text") == {epoch: list(range(97)) for epoch in range(2)}
    two, one = (
        safetensors.numpy.load((shell.storage / run / "model/weights.safetensors").read_bytes())
        for run in ("calm-text", "elastic-text")
    )
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=0, atol=1e-3, err_msg=key)


def test_an_evaluation_translates_and_says_how_it_was_scored(shell, calm):
    done = shell.run("evaluate", "calm-text", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["rows"][0]
    assert (row["num_samples"], row["num_quarantined"]) == (12, 0)
    assert row["chrf"] >= 0
    assert "tok:13a" in row["signatures"]["bleu"]
    assert row["params"] > 1000
    page = runs.read_file(runs.open_run(str(shell.storage), "calm-text-eval"), "report.html").decode()
    for words in ("<h2>Texts</h2>", "Scores of translations", "nrefs:1", "reference"):
        assert words in page


def test_a_text_is_answered_line_by_line(shell, calm):
    (shell.folder / "asked.txt").write_text("one two\n\nthree\n" + "four " * 40 + "\n")
    done = shell.run("predict", "calm-text", "asked.txt")
    assert done.returncode == 2
    assert "asked.txt line 4: has 41 tokens, but the network was trained on at most 6" in done.stderr
    said = done.stdout.split("\n")
    assert len(said) == 5
    assert said[1] == said[3] == ""
    assert set(said[0].split()) <= set(NAMES.values())


def test_a_language_model_is_trained_scored_alike_by_any_number_of_workers_and_goes_on(shell, calm):
    shell.ok("run", shell.write("stream.yaml", STREAM))
    rows = [
        json.loads(runs.read_file(runs.open_run(str(shell.storage), name), "results.json"))["rows"][0]
        for name in ("spoken", "spoken-alone")
    ]
    assert rows[0]["num_tokens"] == rows[1]["num_tokens"] > 30
    assert rows[0]["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=1e-5)
    assert rows[0]["perplexity"] == rows[0]["word_perplexity"]
    (shell.folder / "begun.txt").write_text("one two\n")
    said = shell.ok("predict", "speaker", "begun.txt").strip()
    assert said.startswith("one two")


FEW_BITS = """
kind: compress
name: text-bits
model: {run: calm-text}
steps:
  - {step: quantize, scheme: kmeans, limits: {size_mb: 0.006},
    search: {name: haq, episodes: 5, population: 2, warmup: 3}}
  - {step: code}
hold_out: 20
judge: {calibrate: 16}
timing: null
"""


@pytest.mark.benchmark
def test_bits_of_a_translation_network_are_searched_by_its_perplexity(shell, calm):
    said = " ".join(shell.ok("run", shell.write("few-bits.yaml", FEW_BITS)).split())
    run = runs.open_run(str(shell.storage), "text-bits")
    found = json.loads(runs.read_file(run, "results.json"))["steps"][1]["details"]
    assert found["costs"]["size_mb"] <= found["limits"]["size_mb"]
    assert {pair[1] for pair in found["bits"].values()} == {None}, "inputs stay float"
    assert len({pair[0] for pair in found["bits"].values()}) > 1, "mixed"
    tried = [one["perplexity"] for one in found["candidates"]]
    assert found["searched"] == min(tried) < max(tried), "the lowest perplexity is the best"
    rewards = sorted({round(reward, 6) for reward in found["rewards"]})
    assert rewards[-1] - rewards[0] == pytest.approx(10 * math.log(max(tried) / min(tried)), rel=1e-4)
    assert ("the same bits everywhere are better" in said) == (found["uniform"]["perplexity"] < found["searched"])
    (shell.folder / "few.txt").write_text("one two\n")
    assert set(shell.ok("predict", "text-bits", "few.txt").split()) <= set(NAMES.values())


HAT = """
kind: shrink
name: hat
data: {run: pairs, task: {beam: 2, max_length: 9}}
model: {name: hat_small, preset: tiny, dropout: 0.0}
batch: {tokens: 80, per_worker_tokens: 80}
optim: {optimizer: adam, reference_batch: 80, betas: [0.9, 0.98], schedule: cosine, groups: plain, weight_decay: 0,
  label_smoothing: 0.1}
stages:
  - {name: largest, epochs: 1, lr: 0.005}
  - name: all
    free: {encoder_embed: [16, 24], decoder_embed: [16, 24], encoder_ffn: [16, 32], encoder_heads: [2, 4],
      depth: [1, 2], decoder_ffn: [16, 32], decoder_heads: [2, 4], cross_heads: [2, 4], attends: [1, 2]}
    epochs: 1
    lr: 0.005
hold_out: 20
judge: {calibrate: 16}
judged: 2
---
kind: search
name: quick
supernet: hat
strategy: {name: evolution, population: 4, iterations: 1}
targets: [{name: here, hardware: hat_small.cpu-eager.json, limits: {latency_ms: LIMIT}}]
judge: {calibrate: 16}
---
kind: train
name: retrained
data: {run: pairs, task: {beam: 2, max_length: 9}}
model: {run: quick-here}
batch: {tokens: 80, per_worker_tokens: 80}
optim: {optimizer: adam, lr: 0.005, reference_batch: 80, epochs: 1, schedule: cosine, groups: plain, weight_decay: 0}
teacher: {run: calm-text, weight: 0.5}
---
kind: export
name: retrained-export
run: retrained
samples: 6
pairs: 9
---
kind: evaluate
name: both
runs: [quick-here, "retrained-export:onnx"]
task: {beam: 1}
"""


@pytest.mark.benchmark
def test_a_supernet_of_transformers_is_searched_under_a_latency_and_its_subnet_retrained_and_exported(shell, calm):
    """HAT from end to end, with the latency table of this machine and a teacher's soft labels."""
    size = len(NAMES) * 2 + 4
    shell.ok(
        "profile", "hat_small", "--preset", "tiny", "--set", f"vocab_size={size}", "--rounds", "2", "--calibrate", "4"
    )
    net = models.build("hat_small", preset="tiny", vocab_size=size)
    prices = Prices(net, None, hardware.meter(str(shell.folder / "hat_small.cpu-eager.json")))
    ms = [prices.metered(arch)["latency_ms"] for arch in (net.space.smallest(), net.space.largest())]
    assert ms[0] < ms[1]
    shell.ok("run", shell.write("hat.yaml", HAT.replace("LIMIT", f"{sum(ms) / 2}")))
    results = json.loads(runs.read_file(runs.open_run(str(shell.storage), "quick"), "results.json"))
    (row,) = results["targets"]
    assert row["latency_ms"] <= sum(ms) / 2
    tried = [one["metric"] for one in results["trials"] if one["latency_ms"] <= sum(ms) / 2]
    assert row["searched"] == min(tried) < max(tried), "the lowest perplexity is the best"
    said = json.loads(runs.read_file(runs.open_run(str(shell.storage), "both"), "results.json"))["rows"]
    assert [one["run"] for one in said] == ["quick-here", "retrained-export:onnx"]
    assert all(one["num_tokens"] == said[0]["num_tokens"] and "bleu" in one["signatures"] for one in said)
    assert said[0]["params"] == said[1]["params"]
    (shell.folder / "words.txt").write_text("one two\nfive\n")
    assert shell.ok("predict", "retrained-export", "words.txt") == shell.ok("predict", "retrained", "words.txt")
