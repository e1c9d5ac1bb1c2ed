"""What the tasks of a `prepare` job leave: a JSON file for each unit of work, read side by side, and joined.

The rows of a split go into its index as they come, so that memory does not grow with them but for their lengths.
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

READERS = 16  # files read at once: they are small, and reading one is waiting for the storage
AHEAD = 1024  # files asked for before the first of them is used up


def shard_of(split: str, number: int) -> str:
    """Return where shard `number` of a split lies under `data/`, behind a hash of its name.

    A bucket bounds the requests of each prefix that it has split off: names in a row would be one.
    """
    name = f"{split}-{number:06d}.parquet"
    return f"shards/{zlib.crc32(name.encode()) & 0xFF:02x}/{name}"


def note_places(part: dict[str, Any], shard: str, places: Sequence[tuple[int, int]]) -> None:
    """Note in the rows of a part that lie in `shard` where each does: `places` by row group, none if not known."""
    for row in part["rows"] if places else ():
        if row.get("shard") == shard:
            row["offset"], row["length"] = places[row["row"]]


def read_parts(run: runs.Run, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the parts `names` of a run in order."""
    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(names), AHEAD):
            some = names[first : first + AHEAD]
            yield from map(json.loads, pool.map(lambda name: runs.read_file(run, f"data/parts/{name}"), some))


@dataclass
class Split:
    """The parts of a split, joined: its index in a file, the files that failed or were left out, objects to be found.

    `files` were tried, of which `failed` do not decode; `frames` are the lengths of the rows, int32, a part each.
    """

    index: IndexWriter
    bad: list[dict[str, Any]] = field(default_factory=list)
    objects: list[dict[str, Any]] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    files: int = 0
    failed: int = 0

    @classmethod
    def at(cls, path: Path) -> "Split":
        """Return a split without parts, whose index goes to the local file `path`."""
        return cls(IndexWriter(path))

    def add(self, part: dict[str, Any], num_listed: int) -> None:
        """Join a part, of `num_listed` rows of the list."""
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
