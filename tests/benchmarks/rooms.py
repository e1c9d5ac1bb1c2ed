"""A whole room, point by point: the time of each S3DIS network for a scene of about a million points.

A generated room is cut as S3DIS is prepared (arXiv 1907.03739), at both offsets, into windows of 4096 points: every
point is in one window of each offset. Windows are processed in batches of 8. Where all of them would take longer than
BUDGET_S, a sample of batches, spread evenly over the room, is measured and scaled by the number of windows; the table
says so. Seconds are those of one core (`process_time`, one thread), so that other work on the machine does not count;
where there is a GPU, the GPU is measured, including the transfer of the windows.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from slimray import models
from slimray.data.points import point_sets
from slimray.data.points.clouds import Cloud
from slimray.data.points.recipe import PointRecipe, make_points
from slimray.edge import cost

NUM_POINTS, WINDOW, BATCH, BUDGET_S, LEAST = 1_000_000, 4096, 8, 15.0, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOM_M = (9.0, 6.0, 3.0)
FURNITURE = (("table", 5, (1.6, 0.8, 0.05)), ("chair", 12, (0.5, 0.5, 0.9)), ("bookcase", 4, (0.9, 0.3, 2.0)))
NUM_CLASSES = len(point_sets.S3DIS_CLASSES)
NETS = {
    **{f"PVCNN {w:g}": partial(models.build, "pvcnn_s3dis", num_classes=NUM_CLASSES, width=w) for w in (0.25, 0.5, 1)},
    "PointNet": partial(models.build, "pointnet_s3dis", num_classes=NUM_CLASSES),
    "PVCNN++": partial(models.build, "pvcnnpp_s3dis", num_classes=NUM_CLASSES),
    "DGCNN": partial(models.build, "dgcnn_s3dis", num_classes=NUM_CLASSES),
}


@dataclass(frozen=True)
class Box:
    """A piece of the room: lower corner and size in metres, its class."""

    corner: tuple[float, float, float]
    size: tuple[float, float, float]
    label: int


def make_room(num_points: int = NUM_POINTS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Floor, ceiling, walls, a door, tables, chairs, bookcases: float64 `[N, 6]` in metres and 0..255, labels `[N]`."""
    rng, kind = np.random.default_rng(seed), point_sets.S3DIS_CLASSES.index
    x, y, z = ROOM_M
    boxes = [
        Box((0, 0, 0), (x, y, 0), kind("floor")),
        Box((0, 0, z), (x, y, 0), kind("ceiling")),
        *(Box((0, at, 0), (x, 0, z), kind("wall")) for at in (0, y)),
        *(Box((at, 0, 0), (0, y, z), kind("wall")) for at in (0, x)),
        Box((1, 0.02, 0), (0.9, 0.04, 2), kind("door")),
    ]
    for name, count, size in FURNITURE:
        height = 0.75 if name == "table" else 0.0
        for _ in range(count):
            place = rng.uniform(0, (x - size[0], y - size[1]))
            boxes.append(Box((*place, height), size, kind(name)))
    sides = [(box, axis, high) for box in boxes for axis in range(3) for high in (0, 1) if not high or box.size[axis]]
    areas = np.array([np.prod(np.delete(box.size, axis)) for box, axis, _ in sides])
    counts = rng.multinomial(num_points, areas / areas.sum())
    rows, labels = [], []
    for (box, axis, high), count in zip(sides, counts, strict=True):
        share = rng.random((count, 3))
        share[:, axis] = high
        coords = np.array(box.corner) + share * box.size + rng.normal(0, 0.003, (count, 3))
        rows.append(np.concatenate([coords, np.clip(rng.normal(128, 40, (count, 3)), 0, 255)], 1))
        labels.append(np.full(count, box.label))
    return np.concatenate(rows), np.concatenate(labels)


def windows(xyzrgb: np.ndarray, labels: np.ndarray) -> list[Cloud]:
    """The windows of both offsets."""
    return [
        window
        for number, offset in enumerate(point_sets.S3DIS_OFFSETS.values())
        for window in point_sets.s3dis_windows(xyzrgb, labels, offset, (0, number), WINDOW)
    ]


def inputs(clouds: list[Cloud]) -> torch.Tensor:
    """Float32 `[n, 9, 4096]`: coordinates, colours, places in the room; every point of a window once or more."""
    recipe = PointRecipe(num_points=WINDOW, channels=("colors", "place"), mode="test", max_points=WINDOW)
    views = [make_points(cloud, recipe, (0, 0, number)).points for number, cloud in enumerate(clouds)]
    return torch.from_numpy(np.concatenate(views))


@torch.no_grad()
def seconds_of(net: nn.Module, x: torch.Tensor) -> tuple[float, int]:
    """Seconds that all windows `x` take in batches, and how many batches were measured."""
    batches = x.split(BATCH)

    def seconds(chosen: Iterable[int]) -> float:
        start = (time.perf_counter if DEVICE == "cuda" else time.process_time)()
        for i in chosen:
            net(batches[i].to(DEVICE))
        if DEVICE == "cpu":
            return time.process_time() - start
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds([0])
    count = min(len(batches), max(LEAST, int(BUDGET_S / seconds([len(batches) // 2]))))
    chosen = np.linspace(0, len(batches) - 1, count).astype(int)
    measured = sum(len(batches[i]) for i in chosen)
    return seconds(chosen) / measured * len(x), count


def main() -> None:
    torch.set_num_threads(1)
    start = time.process_time()
    xyzrgb, labels = make_room()
    made, start = time.process_time() - start, time.process_time()
    clouds = windows(xyzrgb, labels)
    cut, start = time.process_time() - start, time.process_time()
    x = inputs(clouds)
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "one thread"
    seen = np.unique(np.concatenate([cloud.rows for cloud in clouds if cloud.rows is not None]))
    print(
        f"a room of {ROOM_M} m, {len(xyzrgb):,} points, {len(np.unique(labels))} classes (made in {made:.1f} s): "
        f"{len(x)} windows of {WINDOW} (cut in {cut:.1f} s, drawn in {time.process_time() - start:.1f} s), "
        f"{len(seen) / len(xyzrgb):.1%} of the points in them; batches of {BATCH}, {where}, "
        f"float32, torch {torch.__version__}"
    )
    print(f"{'network':12}{'params':>12}{'ms/window':>11}{'s/room':>9}  measured", flush=True)
    total = -(-len(x) // BATCH)
    for name, make in NETS.items():
        torch.manual_seed(0)
        net = make().eval().to(DEVICE)
        seconds, count = seconds_of(net, x)
        how = "all" if count == total else f"{count} of {total} batches, scaled"
        each = seconds / len(x) * 1e3
        print(f"{name:12}{cost.count_params(net):>12,}{each:>11.1f}{seconds:>9.1f}  {how}", flush=True)


if __name__ == "__main__":
    main()
