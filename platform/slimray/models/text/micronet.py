"""The MicroNet language model: a small transformer with a short window, a memory and a cache of recent words.

MicroNet for Efficient Language Modeling (arXiv 2005.07877). Takes streams int `[B, L + 1]` and returns the
log-probabilities `[B, L]` of all words but the first, without a table over the vocabulary unless requested (`whole`).
`score` does so chunk by chunk, carrying memory and cache along; `next_words` returns those of all possible next words.
Layers are pre-norm; a query sees itself and the `context` - 1 words before it, with a learned embedding of the
distance; the keys and values of these words are the memory. Surprising: attention runs in blocks as long as the window,
so that time and memory grow linearly with the length of a chunk; there is no final norm. The cache (1612.04426) mixes
in words of the last `cache` positions, weighted by the similarity of the hidden vectors before them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimray.models.text.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from slimray.models.text.layers import Cached
from slimray.spec import lookup

CHUNK = 2048  # words of a stream processed at once
CACHE_START = (0.016, 0.07)  # initial sharpness and share of the cache


class RelativeAttention(nn.Module):
    """Attention of every word to itself and the `context` - 1 before it: `[B, L, C]` in and out.

    `qkv` is laid out head by head, each with query, key and value; `positions` `[k, context]` has the distance 0 last.
    """

    def __init__(self, width: int, heads: int, key: int, value: int, context: int):
        super().__init__()
        self.heads, self.key, self.value, self.context = heads, key, value, context
        self.qkv = nn.Linear(width, heads * (2 * key + value))
        self.out = nn.Linear(heads * value, width, bias=False)
        self.positions = nn.Parameter(torch.empty(key, context))
        nn.init.normal_(self.positions, 0, 0.02)

    def forward(self, x: Tensor, memory: Cached | None) -> tuple[Tensor, Cached]:
        """Return the output, and the memory for the words that follow."""
        batch, length, _ = x.shape
        packed = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, keys, values = packed.split([self.key, self.key, self.value], -1)
        if memory is not None:
            keys, values = torch.cat([memory.keys, keys], 2), torch.cat([memory.values, values], 2)
        window, known = self.context - 1, keys.shape[2] - length
        kept = max(0, known + length - window)
        after = Cached(keys[:, :, kept:].detach(), values[:, :, kept:].detach())
        block = max(1, min(window, length))
        blocks = -(-length // block)
        rest = blocks * block - length
        query = functional.pad(query, (0, 0, 0, rest))
        keys, values = (functional.pad(one, (0, 0, window - known, rest)) for one in (keys, values))
        query = query.unflatten(2, (blocks, block))
        keys, values = (one.unfold(2, window + block, block).transpose(-1, -2) for one in (keys, values))
        bias = self._bias(query, window - known)
        flat = [one.transpose(1, 2).flatten(0, 1) for one in (query, keys, values)]
        found = functional.scaled_dot_product_attention(*flat, attn_mask=bias.transpose(1, 2).flatten(0, 1))
        found = found.unflatten(0, (batch, blocks)).transpose(2, 3).flatten(3).flatten(1, 2)[:, :length]
        return self.out(found), after

    def _bias(self, query: Tensor, missing: int) -> Tensor:
        """Return the bias of logits by distance `[B, heads, blocks, block, window + block]`, -inf outside the window.

        The first `missing` keys do not exist.
        """
        window, (blocks, block) = self.context - 1, query.shape[2:4]
        by_distance = query @ self.positions / self.key**0.5
        rows = torch.arange(block, device=query.device)[:, None]
        columns = torch.arange(window + block, device=query.device)[None]
        column = (columns - rows).expand(block, -1)  # index into `positions`
        bias = by_distance.gather(-1, column.clamp(0, window).expand(*query.shape[:4], -1))
        inside = (column >= 0) & (column <= window)
        first = torch.arange(blocks, device=query.device)[:, None] * block + columns  # index among all keys
        seen = inside & (first >= missing)[:, None]
        return bias.masked_fill(~seen, -torch.inf)


class Layer(nn.Module):
    """Attention and a feed-forward network, each after a norm: `[B, L, C]` in and out."""

    def __init__(self, width: int, heads: int, key: int, value: int, ffn: int, context: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = RelativeAttention(width, heads, key, value, context)
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, x: Tensor, memory: Cached | None) -> tuple[Tensor, Cached]:
        found, after = self.attention(self.ln1(x), memory)
        x = x + functional.dropout(found, self.dropout, self.training)
        hidden = functional.dropout(self.fc1(self.ln2(x)).relu(), self.dropout, self.training)
        return x + functional.dropout(self.fc2(hidden), self.dropout, self.training), after


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model; `widths` are those of the bins of words, the first is that of the network."""

    widths: tuple[int, ...]
    cutoffs: tuple[int, ...]
    layers: int
    heads: int
    key: int
    value: int
    ffn: int
    context: int


