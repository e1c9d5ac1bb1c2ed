"""Rows of an index by number, for the blocks of a plan: what a decoding task is given in place of the whole index."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from slimray.data.plan import Block, Phase

PLACE = ("phase", "position", "sample")  # columns beside those of the index: where in the plan a row is, and its number


class Rows:
    """The rows of an index by number. Its chunks stay where they are, perhaps in memory that processes share."""

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
    """Return the rows of each block, with the columns PLACE.

    `rows_of` gives the rows of a split, `by_length` their numbers from short samples to long ones. The ranks of a step
    lie side by side in the plan, so their samples are computed at once.
    """
    samples: list[np.ndarray] = [np.zeros(0, np.int64)] * len(blocks)
    by_step = sorted(range(len(blocks)), key=lambda i: (blocks[i].phase, blocks[i].step))
    for (number, _), step in itertools.groupby(by_step, key=lambda i: (blocks[i].phase, blocks[i].step)):
        members, phase = list(step), phases[number]
        lo, hi = min(blocks[i].lo for i in members), max(blocks[i].hi for i in members)
        found = phase.plan.samples(lo, hi, seed, lambda phase=phase: by_length(phase.split))
        for i in members:
            samples[i] = found[blocks[i].lo - lo : blocks[i].hi - lo]
    out: list[pa.Table] = [pa.table({})] * len(blocks)
    for split in dict.fromkeys(phases[block.phase].split for block in blocks):
        members = [i for i, block in enumerate(blocks) if phases[block.phase].split == split]
        table = rows_of(split).take(np.concatenate([samples[i] for i in members]))
        first = 0
        for i in members:
            block, count = blocks[i], len(samples[i])
            place = (np.full(count, block.phase, np.int32), np.arange(block.lo, block.hi), samples[i])
            one = table.slice(first, count)
            for name, values in zip(PLACE, place, strict=True):
                one = one.append_column(name, pa.array(values))
            out[i], first = one, first + count
    return out


def packed(table: pa.Table) -> bytes:
    """Return a table as bytes: pickled, a slice would take the whole of which it is one along."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@dataclass(frozen=True)
class Unpacked:
    """What a read task of Ray Data calls to have the table that was `packed`."""

    data: bytes
    __name__ = "rows of an index"  # by which Ray tells of large ones

    def __call__(self) -> list[pa.Table]:
        with pa.ipc.open_stream(self.data) as reader:
            return [reader.read_all()]
