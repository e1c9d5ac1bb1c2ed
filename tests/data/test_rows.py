"""A decoding task gets the rows of its own block, for any chunks of the index and any order of the plan."""

import pickle

import numpy as np
import pyarrow as pa
import pytest

from slimray.data.index import index_table, with_notes
from slimray.data.plan import SHUFFLE, Phase, blocks
from slimray.data.rows import PLACE, Rows, Unpacked, packed, rows_of_blocks
from slimray.data.token_plan import Bags

NUM, BATCH = 103, 16
LENGTHS = np.random.default_rng(0).integers(3, 20, NUM)
TABLE = index_table([{"path": f"{i}.npz", "label": i % 7, "frames": int(n)} for i, n in enumerate(LENGTHS)])
IN_PIECES = with_notes(
    pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1, 0), TABLE.slice(1, 60), TABLE.slice(61)]), ["!"]
)


@pytest.mark.parametrize("table", [TABLE, IN_PIECES], ids=["one chunk", "pieces"])
def test_rows_are_taken_by_number_in_the_order_asked_for(table: pa.Table):
    numbers = np.array([102, 0, 5, 61, 60, 5, 1])
    found = Rows(table).take(numbers)
    assert found.equals(TABLE.take(pa.array(numbers)))
    assert found.schema.metadata is None
    assert found.column("path").num_chunks == 1


def test_a_few_rows_travel_without_the_table_that_they_are_of():
    few = TABLE.slice(50, 4)
    data = packed(few)
    assert len(data) < len(packed(TABLE)) / 2
    (back,) = pickle.loads(pickle.dumps(Unpacked(data)))()
    assert back.equals(few)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("bags", [None, Bags.of(LENGTHS, 40)], ids=["by count", "by tokens"])
def test_every_block_comes_with_its_own_rows_and_all_of_an_epoch_once(world: int, bags: Bags | None):
    by_length = np.argsort(LENGTHS, kind="stable")
    train = Phase("train", "train", 2, NUM, BATCH if bags is None else 4, True, {}, bags=bags, version=SHUFFLE)
    phases = (train, Phase("val", "val", 2, NUM, BATCH, False, {}))
    cut = list(blocks(phases, world, range(world), 4))
    rows = Rows(IN_PIECES)
    tables = rows_of_blocks(cut, phases, 7, lambda split: rows, lambda split: by_length)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for block, table in zip(cut, tables, strict=True):
        phase, position, sample = (table.column(name).to_numpy() for name in PLACE)
        assert set(phase) == {block.phase}
        assert position.tolist() == list(range(block.lo, block.hi))
        wanted = phases[block.phase].plan.samples(block.lo, block.hi, 7, lambda: by_length)
        assert np.array_equal(sample, wanted)
        assert table.drop_columns(list(PLACE)).equals(TABLE.take(pa.array(wanted)))
        seen[block.phase] += sample.tolist()
    assert [sorted(one) for one in seen.values()] == [list(range(NUM))] * 2
    assert seen[0] != sorted(seen[0])
    part = rows_of_blocks(cut[3:9], phases, 7, lambda split: rows, lambda split: by_length)
    assert all(one.equals(other) for one, other in zip(part, tables[3:9], strict=True))
