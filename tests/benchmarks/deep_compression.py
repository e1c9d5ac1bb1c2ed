"""Deep Compression of LeNet-300-100 and LeNet-5 on MNIST: what each step keeps and costs, five seeds, a real file.

`python -m tests.benchmarks deep_compression` (SLIMRAY_NETS="lenet300" takes one, SLIMRAY_SEEDS=1 one seed); the data
are the four idx files of $SLIMRAY_SHARED/data/mnist. One process, one thread, no Ray: replicas, teacher, masks,
codebooks and file are those of `kind: compress`. Shares, bits and rates were chosen with SLIMRAY_CHOOSE=1, which trains
on 50,000 images and scores on the other 10,000 of the training set; the test set is only scored, after each step.
"""

import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import safetensors.torch
import torch
from torch import nn

from slimray import models, runs
from slimray.compress import sharing, slim_file, sparsity
from slimray.data.images import image_sets
from slimray.data.images.pictures import ImageRecipe
from slimray.tasks.network import Input, to_input
from slimray.train import optimizers
from slimray.train.methods.constrained import Constrained
from slimray.train.methods.distilled import Distilled
from slimray.train.methods.method import Method, Piece, Setup
from slimray.train.methods.plain import Plain
from slimray.train.spec import OptimSpec

SHARED = Path(os.environ.get("SLIMRAY_SHARED", Path(__file__).resolve().parents[3] / "shared"))
PIXELS = Input.of_channels(1)  # paper is 0: weights of pixels that are never inked get no gradient and go first
BATCH, CPU = 256, torch.device("cpu")
T975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 97.5 %, by the number of seeds


@dataclass(frozen=True)
class Recipe:
    """The share of each layer that stays, the bits of its codes; epochs: dense, a round, the last round, centroids.

    Rounds and centroids learn from the dense network at `temperature`, and from the labels with weight `labels`.
    """

    keep: dict[str, float]
    bits: dict[str, int]
    epochs: tuple[int, int, int, int]
    rounds: int = 3
    temperature: float = 4.0
    labels: float = 0.0


RECIPES = {
    "lenet300": Recipe({"ip1": 0.08, "ip2": 0.09, "ip3": 0.26}, {"ip1": 5, "ip2": 5, "ip3": 5}, (12, 3, 6, 2)),
    "lenet5": Recipe(
        {"conv1": 0.66, "conv2": 0.12, "ip1": 0.06, "ip2": 0.19},
        {"conv1": 6, "conv2": 6, "ip1": 4, "ip2": 5},
        (5, 1, 2, 1),
    ),
}


def idx(name: str) -> np.ndarray:
    data = (SHARED / "data/mnist" / name).read_bytes()
    return image_sets.read_idx(data, 3 if "images" in name else 1)


def build(name: str) -> nn.Module:
    return models.build(name, num_classes=10)


def teacher(net: nn.Module, name: str, folder: Path, seed: int) -> str:
    """Write `net` as a run that can teach; return where it is."""
    run = runs.run_at(str(folder / f"{name}-{seed}"))
    weights = safetensors.torch.save(dict(net.state_dict()))
    taken = {"recipe": ImageRecipe(28, 28, "val", channels=1).to_dict(), "pixels": vars(PIXELS)}
    taken |= {"classes": [str(i) for i in range(10)], "task": "classify"}
    runs.write_model(run, weights, {"name": name, "num_classes": 10}, taken)
    return run.uri


def train(net: nn.Module, method: Method, epochs: int, lr: float, seed: int, x: np.ndarray, y: np.ndarray) -> nn.Module:
    optim = OptimSpec.model_validate(
        {"optimizer": "adamw", "lr": lr, "reference_batch": BATCH, "epochs": epochs, "schedule": "cosine",
         "groups": "no_norm_decay", "weight_decay": 1e-4}
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
    net = train(build(name), Plain(), dense, 1e-3, seed, x, y)
    out = {"dense": error(net, test_x, test_y)}
    taught = Distilled(teacher(net, name, folder, seed), 1.0, recipe.labels, recipe.temperature)
    whole = 4 * sum(p.numel() for p in net.parameters())
    for number in range(1, recipe.rounds + 1):
        sparsity.sparsify(net, {k: v ** (number / recipe.rounds) for k, v in recipe.keep.items()})
        epochs = last if number == recipe.rounds else each
        net = train(net, Constrained(taught), epochs, 1e-3, seed + 100 * number, x, y)
    out |= {"pruned": error(net, test_x, test_y), "pruned_bytes": size(net)}
    sharing.share(net, recipe.bits)
    out["shared_untrained"] = error(net, test_x, test_y)
    net = train(net, Constrained(taught, shared=tuple(recipe.bits)), centroids, 1e-4, seed + 999, x, y)
    out["shared"] = error(net, test_x, test_y)
    path = folder / f"{name}-{seed}.slim"
    path.write_bytes(slim_file.encode(dict(net.state_dict()), {"name": name, "num_classes": 10}))
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
        tensor, part = tensors[plain["name"]], dict(zip(slim_file.streams_of(plain), plain["bytes"], strict=True))
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
    seeds = range(int(os.environ.get("SLIMRAY_SEEDS", "5")))
    for name in os.environ.get("SLIMRAY_NETS", "lenet300 lenet5").split():
        with tempfile.TemporaryDirectory() as folder:
            rows = []
            for seed in seeds:
                rows.append(compress(name, seed, data, Path(folder), seed == 0))
                print(f"{name} seed {seed}: { ({k: round(v, 3) for k, v in rows[-1].items()}) }", flush=True)
            speed((Path(folder) / f"{name}-0.slim").read_bytes())
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
