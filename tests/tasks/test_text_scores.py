"""BLEU and chrF equal sacrebleu's however sentences are divided; perplexity per token and per word."""

import json
import math

import numpy as np
import pytest

from slimray.tasks.text_scores import CorpusMetric, paired_bootstrap, perplexity

pytest.importorskip("sacrebleu")
VARIANTS = {
    "sacrebleu_13a": CorpusMetric(),
    "sacrebleu_none": CorpusMetric(tokenize="none"),
    "sacrebleu_intl": CorpusMetric(tokenize="intl"),
    "sacrebleu_13a_lower": CorpusMetric(lower=True),
    "sacrebleu_13a_smooth_none": CorpusMetric(smooth="none"),
}


@pytest.fixture(scope="module")
def recorded(shared):
    return json.loads((shared / "parity/language/bleu.json").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_bleu_is_the_recorded_one_with_its_signature(recorded, variant):
    for name, case in recorded.items():
        if not name.startswith("_"):
            expected = case[variant]["score"] if isinstance(case[variant], dict) else case[variant]
            assert VARIANTS[variant].of(case["sys"], case["ref"]).value == pytest.approx(expected, rel=1e-6), name
    signature = VARIANTS["sacrebleu_13a"].of(["a b c d"], ["a b c d"]).signature
    assert signature.startswith(recorded["_meta"]["signature_default"])
    assert "version:" in signature


HYPOTHESES = ["The cat sat on the mat.", "He said: hello!", "A dog runs", "nothing at all", "It is 5 % better."]
REFERENCES = ["The cat sat on a mat.", "She said: hello there!", "A dog is running.", "Nothing.", "It is 5% better."]


@pytest.mark.parametrize("metric", [CorpusMetric(), CorpusMetric("chrf")])
def test_counts_of_parts_sum_up_to_the_score_that_sacrebleu_gives_the_whole(metric):
    import sacrebleu

    theirs = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[metric.name](HYPOTHESES, [REFERENCES])
    assert metric.of(HYPOTHESES, REFERENCES).value == pytest.approx(theirs.score)
    parts = [metric.counts(HYPOTHESES[lo:hi], REFERENCES[lo:hi]).sum(0) for lo, hi in ((0, 2), (2, 2), (2, 5))]
    assert metric.score(sum(parts)).value == pytest.approx(theirs.score)
    assert 10 < theirs.score < 90
    assert metric.of(REFERENCES, REFERENCES).value == pytest.approx(100)


def test_hypotheses_and_references_are_pairs():
    with pytest.raises(ValueError, match="2 hypotheses, but 1 references"):
        CorpusMetric().counts(["a", "b"], ["a"])


def test_a_better_system_is_told_from_its_equal_by_a_paired_bootstrap():
    rng = np.random.default_rng(0)
    references = [" ".join(rng.choice(list("abcdefghij"), 12)) for _ in range(60)]

    def system(wrong: float, seed: int) -> list[str]:
        draw = np.random.default_rng(seed)
        return [" ".join("x" if draw.random() < wrong else word for word in one.split()) for one in references]

    metric = CorpusMetric()
    good, bad, alike = (
        metric.counts(system(wrong, seed), references) for wrong, seed in ((0.1, 1), (0.3, 2), (0.3, 3))
    )
    better = paired_bootstrap(metric, good, bad)
    assert 0 < better.low < better.difference < better.high
    equal = paired_bootstrap(metric, bad, alike)
    assert equal.low < 0 < equal.high
    assert paired_bootstrap(metric, good, bad) == better
    with pytest.raises(ValueError, match="60 sentences of one system, 3 of the other"):
        paired_bootstrap(metric, good, bad[:3])


def test_perplexity_per_word_of_fewer_units_is_higher():
    assert perplexity(20 * math.log(50), 20) == pytest.approx(50)
    assert perplexity(20 * math.log(50), 10) == pytest.approx(2500)
    assert math.isnan(perplexity(0.0, 0))
    assert perplexity(1e9, 1) == math.inf
