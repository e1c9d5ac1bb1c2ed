"""PVCNN beside the other point networks: latency, throughput and peak memory of a forward pass.

The settings are those of Point-Voxel CNN (arXiv 1907.03739): 8 x 2048 points of ShapeNet, 8 x 4096 of S3DIS, 1 x 1024
of KITTI frustums; on a CPU half those batches, unless `SLIMRAY_BENCH_BATCH=8` is set. Each network alternates with the
reference of its setting, PVCNN at width 1: a ratio of 2 means twice the reference's time. Peak memory is that of a
fresh process: on a CPU the resident memory beyond the imports (accurate to some 25 % where it is below 100 MB), on a
GPU what torch allocated; weights and input are included. Inputs are random points on surfaces, weights are random, and
every frustum point is labelled as object, so that 512 distinct points reach the box network.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tests.benchmarks.pairs import Ratio, alternate
from torch import Tensor, nn
from torch.nn import functional as F

from slimray import models
from slimray.edge import cost
from slimray.models.points import pointcnn

PAIRS = 9
CPU_BATCH = 4  # at 8 all tables take longer than a quarter of an hour on two cores
WIDTHS = (0.25, 0.5, 1.0)
NUM_SHAPES, NUM_OBJECTS = 16, 3


@dataclass(frozen=True)
class Claim:
    """A published speedup of `fast` over `slow`, and by how much less memory it takes where that is published too."""

    slow: str
    fast: str
    speedup: float
    memory: float | None
    source: str


@dataclass(frozen=True)
class Setting:
    """One table: the networks by name, the batch and the input they share, the one that they are compared with."""

    name: str
    batch: int
    make_input: Callable[[int], Tensor]
    nets: dict[str, Callable[[], nn.Module]]
    reference: str
    claims: tuple[Claim, ...]
    note: str = ""


# ------------------------------------------------------------------------------------------------ what is compared


def _sphere(batch: int, num_points: int) -> Tensor:
    """Points on the unit sphere, `[B, 3, N]`: coordinates and normals in one."""
    return F.normalize(torch.randn(batch, 3, num_points), dim=1)


def _one_hot(batch: int, num_points: int, num_classes: int) -> Tensor:
    return F.one_hot(torch.arange(batch) % num_classes, num_classes).float()[..., None].expand(-1, -1, num_points)


def _shapenet_input(batch: int, num_points: int = 2048) -> Tensor:
    normals = _sphere(batch, num_points)
    return torch.cat([normals, normals, _one_hot(batch, num_points, NUM_SHAPES)], 1)


def _s3dis_input(batch: int, num_points: int = 4096) -> Tensor:
    """Walls, floor and ceiling of a block of 1.5 m x 1.5 m x 3 m, colours, places in the room."""
    sides = torch.rand(batch, 3, num_points)
    wall = torch.arange(num_points) % 3
    sides[:, wall, torch.arange(num_points)] = sides[:, wall, torch.arange(num_points)].round()
    block = sides * torch.tensor([1.5, 1.5, 3.0])[:, None] - torch.tensor([0.75, 0.75, 0.0])[:, None]
    return torch.cat([block, torch.rand(batch, 3, num_points), sides], 1)


def _kitti_input(batch: int, num_points: int = 1024) -> Tensor:
    """An object of a car's size, 20 m away, intensities."""
    points = _sphere(batch, num_points) * torch.tensor([2.0, 0.8, 0.8])[:, None] + torch.tensor([0, 1.0, 20])[:, None]
    return torch.cat([points, torch.rand(batch, 1, num_points), _one_hot(batch, num_points, NUM_OBJECTS)], 1)


def _widths(label: str, name: str, num_classes: int, widths: tuple[float, ...] = WIDTHS) -> dict[str, Callable]:
    return {f"{label} {w:g}": partial(models.build, name, num_classes=num_classes, width=w) for w in widths}


