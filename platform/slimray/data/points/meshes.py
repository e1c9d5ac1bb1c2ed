"""Meshes (OFF, OBJ, STL, PLY) and clouds of points drawn from their surface."""

import io
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from slimray.data.points.clouds import Table, first_line
from slimray.data.samples import BadSample

MESH_POINTS = 10_000  # drawn from the surface of a mesh


def read_mesh(path: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Vertices float64 `[V, 3]` and triangles int64 `[F, 3]` of an OFF, OBJ, STL or PLY mesh. Raises BadSample."""
    import trimesh

    kind = PurePosixPath(path).suffix.lower()[1:]
    try:
        mesh: Any = trimesh.load_mesh(io.BytesIO(data), file_type=kind, process=False)
        vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int64)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (as in read_cloud)
        raise BadSample(f"does not read as {kind.upper()}: {first_line(error)}") from None
    if not len(faces):
        raise BadSample("the mesh has no faces, or is cut")
    if kind == "off":
        _check_off(data, len(vertices))
    if kind == "stl" and len(data) >= 84 and not data[:512].lstrip().startswith(b"solid"):
        declared = int(np.frombuffer(data[80:84], "<u4")[0])
        if declared != len(faces):
            raise BadSample(f"{len(faces)} of {declared} declared faces are there")
    if not np.isfinite(vertices).all():
        raise BadSample("a vertex of the mesh is not a finite number")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise BadSample(f"a face names vertex {int(faces.max())} of {len(vertices)}")
    return vertices, faces


def _check_off(data: bytes, num_vertices: int) -> None:
    """Compare the counts in an OFF header with the lines; in some ModelNet files they follow OFF without a blank."""
    lines = [line for line in data.decode("latin-1").splitlines() if line.strip() and not line.startswith("#")]
    head = lines[0].lstrip()[3:].split() or lines[1].split()
    vertices, faces = int(head[0]), int(head[1])
    there = len(lines) - (1 if lines[0].strip()[3:].strip() else 2)
    if num_vertices != vertices or there < vertices + faces:
        raise BadSample(f"{there} of {vertices + faces} declared vertices and faces are there")


def sample_surface(
    vertices: np.ndarray, faces: np.ndarray, num_points: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Points drawn evenly from the surface of triangles, and their normals: float64 `[N, 3]` each.

    Raises BadSample for a mesh without area.
    """
    corners = vertices[faces]  # [F, 3, 3]
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(across, axis=1)
    if not area.sum() > 0:
        raise BadSample("the mesh has no area")
    picked = rng.choice(len(faces), num_points, p=area / area.sum())
    u, v = rng.random((2, num_points, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)  # the far half folded back
    a, b, c = corners[picked].transpose(1, 0, 2)
    return a + u * (b - a) + v * (c - a), across[picked] / area[picked, None]


def read_surface(data: bytes, suffix: str, _: Sequence[str]) -> Table:
    vertices, faces = read_mesh(f"mesh{suffix}", data)
    coords, normals = sample_surface(vertices, faces, MESH_POINTS, np.random.default_rng(0))
    return {"coords": coords, "normals": normals}
