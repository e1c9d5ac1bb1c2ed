"""Voxelize and devoxelize, forward and backward, against the minimum time of their memory traffic.

N = 16384 points of C = 64 channels, R = 32, in turn with a large copy, whose bandwidth (read and write) converts bytes
to seconds: a ratio of 1 is as fast as copying. Two counts of bytes: what any kernel must move, see `traffic`; and with
eight corners read per point in each direction, what a kernel moves that keeps no neighbour in cache. `channels last`
passes the grid in its memory layout, `contiguous` as PVConv does, with two transpositions that are not counted as
necessary. Points fill a cube uniformly, in random order, which is the worst case for locality.

The operators allocate their outputs, the copy does not. If the C library returns freed memory to the system, that
memory is cleared page by page at the next call, which at B = 8 takes longer than everything else. The second half of
the figures is therefore taken with freed memory kept, and each line states how many page faults occurred.
"""

import contextlib
import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from tests.benchmarks.pairs import Ratio, alternate
from torch import Tensor

from slimray.models.points import ops
from slimray.models.points.ops import devoxelize, normalize_coords, trilinear_corners, voxel_index, voxelize

NUM_POINTS, CHANNELS, RESOLUTION = 16384, 64, 32
BATCHES = (1, 8)
COPY_BYTES = 2**28
PAIRS = 9
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc, <malloc.h>


def traffic(places: Tensor, channels: int, resolution: int) -> tuple[int, int]:
    """Bytes that float32 must move, forward and backward, for points at `places` `[B, 3, N]`: at least, with corners.

    At least: features in, grid out, grid in, features out, and their gradients the other way, each once; coordinates
    in all four operators. What is written is dense and counts in full; of a grid that is read only the voxels count
    that the points use: corners of some weight forward, occupied voxels backward. With corners: eight grid rows per
    point in devoxelization and eight times the gradient of the points in its backward, in place of one read each.
    """
    batch, _, num_points = places.shape
    index, weights = trilinear_corners(places, resolution)
    touched = sum(len(i[w > 0].unique()) for i, w in zip(index, weights))
    occupied = sum(len(i.unique()) for i in voxel_index(places, resolution))
    points, grid = batch * num_points, batch * resolution**3
    least = channels * (4 * points + 2 * grid + touched + occupied) + 4 * 3 * points
    return 4 * least, 4 * (least + channels * (8 * points - touched + 8 * points - points))


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"N={NUM_POINTS}, C={CHANNELS}, R={RESOLUTION}, float32, copies of {COPY_BYTES >> 20} MiB")
    if device.type == "cuda":
        for how in ("kernels", "torch alone"):
            with kernels_off() if how == "torch alone" else contextlib.nullcontext():
                _figures(f"{torch.cuda.get_device_name()}, {how}, queued", device, (8, 32))
        _figures(f"{torch.cuda.get_device_name()}, kernels, a CUDA graph", device, (8, 32), captured=True)
        _neighbours(device)
        return
    most = torch.get_num_threads()
    for memory in ("returned", "kept"):
        if memory == "kept" and not _keep_freed_memory():
            print("freed memory can not be kept here")
            continue
        for threads in sorted({1, most}):
            torch.set_num_threads(threads)
            _figures(f"CPU, {threads} threads, freed memory {memory}", device)


@contextlib.contextmanager
def kernels_off() -> Iterator[None]:
    """The operators in torch alone."""
    known = ops._kernels
    ops._kernels = lambda x, adds=False: None
    try:
        yield
    finally:
        ops._kernels = known


def _neighbours(device: torch.device) -> None:
    """What the kernels gain where points are searched: PointNet++ on 8 scenes, the first level."""
    torch.manual_seed(0)
    coords = torch.rand(8, 3, 4096, device=device)
    centers = ops.gather(coords, ops.furthest_point_sample(coords, 1024))
    for name, work in {
        "furthest point sampling, 8 x 4096 -> 1024": lambda: ops.furthest_point_sample(coords, 1024),
        "ball query, 8 x 1024 centres, radius 0.1, 32 of 4096": lambda: ops.ball_query(coords, centers, 0.1, 32),
    }.items():

        def off(work: Callable[[], object] = work) -> float:
            with kernels_off():
                return queued_s(work, 3)

        print(alternate(f"{name}: torch / kernel", off, lambda work=work: queued_s(work, 3), PAIRS), flush=True)


def _captured(work: Callable[[], object]) -> Callable[[], object]:
    """`work` as a CUDA graph: what the GPU takes, without the time to launch one operation after the other."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _figures(where: str, device: torch.device, batches: tuple[int, ...] = BATCHES, captured: bool = False) -> None:
    print(where)
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copy = _timed(lambda: target.copy_(source), device)
    for batch in batches:
        torch.manual_seed(0)
        places = normalize_coords(torch.rand(batch, 3, NUM_POINTS), RESOLUTION)
        counts = list(zip(("at least", "eight corners each way"), traffic(places, CHANNELS, RESOLUTION)))
        for layout in ("channels last", "contiguous"):
            round_trip = _round_trip(places.to(device), layout == "contiguous")
            name = f"voxelize + devoxelize, forward + backward, B={batch}, {layout}"
            if captured:
                round_trip = _captured(round_trip)
            measured = alternate(name, _timed(round_trip, device), copy, PAIRS)
            before = _page_faults()
            for _ in range(5):
                round_trip()
            faults = (_page_faults() - before) // 5
            copied_per_s = 2 * COPY_BYTES / median(measured.b)
            print(f"{name}: {median(measured.a) * 1e3:.2f} ms, {faults} pages, copy {copied_per_s / 1e9:.1f} GB/s")
            for count, needed in counts:
                bound = tuple(seconds * needed / (2 * COPY_BYTES) for seconds in measured.b)
                print("  ", Ratio(f"time / bound, {count} ({needed / 1e6:.1f} MB)", measured.a, bound), flush=True)


def _round_trip(places: Tensor, contiguous: bool) -> Callable[[], object]:
    features = torch.randn(len(places), CHANNELS, NUM_POINTS, device=places.device, requires_grad=True)
    grad = torch.randn_like(features)

    def work() -> tuple[Tensor, ...]:
        grid = voxelize(features, places, RESOLUTION)
        out = devoxelize(grid.contiguous() if contiguous else grid, places)
        return torch.autograd.grad(out, features, grad)

    return work


def _keep_freed_memory() -> bool:
    """What the variables MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ do at the start of a process; glibc only."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    most = 2**31 - 1
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, most) and mallopt(M_TRIM_THRESHOLD, most))


def _page_faults() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _timed(work: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Seconds of a run: on a CPU the median of a few, on a GPU the mean of many that are queued, as in training."""

    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return (lambda: queued_s(work)) if device.type == "cuda" else (lambda: median(once() for _ in range(3)))


def queued_s(work: Callable[[], object], runs: int = 20) -> float:
    """Seconds of a run on the GPU, of several in a row."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(runs):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / runs / 1e3


if __name__ == "__main__":
    main()
