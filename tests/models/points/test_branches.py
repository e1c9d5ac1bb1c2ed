"""Responses of the branches of a PVConv in real networks: the right numbers at the right points, no side effects."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimray.models.points import frustum, pointnet, pvcnn
from slimray.models.points.branches import branch_responses
from slimray.models.points.pvcnn import PVConv

WIDTH = {"width": 0.125}
NETS = {
    "pvcnn_s3dis": (lambda: pvcnn.pvcnn_s3dis(num_classes=13, **WIDTH), 9, [256] * 4),
    "pvcnn_shapenet": (lambda: pvcnn.pvcnn_shapenet(num_classes=50, **WIDTH), 22, [256] * 3),
    "pvcnn_cls": (lambda: pvcnn.pvcnn_cls(num_classes=5, **WIDTH), 3, [256] * 4),
    "pvcnnpp_s3dis": (
        lambda: pvcnn.pvcnnpp_s3dis(num_classes=13, **WIDTH),
        9,
        [256] * 2 + [1024] * 3 + [256] * 3 + [64, 256, 1024, 1024, 256],
    ),
    "frustum_pvcnn_complete": (
        lambda: frustum.frustum_pvcnn_complete(num_classes=3, num_points=64, **WIDTH),
        7,
        [256] * 4 + [64] * 5,
    ),
}


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name][0]()


def cloud(name: str) -> torch.Tensor:
    torch.manual_seed(1)
    points = torch.rand(1, NETS[name][1], 256)
    if name == "frustum_pvcnn_complete":
        points[:, -3:] = F.one_hot(torch.tensor([1]), 3)[..., None]
    return points


@pytest.mark.parametrize("name", NETS)
def test_every_pvconv_answers_at_the_points_it_sees(name: str):
    net, points = small(name), cloud(name)
    found = branch_responses(net, points)
    blocks = {name for name, module in net.named_modules() if isinstance(module, PVConv)}
    assert {one.name for one in found} == blocks
    assert [one.coords.shape[1] for one in found] == NETS[name][2]
    for one in found:
        assert one.voxel.shape == one.point.shape == one.coords.shape[1:]
        assert one.coords.shape[0] == 3
        assert one.voxel.dtype == one.point.dtype == np.float32
        assert one.voxel.min() >= 0 <= one.point.min()
    np.testing.assert_array_equal(found[0].coords, points[0, :3])


def test_where_one_branch_is_silent_the_other_is_all_that_comes_out():
    net, points = small("pvcnn_s3dis").eval(), cloud("pvcnn_s3dis")
    blocks = {name: module for name, module in net.named_modules() if isinstance(module, PVConv)}
    lengths = {}
    for number, (name, block) in enumerate(blocks.items()):
        silent = block.point_features.layers[1] if number % 2 else block.voxel_layers[4]
        nn.init.zeros_(silent.weight)
        nn.init.zeros_(silent.bias)
        block.register_forward_hook(lambda _, __, out, name=name: lengths.update({name: out[0].norm(dim=1)[0]}))
    for number, one in enumerate(branch_responses(net, points)):
        silent, loud = (one.point, one.voxel) if number % 2 else (one.voxel, one.point)
        assert silent.max() == 0
        np.testing.assert_allclose(loud, lengths[one.name].numpy(), rtol=1e-5, atol=1e-6)
        assert loud.max() > 0


def test_the_branches_add_up_to_the_output():
    net, points = small("pvcnn_s3dis").eval(), cloud("pvcnn_s3dis")
    block = next(module for module in net.modules() if isinstance(module, PVConv))
    voxel, point = block.branches((points, points[:, :3]))
    torch.testing.assert_close(block((points, points[:, :3]))[0], point + voxel, rtol=0, atol=0)


def test_no_trace_is_left():
    net, points = small("frustum_pvcnn_complete").train(), cloud("frustum_pvcnn_complete")
    frozen = next(module for module in net.modules() if isinstance(module, PVConv)).eval()
    modes, before = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.random.get_rng_state()
    branch_responses(net, points)
    assert [m.training for m in net.modules()] == modes
    assert not frozen.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(m._forward_hooks for m in net.modules())


def test_the_same_question_gets_the_same_answer_in_any_mode():
    net, points = small("frustum_pvcnn_complete"), cloud("frustum_pvcnn_complete")
    first = branch_responses(net.train(), points)
    torch.rand(7)
    for one, other in zip(first, branch_responses(net.eval(), points), strict=True):
        np.testing.assert_array_equal(one.voxel, other.voxel)
        np.testing.assert_array_equal(one.coords, other.coords)


def test_hooks_are_gone_after_an_error_too():
    net = small("pvcnn_s3dis").train()
    with pytest.raises(RuntimeError):
        branch_responses(net, torch.rand(1, 4, 16))
    assert not any(m._forward_hooks for m in net.modules())
    assert net.training


def test_a_network_without_pvconvs_has_no_responses_and_a_batch_is_refused():
    assert branch_responses(pointnet.pointnet_s3dis(num_classes=13, width=0.125), torch.rand(1, 9, 64)) == []
    for shape in ((2, 9, 64), (9, 64)):
        with pytest.raises(ValueError, match=r"one cloud \[1, C, N\]"):
            branch_responses(small("pvcnn_s3dis"), torch.rand(shape))
