"""Transformer for translation (arXiv 1706.03762), for whole sentences at once or token by token with a cache.

Takes pairs of sentences int `[B, 2, L]`, padded with PAD: the source with its eos, and the input of the decoder, which
begins with eos; returns logits `[B, L, V]` of the next token at each position. Conventions are those of the released
HAT networks (2005.14187): embeddings times the root of their width, post-norm by default, `qkv` channels divided by the
heads, one table for both sides and the output (`tied`) or three. `Sizes` define how much of it runs: in HAT's
supernets (hat.py) less than all, where a narrower side uses the first channels of everything, even of positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimray.data.text.vocabulary import PAD
from slimray.models.text.layers import (
    Cached,
    DecoderLayer,
    Drops,
    EncoderLayer,
    embedding,
    key_mask,
    layer_norm,
    linear,
    positions_of,
    sinusoids,
)
from slimray.spec import UserError


@dataclass(frozen=True)
class EncoderSize:
    """A layer of the encoder: heads, and channels inside its feed-forward network."""

    heads: int
    ffn: int


@dataclass(frozen=True)
class DecoderSize:
    """A layer of the decoder, which attends to the last `attends` outputs of the encoder's layers at once."""

    heads: int
    cross_heads: int
    ffn: int
    attends: int = 1


@dataclass(frozen=True)
class Sizes:
    """Sizes of the part of a network that runs: channels of both sides, and their layers."""

    encoder: int
    decoder: int
    encoder_layers: tuple[EncoderSize, ...]
    decoder_layers: tuple[DecoderSize, ...]


