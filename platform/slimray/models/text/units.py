"""The pieces of a transformer whose costs are counted and measured separately, returned by `HatSupernet.units`.

The protocol of HAT's latency (arXiv 2005.14187) is part of the key of every unit: one sentence of `length` tokens; an
encoder layer runs once, a decoder layer `length` times, one token at a time with a cache, for `beam` hypotheses,
without the beam search itself. MACs are counted on other modules: as published, the same layers run once over a whole
target sentence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from slimray.data.text.vocabulary import EOS
from slimray.models.supernets.elastic import Unit
from slimray.models.text.layers import (
    Attention,
    Cached,
    Drops,
    EncoderLayer,
    FeedForward,
    embedding,
    positions_of,
    sinusoids,
)
from slimray.models.text.transformer import Design, Transformer

NO_DROPS = Drops()


@dataclass(frozen=True)
class Spoken:
    """The protocol: number of tokens of the source and of the target, and of hypotheses decoded at once."""

    length: int
    beam: int


def _unit(what: str, sizes: dict[str, int], spoken: Spoken, width: int, make: Callable[..., nn.Module]) -> Unit:
    key = "-".join([what, *(f"{name}:{size}" for name, size in sizes.items())])
    key += f"-length:{spoken.length}-beam:{spoken.beam}"
    measured, counted = (partial(make, **sizes, spoken=spoken, steps=steps) for steps in (True, False))
    return Unit(key, (spoken.length, width), measured, counted)


def encoder_unit(design: Design, width: int, heads: int, ffn: int, spoken: Spoken) -> Unit:
    """Return the unit of an encoder layer over a sentence `[B, S, width]`."""
    sizes = {"width": width, "qkv": design.qkv, "heads": heads, "ffn": ffn, "pre_norm": int(design.pre_norm)}
    return _unit("encoder", sizes, spoken, width, _EncoderUnit)


def decoder_unit(design: Design, width: int, heads: int, ffn: int, spoken: Spoken) -> Unit:
    """Return the unit of a decoder layer without its attention to the source."""
    sizes = {"width": width, "qkv": design.qkv, "heads": heads, "ffn": ffn, "pre_norm": int(design.pre_norm)}
    return _unit("decoder", sizes, spoken, width, _DecoderUnit)


def cross_unit(design: Design, source: int, width: int, heads: int, attends: int, spoken: Spoken) -> Unit:
    """Return the unit of a decoder layer's attention to the source `[B, S, source]`, including its keys and values."""
    sizes = {"source": source, "width": width, "qkv": design.qkv, "heads": heads, "attends": attends}
    return _unit("cross", sizes, spoken, source, _CrossUnit)


def words_unit(design: Design, source: int, width: int, spoken: Spoken) -> Unit:
    """Return the unit of the embeddings of both sides and the output layer."""
    sizes = {"source": source, "width": width, "widest": design.widest, "words": design.vocab_size}
    sizes |= {"tied": int(design.tied), "pre_norm": int(design.pre_norm)}
    return _unit("words", sizes, spoken, width, _WordsUnit)


class Translation(nn.Module):
    """A transformer that processes a fixed sentence by the protocol `spoken`, without choosing words: `[1, L, C]` in,
    which is ignored, logits `[beam, 1, V]` of the last step out."""

    def __init__(self, net: Transformer, spoken: Spoken):
        super().__init__()
        self.net, self.spoken = net, spoken

    def forward(self, x: Tensor) -> Tensor:
        words = torch.full((1, self.spoken.length), EOS + 5, device=x.device)
        encoded = self.net.encode(words).rows(words.new_zeros(self.spoken.beam))
        state, token = self.net.start(encoded), words.new_full((self.spoken.beam, 1), EOS)
        for _ in range(self.spoken.length):
            logits, state = self.net.decode(token, state)
        return logits


