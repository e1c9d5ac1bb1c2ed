"""What a sample is, by the kind of its recipe: a clip, an image, a cloud of points, a frustum: the rows of KINDS.

A recipe travels as a plain dict whose `kind` names the row. `load` makes one sample of one row of an index: an array
of the row's shape and type, and its label (a number, or one per point). Everything random in it is a function of the
key (seed, epoch, sample). What does not decode raises BadSample; storage that fails raises StorageError.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimray.data.bytes import read_sample, read_whole
from slimray.data.images.pictures import ImageRecipe
from slimray.data.points import files, point_sets
from slimray.data.points.recipe import PointRecipe, make_points
from slimray.data.samples import BadSample
from slimray.data.video.clips import ClipRecipe, flip_label
from slimray.data.video.decoder import Decoder
from slimray.spec import lookup
from slimray.storage import open_uri

Key = tuple[int, int, int]


@dataclass(frozen=True)
class Kind:
    """A row of KINDS: `shape` of a sample's array, `label_shape` of its label (() for a number), `input_shape` of what
    the network takes of one view, without the batch. A bad sample's label is -1 throughout."""

    from_dict: Callable[[dict[str, Any]], Any]
    shape: Callable[[Any], tuple[int, ...]]
    input_shape: Callable[[Any], tuple[int, ...]]
    label_shape: Callable[[Any], tuple[int, ...]]
    dtype: type
    load: Callable[[dict[str, Any], str, Any, Key, float], tuple[np.ndarray, Any]]
    label_dtype: type = np.int64


def kind_of(recipe: dict[str, Any]) -> Kind:
    """The row of KINDS that a plain recipe names; UserError for an unknown one."""
    return lookup(KINDS, recipe.get("kind", "clip"), "kind of sample")


def sample_shape(recipe: dict[str, Any]) -> tuple[int, ...]:
    """The shape of a sample of a plain recipe, its views first."""
    kind = kind_of(recipe)
    return kind.shape(kind.from_dict(recipe))


def input_shape(recipe: dict[str, Any]) -> tuple[int, ...]:
    """What a network takes of one view of a plain recipe, without the batch: (T, 3, H, W), (3, H, W) or (C, N)."""
    kind = kind_of(recipe)
    return kind.input_shape(kind.from_dict(recipe))


@functools.cache
def _decoder(timeout_s: float) -> Decoder:
    """One decoding child per process, kept between tasks; it dies with the process."""
    return Decoder(timeout_s=timeout_s)


@functools.lru_cache(maxsize=8)
def _filesystem(root: str) -> tuple[Any, str]:
    return open_uri(root)


def load_clip(row: dict[str, Any], root: str, recipe: ClipRecipe, key: Key, timeout_s: float) -> tuple[np.ndarray, int]:
    """A clip uint8 `[V, T, size, size, 3]` and its label."""
    fs, path = _filesystem(root)
    data = read_sample(fs, path, row, recipe, key)
    clip, flipped = _decoder(timeout_s).clip(row["path"], data, recipe, key)
    return clip, flip_label(row["label"], recipe.flip_labels) if flipped else row["label"]


def load_image(
    row: dict[str, Any], root: str, recipe: ImageRecipe, key: Key, timeout_s: float
) -> tuple[np.ndarray, int]:
    """An image uint8 `[V, size, size, 3]` and its label."""
    fs, path = _filesystem(root)
    image, flipped = _decoder(timeout_s).image(row["path"], read_whole(fs, path, row), recipe, key)
    return image, flip_label(row["label"], recipe.flip_labels) if flipped else row["label"]


def load_points(
    row: dict[str, Any], root: str, recipe: PointRecipe, key: Key, timeout_s: float
) -> tuple[np.ndarray, Any]:
    """A cloud float32 `[V, C, N]` and its label, or a label per point int64 `[N]` where `recipe.per_point`.

    `row["label"]` is the class of the whole cloud. In mode "test" the labels per point are int64 `[2, V, N]`: the label
    and the row of its file or room that each point is, -1 both in views that are blank (see `PointRecipe.fill`).
    """
    fs, path = _filesystem(root)
    cloud = files.read_cloud(row["path"], read_whole(fs, path, row))
    sample = make_points(cloud, recipe, key, shape=max(0, row["label"]))
    if not recipe.per_point:
        return sample.points, row["label"]
    if sample.labels is None:
        raise BadSample("has no label per point")
    if recipe.mode != "test":
        return sample.points, sample.labels[0]
    rows = sample.indices if cloud.rows is None else cloud.rows[sample.indices]
    blank = ((0, recipe.num_views() - len(rows)), (0, 0))
    labels = np.pad(np.stack([sample.labels, rows]), ((0, 0), *blank), constant_values=-1)
    return np.pad(sample.points, (*blank, (0, 0))), labels


def load_frustum(
    row: dict[str, Any], root: str, recipe: PointRecipe, key: Key, timeout_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """The points of a frustum float32 `[1, C + classes, N]`, the class as one-hot last; its truth float32 `[N + 11]`.

    The truth is, in a row: 1 for each point on the object and 0 for the others, the box (centre x y z, l w h, heading),
    the class, by how much the points were turned, the detector's score, the height of the 2D box in pixels. Where no
    object is known, mask and box are -1 and nan.
    """
    fs, path = _filesystem(root)
    frustum = point_sets.read_frustum(row["path"], read_whole(fs, path, row))
    number = point_sets.KITTI_CLASSES.index(frustum.kind)
    sample = make_points(frustum.cloud, recipe, key, shape=number, box=frustum.box)
    mask, box = np.full(recipe.num_points, -1), np.full(7, np.nan)
    if sample.labels is not None and sample.box is not None:
        mask, box = sample.labels[0], sample.box
    height = frustum.box_2d[3] - frustum.box_2d[1]
    truth = np.concatenate([mask, box, [number, frustum.rotation, frustum.score, height]], dtype=np.float32)
    return sample.points, truth


def _clip_shape(recipe: ClipRecipe) -> tuple[int, ...]:
    return (recipe.num_views, recipe.num_segments, recipe.size, recipe.size, 3)


def _clip_input(recipe: ClipRecipe) -> tuple[int, ...]:
    return (recipe.num_segments, 3, recipe.size, recipe.size)


def _points_shape(recipe: PointRecipe) -> tuple[int, ...]:
    return (recipe.num_views(), recipe.num_channels, recipe.num_points)


def _points_label(recipe: PointRecipe) -> tuple[int, ...]:
    if not recipe.per_point:
        return ()
    return (2, recipe.num_views(), recipe.num_points) if recipe.mode == "test" else (recipe.num_points,)


KINDS: dict[str, Kind] = {
    "clip": Kind(ClipRecipe.from_dict, _clip_shape, _clip_input, lambda _: (), np.uint8, load_clip),
    "image": Kind(
        ImageRecipe.from_dict,
        lambda recipe: (recipe.crops, recipe.size, recipe.size, 3),
        lambda recipe: (3, recipe.size, recipe.size),
        lambda _: (),
        np.uint8,
        load_image,
    ),
    "points": Kind(
        PointRecipe.from_dict,
        _points_shape,
        lambda recipe: (recipe.num_channels, recipe.num_points),
        _points_label,
        np.float32,
        load_points,
    ),
    "frustum": Kind(
        PointRecipe.from_dict,
        _points_shape,
        lambda recipe: (recipe.num_channels, recipe.num_points),
        lambda recipe: (recipe.num_points + 11,),
        np.float32,
        load_frustum,
        np.float32,
    ),
}
