"""Exports agree with torch on real samples or fail; online networks run as steps; evaluations take exports."""

import gc
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
import yaml
from tests.cli.test_cli import shell  # noqa: F401 a fixture
from tests.export import networks
from torch import nn

from slimray import job, models, runs
from slimray.compress import quantization
from slimray.export import exported, graph, verify
from slimray.export.exporter import Wanted
from slimray.export.formats import FORMATS
from slimray.models.points import ops
from slimray.models.tsm import OnlineTSM
from slimray.runs.folder import digest
from slimray.spec import RunFailed, UserError
from slimray.tasks.evaluation import Samples
from slimray.tasks.network import load_network
from slimray.verbs import export

SMALL = ["--set", "samples=6", "--set", "calibrate=4", "--set", "pairs=9"]


def test_formats_are_those_that_a_job_may_name():
    assert set(FORMATS) == set(get_args(export.FormatName))


def test_help_names_every_format_that_there_is(shell):  # noqa: F811
    words = set(shell("export", "--help").out.replace("│", " ").replace(",", " ").replace(";", " ").split())
    assert set(FORMATS) <= words


@pytest.fixture
def net(shell, tmp_path):  # noqa: F811
    root = networks.pictures(tmp_path / "pictures")
    return networks.hold("runs", "net", "my_images", root, {"name": "resnet18", "width": 0.125}, size=32)


def test_an_export_agrees_with_torch_and_says_so(shell, net, tmp_path, monkeypatch):  # noqa: F811
    done = shell("export", "net", "--format", "onnx,onnx_int8", *SMALL)
    assert done.code == 0, done.err
    run = runs.find_run("net-export", "runs")
    facts = exported.read_export(run, "onnx")
    assert facts["verification"]["passed"]
    assert facts["verification"]["relative"] < 1e-4
    assert facts["verification"]["agreement"] == 100
    assert facts["verification"]["metrics"] == pytest.approx(facts["verification"]["torch"], rel=1e-3)
    assert facts["inputs"] == [{"name": "input", "shape": [None, 3, 32, 32], "dtype": "float32"}]
    assert facts["timing"]["interval"][0] <= facts["timing"]["ratio"] <= facts["timing"]["interval"][1]
    assert facts["energy"]["how"] in ("measured", "model")
    assert facts["energy"]["energy_mj"] > 0
    assert facts["sha256"] == digest(runs.read_file(run, "export/onnx/model.onnx"))[1]
    small = exported.read_export(run, "onnx_int8")
    assert small["bytes"] < 0.5 * facts["bytes"]
    assert 1e-4 < small["verification"]["relative"] < 1  # untrained, and of 7 bits where the processor lacks VNNI
    assert set(small["verification"]["unoptimised"]) >= {"relative", "agreement", "agreement_optimised"}
    page = runs.read_file(run, "report.html").decode()
    assert "onnx_int8" in page
    assert "ratio" in shell("show", "net-export").out
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    network = exported.load_exported(run, "onnx", 1)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert verify.differences(network.net(x), load_network(net).net(x))["worst_sample"] < 1e-4
    assert len(list(scratch.iterdir())) == 1  # the longest that can be requested
    del network
    gc.collect()
    assert not list(scratch.iterdir())
    runs.write_file(run, "export/onnx/model.onnx", b"other")
    with pytest.raises(UserError, match=r"model\.onnx: differs from the exported file"):
        exported.load_exported(run, "onnx", 1)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(("form", "most"), [("executorch", 1e-4), ("executorch_int8", 0.2)])
def test_executorch_takes_pictures_whatever_their_order_in_memory(form, most, tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(8, 3)).eval()
    channels_last = torch.randn(8, 16, 16, 3).movedim(-1, 1)  # as pictures are decoded
    one, row = replace(graph.whole(net, channels_last[:1], {}), varying={}), FORMATS[form]
    row.convert(one, tmp_path, [[picture[None].numpy()] for picture in channels_last])
    run = row.load(tmp_path / row.file, 1, True)
    with torch.no_grad():
        expected = net(channels_last[:1])
    for given in (channels_last[:1], channels_last[:1].contiguous()):
        found = torch.from_numpy(run([given.numpy()])[0])
        assert verify.differences(found, expected)["relative"] < most


