"""Latency tables: measured on a tiny supernet, resumed where they stopped, refused for other supernets, and queried."""

import json
import sys

import numpy as np
import pytest
import torch

from slimray import models
from slimray.cli import main
from slimray.edge import hardware, latency_table, profiler, runtimes
from slimray.edge.arch_costs import Prices
from slimray.spec import UserError

MODEL = {"name": "ofa_mobilenetv3", "num_classes": 10, "preset": "tiny"}
SETTINGS = {"resolutions": [20], "rounds": 2, "calibrate": 4}


@pytest.fixture(scope="module")
def net():
    return models.build(**MODEL).eval()


@pytest.fixture(scope="module")
def finished(net, tmp_path_factory):
    """The file of a finished table."""
    path = tmp_path_factory.mktemp("tables") / "table.json"
    profiler.profile(net, MODEL, path, **SETTINGS)
    return path


def test_a_table_has_every_unit_of_the_space_and_no_other(net, finished):
    table = latency_table.read_table(finished)
    assert set(table.units) == set(net.all_units([20]))
    for unit in table.units.values():
        assert unit.count == len(unit.readings_ms) == 2
        assert min(unit.readings_ms) <= unit.ms <= max(unit.readings_ms)
    assert (table.hardware, table.threads, table.resolutions) == ("cpu-eager", 1, (20,))
    assert len(table.reference_ms) == table.done == 2
    assert table.calibration is not None
    assert len(table.calibration.rows) == 4


def test_a_search_is_told_offset_and_slope_times_the_sum_of_units(net, finished):
    table = latency_table.read_table(finished)
    assert table.calibration is not None
    meter = hardware.meter(str(finished))
    arch = net.space.smallest().replace(resolution=20)
    units = sum(table.units[unit.key].ms for unit in net.units(arch))
    told = Prices(net, None, meter).metered(arch)["latency_ms"]
    assert told == pytest.approx(table.calibration.fixed_ms + table.calibration.slope * units)
    assert meter.how == "table"
    assert "cpu-eager" in meter.source


def test_a_finished_table_is_not_measured_again(net, finished):
    before = finished.read_bytes()
    profiler.profile(net, MODEL, finished, **SETTINGS)
    assert finished.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "field"),
    [({"threads": 2}, "threads"), ({"resolutions": [24]}, "resolutions"), ({"rounds": 3}, "rounds")],
)
def test_a_table_of_something_else_is_refused(net, finished, change, field):
    with pytest.raises(UserError, match=rf"table.json: {field}: the table there was measured for .*give another --out"):
        profiler.profile(net, MODEL, finished, **SETTINGS | change)
    with pytest.raises(UserError, match=r"table.json: model: "):
        profiler.profile(net, MODEL | {"num_classes": 5}, finished, **SETTINGS)


def test_a_table_that_was_cut_off_keeps_its_rounds(net, tmp_path):
    path = tmp_path / "cut.json"

    def cut(text: str) -> None:
        if text.startswith("1/2 rounds"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profiler.profile(net, MODEL, path, **SETTINGS, say=cut)
    first = latency_table.read_table(path)
    assert first.done == 1
    with pytest.raises(UserError, match="its measurement is not finished"):
        hardware.meter(str(path))
    table = profiler.profile(net, MODEL, path, **SETTINGS)
    assert table.done == 2
    assert all(table.units[key].readings_ms[:1] == unit.readings_ms for key, unit in first.units.items())
    assert [one.arch for one in table.subnets] == [one.arch for one in first.subnets]
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("what", "is not JSON"),
        ("[1]", "is not a latency table of format 1"),
        ('{"format": 2}', r"is not a latency table of format 1 \(got 2\)"),
        ('{"format": 1, "units": {"a": {"ms": -1}}}', r"units.a.ms: must be > 0"),
    ],
)
def test_other_files_are_refused_in_a_sentence(tmp_path, content, said):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        latency_table.read_table(path)


def test_a_line_is_found_again_and_alike_subnets_give_a_ratio():
    sums = np.array([2.0, 4.0, 8.0, 16.0, 32.0])
    fixed, slope = profiler.fit_line(sums, 0.3 + 1.1 * sums)
    assert (fixed, slope) == pytest.approx((0.3, 1.1), rel=0.02)
    fixed, slope = profiler.fit_line(np.full(5, 4.0), np.full(5, 6.0))
    assert fixed + slope * 4 == pytest.approx(6.0, rel=0.01)


def test_onnx_runtime_runs_the_same_unit(net):
    unit = net.units(net.space.largest())[2]
    module, x = unit.make().eval(), torch.randn(1, *unit.input)
    runtime = runtimes.RUNTIMES["cpu-onnx"]
    runtime.check()
    with torch.inference_mode():
        out = runtime.prepare(module, x, 1)(runtime.feed(x))
        np.testing.assert_allclose(out, module(x).numpy(), rtol=1e-3, atol=1e-4)


def test_what_is_missing_for_a_runtime_is_said(net, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"cpu-compiled needs a C\+\+ compiler"):
        profiler.profile(net, MODEL, tmp_path / "t.json", hardware="cpu-compiled")
    with pytest.raises(UserError, match="unknown runtime 'cpu-eagr', did you mean 'cpu-eager'"):
        profiler.profile(net, MODEL, tmp_path / "t.json", hardware="cpu-eagr")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch finds no CUDA device"):
            profiler.profile(net, MODEL, tmp_path / "t.json", hardware="cuda")


def test_a_table_of_a_supernet_of_transformers_holds_layers_by_length_and_beam(tmp_path):
    model = {"name": "hat_small", "vocab_size": 40, "preset": "tiny", "length": 4, "beam": 3}
    net = models.build(**model).eval()
    table = profiler.profile(net, model, tmp_path / "text.json", rounds=2, calibrate=4)
    assert table.calibration is not None
    kinds = {key.partition("-")[0] for key in table.units}
    assert kinds == {"encoder", "decoder", "cross", "words"}
    assert all(key.endswith("-length:4-beam:3") for key in table.units)
    arch = net.space.smallest()
    told = Prices(net, None, hardware.meter(str(tmp_path / "text.json"))).metered(arch)["latency_ms"]
    assert told > 0
    other = models.build(**model | {"beam": 2})
    with pytest.raises(UserError, match=r"has no time of encoder-.*, it is of another model: profile this supernet"):
        Prices(other, None, hardware.meter(str(tmp_path / "text.json"))).metered(arch)


def profile(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["slimray", "profile", *arguments])
    try:
        main.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_writes_a_table_and_tells_its_error(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.json").write_bytes(finished.read_bytes())
    options = ("--preset", "tiny", "--set", "num_classes=10", "--resolutions", "20", "--rounds", "2")
    assert profile(monkeypatch, "ofa_mobilenetv3", *options, "--out", "t.json", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["table"] == "t.json"
    assert {"median_error_percent", "test_retest_percent", "waited_percent", "drift_percent"} <= set(told)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resnet18"], "profile resnet18: must be one of ofa_mobilenetv3, "),
        (["nothing"], "nothing"),
        (["ofa_mobilenetv3", "--preset", "huge"], "preset: must be"),
        (["ofa_mobilenetv3", "--resolutions", "20,x"], "must be whole numbers separated by commas"),
        (["ofa_mobilenetv3", "--resolutions", "21"], "21 is not one of"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert profile(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err
