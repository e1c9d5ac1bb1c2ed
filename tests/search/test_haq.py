"""HAQ: the recorded projections and actions exactly, the walk, costs of bits, and a search that finds what matters."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from slimray import models
from slimray.compress.quantization import layers_of
from slimray.edge.bit_costs import bit_table, relative_work
from slimray.edge.hardware import HARDWARE
from slimray.search import haq
from slimray.spec import UserError


@pytest.fixture(scope="module")
def recorded(shared):
    return json.loads((shared / "parity/compression/haq_env.json").read_text())


@pytest.fixture(scope="module")
def layers():
    net = models.build("resnet20", num_classes=10, width=0.5)
    return layers_of(net, torch.zeros(1, 3, 32, 32))


# ----------------------------------------------------------------------------------------------------- as recorded


def require_recorded(table: np.ndarray, case: dict) -> None:
    cost, last = haq.table_cost(table), len(table) - 1
    whole = cost([[8, 8]] * len(table))
    bits = haq.project(case["initial"], cost, case["ratio"] * whole, 2, {0: (8, -1), last: (8, 8)})
    assert bits == case["projected"]
    assert cost(bits) == case["cost"]
    assert cost(bits) / whole == case["cost_ratio"]


def test_projections_of_mobilenetv2_are_those_recorded(recorded, shared):
    table = np.load(shared / "parity/compression/haq_mbv2_latency_lut.npy", allow_pickle=False)
    assert len(recorded["linear_mbv2"]) == 6
    for case in recorded["linear_mbv2"]:
        require_recorded(table, case)


def test_small_projections_are_those_recorded(recorded):
    numbers = np.arange(1, 9)
    table = np.stack([100.0 * (i + 1) * numbers[:, None] + 37 * numbers[None] * (4 - i) for i in range(4)])
    for case in recorded["linear_small"]["cases"]:
        require_recorded(table, case)


def test_projections_of_codebooks_are_those_recorded(recorded):
    assert len(recorded["kmeans"]) == 4
    for case in recorded["kmeans"]:
        sizes = case["wsize"]

        def cost(policy: haq.Policy, sizes=sizes) -> float:
            return float(sum(size * row[0] for size, row in zip(sizes, policy, strict=True)))

        budget = case["ratio"] * case["float_bit"] * sum(sizes)
        bits = haq.project([[b] for b in case["initial"]], cost, budget, case["min_bit"], {})
        assert [row[0] for row in bits] == case["projected"]
        assert cost(bits) == case["weight_bits"]


def test_actions_are_the_recorded_bits_clamped(recorded):
    for name, pairs in recorded["action_map"].items():
        low, high = map(int, name.split(".."))
        assert [haq.bits_of(a, low, high) for a, _ in pairs] == [min(max(b, low), high) for _, b in pairs]


# --------------------------------------------------------------------------------------------------------- the walk


def test_a_walk_asks_twice_per_layer_and_keeps_the_budget_and_the_ends(layers):
    table = bit_table(None, layers, "size_mb")
    cost = haq.table_cost(table)
    walk = haq.BitsWalk(layers, cost, 0.5 * cost([[8, 8]] * len(layers)))
    state, states = walk.reset(), []
    while state is not None:
        states.append(state)
        state = walk.step(1.0)
    assert len(states) == 2 * len(layers) == walk.num_steps
    assert all(len(state) == len(haq.COLUMNS) and 0 <= min(state) <= max(state) <= 1 for state in states)
    assert [state[9] for state in states[:4]] == [1, 0, 1, 0]
    policy = walk.policy()
    assert cost(policy) <= walk.budget
    assert policy[0] == policy[-1] == [8, 8]
    assert min(min(row) for row in policy) >= 2


def test_a_budget_that_cannot_be_kept_is_refused(layers):
    cost = haq.table_cost(bit_table(None, layers, "size_mb"))
    with pytest.raises(UserError, match=r"the budget of 0\.001 cannot be kept: 2 bits everywhere"):
        haq.BitsWalk(layers, cost, 0.001)
    assert haq.project([[2, 2], [3, 2]], lambda bits: 5.0, 1.0, 2, {}) == [[2, 2], [2, 2]], "ends in place of looping"


# ---------------------------------------------------------------------------------------------------- what bits cost


def test_bit_serial_work_is_the_product_of_bits_and_fused_work_goes_by_steps():
    serial, fused = HARDWARE["bit_serial"], HARDWARE["bit_fusion"]
    assert [relative_work(serial, w, a) for w, a in ((8, 8), (4, 8), (2, 3), (1, 1))] == [1, 0.5, 6 / 64, 1 / 64]
    assert [relative_work(fused, w, a) for w, a in ((8, 8), (5, 8), (4, 3), (2, 1))] == [1, 1, 0.25, 1 / 16]
    assert relative_work(HARDWARE["fpga"], 2, 2) == 1


@pytest.mark.parametrize("name", HARDWARE)
@pytest.mark.parametrize("cost", ["latency_ms", "energy_mj"])
def test_fewer_bits_never_cost_more_on_any_hardware(name, cost, layers):
    table = bit_table(HARDWARE[name], layers, cost)
    assert table.shape == (len(layers), 8, 8)
    assert (np.diff(table, axis=1) >= 0).all()
    assert (np.diff(table, axis=2) >= 0).all()
    assert table.sum(0)[1, 1] < table.sum(0)[7, 7]


def test_a_table_of_a_wide_layer_by_hand(layers):
    layer = replace(layers[0], macs=1_000_000, weights=1000, inputs=500, outputs=500)
    device = HARDWARE["bit_serial"]
    table = bit_table(device, [layer], "latency_ms")
    assert table[0, 7, 7] == pytest.approx(1e3 * max(1e6 / (1e9 * device.gmacs_per_s), 2000 / (1e9 * device.gb_per_s)))
    assert bit_table(None, [layer], "size_mb")[0, 3].tolist() == [0.0005] * 8
    assert bit_table(None, [layer], "size_mb", books=True)[0, 3] == pytest.approx(0.0005 + 16 * 4e-6), "16 floats"
    with pytest.raises(UserError, match="latency_ms cannot be computed from bits: must be one of size_mb"):
        bit_table(None, [layer], "latency_ms")
