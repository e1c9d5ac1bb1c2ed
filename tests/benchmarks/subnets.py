"""A subnet has no overhead from its supernet: time to extract it, and its speed against a plainly written network.

The supernet is `ofa_mobilenetv3` in full size. The largest, the smallest and a random subnet are extracted and compared
with the same network written out here with torch modules alone; the weights are copied in order, and the outputs must
be equal. Times are those of one core (`process_time`, one thread), so that other work on the machine does not count.
Goals: extraction below 50 ms, the ratio of the two forward passes at most 1.02.
"""

import copy
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from tests.benchmarks.pairs import alternate
from tests.benchmarks.voxels import queued_s
from torch import Tensor, nn

from slimray import models
from slimray.arch import Arch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS, SIDE = 21, 224
REPEATS = {1: 5, 8: 1}  # by batch
STAGES = (  # channels, stride, activation, squeeze-and-excitation: MobileNetV3 as Once-for-All has it
    (24, 2, nn.ReLU, False),
    (40, 2, nn.ReLU, True),
    (80, 2, nn.Hardswish, False),
    (112, 1, nn.Hardswish, True),
    (160, 2, nn.Hardswish, True),
)


class Residual(nn.Sequential):
    """Layers in a row around which the input is carried."""

    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


class Squeeze(nn.Sequential):
    """Squeeze-and-excitation."""

    def forward(self, input: Tensor) -> Tensor:
        return input * super().forward(input.mean((2, 3), keepdim=True))


def divisible(channels: float) -> int:
    """To a multiple of 8, never more than 10 % below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def conv(inputs: int, outputs: int, kernel: int, stride: int, groups: int, act: type[nn.Module] | None) -> list:
    """Convolution, BatchNorm, activation."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return layers if act is None else [*layers, act(inplace=True)]  # type: ignore[call-arg]


def plain_mobilenet(arch: Arch, num_classes: int) -> nn.Sequential:
    """The subnet `arch` of `ofa_mobilenetv3` as one would write it by hand."""
    layers: list[nn.Module] = conv(3, 16, 3, 2, 1, nn.Hardswish)
    layers.append(Residual(*conv(16, 16, 3, 1, 16, nn.ReLU), *conv(16, 16, 1, 1, 1, None)))
    channels, place = 16, 0
    for (outputs, first_stride, act, squeezes), depth in zip(STAGES, arch["depth"], strict=True):
        for i in range(depth):
            stride, kernel = 1 if i else first_stride, arch["kernel"][place + i]
            middle = divisible(channels * arch["expand"][place + i])
            block = conv(channels, middle, 1, 1, 1, act) + conv(middle, middle, kernel, stride, middle, act)
            if squeezes:
                inner = divisible(middle // 4)
                gates = [nn.Conv2d(middle, inner, 1), nn.ReLU(True), nn.Conv2d(inner, middle, 1), nn.Hardsigmoid(True)]
                block.append(Squeeze(*gates))
            block += conv(middle, outputs, 1, 1, 1, None)
            layers.append((Residual if stride == 1 and channels == outputs else nn.Sequential)(*block))
            channels = outputs
        place += len(arch["kernel"]) // len(STAGES)
    layers += [*conv(channels, 960, 1, 1, 1, nn.Hardswish), nn.AdaptiveAvgPool2d(1)]
    layers += [nn.Conv2d(960, 1280, 1, bias=False), nn.Hardswish(True), nn.Flatten(), nn.Linear(1280, num_classes)]
    return nn.Sequential(*layers)


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Every tensor of `source` to the tensor of `target` at the same place; ValueError where shapes differ."""
    pairs = zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    for value, place in pairs:
        if value.shape != place.shape:
            raise ValueError(f"{list(value.shape)} and {list(place.shape)} are not the same network")
        place.copy_(value)


def forward_s(net: nn.Module, x: Tensor) -> Callable[[], float]:
    """Seconds of a forward pass, the median of several."""

    def once() -> float:
        start = time.process_time()
        net(x)
        return time.process_time() - start

    if x.is_cuda:
        return lambda: queued_s(lambda: net(x))
    return lambda: median(once() for _ in range(REPEATS[len(x)]))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net: Any = models.build("ofa_mobilenetv3", num_classes=1000).eval()
    space, rng = net.space, random.Random(0)
    archs = {"largest": space.largest(), "smallest": space.smallest(), "random": space.sample(rng)}
    print(f"ofa_mobilenetv3, one thread, torch {torch.__version__}, input {SIDE} pixels")
    for name, arch in archs.items():
        seconds = []
        for _ in range(PAIRS):
            start = time.process_time()
            subnet = net.extract(arch)
            seconds.append(time.process_time() - start)
        print(f"{name}: extracted in {median(seconds) * 1e3:.1f} ms (longest of {PAIRS}: {max(seconds) * 1e3:.1f})")
        plain, subnet = plain_mobilenet(arch, 1000).eval().to(DEVICE), subnet.to(DEVICE)
        copy_weights(subnet, plain)
        subnet, plain = copy.deepcopy(subnet), copy.deepcopy(plain)  # both in fresh memory, which shows at batch 1
        for batch in REPEATS:
            x = torch.randn(batch, 3, SIDE, SIDE, device=DEVICE)
            with torch.inference_mode():
                torch.testing.assert_close(subnet(x), plain(x))
                title = f"{name}, batch {batch}: extracted / plain"
                ratio = alternate(title, forward_s(subnet, x), forward_s(plain, x), PAIRS)
            print(ratio, flush=True)


if __name__ == "__main__":
    main()
