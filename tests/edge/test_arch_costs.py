"""Costs of archs: rows equal single archs, interpolation between resolutions, the spread of archs over latencies."""

import numpy as np
import pytest

from slimray import models
from slimray.edge import COUNTED, MEASURED, cost, hardware
from slimray.edge.arch_costs import Meter, Prices, draw_archs
from slimray.spec import UserError


def on_meta(name: str, **options):
    return cost.build_on_meta(lambda: models.build(name, num_classes=10, **options))


def mobile() -> Prices:
    return Prices(on_meta("ofa_mobilenetv3", preset="tiny"), None, hardware.meter("dsp"))


@pytest.mark.parametrize("name", ["ofa_mobilenetv3", "ofa_proxyless", "ofa_resnet50", "ofa_tsm_mobilenetv3"])
def test_rows_cost_what_archs_cost(name):
    prices = Prices(on_meta(name, preset="tiny"), None, hardware.meter("dsp"))
    assert prices._places is not None
    codes = prices.table.sample(12, np.random.default_rng(0))
    names = [*COUNTED, *MEASURED] if name == "ofa_resnet50" else ["memory_mb", *MEASURED]  # counting MACs takes long
    costs = prices.matrix(names)(codes)
    for row, arch in enumerate(prices.table.archs(codes)):
        told = prices.arch_costs(arch) if "macs" in names else prices.metered(arch)
        for cost_name in told:
            assert costs[cost_name][row] == pytest.approx(told[cost_name], rel=1e-12)
        if "macs" in names:
            assert costs["memory_mb"][row] == told["memory_mb"]


def test_an_arch_costs_what_its_network_has():
    prices = mobile()
    arch = prices.net.space.smallest()
    net = prices.net.extract(arch)
    told = prices.arch_costs(arch)
    assert told["params"] == cost.count_params(net)
    assert told["macs"] == cost.count_macs(net, (1, 3, arch["resolution"], arch["resolution"]))


def test_networks_without_places_are_priced_one_by_one():
    prices = Prices(on_meta("ofa_pvcnn_cls", preset="tiny"), 64)
    codes = prices.table.sample(3, np.random.default_rng(0))
    costs = prices.matrix(["params", "macs"])(codes)
    for row, arch in enumerate(prices.table.archs(codes)):
        assert costs["macs"][row] == prices.arch_costs(arch)["macs"]


def test_between_two_known_resolutions_latency_goes_with_the_pixels():
    whole = mobile()
    assert whole.meter is not None
    keys = {unit.key for unit in whole.net.all_units([20, 32]).values()}
    some = Meter(
        "t.json",
        "table",
        "",
        ("latency_ms",),
        lambda unit: whole.meter.of(unit) if unit.key in keys else None,
        {"latency_ms": 0.5},
        (20, 32),
    )
    prices = Prices(whole.net, None, some)
    arch = whole.net.space.largest()
    low, high, between = (prices.metered(arch.replace(resolution=r))["latency_ms"] for r in (20, 32, 28))
    assert between == pytest.approx(low + (high - low) * (28**2 - 20**2) / (32**2 - 20**2))
    assert low == pytest.approx(0.5 + whole.metered(arch.replace(resolution=20))["latency_ms"])
    codes = prices.table.sample(20, np.random.default_rng(1))
    codes[:, prices.table.columns["resolution", 0]] = prices.table.values[-1].index(28)
    told = [prices.metered(one)["latency_ms"] for one in prices.table.archs(codes)]
    fewer = Prices(whole.net, None, Meter("t.json", "table", "", some.names, some.of, some.fixed, (24, 32)))
    with pytest.raises(UserError, match=r"t.json: was measured at resolutions 24, 32, but 20 is outside these"):
        fewer.metered(arch.replace(resolution=20))
    assert len(told) == 20


def test_a_table_of_another_network_says_which_unit_is_missing():
    prices = Prices(
        on_meta("ofa_mobilenetv3", preset="tiny"), None, Meter("t", "table", "", ("latency_ms",), lambda u: None)
    )
    for ask in (lambda: prices.metered(prices.net.space.largest()), lambda: prices.matrix(["latency_ms"])):
        with pytest.raises(UserError, match=r"t: has no time of .*, it is of another model"):
            ask()


def test_drawn_archs_are_different_spread_out_and_not_those_excluded():
    prices = mobile()
    first = draw_archs(prices, 12, seed=0)
    second = draw_archs(prices, 12, seed=1, exclude=first)
    assert len({*first, *second}) == 24
    assert draw_archs(prices, 12, seed=0) == first
    ms = [prices.metered(arch)["latency_ms"] for arch in second]
    assert ms == sorted(ms)
    assert ms[-1] / ms[0] > 4
