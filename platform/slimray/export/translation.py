"""A translation network as two graphs: the encoder, and one step of the decoder with its cache.

The encoder takes `source` int64 `[B, S]` and returns, per layer of the decoder, keys, values and mask of the source.
The step takes the last `token` `[B, 1]`, these tensors, and keys and values `past_...` of the earlier tokens, of length
0 at first, and returns logits `[B, V]` and the new keys and values. `ExportedTranslation` combines both into a network
again, whatever runtime they use, so that it is scored by the same code; `compare` compares it with the network in
torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slimray.data.modalities import pads_of
from slimray.data.ragged import tight
from slimray.data.text.vocabulary import EOS, PAD
from slimray.export.formats import Runner
from slimray.export.graph import Graph
from slimray.models.text.layers import Cached
from slimray.models.text.transformer import State, Transformer
from slimray.runtime.translate import LOGITS, NEXT, PAST, TOKEN, Arrays, Run, Speaker
from slimray.spec import UserError
from slimray.tasks import TASKS
from slimray.tasks.evaluation import Samples
from slimray.tasks.network import Network, to_input
from slimray.tasks.translate import searched

OF_SOURCE, OF_PAST = ("source_keys_{}", "source_values_{}", "source_mask_{}"), ("past_keys_{}", "past_values_{}")
ENCODER, STEP = "encoder", "step"
Ports = Mapping[str, tuple[list[str], list[str]]]
"""Names of the inputs and outputs of the encoder and the step."""
ROWS = 8  # sentences compared at once


class Encode(nn.Module):
    """Module from sentences to the keys, values and masks that the decoder attends to, flat, layer by layer."""

    def __init__(self, net: Transformer):
        super().__init__()
        self.net = net

    def forward(self, source: Tensor) -> tuple[Tensor, ...]:
        state = self.net.start(self.net.encode(source))
        pairs = zip(state.source, state.masks, strict=True)
        return tuple(one for cached, mask in pairs for one in (cached.keys, cached.values, mask[:, 0, 0]))


class Step(nn.Module):
    """Module from a token, the outputs of `Encode` and the cache to logits and the new cache."""

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
    """Return the graph of the encoder of a network prepared by `graph.ready`; `source` are sentences int64 `[B, S]`."""
    free = {"source": {0: "batch", 1: "source"}}
    return Graph(Encode(net), {"source": source.clone()}, tuple(_names(net, OF_SOURCE)), free)


def step_graph(net: Transformer, source: Tensor) -> Graph:
    """Return the graph of a step of the decoder; `source` are sentences int64 `[B, S]`."""
    with torch.no_grad():
        given = dict(zip(_names(net, OF_SOURCE), Encode(net)(source), strict=True))
        token = torch.full((len(source), 1), EOS)
        _, state = net.decode(token.expand(-1, 3), net.start(net.encode(source)))
    cached = [one for seen in state.past if seen is not None for one in (seen.keys, seen.values)]
    names = _names(net, OF_PAST)
    free = {TOKEN: {0: "batch"}} | {name: {0: "batch", 1: name} for name in given}
    free |= {name: {0: "batch", 1: "past"} for name in names}
    inputs = {TOKEN: token} | given | dict(zip(names, cached, strict=True))
    return Graph(Step(net), inputs, (LOGITS, *(NEXT.format(name) for name in names)), free)


def _names(net: Transformer, forms: tuple[str, ...]) -> list[str]:
    return [form.format(number) for number in range(len(net.decoder_layers)) for form in forms]


def graphs_of(net: nn.Module, source: Tensor, where: str) -> dict[str, Graph]:
    """Return the graphs of a network prepared by `graph.ready`, by name; UserError, with `where`, unless it is a
    transformer."""
    if not isinstance(net, Transformer):
        raise UserError(f"{where}: translates, but is not a transformer with an encoder and a step to export")
    return {ENCODER: encoder_graph(net, source), STEP: step_graph(net, source)}


# ---------------------------------------------------------------------------------------------- back to a network


@dataclass(frozen=True, eq=False)
class Given:
    """Outputs of an exported encoder, by name."""

    arrays: Arrays

    def rows(self, index: Tensor) -> "Given":
        """Return the same for these rows of the batch."""
        return Given({name: value[index.numpy()] for name, value in self.arrays.items()})


@dataclass(frozen=True, eq=False)
class Said:
    """State of an exported decoder: the encoder's outputs and its own cache."""

    source: Given
    cached: Given

    def rows(self, index: Tensor) -> "Said":
        """Return the same for these rows of the batch."""
        return Said(self.source.rows(index), self.cached.rows(index))


