"""3D convolutions computed in 2D: the same numbers, in torch and in a runtime that has only 2D ones."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from slimray.export import graph, slices, verify
from slimray.export.formats import FORMATS
from slimray.models.points import ops


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "bias"),
    [(3, 1, 1, True), (2, 2, 0, False), ((3, 1, 1), 1, (1, 0, 0), True), ((3, 5, 5), (1, 2, 2), (1, 2, 2), False)],
)
def test_slices_give_what_the_convolution_gives(kernel, stride, padding, bias):
    torch.manual_seed(0)
    conv = nn.Conv3d(3, 4, kernel, stride, padding, bias=bias).double()
    x = torch.randn(2, 3, 6, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(slices.SlicedConv3d(conv)(x), conv(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "circular", "padding": 1}])
def test_other_convolutions_are_left_alone_and_refused_by_name(options):
    conv = nn.Conv3d(4, 4, 3, **options)
    net = nn.Sequential(conv).eval()
    assert slices.sliced(net, (torch.randn(1, 4, 6, 6, 6),)) is net
    with pytest.raises(ValueError, match="groups"):
        slices.SlicedConv3d(conv)


class Voxels(nn.Module):
    """Puts points into a grid, convolves it in 3D and reads it back at the points."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.LeakyReLU(0.1))
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = ops.normalize_coords(x, 6)
        read = ops.devoxelize(self.grid(ops.voxelize(x, places, 6)), places)
        return self.last(read.mean(2))


@pytest.mark.parametrize(("form", "most"), [("executorch", 1e-4), ("executorch_int8", 0.1)])
def test_executorch_runs_convolutions_in_3d_between_points(form, most, tmp_path):
    torch.manual_seed(0)
    net, x = Voxels(), torch.randn(8, 3, 64)
    with torch.no_grad():
        net(x)
        net.eval()
        one, row = replace(graph.whole(net, x[:1], {}), varying={}), FORMATS[form]
        row.convert(one, tmp_path, [[cloud[None].numpy()] for cloud in x])
        found = torch.from_numpy(row.load(tmp_path / row.file, 1, True)([x[:1].numpy()])[0])
        assert verify.differences(found, net(x[:1]))["relative"] < most
    assert any(type(module) is nn.Conv3d for module in net.modules())  # the network itself is unchanged
