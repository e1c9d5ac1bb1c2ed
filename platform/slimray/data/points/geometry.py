"""Geometry of neighbouring points, by Open3D: normals, a spread-out subset; also unpacks compressed PCD files.

Open3D is imported only here, and late, because that takes seconds.
"""

import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from slimray.data.samples import BadSample


def _open3d() -> Any:
    try:
        import open3d
    except ImportError:
        raise BadSample("needs Open3D, not installed here: pip install 'slimray[train]'") from None

    open3d.utility.set_verbosity_level(open3d.utility.VerbosityLevel.Error)
    return open3d


def estimate_normals(coords: np.ndarray, neighbours: int = 16) -> np.ndarray:
    """Estimate unit normals, float32 `[N, 3]`, from the nearest neighbours, pointing away from the cloud's centre."""
    o3d = _open3d()
    cloud = o3d.t.geometry.PointCloud(o3d.core.Tensor(np.ascontiguousarray(coords, np.float32)))
    cloud.estimate_normals(max_nn=neighbours)
    normals = cloud.point.normals.numpy()
    outward = ((coords - coords.mean(0)) * normals).sum(1, keepdims=True)
    return np.where(outward < 0, -normals, normals).astype(np.float32)


def farthest_points(coords: np.ndarray, num_points: int) -> np.ndarray:
    """Return the ascending rows, int64 `[num_points]`, of a subset found by farthest point sampling.

    It starts at row 0 and takes time proportional to N times num_points: about 1 s for 1,024 of 20,000.
    """
    o3d = _open3d()
    cloud = o3d.t.geometry.PointCloud(o3d.core.Tensor(np.ascontiguousarray(coords, np.float32)))
    cloud.point["row"] = o3d.core.Tensor(np.arange(len(coords))[:, None])
    return cloud.farthest_point_down_sample(num_points).point["row"].numpy()[:, 0]


def unpack_lzf(packed: bytes, size: int) -> bytes:
    """Unpack the LZF stream of a compressed PCD to `size` bytes. Raises BadSample.

    Open3D reads it with a header written here, as points of four single bytes, because some headers of files crash the
    process. Bytes missing for a whole point are added to the stream as a run of zeros.
    """
    missing = -size % 4
    points = (size + missing) // 4
    packed += bytes([missing - 1, *[0] * missing]) if missing else b""
    header = "VERSION .7\nFIELDS x y z w\nSIZE 1 1 1 1\nTYPE U U U U\nCOUNT 1 1 1 1\nVIEWPOINT 0 0 0 1 0 0 0\n"
    header += f"WIDTH {points}\nHEIGHT 1\nPOINTS {points}\nDATA binary_compressed\n"
    with on_disk(header.encode() + struct.pack("<2I", len(packed), points * 4) + packed, ".pcd") as path:
        read = _open3d().t.io.read_point_cloud(path, remove_nan_points=False, remove_infinite_points=False).point
    if "positions" not in read or len(read.positions) != points:
        raise BadSample("the packed points cannot be unpacked")
    return np.concatenate([*read.positions.numpy().T, read["w"].numpy()[:, 0]]).tobytes()[:size]


@contextmanager
def on_disk(data: bytes, suffix: str) -> Iterator[str]:
    """Provide a temporary file of these bytes, for libraries that cannot read from memory, or only slowly."""
    with tempfile.TemporaryDirectory(prefix="slimray-") as folder:
        path = Path(folder) / f"cloud{suffix}"
        path.write_bytes(data)
        yield str(path)