class ExportedTranslation(nn.Module):
    """An encoder and a step as a translation network, with `encode`, `start` and `decode` like those of Transformer."""

    def __init__(self, speaker: Speaker):
        super().__init__()
        self.speaker = speaker
        self.nothing = nn.Parameter(torch.zeros(0), requires_grad=False)  # gives the module a device

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `[B, L, V]` of pairs int `[B, 2, L]`, token by token."""
        logits, _ = self.decode(tokens[:, 1], self.start(self.encode(tokens[:, 0])))
        return logits

    def encode(self, source: Tensor) -> Given:
        """Return what the decoder attends to, for sentences int `[B, S]` with eos, padded on either side."""
        return Given(self.speaker.encode({"source": source.long().numpy()}))

    def start(self, encoded: Given) -> Said:
        """Return the state of a decoder that has not seen any token."""
        count = len(next(iter(encoded.arrays.values())))
        return Said(encoded, Given(self.speaker.begin(count)))

    def decode(self, tokens: Tensor, state: Said) -> tuple[Tensor, Said]:
        """Return logits `[B, T, V]` of the next tokens int `[B, T]`, and the state after them."""
        found: list[NDArray[Any]] = []
        for token in tokens.long().split(1, 1):
            logits, cached = self.speaker.next(token.contiguous().numpy(), state.source.arrays, state.cached.arrays)
            state = replace(state, cached=Given(cached))
            found.append(logits)
        return torch.from_numpy(np.stack(found, 1)), state


def ports_of(graphs: Mapping[str, Graph]) -> tuple[Ports, dict[str, int]]:
    """Return the names of the inputs and outputs of both graphs, and the step's cache inputs with their channels."""
    ports = {name: (list(graph.inputs), list(graph.outputs)) for name, graph in graphs.items()}
    cached = {name: value.shape[-1] for name, value in graphs[STEP].inputs.items() if name.startswith(PAST)}
    return ports, cached


def speaker(runners: Mapping[str, Runner], ports: Ports, cached: Mapping[str, int]) -> Speaker:
    """Return the encoder and the step as functions of named arrays, from `runners` with positional ones."""

    def run(name: str) -> Run:
        inputs, outputs = ports[name]
        return lambda given: dict(zip(outputs, runners[name]([given[one] for one in inputs]), strict=True))

    return Speaker(run(ENCODER), run(STEP), cached)


def compare(network: Network, outside: Network, samples: Samples) -> dict[str, Any]:
    """Return the comparison of `outside` with `network` in torch, for export.json.

    Differences are those of the logits of the reference tokens; `agreement` is the percent of sentences that both
    translate into the same tokens, with the search of the recipe.
    """
    gaps, norms, most, same = [], [], 0.0, 0
    for data, x, labels in _batches(network, samples):
        with torch.inference_mode():
            there, outputs = (labels != PAD).unsqueeze(-1), (outside.net(x), network.net(x))
        a, b = (torch.where(there, one, 0).double().flatten(1) for one in outputs)
        most = max(most, float((a - b).abs().max()))
        gaps.append((a - b).norm(dim=1))
        norms.append(b.norm(dim=1).clamp_min(1e-12))
        said = zip(*(searched(one, data[:, 0, 0]) for one in (network, outside)), strict=True)
        same += sum(list(one) == list(other) for one, other in said)
    gap, norm = torch.cat(gaps), torch.cat(norms)
    return {
        "max_abs": most,
        "relative": float(gap.norm() / norm.norm()),
        "worst_sample": float((gap / norm).max()),
        "agreement": 100 * same / len(samples),
    }


def counted(network: Network, samples: Samples) -> dict[str, float]:
    """Return the metrics of the task that are counted by tokens."""
    score = TASKS[network.task].score(0, network.recipe)
    for _, x, labels in _batches(network, samples):
        with torch.inference_mode():
            score.add(network.net(x), labels)
    return {name: float(value) for name, value in score.result().items() if isinstance(value, int | float)}


def _batches(network: Network, samples: Samples) -> Iterator[tuple[NDArray[Any], Tensor, Tensor]]:
    """Yield ROWS samples at a time: as read, as input of the network, and their targets."""
    for start in range(0, len(samples), ROWS):
        part = slice(start, start + ROWS)
        data, targets = tight(samples.data[part], samples.targets[part], pads_of(network.recipe))
        yield data, to_input(data, network.pixels, torch.device("cpu")), torch.from_numpy(targets)
