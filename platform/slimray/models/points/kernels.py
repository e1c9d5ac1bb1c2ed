# type: ignore
# ruff: noqa: N803, as constants of a kernel are in capitals and pyright knows no kernels
"""Triton kernels for operators on points that plain torch runs far below the memory bandwidth of a GPU.

Each computes the same as the operator of the same name in ops.py, where the conventions are explained and the kernels
are selected: sampling and ball query are equal bit for bit, sums up to the order of float32 additions. Grids are rows
`[B * R^3, C]`, so that a voxel is one contiguous read. Only for tensors on a CUDA device.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

POINTS, CHANNELS = 32, 64  # a tile of features
COORDS = 256  # points counted by a program
MAX_SAMPLED = 2**14  # points of a cloud that one program holds in registers
CENTERS, SCANNED = 16, 128  # a tile of distances
NO_INDEX = tl.constexpr(2**31 - 1)


# ------------------------------------------------------------------------------------------------ voxels


@triton.jit
def _count_kernel(coords, counts, rows, size, resolution, BLOCK: tl.constexpr):
    """Compute the voxel of each point, as a row of the batch, and the number of points of each voxel."""
    sample = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < size
    at = coords + sample * 3 * size + n
    row = tl.zeros([BLOCK], tl.int32) + sample
    for axis in tl.static_range(3):
        place = tl.load(at + axis * size, inside, other=0.0)
        low = tl.floor(place)
        part, low = place - low, low.to(tl.int32)
        up = (part > 0.5) | ((part == 0.5) & (low % 2 == 1))  # round half to even
        row = row * resolution + tl.minimum(tl.maximum(low + up.to(tl.int32), 0), resolution - 1)
    tl.store(rows + sample * size + n, row, inside)
    tl.atomic_add(counts + row, 1, inside, sem="relaxed")


@triton.jit
def _scatter_mean_kernel(x, rows, counts, grid, size, channels, N: tl.constexpr, C: tl.constexpr):
    """Add every point's features, divided by its voxel's count, to the voxel: x `[B, C, N]` -> grid `[B * R^3, C]`."""
    sample = tl.program_id(1).to(tl.int64)
    n, c = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(2) * C + tl.arange(0, C)
    inside, known = n < size, c < channels
    row = tl.load(rows + sample * size + n, inside, other=0).to(tl.int64)
    share = 1.0 / tl.load(counts + row, inside, other=1).to(tl.float32)
    both = inside[:, None] & known[None, :]
    values = tl.load(x + sample * channels * size + c[None, :].to(tl.int64) * size + n[:, None], both, other=0.0)
    values = values.to(tl.float32) * share[:, None]
    tl.atomic_add(grid + row[:, None] * channels + c[None, :], values, both, sem="relaxed")


@triton.jit
def _gather_mean_kernel(grid, rows, counts, x, size, channels, N: tl.constexpr, C: tl.constexpr):
    """Compute the gradient of `_scatter_mean_kernel`: each point gets its voxel's gradient divided by the count."""
    sample = tl.program_id(1).to(tl.int64)
    n, c = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(2) * C + tl.arange(0, C)
    inside, known = n < size, c < channels
    row = tl.load(rows + sample * size + n, inside, other=0).to(tl.int64)
    share = 1.0 / tl.load(counts + row, inside, other=1).to(tl.float32)
    both = inside[:, None] & known[None, :]
    values = tl.load(grid + row[:, None] * channels + c[None, :], both, other=0.0).to(tl.float32) * share[:, None]
    tl.store(x + sample * channels * size + c[None, :].to(tl.int64) * size + n[:, None], values, both)


@triton.jit
def _along(coords, axis, n, inside, size, last):
    """Return the lower and upper voxel along an axis, at most `last`, and the weight of the upper one."""
    place = tl.load(coords + axis * size + n, inside, other=0.0)
    low = tl.floor(place)
    lower, upper = low.to(tl.int32), tl.ceil(place).to(tl.int32)
    lower, upper = tl.minimum(tl.maximum(lower, 0), last), tl.minimum(tl.maximum(upper, 0), last)
    return lower, upper, place - low


@triton.jit
def _interpolate_kernel(grid, coords, x, size, channels, resolution, N: tl.constexpr, C: tl.constexpr):
    """Sum each point's eight corners, weighted: grid `[B * R^3, C]` -> x `[B, C, N]`."""
    sample = tl.program_id(1).to(tl.int64)
    n, c = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(2) * C + tl.arange(0, C)
    inside, known = n < size, c < channels
    both = inside[:, None] & known[None, :]
    x0, x1, u = _along(coords + sample * 3 * size, 0, n, inside, size, resolution - 1)
    y0, y1, v = _along(coords + sample * 3 * size, 1, n, inside, size, resolution - 1)
    z0, z1, w = _along(coords + sample * 3 * size, 2, n, inside, size, resolution - 1)
    total = tl.zeros([N, C], tl.float32)
    for corner in tl.static_range(8):  # the last bit is z
        weight = (u if corner & 4 else 1 - u) * (v if corner & 2 else 1 - v) * (w if corner & 1 else 1 - w)
        plane = (sample * resolution + (x1 if corner & 4 else x0)) * resolution + (y1 if corner & 2 else y0)
        row = plane * resolution + (z1 if corner & 1 else z0)
        values = tl.load(grid + row[:, None] * channels + c[None, :], both & (weight[:, None] > 0), other=0.0)
        total += weight[:, None] * values.to(tl.float32)
    tl.store(x + sample * channels * size + c[None, :].to(tl.int64) * size + n[:, None], total, both)