@dataclass(frozen=True)
class Design:
    """Properties that all subnets of a transformer share.

    `widest` is the width to which `dropout` and the positions refer: a side of e channels drops dropout * e / widest.
    With `released_dropout` the encoder's attention drops `dropout` instead, as in the released code.
    """

    vocab_size: int
    qkv: int
    widest: int
    tied: bool = True
    pre_norm: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    released_dropout: bool = False

    def drops(self, width: int) -> Drops:
        """Return the dropout rates for a side of `width` channels."""
        share = self.dropout * width / self.widest
        return Drops(share, share, share, self.dropout if self.released_dropout else share)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Result of the encoder: outputs `[B, S, C]` of its last layers, the last one first, and a mask of valid tokens."""

    outputs: tuple[Tensor, ...]
    mask: Tensor

    def rows(self, index: Tensor) -> "Encoded":
        """Return the rows `index` of the batch."""
        return Encoded(tuple(one[index] for one in self.outputs), self.mask[index])


@dataclass(frozen=True, eq=False)
class State:
    """State of a decoder after `length` tokens: per layer their cached keys and values, and those and the mask of the
    source."""

    past: tuple[Cached | None, ...]
    source: tuple[Cached, ...]
    masks: tuple[Tensor, ...]
    length: int = 0

    def rows(self, index: Tensor) -> "State":
        """Return the rows `index` of the batch."""
        past = tuple(None if one is None else one.rows(index) for one in self.past)
        source = tuple(one.rows(index) for one in self.source)
        return replace(self, past=past, source=source, masks=tuple(mask[index] for mask in self.masks))


class Transformer(nn.Module):
    """The network; `sizes` are those it was built with. A call without sizes runs the layers as they are, which pruning
    may have made narrower."""

    head_name = "output"

    def __init__(self, design: Design, sizes: Sizes):
        super().__init__()
        self.design, self.sizes = design, sizes
        outputs, widths = len(sizes.encoder_layers), (sizes.encoder, sizes.decoder)
        if any(not 1 <= layer.attends <= outputs for layer in sizes.decoder_layers):
            raise UserError(f"attends: must be at least 1 and at most {outputs}, the layers of the encoder")
        if design.tied:
            self.embed = table_of(design.vocab_size, max(widths), design.widest)
        else:
            self.source_embed, self.target_embed = (table_of(design.vocab_size, w, design.widest) for w in widths)
            self.output = nn.Linear(sizes.decoder, design.vocab_size, bias=False)
            nn.init.normal_(self.output.weight, 0, sizes.decoder**-0.5)
        norm = (design.pre_norm, design.attention_dropout)
        self.encoder_layers = nn.ModuleList(
            EncoderLayer(sizes.encoder, design.qkv, one.heads, one.ffn, *norm) for one in sizes.encoder_layers
        )
        self.decoder_layers = nn.ModuleList(
            DecoderLayer(sizes.decoder, sizes.encoder, design.qkv, one.heads, one.cross_heads, one.ffn, *norm)
            for one in sizes.decoder_layers
        )
        if design.pre_norm:
            self.encoder_norm, self.decoder_norm = (nn.LayerNorm(width) for width in widths)

    def forward(self, tokens: Tensor, sizes: Sizes | None = None) -> Tensor:
        """Compute logits `[B, L, V]` for pairs int `[B, 2, L]`."""
        tokens = tokens.long()
        logits, _ = self.decode(tokens[:, 1], self.start(self.encode(tokens[:, 0], sizes), sizes), sizes)
        return logits

    def encode(self, source: Tensor, sizes: Sizes | None = None) -> Encoded:
        """Encode sentences int `[B, S]` with eos, and PAD on either side, for the decoder to attend to."""
        whole, sizes = sizes is None, sizes or self.sizes
        drops, mask = self.design.drops(sizes.encoder), key_mask(source)
        x = self._embed(source, positions_of(source), sizes.encoder, "source_embed")
        keep = max((layer.attends for layer in sizes.decoder_layers), default=1)
        outputs: list[Tensor] = []
        for layer, size in zip(self.encoder_layers, sizes.encoder_layers, strict=False):
            x = layer(x, mask, drops) if whole else layer(x, mask, drops, size.heads, size.ffn)
            outputs = [x, *outputs][:keep]
        if self.design.pre_norm:
            outputs[0] = layer_norm(self.encoder_norm, x)
        return Encoded(tuple(outputs), mask)

    def start(self, encoded: Encoded, sizes: Sizes | None = None) -> State:
        """Return the state of a decoder before its first token, with the keys and values of the source."""
        layers = (sizes or self.sizes).decoder_layers
        source, masks = [], []
        for layer, size in zip(self.decoder_layers, layers, strict=False):
            seen = encoded.outputs[: size.attends]
            joined = seen[0] if len(seen) == 1 else torch.cat(seen, 1)
            source.append(layer.encoder_attn.project(joined))  # type: ignore[union-attr, operator]
            masks.append(encoded.mask if len(seen) == 1 else torch.cat([encoded.mask] * len(seen), -1))
        return State((None,) * len(layers), tuple(source), tuple(masks))

    def decode(self, tokens: Tensor, state: State, sizes: Sizes | None = None) -> tuple[Tensor, State]:
        """Return logits `[B, T, V]` for the next tokens int `[B, T]`, and the new state; T is 1 except at first."""
        whole, sizes = sizes is None, sizes or self.sizes
        drops, length = self.design.drops(sizes.decoder), state.length
        places = positions_of(tokens) if None in state.past else torch.full_like(tokens, PAD + 1 + length)
        x = self._embed(tokens, places, sizes.decoder, "target_embed")
        past = []
        for number, size in enumerate(sizes.decoder_layers):
            cut = () if whole else (size.heads, size.cross_heads, size.ffn)
            x, seen = self.decoder_layers[number].decode(  # type: ignore[operator]
                x, state.past[number], state.source[number], state.masks[number], drops, *cut
            )
            past.append(seen)
        if self.design.pre_norm:
            x = layer_norm(self.decoder_norm, x)
        return self.logits(x), replace(state, past=tuple(past), length=length + tokens.shape[1])

    def logits(self, x: Tensor) -> Tensor:
        """Return logits `[..., V]` for outputs of the last layer."""
        if not self.design.tied:
            return linear(self.output, x)
        return functional.linear(x, self.embed.weight[:, : x.shape[-1]])

    def _embed(self, tokens: Tensor, places: Tensor, width: int, name: str) -> Tensor:
        table = self.embed if self.design.tied else self.get_submodule(name)
        x = embedding(table, tokens, width) * width**0.5
        x = x + sinusoids(places, self.design.widest, x.dtype)[..., :width]
        return functional.dropout(x, self.design.drops(width).embeddings, self.training)


def table_of(vocab_size: int, width: int, widest: int) -> nn.Embedding:
    """Return a table of words with zeros for PAD."""
    table = nn.Embedding(vocab_size, width, padding_idx=PAD)
    nn.init.normal_(table.weight, 0, widest**-0.5)
    with torch.no_grad():
        table.weight[PAD] = 0
    return table


def require_heads(width: int, heads: Sequence[int], where: str, of: str = "qkv") -> None:
    """Raise UserError unless `width` channels can be divided by all of `heads`."""
    for count in heads:
        if width % count:
            raise UserError(f"{where}: must divide {of} ({width}), got {count}")


def require_even(embed: int) -> None:
    """Raise UserError for an odd width."""
    if embed % 2:
        raise UserError(f"embed: must be even, as half of its channels hold sines (got {embed})")


def transformer(
    *,
    vocab_size: int,
    embed: int = 256,
    qkv: int = 256,
    ffn: int = 1024,
    heads: int = 4,
    encoder_layers: int = 3,
    decoder_layers: int = 3,
    attends: int = 1,
    tied: bool = True,
    pre_norm: bool = False,
    dropout: float = 0.1,
    attention_dropout: float = 0.0,
) -> Transformer:
    """Build a transformer for translation; raise UserError for heads that do not divide `qkv`, or an odd `embed`."""
    require_heads(qkv, [heads], "heads")
    require_even(embed)
    design = Design(vocab_size, qkv, embed, tied, pre_norm, dropout, attention_dropout)
    layers = (EncoderSize(heads, ffn),) * encoder_layers, (DecoderSize(heads, heads, ffn, attends),) * decoder_layers
    return Transformer(design, Sizes(embed, embed, *layers))