@dataclass(frozen=True, eq=False)
class Past:
    """State of a stream: the memory of each layer, and for the cache hidden vectors `[B, m, C]` and the words `[B, m]`
    that followed them. `pending` `[B, 1, C]` is the last hidden vector, whose next word is not known yet."""

    memories: tuple[Cached | None, ...]
    keys: Tensor | None = None
    words: Tensor | None = None
    pending: Tensor | None = None


class MicroNetLM(nn.Module):
    """The network; `cache` 0 means no cache."""

    head_name = "softmax"

    def __init__(self, vocab_size: int, shape: Shape, cache: int, dropout: float):
        super().__init__()
        self.shape, self.cache, self.vocab_size, self.dropout = shape, cache, vocab_size, dropout
        self.embed = AdaptiveEmbedding(vocab_size, shape.widths, shape.cutoffs)
        self.layers = nn.ModuleList(
            Layer(shape.widths[0], shape.heads, shape.key, shape.value, shape.ffn, shape.context, dropout)
            for _ in range(shape.layers)
        )
        self.softmax = AdaptiveSoftmax(vocab_size, shape.widths, shape.cutoffs)
        if cache:
            sharpness, share = torch.tensor(CACHE_START)
            self.cache_sharpness = nn.Parameter(sharpness.expm1().log())  # under a softplus
            self.cache_share = nn.Parameter(share.logit())

    def forward(self, tokens: Tensor, whole: bool = False) -> Tensor:
        """Return log-probabilities `[B, L]` of the last L words of streams int `[B, L + 1]`, in chunks if long.

        With `whole`, return those of all words at each position, `[B, L, V]`, in one step.
        """
        if whole:
            return self.next_words(tokens[:, :-1], self.start())[0]
        if torch.compiler.is_exporting():  # a loop over chunks would fix the length
            return self.score(tokens[:, :-1], tokens[:, 1:], self.start())[0]
        past, found = self.start(), []
        for first in range(0, tokens.shape[1] - 1, CHUNK):
            part = tokens[:, first : first + CHUNK + 1]
            log_probs, past = self.score(part[:, :-1], part[:, 1:], past)
            found.append(log_probs)
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def start(self) -> Past:
        """Return the state of an empty stream."""
        return Past((None,) * len(self.layers))

    def hidden(self, tokens: Tensor, past: Past) -> tuple[Tensor, tuple[Cached, ...]]:
        """Return the output of the last layer, `[B, L, C]`, and the memories after the tokens."""
        x, memories = functional.dropout(self.embed(tokens.long()), self.dropout, self.training), []
        for layer, memory in zip(self.layers, past.memories, strict=True):
            x, after = layer(x, memory)
            memories.append(after)
        return x, tuple(memories)

    def next_words(self, tokens: Tensor, past: Past) -> tuple[Tensor, Past]:
        """Return log-probabilities `[B, L, V]` of the words after `tokens` `[B, L]`, which continue a stream."""
        tokens = tokens.long()
        hidden, memories = self.hidden(tokens, past)
        log_probs = self.softmax(hidden, self.embed)
        if not self.cache:
            return log_probs, Past(memories)
        if past.pending is not None:
            past = self._remember(past, past.pending, tokens[:, :1])
        followed = tokens[:, 1:]
        weights, words = self._cached(past, hidden, functional.pad(followed, (0, 1)))
        found = torch.zeros_like(log_probs).scatter_add(2, words[:, None].expand(-1, weights.shape[1], -1), weights)
        past = self._remember(past, hidden[:, :-1], followed)
        return self._mixed(log_probs, found), replace(past, memories=memories, pending=hidden[:, -1:].detach())

    def score(self, tokens: Tensor, targets: Tensor, past: Past) -> tuple[Tensor, Past]:
        """Return log-probabilities `[B, L]` of `targets` after `tokens`, both int `[B, L]`, which continue a stream."""
        tokens, targets = tokens.long(), targets.long()
        hidden, memories = self.hidden(tokens, past)
        found = self.softmax.log_probs_of(hidden.flatten(0, 1), targets.flatten(), self.embed).view(targets.shape)
        if not self.cache:
            return found, Past(memories)
        weights, words = self._cached(past, hidden, targets)
        cached = (weights * (words[:, None] == targets[..., None])).sum(-1)
        return self._mixed(found, cached), replace(self._remember(past, hidden, targets), memories=memories)

    def _cached(self, past: Past, hidden: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight of each cached position for each of `hidden`, `[B, L, m + L]`, and the words `[B, m + L]`.

        Each sees the last `cache` positions before it; the first of a stream sees none, so all its weights are 0.
        """
        keys, known = hidden, 0
        if past.keys is not None:
            assert past.words is not None
            keys, words, known = (
                torch.cat([past.keys, hidden], 1),
                torch.cat([past.words, words], 1),
                past.keys.shape[1],
            )
        at = known + torch.arange(hidden.shape[1], device=hidden.device)[:, None]
        place = torch.arange(keys.shape[1], device=hidden.device)[None]
        seen = (place < at) & (place >= at - self.cache)
        logits = functional.softplus(self.cache_sharpness) * (hidden @ keys.transpose(1, 2))
        return logits.masked_fill(~seen, -1e9).softmax(-1) * seen, words

    def _mixed(self, log_probs: Tensor, cached: Tensor) -> Tensor:
        share = self.cache_share
        by_cache = (cached + 1e-30).log() + functional.logsigmoid(share)
        return torch.logaddexp(log_probs + functional.logsigmoid(-share), by_cache)

    def _remember(self, past: Past, hidden: Tensor, words: Tensor) -> Past:
        """Add positions whose words are now known to `past`, and keep the last `cache` of them."""
        hidden = hidden.detach()
        if past.keys is not None and past.words is not None:
            hidden, words = torch.cat([past.keys, hidden], 1), torch.cat([past.words, words], 1)
        first = max(0, hidden.shape[1] - self.cache)
        return replace(past, keys=hidden[:, first:], words=words[:, first:], pending=None)


WIKITEXT = Shape((256, 64, 4), (3500, 25000), 8, 8, 24, 24, 768, 97)
PRESETS = {
    "wikitext103": WIKITEXT,
    "wikitext103_15m": replace(WIKITEXT, widths=(384, 64, 16), key=36, value=36),
    "wikitext103_teacher": Shape((512, 256, 16), (3500, 25000), 16, 8, 64, 64, 1536, 97),
    "ptb": Shape((192, 64, 16), (1000, 4000), 4, 6, 24, 24, 576, 65),
    "ptb_small": Shape((128, 48, 16), (1000, 4000), 4, 4, 32, 32, 384, 65),
    "tiny": Shape((16, 8, 4), (10, 20), 2, 2, 4, 4, 24, 7),
}


def micronet_lm(
    *,
    vocab_size: int,
    preset: str = "wikitext103",
    cache: int = 0,
    adaptive: bool = True,
    dropout: float = 0.0,
) -> MicroNetLM:
    """Build a language model of the sizes `preset` (PRESETS); raise UserError for an unknown one.

    `cache` is the number of cached positions (published: 2000). Without `adaptive`, the vectors of all words have the
    same width.
    """
    shape = lookup(PRESETS, preset, "preset")
    cutoffs = tuple(cut for cut in shape.cutoffs if cut < vocab_size) if adaptive else ()
    return MicroNetLM(
        vocab_size, replace(shape, cutoffs=cutoffs, widths=shape.widths[: len(cutoffs) + 1]), cache, dropout
    )
