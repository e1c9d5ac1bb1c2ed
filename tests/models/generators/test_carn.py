"""CARN's parts give the recorded outputs, its parameters are the published ones, and it takes pictures of any size."""

import zlib

import numpy as np
import pytest
import torch
from torch import nn

from slimray import models
from slimray.models.generators.carn import Cascade, Residual, Upsample
from slimray.spec import UserError

PARTS = {
    "residual_c64": lambda: Residual(64),
    "efficient_residual_c64_g4": lambda: Residual(64, 4),
    "cascade_block_c64": lambda: Cascade([Residual(64) for _ in range(3)], 64),
    "cascade_block_mobile_g4": lambda: Cascade([Residual(64, 4)] * 3, 64),
    **{f"upsample_x{scale}_c8": lambda scale=scale: Upsample(8, scale) for scale in (2, 3, 4)},
}
PUBLISHED = {  # parameters at scales 2, 3, 4; the 24 frozen numbers of the mean are buffers here
    "carn": (964_187, 1_148_827, 1_111_899),
    "carn_m": (257_051, 303_451, 294_171),
}


def fill(net: nn.Module, keys: dict[str, list[int]]) -> None:
    """Weights by the rule of the parity files: a draw per name, in the order in which both name them."""
    for (key, shape), parameter in zip(keys.items(), net.parameters(), strict=True):
        a = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
        a = 0.1 * a if key.endswith("bias") else a * np.float32(np.sqrt(1 / np.prod(shape[1:])))
        assert tuple(parameter.shape) == tuple(shape), key
        parameter.data.copy_(torch.from_numpy(a))


@pytest.mark.parametrize("name", PARTS)
def test_a_part_gives_what_was_recorded(shared, name):
    case = torch.load(shared / "parity/images/carn_ops.pt", weights_only=True)[name]
    net = PARTS[name]()
    fill(net, dict(case["keys"]))
    torch.testing.assert_close(net(case["input"]), case["output"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("place", range(3))
def test_parameters_are_the_published_ones(name, place):
    net = models.build(name, scale=place + 2)
    assert sum(p.numel() for p in net.parameters()) + 24 == PUBLISHED[name][place]


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_picture_becomes_scale_times_as_large(scale):
    net = models.build("carn", scale=scale, width=8, blocks=1, units=1)
    assert net(torch.zeros(2, 3, 5, 7)).shape == (2, 3, 5 * scale, 7 * scale)


@pytest.mark.parametrize("options", [{"scale": 2, "blocks": 2, "units": 2}, {"scale": 4, "blocks": 1, "units": 3}])
def test_a_place_depends_on_no_more_than_its_reach(options):
    torch.manual_seed(0)
    net = models.build("carn", width=4, **options)
    x = torch.rand(1, 3, 1, 101, requires_grad=True)
    side = net.scale * 50
    net(x)[0, 0, 0, side : side + net.scale].sum().backward()
    touched = x.grad[0].abs().sum((0, 1)).nonzero().flatten()
    assert 50 - touched.min() <= net.reach
    assert touched.max() - 50 <= net.reach


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scale": 5}, "scale: must be 2, 3 or 4"),
        ({}, "scale is required"),
        ({"scale": 2, "width": 6, "groups": 4}, "groups: must divide width"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        models.build("carn", **options)
