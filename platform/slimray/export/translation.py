"""A translation network as two graphs: the encoder, and one step of the decoder with what it cached.

The encoder takes `source` int64 `[B, S]` and gives, per layer of the decoder, keys and values of the source and which
of them count. The step takes the last `token` `[B, 1]`, these, and keys and values `past_...` of the tokens before it,
of length 0 at first, and gives logits `[B, V]` and the new ones. `translate` runs both, wherever they were exported.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slimray.data.text.vocabulary import EOS, PAD
from slimray.export.graph import Graph
from slimray.models.text.layers import Cached
from slimray.models.text.transformer import State, Transformer

Arrays = Mapping[str, NDArray]
Run = Callable[[Arrays], Arrays]  # named arrays in, named arrays out
OF_SOURCE, OF_PAST = ("source_keys_{}", "source_values_{}", "source_mask_{}"), ("past_keys_{}", "past_values_{}")
NEXT = "next_{}"


class Encode(nn.Module):
    """Sentences to what the decoder attends to, layer by layer in a row."""

    def __init__(self, net: Transformer):
        super().__init__()
        self.net = net

    def forward(self, source: Tensor) -> tuple[Tensor, ...]:
        state = self.net.start(self.net.encode(source))
        pairs = zip(state.source, state.masks, strict=True)
        return tuple(one for cached, mask in pairs for one in (cached.keys, cached.values, mask[:, 0, 0]))


class Step(nn.Module):
    """A token, what `Encode` gave and what is cached to logits and what is cached now."""

    def __init__(self, net: Transformer):
        super().__init__()
        self.net = net

    def forward(self, token: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(self.net.decoder_layers)
        given, cached = tensors[: 3 * count], tensors[3 * count :]
        source = tuple(Cached(given[3 * i], given[3 * i + 1]) for i in range(count))
        masks = tuple(given[3 * i + 2][:, None, None] for i in range(count))
        past = tuple(Cached(cached[2 * i], cached[2 * i + 1]) for i in range(count))
        state = State(past, source, masks, past[0].keys.shape[1])
        logits, after = self.net.decode(token, state)
        new = [one for seen in after.past if seen is not None for one in (seen.keys, seen.values)]
        return logits[:, -1], *new


def encoder_graph(net: Transformer, source: Tensor) -> Graph:
    """The graph of the encoder of a network that `graph.ready` made; `source` are sentences int64 `[B, S]`."""
    free = {"source": {0: "batch", 1: "source"}}
    return Graph(Encode(net), {"source": source.clone()}, tuple(_names(net, OF_SOURCE)), free)


def step_graph(net: Transformer, source: Tensor) -> Graph:
    """The graph of a step of the decoder."""
    with torch.no_grad():
        given = dict(zip(_names(net, OF_SOURCE), Encode(net)(source), strict=True))
        token = torch.full((len(source), 1), EOS)
        _, state = net.decode(token.expand(-1, 3), net.start(net.encode(source)))
    cached = [one for seen in state.past if seen is not None for one in (seen.keys, seen.values)]
    names = _names(net, OF_PAST)
    free = {"token": {0: "batch"}} | {name: {0: "batch", 1: name} for name in given}
    free |= {name: {0: "batch", 1: "past"} for name in names}
    inputs = {"token": token} | given | dict(zip(names, cached, strict=True))
    return Graph(Step(net), inputs, ("logits", *(NEXT.format(name) for name in names)), free)


def _names(net: Transformer, forms: tuple[str, ...]) -> list[str]:
    return [form.format(number) for number in range(len(net.decoder_layers)) for form in forms]


def translate(encode: Run, step: Run, source: NDArray, width: int, max_length: int = 200) -> list[list[int]]:
    """The likeliest tokens of sentences int64 `[B, S]` with eos, as `models.text.decoding.greedy` finds them.

    `width` is that of a cached key (`qkv`).
    """
    given = dict(encode({"source": source}))
    layers = len(given) // len(OF_SOURCE)
    names = [form.format(number) for number in range(layers) for form in OF_PAST]
    cached: dict[str, NDArray] = {name: np.zeros((len(source), 0, width), np.float32) for name in names}
    token, found = np.full((len(source), 1), EOS, np.int64), []
    unfinished = np.ones(len(source), bool)
    for place in range(max_length + 1):
        out = step({"token": token, **given, **cached})
        logits = np.array(out["logits"])
        logits[:, PAD] = -np.inf
        if place == max_length:
            logits[:, np.arange(logits.shape[1]) != EOS] = -np.inf
        elif place == 0:
            logits[:, EOS] = -np.inf
        best = np.where(unfinished, logits.argmax(-1), PAD)
        found.append(best)
        unfinished &= best != EOS
        if not unfinished.any():
            break
        token, cached = best[:, None], {name: out[NEXT.format(name)] for name in names}
    return [[int(t) for t in row if t not in (PAD, EOS)] for row in np.stack(found, 1)]
