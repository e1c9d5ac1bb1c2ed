"""The trained translation network with codebooks of equal bytes: bits per layer by HAQ's agent, or the same everywhere.

`SLIMRAY_BENCH_DIR=... python -m tests.benchmarks translation_bits`, in the folder in which `translation` has trained
its network (SLIMRAY_SEEDS, SLIMRAY_ROWS as there). The 48 linear layers get codebooks, nothing is trained afterwards;
embedding tables and inputs stay float. The budget is the size of EVEN bits everywhere, codebooks included. A policy is
scored as in `compress`, by the perplexity of the first HELD validation pairs; there are EPISODES policies, WARMUP of
them random. The row `random` has as many random policies under the same budget, the row `measured` the bits that each
layer alone suggests. Seeds change the network and the agent. Scores are those of `translation`: BLEU of
test_2016_flickr, compared sentence by sentence with the same bits everywhere.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from tests.benchmarks import translation
from tests.benchmarks.haq import HIGH, LOW, Rounder
from tests.benchmarks.kept import Row, print_rows
from torch import nn

from slimray import compress
from slimray.search import agents, ddpg, haq
from slimray.tasks.translate import TRANSLATE

EVEN, EPISODES, WARMUP, DECAY, HELD = 3, 300, 40, 0.98, 256


class Bench(translation.Bench):
    """The network of `translation` of one seed, in few bits."""

    @cached_property
    def rounder(self) -> Rounder:
        """The network with every layer in every number of bits."""
        return Rounder(self.trained.net, torch.from_numpy(self.train.piece([0, 1]).data[:, 0]))

    @cached_property
    def held(self) -> translation.Split:
        """The validation pairs by which policies are judged."""
        return translation.Split(self.val.pairs[:HELD], [])

    @cached_property
    def judged(self) -> dict[str, float]:
        """Perplexities of policies that are known."""
        file = self.file("bits-judged.json")
        return json.loads(file.read_text()) if file.exists() else {}

    def judge(self, name: str, net: Callable[[], nn.Module]) -> float:
        """The perplexity of a network on the held pairs, once."""
        if name not in self.judged:
            self.judged[name] = self.perplexity(self.network(net()), self.held)
            self.file("bits-judged.json").write_text(json.dumps(self.judged))
        return self.judged[name]

    def search(self, agent: bool) -> tuple[haq.Policy, list[float]]:
        """The best policy of as many bytes as EVEN bits everywhere, and the perplexities of all; by random ones without
        agent."""
        rounder = self.rounder
        limit = rounder.cost(rounder.even(EVEN))
        walk = haq.BitsWalk(rounder.layers, rounder.cost, limit, LOW, HIGH, inputs=False)
        base, merit = self.judge("float", lambda: rounder.net), TRANSLATE.best.merit

        def reward(policy: haq.Policy) -> float:
            return haq.reward_of(merit(self.judge(str(policy), lambda: rounder.made(policy))), merit(base))

        settings = replace(ddpg.HAQ, warmup=WARMUP if agent else EPISODES, decay=DECAY)
        tried = agents.search(walk, agents.SearchSettings(EPISODES, 1, settings), reward, self.seed)
        return agents.best(tried).policy, [self.judged[str(trial.policy)] for trial in tried]

    def measured(self) -> haq.Policy:
        """The best policy, of as many bytes as EVEN bits everywhere, of those that single layers suggest: layers that
        lose least by a bit less, for their size, pay for a bit more of those that gain most by it."""
        rounder, size = self.rounder, [layer.weights for layer in self.rounder.layers]
        limit = rounder.cost(rounder.even(EVEN))

        def judged(bits: list[int]) -> float:
            policy = [[one] for one in bits]
            return self.judge(str(policy), lambda: rounder.made(policy))

        def order(bits: int) -> list[int]:
            alone = [judged([bits if at == place else EVEN for at in range(len(size))]) for place in range(len(size))]
            return sorted(range(len(size)), key=lambda place: alone[place] / size[place] - even / size[place])

        even = judged([EVEN] * len(size))
        least, most, tried = order(EVEN - 1), order(EVEN + 1), [[EVEN] * len(size)]
        for count in range(2, len(size) // 2, 2):
            bits = [EVEN - 1 if place in least[:count] else EVEN for place in range(len(size))]
            for place in most:
                more = [EVEN + 1 if at == place else one for at, one in enumerate(bits)]
                if bits[place] == EVEN and rounder.cost([[one] for one in more]) <= limit:
                    bits = more
            tried.append(bits)
        return [[one] for one in min(tried, key=judged)]

    def scored_policy(self, name: str, policy: haq.Policy) -> Row:
        """Scores of what the file of a policy holds, and its bytes."""
        chosen = {layer.name: (bits, None) for layer, (bits,) in zip(self.rounder.layers, policy, strict=True)}
        example = torch.from_numpy(self.train.piece([0, 1]).data[:, 0])
        made = compress.quantize(self.trained.net, example, [example], chosen, "kmeans")
        network, size = self.written(made.net, {**self.model, "compression": [made.record]}, name)
        told: Row = {"bits": [bits for (bits,) in policy], "layers_mb": self.rounder.cost(policy)}
        told |= {"size_mb": made.size_mb, "bytes": size, "held": self.judge(str(policy), lambda: made.net)}
        told |= {"perplexity": self.perplexity(network, self.test)}
        return told | self.score(network, name, None if name == "even" else self.file("even.txt"))

    def scored_even(self) -> Row:
        """The same bits everywhere, beside the float network."""
        return self.scored_policy("even", self.rounder.even(EVEN))

    def scored_search(self, name: str) -> Row:
        """What a search finds, beside the same bits everywhere."""
        policy, reached = self.search(name == "haq")
        return {**self.scored_policy(name, policy), "reached": reached}


ROWS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "even": Bench.scored_even,
    "haq": lambda bench: bench.scored_search("haq"),
    "random": lambda bench: bench.scored_search("random"),
    "measured": lambda bench: bench.scored_policy("measured", bench.measured()),
}


def main() -> None:
    """Print a line per row."""
    print_rows(Bench, ROWS, "bits.jsonl")


if __name__ == "__main__":
    main()
