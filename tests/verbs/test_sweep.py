"""Sweeps: the settings tried, and finished trials that are not repeated, by real Tune trials on made-up scores."""

import json
import os
from collections.abc import Iterator

import pytest
import ray
from pydantic import ValidationError

from slimray import runs
from slimray.train import workers
from slimray.verbs.shrink import StageSpec
from slimray.verbs.specs import SweepSpec
from slimray.verbs.trials import folder_of, proposals, sweep


def spec(**fields) -> SweepSpec:
    return SweepSpec.model_validate({"over": {"lr": [0.1, 0.2], "distill_weight": [0, 1, 2]}} | fields)


def test_a_grid_is_all_combinations():
    tried = proposals(spec(), 0)
    assert len(tried) == spec().count == 6
    assert {tuple(sorted(one.items())) for one in tried} == {
        (("distill_weight", b), ("lr", a)) for a in (0.1, 0.2) for b in (0.0, 1.0, 2.0)
    }


def test_random_trials_depend_on_the_seed_and_stay_in_their_range():
    drawn = spec(search="random", trials=50, over={"lr": {"low": 1e-4, "high": 1e-1}, "subnets": [1, 2]})
    first = proposals(drawn, 3)
    assert first == proposals(drawn, 3) != proposals(drawn, 4)
    assert all(1e-4 <= one["lr"] <= 1e-1 and one["subnets"] in (1, 2) for one in first)
    assert sum(one["lr"] < 10**-2.5 for one in first) in range(10, 41)  # uniform in the logarithm


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"over": {"lr": {"low": 1e-4, "high": 1e-1}}}, "over.lr: a grid needs a list"),
        ({"over": {"lr": []}}, "over.lr: no value"),
        ({"over": {"lr": {"low": 2, "high": 1}}, "search": "random"}, "need low < high"),
    ],
)
def test_what_cannot_be_tried_is_refused(fields, says):
    with pytest.raises(ValidationError, match=says):
        spec(**fields)


def test_a_stage_tunes_only_fields_that_it_has():
    stage = {"name": "kernel", "epochs": 2, "lr": 0.1, "free": {"kernel": [3, 5]}}
    with pytest.raises(ValidationError, match="no field 'depth'"):
        StageSpec.model_validate(stage | {"tune": {"over": {"depth": [1]}}})
    tuned = StageSpec.model_validate(stage | {"tune": {"over": {"subnets": [1, 2]}}})
    changed = tuned.with_settings({"subnets": 2.0})
    assert (changed.subnets, changed.tune, changed.lr) == (2, None, 0.1)


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """Start a cluster on which two trials run at a time."""
    ray.shutdown()
    workers.connect(2)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.parametrize("search", ["grid", pytest.param("optuna", marks=pytest.mark.benchmark)])
def test_finished_trials_are_not_done_again_and_the_best_comes_first(two_cpus, tmp_path, search):
    """The work is a made-up score; files count how often it was computed."""
    stage = runs.run_at(str(tmp_path / "stage"))
    counts = tmp_path / "counts"
    counts.mkdir()

    def work(settings, uri, tell):
        number = len(list(counts.iterdir()))
        (counts / f"{number}-{os.getpid()}").write_text(json.dumps(settings))
        for epoch in (1, 2):
            tell(epoch, settings["lr"])
        return {"score": -settings["lr"] - settings["distill_weight"]}

    over = {"lr": [0.1, 0.2], "distill_weight": [0, 1]}
    if search == "optuna":
        over = {"lr": {"low": 0.01, "high": 1.0}, "distill_weight": [0, 1]}
    wanted = spec(over=over, search=search, trials=4)
    first = sweep(wanted, stage, work, 2, 0)
    assert len(first) == len(list(counts.iterdir())) == 4
    assert [one["score"] for one in first] == sorted((one["score"] for one in first), reverse=True)
    assert first[0]["uri"] == folder_of(stage, first[0]["settings"])
    gone = runs.run_at(first[-1]["uri"])
    (tmp_path / "stage/trials" / gone.name / "data/trial.json").unlink()  # as if it had been interrupted
    again = sweep(wanted, stage, work, 2, 0)
    assert len(list(counts.iterdir())) == 5
    assert again == first


@pytest.mark.ray
def test_a_trial_that_lags_is_stopped_and_one_that_fails_is_told(two_cpus, tmp_path):
    stage = runs.run_at(str(tmp_path / "stage"))

    def work(settings, uri, tell):
        if settings["lr"] == 0.3:
            raise ValueError("no such rate")
        for epoch in range(1, 9):
            tell(epoch, settings["lr"])
        return {"score": -settings["lr"]}

    wanted = spec(over={"lr": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}, early_stop=True)
    records = sweep(wanted, stage, work, 8, 0)
    assert records[0]["settings"] == {"lr": 0.1}
    notes = {one["settings"]["lr"]: one.get("note", "") for one in records}
    assert "no such rate" in notes[0.3]
    stopped = [lr for lr, note in notes.items() if "lagged" in note]
    assert stopped
    assert min(stopped) > 0.1
