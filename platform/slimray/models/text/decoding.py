"""Greedy and beam search for translation networks, for many sentences at once; continuation of streams.

`net` is a Transformer, or anything with its `encode`, `start` and `decode`. The rules are those of the published
results (runtime/translate.py, which tracks the hypotheses of a beam). Apart from rounding, the result for a sentence
does not depend on the others in the batch.
"""

from typing import Any

import torch
from torch import Tensor

from slimray.data.text.vocabulary import EOS, PAD
from slimray.runtime.translate import Beams, Hypothesis, forbidden

MAX_LENGTH = 200
CHUNK = 256  # words of a stream processed at once


@torch.inference_mode()
def greedy(net: Any, source: Tensor, max_length: int = MAX_LENGTH) -> list[list[int]]:
    """Translate sentences int `[B, S]` with eos by always taking the most likely token; returns lists without eos."""
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
    """Return up to `beam` translations, best first, for each of the sentences int `[B, S]` with eos."""
    index = torch.arange(len(source), device=source.device).repeat_interleave(beam)
    state, beams = net.start(net.encode(source).rows(index)), Beams(len(source), beam, penalty, max_length)
    while True:
        logits, state = net.decode(torch.from_numpy(beams.last).to(source.device), state)
        log_probs = _allowed(logits[:, -1].double().log_softmax(-1), beams.length, max_length)
        vocab_size = log_probs.shape[-1]
        totals = torch.from_numpy(beams.scores).to(source.device).view(-1, 1) + log_probs
        totals = totals.view(len(beams.rows), beam * vocab_size)
        best, place = totals.topk(min(2 * beam, totals.shape[1]), -1)
        rows = beams.go_on(best.cpu().numpy(), place.cpu().numpy(), vocab_size)
        if rows is None:
            return beams.found
        state = state.rows(torch.from_numpy(rows).to(source.device))


def _allowed(log_probs: Tensor, length: int, max_length: int) -> Tensor:
    """Mask in log-probabilities or logits `[n, V]` the tokens that must not follow `length` others."""
    out = torch.from_numpy(forbidden(length, max_length, log_probs.shape[-1])).to(log_probs.device)
    return log_probs.masked_fill(out, -torch.inf)


@torch.inference_mode()
def continued(
    net: Any, tokens: Tensor, count: int, temperature: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Continue streams `[B, L]` of a language model (`start`, `next_words`) by `count` words, int `[B, count]`.

    Takes the most likely word each time, or with a `temperature` draws it by `generator`. PAD is never chosen. Long
    streams are processed in chunks of CHUNK words.
    """
    past, found = net.start(), []
    *before, tokens = tokens.split(CHUNK, 1)
    for part in before:
        past = net.next_words(part, past)[1]
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
