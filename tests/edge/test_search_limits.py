"""Targets of a search with a hardware: checks before anything runs, and the meaning of latency limits."""

import numpy as np
import pytest

from slimray import models
from slimray.edge import cost, hardware
from slimray.edge.arch_costs import Prices
from slimray.search.strategies import Evolution
from slimray.search.strategies import search as search_in_process
from slimray.spec import UserError, parse
from slimray.verbs import search
from slimray.verbs.search import SearchJob, TargetSpec

JOB = {"kind": "search", "name": "s", "supernet": "r", "strategy": {"name": "evolution"}}
RECIPE = {"kind": "images"}


@pytest.fixture(scope="module")
def net():
    return cost.build_on_meta(lambda: models.build("ofa_mobilenetv3", num_classes=10, preset="tiny"))


def problem(net, **target):
    spec = TargetSpec(name="phone", **target)
    prices = search._prices(net, RECIPE).on(search._meter(spec))
    return search._problem(prices, spec, Evolution(population=10, iterations=2))


def test_latency_without_a_hardware_is_refused():
    document = JOB | {"targets": [{"name": "phone", "limits": {"latency_ms": 3}}]}
    with pytest.raises(UserError, match=r"j: targets.phone.limits.latency_ms: needs `hardware`"):
        parse(SearchJob, document, "j")
    parse(SearchJob, JOB | {"targets": [{"name": "phone", "hardware": "dsp", "limits": {"latency_ms": 3}}]}, "j")


def test_an_impossible_latency_is_refused_with_the_smallest(net):
    with pytest.raises(UserError, match=r"latency_ms: no arch is at most 1e-06, the smallest found is 0\.\d+"):
        problem(net, hardware="dsp", limits={"latency_ms": 1e-6}).anchor  # noqa: B018
    with pytest.raises(UserError, match="hardware: unknown device 'dps', did you mean 'dsp'"):
        problem(net, hardware="dps", limits={"latency_ms": 1})


def test_a_search_keeps_limits_of_latency_and_energy_together(net):
    prices = Prices(net, None, hardware.meter("edge_gpu"))
    middle = prices.arch_costs(net.space.largest().replace(depth=[2, 2, 3]))
    limits = {"latency_ms": 0.7 * middle["latency_ms"], "energy_mj": 0.7 * middle["energy_mj"]}
    asked = problem(net, hardware="edge_gpu", limits=limits)
    found = search_in_process(asked, Evolution(population=10, iterations=2), lambda c: np.zeros(len(c)), seed=0)
    assert len(found) == 30
    for name, limit in limits.items():
        assert (found.costs[name] <= limit).all()
    for trial in found.trials(asked.table)[:5]:
        assert prices.arch_costs(trial.arch)["latency_ms"] == pytest.approx(trial.costs["latency_ms"])


def test_a_device_without_energy_tells_none(net, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("{description: d, source: s, date: '2026', gmacs_per_s: 10, gb_per_s: 2, bits: 8}")
    with pytest.raises(UserError, match=r"limits: energy_mj: .*mine.yaml does not provide it"):
        problem(net, hardware=str(path), limits={"energy_mj": 1})
