"""Blocks of several microbatches: the same samples and bits for every rank, the same number of blocks per step."""

import json
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from ray.data.block import BlockAccessor

from slimray.data.decode import decoded
from slimray.data.index import index_table
from slimray.data.pipeline import Batch, batch_of
from slimray.data.plan import (
    BLOCK_BYTES,
    RANKS_AT_ONCE,
    SHUFFLE,
    Block,
    Phase,
    block_size,
    blocks,
    feeder_ranks,
    num_feeders,
    rank_slice,
)
from slimray.data.points.clouds import Cloud, write_cloud
from slimray.data.points.recipe import PointRecipe
from slimray.data.rows import Rows, divided, rows_of_blocks
from slimray.data.text.samples import TextRecipe, write_text_shard
from slimray.data.token_plan import Bags

NUM = 61
LENGTHS = np.random.default_rng(1).integers(2, 15, NUM)
BY_LENGTH = np.argsort(LENGTHS, kind="stable")


def clouds(folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Clouds, one of which does not decode."""
    for i in range(NUM):
        (folder / f"{i}.npz").write_bytes(write_cloud(Cloud(np.full((5, 3), i, np.float32) + np.eye(5, 3) / 9)))
    (folder / "11.npz").write_bytes(b"damaged")
    rows = [{"path": f"{i}.npz", "label": i % 5, "frames": int(n)} for i, n in enumerate(LENGTHS)]
    return index_table(rows), PointRecipe(num_points=4, mode="train").to_dict()


def texts(folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Pairs of lines of `LENGTHS` tokens."""
    draw = np.random.default_rng(2)
    pairs = [dict(zip(("tokens", "target"), draw.integers(4, 90, (2, n - 1)).tolist(), strict=True)) for n in LENGTHS]
    rows = [{"path": f"{i}", "data": json.dumps(pair)} for i, pair in enumerate(pairs)]
    write_text_shard(pafs.LocalFileSystem(), f"{folder}/shard", rows)
    index = [{"path": f"{i}", "label": -1, "frames": int(n), "shard": "shard", "row": i} for i, n in enumerate(LENGTHS)]
    return index_table(index), TextRecipe(2, 15, 100).to_dict()


def passes(recipe: dict[str, Any], bags: Bags | None, first: int = 0) -> tuple[Phase, ...]:
    """The rest of an epoch of five steps or more, and a validation."""
    size = 13 if bags is None else 5
    train = Phase("train", "train", 1, NUM, size, True, recipe, first, bags=bags, version=SHUFFLE)
    return train, Phase("val", "train", 1, NUM, size, False, recipe, bags=bags)


def consumed(folder: Path, index: pa.Table, phases: tuple[Phase, ...], world: int, size: int) -> dict[Any, Batch]:
    """Return the batch of each rank at each step, from blocks decoded in the plan's order and consumed as by a rank."""
    cut = list(blocks(phases, world, range(world), 2, [size] * len(phases)))
    tables = rows_of_blocks(cut, phases, 7, lambda _: Rows(index), lambda _: BY_LENGTH)
    queues: dict[int, deque[pa.Table]] = {rank: deque() for rank in range(world)}
    for block, rows in zip(cut, tables, strict=True):
        made = decoded(rows, phases[block.phase], str(folder), str(folder), 7, 30)
        queues[block.rank].append(BlockAccessor.batch_to_arrow_block(made))
    out = {}
    for rank, queue in queues.items():
        rest: list[pa.Table] = []
        for number, phase in enumerate(phases):
            for step in range(phase.first_step, phase.num_steps):
                lo, hi = rank_slice(phase, step, rank, world)
                while sum(table.num_rows for table in rest) < hi - lo:
                    rest.append(queue.popleft())
                tables, rest = divided(rest, hi - lo)
                if lo < hi:
                    out[number, step, rank] = batch = batch_of(tables, phase)
                    assert batch.position.tolist() == list(range(lo, hi))
        assert not queue, "a block was decoded for nobody"
        assert not rest
    return out


@pytest.mark.parametrize(("size", "world"), [(2, 1), (3, 2), (4, 3), (100, 5), (3, 16)])
@pytest.mark.parametrize("made", [clouds, texts], ids=["of one length, one bad", "of unequal length"])
@pytest.mark.parametrize("tokens", [0, 33], ids=["by count", "by tokens"])
def test_larger_blocks_hold_the_same_bits(tmp_path: Path, made: Any, tokens: int, size: int, world: int):
    index, recipe = made(tmp_path)
    phases = passes(recipe, Bags.of(LENGTHS, tokens) if tokens else None)
    one, several = (consumed(tmp_path, index, phases, world, size) for size in (1, size))
    assert one.keys() == several.keys()
    for key, batch in one.items():
        other = several[key]
        for name in ("position", "sample", "label", "valid", "data"):
            ours, theirs = getattr(other, name), getattr(batch, name)
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs), (key, name)
        assert (other.path, other.reason) == (batch.path, batch.reason)
    bad = [sample for batch in several.values() for sample in batch.sample[~batch.valid]]
    assert bad == ([11, 11] if made is clouds else [])


