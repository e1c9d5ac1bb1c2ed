"""A bucket with a limited rate of requests: how many an epoch of packed samples needs, and how long it takes.

An S3 server on loopback answers LIMIT requests a second for each folder of keys and refuses others (503), as S3 does
with 5,500 for each prefix. DEMAND samples a second are wanted, in the same proportion as the 28,000 clips a second of
1,536 GPUs to 5,500. One thread per reader makes samples as a decoding task does. Four ways: an index without the
positions of samples (as before 2026-11-30), one with them, shards under hashed prefixes, and `data.cache` over two
epochs. Then trainings of two epochs on Ray, with and without a cache: requests for shards.
"""

import io
import logging
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

JOBS = """
kind: prepare
name: pictures
data: {card: image_shapes, clips: 80, size: 32}
clips_per_shard: 16
---
kind: train
name: plain
data: {run: pictures, size: 32, val: null}
model: {name: resnet18, width: 0.125}
batch: {total: 16, per_worker: 8}
optim: {lr: 0.02, reference_batch: 16, epochs: 2}
---
kind: train
name: cached
data: {run: pictures, size: 32, val: null, cache: {dir: CACHE, max_gb: 1}}
model: {name: resnet18, width: 0.125}
batch: {total: 16, per_worker: 8}
optim: {lr: 0.02, reference_batch: 16, epochs: 2}
"""
LIMIT = 10.0
DEMAND = LIMIT * 28_000 / 5_500
SHARDS, PER_SHARD, READERS = 16, 16, 8
RECIPE = {"kind": "image", "size": 32}


def main() -> None:
    """Print a line for each way and epoch."""
    from tests.faulty_s3 import faulty_s3

    from slimray.data import cache
    from slimray.storage import PATIENCE

    os.environ.update({"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", PATIENCE: "300"})
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with faulty_s3() as s3, tempfile.TemporaryDirectory() as folder:
        flat, hashed = _write(s3.uri("flat"), "shards/train-{:06d}.parquet"), _write(s3.uri("hashed"), "")
        old = [row | {"offset": -1, "length": 0} for row in flat]
        cached = cache.root(s3.uri("flat"), folder, 1, "v")
        ways = [("free", s3.uri("flat"), flat, 0.0), ("no places", s3.uri("flat"), old, LIMIT)]
        ways += [("places", s3.uri("flat"), flat, LIMIT), ("places, prefixes", s3.uri("hashed"), hashed, LIMIT)]
        ways += [("cache, epoch 1", cached, flat, LIMIT), ("cache, epoch 2", cached, flat, LIMIT)]
        print(f"{len(flat)} samples, {LIMIT:g} requests a second and prefix, {DEMAND:.0f} samples/s wanted", flush=True)
        for number, (name, root, rows, limit) in enumerate(ways):
            s3.per_second = limit
            took, asked, refused = _epoch(s3, root, rows, number)
            print(
                f"  {name}: {asked / len(rows):.2f} requests a sample answered, {refused / len(rows):.2f} refused, "
                f"{len(rows) / took:.1f} samples/s",
                flush=True,
            )
        s3.per_second = 0.0
        _train(s3, Path(folder))


def _train(s3: Any, folder: Path) -> None:
    """Print the requests for shards of trainings on Ray, from the bucket and through a cache."""
    documents, before = JOBS.replace("CACHE", str(folder / "cache")).split("---\n"), 0
    for name, text in zip(("prepare", "two epochs", "two epochs, cache"), documents, strict=True):
        (folder / "job.yaml").write_text(text)
        code = "from slimray.cli.main import main; main()"
        command = [sys.executable, "-c", code, "run", str(folder / "job.yaml"), "--storage", s3.uri("runs")]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        asked = sum(count for path, count in s3.asked.items() if "/data/shards/" in path and "/train-" in path)
        print(f"  {name}, of 64 samples in 4 shards: {asked - before} requests for shards", flush=True)
        before = asked


def _write(uri: str, name: str) -> list[dict[str, Any]]:
    """Write the shards of a dataset; their rows of the index."""
    from slimray.data.bytes import write_shard
    from slimray.data.index import index_table
    from slimray.storage import open_uri
    from slimray.verbs.prepare_parts import shard_of

    fs, folder = open_uri(uri)
    draw, rows = np.random.default_rng(0), []
    for number in range(SHARDS):
        shard = name.format(number) or shard_of("train", number)
        packed = []
        for row in range(PER_SHARD):
            picture = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(picture, "JPEG")
            packed.append({"path": f"{number}-{row}.jpg", "label": row % 4, "data": picture.getvalue()})
        for row, (offset, length) in enumerate(write_shard(fs, f"{folder}/{shard}", packed)):
            place = {"shard": shard, "row": row, "offset": offset, "length": length}
            rows.append({"path": packed[row]["path"], "label": row % 4} | place)
    return index_table(rows).to_pylist()


def _epoch(s3: Any, root: str, rows: list[dict[str, Any]], epoch: int) -> tuple[float, int, int]:
    """Seconds of an epoch over `rows`, the requests that were answered in it, and those that were refused."""
    from slimray.data import bytes as data_bytes
    from slimray.data.modalities import MODALITIES, read_recipe
    from slimray.data.open import filesystem
    from slimray.data.permutation import permuted

    data_bytes._footer.cache_clear()
    limit, s3.per_second = s3.per_second, 0.0
    filesystem(root)  # says that the bucket is there
    s3.per_second = limit
    order = permuted(np.arange(len(rows)), len(rows), (0, epoch))
    modality, recipe = MODALITIES["image"], read_recipe(RECIPE)

    def make(i: int) -> None:
        modality.load(rows[i], root, recipe, (0, epoch, int(i)), 30)

    before = dict(s3.done)
    began = time.monotonic()
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(make, order))
    took = time.monotonic() - began
    found = {name: count - before.get(name, 0) for name, count in s3.done.items()}
    return took, found.get("ok", 0), found.get("throttle", 0)
