"""An index of a hundred million rows: what the driver, a feeder and a decoding process need for it.

The index is generated (variable ROWS, default 100,000,000): samples packed in shards of 64, as `prepare` writes it. The
driver, a separate process, reads, checks and fingerprints the index. The work of a feeder is timed there too: computing
which samples are at the positions of 2,000 blocks of 8, and reading their rows. A decoding process decodes such blocks
of small pictures. Memory is given as each process's own (anonymous) memory, and as all that is resident, including the
part of the file that the kernel keeps.
"""

import io
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

CLASSES, PER_SHARD, PIECE = 400, 64, 1 << 20
BLOCKS, ROWS_OF_BLOCK = 2000, 8


def generate(folder: Path, count: int) -> None:
    """Write train.parquet with `count` rows."""
    from slimray.data.index import INDEX

    with pq.ParquetWriter(folder / "train.parquet", INDEX) as writer:
        for first in range(0, count, PIECE):
            numbers = np.arange(first, min(first + PIECE, count))
            digits = pc.utf8_lpad(pc.cast(pa.array(numbers), pa.string()), 9, "0")
            shards = pc.utf8_lpad(pc.cast(pa.array(numbers // PER_SHARD), pa.string()), 7, "0")
            columns = {
                "path": pc.binary_join_element_wise("clips/", digits, ".mp4", ""),
                "label": numbers % CLASSES,
                "frames": 200 + numbers % 101,
                "fps": np.full(len(numbers), 25.0),
                "width": np.full(len(numbers), 340),
                "height": np.full(len(numbers), 256),
                "shard": pc.binary_join_element_wise("shards/train-", shards, ".parquet", ""),
                "row": numbers % PER_SHARD,
            }
            writer.write_table(pa.table(columns).cast(INDEX))


def _card() -> Any:
    from slimray.data.cards import Card

    fields = {"name": "large", "layout": "index", "num_classes": CLASSES, "splits": {"train": "train.parquet"}}
    return Card.model_validate(fields | {"description": "generated", "source": "generated", "licence": "none"})


def drive(folder: Path) -> dict[str, Any]:
    """What a driver does with the index before it starts workers, and then what a feeder does with it."""
    from slimray.data.index import fingerprint
    from slimray.data.lists import read_split, unused_labels

    began = time.monotonic()
    table = read_split(_card(), "train", str(folder))
    read = time.monotonic()
    digest, unused = fingerprint(table), unused_labels(_card(), [table])
    done = time.monotonic()
    assert not unused
    return {"read and check s": read - began, "fingerprint s": done - read, "digest": digest[:8]} | _feed(table)


def _feed(table: pa.Table) -> dict[str, Any]:
    """The rows of an execution of 2,000 blocks, at several places of an epoch."""
    from slimray.data.plan import SHUFFLE, Phase, blocks
    from slimray.data.rows import Rows, rows_of_blocks

    rows, spent = Rows(table), []
    for part in range(5):
        step = part * table.num_rows // 5 // 512
        phase = Phase("train", "train", 1, table.num_rows, 512, True, {}, step, version=SHUFFLE)
        cut = [block for block, _ in zip(blocks([phase], 64, range(64), ROWS_OF_BLOCK), range(BLOCKS), strict=False)]
        began = time.monotonic()
        tables = rows_of_blocks(cut, [phase], 0, lambda split: rows, lambda split: np.zeros(0))
        spent.append((time.monotonic() - began) / len(cut) * 1e3)
    taken = tables[0].column("sample").to_numpy()
    assert np.array_equal(tables[0].column("label").to_numpy(), taken % CLASSES)
    return {"feeder: ms a block, median": float(np.median(spent)), "bytes a block": tables[0].nbytes}


def decode(folder: Path, count: int) -> dict[str, Any]:
    """What a decoding process does: blocks of pictures whose rows are given to it, of an epoch of `count` samples."""
    import ray
    from PIL import Image

    from slimray.data.decode import decode_block
    from slimray.data.index import index_table
    from slimray.data.pipeline import FeedConfig, Source, decode_config
    from slimray.data.plan import SHUFFLE, Block, Phase
    from slimray.data.rows import PLACE

    phase = Phase("train", "train", 1, count, 512, True, {"kind": "image", "size": 32}, version=SHUFFLE)
    config = FeedConfig((phase,), {"train": Source(str(folder), ray.ObjectRef.from_random(), count)}, 0, 64, 8, 1)
    picture, spent = io.BytesIO(), []
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(picture, "JPEG")
    (folder / "0.jpg").write_bytes(picture.getvalue())
    for number in range(50):
        block = Block(0, number, 0, number * 512, number * 512 + ROWS_OF_BLOCK)
        samples = phase.plan.samples(block.lo, block.hi, 0, lambda: np.zeros(0))
        rows = index_table([{"path": "0.jpg", "label": 0}] * len(samples))
        for name, values in zip(PLACE, (np.zeros(8, np.int32), np.arange(block.lo, block.hi), samples), strict=True):
            rows = rows.append_column(name, pa.array(values))
        began = time.monotonic()
        assert decode_block(rows, decode_config([block], config))["valid"].all()
        spent.append((time.monotonic() - began) * 1e3)
    return {"first block ms": spent[0], "ms a block, median": float(np.median(spent))}


def measured(task: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return what `task` says in a process of its own, with that one's seconds and peak memory in MB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_watched, (task, arguments))


def _watched(task: Callable[..., dict[str, Any]], arguments: Any) -> dict[str, Any]:
    done, own = threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.1):
            own[0] = max(own[0], _status("RssAnon"))

    threading.Thread(target=watch, daemon=True).start()
    began, busy = time.monotonic(), time.process_time()
    found = task(*arguments)
    done.set()
    spent = {"s": time.monotonic() - began, "processor s": time.process_time() - busy}
    spent |= {"own MB": max(own[0], _status("RssAnon")), "resident MB": _status("VmHWM")}
    return {"task": task.__name__} | found | spent


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1e3


def main() -> None:
    """Generate the index and print a line for each process."""
    count = int(os.environ.get("ROWS", "100_000_000"))
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.monotonic()
        generate(folder, count)
        size = (folder / "train.parquet").stat().st_size / 1e6
        print(f"{count:,} rows, {size:.0f} MB as Parquet, generated in {time.monotonic() - began:.0f} s", flush=True)
        for task, arguments in ((drive, (folder,)), (decode, (folder, count))):
            found = measured(task, *arguments)
            said = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
            print("  " + ", ".join(said), flush=True)
