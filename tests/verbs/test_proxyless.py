"""Costs of paths and checks of jobs; on a real cluster a sweep, in which a killed search ends with the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.verbs.conftest import Shell, end_session, weights
from tests.waits import wait_for

from slimray import models, runs
from slimray.edge import cost, hardware
from slimray.edge.arch_costs import Prices
from slimray.edge.latency_table import LatencyTable, write_table
from slimray.spec import UserError, parse
from slimray.verbs import path_costs, proxyless

# both searches have the same weight: the first, undisturbed, gives the result that the second must reach
JOBS = """
kind: prepare
name: pictures
data: {card: image_shapes, clips: 60, size: 32}
---
kind: proxyless
name: swept
data: {run: pictures, size: 32, images: {area: [0.5, 1], brightness: 0, saturation: 0}}
model: {name: proxyless_supernet, preset: tiny, width: 0.5}
batch: {total: 8, per_worker: 8}
optim: {reference_batch: 8, schedule: cosine, groups: no_norm_decay}
warmup: {epochs: 1, lr: 0.02}
search: {epochs: 2, lr: 0.02, every: 1, arch_lr: 0.05}
latency: {cost: macs, ref_macs: 1.0e+6}
sweep: {weights: [0.5, 0.5]}
retrain: {epochs: 1, lr: 0.02}
hold_out: 16
checkpoint: {every_steps: 2}
"""


MACS = {"cost": "macs", "ref_macs": 2e6}


def make_job(**changes: Any) -> proxyless.ProxylessJob:
    document: dict[str, Any] = {
        "kind": "proxyless",
        "name": "found",
        "data": {"run": "pictures", "size": 32},
        "model": {"name": "proxyless_supernet", "preset": "tiny"},
        "batch": {"total": 8, "per_worker": 8},
        "optim": {"reference_batch": 8},
        "warmup": {"epochs": 1, "lr": 0.02},
        "search": {"epochs": 2, "lr": 0.02},
        "latency": MACS,
        "retrain": {"epochs": 1, "lr": 0.02},
        "hold_out": 16,
    }
    return parse(proxyless.ProxylessJob, document | changes, "x.yaml")


@pytest.fixture(scope="module")
def net():
    return models.build("proxyless_supernet", num_classes=5, preset="tiny")


def table(folder: Path, net: Any, ms: float, fixed_ms: float = 0.0, slope: float = 1.0, sides: Any = (32,)) -> str:
    """Return a table in which each unit of the supernet has `ms` at a size of 32, scaled by pixels, mean readings twice
    that, with the calibration `fixed_ms` and `slope`."""

    def row(side: int) -> dict[str, Any]:
        share = ms * side**2 / 32**2
        return {"ms": share, "mean_ms": 2 * share, "std_ms": 0.1, "count": 2, "readings_ms": [share, 3 * share]}

    units = {}
    for side in sides:
        fixed, edges = net.units(side)
        units |= {unit.key: row(side) for unit in [*fixed, *(u for edge in edges for u in edge if u is not None)]}
    calibration = {"fixed_ms": fixed_ms, "slope": slope, "rows": []}
    calibration |= dict.fromkeys(("median_error_percent", "largest_error_percent", "noise_percent"), 1.0)
    plain = {
        "format": 1, "model": {"name": "ofa_proxyless"}, "num_points": None, "hardware": "cpu-eager",
        "device": "a CPU", "threads": 1, "versions": {}, "date": "2026-11-30", "resolutions": sides, "rounds": 2,
        "seconds": 1.0, "done": 2, "reference_ms": [1.0, 1.0], "waited_percent": 0.0, "units": units, "subnets": [],
        "calibration": calibration,
    }  # fmt: skip
    write_table(parse(LatencyTable, plain, "table"), folder / "table.json")
    return str(folder / "table.json")


def test_macs_of_a_path_are_those_of_the_network_it_becomes(net):
    goal = path_costs.make_goal(make_job(), net, 0.3)
    path = (0, 6, 2, 3, 6, 5, 1, 2, 6, 4)
    assert goal.of(path) == cost.count_macs(net.extract(path), (1, 3, 32, 32))
    assert (goal.weight, goal.ref, goal.edges[1][6]) == (0.3, 2e6, 0.0)


def test_latencies_are_slope_times_those_of_the_table_with_its_offset_once(net, tmp_path):
    file = table(tmp_path, net, 2.0, fixed_ms=0.5, slope=1.5)
    job = make_job(latency={"table": file, "ref_ms": 20, "regulariser": "mul_log"})
    goal = path_costs.make_goal(job, net, job.weights[0])
    assert goal.weight == 0.3
    assert goal.fixed == 0.5 + 5 * 1.5 * 2.0  # five units are shared by all paths
    assert goal.edges[1] == (3.0,) * 6 + (0.0,)
    assert goal.of((0, 6, 0, 0, 0, 0, 0, 0, 0, 0)) == goal.fixed + 9 * 3.0


def test_a_path_costs_what_a_search_is_told_of_the_same_network(net, tmp_path):
    """Read one table by both verbs, at a measured resolution and at one between two measured ones."""
    file = table(tmp_path, net, 0.7, fixed_ms=0.25, slope=1.25, sides=(20, 32))
    supernet: Any = models.build("ofa_proxyless", num_classes=5, preset="tiny")
    prices = Prices(supernet, None, hardware.meter(file))
    for side in (32, 24):
        job = make_job(data={"run": "pictures", "size": side}, latency={"table": file, "ref_ms": 20})
        goal = path_costs.make_goal(job, net, 0.1)
        arch = supernet.space.largest().replace(resolution=side)  # 7/6 everywhere
        path = tuple(block.codes.index("7/6") for block in net.mixed)
        assert goal.of(path) == pytest.approx(prices.metered(arch)["latency_ms"], rel=1e-9)


def test_a_table_that_does_not_fit_is_one_sentence(net, tmp_path):
    file = table(tmp_path, net, 0.01)

    def complaint(change: Any = None, data: Any = None, **latency: Any) -> str:
        if change is not None:
            (tmp_path / "changed.json").write_text(change if isinstance(change, str) else json.dumps(change))
            latency["table"] = str(tmp_path / "changed.json")
        job = make_job(**({"data": data} if data else {}), latency={"ref_ms": 20, "table": file} | latency)
        with pytest.raises(UserError) as caught:
            path_costs.make_goal(job, net, 0.1)
        return str(caught.value)

    assert "no.json: no such table, measure one with `slimray profile`" in complaint(table=str(tmp_path / "no.json"))
    assert complaint(regulariser="mul_log").startswith("latency.regulariser: mul_log needs costs above 1, a path has")
    plain = json.loads(Path(file).read_text())
    cut_off = plain | {"calibration": None, "done": 1}
    assert complaint(cut_off).startswith(
        f"latency.table: {tmp_path}/changed.json: its measurement is not finished (1 of"
    )
    assert "the same `slimray profile` resumes it" in complaint(cut_off)
    size = complaint(data={"run": "pictures", "size": 48})
    assert "was measured at resolutions 32, but 48 is outside these: profile with it in --resolutions" in size
    below = plain | {"calibration": plain["calibration"] | {"fixed_ms": -9}}
    assert "gives a path -8.91 ms: profile again" in complaint(below)
    short = plain | {"units": dict(list(plain["units"].items())[:-1])}
    lost = list(plain["units"])[-1]
    assert f"lacks 1 of the units of this supernet ({lost})" in complaint(short)
    for text in ("[]", "{", '{"units": {"a": {"mean_ms": 2}}}', '{"format": 1, "units": [1]}'):
        assert complaint(text).startswith(f"latency.table: {tmp_path}/changed.json: ")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"latency": {"ref_ms": 5}}, "latency.table: is required"),
        ({"latency": {"cost": "macs"}}, "latency.ref_macs: is required with cost: macs"),
        ({"latency": MACS | {"table": "t.json"}}, "latency.ref_macs: is required with cost: macs"),
        ({"latency": {"table": "t", "ref_ms": 0.5, "regulariser": "mul_log"}}, "latency.regulariser: mul_log takes"),
        ({"hold_out": 7}, "hold_out: must be at least batch.total (8), got 7"),
        ({"search": {"epochs": 1, "lr": 0.1}}, "search.epochs: must be at least 2"),
        ({"data": {"run": "pictures", "size": 32, "val": None}}, "data.val: is required"),
        ({"optim": {"reference_batch": 8, "norm": "frozen"}}, "optim.norm: must be local"),
        (
            {
                "search": {"epochs": 2, "lr": 0.1, "gradient": "reinforce"},
                "latency": MACS | {"regulariser": "mul_log"},
            },
            "latency.regulariser: does not apply to search.gradient: reinforce",
        ),
    ],
)
def test_a_job_that_cannot_be_is_one_sentence(changes, sentence):
    with pytest.raises(UserError) as caught:
        make_job(**changes)
    assert f"x.yaml: {sentence}" in str(caught.value)


def test_the_weight_of_the_cost_is_the_published_one_unless_told():
    assert make_job().weights == (0.1,)
    assert make_job(search={"epochs": 2, "lr": 0.1, "gradient": "reinforce"}).weights == (0.1,)
    assert make_job(latency=MACS | {"weight": 2.0}, sweep={"weights": [1, 3]}).weights == (1, 3)


def test_another_network_is_no_supernet_of_choices():
    with pytest.raises(UserError, match=r"model\.name: must be proxyless_supernet"):
        proxyless.overview(make_job(model={"name": "resnet18"}), None, 100)
    with pytest.raises(UserError, match="hold_out: 16 of 16 training samples leave none"):
        proxyless.overview(make_job(), None, 16)


@pytest.mark.ray
@pytest.mark.benchmark
@pytest.mark.timeout(600)
def test_a_search_that_was_killed_ends_like_the_other_and_both_are_runs(shell: Shell):
    child = shell.start("run", shell.write("proxyless.yaml", JOBS))
    stage = runs.run_at(f"{shell.storage}/swept/stages/01-search-2")

    def has_moved() -> bool:
        assert child.poll() is None, child.communicate()
        return any(checkpoint.step > 6 for checkpoint in runs.list_checkpoints(stage))

    wait_for("a checkpoint of the second search after its alphas have moved", has_moved, 400)
    end_session(child)
    assert not runs.exists(stage, "model/weights.safetensors")
    shell.ok("run", "proxyless.yaml")
    assert weights(shell, "swept/stages/01-search-1") == weights(shell, "swept/stages/01-search-2")
    assert weights(shell, "swept-derived-1") == weights(shell, "swept-derived-2")
    swept = runs.open_run(str(shell.storage), "swept")
    results = json.loads(runs.read_file(swept, "results.json"))
    assert [row["run"] for row in results["rows"]] == ["swept-derived-1", "swept-derived-2"]
    assert all(row["cost"] == row["macs"] for row in results["rows"])
    assert any("search/entropy" in row for row in runs.read_parts(stage, "metrics"))
    assert "<svg" in runs.read_file(swept, "report.html").decode()
    done = shell.run("evaluate", "swept-derived-2", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["rows"][0]
    assert (row["top1"], row["macs"]) == (results["rows"][1]["top1"], results["rows"][1]["macs"])
