"""Voxelize and devoxelize, forward and backward, against the time that their memory traffic alone must take.

N = 16384 points of C = 64 channels, R = 32, in turn with a large copy, whose bandwidth (read and write) makes bytes
into seconds: a ratio of 1 is as fast as copying. Two counts: each tensor once per direction, a lower bound that holds
for any kernel; and with eight corners read per point each way, what a kernel moves that keeps no neighbour in cache.
`channels last` hands the grid over as it lies, `contiguous` as PVConv does, with two transpositions that are not
counted as necessary. Points fill a cube evenly, which is the worst for locality.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from tests.benchmarks.pairs import Ratio, alternate
from torch import Tensor

from slimray.models.point_ops import devoxelize, normalize_coords, voxelize

NUM_POINTS, CHANNELS, RESOLUTION = 16384, 64, 32
BATCHES = (1, 8)
COPY_BYTES = 2**28
PAIRS = 9


def traffic(batch: int, num_points: int, channels: int, resolution: int) -> tuple[int, int]:
    """Bytes that float32 must move, forward and backward: each tensor once per direction, and with eight corners.

    Once: features in, grid out, grid in, features out, and their gradients the other way; coordinates in all four
    operators. With corners: devoxelization reads eight grid rows per point, its gradient the points' gradient eight
    times, each in place of one whole tensor.
    """
    points, grid = channels * num_points, channels * resolution**3
    once = 4 * (points + grid + 3 * num_points)
    corners = once + (8 * points - grid) + (8 * points - points)
    return 4 * batch * once, 4 * batch * corners


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"device {where}, N={NUM_POINTS}, C={CHANNELS}, R={RESOLUTION}, float32, copies of {COPY_BYTES >> 20} MiB")
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copy = _timed(lambda: target.copy_(source), device)
    for batch in BATCHES:
        once, corners = traffic(batch, NUM_POINTS, CHANNELS, RESOLUTION)
        for layout in ("channels last", "contiguous"):
            name = f"voxelize + devoxelize, forward + backward, B={batch}, {layout}"
            work = _timed(_round_trip(batch, layout == "contiguous", device), device)
            measured = alternate(name, work, copy, PAIRS)
            copied_per_s = 2 * COPY_BYTES / median(measured.b)
            print(f"{name}: {median(measured.a) * 1e3:.2f} ms, copy {copied_per_s / 1e9:.1f} GB/s", flush=True)
            for count, needed in (("each tensor once", once), ("eight corners each way", corners)):
                bound = tuple(seconds * needed / (2 * COPY_BYTES) for seconds in measured.b)
                print("  ", Ratio(f"time / bound, {count} ({needed / 1e6:.1f} MB)", measured.a, bound), flush=True)


def _round_trip(batch: int, contiguous: bool, device: torch.device) -> Callable[[], object]:
    torch.manual_seed(0)
    places = normalize_coords(torch.rand(batch, 3, NUM_POINTS), RESOLUTION).to(device)
    features = torch.randn(batch, CHANNELS, NUM_POINTS, device=device, requires_grad=True)
    grad = torch.randn(batch, CHANNELS, NUM_POINTS, device=device)

    def work() -> tuple[Tensor, ...]:
        grid = voxelize(features, places, RESOLUTION)
        out = devoxelize(grid.contiguous() if contiguous else grid, places)
        return torch.autograd.grad(out, features, grad)

    return work


def _timed(work: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """The median of a few runs, in seconds."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return lambda: median(once() for _ in range(10 if device.type == "cuda" else 3))


if __name__ == "__main__":
    main()
