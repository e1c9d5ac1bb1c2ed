"""Memory and size in int8 equal those of TinyEngine's scheduler, and a search keeps limits on them."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from slimray import models
from slimray.edge import COUNTED_INT8, cost
from slimray.edge.arch_costs import Prices
from slimray.edge.peak_memory import Operator, joined, memory, operators, size
from slimray.search.problem import Problem
from slimray.search.strategies import Random, search
from slimray.spec import UserError


def read(layer: dict) -> Operator:
    """Return a recorded layer: `h` and `o` are the sides of input and output."""
    inputs = tuple(layer[name] for name in ("inp", "inp2") if name in layer)
    values, kernel, channels = layer["co"] * layer["o"] ** 2, layer["k"], layer["co"]
    if layer["t"] == "add":
        return Operator(inputs, layer["out"], values)
    if layer["t"] == "dw":
        return Operator(inputs, layer["out"], values, kernel, 1, channels, (layer["h"] + 2 * (kernel // 2)) ** 2)
    return Operator(inputs, layer["out"], values, kernel, layer["ci"], channels)


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
def test_memory_and_size_are_as_recorded_of_tinyengine(shared, name):
    recorded = json.loads((shared / "parity/images/peak_memory.json").read_text())[name]
    found, given = [read(layer) for layer in recorded["layers"]], 3 * recorded["config"]["res"] ** 2
    for in_place, key in ((True, "tinyengine_inplace"), (False, "tinyengine_not_inplace")):
        told, wanted = memory(found, given, in_place), recorded[key]
        assert (told.arena, told.columns, told.kernel) == tuple(
            wanted[part] for part in ("arena", "im2col_buffer", "kernel_buffer")
        )
        assert told.peak == wanted["peak"]
        assert size(found) == wanted["flash"]


def test_mobilenetv2_takes_the_memory_that_mcunet_quotes():
    net = cost.build_on_meta(lambda: models.build("mobilenetv2", num_classes=1000)).eval()
    assert memory(operators(net, (3, 224, 224)), 3 * 224**2).arena == 1372 * 1024


def test_units_in_a_row_need_what_the_whole_subnet_needs():
    prices = Prices(cost.build_on_meta(lambda: models.build("ofa_proxyless", num_classes=2, preset="micro")))
    for arch in (prices.net.space.smallest(), prices.net.space.largest()):
        found = operators(prices.net.extract(arch).eval(), (3, arch["resolution"], arch["resolution"]))
        told = prices.in_int8(arch)
        assert told["peak_kb"] == memory(found, 3 * arch["resolution"] ** 2).peak / 1000
        assert told["int8_kb"] == size(found) / 1000


def test_squeezing_is_counted_and_what_tinyengine_has_not_is_said():
    net = cost.build_on_meta(lambda: models.build("ofa_mobilenetv3", num_classes=2, preset="tiny"))
    assert Prices(net).in_int8(net.space.smallest())["peak_kb"] > 0
    with pytest.raises(UserError, match=r"^TinyEngine has no operator for Softmax\(dim=1\)$"):
        operators(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softmax(1)).to("meta"), (3, 8, 8))
    with pytest.raises(UserError, match="only networks of pictures"):
        operators(nn.Conv3d(3, 4, 1).to("meta"), (3, 8, 8, 8))


def test_parts_follow_each_other_whatever_numbers_their_tensors_have():
    one = operators(nn.Conv2d(3, 4, 1, device="meta"), (3, 2, 2))
    two = operators(nn.Conv2d(4, 5, 3, padding=1, groups=1, device="meta"), (4, 2, 2))
    found = joined([one, [], two])
    assert [(part.inputs, part.output) for part in found] == [((0,), 1), ((1,), 2)]
    assert memory(found, 12).arena == 16 + 20


def test_a_search_keeps_limits_on_memory_and_size():
    prices = Prices(cost.build_on_meta(lambda: models.build("ofa_proxyless", num_classes=2, preset="tiny")))
    rows = prices.table.sample(12, np.random.default_rng(0))
    costs = prices.matrix(["params", *COUNTED_INT8])
    told = costs(rows)
    for number, arch in enumerate(prices.table.archs(rows)):
        assert {name: told[name][number] for name in COUNTED_INT8} == prices.in_int8(arch)
    limits = {name: float(np.median(told[name])) for name in COUNTED_INT8}
    problem = Problem(prices.table, costs, limits)
    found = search(problem, Random(evaluations=6), lambda codes: np.zeros(len(codes)), seed=0)
    for name, limit in limits.items():
        assert (found.costs[name] <= limit).all()
        assert told[name].max() > limit
    assert torch.equal(torch.from_numpy(found.costs["params"]), torch.from_numpy(costs(found.codes)["params"]))
