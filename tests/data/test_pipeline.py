"""Errors of failed Ray tasks: the cause in one sentence, storage failures kept apart; batches from blocks."""

import numpy as np
import pyarrow as pa
import pytest
from ray.data.block import BlockAccessor
from ray.exceptions import RayTaskError

from slimray.data.pipeline import Batch, failure_of
from slimray.spec import RunFailed, UserError
from slimray.storage import StorageError

ADVICE = "\nTo change retry attempts, backoff, or which errors are retried, configure the context"


def failed(cause: Exception) -> RunFailed:
    """Return the error of a task that raised `cause`, wrapped twice and with Ray's advice below."""
    cause.args = (f"{cause.args[0]}{ADVICE}",)
    return failure_of(RayTaskError("map", "", RayTaskError("inner", "", cause)))


@pytest.mark.parametrize("kind", [StorageError, UserError])
def test_a_storage_that_failed_may_be_tried_again(kind):
    found = failed(kind("/data/shard: cannot write it (the disk is full)"))
    assert isinstance(found, StorageError)
    assert str(found) == "/data/shard: cannot write it (the disk is full)"


def test_what_is_wrong_with_the_run_is_not_tried_again():
    found = failed(RunFailed("a file of the index is missing (a.mp4)"))
    assert type(found) is RunFailed
    assert str(found) == "a file of the index is missing (a.mp4)"


def test_anything_else_is_named_by_its_kind():
    assert str(failed(ValueError("odd"))) == "the data pipeline failed: ValueError: odd"


def block(positions: list[int], lengths: list[int]) -> pa.Table:
    """A decoded block of texts: at position p as many tokens p + 10 as its length, then padding with 1."""
    longest = max(lengths)
    data = np.ones((len(lengths), 1, 2, longest), np.int32)
    for row, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        data[row, ..., :length] = position + 10
    texts = {name: np.array([""] * len(lengths), object) for name in ("path", "reason")}
    columns = {"position": np.array(positions), "sample": np.array(positions), "valid": np.ones(len(lengths), np.uint8)}
    label = data[:, 0, 0].astype(np.int64)
    return BlockAccessor.batch_to_arrow_block({**columns, **texts, "data": data, "label": label})


def test_blocks_of_unequal_length_are_one_batch_and_its_parts_are_as_long_as_they_need_to_be():
    batch = Batch([block([2, 3], [2, 1]), block([0, 1], [4, 3])], (1, 1))
    assert batch.position.tolist() == [0, 1, 2, 3]
    assert batch.data[:, 0, 1].tolist() == [[10] * 4, [11, 11, 11, 1], [12, 12, 1, 1], [13, 1, 1, 1]]
    assert batch.label.tolist() == batch.data[:, 0, 0].tolist()
    part = batch.cut(2, 4, (1, 1))
    assert (len(part), part.position.tolist(), part.data.shape, part.label.shape) == (2, [2, 3], (2, 1, 2, 2), (2, 2))
    assert len(batch) == 4
