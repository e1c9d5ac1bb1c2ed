"""Runs with a fault of earlier versions: `show` and `runs` report it, with the command that fixes it."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from tests.cli.test_cli import shell  # noqa: F401 a fixture

from slimray import job, runs
from slimray.data.images.pictures import ImageRecipe
from slimray.data.video.clips import ClipRecipe
from slimray.spec import UserError
from slimray.verbs import shipped


def finished(name: str, document: dict[str, Any], recipe: dict[str, Any]) -> runs.Run:
    run = runs.open_run("runs", name)
    runs.begin(run, {"name": name, **document}, 1)
    weights = safetensors.numpy.save({})
    runs.write_model(run, weights, {"name": "resnet18"}, {"recipe": recipe, "classes": ["a", "b"], "pixels": {}})
    runs.end(run, "finished")
    return run


@pytest.mark.parametrize(
    ("recipe", "right"),
    [
        (ClipRecipe(size=36, resize=73), 41),
        (ClipRecipe(size=36, resize=41), 41),
        (ClipRecipe(size=64, resize=73), 73),
        (ImageRecipe(size=36, resize=0), 0),
    ],
)
def test_a_subnet_with_the_zoom_of_its_supernet_is_told(shell, recipe, right):  # noqa: F811
    document = {"kind": "subnet", "search": "s", "supernet": "none", "data": {"size": 64, "resize": None}}
    run = finished("found", document, recipe.to_dict())
    assert shipped.corrected_recipe(runs.read_job(run), recipe.to_dict()) == recipe.to_dict() | {"resize": right}
    said = shell("show", "found").out
    assert ("`slimray recalibrate found`" in said) == (recipe.resize != right)
    assert (f"short side {recipe.resize} in place of {right}" in said) == (recipe.resize != right)
    assert ("recalibrate" in json.loads(shell("runs", "--json").out)[0]["message"]) == (recipe.resize != right)


@pytest.mark.parametrize(
    ("optim", "wrong"),
    [({"ema": 0.999}, True), ({"ema": None}, False), ({}, False), ({"ema": 0.999, "precise_norm": 0}, False)],
)
def test_averaged_weights_with_statistics_of_others_are_told(shell, optim, wrong):  # noqa: F811
    run = finished("net", {"kind": "train", "optim": optim}, ImageRecipe().to_dict())
    assert ("slimray recalibrate net" in shipped.warning(run)) == wrong
    assert ("BatchNorm statistics of other weights" in shell("show", "net").out) == wrong
    derived = {"kind": "subnet", "search": "s", "supernet": run.uri, "blocks": "x", "data": {"size": 224}}
    found = finished("derived", derived, ImageRecipe().to_dict())
    assert bool(shipped.warning(found)) == wrong


def test_what_holds_no_network_cannot_be_recalibrated(shell):  # noqa: F811
    run = runs.open_run("runs", "tables")
    runs.begin(run, {"kind": "evaluate", "name": "tables"}, 1)
    runs.end(run, "finished")
    done = shell("recalibrate", "tables")
    assert (done.code, done.err) == (
        2,
        "recalibrate (tables-recalibrated): run: 'tables' holds tables of numbers, not a network\n",
    )
    with pytest.raises(UserError, match="run: is required"):
        job.resolve([(Path("x.yaml"), {"kind": "recalibrate", "name": "a"})])
