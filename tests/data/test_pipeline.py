"""What a failed Ray task is called: the cause in one sentence, with storage told apart from the rest."""

import pytest
from ray.exceptions import RayTaskError

from slimray.data.pipeline import failure_of
from slimray.spec import RunFailed, UserError
from slimray.storage import StorageError

ADVICE = "\nTo change retry attempts, backoff, or which errors are retried, configure the context"


def failed(cause: Exception) -> RunFailed:
    """What is said of a task that raised `cause`, wrapped twice and with Ray's advice below."""
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