@triton.jit
def _interpolate_back_kernel(x, coords, grid, size, channels, resolution, N: tl.constexpr, C: tl.constexpr):
    """Compute the gradient of `_interpolate_kernel`: each point adds to its eight corners."""
    sample = tl.program_id(1).to(tl.int64)
    n, c = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(2) * C + tl.arange(0, C)
    inside, known = n < size, c < channels
    both = inside[:, None] & known[None, :]
    at = x + sample * channels * size + c[None, :].to(tl.int64) * size + n[:, None]
    values = tl.load(at, both, other=0.0).to(tl.float32)
    x0, x1, u = _along(coords + sample * 3 * size, 0, n, inside, size, resolution - 1)
    y0, y1, v = _along(coords + sample * 3 * size, 1, n, inside, size, resolution - 1)
    z0, z1, w = _along(coords + sample * 3 * size, 2, n, inside, size, resolution - 1)
    for corner in tl.static_range(8):  # the last bit is z
        weight = (u if corner & 4 else 1 - u) * (v if corner & 2 else 1 - v) * (w if corner & 1 else 1 - w)
        plane = (sample * resolution + (x1 if corner & 4 else x0)) * resolution + (y1 if corner & 2 else y0)
        row = plane * resolution + (z1 if corner & 1 else z0)
        place = grid + row[:, None] * channels + c[None, :]
        tl.atomic_add(place, values * weight[:, None], both & (weight[:, None] > 0), sem="relaxed")


def _tiles(batch: int, size: int, channels: int) -> tuple[tuple[int, int, int], int]:
    """Return the launch grid over tiles of POINTS x C features, and C."""
    width = min(CHANNELS, max(16, triton.next_power_of_2(channels)))
    return (triton.cdiv(size, POINTS), batch, triton.cdiv(channels, width)), width


def _as_rows(grid: Tensor) -> Tensor:
    """Return `[B, C, R, R, R]` as contiguous rows `[B * R^3, C]`; no copy if memory is channels-last."""
    return grid.flatten(2).transpose(1, 2).contiguous().flatten(0, 1)


def _as_grid(rows: Tensor, batch: int, resolution: int) -> Tensor:
    return rows.view(batch, resolution, resolution, resolution, -1).movedim(-1, 1)


class _Voxelize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, coords: Tensor, resolution: int) -> Tensor:
        (batch, channels, size), voxels = features.shape, resolution**3
        features, coords = features.contiguous(), coords.contiguous()
        counts = torch.zeros(batch * voxels, dtype=torch.int32, device=features.device)
        rows = torch.empty(batch, size, dtype=torch.int32, device=features.device)
        grid = torch.zeros(batch * voxels, channels, device=features.device)
        _count_kernel[(triton.cdiv(size, COORDS), batch)](coords, counts, rows, size, resolution, COORDS)
        tiles, width = _tiles(batch, size, channels)
        _scatter_mean_kernel[tiles](features, rows, counts, grid, size, channels, POINTS, width)
        ctx.save_for_backward(rows, counts)
        return _as_grid(grid.to(features.dtype), batch, resolution)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rows, counts), (batch, channels) = ctx.saved_tensors, grads[0].shape[:2]
        out = torch.empty(batch, channels, rows.shape[1], dtype=grads[0].dtype, device=rows.device)
        tiles, width = _tiles(*rows.shape, channels)
        _gather_mean_kernel[tiles](_as_rows(grads[0]), rows, counts, out, rows.shape[1], channels, POINTS, width)
        return out, None, None


class _Devoxelize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grid: Tensor, coords: Tensor) -> Tensor:
        (batch, channels, resolution), size = grid.shape[:3], coords.shape[2]
        out = torch.empty(batch, channels, size, dtype=grid.dtype, device=grid.device)
        coords = coords.contiguous()
        tiles, width = _tiles(batch, size, channels)
        _interpolate_kernel[tiles](_as_rows(grid), coords, out, size, channels, resolution, POINTS, width)
        ctx.save_for_backward(coords)
        ctx.resolution = resolution
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (coords,), resolution, grad = ctx.saved_tensors, ctx.resolution, grads[0].contiguous()
        batch, channels, size = grad.shape
        rows = torch.zeros(batch * resolution**3, channels, device=grad.device)
        tiles, width = _tiles(batch, size, channels)
        _interpolate_back_kernel[tiles](grad, coords, rows, size, channels, resolution, POINTS, width)
        return _as_grid(rows.to(grad.dtype), batch, resolution), None