@pytest.mark.parametrize("tokens", [0, 33], ids=["by count", "by tokens"])
def test_a_resume_amid_a_block_on_another_number_of_ranks_repeats_and_skips_nothing(tmp_path: Path, tokens: int):
    index, recipe = clouds(tmp_path)
    bags, seen = Bags.of(LENGTHS, tokens) if tokens else None, []
    for first, end, world, size in ((0, 2, 3, 4), (2, 3, 1, 3), (3, 100, 5, 2)):
        found = consumed(tmp_path, index, passes(recipe, bags, first), world, size)
        seen += [i for (phase, step, _), b in found.items() if phase == 0 and step < end for i in b.sample.tolist()]
    assert sorted(seen) == list(range(NUM))


@pytest.mark.parametrize("size", [1, 2, 5, 50])
@pytest.mark.parametrize("world", [1, 4, 30])
def test_a_block_is_of_consecutive_microbatches_of_one_rank_and_phase(size: int, world: int):
    phases = passes({}, None, 1)
    whole = list(blocks(phases, world, range(world), 2, [size, 1]))
    assert [b for b in whole if b.phase == 1] == [b for b in blocks(phases, world, range(world), 2) if b.phase == 1]
    for rank in range(world):
        own = [piece for b in whole if (b.phase, b.rank) == (0, rank) for piece in b.pieces]
        assert own == [(b.step, b.lo, b.hi) for b in blocks(phases[:1], world, [rank], 2)]
    assert all(len(b.pieces) <= size for b in whole)
    assert Block(0, 1, 0, 3, 5, ((2, 7, 8),)).num_rows == 3


@pytest.mark.parametrize("num_nodes", [1, 2, 8, 32, 192])
def test_the_blocks_of_a_step_do_not_grow_with_the_ranks(num_nodes: int):
    clips, world = 8 * (8 * 224 * 224 * 3 + 8), 8 * num_nodes
    num = num_feeders(world, [64] * num_nodes)
    ranks = max((feeder_ranks(world, num, group) for group in range(num)), key=len)
    size = block_size(len(ranks), clips)
    assert size == (1 if len(ranks) <= RANKS_AT_ONCE else len(ranks) // RANKS_AT_ONCE)
    steps = 4 * size
    phase = Phase("train", "train", 0, 8 * world * steps, 8 * world, True, {})
    assert len(list(blocks([phase], world, ranks, 8, [size]))) == RANKS_AT_ONCE * steps


@pytest.mark.parametrize("num_bytes", [0, 1, 10**6, BLOCK_BYTES // 3, BLOCK_BYTES, BLOCK_BYTES + 1, 10**12])
def test_a_block_stays_within_its_bytes_unless_it_is_one_microbatch(num_bytes: int):
    for ranks in (1, 8, 9, 64, 96, 256, 1536):
        size = block_size(ranks, num_bytes)
        assert 1 <= size <= -(-ranks // RANKS_AT_ONCE)
        assert size == 1 or size * num_bytes <= BLOCK_BYTES
