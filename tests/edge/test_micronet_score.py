"""The score of the MicroNet challenge is the published one, term by term, and counts the tensors of our network."""

import json
from dataclasses import replace

import pytest
import torch

from slimray import compress, models
from slimray.edge.cost import build_on_meta
from slimray.edge.micronet_score import (
    SUBMITTED_CACHE,
    Counting,
    MicroNetScore,
    counting_of,
    micronet_score,
    submitted,
)
from slimray.models.text.micronet import PRESETS

VOCABULARY = 267_735
LAYERS = {
    "out": "attention.out",
    "qkv": "attention.qkv",
    "fc.0": "fc1",
    "fc.3": "fc2",
    "pos_emb": "attention.positions",
}


def ours(name: str) -> str:
    """Return our name of a released tensor."""
    first, number, *rest = name.split(".")
    if first == "loss":
        return f"softmax.biases.{rest[0]}" if number == "layers" else name.replace("loss", "softmax")
    if first == "layers":
        *at, last = rest if len(rest) > 1 else [*rest, ""]
        return f"layers.{number}.{LAYERS['.'.join(at)]}.{last}".rstrip(".")
    return name


@pytest.fixture(scope="module")
def recorded(shared):
    return json.loads((shared / "parity/language/micronet_score.json").read_text())


def count(recorded, case: str, **more) -> MicroNetScore:
    counting = Counting(shares=recorded["token_fracs_test"][1:], **more)
    if "9bit" in case:
        density = {ours(name): 1 - sparsity for name, sparsity in recorded["sparsity_0358"]["final"].items()}
        counting = replace(counting, bits=9, density=density, masked=True, quantizers=57)
    cache = int(case.rpartition("cache")[2] or 0)
    return micronet_score(PRESETS["wikitext103"], VOCABULARY, cache, counting)


@pytest.mark.parametrize("case", ["dense_fp32_nocache", "dense_fp32_cache2000", "target_sparsity_0358_9bit_cache3000"])
def test_the_score_is_the_recorded_one(recorded, case):
    found, expected = count(recorded, case), recorded["cases"][case]
    empty = 0 if "cache2" in case or "cache3" in case else 1  # the record counts the softmax of no cache as -1
    assert found.total("stored") == expected["storage"]["total_params"]
    assert found.total("nonzero") == pytest.approx(expected["storage"]["nonzero"], rel=1e-12)
    assert found.storage == pytest.approx(expected["storage"]["total"], rel=1e-12)
    assert found.total("products") == pytest.approx(expected["ops"]["muls"], rel=1e-12)
    assert found.total("sums") == pytest.approx(expected["ops"]["adds"], rel=1e-12)
    assert found.total("others") == expected["ops"]["others"] + empty
    assert found.operations == pytest.approx(expected["ops"]["total"] + empty, rel=1e-12)
    assert found.score == pytest.approx(expected["score"] + empty / 318e6, rel=1e-9)


def test_the_score_of_the_submission_is_reproduced_up_to_what_its_sparsities_are_off(recorded):
    found = count(recorded, "target_sparsity_0358_9bit_cache3000")
    assert found.score == pytest.approx(recorded["released"]["published_by_notebook"]["score"], rel=5e-5)


def test_the_submission_is_counted_as_recorded(recorded):
    expected = count(recorded, "target_sparsity_0358_9bit_cache3000").score
    found = micronet_score(PRESETS["wikitext103"], VOCABULARY, SUBMITTED_CACHE, submitted())
    assert found.score == pytest.approx(expected, rel=1e-12)


def test_a_network_is_counted_by_its_zeros_and_the_bits_of_its_layers():
    torch.manual_seed(0)
    net = models.build("micronet_lm", vocab_size=37, preset="tiny").eval()
    shares = (0.3, 0.2)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "bias" in name:  # some are initialised to zero
                value.fill_(1.0)
        plain = micronet_score(net.shape, 37, 0, counting_of(net, shares))
        net.layers[0].fc1.weight[:12] = 0
    assert plain.total("nonzero") == plain.total("stored")
    assert not plain.counting.masked
    sparse = micronet_score(net.shape, 37, 0, counting_of(net, shares))
    assert sparse.total("nonzero") - plain.total("nonzero") == pytest.approx(-12 * 16)
    assert sparse.operations < plain.operations
    tokens = torch.randint(4, 37, (4, 20))
    made = compress.quantize(net, tokens, [tokens], 8)
    few = counting_of(made.net, shares)
    assert few.bits_of["layers.0.fc1.weight"] == 8
    assert few.density["layers.0.fc1.weight"] == pytest.approx(0.5, abs=0.05)  # some are rounded to zero
    assert few.quantizers == len(few.bits_of)
    found = micronet_score(net.shape, 37, 0, few)
    term = {one.name: one for one in found.terms}["layers.0.fc1"]
    assert (term.bits, term.nonzero) == (8, pytest.approx(12 * 16 + 24, abs=20))
    assert found.score < sparse.score
    rows = counting_of(compress.quantize(net, tokens, [tokens], 8, embeddings=8).net, shares)
    assert rows.bits_of["embed.layers.0.weight"] == 8
    assert rows.quantizers == few.quantizers
    words = {one.name: one for one in micronet_score(net.shape, 37, 0, rows).terms}["words.0"]
    assert (words.bits, words.nonzero) == (8, pytest.approx(10 * 16 + 10, abs=20))


def test_counting_every_head_adds_what_the_published_score_leaves_out(recorded):
    one = count(recorded, "target_sparsity_0358_9bit_cache3000")
    every = count(recorded, "target_sparsity_0358_9bit_cache3000", all_heads=True)
    assert every.operations - one.operations == pytest.approx(183_274)


@pytest.mark.parametrize(("preset", "vocab_size"), [("wikitext103", VOCABULARY), ("ptb", 10_000), ("tiny", 37)])
def test_what_is_stored_is_what_the_network_has_but_for_norms_and_the_cache(preset, vocab_size):
    net = build_on_meta(lambda: models.build("micronet_lm", vocab_size=vocab_size, preset=preset, cache=100))
    shares = [0.1] * len(net.shape.cutoffs)
    found = micronet_score(net.shape, vocab_size, 100, Counting(shares=shares))
    sizes = {name: p.numel() for name, p in net.named_parameters() if ".ln" not in name and "cache" not in name}
    assert found.total("stored") == sum(sizes.values())
    known = {name for name in sizes if name.endswith("weight") and "embed.layers" not in name}
    assert known == {f"{term.name}.weight" for term in found.terms if f"{term.name}.weight" in sizes}


def test_each_tail_needs_its_share_of_words():
    with pytest.raises(ValueError, match="1 shares of words, but 2 tails"):
        micronet_score(PRESETS["tiny"], 37, 0, Counting(shares=(0.5,)))