def voxelize(features: Tensor, voxel_coords: Tensor, resolution: int) -> Tensor:
    """`[B, C, N]`, `[B, 3, N]` -> `[B, C, R, R, R]` in channels-last memory; differentiable in the features."""
    return _Voxelize.apply(features, voxel_coords.detach().float(), resolution)


def devoxelize(grid: Tensor, voxel_coords: Tensor) -> Tensor:
    """`[B, C, R, R, R]`, `[B, 3, N]` -> `[B, C, N]`; differentiable in the grid."""
    return _Devoxelize.apply(grid, voxel_coords.detach().float())


# ------------------------------------------------------------------------------------------------ neighbours


@triton.jit
def _sample_kernel(points, order, chosen, size, num_centers: tl.constexpr, N: tl.constexpr):
    """Sample one cloud `[3, N]`, held in registers; `order` has the index of each place, the first place wins ties."""
    sample = tl.program_id(0)
    points, chosen = points + sample * 3 * size, chosen + sample.to(tl.int64) * num_centers
    n = tl.arange(0, N)
    inside = n < size
    x = tl.load(points + n, inside, other=0.0)
    y = tl.load(points + size + n, inside, other=0.0)
    z = tl.load(points + 2 * size + n, inside, other=0.0)
    nearest = tl.where(inside, 1e38, -1.0)
    last = 0
    for i in range(num_centers):
        tl.store(chosen + i, tl.load(order + last))
        dx, dy, dz = (
            x - tl.load(points + last),
            y - tl.load(points + size + last),
            z - tl.load(points + 2 * size + last),
        )
        nearest = tl.minimum(nearest, dx * dx + dy * dy + dz * dz)
        nearest = tl.where(inside, nearest, -1.0)
        last = tl.argmax(nearest, 0, tie_break_left=True)


def furthest_point_sample(points: Tensor, order: Tensor, num_centers: int) -> Tensor:
    """Return indices `[B, num_centers]` of `points`, float32 `[B, 3, N]` already in `order` `[N]`; the first wins ties.

    N is at most MAX_SAMPLED.
    """
    batch, _, size = points.shape
    chosen = torch.empty(batch, num_centers, dtype=torch.int64, device=points.device)
    block = triton.next_power_of_2(size)
    _sample_kernel[(batch,)](
        points.contiguous(),
        order,
        chosen,
        size,
        num_centers,
        block,
        num_warps=max(4, min(16, block // 128)),
        enable_fp_fusion=False,
    )
    return chosen


@triton.jit
def _ball_kernel(
    points, centers, limit, found, size, num_centers, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):  # a tile of M centres scans the points until each centre has K
    sample = tl.program_id(1)
    points, centers = points + sample * 3 * size, centers + sample * 3 * num_centers
    m = tl.program_id(0) * M + tl.arange(0, M)
    real = m < num_centers
    cx = tl.load(centers + m, real, other=0.0)[:, None]
    cy = tl.load(centers + num_centers + m, real, other=0.0)[:, None]
    cz = tl.load(centers + 2 * num_centers + m, real, other=0.0)[:, None]
    at = found + sample.to(tl.int64) * num_centers * K + m[:, None].to(tl.int64) * K
    count, first = tl.where(real, 0, K), tl.zeros([M], tl.int32) + NO_INDEX
    start = 0
    while (start < size) & (tl.min(count, 0) < K):
        n = start + tl.arange(0, N)
        inside = n < size
        dx = cx - tl.load(points + n, inside, other=0.0)[None, :]
        dy = cy - tl.load(points + size + n, inside, other=0.0)[None, :]
        dz = cz - tl.load(points + 2 * size + n, inside, other=0.0)[None, :]
        near = (dx * dx + dy * dy + dz * dz < limit) & inside[None, :] & real[:, None]
        rank = count[:, None] + tl.cumsum(near.to(tl.int32), 1) - 1
        tl.store(at + rank, n[None, :].to(tl.int64) + tl.zeros([M, 1], tl.int64), near & (rank < K))
        first = tl.minimum(first, tl.min(tl.where(near, n[None, :], NO_INDEX), 1))
        count += tl.sum(near.to(tl.int32), 1)
        start += N
    first = tl.where(first == NO_INDEX, 0, first).to(tl.int64)
    for k in range(K):
        tl.store(at + k, first[:, None], (real & (count <= k))[:, None])


def ball_query(coords: Tensor, centers: Tensor, limit: float, num_neighbors: int) -> Tensor:
    """Return indices `[B, M, num_neighbors]` for coords `[B, 3, N]`, centers `[B, 3, M]`; `limit` is radius squared."""
    (batch, _, size), num_centers = coords.shape, centers.shape[2]
    found = torch.empty(batch, num_centers, num_neighbors, dtype=torch.int64, device=coords.device)
    _ball_kernel[(triton.cdiv(num_centers, CENTERS), batch)](
        coords.float().contiguous(),
        centers.float().contiguous(),
        limit,
        found,
        size,
        num_centers,
        num_neighbors,
        CENTERS,
        SCANNED,
        enable_fp_fusion=False,
    )
    return found
