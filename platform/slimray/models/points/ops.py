"""Operators on point clouds in torch: CPU and GPU, differentiable, exportable, no compiled extension.

Features are `[B, C, N]`, coordinates `[B, 3, N]`, indices int64. Voxelization and devoxelization are from Point-Voxel
CNN (arXiv 1907.03739), sampling, grouping and interpolation from PointNet++ (1706.02413); indices and ties are those of
the published kernels. Internally points and voxels are rows `[B * N, C]`, so that a neighbour is one contiguous read;
grids and groups are returned in channels-last memory. Coordinates, counts and sums are float32 for any type of
features. Sums have a fixed order on a CPU, and on CUDA under `torch.use_deterministic_algorithms(True)`. On CUDA the
Triton kernels of kernels.py are used where they are faster and equivalent; `SLIMRAY_POINT_KERNELS=0` disables them.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MAX_DISTANCES = 2**22  # distances that a search holds at a time, 16 MB
CACHE_LINE = 16  # floats
MIN_CAPABILITY = (8, 0)  # minimum compute capability of a GPU for the Triton kernels
KERNEL_THREADS = 512  # in the published sampling kernel, the lowest index modulo its threads wins ties


# ------------------------------------------------------------------------------------------------ kernels


@cache
def _triton_kernels() -> Any:
    wanted = os.environ.get("SLIMRAY_POINT_KERNELS", "1") != "0" and importlib.util.find_spec("triton") is not None
    return importlib.import_module("slimray.models.points.kernels") if wanted else None


def _kernels(x: Tensor, *, adds: bool = False) -> Any:
    """Return the module of kernels if they can be used for `x`, else None; kernels that `adds` have no fixed order."""
    if x.device.type != "cuda" or not x.numel() or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return None
    if (adds and torch.are_deterministic_algorithms_enabled()) or x.device.index != torch.cuda.current_device():
        return None  # kernels are launched on the current device, which may not be that of the tensors
    return _triton_kernels() if torch.cuda.get_device_capability(x.device) >= MIN_CAPABILITY else None


# ------------------------------------------------------------------------------------------------ rows


def _to_rows(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return `[B, C, N]`, times `scale` `[B, 1, N]`, as contiguous rows `[B * N, C]`; no copy from channels-last."""
    rows = x.transpose(1, 2)
    if rows.is_contiguous() or x.device.type != "cpu" or torch.compiler.is_exporting():
        rows = rows if scale is None else rows.float() * scale.transpose(1, 2)
        return rows.contiguous().flatten(0, 1)
    rows = torch.empty(rows.shape, dtype=x.dtype if scale is None else torch.float32)
    # Channels a power of two apart share a few cache lines; copying them to another spacing first halves the time.
    apart = torch.empty(x.shape[1], x.shape[2] + CACHE_LINE, dtype=rows.dtype)[:, : x.shape[2]]
    for number, sample in enumerate(x):
        apart.copy_(sample) if scale is None else torch.mul(sample, scale[number], out=apart)
        rows[number].copy_(apart.T)
    return rows.flatten(0, 1)


def _row_numbers(index: Tensor, size: int) -> Tensor:
    """Convert `index` `[B, ...]` into `size` rows per sample to an index into the rows of the whole batch."""
    start = torch.arange(index.shape[0], device=index.device, dtype=index.dtype) * size
    return index + start.view(-1, *[1] * (index.ndim - 1))


def _count(rows: Tensor, size: int) -> Tensor:
    """Return how often each of `size` numbers occurs in `rows`, in the type of `rows`; slow on a CPU if sorted."""
    return torch.zeros(size, dtype=rows.dtype, device=rows.device).index_add_(0, rows, torch.ones_like(rows))