class _EncoderUnit(nn.Module):
    def __init__(self, width: int, qkv: int, heads: int, ffn: int, pre_norm: int, spoken: Spoken, steps: bool):
        super().__init__()
        self.layer = EncoderLayer(width, qkv, heads, ffn, bool(pre_norm), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, None, NO_DROPS)


class _DecoderUnit(nn.Module):
    """Token by token (`steps`), or all tokens at once: `[B, L, width]` in and out."""

    def __init__(self, width: int, qkv: int, heads: int, ffn: int, pre_norm: int, spoken: Spoken, steps: bool):
        super().__init__()
        self.spoken, self.steps, self.width = spoken, steps, width
        self.attention, self.ffn = Attention(width, qkv, heads), FeedForward(width, ffn)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if not self.steps:
            return self._layer(x, None)[0]
        past = None
        out = x.new_zeros(self.spoken.beam, 1, self.width)
        for _ in range(self.spoken.length):
            out, past = self._layer(out, past)
        return out.expand(-1, x.shape[1], -1)

    def _layer(self, x: Tensor, past: Cached | None) -> tuple[Tensor, Cached]:
        new = self.attention.project(x)
        new = new if past is None else past.then(new)
        x = self.norms[0](x + self.attention(x, new, causal=past is None))
        return self.norms[1](x + self.ffn(x, 0.0)), new


class _CrossUnit(nn.Module):
    """Token by token (`steps`), or all tokens at once: `[B, L, source]` -> `[B, L, width]`."""

    def __init__(self, source: int, width: int, qkv: int, heads: int, attends: int, spoken: Spoken, steps: bool):
        super().__init__()
        self.spoken, self.steps, self.attends, self.width = spoken, steps, attends, width
        self.attention, self.norm = Attention(width, qkv, heads, source), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat([x] * self.attends, 1)
        if not self.steps:
            target = x.new_zeros(len(x), self.spoken.length, self.width)
            return self.norm(target + self.attention(target, self.attention.project(seen)))
        cached = self.attention.project(seen.expand(self.spoken.beam, -1, -1))
        out = x.new_zeros(self.spoken.beam, 1, self.width)
        for _ in range(self.spoken.length):
            out = self.norm(out + self.attention(out, cached))
        return out.expand(-1, x.shape[1], -1)


class _WordsUnit(nn.Module):
    """`[B, L, width]` -> `[B, L, words]`; the input is ignored, all words are eos."""

    def __init__(
        self, source: int, width: int, widest: int, words: int, tied: int, pre_norm: int, spoken: Spoken, steps: bool
    ):
        super().__init__()
        self.spoken, self.steps, self.source, self.width, self.widest = spoken, steps, source, width, widest
        self.tables = nn.ModuleList(nn.Embedding(words, w) for w in ([max(source, width)] if tied else [source, width]))
        self.output = None if tied else nn.Linear(width, words, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in (source, width) if pre_norm)

    def forward(self, x: Tensor) -> Tensor:
        sentence = torch.full((len(x), self.spoken.length), EOS, device=x.device)
        self._embed(self.tables[0], sentence, self.source)
        if not self.steps:
            return self._logits(self._embed(self.tables[-1], sentence, self.width))
        token = sentence[:1, :1].expand(self.spoken.beam, 1)
        for _ in range(self.spoken.length):
            out = self._logits(self._embed(self.tables[-1], token, self.width))
        return out.expand(-1, x.shape[1], -1)

    def _embed(self, table: nn.Module, tokens: Tensor, width: int) -> Tensor:
        places = sinusoids(positions_of(tokens), self.widest)[..., :width]
        out = embedding(table, tokens, width) * width**0.5 + places
        return self.norms[0 if width == self.source else 1](out) if len(self.norms) else out

    def _logits(self, x: Tensor) -> Tensor:
        if self.output is not None:
            return self.output(x)
        return nn.functional.linear(x, self.tables[0].weight[:, : self.width])  # type: ignore[index]
