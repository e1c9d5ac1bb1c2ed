"""Step time of TSM-ResNet-50 fed by the pipeline over that with the same batches in memory: what ingest costs a step.

One worker takes steps in alternating pairs, with the parts of the training loop: the feeder, the thread that cuts and
transfers batches, the replica, and the clock, which uses events on a GPU. Clips are H.264 files of 256 pixels that this
script generates. Goal on a GPU: at most 1.05. Without a GPU the sizes are small, and decoding uses the processors that
the network needs: such a run shows that the script works, and its ratio does not measure ingest. Run by
`make bench ONLY=fed`.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import get_device
from tests.benchmarks.pairs import Ratio

from slimray import models
from slimray.data.cards import load_card
from slimray.data.lists import read_split
from slimray.data.pipeline import Batch, FeedConfig, Source
from slimray.data.plan import Phase
from slimray.data.video.clips import ClipRecipe
from slimray.data.video.moving_shapes import encode_h264, make_clip
from slimray.tasks.network import Input
from slimray.train import workers
from slimray.train.methods.method import Setup
from slimray.train.methods.plain import PlainReplica
from slimray.train.metrics import Clock
from slimray.train.pieces import Cut, cut
from slimray.train.ranks import Ranks
from slimray.train.spec import OptimSpec, ScaleSpec

WARM = 4  # steps that are not measured
ON_GPU = {"batch": 64, "size": 224, "clips": 512, "epochs": 5, "pairs": 9, "frames": 64}
ON_CPU = {"batch": 2, "size": 64, "clips": 8, "epochs": 3, "pairs": 3, "frames": 16}


def main() -> None:
    gpu, cpus = torch.cuda.is_available(), os.cpu_count() or 2
    sizes = ON_GPU if gpu else ON_CPU
    with tempfile.TemporaryDirectory() as folder:
        write_clips(Path(folder), sizes["clips"], sizes["frames"])
        table = read_split(load_card("my_clips", [Path("datasets")]), "train", folder)
        workers.connect(max(4, cpus))
        config = sizes | {"source": Source(folder, ray.put(table), table.num_rows), "slots": max(2, cpus - 2)}
        scale = ScaleSpec(workers=1, gpus_per_worker=1 if gpu else 0)
        result = workers.launch(_worker, config, scale, "bench-fed")
    print(f"{'GPU' if gpu else 'CPU, small: not a measurement of ingest'}: {sizes}")
    print(Ratio("step time fed / in memory, TSM ResNet-50", tuple(result["fed"]), tuple(result["memory"])))
    print("share of the fed steps that waited for data:", [round(share, 3) for share in result["waited"]])


def write_clips(folder: Path, num: int, num_frames: int) -> None:
    lines = []
    for number in range(num):
        frames, label = make_clip(number, 0, 256, num_frames)
        (folder / f"{number}.mp4").write_bytes(encode_h264(frames))
        lines.append(f"{number}.mp4 {label}\n")
    (folder / "train.txt").write_text("".join(lines))


def _worker(config: dict[str, Any]) -> dict[str, list[float]]:
    device, recipe = get_device(), ClipRecipe(size=config["size"])
    ranks = Ranks(0, 1, device, 600, lambda doing, seconds, stacks: None)
    torch.manual_seed(0)
    optim = OptimSpec(lr=0.01, reference_batch=config["batch"], epochs=1)
    net = models.build("tsm_resnet50", num_classes=4, num_segments=8)
    replica = PlainReplica(net, Setup(optim, Input(), (8, 3, config["size"], config["size"]), device))
    phases = tuple(
        Phase("train", "train", epoch, config["clips"], config["batch"], True, recipe.to_dict())
        for epoch in range(config["epochs"])
    )
    kept: list[tuple[Phase, int, Batch]] = []

    def ready(phase: Phase, step: int, batch: Batch | None) -> Cut:
        assert batch is not None
        if len(kept) < WARM:
            kept.append((phase, step, batch))
        return cut(batch, batch.valid, phase, step, config["batch"], ranks)

    out: dict[str, list[float]] = {"fed": [], "memory": [], "waited": []}
    steps = sum(phase.num_steps for phase in phases)
    for turn in range(config["pairs"] + 1):
        for name in ("fed", "memory") if turn % 2 == 0 else ("memory", "fed"):
            if name == "fed":
                feed = FeedConfig(
                    phases, {"train": config["source"]}, 0, 1, max_rows=config["batch"], decode_slots=config["slots"]
                )
                with workers.open_stream(feed, ready=ready) as stream:
                    step_s, waited_s = timed(replica, (one for _, _, one in stream), config["batch"])
            else:
                step_s, waited_s = timed(replica, again(kept, ready, steps), config["batch"])
            if turn:  # the first round warms everything up
                out[name].append(step_s)
                out["waited"] += [waited_s / step_s] if name == "fed" else []
    return out


def again(kept: list[tuple[Phase, int, Batch]], ready: Callable[..., Cut], steps: int) -> Iterator[Cut]:
    """Batches that are there already, cut and sent a step ahead by a thread as those of the pipeline are."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(ready, *kept[0])
        for number in range(1, steps + 1):
            now, following = following.result(), thread.submit(ready, *kept[number % len(kept)])
            yield now


def timed(replica: PlainReplica, cuts: Iterable[Cut], batch: int) -> tuple[float, float]:
    """Seconds of a step, and those in which it waited for data, as the training loop counts them."""
    clock, asked = Clock(replica.timer), replica.timer.now()
    started = asked
    for number, one in zip(itertools.count(), cuts):
        if number == WARM:
            clock.settle()
            clock, started = Clock(replica.timer), asked
        clock.add(("wait", asked, replica.timer.now()))
        report = replica.step(one.pieces, batch, 0.01, (0, number))
        clock.add(*report.spans)
        started = clock.end_step(started)
        asked = replica.timer.now()
    clock.settle()
    return clock.seconds["total"] / clock.steps, clock.seconds["wait"] / clock.steps


if __name__ == "__main__":
    main()
