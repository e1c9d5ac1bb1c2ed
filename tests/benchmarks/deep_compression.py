"""Deep Compression of LeNet-300-100 and LeNet-5 on MNIST: what each step keeps and costs, five seeds, a real file.

`python -m tests.benchmarks deep_compression` (SLIMRAY_NETS="lenet300" selects one network, "lenet300-far" compresses
further, SLIMRAY_SEEDS="2 3" selects seeds) reads the four idx files of $SLIMRAY_SHARED/data/mnist. One process, one
thread, no Ray: replicas, masks, codebooks and file are those of `kind: compress`. Shares, bits and rates (except those
of "far") were chosen on the training set alone, by training on 50,000 of its images and scoring on the other 10,000
(SLIMRAY_CHOOSE=1 does that); the test set is only scored. Results are lines of JSON in `SLIMRAY_BENCH_DIR`: what is
there is not computed again, and is included in the summary.
"""

import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import nn

from slimray import models
from slimray.compress import sharing, slim_file, sparsity
from slimray.data.images import image_sets
from slimray.tasks.network import Input, to_input
from slimray.train import optimizers
from slimray.train.methods.constrained import Constrained
from slimray.train.methods.method import Method, Piece, Setup
from slimray.train.methods.plain import Plain
from slimray.train.spec import OptimSpec

SHARED = Path(os.environ.get("SLIMRAY_SHARED", Path(__file__).resolve().parents[3] / "shared"))
PIXELS = Input(mean=(0.1307,), std=(0.3081,))
BATCH, CPU = 128, torch.device("cpu")
T975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 97.5 %, by the number of seeds


@dataclass(frozen=True)
class Recipe:
    """The share of each layer that stays, the bits of its codes; epochs and rates: dense, round, last round, centroids.

    `decay` is AdamW's, for the weights of the dense and the pruned network. What counted on the held-out images: errors
    grew by 0.19 points with decay 1e-4 (two seeds), by 0.06 with 0.3 (one), by -0.07 with three times the rate for what
    is pruned and most of its epochs in the last round (two); a teacher or other rules for pixels brought nothing clear.
    """

    keep: dict[str, float]
    bits: dict[str, int]
    epochs: tuple[int, int, int, int]
    rates: tuple[float, float, float, float] = (1e-3, 3e-3, 3e-3, 1e-4)
    rounds: int = 3
    decay: float = 0.3


RECIPES = {
    "lenet300": Recipe({"ip1": 0.08, "ip2": 0.09, "ip3": 0.26}, {"ip1": 4, "ip2": 5, "ip3": 5}, (15, 2, 10, 1)),
    "lenet5": Recipe(
        {"conv1": 0.66, "conv2": 0.12, "ip1": 0.07, "ip2": 0.19},
        {"conv1": 6, "conv2": 6, "ip1": 4, "ip2": 5},
        (5, 1, 3, 1),
    ),
    "lenet300-far": Recipe({"ip1": 0.045, "ip2": 0.05, "ip3": 0.16}, {"ip1": 3, "ip2": 4, "ip3": 4}, (15, 2, 12, 2)),
}


def idx(name: str) -> np.ndarray:
    data = (SHARED / "data/mnist" / name).read_bytes()
    return image_sets.read_idx(data, 3 if "images" in name else 1).copy()


def build(name: str) -> nn.Module:
    return models.build(name.partition("-")[0], num_classes=10)


def train(
    net: nn.Module, method: Method, epochs: int, lr: float, decay: float, seed: int, x: np.ndarray, y: np.ndarray
) -> nn.Module:
    optim = OptimSpec.model_validate(
        {"optimizer": "adamw", "lr": lr, "reference_batch": BATCH, "epochs": epochs, "schedule": "cosine",
         "groups": "no_norm_decay", "weight_decay": decay}
    )  # fmt: skip
    replica = method.replica(net, lambda: net, Setup(optim, PIXELS, (1, 28, 28), CPU))
    rng, step = np.random.default_rng(seed), 0
    for epoch in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x), BATCH):
            rows = order[start : start + BATCH]
            rate = optimizers.learning_rate(optim, BATCH, len(x), epoch * len(x) + start)
            assert replica.step([Piece(x[rows][:, None, :, :, None], y[rows])], len(rows), rate, (seed, step)).finite
            step += 1
    return replica.averaged()


@torch.no_grad()
def error(net: nn.Module, x: np.ndarray, y: np.ndarray) -> float:
    """Errors on the images, in percent."""
    wrong = 0
    for start in range(0, len(x), 1000):
        rows = slice(start, start + 1000)
        answers = net(to_input(x[rows][:, None, :, :, None], PIXELS, CPU)).argmax(1).numpy()
        wrong += int((answers != y[rows]).sum())
    return 100 * wrong / len(x)


def size(net: nn.Module) -> int:
    return len(slim_file.encode(dict(net.state_dict())))


