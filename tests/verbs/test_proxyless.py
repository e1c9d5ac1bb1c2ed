"""What paths cost and what a job may say; on a real cluster a sweep, of which a killed search ends in the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.verbs.conftest import Shell, end_session, weights
from tests.waits import wait_for

from slimray import models, runs
from slimray.edge import cost
from slimray.spec import UserError, parse
from slimray.verbs import proxyless

# both searches have the same weight: the first, which nothing disturbs, says how the second must end
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


def table(folder: Path, net: Any, ms: float) -> str:
    """A table in which every unit of the supernet takes `ms`."""
    fixed, edges = net.units(32)
    units = {unit.key: {"mean_ms": ms} for unit in [*fixed, *(u for edge in edges for u in edge if u is not None)]}
    (folder / "table.json").write_text(json.dumps({"units": units}))
    return str(folder / "table.json")


def test_macs_of_a_path_are_those_of_the_network_it_becomes(net):
    goal = proxyless.make_goal(make_job(), net, 0.3)
    path = (0, 6, 2, 3, 6, 5, 1, 2, 6, 4)
    assert goal.of(path) == cost.count_macs(net.extract(path), (1, 3, 32, 32))
    assert (goal.weight, goal.ref, goal.edges[1][6]) == (0.3, 2e6, 0.0)


def test_latencies_come_from_the_table(net, tmp_path):
    job = make_job(latency={"table": table(tmp_path, net, 2.0), "ref_ms": 20, "regulariser": "mul_log"})
    goal = proxyless.make_goal(job, net, job.weights[0])
    assert goal.weight == 0.3
    assert goal.of((0, 6, 0, 0, 0, 0, 0, 0, 0, 0)) == 2.0 * (5 + 9)  # five units that all paths have, nine blocks


def test_a_table_that_does_not_fit_is_one_sentence(net, tmp_path):
    file = table(tmp_path, net, 0.01)

    def complaint(**latency: Any) -> str:
        job = make_job(latency={"ref_ms": 20, "table": file} | latency)
        with pytest.raises(UserError) as caught:
            proxyless.make_goal(job, net, 0.1)
        return str(caught.value)

    assert complaint(table=str(tmp_path / "no.json")).startswith("latency.table: there is no file")
    assert complaint(regulariser="mul_log").startswith("latency.regulariser: mul_log needs costs above 1, a path has")
    plain = json.loads(Path(file).read_text())
    lost = plain["units"].popitem()[0]
    (tmp_path / "short.json").write_text(json.dumps(plain))
    assert f"lacks 1 of the units of this supernet ({lost})" in complaint(table=str(tmp_path / "short.json"))
    for text in ("[]", "{", '{"units": {"a": {"mean_ms": null}}}', '{"units": [1]}'):
        (tmp_path / "bad.json").write_text(text)
        assert "is no table of latencies" in complaint(table=str(tmp_path / "bad.json"))


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
            "latency.regulariser: is not for search.gradient: reinforce",
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
        proxyless.facts(make_job(model={"name": "resnet18"}), None, 100)
    with pytest.raises(UserError, match="hold_out: 16 of 16 training samples leave none"):
        proxyless.facts(make_job(), None, 16)


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
