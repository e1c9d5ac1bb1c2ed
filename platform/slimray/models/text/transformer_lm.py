"""A plain transformer language model: the layers of translation without a source, with the same width for all words.

Takes streams int `[B, L + 1]`, returns logits `[B, L, V]` of all words but the first. It is the baseline for MicroNet's
network (micronet.py): sinusoidal positions, attention to all previous words in the window, one table of words for input
and output. `next_words` continues from a cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimray.data.text.vocabulary import PAD
from slimray.models.text.layers import Cached, Drops, EncoderLayer, layer_norm, sinusoids
from slimray.models.text.transformer import require_even, require_heads, table_of


@dataclass(frozen=True, eq=False)
class Past:
    """State of a stream: the keys and values of every layer, and the number of words so far."""

    cached: tuple[Cached | None, ...]
    length: int = 0


class TransformerLM(nn.Module):
    """The network."""

    head_name = "embed"

    def __init__(self, vocab_size: int, embed: int, ffn: int, heads: int, layers: int, pre_norm: bool, dropout: float):
        super().__init__()
        self.drops = Drops(dropout, dropout, dropout, dropout)
        self.embed = table_of(vocab_size, embed, embed)
        self.layers = nn.ModuleList(EncoderLayer(embed, embed, heads, ffn, pre_norm, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(embed) if pre_norm else None

    def forward(self, tokens: Tensor, whole: bool = True) -> Tensor:
        """Return logits `[B, L, V]` of the last L words of streams int `[B, L + 1]`; `whole` makes no difference."""
        return self._logits(tokens[:, :-1], self.start())[0]

    def start(self) -> Past:
        """Return the state of an empty stream."""
        return Past((None,) * len(self.layers))

    def next_words(self, tokens: Tensor, past: Past) -> tuple[Tensor, Past]:
        """Return log-probabilities `[B, L, V]` of the words after `tokens` int `[B, L]`, which continue a stream."""
        logits, past = self._logits(tokens, past)
        return logits.log_softmax(-1), past

    def _logits(self, tokens: Tensor, past: Past) -> tuple[Tensor, Past]:
        tokens = tokens.long()
        width, length = self.embed.embedding_dim, tokens.shape[1]
        places = PAD + 1 + past.length + torch.arange(length, device=tokens.device).expand(tokens.shape)
        x = self.embed(tokens) * width**0.5
        x = functional.dropout(x + sinusoids(places, width, x.dtype), self.drops.embeddings, self.training)
        cached = []
        for layer, before in zip(self.layers, past.cached, strict=True):
            x, new = layer.attend_past(x, before, self.drops.residual)  # type: ignore[operator]
            x = layer.feed_forward(x, self.drops)  # type: ignore[operator]
            cached.append(new)
        x = x if self.norm is None else layer_norm(self.norm, x)
        return functional.linear(x, self.embed.weight), Past(tuple(cached), past.length + length)


def transformer_lm(
    *,
    vocab_size: int,
    embed: int = 256,
    ffn: int = 1024,
    heads: int = 4,
    layers: int = 4,
    pre_norm: bool = True,
    dropout: float = 0.1,
) -> TransformerLM:
    """Build a language model; raise UserError for heads that do not divide `embed`, or an odd `embed`."""
    require_heads(embed, [heads], "heads", "embed")
    require_even(embed)
    return TransformerLM(vocab_size, embed, ffn, heads, layers, pre_norm, dropout)
