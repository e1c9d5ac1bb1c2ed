"""A translation network as two graphs: the encoder, and one step of the decoder with what it cached.

The encoder takes `source` int64 `[B, S]` and gives, per layer of the decoder, keys and values of the source and which
of them count. The step takes the last `token` `[B, 1]`, these, and keys and values `past_...` of the tokens before it,
of length 0 at first, and gives logits `[B, V]` and the new ones. `ExportedTranslation` is both as a network again,
wherever they run, so that whatever scores networks scores them; `compare` holds it against the one in torch.
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
ROWS = 8  # sentences that are compared at once


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
    free = {TOKEN: {0: "batch"}} | {name: {0: "batch", 1: name} for name in given}
    free |= {name: {0: "batch", 1: "past"} for name in names}
    inputs = {TOKEN: token} | given | dict(zip(names, cached, strict=True))
    return Graph(Step(net), inputs, (LOGITS, *(NEXT.format(name) for name in names)), free)


def _names(net: Transformer, forms: tuple[str, ...]) -> list[str]:
    return [form.format(number) for number in range(len(net.decoder_layers)) for form in forms]


def graphs_of(net: nn.Module, source: Tensor, where: str) -> dict[str, Graph]:
    """The graphs of a network that `graph.ready` made, by name; UserError, with `where`, for one that is no
    transformer."""
    if not isinstance(net, Transformer):
        raise UserError(f"{where}: translates, but is no transformer with an encoder and a step to export")
    return {ENCODER: encoder_graph(net, source), STEP: step_graph(net, source)}


# ------------------------------------------------------------------------------------------------- as a network again


@dataclass(frozen=True, eq=False)
class Given:
    """What an exported encoder gave, by name."""

    arrays: Arrays

    def rows(self, index: Tensor) -> "Given":
        """That of other rows of the batch."""
        return Given({name: value[index.numpy()] for name, value in self.arrays.items()})


@dataclass(frozen=True, eq=False)
class Said:
    """What an exported decoder was given and has cached."""

    source: Given
    cached: Given

    def rows(self, index: Tensor) -> "Said":
        """That of other rows of the batch."""
        return Said(self.source.rows(index), self.cached.rows(index))


class ExportedTranslation(nn.Module):
    """An encoder and a step as a network that translates: `encode`, `start` and `decode` as a Transformer has them."""

    def __init__(self, speaker: Speaker):
        super().__init__()
        self.speaker = speaker
        self.nothing = nn.Parameter(torch.zeros(0), requires_grad=False)  # says on which device it runs

    def forward(self, tokens: Tensor) -> Tensor:
        """Pairs int `[B, 2, L]` to logits `[B, L, V]`, token by token."""
        logits, _ = self.decode(tokens[:, 1], self.start(self.encode(tokens[:, 0])))
        return logits

    def encode(self, source: Tensor) -> Given:
        """Sentences int `[B, S]` with eos, PAD on either side, to what the decoder attends to."""
        return Given(self.speaker.encode({"source": source.long().numpy()}))

    def start(self, encoded: Given) -> Said:
        """A decoder that has seen nothing."""
        count = len(next(iter(encoded.arrays.values())))
        return Said(encoded, Given(self.speaker.begin(count)))

    def decode(self, tokens: Tensor, state: Said) -> tuple[Tensor, Said]:
        """The next tokens int `[B, T]` to logits `[B, T, V]`."""
        found: list[NDArray[Any]] = []
        for token in tokens.long().split(1, 1):
            logits, cached = self.speaker.next(token.contiguous().numpy(), state.source.arrays, state.cached.arrays)
            state = replace(state, cached=Given(cached))
            found.append(logits)
        return torch.from_numpy(np.stack(found, 1)), state


def ports_of(graphs: Mapping[str, Graph]) -> tuple[Ports, dict[str, int]]:
    """Names of the inputs and outputs of both graphs, and the inputs that hold what a step cached, with their
    channels."""
    ports = {name: (list(graph.inputs), list(graph.outputs)) for name, graph in graphs.items()}
    cached = {name: value.shape[-1] for name, value in graphs[STEP].inputs.items() if name.startswith(PAST)}
    return ports, cached


def speaker(runners: Mapping[str, Runner], ports: Ports, cached: Mapping[str, int]) -> Speaker:
    """The encoder and the step out of functions of arrays in the order of their inputs."""

    def run(name: str) -> Run:
        inputs, outputs = ports[name]
        return lambda given: dict(zip(outputs, runners[name]([given[one] for one in inputs]), strict=True))

    return Speaker(run(ENCODER), run(STEP), cached)


def compare(network: Network, outside: Network, samples: Samples) -> dict[str, Any]:
    """How `outside` agrees with `network` in torch, for export.json.

    Differences are of the logits of the tokens of the references; `agreement` is the percent of sentences that both
    translate into the same tokens, by the search of the recipe.
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
    """The numbers of the task that are counted by tokens."""
    score = TASKS[network.task].score(0, network.recipe)
    for _, x, labels in _batches(network, samples):
        with torch.inference_mode():
            score.add(network.net(x), labels)
    return {name: float(value) for name, value in score.result().items() if isinstance(value, int | float)}


def _batches(network: Network, samples: Samples) -> Iterator[tuple[NDArray[Any], Tensor, Tensor]]:
    """ROWS samples at a time: as they are read, as the network takes them, and their targets."""
    for start in range(0, len(samples), ROWS):
        part = slice(start, start + ROWS)
        data, targets = tight(samples.data[part], samples.targets[part], pads_of(network.recipe))
        yield data, to_input(data, network.pixels, torch.device("cpu")), torch.from_numpy(targets)
