"""A compressed network is rebuilt from the records in its run; damaged records are refused in one sentence."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from slimray import compress, models, runs
from slimray.compress.rebuild import REBUILD, unchanged
from slimray.data.spec import DataSpec
from slimray.edge import cost
from slimray.spec import UserError
from slimray.tasks.network import load_network
from slimray.verbs import networks
from slimray.verbs.specs import TrainJob

MODEL = {"name": "resnet18", "num_classes": 3, "width": 0.125}
SPARSE = {"step": "sparsify", "weights": {"fc": [10, 192]}}


def saved(folder: Path, model: dict) -> runs.Run:
    """A finished run that holds `model` with random weights."""
    run = runs.open_run(str(folder), "small")
    runs.begin(run, {"kind": "compress"}, 1)
    torch.manual_seed(1)
    state = models.build(**MODEL).state_dict()
    taken = {
        "recipe": {"kind": "image", "mode": "val", "size": 32, "resize": 36},
        "pixels": {}, "classes": ["a", "b", "c"], "task": "classify",
    }  # fmt: skip
    runs.write_model(run, safetensors.torch.save(state), model, taken)
    runs.end(run, "finished")
    return run


def train(**model) -> TrainJob:
    return TrainJob.model_validate(
        {
            "kind": "train", "name": "again", "data": DataSpec(run="data", size=32), "model": model,
            "batch": {"total": 2, "per_worker": 2}, "optim": {"lr": 0.1, "reference_batch": 2, "epochs": 1},
        }
    )  # fmt: skip


def test_a_run_with_records_loads_with_its_weights(tmp_path):
    run = saved(tmp_path, MODEL | {"compression": [SPARSE]})
    found = load_network(run)
    torch.manual_seed(1)
    assert torch.equal(found.net.get_parameter("fc.weight"), models.build(**MODEL).get_parameter("fc.weight"))
    assert found.model["compression"] == [SPARSE]


def test_training_takes_the_structure_of_a_compressed_run_and_leaves_what_is_said_of_values(tmp_path):
    saved(tmp_path, MODEL | {"compression": [SPARSE]})
    job = networks.with_network(train(run="small"), str(tmp_path))
    assert job.model.name == "resnet18"
    assert job.model.options()["compression"] == []
    assert cost.count_params(networks.on_meta(job, None)) > 0


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ("prune", "must be a list"),
        ([{}], "compression[0]: must be a record with a step"),
        ([SPARSE, {"step": "sparsfy"}], "compression[1]: step 'sparsfy', did you mean 'sparsify'"),
    ],
)
def test_records_that_are_none_are_refused(tmp_path, records, message):
    with pytest.raises(UserError) as error:
        compress.build(**MODEL, compression=records)
    assert message in str(error.value)
    run = saved(tmp_path, MODEL | {"compression": records})
    with pytest.raises(UserError):
        load_network(run)
    if not isinstance(records, list) or not records[0]:
        with pytest.raises(UserError):
            networks.with_network(train(run="small"), str(tmp_path))


@pytest.mark.parametrize("step", REBUILD)
@pytest.mark.parametrize("content", [{}, {"channels": 5}, {"channels": {"no.such": [3]}}])
def test_every_row_of_the_table_turns_a_record_that_does_not_fit_into_a_sentence(step, content):
    if REBUILD[step] is unchanged:
        assert compress.build(**MODEL, compression=[{"step": step, **content}])
        return
    with pytest.raises(UserError, match=r"compression\[0\]"):
        compress.build(**MODEL, compression=[{"step": step, **content}])


def test_a_compressed_network_is_built_on_the_meta_device_too():
    net = cost.build_on_meta(lambda: compress.build(**MODEL, compression=[SPARSE]))
    assert cost.count_params(net) == cost.count_params(models.build(**MODEL))


def test_records_are_plain_json():
    assert json.loads(json.dumps(compress.shaping([SPARSE]))) == []