def _collect(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return `sum_k weights[k, n] * x[index[k, n]]`: `[B, C, M]`, index and weights `[B, K, N]` -> `[B, C, N]`."""
    batch, channels, size = x.shape
    table, rows = _to_rows(x).float(), _to_rows(_row_numbers(index, size))
    if torch.compiler.is_exporting():  # other runtimes support int64 indices of whole rows, few have embedding_bag
        taken = table.index_select(0, rows.long().flatten()).view(*rows.shape, channels)
        out = (taken * _to_rows(weights)[..., None]).sum(1)
    else:
        out = F.embedding_bag(rows, table, mode="sum", per_sample_weights=_to_rows(weights))
    return out.view(batch, -1, channels).transpose(1, 2).to(x.dtype)


def _spread(x: Tensor, index: Tensor, weights: Tensor, size: int) -> Tensor:
    """Apply the transpose of `_collect`: add `weights[k, n] * x[n]` to row `index[k, n]`, giving `[B, C, size]`."""
    if torch.compiler.is_exporting() or x.device.type != "cpu" or len(x) == 1:
        out = _spread_rows(x, index, weights, size)
    else:  # one sample at a time stays in the cache, and a batch is slow to sort
        out = torch.empty(x.shape[0] * size, x.shape[1])
        for rows, part, where, weight in zip(out.split(size), x.split(1), index.split(1), weights.split(1)):
            _spread_rows(part, where, weight, size, rows)
    return out.view(x.shape[0], size, -1).transpose(1, 2).to(x.dtype)


def _spread_rows(x: Tensor, index: Tensor, weights: Tensor, size: int, out: Tensor | None = None) -> Tensor:
    """Return `[B * size, C]` in float32. Several rows per point are sorted before the sum, to fix its order."""
    rows, total = _to_rows(_row_numbers(index, size)), x.shape[0] * size
    if index.shape[1] == 1:
        out = torch.empty(total, x.shape[1], device=x.device) if out is None else out
        return out.zero_().index_add_(0, rows[:, 0], _to_rows(x, weights))
    each, rows = rows.shape[1], rows.flatten()
    order = (rows.short() if total <= 2**15 else rows).sort(stable=True).indices  # fewer bytes, less time
    counts = _count(rows, total)
    sums = F.embedding_bag(
        order >> 3 if each == 8 else order // each,  # a shift takes a quarter of the time
        _to_rows(x).float(),
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=_to_rows(weights).flatten().index_select(0, order),
    )
    return sums if out is None else out.copy_(sums)


class _WeightedSum(torch.autograd.Function):
    """`_collect`, or with a `size` `_spread`; each is the gradient of the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weights: Tensor, size: int | None) -> Tensor:
        ctx.save_for_backward(index, weights)
        ctx.collected = x.shape[2] if size is None else None
        return _collect(x, index, weights) if size is None else _spread(x, index, weights, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (index, weights), size = ctx.saved_tensors, ctx.collected
        grad = _collect(grads[0], index, weights) if size is None else _spread(grads[0], index, weights, size)
        return grad, None, None, None


def _weighted_sum(x: Tensor, index: Tensor, weights: Tensor, size: int | None = None) -> Tensor:
    if torch.compiler.is_exporting():
        return _collect(x, index, weights) if size is None else _spread(x, index, weights, size)
    return _WeightedSum.apply(x, index, weights, size)  # type: ignore[return-value]


class _Rows(torch.autograd.Function):
    """`_to_rows` for autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.batch = x.shape[0]
        return _to_rows(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].unflatten(0, (ctx.batch, -1)).transpose(1, 2)


def gather(features: Tensor, index: Tensor) -> Tensor:
    """Return `features` `[B, C, N]` at `index` `[B, ...]` as `[B, C, ...]` in channels-last memory. Differentiable."""
    rows = _row_numbers(index, features.shape[2]).flatten()
    table: Any = _to_rows(features) if torch.compiler.is_exporting() else _Rows.apply(features)
    taken = table.index_select(0, rows)
    return taken.view(*index.shape, features.shape[1]).movedim(-1, 1)


# ------------------------------------------------------------------------------------------------ voxels


@torch.no_grad()
def normalize_coords(coords: Tensor, resolution: int, normalize: bool = True, eps: float = 0.0) -> Tensor:
    """Return coordinates in units of voxels, float32 in [0, resolution - 1]; without gradient.

    They are centred on the mean of the points and divided by twice the largest distance from it (+ `eps`); without
    `normalize` they are assumed to lie in the unit ball. If all points coincide, they are in the middle.
    """
    centred = coords.float() - coords.float().mean(2, keepdim=True)
    if normalize:
        size = centred.square().sum(1, keepdim=True).sqrt().amax(2, keepdim=True) * 2 + eps
        unit = centred / size.clamp_min(torch.finfo(torch.float32).tiny) + 0.5
    else:
        unit = (centred + 1) / 2
    return (unit * resolution).clamp(0, resolution - 1)


def voxel_index(voxel_coords: Tensor, resolution: int) -> Tensor:
    """Return the voxel nearest to each point, rounding half to even, as x * R^2 + y * R + z, int64 `[B, N]`.

    NaN coordinates count as 0; interpolating at them gives NaN, so that the training step is dropped.
    """
    x, y, z = voxel_coords.detach().round().nan_to_num(0.0).long().unbind(1)
    return (x * resolution + y) * resolution + z


def voxelize(features: Tensor, voxel_coords: Tensor, resolution: int) -> Tensor:
    """Return the mean features of each voxel's points, 0 without points: `[B, C, N]` -> `[B, C, R, R, R]`.

    `voxel_coords` are those of `normalize_coords`. Axes are x, y, z. Differentiable in the features.
    """
    if kernels := _kernels(features, adds=True):
        return kernels.voxelize(features, voxel_coords, resolution)
    index, size = voxel_index(voxel_coords, resolution), resolution**3
    rows = _row_numbers(index, size).flatten()
    shares = _count(rows, index.shape[0] * size).index_select(0, rows).float().reciprocal().view_as(index)
    return _weighted_sum(features, index[:, None], shares[:, None], size).unflatten(2, [resolution] * 3)


@torch.no_grad()
def trilinear_corners(voxel_coords: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Return the eight voxels around each point and their weights: int32 and float32 `[B, 8, N]`.

    The order is 000, 001 ... 111, where the last bit is z. For an integer coordinate the upper corner equals the lower
    one. A NaN coordinate has voxel 0 and NaN weights.
    """
    low, high = voxel_coords.floor(), voxel_coords.ceil()
    part = voxel_coords - low
    low, high = low.nan_to_num(0.0), high.nan_to_num(0.0)
    strides = torch.tensor([[resolution**2], [resolution], [1]], dtype=torch.int32, device=low.device)
    x, y, z = (torch.stack([low, high], 1).int() * strides).unbind(2)  # [B, 2, N] each
    u, v, w = torch.stack([1 - part, part], 1).unbind(2)
    index = x[:, :, None, None] + (y[:, :, None] + z[:, None])[:, None]
    weights = (u[:, :, None] * v[:, None])[:, :, :, None] * w[:, None, None]
    return index.flatten(1, 3), weights.flatten(1, 3)


def devoxelize(grid: Tensor, voxel_coords: Tensor) -> Tensor:
    """Interpolate `grid` trilinearly at the points: `[B, C, R, R, R]` -> `[B, C, N]`; same values as `grid_sample`.

    `voxel_coords` are those of `normalize_coords`, not rounded. Differentiable in the grid.
    """
    if kernels := _kernels(grid, adds=True):
        return kernels.devoxelize(grid, voxel_coords)
    return _weighted_sum(grid.flatten(2), *trilinear_corners(voxel_coords.detach().float(), grid.shape[-1]))


# ------------------------------------------------------------------------------------------------ neighbours


def squared_distances(points: Tensor, queries: Tensor) -> Tensor:
    """Return squared Euclidean distances in float32: `[B, D, N]`, `[B, D, M]` -> `[B, M, N]`.

    For up to three dimensions they are summed exactly as in the published kernels, for more by a matrix product.
    """
    points, queries = points.float(), queries.float()
    if points.shape[1] <= 3:
        return sum((q[:, :, None] - p[:, None]).square_() for p, q in zip(points.unbind(1), queries.unbind(1)))  # type: ignore[return-value]
    with torch.autocast(points.device.type, enabled=False):
        products = queries.transpose(1, 2) @ points
    squares = queries.square().sum(1)[:, :, None] + points.square().sum(1)[:, None]
    return (squares - 2 * products).clamp_min(0)


def _search(points: Tensor, queries: Tensor, find: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `find(distances [B, m, N])` for one slice of the queries at a time, concatenated along dimension 1."""
    if torch.compiler.is_exporting():  # the number of slices would depend on the shape
        return find(squared_distances(points, queries))
    step = max(1, MAX_DISTANCES // (points.shape[0] * points.shape[2]))
    return torch.cat([find(squared_distances(points, some)) for some in queries.split(step, 2)], 1)


def ascending(keys: Tensor) -> Tensor:
    """Return indices that sort distinct `keys` `[..., N]`; exported as topk, because ExecuTorch has no sort."""
    if torch.compiler.is_exporting():
        return keys.topk(keys.shape[-1], largest=False).indices
    return keys.argsort(-1)


@torch.no_grad()
def furthest_point_sample(coords: Tensor, num_centers: int) -> Tensor:
    """Return indices `[B, num_centers]` of points, each the furthest from those before it, starting with the first.

    Among equally distant points the lowest index modulo 512 wins, then the lowest index, as in the published kernel. If
    there are more centres than points, points are repeated.
    """
    batch, _, num_points = coords.shape
    number = torch.arange(num_points, device=coords.device)
    order = ascending(number % KERNEL_THREADS * num_points + number // KERNEL_THREADS)
    points = coords.float()[:, :, order]
    if (kernels := _kernels(points)) and num_points <= kernels.MAX_SAMPLED:
        return kernels.furthest_point_sample(points, order, num_centers)
    nearest = torch.full((batch, num_points), 1e38, device=coords.device)
    last = torch.zeros(batch, 1, dtype=torch.int64, device=coords.device)

    def further(nearest: Tensor, last: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        center = points.gather(2, last[:, None].expand(-1, 3, -1))
        nearest = torch.minimum(nearest, (points - center).square().sum(1))
        return nearest, nearest.argmax(1, keepdim=True)

    if torch.compiler.is_exporting():  # one loop in the graph instead of a thousand copies of its body
        return order[_looped(further, nearest, last, points, num_centers)]
    chosen = [last]
    for _ in range(num_centers - 1):
        nearest, last = further(nearest, last, points)
        chosen.append(last)
    return order[torch.cat(chosen, 1)]


def _looped(
    step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], first: Tensor, last: Tensor, seen: Tensor, num: int
) -> Tensor:
    """Return `last` `[B, 1]` and the results of `num - 1` further steps, `[B, num]`, as one loop of an exported graph.

    All inputs of a step are carried along, and the zero of each step is used, because OpenVINO's loops cannot see
    values outside, and run only once if no step has an input of its own.
    """
    from torch._higher_order_ops.scan import scan

    def body(carry: tuple[Tensor, Tensor, Tensor], zero: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        first, last = step(*carry)
        return (first, last, carry[2].clone()), last + zero

    if num == 1:
        return last
    _, later = scan(body, (first, last, seen), torch.zeros(num - 1, 1, dtype=last.dtype, device=first.device))
    return torch.cat([last, later[:, :, 0].T], 1)


@torch.no_grad()
def ball_query(coords: Tensor, centers: Tensor, radius: float, num_neighbors: int) -> Tensor:
    """Return indices `[B, M, num_neighbors]` of the first points, by index, that are closer to a centre than `radius`.

    If there are fewer, the first is repeated; if there is none, all are 0.
    """
    limit = float(np.square(np.float32(radius)))
    if kernels := _kernels(centers):
        return kernels.ball_query(coords, centers, limit, num_neighbors)
    places = torch.arange(1, num_neighbors + 1, dtype=torch.int32, device=coords.device)
    number = torch.arange(coords.shape[2], device=coords.device)

    def find(distances: Tensor) -> Tensor:
        if torch.compiler.is_exporting():  # few runtimes have searchsorted; needs as many points as neighbours
            inside = torch.where(distances < limit, number, number.shape[0])
            return inside.topk(num_neighbors, largest=False).values
        rank = (distances < limit).cumsum(-1, dtype=torch.int32)
        return torch.searchsorted(rank, places.expand(*rank.shape[:2], -1).contiguous())

    found, num_points = _search(coords, centers, find), coords.shape[2]
    first = found[:, :, :1]
    return torch.where(found < num_points, found, first.where(first < num_points, 0))


@torch.no_grad()
def knn(points: Tensor, queries: Tensor, num_neighbors: int) -> Tensor:
    """Return indices `[B, M, num_neighbors]` of the points `[B, D, N]` nearest to each query `[B, D, M]`, in order.

    The order of equally near points is undefined. If there are fewer points than neighbours, they are repeated in turn.
    """
    num = num_neighbors if torch.compiler.is_exporting() else min(num_neighbors, points.shape[2])
    found = _search(points, queries, lambda distances: distances.topk(num, largest=False).indices)
    return found if num == num_neighbors else found[:, :, torch.arange(num_neighbors, device=found.device) % num]


@torch.no_grad()
def three_nearest(coords: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the three centres nearest to each point and their weights by inverse squared distance, both `[B, 3, N]`.

    Among equally near centres the lowest index comes first. Squared distances are clamped to [1e-10, 1e10]; a missing
    centre (M < 3) counts as index 0 at 1e10.
    """

    def find(distances: Tensor) -> Tensor:
        found = []
        for _ in range(min(3, distances.shape[2])):
            found.append(distances.argmin(2, keepdim=True))
            distances.scatter_(2, found[-1], torch.inf)
        return torch.cat(found, 2)

    index = _search(centers, coords, find)
    x, y, z = (gather(centers.float(), index) - coords.float()[..., None]).square_().unbind(1)
    missing = 3 - index.shape[2]
    index, distances = F.pad(index, (0, missing)), F.pad(x + y + z, (0, missing), value=1e10)
    inverse = distances.clamp(1e-10, 1e10).reciprocal()
    return index.transpose(1, 2), (inverse / inverse.sum(2, keepdim=True)).transpose(1, 2)


def interpolate(coords: Tensor, centers: Tensor, center_features: Tensor) -> Tensor:
    """Interpolate features of points from their three nearest centres: `[B, C, M]` -> `[B, C, N]`.

    Differentiable in the features, not in the coordinates.
    """
    return _weighted_sum(center_features, *three_nearest(coords, centers))


def group(coords: Tensor, centers: Tensor, features: Tensor | None, index: Tensor) -> Tensor:
    """Return `[neighbour - centre, features]` `[B, 3 + C, M, K]` of the points `index` `[B, M, K]`. Differentiable."""
    relative = gather(coords.float(), index) - centers.float()[..., None]
    return relative if features is None else torch.cat([relative.to(features.dtype), gather(features, index)], 1)
