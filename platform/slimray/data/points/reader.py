"""Reads point files in a child process with limits on time and memory, as parsers may hang, crash or exhaust memory.

A `CloudReader` sends a file's bytes to a child (`python -m slimray.data.points.reader`) and gets the cloud back, or the
sample that a recipe makes from it. Results are bit for bit those of files.py, recipe.py and point_sets.py.
"""

import atexit
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from slimray.data.child import Answer, Child, serve
from slimray.data.points import point_sets
from slimray.data.points.clouds import Cloud
from slimray.data.points.files import read_cloud
from slimray.data.points.geometry import estimate_normals
from slimray.data.points.point_sets import Frustum
from slimray.data.points.recipe import PointRecipe, PointSample, make_points

Key = tuple[int, int, int]


# ------------------------------------------------------------------------------------------ the parent's side


class CloudReader(Child):
    """A child that reads point files; a context manager. Its methods raise BadSample."""

    module, doing = "slimray.data.points.reader", "reading"

    def cloud(
        self,
        path: str,
        data: bytes,
        columns: Sequence[str] = (),
        labels: tuple[str, bytes] | None = None,
        needs: Collection[str] | None = None,
    ) -> Cloud:
        """Read a point file as `read_cloud` does; required normals that the file lacks are estimated."""
        request: dict[str, Any] = {"do": "cloud", "columns": list(columns), "labels": None}
        request["needs"] = None if needs is None else list(needs)
        if labels is not None:
            request["labels"], request["size"] = labels[0], len(data)
            data += labels[1]
        header, body = self._ask(path, request, data)
        arrays = _unpacked(header, body)
        coords, origin = arrays.pop("coords"), arrays.pop("origin")
        found = {name: arrays.pop(name, None) for name in ("labels", "rows")}
        return Cloud(coords, arrays, found["labels"], found["rows"], origin, header["removed"], header["unclear"])

    def sample(self, path: str, data: bytes, recipe: PointRecipe, key: Key, shape: int = 0) -> PointSample:
        """Make the sample of a stored cloud: `read_cloud`, then `make_points`."""
        request = {"do": "sample", "recipe": recipe.to_dict(), "key": list(key), "shape": shape}
        return _sample(*self._ask(path, request, data))

    def frustum(self, path: str, data: bytes, recipe: PointRecipe, key: Key) -> tuple[Frustum, PointSample]:
        """Make the sample of a stored frustum; the frustum itself is returned without its points."""
        header, body = self._ask(path, {"do": "frustum", "recipe": recipe.to_dict(), "key": list(key)}, data)
        empty = Cloud(np.zeros((0, 3), np.float32))
        box_2d = tuple(header["box_2d"])
        return Frustum(empty, header["kind"], header["rotation"], box_2d, None, header["score"]), _sample(header, body)

    def room(self, path: str, objects: Mapping[str, bytes]) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
        """Join the annotation files of a room as `s3dis_room` does."""
        sizes = [[name, len(data)] for name, data in objects.items()]
        header, body = self._ask(path, {"do": "room", "sizes": sizes}, b"".join(objects.values()))
        arrays = _unpacked(header, body)
        return arrays["xyzrgb"], arrays["labels"], header["skipped"]


@functools.cache
def cloud_reader(timeout_s: float) -> CloudReader:
    """Return this process's reader for a time limit, kept between tasks; its child dies with the process."""
    reader = CloudReader(timeout_s=timeout_s)
    atexit.register(reader.close)
    return reader


# --------------------------------------------------------------------------------------------- arrays as bytes


def _packed(arrays: Mapping[str, np.ndarray | None], **words: Any) -> Answer:
    there = [(name, np.ascontiguousarray(array)) for name, array in arrays.items() if array is not None]
    layout = [[name, array.dtype.str, list(array.shape)] for name, array in there]
    return words | {"arrays": layout}, b"".join(array.data.cast("B") if array.size else b"" for _, array in there)


def _unpacked(header: dict[str, Any], body: bytearray) -> dict[str, Any]:
    arrays, start = {}, 0
    for name, dtype, shape in header["arrays"]:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(body, dtype, count, start).reshape(shape) if count else np.zeros(shape, dtype)
        start += count * np.dtype(dtype).itemsize
    return arrays


def _sample(header: dict[str, Any], body: bytearray) -> PointSample:
    """Return the sample with these arrays; missing ones (labels, boxes) are None."""
    nothing: dict[str, Any] = dict.fromkeys(field.name for field in fields(PointSample))
    return PointSample(**nothing | _unpacked(header, body))


# ------------------------------------------------------------------------------------------- the child's side


def main() -> None:
    """Answer requests until the parent is gone."""
    serve(_answer, "read")


def _answer(request: dict[str, Any], data: bytes) -> Answer:
    path = request["path"]
    if request["do"] == "cloud":
        labels = None
        if request["labels"] is not None:
            data, labels = data[: request["size"]], (request["labels"], data[request["size"] :])
        needs = request["needs"]
        cloud = read_cloud(path, data, request["columns"], labels, needs)
        if "normals" in (needs or ()) and "normals" not in cloud.features:
            cloud = replace(cloud, features=dict(cloud.features) | {"normals": estimate_normals(cloud.coords)})
        arrays = {"coords": cloud.coords, "origin": cloud.origin, "labels": cloud.labels, "rows": cloud.rows}
        return _packed(arrays | dict(cloud.features), removed=dict(cloud.removed), unclear=dict(cloud.unclear))
    if request["do"] == "room":
        objects, start = {}, 0
        for name, size in request["sizes"]:
            objects[name], start = data[start : start + size], start + size
        xyzrgb, labels, skipped = point_sets.s3dis_room(objects)
        return _packed({"xyzrgb": xyzrgb, "labels": labels}, skipped=skipped)
    recipe, key = PointRecipe.from_dict(request["recipe"]), request["key"]
    if request["do"] == "sample":
        needs = [*recipe.channels, "label"] if recipe.per_point else recipe.channels
        cloud = read_cloud(path, data, needs=needs)
        return _packed(vars(make_points(cloud, recipe, key, request["shape"])))
    frustum = point_sets.read_frustum(path, data)
    number = point_sets.KITTI_CLASSES.index(frustum.kind)
    sample = make_points(frustum.cloud, recipe, key, number, frustum.box)
    words = {name: getattr(frustum, name) for name in ("kind", "rotation", "box_2d", "score")}
    return _packed(vars(sample), **words)


if __name__ == "__main__":
    main()