def compress(name: str, seed: int, data: tuple[np.ndarray, ...], folder: Path, say: bool) -> dict[str, float]:
    """One network from scratch to its file; its errors after each step, its bytes, its seconds."""
    recipe, (x, y, test_x, test_y), start = RECIPES[name], data, time.perf_counter()
    torch.manual_seed(seed)
    dense, each, last, centroids = recipe.epochs
    rates, decay = recipe.rates, recipe.decay
    net = train(build(name), Plain(), dense, rates[0], decay, seed, x, y)
    out = {"dense": error(net, test_x, test_y)}
    whole = 4 * sum(p.numel() for p in net.parameters())
    for number in range(1, recipe.rounds + 1):
        sparsity.sparsify(net, {k: v ** (number / recipe.rounds) for k, v in recipe.keep.items()})
        epochs, rate = (last, rates[2]) if number == recipe.rounds else (each, rates[1])
        net = train(net, Constrained(Plain()), epochs, rate, decay, seed + 100 * number, x, y)
    out |= {"pruned": error(net, test_x, test_y), "pruned_bytes": size(net)}
    sharing.share(net, recipe.bits)
    out["shared_untrained"] = error(net, test_x, test_y)
    net = train(net, Constrained(Plain(), shared=tuple(recipe.bits)), centroids, rates[3], 0.0, seed + 999, x, y)
    out["shared"] = error(net, test_x, test_y)
    path = folder / f"{name}-{seed}.slim"
    path.write_bytes(slim_file.encode(dict(net.state_dict()), {"name": name.partition("-")[0], "num_classes": 10}))
    again = build(name)
    again.load_state_dict(slim_file.decode(path.read_bytes(), str(path)))
    out |= {"file": error(again, test_x, test_y), "bytes": path.stat().st_size, "times": whole / path.stat().st_size}
    out |= {"minutes": (time.perf_counter() - start) / 60, "dense_bytes": whole}
    if say:
        table(path.read_bytes(), str(path))
    return out


def table(data: bytes, where: str) -> None:
    """Print what each tensor keeps and costs: the rows of the paper's tables, and the parts of the file."""
    header, tensors = slim_file.read_header(data, where), slim_file.decode(data, where)
    for plain in header.tensors:
        tensor, part = (
            tensors[plain["name"]],
            dict(zip(slim_file.CODINGS[plain["coding"]], plain["bytes"], strict=True)),
        )
        kept = int(torch.count_nonzero(tensor))
        share = 100 * kept / tensor.numel()
        text = f"{plain['name']}: {kept:,} of {tensor.numel():,} kept ({share:.1f} %), {plain['coding']}"
        if "symbols" in part:
            count = plain.get("entries", tensor.numel())
            text += f", code {math.log2(plain['codes']):.1f} bits, {8 * part['symbols'] / count:.2f} coded"
        if "gaps" in part:
            fillers = plain["entries"] - kept
            text += (
                f", index {plain['gap_bits']} bits, {8 * part['gaps'] / plain['entries']:.2f} coded, {fillers} fillers"
            )
        print(f"  {text}, {sum(part.values()):,} bytes ({100 * sum(part.values()) / (4 * tensor.numel()):.2f} %)")
    print(f"  parts: {slim_file.parts_of(header, len(data))}")


def speed(data: bytes) -> None:
    """Print how fast a file decodes: median of nine."""
    times = []
    for _ in range(9):
        start = time.process_time()
        found = slim_file.decode(data, "x")
        times.append(time.process_time() - start)
    values = sum(tensor.numel() for tensor in found.values())
    print(f"  decoding: {values / 1e6 / sorted(times)[4]:.1f} million weights a second of one core, SHA-256 included")


def main() -> None:
    torch.set_num_threads(1)
    data = (
        idx("train-images-idx3-ubyte.gz"), idx("train-labels-idx1-ubyte.gz").astype(np.int64),
        idx("t10k-images-idx3-ubyte.gz"), idx("t10k-labels-idx1-ubyte.gz").astype(np.int64),
    )  # fmt: skip
    if os.environ.get("SLIMRAY_CHOOSE"):
        data = (data[0][:50_000], data[1][:50_000], data[0][50_000:], data[1][50_000:])
    folder = Path(os.environ.get("SLIMRAY_BENCH_DIR", tempfile.gettempdir()))
    seeds = [int(seed) for seed in os.environ.get("SLIMRAY_SEEDS", "0 1 2 3 4").split()]
    for name in os.environ.get("SLIMRAY_NETS", "lenet300 lenet5").split():
        file = folder / f"deep-compression-{name}{'-chosen' if os.environ.get('SLIMRAY_CHOOSE') else ''}.jsonl"
        rows = {row["seed"]: row for row in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
        for seed in seeds:
            if seed not in rows:
                rows[seed] = {"seed": seed} | compress(name, seed, data, folder, seed == 0)
                with file.open("a") as out:
                    out.write(json.dumps(rows[seed]) + "\n")
                speed((folder / f"{name}-{seed}.slim").read_bytes())
            print(f"{name}: { ({k: round(v, 3) for k, v in rows[seed].items()}) }", flush=True)
        rows = [rows[seed] for seed in sorted(rows)]
        for key in ("dense", "pruned", "shared", "file", "bytes", "times", "minutes"):
            values = [row[key] for row in rows]
            told = f" (standard error {stdev(values) / math.sqrt(len(values)):.3f})" if len(values) > 1 else ""
            print(f"{name} {key}: {mean(values):.3f}{told}")
        more = [row["file"] - row["dense"] for row in rows]
        if len(more) in T975:
            half = T975[len(more)] * stdev(more) / math.sqrt(len(more))
            low, high = mean(more) - half, mean(more) + half
            print(f"{name} error increase: {mean(more):+.3f} points, 95 % interval [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()
