"""Layers of transformers over tokens that can also run on their first channels, as in HAT's supernets.

Hardware-Aware Transformers (arXiv 2005.14187) over "Attention Is All You Need" (1706.03762). Activations are
`[B, L, C]`. A layer that gets fewer channels than it has uses the first columns of its weights, so that a supernet and
its extracted subnet run the same code. Surprising: heads are not sliced; all `qkv` channels are always used and divided
by the number of heads, so that fewer heads are wider and the number of weights does not depend on them. Masks are True
for keys that may be seen.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimray.data.text.vocabulary import PAD
from slimray.models.supernets.elastic import sliced_linear


def linear(layer: nn.Module, x: Tensor, out_features: int | None = None) -> Tensor:
    """Run `layer` on `[..., C]`, with its first rows and columns if it has more than `out_features` (None: all) and C.

    If the sizes match it is called as a module, even if compression has replaced it.
    """
    weight = getattr(layer, "weight", None)
    whole = not isinstance(layer, nn.Linear) or (
        weight is not None and weight.shape[1] == x.shape[-1] and out_features in (None, weight.shape[0])
    )
    return layer(x) if whole else sliced_linear(layer, x, out_features)


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Run a LayerNorm over the channels of `x`, with its first channels if it has more."""
    norm, channels = cast(nn.LayerNorm, norm), x.shape[-1]
    if norm.weight.shape[0] == channels:
        return norm(x)
    return functional.layer_norm(x, (channels,), norm.weight[:channels], norm.bias[:channels], norm.eps)


def embedding(table: nn.Module, tokens: Tensor, width: int) -> Tensor:
    """Return the first `width` channels of the rows of `tokens`."""
    return table(tokens)[..., :width]


def positions_of(tokens: Tensor) -> Tensor:
    """Return positions int64 `[B, L]`: the first token that is not PAD has 2, the next 3; PAD has 1, on either side."""
    seen = tokens != PAD
    return seen.long().cumsum(1) * seen + PAD


