"""Rows of an index by number, for the blocks of a plan; a decoding task gets them instead of the whole index."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from slimray.data.plan import Block, Phase

PLACE = ("phase", "position", "sample")  # added to the columns of the index: a row's place in the plan, and its number


class Rows:
    """The rows of an index by number. Its chunks are not copied, as they may be in memory that processes share."""

    def __init__(self, index: pa.Table):
        self.batches = [batch for batch in index.replace_schema_metadata(None).to_batches() if batch.num_rows]
        self.starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])

    def take(self, numbers: np.ndarray) -> pa.Table:
        """Return the rows `numbers` (int64 `[n]`, n > 0) in that order, as one chunk."""
        order = np.argsort(numbers, kind="stable")
        wanted = numbers[order]
        cuts = np.searchsorted(wanted, self.starts)
        found = [
            batch.take(pa.array(wanted[lo:hi] - start))
            for batch, start, (lo, hi) in zip(self.batches, self.starts, itertools.pairwise(cuts), strict=False)
            if lo < hi
        ]
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return pa.Table.from_batches(found).combine_chunks().take(pa.array(back))


def rows_of_blocks(
    blocks: Sequence[Block],
    phases: Sequence[Phase],
    seed: int,
    rows_of: Callable[[str], Rows],
    by_length: Callable[[str], np.ndarray],
) -> list[pa.Table]:
    """Return the rows of each block, with the columns PLACE added.

    `rows_of` returns the rows of a split, `by_length` their numbers from short to long samples. The positions of all
    ranks of a step are contiguous in the plan, so their samples are computed together.
    """
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for block in blocks:
        for step, lo, hi in block.pieces:
            steps.setdefault((block.phase, step), []).append((lo, hi))
    found: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
    for (number, step), cuts in steps.items():
        phase, lo, hi = phases[number], min(lo for lo, _ in cuts), max(hi for _, hi in cuts)
        samples = phase.plan.samples(lo, hi, seed, lambda phase=phase: by_length(phase.split))
        found[number, step] = lo, samples
    out: list[pa.Table] = [pa.table({})] * len(blocks)
    for split in dict.fromkeys(phases[block.phase].split for block in blocks):
        members = [i for i, block in enumerate(blocks) if phases[block.phase].split == split]
        place: list[list[np.ndarray]] = [[], [], []]
        for block in (blocks[i] for i in members):
            for step, lo, hi in block.pieces:
                first, samples = found[block.phase, step]
                piece = (np.full(hi - lo, block.phase, np.int32), np.arange(lo, hi), samples[lo - first : hi - first])
                for column, values in zip(place, piece, strict=True):
                    column.append(values)
        columns = [np.concatenate(column) for column in place]
        table = rows_of(split).take(columns[-1])
        for name, values in zip(PLACE, columns, strict=True):
            table = table.append_column(name, pa.array(values))
        start = 0
        for i in members:
            out[i] = table.slice(start, blocks[i].num_rows)
            start += blocks[i].num_rows
    return out


def divided(tables: Sequence[pa.Table], count: int) -> tuple[list[pa.Table], list[pa.Table]]:
    """Return the first `count` rows of `tables` and the rest, both as views."""
    first, rest = [], []
    for table in tables:
        here = min(count, table.num_rows)
        count -= here
        first += [table.slice(0, here)] if here else []
        rest += [table.slice(here)] if here < table.num_rows else []
    return first, rest


def packed(table: pa.Table) -> bytes:
    """Return a table as bytes; pickling a slice would include the whole table it is taken from."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@dataclass(frozen=True)
class Unpacked:
    """Callable for a read task of Ray Data that returns the table that was `packed`."""

    data: bytes
    __name__ = "rows of an index"  # shown in Ray's warnings about large ones

    def __call__(self) -> list[pa.Table]:
        with pa.ipc.open_stream(self.data) as reader:
            return [reader.read_all()]
