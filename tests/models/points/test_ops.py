"""Point operators equal the recorded values, and behave on bfloat16, on request for determinism and on odd clouds."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from slimray.models.points import ops as point_ops
from slimray.tasks.frustum_loss import huber
from slimray.train.learn import divergences

PLACES = ["cpu"] + ["cuda, kernels", "cuda, torch"] * torch.cuda.is_available()


@pytest.fixture(params=PLACES)
def ops(request, shared, monkeypatch):
    """The recorded values, on each device there is; on a GPU with the kernels and without."""
    device, _, how = request.param.partition(", ")
    if how == "torch":
        monkeypatch.setattr(point_ops, "_kernels", lambda x, adds=False: None)
    return {k: torch.as_tensor(v).to(device) for k, v in np.load(shared / "parity/pvcnn_ops.npz").items()}


def close(ours, recorded, atol=1e-6):
    torch.testing.assert_close(ours, recorded, rtol=0, atol=atol)


def same(ours, recorded):
    assert torch.equal(ours.long(), recorded.long())


VOXEL_CASES = [(normalize, resolution) for normalize in (0, 1) for resolution in (4, 12, 32)]


def test_furthest_points_as_recorded_with_the_ties_of_the_kernel(ops):
    index = point_ops.furthest_point_sample(ops["points"], 96)
    same(index, ops["fps_indices"])
    assert torch.equal(point_ops.gather(ops["points"], index), ops["centers"])


@pytest.mark.parametrize("radius", ["0.25", "0.6", "1.2"])
def test_balls_as_recorded(ops, radius):
    index = point_ops.ball_query(ops["points"], ops["ball_centers"], float(radius), 16)
    same(index, ops[f"ball_idx_r{radius}_u16"])


def test_grouping_moves_values_and_gradients_as_recorded(ops):
    features = ops["features"].clone().requires_grad_()
    grouped = point_ops.gather(features, ops["ball_idx_r0.6_u16"].long())
    assert torch.equal(grouped, ops["grouped_features_r0.6"])
    grouped.backward(ops["grouping_grad_y"])
    close(features.grad, ops["grouping_grad_x"], 2e-5)


def test_a_group_is_relative_coordinates_then_features_and_both_learn():
    coords, features = torch.randn(2, 3, 50).requires_grad_(), torch.randn(2, 4, 50).requires_grad_()
    centers, index = coords[:, :, :7], torch.randint(50, (2, 7, 5))
    grouped = point_ops.group(coords, centers, features, index)
    assert torch.equal(grouped[:, 3:], point_ops.gather(features, index))
    assert torch.equal(grouped[1, :3, 2, 4], coords[1, :, index[1, 2, 4]] - coords[1, :, 2])
    grouped.square().sum().backward()
    assert coords.grad.abs().sum() > 0
    assert features.grad.abs().sum() > 0
    assert torch.equal(point_ops.group(coords, centers, None, index), grouped[:, :3])


def test_interpolation_from_three_neighbours_as_recorded(ops):
    index, weights = point_ops.three_nearest(ops["points"], ops["centers"])
    same(index, ops["nn3_indices"])
    close(weights, ops["nn3_weights"])
    features = ops["center_features"].clone().requires_grad_()
    out = point_ops.interpolate(ops["points"], ops["centers"], features)
    close(out, ops["nn3_out"])
    out.backward(ops["nn3_grad_y"])
    close(features.grad, ops["nn3_grad_centers"], 2e-5)


def test_a_single_centre_gives_its_features_to_all_points(ops):
    center = ops["centers"][:, :, :1]
    index, weights = point_ops.three_nearest(ops["points"], center)
    same(index, ops["nn3_m1_indices"])
    close(weights, ops["nn3_m1_weights"])
    close(point_ops.interpolate(ops["points"], center, ops["nn3_m1_center_features"]), ops["nn3_m1_out"])


@pytest.mark.parametrize(("normalize", "resolution"), VOXEL_CASES)
def test_voxel_coordinates_as_recorded(ops, normalize, resolution):
    coords = ops["points"] if normalize else ops["points"] / 3
    places = point_ops.normalize_coords(coords, resolution, bool(normalize))
    close(places, ops[f"vox_norm{normalize}_r{resolution}_norm_coords"], 1e-6 * resolution)
    same(places.round(), ops[f"vox_norm{normalize}_r{resolution}_vox_coords"])


def test_halves_round_to_even(ops):
    places = point_ops.normalize_coords(ops["round_probe_coords"], 8, normalize=False)
    x, y, z = ops["round_probe_vox"].long().unbind(1)
    assert torch.equal(point_ops.voxel_index(places, 8), (x * 8 + y) * 8 + z)


@pytest.mark.parametrize(("normalize", "resolution"), VOXEL_CASES)
def test_voxelization_as_recorded(ops, normalize, resolution):
    case = f"vox_norm{normalize}_r{resolution}_"
    places, features = ops[case + "norm_coords"], ops["features"].clone().requires_grad_()
    grid = point_ops.voxelize(features, places, resolution)
    if resolution == 32:
        index = point_ops.voxel_index(places, resolution)
        same(index, ops[case + "ind"])
        close(point_ops.gather(grid.flatten(2), index), ops[case + "out_at_points"])
    else:
        close(grid, ops[case + "out"])
    if case + "grad_y" in ops:
        grid.backward(ops[case + "grad_y"])
        close(features.grad, ops[case + "grad_x"], 2e-5)


@pytest.mark.parametrize(("normalize", "resolution"), [case for case in VOXEL_CASES if case[1] < 32])
def test_devoxelization_as_recorded_and_as_grid_sample(ops, normalize, resolution):
    case = f"devox_norm{normalize}_r{resolution}_"
    places = ops[f"vox_norm{normalize}_r{resolution}_norm_coords"]
    index, weights = point_ops.trilinear_corners(places, resolution)
    same(index, ops[case + "indices"])
    close(weights, ops[case + "weights"])
    grid = ops[case + "grid"].clone().requires_grad_()
    out = point_ops.devoxelize(grid, places)
    close(out, ops[case + "out_train"])
    close(out, ops[case + "out_eval"])
    out.backward(ops[case + "grad_y"])
    close(grid.grad, ops[case + "grad_grid"], 2e-5)
    where = (2 * places / (resolution - 1) - 1).flip(1).transpose(1, 2)[:, :, None, None]
    sampled = F.grid_sample(grid, where, mode="bilinear", padding_mode="border", align_corners=True)[..., 0, 0]
    close(out, sampled, 1e-5)


def test_losses_as_recorded(ops):
    close(divergences(ops["kl_x"], ops["kl_y"]).mean(), ops["kl_loss"])
    for delta in (1.0, 2.0):
        close(huber(ops["huber_err"], delta).mean(), ops[f"huber_d{delta}"])


def test_backward_is_the_transpose_of_forward():
    torch.manual_seed(0)
    coords = torch.randn(2, 3, 200)
    places = point_ops.normalize_coords(coords, 5)
    for linear, shape in [
        (lambda x: point_ops.voxelize(x, places, 5), (2, 4, 200)),
        (lambda x: point_ops.devoxelize(x, places), (2, 4, 5, 5, 5)),
        (lambda x: point_ops.interpolate(coords, coords[:, :, :9], x), (2, 4, 9)),
    ]:
        x, other = torch.randn(shape, requires_grad=True), torch.randn(shape)
        out = linear(x)
        given = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, x, given)
        torch.testing.assert_close((grad * other).sum(), (linear(other) * given).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("resolution", [6, 33])  # 33 ** 3 voxels have numbers beyond 16 bits
def test_a_batch_is_its_samples_in_values_and_gradients(resolution):
    torch.manual_seed(0)
    places = point_ops.normalize_coords(torch.randn(3, 3, 200), resolution)

    def through(x, places, given):
        x = x.clone().requires_grad_()
        grid = point_ops.voxelize(x, places, resolution)
        out = point_ops.devoxelize(grid, places)
        return grid, out, *torch.autograd.grad(out, (grid, x), given)

    features, given = torch.randn(3, 5, 200), torch.randn(3, 5, 200)
    for whole, *samples in zip(
        through(features, places, given),
        *(through(*(t[i : i + 1] for t in (features, places, given))) for i in range(3)),
    ):
        assert torch.equal(whole, torch.cat(samples))


def test_the_memory_of_features_and_grids_does_not_matter():
    torch.manual_seed(0)
    places = point_ops.normalize_coords(torch.randn(2, 3, 150), 7)
    features, grid = torch.randn(2, 150, 6).transpose(1, 2), torch.randn(2, 6, 7, 7, 7)
    close(point_ops.voxelize(features, places, 7), point_ops.voxelize(features.contiguous(), places, 7))
    channels_last = grid.to(memory_format=torch.channels_last_3d)
    close(point_ops.devoxelize(channels_last, places), point_ops.devoxelize(grid, places), 0)


@pytest.mark.parametrize("dim", [3, 16])
def test_nearest_neighbours_are_the_nearest(dim):
    torch.manual_seed(0)
    points, queries = torch.randn(2, dim, 70), torch.randn(2, dim, 30)
    expected = torch.cdist(queries.transpose(1, 2).double(), points.transpose(1, 2).double()).argsort(2)[:, :, :5]
    assert torch.equal(point_ops.knn(points, queries, 5), expected)
    assert torch.equal(point_ops.knn(points, points, 1)[..., 0], torch.arange(70).expand(2, -1))


def test_searches_do_not_depend_on_how_they_are_split():
    torch.manual_seed(0)
    points = torch.randn(2, 3, 1500)
    assert points.shape[0] * points.shape[2] ** 2 > point_ops.MAX_DISTANCES > points.shape[2] ** 2

    def searches(points):
        balls = point_ops.ball_query(points, points, 0.3, 6)
        return point_ops.knn(points, points, 4), balls, *point_ops.three_nearest(points, points.flip(2))

    for whole, *parts in zip(searches(points), searches(points[:1]), searches(points[1:])):
        assert torch.equal(whole, torch.cat(parts))


def operate(coords, features):
    """All operators with sums: voxelize, devoxelize, group, interpolate."""
    places = point_ops.normalize_coords(coords, 6)
    centers = point_ops.gather(coords, point_ops.furthest_point_sample(coords, 9))
    index = point_ops.ball_query(coords, centers, 0.5, 8)
    grouped = point_ops.group(coords, centers, features, index)
    return (point_ops.devoxelize(point_ops.voxelize(features, places, 6), places),
            point_ops.interpolate(coords, centers, grouped.amax(-1)))  # fmt: skip


def test_the_same_every_time_also_where_torch_demands_it():
    torch.manual_seed(0)
    coords, features = torch.randn(2, 3, 500), torch.randn(2, 8, 500)
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            x = features.clone().requires_grad_()
            out = operate(coords, x)
            sum(o.square().sum() for o in out).backward()
            runs.append([*out, x.grad])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_bfloat16_features_are_summed_in_float32():
    torch.manual_seed(0)
    coords, features = torch.randn(2, 3, 3000) * 0.01, torch.rand(2, 4, 3000).bfloat16()
    places = point_ops.normalize_coords(coords, 2)
    grid = point_ops.voxelize(features, places, 2)
    assert grid.dtype == torch.bfloat16
    close(grid, point_ops.voxelize(features.float(), places, 2).bfloat16(), 0)
    assert point_ops.devoxelize(grid, places).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(point_ops.knn(features.float(), features.float(), 3), point_ops.knn(features, features, 3))
        assert point_ops.squared_distances(features, features).dtype == torch.float32
    assert point_ops.normalize_coords(coords.bfloat16(), 32).dtype == torch.float32


@pytest.mark.parametrize("num_points", [1, 2, 5])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_few_or_coinciding_points_give_finite_values(num_points, spread):
    torch.manual_seed(0)
    coords, features = torch.randn(2, 3, num_points) * spread + 3, torch.randn(2, 4, num_points).requires_grad_()
    out = operate(coords, features)
    sum(o.sum() for o in out).backward()
    assert all(o.isfinite().all() for o in out)
    assert features.grad.isfinite().all()
    assert point_ops.knn(coords, coords, 8).shape == (2, num_points, 8)


def test_an_empty_ball_is_all_zeros_and_a_sparse_one_repeats_its_first():
    coords = torch.tensor([[[5.0, 0.0, 0.1, 9.0], [0.0] * 4, [0.0] * 4]])
    centers = torch.tensor([[[0.0, 50.0], [0.0, 0.0], [0.0, 0.0]]])
    assert point_ops.ball_query(coords, centers, 1.0, 4).tolist() == [[[1, 2, 1, 1], [0, 0, 0, 0]]]
    assert point_ops.ball_query(coords, centers, 5.0, 2).tolist() == [[[1, 2], [0, 0]]]  # strictly nearer


def test_the_operators_export():
    class All(torch.nn.Module):
        def forward(self, coords, features):
            return operate(coords, features)

    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 64), torch.randn(2, 4, 64)
    exported = torch.export.export(All().eval(), inputs).module()
    for ours, theirs in zip(operate(*inputs), exported(*inputs)):
        close(ours, theirs)