def sinusoids(positions: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return sinusoidal embeddings `[..., width]` of positions: all sines, then all cosines; zeros for position PAD.

    `width` is even and that of the widest network; a narrower one uses the first channels, which have other frequencies
    than those of a network built with its width.
    """
    half = width // 2
    waves = torch.arange(half, device=positions.device, dtype=torch.float32)
    waves = torch.exp(waves * (-9.210340371976184 / max(1, half - 1)))  # ln 10000
    angles = positions.unsqueeze(-1) * waves
    out = torch.cat([angles.sin(), angles.cos()], -1) * (positions != PAD).unsqueeze(-1)
    return out.to(dtype)


@dataclass(frozen=True, eq=False)
class Cached:
    """Cached keys and values, `[B, L, C]` for all heads, or `[B, heads, L, C]`."""

    keys: Tensor
    values: Tensor

    def rows(self, index: Tensor) -> "Cached":
        """Return the rows `index` of the batch."""
        return Cached(self.keys[index], self.values[index])

    def then(self, new: "Cached") -> "Cached":
        """Return these followed by the keys and values `[B, L, C]` of further tokens."""
        return Cached(torch.cat([self.keys, new.keys], 1), torch.cat([self.values, new.values], 1))


class Heads(nn.Module):
    """Heads of `width` channels each: queries `[B, T, C]`, keys and values `[B, S, C]`, out `[B, T, C]`.

    A module without weights, so that pruning can see where heads begin; `C` determines their number.
    """

    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        self.width, self.dropout = width, dropout

    def forward(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, heads: int | None
    ) -> Tensor:
        """Attend; with `heads`, the channels are divided into that many heads instead."""
        width = query.shape[-1] // heads if heads else self.width
        query, keys, values = (one.unflatten(-1, (-1, width)).transpose(1, 2) for one in (query, keys, values))
        dropped = self.dropout if self.training else 0.0
        found = functional.scaled_dot_product_attention(query, keys, values, mask, dropped, causal)
        return found.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head attention with `qkv` channels: from `width` channels to keys and values of `source` channels.

    As published, weights start with Xavier initialization over the three projections together, biases at 0.
    """

    def __init__(self, width: int, qkv: int, heads: int, source: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.heads = Heads(qkv // heads, dropout)
        source = width if source is None else source
        self.q_proj, self.k_proj = nn.Linear(width, qkv), nn.Linear(source, qkv)
        self.v_proj, self.out_proj = nn.Linear(source, qkv), nn.Linear(qkv, width)
        bound = (6 / (3 * qkv + max(width, source))) ** 0.5
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.xavier_uniform_(self.out_proj.weight)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.zeros_(layer.bias)

    def project(self, source: Tensor) -> Cached:
        """Return the keys and values of a source `[B, S, C]`."""
        return Cached(linear(self.k_proj, source), linear(self.v_proj, source))

    def forward(
        self, x: Tensor, cached: Cached, mask: Tensor | None = None, causal: bool = False, heads: int | None = None
    ) -> Tensor:
        """Return the attention of `x` `[B, T, C]` to `cached`, `[B, T, C]`; `mask` broadcasts to `[B, heads, T, S]`."""
        query = linear(self.q_proj, x)
        found = self.heads(query, cached.keys, cached.values, mask, causal, heads)
        return linear(self.out_proj, found, x.shape[-1])


def key_mask(tokens: Tensor) -> Tensor:
    """Return which of `tokens` `[B, S]` may be seen, bool `[B, 1, 1, S]`; all in a row of only PAD, to avoid nan."""
    seen = tokens != PAD
    return (seen | ~seen.any(1, keepdim=True))[:, None, None]


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them, `[..., C]` in and out; may use only the first `middle` channels."""

    def __init__(self, width: int, middle: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, middle), nn.Linear(middle, width)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, dropout: float, middle: int | None = None) -> Tensor:
        hidden = functional.dropout(linear(self.fc1, x, middle).relu(), dropout, self.training)
        return linear(self.fc2, hidden, x.shape[-1])


@dataclass(frozen=True)
class Drops:
    """Dropout rates for `embeddings`, `residual` branches and activations (`inside`); `encoder` is the rate for the
    residual branches of the encoder's attention."""

    embeddings: float = 0.0
    residual: float = 0.0
    inside: float = 0.0
    encoder: float = 0.0


class EncoderLayer(nn.Module):
    """Self-attention over a sentence, or of its tokens to the past, and a feed-forward network.

    Each is followed (with `pre_norm` preceded) by a LayerNorm.
    """

    def __init__(self, width: int, qkv: int, heads: int, ffn: int, pre_norm: bool, attention_dropout: float):
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = Attention(width, qkv, heads, dropout=attention_dropout)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ffn = FeedForward(width, ffn)

    def forward(
        self, x: Tensor, mask: Tensor | None, drops: Drops, heads: int | None = None, ffn: int | None = None
    ) -> Tensor:
        """Run the layer, `[B, S, C]` in and out; `heads` and `ffn` are the sizes of a subnet."""
        seen = self._before(self.self_attn_layer_norm, x)
        out = self.self_attn(seen, self.self_attn.project(seen), mask, heads=heads)
        x = self._after(self.self_attn_layer_norm, x + functional.dropout(out, drops.encoder, self.training))
        return self.feed_forward(x, drops, ffn)

    def attend_past(
        self, x: Tensor, past: Cached | None, dropout: float, heads: int | None = None
    ) -> tuple[Tensor, Cached]:
        """Return `[B, T, C]` after attention of tokens to themselves and the past, and all keys and values so far."""
        seen = self._before(self.self_attn_layer_norm, x)
        new, mask = self.self_attn.project(seen), None
        if past is not None:
            known, new, length = past.keys.shape[1], past.then(new), x.shape[1]
            if length > 1:  # a single token may see all
                mask = torch.ones(length, known + length, dtype=torch.bool, device=x.device).tril(known)
        out = self.self_attn(seen, new, mask, causal=past is None, heads=heads)
        return self._after(self.self_attn_layer_norm, x + functional.dropout(out, dropout, self.training)), new

    def feed_forward(self, x: Tensor, drops: Drops, middle: int | None = None) -> Tensor:
        """Return `[B, S, C]` after the feed-forward network."""
        out = self.ffn(self._before(self.final_layer_norm, x), drops.inside, middle)
        return self._after(self.final_layer_norm, x + functional.dropout(out, drops.residual, self.training))

    def _before(self, norm: nn.Module, x: Tensor) -> Tensor:
        return layer_norm(norm, x) if self.pre_norm else x

    def _after(self, norm: nn.Module, x: Tensor) -> Tensor:
        return x if self.pre_norm else layer_norm(norm, x)


class DecoderLayer(EncoderLayer):
    """An `EncoderLayer` that sees only the past, with attention to a source of `source` channels in between."""

    def __init__(
        self, width: int, source: int, qkv: int, heads: int, cross_heads: int, ffn: int, pre_norm: bool,
        attention_dropout: float,
    ):  # fmt: skip
        super().__init__(width, qkv, heads, ffn, pre_norm, attention_dropout)
        self.encoder_attn = Attention(width, qkv, cross_heads, source, attention_dropout)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)

    def decode(
        self,
        x: Tensor,
        past: Cached | None,
        source: Cached,
        mask: Tensor | None,
        drops: Drops,
        heads: int | None = None,
        cross_heads: int | None = None,
        ffn: int | None = None,
    ) -> tuple[Tensor, Cached]:
        """Run the layer, `[B, T, C]` in and out; also return the keys and values of all tokens so far.

        `source` are the keys and values for `encoder_attn`, `mask` marks those that may be seen.
        """
        x, new = self.attend_past(x, past, drops.residual, heads)
        out = self.encoder_attn(self._before(self.encoder_attn_layer_norm, x), source, mask, heads=cross_heads)
        x = self._after(self.encoder_attn_layer_norm, x + functional.dropout(out, drops.residual, self.training))
        return self.feed_forward(x, drops, ffn), new
