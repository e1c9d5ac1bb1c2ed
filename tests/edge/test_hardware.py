"""Described devices: roofline and energy by hand, sources of the rows, names that a user may give."""

import time

import pytest
import torch
from torch import nn

from slimray import models
from slimray.edge import cost, hardware
from slimray.edge.hardware import HARDWARE, Device
from slimray.models.supernets.elastic import Unit
from slimray.spec import UserError

DEVICE = Device(
    description="d", source="s", date="2026", gmacs_per_s=1, gb_per_s=1, bits=16, pj_per_mac=2, pj_per_byte=10
)


def unit(inputs: int, outputs: int, side: int) -> Unit:
    return Unit("conv", (inputs, side, side), lambda: nn.Conv2d(inputs, outputs, 1, bias=False))


def test_a_layer_takes_the_longer_of_arithmetic_and_memory():
    macs, values = 64 * 64 * 100, 64 * 100 + 64 * 64 + 64 * 100
    assert hardware.layers_of(unit(64, 64, 10)) == [(macs, values)]
    told = hardware.unit_costs(DEVICE, unit(64, 64, 10))
    assert told["latency_ms"] == pytest.approx(macs / 1e6)  # 12 MACs per byte: more than it computes in that time
    assert told["energy_mj"] == pytest.approx(1e-9 * (2 * macs + 10 * 2 * values))
    thin = hardware.unit_costs(DEVICE, unit(1, 1, 10))
    assert thin["latency_ms"] == pytest.approx(2 * (100 + 1 + 100) / 1e6)


def test_starting_layers_and_standing_by_cost_too():
    slow = DEVICE.model_copy(update={"per_layer_us": 5.0, "static_w": 3.0})
    plain, told = (hardware.unit_costs(device, unit(64, 64, 10)) for device in (DEVICE, slow))
    assert told["latency_ms"] == pytest.approx(plain["latency_ms"] + 0.005)
    assert told["energy_mj"] == pytest.approx(plain["energy_mj"] + 3 * told["latency_ms"])


def test_the_energy_of_an_inference_is_measured_or_modelled_and_says_which(tmp_path):
    net, x = nn.Conv2d(4, 8, 1, bias=False), torch.randn(1, 4, 10, 10)
    told = hardware.inference_energy(net, (x,), 32, lambda: net(x), tmp_path)
    macs, values = 4 * 8 * 100, 4 * 100 + 4 * 8 + 8 * 100
    assert told["how"] == "model"
    assert told["energy_mj"] == pytest.approx(1e-9 * (4.6 * macs + 162.5 * 4 * values))
    less = hardware.inference_energy(net, (x,), 8, lambda: net(x), tmp_path)
    assert less["energy_mj"] == pytest.approx(1e-9 * (0.3 * macs + 162.5 * values))
    (tmp_path / "sys/class/hwmon/hwmon0").mkdir(parents=True)
    (tmp_path / "sys/class/hwmon/hwmon0/power1_input").write_text("2000000")
    told = hardware.inference_energy(net, (x,), 32, lambda: time.sleep(0.01), tmp_path)
    assert (told["how"], told["source"]) == ("measured", "hwmon")
    assert told["energy_mj"] >= 20


def test_all_macs_of_a_network_are_in_its_layers():
    net = cost.build_on_meta(lambda: models.build("ofa_mobilenetv3", num_classes=10, preset="tiny"))
    arch = net.space.largest()
    macs = sum(macs for one in net.units(arch) for macs, _ in hardware.layers_of(one))
    assert macs == cost.count_macs(net.extract(arch), (1, 3, arch["resolution"], arch["resolution"]))


@pytest.mark.parametrize("name", HARDWARE)
def test_a_row_says_where_its_numbers_come_from(name):
    row = HARDWARE[name]
    assert len(row.source) > 20
    assert row.date.isdecimal()
    meter = hardware.meter(name)
    assert (meter.how, meter.source, meter.names) == ("model", row.source, ("latency_ms", "energy_mj"))


def test_a_device_of_ones_own_is_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    text = "description: mine\nsource: data sheet\ndate: '2026'\ngmacs_per_s: 10\ngb_per_s: 2\nbits: 8\n"
    path.write_text(text)
    assert hardware.meter(str(path)).names == ("latency_ms",)
    path.write_text(text + "watts: 3\n")
    with pytest.raises(UserError, match=r"mine.yaml: watts: unknown field"):
        hardware.meter(str(path))


def test_unknown_devices_and_tables_are_refused(tmp_path):
    with pytest.raises(UserError, match="unknown device 'edge_gpuu', did you mean 'edge_gpu'"):
        hardware.meter("edge_gpuu")
    with pytest.raises(UserError, match=r"none.json: no such table, measure one with `slimray profile`"):
        hardware.meter(str(tmp_path / "none.json"))