def test_ncnn_runs_pictures_and_refuses_clips_and_what_it_lacks_in_one_sentence(tmp_path):
    torch.manual_seed(0)
    row = FORMATS["ncnn"]

    def converted(name: str, x: torch.Tensor, **options: Any) -> graph.Graph:
        net = networks.ready(models.build(name, num_classes=4, **options), x)
        one = replace(graph.whole(net, x[:1], {}), varying={})
        row.convert(one, tmp_path, ())
        return one

    x = torch.randn(2, 3, 32, 32)
    one = converted("ofa_mobilenetv3", x, preset="tiny", width=0.5)
    run = row.load(tmp_path / row.file, 1, True)
    for picture in x.split(1):
        with torch.no_grad():
            assert (
                verify.differences(torch.from_numpy(run([picture.numpy()])[0]), one.module(picture))["relative"] < 1e-4
            )
    with pytest.raises(RunFailed, match=r"ncnn has no batch axis: .* not input \[1, 4, 3, 32, 32\]"):
        converted("tsm_resnet18", torch.randn(2, 4, 3, 32, 32), num_segments=4, width=0.125)
    with pytest.raises(RunFailed, match=r"ncnn ended with status 1: layer .* not exists or registered"):
        converted("resnet20", x, width=0.25)


def test_a_format_whose_converter_has_no_environment_says_how_to_make_one(monkeypatch):
    monkeypatch.delenv("SLIMRAY_LITERT_PYTHON", raising=False)
    with pytest.raises(UserError, match=r"pip install litert-torch; export SLIMRAY_LITERT_PYTHON="):
        FORMATS["litert"].require("formats: litert")


@pytest.mark.benchmark
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["ofa_mobilenetv3", "tsm_mobilenetv2"])
def test_litert_says_what_torch_says(name, tmp_path):
    row = FORMATS["litert"]
    networks.require_converter(row)
    x = torch.randn(2, 3, 32, 32) if name == "ofa_mobilenetv3" else torch.randn(2, 4, 3, 32, 32)
    options: dict[str, Any] = {"preset": "tiny"} if name == "ofa_mobilenetv3" else {"num_segments": 4}
    net = networks.ready(models.build(name, num_classes=4, width=0.5, **options), x)
    one = replace(graph.whole(net, x[:1], {}), varying={})
    row.convert(one, tmp_path, ())
    found = row.load(tmp_path / row.file, 1, True)([x[:1].numpy()])[0]
    with torch.no_grad():
        assert verify.differences(torch.from_numpy(found), net(x[:1]))["relative"] < 1e-4


