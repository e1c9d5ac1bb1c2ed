"""Step time of slimray's step inside Ray Train against a hand-written torch DDP loop, with the same data in memory.

Both run on two CPU workers with one thread each, inside one worker group, in turn, so that noise affects both alike.
The hand-written loop does what a careful user would write: uint8 to float, forward, backward, clip, SGD.
"""

import time
from statistics import median

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from tests.benchmarks.pairs import Ratio
from torch import nn

from slimray import models
from slimray.tasks.network import Input
from slimray.train import workers
from slimray.train.methods.method import Piece, Setup
from slimray.train.methods.plain import PlainReplica
from slimray.train.spec import OptimSpec, ScaleSpec

MODEL = {"name": "tsm_resnet18", "num_classes": 8, "num_segments": 8, "width": 0.5}
SIZE, BATCH, STEPS, PAIRS = 64, 8, 6, 15


def main() -> None:
    scale = ScaleSpec(workers=2)
    workers.connect(4)
    result = workers.launch(_worker, {}, scale, "bench-overhead")
    print(
        Ratio("step time slimray / hand-written DDP (2 CPU workers)", tuple(result["slimray"]), tuple(result["plain"]))
    )


def _worker(_: dict) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    rng = np.random.default_rng(rank)
    data = rng.integers(0, 256, (BATCH, 1, 8, SIZE, SIZE, 3), dtype=np.uint8)
    labels = rng.integers(0, 8, BATCH)
    ours, theirs = _slimray(data, labels, rank), _plain(data, labels)
    ours(), theirs()
    out: dict[str, list[float]] = {"slimray": [], "plain": []}
    for turn in range(PAIRS):
        order = [("slimray", ours), ("plain", theirs)]
        for name, work in order if turn % 2 == 0 else order[::-1]:
            dist.barrier()
            out[name].append(median(_times(work)))
    return out


def _times(work) -> list[float]:
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def _slimray(data: np.ndarray, labels: np.ndarray, rank: int):
    torch.manual_seed(0)
    optim = OptimSpec(lr=0.01, reference_batch=8, epochs=1, groups="plain")
    net = models.build(**MODEL)
    replica = PlainReplica(net, Setup(optim, Input(), (8, 3, SIZE, SIZE), torch.device("cpu"), rank, 2))

    def step() -> None:
        counts = torch.tensor([float(BATCH), 0.0], dtype=torch.float64)
        dist.all_reduce(counts)
        replica.step([Piece(data, labels)], int(counts[0]), 0.01, (0, 0))

    return step


def _plain(data: np.ndarray, labels: np.ndarray):
    torch.manual_seed(0)
    net = nn.parallel.DistributedDataParallel(models.build(**MODEL).train(), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 255
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255
    frames, targets = torch.from_numpy(data), torch.from_numpy(labels)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        clips = (frames.squeeze(1).movedim(-1, 2).float() - mean) / std
        loss = nn.functional.cross_entropy(net(clips), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 20.0)
        optimizer.step()
        loss.item()

    return step
