"""Batches in samples or in tokens: valid fields, and their effect on the learning rate."""

import pytest

from slimray.spec import UserError, parse
from slimray.train.spec import BatchSpec


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "batch: total: is required, in samples"),
        ({"total": 8}, "batch: per_worker: is required, in samples"),
        ({"total": 0, "per_worker": 4}, "batch: total: is required"),
        ({"total": 8, "per_worker": 4, "tokens": 8, "per_worker_tokens": 8}, "in samples or in tokens"),
        ({"tokens": 800}, "batch: tokens: requires per_worker_tokens"),
        ({"per_worker_tokens": 800}, "batch: tokens: requires per_worker_tokens"),
        ({"tokens": 800, "per_worker_tokens": 300}, "batch: tokens: 800 must be a multiple of per_worker_tokens"),
        ({"tokens": 0, "per_worker_tokens": 300}, "batch: tokens: must be >= 1"),
    ],
)
def test_a_batch_is_counted_in_one_way(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        parse(BatchSpec, fields, "job.yaml: batch")


def test_a_resolved_batch_is_a_batch_again():
    for fields, sizes in (
        ({"total": 32, "per_worker": 8}, (32, 8, 4)),
        ({"tokens": 4096, "per_worker_tokens": 1024}, (4096, 1024, 4)),
    ):
        batch = parse(BatchSpec, fields, "x")
        assert (batch.size, batch.microbatch, batch.num_microbatches) == sizes
        assert parse(BatchSpec, batch.model_dump(mode="json"), "x") == batch
