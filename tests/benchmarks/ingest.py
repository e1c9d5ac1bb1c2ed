"""Clips per second of the whole pipeline inside Ray Train against bare decord in two processes, on the same cores.

Both decode the same samples of fight_surv (eight frames, 224 x 224, the training crop) from its mp4 files. The pipeline
is timed between the ends of two epochs, when its buffers are full. Run by `make bench ONLY=ingest`.
"""

import io
import os
import time
from pathlib import Path

import numpy as np
import ray
import ray.train
import torch.distributed as dist
from tests.benchmarks.pairs import Ratio

from slimray.data.cards import load_card
from slimray.data.lists import read_split
from slimray.data.pipeline import FeedConfig, Source
from slimray.data.plan import Phase, epoch_order
from slimray.data.video.clips import ClipRecipe, frame_indices, generators, make_clip
from slimray.train import workers
from slimray.train.spec import ScaleSpec

PAIRS, EPOCHS, BATCH = 9, 2, 16
RECIPE = ClipRecipe(num_segments=8, size=224, resize=256, mode="train")


def fight_surv() -> Path:
    """The folder of the clips in the shared data."""
    shared = Path(os.environ.get("SLIMRAY_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    return shared / "data/video/fight_surv"


def main() -> None:
    root = fight_surv()
    table = read_split(load_card("my_clips", [Path("datasets")]), "train", str(root))
    workers.connect(4)
    source = Source(str(root), ray.put(table), table.num_rows)
    scale = ScaleSpec(workers=2)
    result = workers.launch(_worker, {"source": source, "table": table, "root": str(root)}, scale, "bench-ingest")
    print(Ratio("clips/s pipeline / bare decord", tuple(result["pipeline"]), tuple(result["bare"])))


def _worker(config: dict) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {"pipeline": [], "bare": []}
    for turn in range(PAIRS + 1):
        for name in ("pipeline", "bare") if turn % 2 == 0 else ("bare", "pipeline"):
            dist.barrier()
            rate = pipeline_rate(config["source"]) if name == "pipeline" else _bare_rate(config)
            if turn:  # the first round warms caches up
                out[name].append(rate)
        if ray.train.get_context().get_world_rank() == 0 and turn:
            print(f"pair {turn}: pipeline {out['pipeline'][-1]:.1f}, bare {out['bare'][-1]:.1f} clips/s", flush=True)
    return out


def pipeline_rate(source: Source, recipe: ClipRecipe = RECIPE, epochs: int = EPOCHS) -> float:
    """Clips per second of all ranks together, from the end of the first epoch to `epochs` epochs later."""
    phases = tuple(
        Phase("train", "train", epoch, source.num_samples, BATCH, True, recipe.to_dict()) for epoch in range(epochs + 2)
    )
    feed = FeedConfig(phases, {"train": source}, seed=0, world=2, max_rows=BATCH // 2, decode_slots=2)
    start = end = 0.0
    with workers.open_stream(feed) as stream:
        for phase, step, _ in stream:
            if step + 1 == phase.num_steps and phase.epoch == 0:
                start = time.perf_counter()
            if step + 1 == phase.num_steps and phase.epoch == epochs:
                end = time.perf_counter()
    dist.barrier()
    return epochs * source.num_samples / (end - start)


def _bare_rate(config: dict) -> float:
    """Clips per second of two processes that do nothing but decode, each its half of every epoch."""
    import decord

    rank, rows = ray.train.get_context().get_world_rank(), config["table"].to_pylist()
    start = time.perf_counter()
    for epoch in range(EPOCHS):
        for sample in epoch_order(len(rows), 0, epoch)[rank::2]:
            data = Path(config["root"], rows[sample]["path"]).read_bytes()
            frames_rng, crop_rng = generators((0, epoch, int(sample)))
            reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
            wanted = frame_indices(RECIPE, len(reader), frames_rng)
            unique, place = np.unique(wanted, return_inverse=True)
            frames = reader.get_batch(unique.tolist()).asnumpy()
            make_clip([frames[i] for i in place], RECIPE, crop_rng)
    dist.barrier()
    return EPOCHS * len(rows) / (time.perf_counter() - start)
