"""Clips per second of packed shards against the original mp4 files of fight_surv, and what packing keeps and costs.

`prepare` packs the clips twice (short-GOP H.264, JPEG frames); the same pipeline then reads the same samples of each.
Frames are counted in the index before and after; PSNR and bytes are those that `prepare` writes into its card.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import ray
import ray.train
import torch.distributed as dist
from tests.benchmarks.ingest import RECIPE, fight_surv, pipeline_rate
from tests.benchmarks.pairs import Ratio

from slimray import workers
from slimray.data import cards
from slimray.data.pipeline import Source

PAIRS = 9
PREPARE = """
kind: prepare
name: %s
data: {card: my_clips, root: "%s"}
pack: {format: %s, short_side: 256}
"""


def main() -> None:
    root = fight_surv()
    with tempfile.TemporaryDirectory() as folder:
        tables = {"original": cards.read_split(cards.load_card("my_clips", [Path("datasets")]), "train", str(root))}
        roots = {"original": str(root)}
        for kind in ("h264", "jpeg"):
            path = Path(folder, f"{kind}.yaml")
            path.write_text(PREPARE % (kind, root, kind))
            command = [sys.executable, "-m", "slimray.cli", "run", str(path), "--storage", f"{folder}/runs"]
            subprocess.run(command, check=True, timeout=900)
            run = Path(folder, "runs", kind)
            tables[kind], roots[kind] = pq.read_table(run / "data/train.parquet"), str(run / "data")
            packed = json.loads((run / "card.json").read_text())["packed"]
            print(f"{kind}: {packed}, {sum(tables[kind]['frames'].to_pylist()):,} frames in the training split")
        workers.connect(4)
        sources = {k: Source(roots[k], ray.put(t), t.num_rows) for k, t in tables.items()}
        result = workers.launch(_worker, sources, workers.ScaleSpec(workers=2), "bench-packed")
        for kind in ("h264", "jpeg"):
            print(Ratio(f"clips/s packed {kind} / original mp4", tuple(result[kind]), tuple(result["original"])))


def _worker(sources: dict[str, Source]) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {name: [] for name in sources}
    for turn in range(PAIRS + 1):
        names = list(sources)
        for name in names if turn % 2 == 0 else names[::-1]:
            dist.barrier()
            rate = pipeline_rate(sources[name], RECIPE, epochs=1 if name == "original" else 3)
            if turn:
                out[name].append(rate)
    return out
