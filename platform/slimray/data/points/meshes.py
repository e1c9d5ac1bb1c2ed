"""Reads meshes (OFF, OBJ, STL, PLY), and draws clouds of points from their surface."""

import io
import re
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from slimray.data.points.clouds import HUGE, Table, first_line
from slimray.data.points.columns import Columns
from slimray.data.points.ply import checked_ply
from slimray.data.samples import BadSample

MESH_POINTS = 10_000  # drawn from the surface of a mesh


def read_mesh(path: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Read vertices float64 `[V, 3]` and triangles int64 `[F, 3]` of an OFF, OBJ, STL or PLY file. Raises BadSample."""
    import trimesh

    kind = PurePosixPath(path).suffix.lower()[1:]
    check = {"off": _checked_off, "obj": _checked_obj, "stl": _checked_stl, "ply": checked_ply}.get(kind, bytes)
    try:
        mesh: Any = trimesh.load_mesh(io.BytesIO(check(data)), file_type=kind, process=False)
        vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int64)
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  (as in read_cloud)
        raise BadSample(f"cannot be read as {kind.upper()}: {first_line(error)}") from None
    if not len(faces):
        raise BadSample("the mesh has no faces, or is truncated")
    if not (np.abs(vertices) < HUGE).all():  # False for NaN
        raise BadSample("a vertex of the mesh is not a finite number")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise BadSample(f"a face names vertex {int(faces.max())} of {len(vertices)}")
    return vertices, faces


def _checked_off(data: bytes) -> bytes:
    """Return an OFF file without its comments, after comparing its counts with its lines.

    In some ModelNet files the counts follow OFF without a blank. Raises BadSample.
    """
    if re.match(rb"\s*(ST)?(C)?(N)?(4)?(n)?OFF\s+BINARY", data):
        raise BadSample("is a binary OFF file: convert it to text")
    text = data.decode("latin-1")
    lines = [line for line in (one.partition("#")[0].strip() for one in text.splitlines()) if line]
    head = re.fullmatch(r"((?:ST)?C?N?4?n?OFF)?\s*(.*)", lines[0] if lines else "")
    counts = head[2] if head else ""
    body = lines[1:]
    if not counts and body:
        counts, body = body[0], body[1:]
    found = re.fullmatch(r"(\d{1,15})\s+(\d{1,15})(\s+-?\d+)?", counts)
    if found is None:
        raise BadSample("has no OFF header with the numbers of vertices and faces")
    declared = int(found[1]) + int(found[2])
    if len(body) != declared:
        raise BadSample(f"{len(body)} of {declared} declared vertices and faces are there")
    vertices = [" ".join(line.split()[:3]) for line in body[: int(found[1])]]
    faces = []
    for line in body[int(found[1]) :]:
        words = line.split()
        if not words[0].isdigit() or len(words) <= int(words[0][:9]):
            raise BadSample(f"a face has fewer corners than declared: {line[:40]!r}")
        faces.append(" ".join(words[: int(words[0][:9]) + 1]))
    return "\n".join(["OFF", f"{found[1]} {found[2]} 0", *vertices, *faces, ""]).encode("latin-1")


def _checked_obj(data: bytes) -> bytes:
    """Return only the vertices and faces of an OBJ file; other content is not needed and may take long to read."""
    kept, vertices = [], 0
    for line in re.findall(rb"^[ \t]*([vf][ \t].*)$", data.replace(b"\\\n", b" ").replace(b"\r", b"\n"), re.MULTILINE):
        if line[:1] == b"v":
            vertices += 1
            kept.append(b" ".join(line.split()[:4]))
        else:
            corners = [int(word.partition(b"/")[0]) for word in line.split()[1:]]
            kept.append(b"f " + b" ".join(b"%d" % (one if one > 0 else vertices + 1 + one) for one in corners))
    return b"\n".join([*kept, b""])


def _checked_stl(data: bytes) -> bytes:
    """Return an STL file after checking its number of faces against its bytes, or for text their starts and ends.

    Raises BadSample.
    """
    if len(data) >= 84 and 84 + 50 * int.from_bytes(data[80:84], "little") == len(data):
        return data
    if data[:512].lstrip().startswith(b"solid"):
        begun, ended = len(re.findall(rb"\bfacet\s+normal\b", data)), len(re.findall(rb"\bendfacet\b", data))
        if begun != ended or not re.search(rb"\bendsolid\b", data[-1024:]):
            raise BadSample(f"{ended} of {begun} faces are complete, or its end is missing")
        return data
    if len(data) < 84:
        raise BadSample(f"has {len(data)} bytes, less than an STL header")
    declared = int.from_bytes(data[80:84], "little")
    raise BadSample(f"{(len(data) - 84) // 50} of {declared} declared faces are there")


def sample_surface(
    vertices: np.ndarray, faces: np.ndarray, num_points: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw points uniformly from the surface of triangles; return them and their normals, float64 `[N, 3]` each.

    Raises BadSample for a mesh without area.
    """
    corners = vertices[faces]  # [F, 3, 3]
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(across, axis=1)
    if not 0 < area.sum() < np.inf:
        raise BadSample("the area of the mesh is zero or not finite")
    picked = rng.choice(len(faces), num_points, p=area / area.sum())
    u, v = rng.random((2, num_points, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)  # the far half folded back
    a, b, c = corners[picked].transpose(1, 0, 2)
    return a + u * (b - a) + v * (c - a), across[picked] / area[picked, None]


def read_surface(data: bytes, suffix: str, _: Columns) -> Table:
    """Read a mesh as MESH_POINTS points on its surface, with normals; the same points every time."""
    vertices, faces = read_mesh(f"mesh{suffix}", data)
    coords, normals = sample_surface(vertices, faces, MESH_POINTS, np.random.default_rng(0))
    return [("coords", coords), ("normals", normals)]
