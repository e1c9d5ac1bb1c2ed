"""Part files that the tasks of a `prepare` job write, a JSON file per unit of work: read in parallel and joined.

Rows are written to the index of their split one part at a time, so that only their lengths stay in memory.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimray import runs
from slimray.data.index import index_table
from slimray.data.index_file import IndexWriter

READERS = 16  # files read at once: they are small, and reading one is mostly waiting for the storage
AHEAD = 1024  # files requested before the first of them is used


def shard_of(split: str, number: int) -> str:
    """Return the path of shard `number` of a split under `data/`, with a hash of its name as folder.

    A bucket limits the request rate per prefix: consecutive names alone would share one prefix.
    """
    name = f"{split}-{number:06d}.parquet"
    return f"shards/{zlib.crc32(name.encode()) & 0xFF:02x}/{name}"


def note_places(part: dict[str, Any], shard: str, places: Sequence[tuple[int, int]]) -> None:
    """Add offset and length to the rows of a part that lie in `shard`: `places` by row group, empty if not known."""
    for row in part["rows"] if places else ():
        if row.get("shard") == shard:
            row["offset"], row["length"] = places[row["row"]]


def read_parts(run: runs.Run, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the contents of the part files `names` of a run in order."""
    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(names), AHEAD):
            some = names[first : first + AHEAD]
            yield from map(json.loads, pool.map(lambda name: runs.read_file(run, f"data/parts/{name}"), some))


@dataclass
class Split:
    """The joined parts of a split: its index in a file, the files that failed or were left out, the objects to detect.

    `files` counts the files tried, `failed` those that do not decode; `frames` holds the lengths of the rows, int32, an
    array per part.
    """

    index: IndexWriter
    bad: list[dict[str, Any]] = field(default_factory=list)
    objects: list[dict[str, Any]] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    files: int = 0
    failed: int = 0

    @classmethod
    def at(cls, path: Path) -> "Split":
        """Return a split without parts, whose index is written to the local file `path`."""
        return cls(IndexWriter(path))

    def add(self, part: dict[str, Any], num_listed: int) -> None:
        """Add a part, made from `num_listed` rows of the list."""
        if part["rows"]:
            table = index_table(part["rows"])
            self.index.add(table)
            self.frames.append(table.column("frames").to_numpy())
        self.bad += part["bad"] + part["left_out"]
        self.objects += part.get("objects", [])
        self.files += part.get("tried", num_listed)
        self.failed += len(part["bad"])

    @property
    def lengths(self) -> np.ndarray:
        """The lengths of all rows, int32 `[n]`."""
        return np.concatenate(self.frames) if self.frames else np.zeros(0, np.int32)