def _rows(num_classes: int, **names: str) -> dict[str, Callable]:
    return {label: partial(models.build, name, num_classes=num_classes) for label, name in names.items()}


def _frustum(name: str, width: float = 1.0) -> nn.Module:
    net: Any = models.build(name, num_classes=NUM_OBJECTS, width=width)
    last = net.inst_seg_net.get_submodule(net.inst_seg_net.head_name)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([-1e3, 1e3]))
    return net


PAPER = "arXiv 1907.03739, GTX 1080 Ti"
SETTINGS = {
    "shapenet": Setting(
        "ShapeNet part, 2048 points",
        8,
        _shapenet_input,
        _widths("PVCNN", "pvcnn_shapenet", 50)
        | _rows(
            50,
            **{
                "PointNet": "pointnet_shapenet",
                "PointNet++ SSG": "pointnetpp_ssg_shapenet",
                "PointNet++ MSG": "pointnetpp_msg_shapenet",
                "DGCNN": "dgcnn_shapenet",
                "PointCNN": "pointcnn_shapenet",
            },
        )
        | {"3D U-Net (64^3)": partial(models.build, "unet3d_shapenet", num_classes=50)},
        "PVCNN 1",
        (
            Claim("PointCNN", "PVCNN 1", 2.7, 1.5, PAPER),
            Claim("PointNet", "PVCNN 0.25", 21 / 12, None, "21 against 12 scenes/s"),
        ),
    ),
    "s3dis": Setting(
        "S3DIS, 4096 points",
        8,
        _s3dis_input,
        _widths("PVCNN", "pvcnn_s3dis", 13)
        | _widths("PVCNN++", "pvcnnpp_s3dis", 13, (0.5, 1.0))
        | _rows(13, **{"PointNet": "pointnet_s3dis", "DGCNN": "dgcnn_s3dis"})
        | {
            "PointCNN (part layers)": partial(pointcnn.PointCNN, 13, 1.0, 6, 0.5),
            "3D U-Net (64^3)": partial(models.build, "unet3d_s3dis", num_classes=13),
        },
        "PVCNN 1",
        (
            Claim("PointCNN (part layers)", "PVCNN++ 0.5", 6.9, 5.7, f"{PAPER}; taken to be PVCNN++ 0.5"),
            Claim("PointNet", "PVCNN 0.25", 21 / 12, None, "21 against 12 scenes/s"),
        ),
        "MODELS has no PointCNN for S3DIS: this one has the layers for ShapeNet parts (encoder 256, 256, 512, 1024 "
        "channels where the published S3DIS network has 256, 512, 768, 1024), 6 input features and 13 classes. "
        "There is no PointNet++ for S3DIS but PVCNN++.",
    ),
    "kitti": Setting(
        "KITTI frustums, 1024 points",
        1,
        _kitti_input,
        {f"F-PVCNN-E {width:g}": partial(_frustum, "frustum_pvcnne", width) for width in WIDTHS}
        | {
            "F-PVCNN complete": partial(_frustum, "frustum_pvcnn_complete"),
            "F-PointNet": partial(_frustum, "frustum_pointnet"),
            "F-PointNet++": partial(_frustum, "frustum_pointnetpp"),
        },
        "F-PVCNN-E 1",
        (Claim("F-PointNet++", "F-PVCNN-E 1", 1.8, 1.4, PAPER),),
        "The grids of 'complete' are our own definition.",
    ),
}


# ------------------------------------------------------------------------------------------------ measuring


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _resident_peak() -> int:
    """The most resident bytes so far. `ru_maxrss` would begin with those of the process that started this one."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def _peak_bytes(key: str, name: str, batch: int, num_threads: int) -> int:
    """Peak memory of one forward pass on a CPU; to be called once, in a fresh process."""
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    setting = SETTINGS[key]
    with torch.inference_mode():
        F.conv1d(torch.ones(1, 1, 8), torch.ones(1, 1, 1))  # what torch loads with the first operator is no model's
        before = _resident_peak()
        net, x = setting.nets[name]().eval(), setting.make_input(batch)
        net(x)
    return _resident_peak() - before


def _peak_on_gpu(key: str, name: str, batch: int) -> int:
    """Bytes that torch allocates for weights, input and a forward pass, beyond what is allocated already."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        net, x = SETTINGS[key].nets[name]().cuda().eval(), SETTINGS[key].make_input(batch).cuda()
        net(x)
    return torch.cuda.max_memory_allocated() - before


