"""Greedy and beam search over a network that translates, for many sentences at once; streams that go on.

`net` is a Transformer, or anything with its `encode`, `start` and `decode`. Rules are those of the published results
(HAT, arXiv 2005.14187): at every step the 2 x beam best continuations are looked at, an eos among the best `beam` ends
a hypothesis, a sentence is done with `beam` ended ones, the score of one is the sum of its log-probabilities over
length ** penalty, eos included. PAD is never chosen, eos is not the first token, and alone may
follow `max_length` tokens. What becomes of a sentence
does not depend on those beside it, but for rounding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimray.data.text.vocabulary import EOS, PAD

MAX_LENGTH = 200


@dataclass(frozen=True)
class Hypothesis:
    """A translation: its tokens without eos, and its score."""

    tokens: tuple[int, ...]
    score: float


@torch.inference_mode()
def greedy(net: Any, source: Tensor, max_length: int = MAX_LENGTH) -> list[list[int]]:
    """The likeliest token again and again, for sentences int `[B, S]` with eos; lists without eos."""
    state, found = net.start(net.encode(source)), []
    token, open_rows = torch.full_like(source[:, 0], EOS), torch.ones_like(source[:, 0], dtype=torch.bool)
    for step in range(max_length + 1):
        logits, state = net.decode(token[:, None], state)
        token = _allowed(logits[:, -1], step, max_length).argmax(-1)
        token = torch.where(open_rows, token, PAD)
        found.append(token)
        open_rows = open_rows & (token != EOS)
        if not open_rows.any():
            break
    rows = torch.stack(found, 1).tolist() if found else [[] for _ in source]
    return [[token for token in row if token not in (PAD, EOS)] for row in rows]


@torch.inference_mode()
def beam_search(
    net: Any, source: Tensor, beam: int = 4, penalty: float = 0.6, max_length: int = MAX_LENGTH
) -> list[list[Hypothesis]]:
    """For each of the sentences int `[B, S]` with eos up to `beam` translations, the best first."""
    count = len(source)
    state = net.start(net.encode(source).rows(torch.arange(count, device=source.device).repeat_interleave(beam)))
    done: list[list[Hypothesis]] = [[] for _ in range(count)]
    rows = list(range(count))  # the sentences that are looked at still, `beam` rows of the state each
    tokens = source.new_full((count, beam, 1), EOS)
    scores = torch.full((count, beam), -torch.inf, dtype=torch.float64, device=source.device)
    scores[:, 0] = 0  # all beams are alike at first: one of them counts
    for step in range(max_length + 1):
        logits, state = net.decode(tokens[..., -1].reshape(-1, 1), state)
        log_probs = _allowed(logits[:, -1].double().log_softmax(-1), step, max_length)
        vocab_size = log_probs.shape[-1]
        totals = (scores.flatten()[:, None] + log_probs).view(len(rows), beam * vocab_size)
        best, place = totals.topk(min(2 * beam, totals.shape[1]), -1)
        parent, token = place // vocab_size, place % vocab_size
        _end(done, rows, tokens, best, parent, token, beam, penalty)
        keep = torch.tensor([at for at, row in enumerate(rows) if len(done[row]) < beam], device=source.device)
        if not len(keep) or step == max_length:
            break
        order = (token[keep] == EOS).to(torch.int8).sort(dim=-1, stable=True).indices[:, :beam]  # the best that go on
        parent, token, scores = (one[keep].gather(1, order) for one in (parent, token, best))
        state = state.rows((keep[:, None] * beam + parent).flatten())
        tokens = torch.cat([tokens[keep].gather(1, parent[..., None].expand(-1, -1, step + 1)), token[..., None]], -1)
        rows = [rows[at] for at in keep.tolist()]
    return [sorted(found, key=lambda one: -one.score) for found in done]


def _end(
    done: list[list[Hypothesis]],
    rows: list[int],
    tokens: Tensor,
    best: Tensor,
    parent: Tensor,
    token: Tensor,
    beam: int,
    penalty: float,
) -> None:
    """Put the hypotheses of `tokens` `[n, beam, T]` that end with an eos among the best `beam` into `done`."""
    ends = (token[:, :beam] == EOS) & best[:, :beam].isfinite()
    for at, place in ends.nonzero().tolist():
        if len(done[rows[at]]) < beam:
            words = tuple(tokens[at, int(parent[at, place]), 1:].tolist())
            score = float(best[at, place]) / (len(words) + 1) ** penalty
            done[rows[at]].append(Hypothesis(words, score))


def _allowed(log_probs: Tensor, step: int, max_length: int) -> Tensor:
    """`log_probs` `[n, V]` without what may not be chosen: PAD; eos as the first token; all else behind the last."""
    out = log_probs.clone()
    out[:, PAD] = -torch.inf
    if step == max_length:
        out[:, :EOS] = out[:, EOS + 1 :] = -torch.inf
    elif step == 0:
        out[:, EOS] = -torch.inf
    return out


@torch.inference_mode()
def continued(
    net: Any, tokens: Tensor, count: int, temperature: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """`count` words int `[B, count]` behind streams `[B, L]` of a language model (`start`, `next_words`).

    The likeliest each time, or with a `temperature` drawn by `generator`. PAD is never chosen.
    """
    past, found = net.start(), []
    for _ in range(count):
        log_probs, past = net.next_words(tokens, past)
        last = log_probs[:, -1].clone()
        last[:, PAD] = -torch.inf
        if temperature > 0:
            tokens = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)
        else:
            tokens = last.argmax(-1, keepdim=True)
        found.append(tokens)
    return torch.cat(found, 1) if found else tokens[:, :0]
