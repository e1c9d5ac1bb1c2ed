"""PLY files: the vertices, by their names."""

from collections.abc import Sequence

import numpy as np

from slimray.data.points.clouds import Table
from slimray.data.points.geometry import on_disk
from slimray.data.samples import BadSample


def read_ply(data: bytes, _: str, __: Sequence[str]) -> Table:
    import plyfile

    with on_disk(data, ".ply") as path:
        elements = plyfile.PlyData.read(path)
        if "vertex" not in elements:
            raise BadSample("has no vertices")
        vertices = elements["vertex"].data
        names = [name for name in vertices.dtype.names or () if vertices.dtype[name].kind in "fiu"]
        return {name: np.array(vertices[name]) for name in names}