def _peak_in_fresh_process(key: str, name: str, batch: int) -> int:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_peak_bytes, key, name, batch, torch.get_num_threads()).result()


def _forward(net: nn.Module, x: Tensor) -> Callable[[], float]:
    on_gpu = x.device.type == "cuda"
    repeats = 10 if on_gpu else 3 if len(x) == 1 else 1

    def once() -> float:
        start = time.perf_counter()
        net(x)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def measure() -> float:
        with torch.inference_mode():
            return median(once() for _ in range(repeats))

    return measure


def _interval(ratio: Ratio) -> tuple[float, float, float]:
    """Median, low, high: those that pairs.py prints for nine pairs."""
    ratios = ratio.ratios
    return median(ratios), ratios[1], ratios[-2]


# ------------------------------------------------------------------------------------------------ tables


def main() -> None:
    device = _device()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"device {where}, torch {torch.__version__}, float32, inference, {PAIRS} pairs, ratio with 96 % interval")
    for key in SETTINGS:
        _table(key, device)


def _table(key: str, device: torch.device) -> None:
    setting = SETTINGS[key]
    usual = setting.batch if device.type == "cuda" else CPU_BATCH
    batch = min(setting.batch, int(os.environ.get("SLIMRAY_BENCH_BATCH", usual)))
    print(
        f"\n### {setting.name}, batch {batch} (the paper's is {setting.batch})\n"
        f"{setting.note + chr(10) if setting.note else ''}"
        f"{'network':24}{'params':>12}{'ms':>9}{'scenes/s':>10}  {'time / ' + setting.reference:30}{'peak MB':>9}",
        flush=True,
    )
    peak = _peak_on_gpu if device.type == "cuda" else _peak_in_fresh_process
    peaks = {name: peak(key, name, batch) / 1e6 for name in setting.nets}
    torch.manual_seed(0)
    x = setting.make_input(batch).to(device)
    nets = {name: make().to(device).eval() for name, make in setting.nets.items()}
    works = {name: _forward(net, x) for name, net in nets.items()}
    ratios = {
        name: alternate(name, work, works[setting.reference], PAIRS)
        for name, work in works.items()
        if name != setting.reference
    }
    reference_s = median(s for ratio in ratios.values() for s in ratio.b)
    for name, net in nets.items():
        seconds, compared = reference_s, "1 (the reference)"
        if name in ratios:
            seconds = median(ratios[name].a)
            compared = "{:.3f} [{:.3f}, {:.3f}]".format(*_interval(ratios[name]))
        print(
            f"{name:24}{cost.count_params(net):>12,}{seconds * 1e3:>9.1f}{batch / seconds:>10.2f}  {compared:30}"
            f"{peaks[name]:>9.1f}",
            flush=True,
        )
    for claim in setting.claims:
        ratio = (
            ratios[claim.slow]
            if claim.fast == setting.reference
            else alternate(claim.slow, works[claim.slow], works[claim.fast], PAIRS)
        )
        published = "" if claim.memory is None else f" (published {claim.memory:g})"
        print(
            "{} / {}: time {:.3f} [{:.3f}, {:.3f}]".format(claim.slow, claim.fast, *_interval(ratio))
            + f" (published {claim.speedup:.2f}: {claim.source}), {batch / median(ratio.b):.2f} against "
            f"{batch / median(ratio.a):.2f} scenes/s, memory {peaks[claim.slow] / peaks[claim.fast]:.2f}{published}",
            flush=True,
        )


if __name__ == "__main__":
    main()
