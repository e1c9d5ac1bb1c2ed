"""Greedy and beam search: equal in a batch and alone, and a beam that is wide enough finds the best sentence."""

import itertools

import pytest
import torch
from torch import Tensor

from slimray.data.text.vocabulary import EOS, PAD
from slimray.models.text.decoding import beam_search, greedy
from slimray.models.text.transformer import DecoderSize, Design, EncoderSize, Sizes, Transformer


def network(vocab_size: int = 9, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    layers_of = (EncoderSize(2, 24),), (DecoderSize(2, 2, 24),)
    net = Transformer(Design(vocab_size, 16, 16), Sizes(16, 16, *layers_of)).double().eval()
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "proj" in name or name.startswith("embed"):
                value.mul_(3)
    return net


def sentences(vocab_size: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    source = torch.randint(4, vocab_size, (4, 6), generator=generator)
    for row in range(4):
        source[row, 6 - row :] = PAD
        source[row, 5 - row] = EOS
    return source


def alone(source: Tensor) -> list[Tensor]:
    return [row[row != PAD][None] for row in source]


def test_greedy_takes_the_likeliest_token_of_the_whole_network_each_time():
    net, source = network(), sentences()
    found = greedy(net, source, max_length=12)
    assert found == [greedy(net, row, max_length=12)[0] for row in alone(source)]
    assert len({tuple(row) for row in found}) > 1, "the source matters"
    for row, tokens in zip(alone(source), found, strict=True):
        state = net.start(net.encode(row))
        with torch.no_grad():
            logits = net.decode(torch.tensor([[EOS, *tokens]]), state)[0][0]
        logits[:, PAD] = -torch.inf
        logits[0, EOS] = -torch.inf
        expected = logits.argmax(-1).tolist()
        assert expected[: len(tokens)] == tokens
        assert len(tokens) == 12 or expected[-1] == EOS


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
def test_a_beam_finds_the_same_for_a_sentence_alone_and_among_others(penalty):
    net, source = network(), sentences()
    together = beam_search(net, source, beam=3, penalty=penalty, max_length=10)
    for row, found in zip(alone(source), together, strict=True):
        (expected,) = beam_search(net, row, beam=3, penalty=penalty, max_length=10)
        assert [one.tokens for one in found] == [one.tokens for one in expected]
        assert [one.score for one in found] == pytest.approx([one.score for one in expected])
        assert sorted((one.score for one in found), reverse=True) == [one.score for one in found]
        assert len(found) == 3
    assert len({len(one.tokens) for found in together for one in found}) > 3, "sentences end at different steps"


def score(net: Transformer, source: Tensor, tokens: tuple[int, ...], penalty: float) -> float:
    with torch.no_grad():
        logits = net.decode(torch.tensor([[EOS, *tokens]]), net.start(net.encode(source)))[0][0]
    log_probs = logits.log_softmax(-1)
    ends = [*tokens, EOS]
    return float(log_probs[range(len(ends)), ends].sum()) / len(ends) ** penalty


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_beam_as_wide_as_there_are_sentences_finds_the_best_one(penalty):
    net, source = network(7, seed=2), sentences(7)
    words = [token for token in range(7) if token not in (PAD, EOS)]
    for row in alone(source):
        (found,) = beam_search(net, row, beam=155, penalty=penalty, max_length=3)
        every = [tokens for n in (1, 2, 3) for tokens in itertools.product(words, repeat=n)]
        best = max(every, key=lambda tokens: score(net, row, tokens, penalty))
        assert found[0].tokens == best
        assert found[0].score == pytest.approx(score(net, row, best, penalty))


def test_one_hypothesis_is_what_greedy_finds_and_a_sentence_ends_at_the_most_tokens():
    net, source = network(), sentences()
    narrow = beam_search(net, source, beam=1, max_length=5)
    assert [list(found[0].tokens) for found in narrow] == greedy(net, source, max_length=5)
    assert max(len(found[0].tokens) for found in narrow) == 5
    for tokens in (one.tokens for found in beam_search(net, source, beam=4, max_length=5) for one in found):
        assert 1 <= len(tokens) <= 5
        assert not {PAD, EOS} & {*tokens}


def test_a_longer_penalty_prefers_longer_sentences():
    net, source = network(), sentences()
    lengths = [
        sum(len(found[0].tokens) for found in beam_search(net, source, beam=4, penalty=penalty, max_length=10))
        for penalty in (0.0, 2.0)
    ]
    assert lengths[0] < lengths[1], lengths
