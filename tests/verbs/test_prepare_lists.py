"""A resumed `prepare` does not accept other lists than those it began with."""

from pathlib import Path

import pytest
from rich.console import Console

from slimray import runs
from slimray.data.index import index_table
from slimray.spec import UserError
from slimray.verbs import prepare
from slimray.verbs.context import Context


def begun(tmp_path: Path) -> Context:
    return Context(runs.open_run(str(tmp_path), "packed"), str(tmp_path), 1, "job.yaml (packed)", Console(), 1)


def test_a_list_that_changed_since_the_run_began_is_refused(tmp_path):
    ctx = begun(tmp_path)
    rows = [{"path": f"{i}.mp4", "label": 0} for i in range(4)]
    prepare._require_same_lists(ctx, {"train": index_table(rows)})
    prepare._require_same_lists(ctx, {"train": index_table(rows)})
    with pytest.raises(UserError) as error:
        prepare._require_same_lists(ctx, {"train": index_table(rows[1:])})
    said = "job.yaml (packed): the list of split 'train' has changed since this run began: restore it, or --restart"
    assert str(error.value) == said
