"""TSM against I3D on one device: latency (batch 1), throughput, and a training step; the names state the variants.

The 33-GMAC I3D in the table of arXiv 1811.08383 is "3x1x1, 32 frames"; "3x3x3" inflates every block. Inputs are random,
because speed does not depend on them. Runs on a CPU here; the same command measures a GPU.
"""

import time
from statistics import median

import torch
from tests.benchmarks.pairs import alternate
from torch import nn

from slimray import models

SIZE = 224
VARIANTS = {
    "i3d 3x1x1 32f": ({"name": "i3d_resnet50", "inflation": "3x1x1"}, 32),
    "i3d 3x3x3 32f": ({"name": "i3d_resnet50", "inflation": "3x3x3"}, 32),
}


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(torch.get_num_threads())
    print(
        f"device {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, {torch.get_num_threads()} threads"
    )
    tsm = _ready(models.build("tsm_resnet50", num_classes=400, num_segments=8), device)
    batch = 16 if device.type == "cuda" else 2
    for name, (options, frames) in VARIANTS.items():
        i3d = _ready(models.build(**options, num_classes=400, num_segments=frames), device)
        one = (_clip(1, 8, device), _clip(1, frames, device))
        many = (_clip(batch, 8, device), _clip(batch, frames, device))
        print(alternate(f"latency {name} / tsm 8f (batch 1)", _forward(i3d, one[1]), _forward(tsm, one[0])), flush=True)
        print(
            alternate(
                f"inference time per clip {name} / tsm 8f (batch {batch})",
                _forward(i3d, many[1]),
                _forward(tsm, many[0]),
            ),
            flush=True,
        )
        print(
            alternate(f"training step {name} / tsm 8f (batch {batch})", _train(i3d, many[1]), _train(tsm, many[0])),
            flush=True,
        )


def _ready(net: nn.Module, device: torch.device) -> nn.Module:
    return net.to(device).eval()


def _clip(batch: int, frames: int, device: torch.device) -> torch.Tensor:
    return torch.randn(batch, frames, 3, SIZE, SIZE, device=device)


def _timed(work, device: torch.device) -> float:
    repeats = 10 if device.type == "cuda" else 1
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


def _forward(net: nn.Module, clip: torch.Tensor):
    def measure() -> float:
        net.eval()
        with torch.inference_mode():
            return _timed(lambda: net(clip), clip.device)

    return measure


def _train(net: nn.Module, clip: torch.Tensor):
    def step() -> None:
        net.zero_grad(set_to_none=True)
        net(clip).sum().backward()

    def measure() -> float:
        net.train()
        return _timed(step, clip.device)

    return measure