class Neighbours(nn.Module):
    """Samples points, finds their neighbours, computes with indices, and continues with the values there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centers = x.gather(2, ops.furthest_point_sample(x, 16)[:, None].expand(-1, 3, -1))
        found = ops.knn(x, centers, 4).flatten(1)
        found = found + torch.zeros_like(found)
        y = self.first(x).transpose(1, 2)
        return self.last(y.gather(1, found[..., None].expand(-1, -1, 8)).mean(1))


@pytest.mark.parametrize(("form", "most"), [("openvino", 1e-4), ("executorch", 1e-4), ("executorch_int8", 0.05)])
def test_points_are_drawn_and_neighbours_found_in_other_runtimes_and_indices_stay_whole(form, most, tmp_path):
    torch.manual_seed(0)
    net, x = Neighbours().eval(), torch.randn(8, 3, 64)
    one, row = replace(graph.whole(net, x[:1], {}), varying={}), FORMATS[form]
    row.convert(one, tmp_path, [[cloud[None].numpy()] for cloud in x])
    with torch.no_grad():
        found = torch.from_numpy(row.load(tmp_path / row.file, 1, True)([x[:1].numpy()])[0])
        assert verify.differences(found, net(x[:1]))["relative"] < most


def test_a_network_of_few_bits_is_exported_in_float_and_in_int8(shell, net):  # noqa: F811
    network = load_network(net)
    weights, model, taken = runs.read_model(net)
    x, kept = torch.randn(8, 3, 32, 32), "layer1.0.conv1"
    whole, record = quantization.prepare(network.net, x, None, (8, 8), keep=[kept], trained=False)
    run = runs.open_run("runs", "eight")
    runs.begin(run, yaml.safe_load(runs.read_file(net, "job.yaml")) | {"name": "eight"}, 1)
    stored = safetensors.torch.save({key: one.contiguous() for key, one in whole.state_dict().items()})
    runs.write_model(run, stored, {**model, "compression": [record]}, taken)
    runs.end(run, "finished")
    done = shell("export", "eight", "--format", "onnx,onnx_int8", *SMALL)
    assert done.code == 0, done.err
    found = runs.find_run("eight-export", "runs")
    plain, small = (exported.read_export(found, name) for name in ("onnx", "onnx_int8"))
    assert plain["verification"]["passed"]
    assert small["bytes"] < 0.5 * plain["bytes"]
    again = onnx.load_from_string(runs.read_file(found, "export/onnx_int8/model.onnx"))
    assert not [node for node in again.graph.node if node.op_type == "Round"], "inputs are rounded once"
    assert len(stored) < 0.5 * len(weights)
    rounded = {name for node in again.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    layers = {node.name.rpartition("/")[0]: node.input[1] for node in again.graph.node if node.op_type == "Conv"}
    assert {name for name, weight in layers.items() if weight not in rounded} == {kept}, "a layer kept float stays it"
    assert len(layers) == 20


def test_an_export_that_disagrees_is_a_failed_run(shell, net):  # noqa: F811
    """Logits beyond the range of float32, which no runtime reproduces as torch does."""
    weights, model, taken = runs.read_model(net)
    run = runs.open_run("runs", "huge")
    runs.begin(run, yaml.safe_load(runs.read_file(net, "job.yaml")) | {"name": "huge"}, 1)
    state = safetensors.torch.load(weights)
    head = load_network(net).net.head_name
    state[f"{head}.weight"] *= 1e38
    state[f"{head}.bias"].fill_(3.4e38)
    runs.write_model(run, safetensors.torch.save(state), model, taken)
    runs.end(run, "finished")
    done = shell("export", "huge", *SMALL)
    assert done.code == 1
    assert "its outputs are not finite" in done.err
    run = runs.find_run("huge-export", "runs")
    assert runs.read_status(run).state == "failed"
    assert not exported.read_export(run, "onnx")["verification"]["passed"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["net", "--format", "onyx"], "formats"),
        (["net", "--online"], "is not a causal TSM"),
        (["nett"], "did you mean 'net'"),
        (["net", "--format", "onnx,onnx"], "one is named twice"),
        (["net", "--set", "pairs=8"], "pairs"),
    ],
)
def test_what_cannot_be_exported_is_said_before_anything_is_done(shell, net, arguments, said):  # noqa: F811
    done = shell("export", *arguments)
    assert done.code == 2
    assert said in done.err
    assert not (runs.list_names(net, "export"))


def causal(**options):
    given = {"name": "tsm_mobilenetv2", "width": 0.25, "num_segments": 8, "num_classes": 5, "causal": True}
    torch.manual_seed(0)
    return networks.ready(models.build(**(given | options)), torch.randn(4, 8, 3, 32, 32))


def test_a_step_stepped_over_a_clip_gives_what_the_offline_network_gives(tmp_path):
    net, clips = causal(), torch.randn(2, 8, 3, 32, 32)
    one = graph.step(net, clips, "online")
    FORMATS["onnx"].convert(one, tmp_path, ())
    runner = FORMATS["onnx"].load(tmp_path / "model.onnx", 1, True)
    outside = exported.ExportedNet(runner, exported.ports_of(one, False))
    with torch.no_grad():
        expected = net(clips)
        gap = verify.differences(outside(clips), expected)
        swapped = verify.differences(outside(clips.flip(1)), expected)
    assert gap["worst_sample"] < 1e-4
    assert swapped["worst_sample"] > 1e-2, "order of frames matters: states are not zero"
    model = onnx.load(tmp_path / "model.onnx")
    made_by = {name: node for node in model.graph.node for name in node.output}
    given = {value.name for value in model.graph.input}
    for value in (*model.graph.input, *model.graph.output):
        assert value.name == "logits" or len(value.type.tensor_type.shape.dim) == 4
    for state in one.states:
        assert state.output not in given, "no input is handed through"
        assert made_by[state.output].op_type not in ("Conv", "Add"), "a copy of what flows"
    assert [state.shape for state in one.states] == [tuple(b.shape) for b in OnlineTSM(net).initial_buffers(1, 32, 32)]


@pytest.mark.parametrize("net", [causal(causal=False), models.build("mobilenetv2", num_classes=2).eval()])
def test_a_network_without_an_online_form_is_refused(net):
    with pytest.raises(UserError, match=r"^here: "):
        graph.step(net, torch.zeros(1, 8, 3, 32, 32), "here")


def test_evaluations_name_exports_and_check_finds_what_is_missing(shell, net):  # noqa: F811
    assert shell("export", "net", *SMALL).code == 0
    document = {"kind": "evaluate", "name": "both", "runs": ["net", "net-export:onnx"]}
    loaded = job.resolve([(Path("x.yaml"), document)])
    assert job.check(loaded, "runs")[0]["problems"] == []
    document["runs"] = ["net", "net-export:openvino"]
    loaded = job.resolve([(Path("x.yaml"), document)])
    assert "holds no export 'openvino'" in job.check(loaded, "runs")[0]["problems"][0]
    document["runs"] = ["net", "net-export"]
    loaded = job.resolve([(Path("x.yaml"), document)])
    sentence = "runs: 'net-export' holds an export, not a network: name its format (net-export:onnx)"
    assert job.check(loaded, "runs")[0]["problems"][0].endswith(sentence)
    done = shell("evaluate", "net-export:onyx")
    assert done.code == 2
    assert "evaluate (net-export-eval): runs: 'net-export' holds no export 'onyx'" in done.err


def test_rounding_alone_is_no_disagreement_and_float64_tells_what_that_is():
    torch.manual_seed(0)
    exact = torch.randn(4, 10, dtype=torch.float64)
    noise = torch.randn_like(exact)
    noise *= exact.norm() / noise.norm()

    def said(export: float, torchs: float) -> str:
        found, expected = exact + export * noise, exact - torchs * noise
        gaps = {"export": verify.differences(found, exact), "torch": verify.differences(expected, exact)}
        told = verify.differences(found, expected) | {"float64": {name: one["relative"] for name, one in gaps.items()}}
        return verify.disagreement(told, 1e-4)

    assert said(5e-5, 4e-5) == ""
    assert said(2.9e-4, 1e-4) == "", "torch is off by 1e-4 itself"
    assert "differs from torch by 4.1e-04 (relative), more than max_difference 0.0001" in said(3.1e-4, 1e-4)
    assert "from float64 by 2.0e-04, torch by 1.0e-07" in said(2e-4, 1e-7)
    assert verify.disagreement({"relative": 2e-4}, 1e-4) == (
        "differs from torch by 2.0e-04 (relative), more than max_difference 0.0001"
    )


def test_torch_is_as_far_from_float64_as_its_rounding(net):
    network = load_network(net)
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (6, 1, 32, 32, 3), dtype=np.uint8)
    samples = Samples(data, np.zeros(6, np.int64), [""] * 6, list(range(6)))
    expected = verify.outputs_of(network, samples)
    gaps = verify.from_float64(network, samples, expected * 1.001, expected)
    assert 1e-9 < gaps["torch"] < 1e-5
    assert gaps["export"] == pytest.approx(1e-3, rel=0.02)
    assert torch.get_default_dtype() == torch.float32


def test_a_disagreement_says_in_what_part_of_the_samples_it_is(net):
    expected = {"mask": torch.randn(200, 16), "box": torch.randn(200, 3)}
    found = {name: value * (1 + 1e-6) for name, value in expected.items()}
    found["box"][7] *= 1.2
    assert verify.close(found, expected, 1e-4) == 99.5
    assert verify.close(found | {"box": found["box"] * torch.nan}, expected, 1e-4) == 0
    network, told = load_network(net), verify.differences(found, expected)
    wanted = Wanted(1e-4, 99.5, None, 1, 9)
    assert "differs from torch by" in wanted.disagreement(network, "fp32", told)
    said = wanted.disagreement(network, "fp32", told | {"close": 99.5})
    assert said.endswith("more than max_difference 0.0001, 0.5 % of the samples by more than that")


def test_differences_are_of_the_worst_output():
    a = {"x": torch.ones(2, 4), "y": torch.ones(2, 3)}
    b = {"x": torch.ones(2, 4), "y": torch.tensor([[1.0, 1, 1], [1, 1, 2]])}
    found = verify.differences(b, a)
    assert found["max_abs"] == 1
    assert found["relative"] == pytest.approx(1 / np.sqrt(6))
    assert found["worst_sample"] == pytest.approx(1 / np.sqrt(3))
    assert json.dumps(found)


@pytest.mark.benchmark
def test_layers_that_stay_float_are_left_out_by_the_quantizer_of_executorch(tmp_path):
    pytest.importorskip("executorch")
    torch.manual_seed(0)
    net = networks.ready(models.build("lenet5", num_classes=3), torch.randn(8, 1, 28, 28))
    x = torch.randn(4, 1, 28, 28)
    one, sizes = graph.whole(graph.ready(net), x[:1], {}), []
    names = [name for name, module in net.named_modules() if hasattr(module, "weight")]
    for number, floats in enumerate(((), tuple(names))):
        (folder := tmp_path / str(number)).mkdir()
        FORMATS["executorch_int8"].convert(replace(one, varying={}, floats=floats), folder, verify.calibration(one, x))
        sizes.append((folder / "model.pte").stat().st_size)
    weights = sum(4 * one.numel() for one in net.parameters())
    assert sizes[0] < 0.5 * weights < weights < sizes[1]
