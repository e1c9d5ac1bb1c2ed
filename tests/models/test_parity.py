"""Operators, names and counts equal the recorded values of the published implementations."""

import json
import zlib

import numpy as np
import pytest
import torch

from slimray import models
from slimray.edge import cost
from slimray.models.nonlocal_block import NonLocal
from slimray.models.tsm import Shift, temporal_pool, temporal_shift

REFERENCE = {
    "tsn_r50": ("tsn_resnet50", {}),
    "tsm_r50_8f": ("tsm_resnet50", {}),
    "tsm_r50_16f": ("tsm_resnet50", {"num_segments": 16}),
    "tsm_r101_8f": ("tsm_resnet101", {}),
    "tsm_r50_nl_8f": ("tsm_resnet50_nl", {}),
    "tsm_mbv2_8f": ("tsm_mobilenetv2", {}),
    "tsm_r50_8f_tpool": ("tsm_resnet50", {"temporal_pool": True}),
}


def build(name: str, **options):
    model, more = REFERENCE[name]
    return cost.build_on_meta(lambda: models.build(model, **({"num_classes": 400} | more | options)))


@pytest.fixture(scope="module")
def ops(shared):
    return torch.load(shared / "parity/tsm_ops.pt", weights_only=True)


def test_shift_moves_values_and_gradients_as_recorded(ops):
    for case in ops["shift"]:
        div = case["n_div"]
        x = case["x"].clone().requires_grad_()
        segments = case["n_segment"] if "n_segment" in case else case["T"]
        y = temporal_shift(x, segments, div)
        assert torch.equal(y, case["y_bidir"])
        y.backward(case["grad_out"])
        assert torch.equal(x.grad, case["grad_in_bidir"])
        assert torch.equal(temporal_shift(case["x"], segments, div, causal=True), case["y_unidir"])


def test_temporal_pool_as_recorded(ops):
    case = ops["temporal_pool"]
    assert torch.equal(temporal_pool(case["x"], case["n_segment"]), case["y"])


def fill(module: torch.nn.Module) -> None:
    """The recorded rule that makes weights from their names."""
    state = module.state_dict()
    for key, value in state.items():
        a = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(value.shape)).astype(np.float32)
        if not value.dtype.is_floating_point:
            a = np.zeros(tuple(value.shape))
        elif key.endswith("running_var"):
            a = 1 + 0.1 * np.abs(a)
        elif key.endswith("running_mean") or key.endswith(".bias"):
            a = 0.1 * a
        elif value.ndim == 1:
            a = 1 + 0.1 * a
        else:
            a = a * np.sqrt(1 / np.prod(value.shape[1:]))
        state[key] = torch.as_tensor(a).to(value.dtype)
    module.load_state_dict(state)


def test_non_local_block_as_recorded(ops):
    case = ops["nonlocal3d"]
    block = NonLocal(case["x"].shape[1]).eval()
    fill(block)
    torch.testing.assert_close(block(case["x"]), case["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", REFERENCE)
def test_state_names_and_shapes_are_the_published_ones(name, shared):
    recorded = json.loads((shared / "parity/tsm_state_dict_keys.json").read_text())[name]
    net = build(name, num_classes=recorded[next(k for k in recorded if k.endswith("fc.bias"))][0])
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == recorded


def test_shifted_places_are_the_published_ones(shared):
    recorded = json.loads((shared / "parity/tsm_state_dict_keys.json").read_text())
    for key, name, options in [
        ("shift_modules_r50", "tsm_r50_8f", {}),
        ("shift_modules_r101", "tsm_r101_8f", {}),
        ("shift_modules_mbv2", "tsm_mbv2_8f", {}),
        ("shift_modules_r50_block", "tsm_r50_8f", {"place": "block"}),
    ]:
        net = build(name, **options)
        assert [n for n, m in net.named_modules() if isinstance(m, Shift)] == recorded[key]


@pytest.mark.parametrize("name", REFERENCE)
def test_parameters_and_macs_are_exact(name, shared):
    stats = json.loads((shared / "parity/tsm_stats.json").read_text())[name]
    net = build(name)
    assert cost.count_params(net) == stats["params_k400"]
    assert cost.count_macs(net, (1, net.num_segments, 3, 224, 224)) == stats["macs_per_clip_224"]
    if "macs_per_clip_256" in stats:
        assert cost.count_macs(net, (1, net.num_segments, 3, 256, 256)) == stats["macs_per_clip_256"]


def test_parameters_by_dataset(shared):
    stats = json.loads((shared / "parity/tsm_stats.json").read_text())["params_by_dataset_tsm_r50"]
    classes = {"sthv1": 174, "sthv2": 174, "ucf101": 101, "hmdb51": 51, "jester": 27}
    for dataset, count in stats.items():
        assert cost.count_params(build("tsm_r50_8f", num_classes=classes[dataset])) == count


@pytest.mark.parametrize(
    ("options", "params_m", "gmacs"),
    [
        ({}, 28.043, 33.13),
        ({"inflation": "3x1x1_every", "num_segments": 8, "stem_frames": 1, "stem_stride": 1, "pool_stride": 1,
          "temporal_pool": False}, 32.987, 47.70),
        ({"inflation": "3x3x3"}, 47.00, 45.56),
        ({"inflation": "3x3x3", "num_segments": 16, "pool_stride": 1}, 47.00, 40.84),
    ],
)  # fmt: skip
def test_i3d_counts_are_the_measured_ones(options, params_m, gmacs):
    net = cost.build_on_meta(lambda: models.build("i3d_resnet50", num_classes=400, **options))
    assert cost.count_params(net) / 1e6 == pytest.approx(params_m, abs=0.006)
    assert cost.count_macs(net, (1, net.num_segments, 3, 224, 224)) / 1e9 == pytest.approx(gmacs, abs=0.006)


def test_non_local_i3d_counts_are_the_measured_ones():
    net = cost.build_on_meta(lambda: models.build("i3d_resnet50_nl", num_classes=400))
    assert cost.count_params(net) / 1e6 == pytest.approx(35.402, abs=0.002)
    assert cost.count_macs(net, (1, 32, 3, 224, 224)) / 1e9 == pytest.approx(44.34, abs=0.006)
