"""Results of a search: a network at its own resolution with the zoom of its scoring, and fronts for every device."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from slimray import models, runs
from slimray.arch import Arch
from slimray.data.images.pictures import ImageRecipe
from slimray.data.modalities import input_shape
from slimray.data.spec import DataSpec
from slimray.data.video.clips import ClipRecipe
from slimray.data.views import at_size
from slimray.edge import cost
from slimray.report import pages
from slimray.search.problem import Trial
from slimray.search.strategies import Random
from slimray.spec import UserError, parse
from slimray.tasks import TASKS
from slimray.tasks.task import Metric
from slimray.verbs import search
from slimray.verbs.search import SearchJob, TargetSpec
from slimray.verbs.shrink import ShrinkJob

TOP1 = TASKS["classify"].best


def test_a_video_subnet_is_made_at_its_resolution_with_the_zoom_it_was_judged_at():
    net = cost.build_on_meta(lambda: models.build("ofa_tsm_mobilenetv3", num_classes=4, preset="tiny", num_segments=8))
    recipe = ClipRecipe(num_segments=8, size=64, resize=73, mode="val").to_dict()
    largest, smallest = net.space.largest(), net.space.smallest()
    assert search.subnet_recipe(net.space, largest, recipe) == recipe
    made = search.subnet_recipe(net.space, smallest, recipe)
    side, frames = smallest["resolution"], smallest["frames"]
    assert side < 64
    assert frames < 8
    assert input_shape(made) == (frames, 3, side, side)
    assert made["resize"] == round(73 * side / 64)


@pytest.mark.parametrize("size", [16, 36, 112, 160, 256])
def test_another_resolution_keeps_the_share_of_the_picture_that_is_seen(size):
    for recipe in (ClipRecipe(size=224, resize=256), ClipRecipe(size=64, resize=64), ImageRecipe(size=224, resize=320)):
        changed = at_size(recipe.to_dict(), size)
        assert changed["size"] == size
        assert abs(changed["resize"] - recipe.resize * size / recipe.size) <= 0.5
    assert at_size(ImageRecipe(size=224).to_dict(), size)["resize"] == 0, "follows by itself"
    assert DataSpec(size=224, resize=320).at_size(size).resize == round(320 * size / 224)
    assert DataSpec(size=224).at_size(size).resize is None


# ---------------------------------------------------------------------------------------------------------- fronts


def searches(tmp_path, *targets: TargetSpec, metric: Metric = TOP1) -> list:
    """Return a search per target that has tried the same three archs."""
    net = cost.build_on_meta(lambda: models.build("ofa_mobilenetv3", num_classes=10, preset="tiny"))
    job = parse(
        SearchJob,
        {
            "kind": "search", "name": "s", "supernet": "r", "strategy": {"name": "random", "evaluations": 3},
            "targets": [target.model_dump() for target in targets],
        },
        "j",
    )  # fmt: skip
    of_net, out = search._prices(net, {"kind": "image"}), []
    run = runs.open_run(str(tmp_path), "s")
    archs = [net.space.largest(), net.space.largest().replace(depth=[2, 2, 2]), net.space.smallest()]
    measured: dict[Arch, dict[str, float]] = {}
    for target in targets:
        prices = of_net.on(search._meter(target))
        problem = search._problem(prices, target, Random(name="random", evaluations=3))
        progress = search._Progress(job, run, target, prices, problem, measured, metric)
        for index, arch in enumerate(archs):
            progress.note(index, arch, {metric.name: 90.0 - 10 * index})
        out.append(progress)
    return out


def left(progresses: list, tmp_path, metric: Metric = TOP1) -> tuple[dict, dict]:
    """Return front.json and results.json of the search."""
    results: dict = {}
    run = runs.open_run(str(tmp_path), "s")

    def finish(card: dict, found: dict) -> None:
        results.update(found)
        runs.write_card(run, card)
        runs.write_file(run, "results.json", json.dumps(found).encode())

    runs.begin(run, {"kind": "search", "name": "s"}, 1)
    search._finish(progresses[0].job, SimpleNamespace(run=run, finish=finish), progresses, [], metric)  # type: ignore[arg-type]
    return json.loads(runs.read_file(run, "front.json"))["fronts"], results


def test_fronts_are_written_of_what_a_device_costs_too(tmp_path):
    target = TargetSpec(name="small", hardware="dsp", limits={"latency_ms": 1e6, "macs": 1e12})
    fronts, _ = left(searches(tmp_path, target), tmp_path)
    assert set(fronts) == {"params", "macs", "memory_mb", "latency_ms"}
    assert [row["metric"] for row in fronts["latency_ms"]] == [70.0, 80.0, 90.0]


def test_a_metric_that_is_better_lower_is_searched_for_its_lowest_value_and_shown_as_it_is(tmp_path):
    """The same holds for a search that continues from storage."""
    metric, target = TASKS["translate"].best, TargetSpec(name="small", limits={"macs": 1e12})
    (progress,) = searches(tmp_path, target, metric=metric)
    smallest = progress.prices.net.space.smallest()
    assert search._best(progress).arch == smallest
    again = replace(progress, history={}, measured={})
    again.read()
    assert again.trials == progress.trials
    assert search._best(again).arch == smallest
    fronts, results = left([progress], tmp_path, metric)
    assert [row["metric"] for row in fronts["macs"]] == [70.0], "the smallest is the best, no other is on the front"
    assert [row["metric"] for row in results["trials"]] == [90.0, 80.0, 70.0]
    page = pages.search_report(progress.run)
    assert "perplexity by macs" in page
    assert results["history"] == {"small": [90.0, 80.0, 70.0]}
    assert "best perplexity so far" in page
    assert "perplexity [%]" not in page


def test_an_arch_tried_for_two_devices_keeps_what_it_costs_on_each(tmp_path):
    limits = {"latency_ms": 1e6}
    targets = [TargetSpec(name=name, hardware=name, limits=limits) for name in ("dsp", "edge_gpu")]
    progresses = searches(tmp_path, *[target.model_copy(update={"name": target.name[:4]}) for target in targets])
    fronts, results = left(progresses, tmp_path)
    assert {name for name in fronts if "latency" in name} == {"latency_ms (dsp)", "latency_ms (edge_gpu)"}
    for row in results["trials"]:
        arch = progresses[0].prices.net.space.arch(row["arch"])
        for progress, name in zip(progresses, ("dsp", "edge_gpu"), strict=True):
            trial: Trial = next(one for one in progress.trials if one.arch == arch)
            assert row[f"latency_ms ({name})"] == trial.costs["latency_ms"]


# ---------------------------------------------------------------------------------------------------------- shrink


@pytest.mark.parametrize("norm", ["sync", "partial", "frozen"])
def test_a_supernet_keeps_statistics_per_worker(norm):
    stages = [{"name": "a", "epochs": 1, "lr": 0.1}, {"name": "b", "free": {"depth": [2, 3]}, "epochs": 1, "lr": 0.1}]
    document = {
        "kind": "shrink", "name": "s", "data": {"run": "d"}, "model": {"name": "ofa_mobilenetv3"}, "stages": stages,
        "batch": {"total": 8, "per_worker": 8}, "optim": {"reference_batch": 8, "norm": norm},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"optim\.norm: must be local"):
        parse(ShrinkJob, document, "j")
