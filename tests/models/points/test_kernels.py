"""The Triton kernels give what torch gives: on a GPU where there is one, else in Triton's interpreter."""

import numpy as np
import pytest
import torch

from slimray.models.points import ops

pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernels():
    from slimray.models.points import kernels as compiled  # Triton may be absent

    return compiled


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch):
    """The operators to compare with."""
    monkeypatch.setattr(ops, "_kernels", lambda x, adds=False: None)
    torch.manual_seed(0)


def cloud(batch, num_points, resolution):
    """Places with whole and half coordinates, voxels shared and empty."""
    places = ops.normalize_coords(torch.rand(batch, 3, num_points), resolution)
    places[:, :, :5], places[:, :, 5:9] = places[:, :, :5].round(), places[:, :, 5:9].floor() + 0.5
    return places.clamp(0, resolution - 1).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "channels", "num_points", "resolution"), [(2, 70, 100, 4), (1, 9, 33, 8), (3, 16, 70, 5)]
)
def test_voxels_and_their_gradients(kernels, batch, channels, num_points, resolution, dtype):
    places = cloud(batch, num_points, resolution)
    features = torch.randn(batch, channels, num_points, device=DEVICE, dtype=dtype).requires_grad_()
    grid = torch.randn(batch, channels, *[resolution] * 3, device=DEVICE, dtype=dtype).requires_grad_()
    for x, ours, theirs in (
        (features, kernels.voxelize(features, places, resolution), ops.voxelize(features, places, resolution)),
        (grid, kernels.devoxelize(grid, places), ops.devoxelize(grid, places)),
    ):
        given = torch.randn_like(theirs)
        pairs = [(ours, theirs), (torch.autograd.grad(out, x, given)[0] for out in (ours, theirs))]
        for got, expected in pairs:
            assert got.dtype == expected.dtype == dtype
            torch.testing.assert_close(
                got.float(), expected.float(), rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-5
            )


@pytest.mark.parametrize(("num_points", "num_centers"), [(700, 40), (1025, 10), (5, 9), (1, 2)])
def test_samples_and_balls_with_ties(kernels, num_points, num_centers):
    coords = torch.randint(0, 6, (2, 3, num_points), device=DEVICE).float()
    number = torch.arange(num_points, device=DEVICE)
    order = (number % ops.KERNEL_THREADS * num_points + number // ops.KERNEL_THREADS).argsort()
    chosen = ops.furthest_point_sample(coords, num_centers)
    assert torch.equal(kernels.furthest_point_sample(coords[:, :, order], order, num_centers), chosen)
    centers = coords.gather(2, chosen[:, None].expand(-1, 3, -1)) + 0.1
    for radius, num in ((1.5, 8), (0.05, 3), (2.3, 70)):
        limit = float(np.square(np.float32(radius)))
        expected = ops.ball_query(coords, centers, radius, num)
        assert torch.equal(kernels.ball_query(coords, centers, limit, num), expected)
