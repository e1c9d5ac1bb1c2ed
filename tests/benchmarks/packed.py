"""Clips per second of packed shards against the original mp4 files of fight_surv, and what packing keeps and costs.

`prepare` packs the clips twice (short-GOP H.264, JPEG frames); the same pipeline then reads the same samples of each.
Frames are counted in the index before and after; PSNR and bytes are those that `prepare` writes to its card.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
import ray.train
import torch.distributed as dist
from tests.benchmarks.ingest import RECIPE, fight_surv, pipeline_rate
from tests.benchmarks.pairs import Ratio

from slimray.data.cards import load_card
from slimray.data.lists import read_split
from slimray.data.pipeline import Source
from slimray.train import workers
from slimray.train.spec import ScaleSpec

PAIRS = 9
SETTINGS = {112: 128, 224: 256}  # side of the input, short side of the packed frames
PREPARE = """
kind: prepare
name: {kind}-{short_side}
data: {{card: my_clips, root: "{root}"}}
pack: {{format: {kind}, short_side: {short_side}}}
"""


def main() -> None:
    root = fight_surv()
    with tempfile.TemporaryDirectory() as folder:
        for size, short_side in SETTINGS.items():
            _compare(folder, root, size, short_side)


def _compare(folder: str, root: Path, size: int, short_side: int) -> None:
    tables = {"original": read_split(load_card("my_clips", [Path("datasets")]), "train", str(root))}
    roots = {"original": str(root)}
    for kind in ("h264", "jpeg"):
        path = Path(folder, f"{kind}.yaml")
        path.write_text(PREPARE.format(kind=kind, root=root, short_side=short_side))
        command = [sys.executable, "-m", "slimray.cli", "run", str(path), "--storage", f"{folder}/runs"]
        subprocess.run(command, check=True, timeout=900, stdout=subprocess.DEVNULL)
        run = Path(folder, "runs", f"{kind}-{short_side}")
        tables[kind], roots[kind] = pq.read_table(run / "data/train.parquet"), str(run / "data")
        packed = json.loads((run / "card.json").read_text())["packed"]
        frames = sum(tables[kind]["frames"].to_pylist())
        print(f"{kind}, short side {short_side}: {packed}, {frames:,} frames in the training split", flush=True)
    workers.connect(4)
    sources = {k: Source(roots[k], ray.put(t), t.num_rows) for k, t in tables.items()}
    config = {"sources": sources, "recipe": replace(RECIPE, size=size, resize=short_side)}
    result = workers.launch(_worker, config, ScaleSpec(workers=2), "bench-packed")
    ray.shutdown()
    for kind in ("h264", "jpeg"):
        name = f"clips/s packed {kind} (short side {short_side}) / original mp4, {size} px"
        print(Ratio(name, tuple(result[kind]), tuple(result["original"])), flush=True)


def _worker(config: dict[str, Any]) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {name: [] for name in config["sources"]}
    for turn in range(PAIRS + 1):
        names = list(out)
        for name in names if turn % 2 == 0 else names[::-1]:
            dist.barrier()
            rate = pipeline_rate(config["sources"][name], config["recipe"], epochs=1 if name == "original" else 3)
            if turn:
                out[name].append(rate)
    return out
