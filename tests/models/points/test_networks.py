"""Point networks equal the recorded ones in counts, names and values; each trains, in bfloat16 too, and repeats."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from slimray.edge import cost
from slimray.models import published
from slimray.models.points import frustum
from slimray.models.points.pvcnn import PVConv
from slimray.models.points.table import POINT_MODELS
from slimray.tasks import frustum_boxes

REFERENCE = {
    "s3dis.pointnet": "pointnet_s3dis",
    "s3dis.pvcnn": "pvcnn_s3dis",
    "s3dis.pvcnn2": "pvcnnpp_s3dis",
    "shapenet.pointnet": "pointnet_shapenet",
    "shapenet.pointnet2ssg": "pointnetpp_ssg_shapenet",
    "shapenet.pointnet2msg": "pointnetpp_msg_shapenet",
    "shapenet.pvcnn": "pvcnn_shapenet",
    "kitti.frustum.pointnet": "frustum_pointnet",
    "kitti.frustum.pointnet2": "frustum_pointnetpp",
    "kitti.frustum.pvcnne": "frustum_pvcnne",
}
CLASSES = {"s3dis": 13, "shapenet": 50, "frustum": 3, "cls": 40, "ofa": 13}
CHANNELS = {"s3dis": 9, "shapenet": 22, "frustum": 7, "cls": 3, "ofa": 9}


def kind(name: str) -> str:
    return next(k for k in CLASSES if k in name.split("_"))


def build(name: str, **options) -> nn.Module:
    return POINT_MODELS[name][0](num_classes=CLASSES[kind(name)], **options)


def small(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    if "unet3d" in name:
        options.setdefault("voxel", 0.5)
    return build(name, width=0.125, **options)


def cloud(name: str, num_points: int = 256, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.rand(batch, CHANNELS[kind(name)], num_points)
    if kind(name) in ("shapenet", "frustum"):
        labels = CLASSES["frustum"] if kind(name) == "frustum" else 16
        x[:, -labels:] = F.one_hot(torch.arange(batch) % labels, labels)[..., None]
    return x


def outputs(out) -> list[torch.Tensor]:
    return list(out.values()) if isinstance(out, dict) else [out]


# ------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("published", REFERENCE)
def test_state_names_shapes_and_order_are_the_published_ones(published, shared):
    recorded = json.loads((shared / "parity/pvcnn_state_dict_keys_full.json").read_text())
    names = recorded.get(published) or recorded[f"{published}.c1"]
    state = cost.build_on_meta(lambda: build(REFERENCE[published])).state_dict()
    assert [(k, list(v.shape)) for k, v in state.items()] == [(k, list(v)) for k, v in names.items()]


def test_parameters_and_macs_are_exact(shared):
    recorded = json.loads((shared / "parity/pvcnn_param_counts.json").read_text())
    for case, counts in recorded.items():
        published, *width, points = case.split()
        transform = {"transform": True} if published.endswith("+T-Net") else {}
        name = REFERENCE[published.removesuffix("+T-Net")]
        options = {"width": float(width[0][1:])} if width else {}
        net = cost.build_on_meta(lambda name=name, options=options | transform: build(name, **options))
        assert cost.count_params(net) == counts["params"], case
        assert len(net.state_dict()) == counts["state_keys"], case
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = net.eval()(torch.zeros(1, CHANNELS[kind(name)], int(points[1:]), device="meta"))
        products = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)  # T-Nets applied: not in the sheet
        assert (counter.get_total_flops() - products) // 2 == counts["macs"], case
        shapes = {k: list(v.shape) for k, v in out.items()} if isinstance(out, dict) else list(out.shape)
        assert shapes == counts["out"], case


@pytest.mark.parametrize(("name", "params"), [("dgcnn_shapenet", 1_460_361), ("dgcnn_s3dis", 983_552)])
def test_dgcnn_has_as_many_parameters_as_published(name, params):
    assert cost.count_params(cost.build_on_meta(lambda: build(name))) == params


@pytest.fixture(scope="module")
def recorded(shared):
    return torch.load(shared / "parity/pvcnn_s3dis_pvcnn_c0p125.pt", weights_only=True)


def loaded(recorded, **options) -> nn.Module:
    net = build("pvcnn_s3dis", width=0.125, **options)
    net.load_state_dict(recorded["state_dict"])
    return net


def test_pvcnn_evaluates_as_recorded(recorded):
    with torch.no_grad():
        out = loaded(recorded).eval()(recorded["input"])
    torch.testing.assert_close(out, recorded["eval_output"], rtol=0, atol=1e-5)


def test_a_published_checkpoint_loads_and_computes_as_recorded(shared):
    net = build("pvcnn_s3dis", width=0.125).eval()
    report = published.load(net, shared / "parity/pvcnn_checkpoint_format_s3dis_pvcnn_c0p125.pth.tar")
    assert not report.missing
    with np.load(shared / "parity/pvcnn_checkpoint_format_io.npz") as io, torch.no_grad():
        out, expected = net(torch.as_tensor(io["input"])), torch.as_tensor(io["eval_output"])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def backward(net: nn.Module, recorded) -> torch.Tensor:
    """The output of `net` in training for the recorded input, its gradients taken from the recorded targets."""
    out = net.train()(recorded["input"].to(next(net.parameters()).dtype))
    F.cross_entropy(out, recorded["targets"]).backward()
    return out.detach()


def test_pvcnn_trains_as_recorded(recorded):
    net = loaded(recorded, dropout=0.0)
    out = backward(net, recorded)
    torch.testing.assert_close(out, recorded["train_output_dropout0"], rtol=0, atol=1e-4)
    loss = F.cross_entropy(out, recorded["targets"])
    assert loss.item() == pytest.approx(float(recorded["train_loss_dropout0"]), abs=1e-4)
    state = net.state_dict()
    for name, value in recorded["running_stats_after_one_train_forward"].items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-4)


def test_gradients_of_pvcnn_are_the_recorded_ones(recorded):
    """Float64 decides, float32 and the recorded values (float32 as well) are held against it.

    Behind the head, gradients come through the BatchNorm of `cloud_features`, over two samples: 1e-7 more or less in
    the input moves them by up to 2 %. A bias before a BatchNorm has no gradient; in float32 it is what rounding leaves,
    which differs from one processor to the next: it is compared with the gradient of the weight beside it.
    """
    net, exact = loaded(recorded, dropout=0.0), loaded(recorded, dropout=0.0).double()
    backward(net, recorded)
    backward(exact, recorded)
    modules = dict(exact.named_modules())
    before_norm = {
        f"{name}.{place}.bias"
        for name, module in modules.items()
        if isinstance(module, nn.Sequential)
        for place, (one, following) in enumerate(pairwise(module))
        if isinstance(one, nn.Conv1d | nn.Conv3d | nn.Linear) and isinstance(following, nn.BatchNorm1d | nn.BatchNorm3d)
    }
    assert len(before_norm) > 10
    for name, parameter in exact.named_parameters():
        right, mine, theirs = parameter.grad, net.get_parameter(name).grad, float(recorded["grad_norms"][name])
        if name in before_norm:
            beside = exact.get_parameter(name.removesuffix("bias") + "weight").grad.norm().item()
            assert right.norm().item() < 1e-12 * beside, name
            assert max(mine.norm().item(), theirs) < 1e-4 * beside, name
            continue
        norm, rel = right.norm().item(), 1e-3 if name.startswith("classifier") else 2e-2
        assert theirs == pytest.approx(norm, rel=rel), name
        assert (mine - right).norm().item() <= rel * norm, name
        if name in recorded["grads_small"]:
            assert (right - recorded["grads_small"][name]).norm().item() <= 2e-2 * norm, name


# ------------------------------------------------------------------------------------------------ every network


@pytest.mark.parametrize("name", POINT_MODELS)
def test_every_network_trains_at_small_width(name):
    net, x = small(name), cloud(name)
    out = net(x)
    if kind(name) == "cls":
        assert out.shape == (2, CLASSES["cls"])
    elif kind(name) != "frustum":
        assert out.shape == (2, CLASSES[kind(name)], 256)
    sum(o.float().square().mean() for o in outputs(out)).backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    assert isinstance(net.get_submodule(net.head_name), nn.Conv1d | nn.Linear)


@pytest.mark.parametrize("name", POINT_MODELS)
def test_every_network_runs_in_bfloat16_and_where_determinism_is_demanded(name):
    net, x, results = small(name, dropout=0.0), cloud(name), []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(2)
            net.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = outputs(net(x))
            sum(o.float().square().mean() for o in out).backward()
            results.append([*out, *(p.grad for p in net.parameters())])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(o.isfinite().all() for o in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("name", POINT_MODELS)
def test_every_network_bears_coinciding_and_few_points(name):
    net = small(name).eval()
    for x in (torch.zeros_like(cloud(name, 40)), cloud(name, 5)):
        with torch.no_grad():
            assert all(o.isfinite().all() for o in outputs(net(x)))


@pytest.mark.parametrize("name", ["pvcnn_s3dis", "pvcnn_shapenet", "pointnetpp_ssg_shapenet"])
def test_bfloat16_is_near_float32(name):
    net, x = small(name).eval(), cloud(name, 512)
    with torch.no_grad():
        exact = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = net(x).float()
    assert (rough - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("name", ["pvcnn_s3dis", "pvcnn_shapenet"])
def test_pvcnn_exports_for_any_number_of_points_in_common_operators(name):
    net = small(name, voxel=0.5).eval()
    num_points = torch.export.Dim("num_points", min=16, max=65536)
    program = torch.export.export(net, (cloud(name, 128),), dynamic_shapes=({2: num_points},)).run_decompositions()
    assert not any("embedding" in str(node.target) for node in program.graph.nodes)
    module = program.module()
    for count in (128, 301):
        x = cloud(name, count)
        torch.testing.assert_close(module(x), net(x), rtol=1e-4, atol=1e-5)


def test_voxel_scales_the_grids_and_width_the_channels():
    net = small("pvcnn_s3dis", voxel=0.5)
    assert [m.resolution for m in net.modules() if isinstance(m, PVConv)] == [16, 8, 8, 8]
    assert [m.voxel_layers[0].out_channels for m in net.modules() if isinstance(m, PVConv)] == [8, 8, 8, 16]


def test_the_order_of_points_does_not_matter_to_pvcnn():
    net, x = small("pvcnn_s3dis").eval(), cloud("pvcnn_s3dis")
    order = torch.randperm(x.shape[2])
    with torch.no_grad():
        torch.testing.assert_close(net(x[:, :, order]), net(x)[:, :, order], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ frustums


def logits(mask: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.zeros(mask.shape), mask.float() * 2 - 1], 1)


def test_masking_draws_each_point_once_or_equally_often_or_nothing():
    coords = torch.randn(4, 3, 1024)
    mask = torch.zeros(4, 1024, dtype=torch.bool)
    mask[1, :700], mask[2, 5:205], mask[3, 3] = True, True, True
    drawn, mean, found = frustum.mask_points(coords, logits(mask), 512)
    assert torch.equal(found, mask)
    assert drawn.shape == (4, 3, 512)
    assert drawn[0].abs().max() == 0
    assert mean[0].abs().max() == 0
    for sample, distinct, repeats in [(1, 512, {1}), (2, 200, {2, 3}), (3, 1, {512})]:
        torch.testing.assert_close(mean[sample], coords[sample][:, mask[sample]].mean(1))
        points, counts = (drawn[sample] + mean[sample][:, None]).round(decimals=3).unique(dim=1, return_counts=True)
        assert points.shape[1] == distinct
        assert set(counts.tolist()) == repeats


def test_masking_repeats_with_a_seeded_generator():
    coords, scores = torch.randn(2, 3, 900), torch.randn(2, 2, 900)
    draws = [frustum.mask_points(coords, scores, 64, torch.Generator().manual_seed(7))[0] for _ in range(2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("name", [n for n in POINT_MODELS if n.startswith("frustum")])
def test_the_three_networks_of_a_frustum_net_alone_and_in_a_row(name):
    net, x = small(name).eval(), cloud(name, 200)
    points, one_hot = x[:, :4], x[:, 4:, 0]
    with torch.no_grad():
        assert net.mask_net(points, one_hot).shape == (2, 2, 200)
        assert net.center_net(points[:, :3], one_hot).shape == (2, 3)
        assert net.box_net(points[:, :3], one_hot).shape == (2, 59)
        apart = net(points, one_hot, generator=torch.Generator().manual_seed(0))
        joined = net(x, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(apart[key], joined[key]) for key in apart)
    torch.testing.assert_close(apart["heading_residuals"], apart["heading_residuals_normalized"] * math.pi / 12)


@pytest.mark.parametrize("name", POINT_MODELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_coordinates_that_are_no_numbers_give_no_numbers_and_no_crash(name, bad, training):
    net, x = small(name).train(training), cloud(name)
    x[0, :3, 5] = bad
    out = outputs(net(x))
    assert not all(torch.isfinite(one).all() for one in out)
    total = sum(one.float().sum() for one in out)
    assert not torch.isfinite(total)
    if training:
        total.backward()


def test_a_frustum_network_whose_centre_is_lost_drops_the_step_without_a_crash():
    net, x = small("frustum_pvcnn_complete").train(), cloud("frustum_pvcnn_complete")
    with torch.no_grad():
        net.center_reg_net.regression[-1].bias.fill_(math.nan)
    truth = torch.cat([torch.ones(2, 256), torch.ones(2, 7), torch.zeros(2, 4)], 1)
    losses = frustum_boxes.losses(net(x), truth, None)
    assert losses.isnan().all()
