"""Turns a cloud into a sample: draws points, scales, rotates, and arranges views for voting.

`PointRecipe` is a value that defines how a sample is made, as published for PVCNN (arXiv 1907.03739) and related
networks; all randomness is a function of the key (seed, epoch, sample).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slimray.data.points.clouds import WIDTHS, Cloud
from slimray.data.points.geometry import estimate_normals, farthest_points
from slimray.data.samples import BadSample


@dataclass(frozen=True)
class PointRecipe:
    """Recipe of a sample of a cloud. The network's channels are x y z, then `channels`, then a one-hot of the shape.

    `channels` are feature names ("colors", "normals" (estimated if the file has none), "intensity", ...);
    `num_shapes` > 0 adds the one-hot. `normalize` "sphere": mean at 0 and largest radius 1 over the whole cloud, as
    published for ShapeNet part; "block": middle of x and y at 0, lowest z at 0, in metres, as for an S3DIS block;
    "none". `mode` "train" draws and augments, "val" only draws, "test" covers all points: `votes` times
    ceil(n / num_points) views, where n is the cloud's size or, if given, `max_points` (8192 for S3DIS windows); without
    `fill` a smaller cloud has fewer views, and the rest of its sample is blank (ShapeNet).
    With `replace`, points are always drawn with replacement (ShapeNet, KITTI), else only if there are too few (S3DIS);
    with `spread`, "val" takes the farthest points instead of a draw, the same every time.
    Augmentation: rotation by up to `rotate_z` degrees in either direction, scaling in the range `scale`, mirroring
    along x half of the time with `flip`, noise of standard deviation `jitter` clipped at `jitter_clip`, colors zeroed
    with probability `color_drop`. As published: S3DIS none, ShapeNet jitter 0.01 (clip 0.05), KITTI flip and
    `published_shift`. PointNeXt's S3DIS recipe (arXiv 2206.04670): rotate_z 180, scale 0.9 to 1.1, jitter 0.005 (clip
    0.02), color_drop 0.2.
    `per_point` means one label per point instead of one per cloud.
    `published_shift` moves a frustum along z by 0.8 times its box's distance from the axis: a bug in frustum-pointnets
    that its published numbers include.
    """

    num_points: int = 2048
    channels: tuple[str, ...] = ()
    num_shapes: int = 0
    normalize: str = "none"
    mode: str = "train"
    replace: bool = False
    spread: bool = False
    votes: int = 1
    max_points: int = 0
    fill: bool = True
    rotate_z: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    jitter: float = 0.0
    jitter_clip: float = 0.05
    color_drop: float = 0.0
    published_shift: bool = False
    per_point: bool = False
    kind: str = "points"

    @property
    def num_channels(self) -> int:
        """Number of channels of a sample: coordinates, `channels`, one-hot."""
        return 3 + sum(WIDTHS.get(name, 1) for name in self.channels) + self.num_shapes

    def num_views(self, num_points: int = 0) -> int:
        """Return the number of views of a cloud; depends on `num_points` only in mode "test" without `max_points`."""
        if self.mode != "test":
            return 1
        return self.votes * -(-(self.max_points or num_points) // self.num_points)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "PointRecipe":
        """Return the recipe that `to_dict` stored; accepts the lists of JSON."""
        low, high = plain.get("scale", cls.scale)
        return cls(**{**plain, "channels": tuple(plain.get("channels", ())), "scale": (float(low), float(high))})


@dataclass(frozen=True, eq=False)
class PointSample:
    """A sample: `points` float32 `[V, C, N]`, `labels` int64 `[V, N]` or None, `indices` int64 `[V, N]` into the cloud.

    `box` float32 `[7]` (centre x y z, size l w h, heading), if one was given, is moved along with the points. `rows`
    int64 `[V, N]` maps each point to its row in the file or room.
    """

    points: np.ndarray
    labels: np.ndarray | None
    indices: np.ndarray
    box: np.ndarray | None = None
    rows: np.ndarray | None = None


def streams(key: Sequence[int]) -> tuple[np.random.Generator, np.random.Generator]:
    """Return the two random streams of a sample (choice of points, augmentation), a function of its key alone."""
    draw, augment = np.random.SeedSequence(list(key)).spawn(2)
    return np.random.default_rng(draw), np.random.default_rng(augment)


def make_points(
    cloud: Cloud, recipe: PointRecipe, key: Sequence[int], shape: int = 0, box: np.ndarray | None = None
) -> PointSample:
    """Make a sample of `cloud`. `key` is (seed, epoch, sample), `shape` the one-hot class, `box` as PointSample's.

    Raises BadSample if the cloud lacks a channel, or has more points than `max_points`.
    """
    draw, augment = streams(key)
    coords = normalized(cloud.coords, recipe.normalize)
    features = {name: _channel(cloud, name) for name in recipe.channels}
    if recipe.mode == "val" and recipe.spread and len(cloud) >= recipe.num_points:
        indices = farthest_points(coords, recipe.num_points)[None]
    else:
        indices = draw_indices(recipe, len(cloud), draw)
    coords, features = coords[indices], {name: array[indices] for name, array in features.items()}  # [V, N, k]
    if recipe.mode == "train":
        coords, features, box = _augmented(coords, features, box, recipe, augment)
    hot = np.zeros((*indices.shape, recipe.num_shapes), np.float32)
    if recipe.num_shapes:
        hot[..., shape] = 1
    points = np.concatenate([coords, *features.values(), hot], -1, dtype=np.float32)
    return PointSample(
        np.ascontiguousarray(points.transpose(0, 2, 1)),
        None if cloud.labels is None else cloud.labels[indices],
        indices,
        None if box is None else np.asarray(box, np.float32),
        indices if cloud.rows is None else cloud.rows[indices],
    )


def draw_indices(recipe: PointRecipe, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """Return the points of each view, int64 `[V, recipe.num_points]`; in mode "test" every one at least `votes` times.

    Raises BadSample for more points than `max_points`.
    """
    if recipe.mode != "test":
        replace = recipe.replace or num_points < recipe.num_points
        return rng.choice(num_points, recipe.num_points, replace=replace)[None].astype(np.int64)
    if recipe.max_points and num_points > recipe.max_points:
        raise BadSample(f"has {num_points} points, max_points is {recipe.max_points}")
    views = recipe.num_views(num_points) if recipe.fill else recipe.votes * -(-num_points // recipe.num_points)
    total = views * recipe.num_points
    return rng.permutation(np.arange(total) % num_points).reshape(-1, recipe.num_points)


def normalized(coords: np.ndarray, how: str) -> np.ndarray:
    """Normalize coordinates, float32 `[N, 3]`, by "none", "sphere" or "block" (see PointRecipe). Raises BadSample."""
    if how == "sphere":
        centred = coords - coords.mean(0, dtype=np.float64)
        radius = np.linalg.norm(centred, axis=1).max()
        if not 0 < radius < np.inf:
            raise BadSample(f"its {len(coords)} points are at the same place and have no size to normalize")
        return (centred / radius).astype(np.float32)
    if how == "block":
        low, high = coords.min(0), coords.max(0)
        return coords - np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]], coords.dtype)
    return coords


def _channel(cloud: Cloud, name: str) -> np.ndarray:
    if name in cloud.features:
        return cloud.features[name]
    if name == "normals":
        return estimate_normals(cloud.coords)
    if name in cloud.unclear:
        raise BadSample(cloud.unclear[name])
    raise BadSample(f"has no {name} (it has: {', '.join(cloud.features) or 'coordinates only'})")


def _augmented(
    coords: np.ndarray,
    features: dict[str, np.ndarray],
    box: np.ndarray | None,
    recipe: PointRecipe,
    rng: np.random.Generator,
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray | None]:
    """Augment points and box; all draws are made, so that switching one augmentation does not change the others."""
    angle, size, mirror, drop = rng.uniform(-1, 1), rng.uniform(*recipe.scale), rng.random() < 0.5, rng.random()
    coords = coords.astype(np.float32)
    if box is not None and (recipe.rotate_z or recipe.scale != (1.0, 1.0)):
        raise ValueError("a box in camera coordinates can be mirrored and shifted, but not rotated about z or scaled")
    if recipe.rotate_z:
        cos, sin = np.cos(np.radians(angle * recipe.rotate_z)), np.sin(np.radians(angle * recipe.rotate_z))
        turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], np.float32).T
        coords = coords @ turn
        if "normals" in features:
            features = features | {"normals": features["normals"] @ turn}
    coords = coords * np.float32(size)
    if recipe.flip and mirror:
        coords = coords * np.array([-1, 1, 1], np.float32)
        if "normals" in features:
            features = features | {"normals": features["normals"] * np.array([-1, 1, 1], np.float32)}
        if box is not None:
            box = np.concatenate([[-box[0]], box[1:6], [np.pi - box[6]]])
    if recipe.published_shift and box is not None:
        far = np.hypot(box[0], box[1])
        shift = np.clip(rng.standard_normal() * 0.05 * far, 0.8 * far, 1.2 * far)  # almost always 0.8 far
        coords = coords + np.array([0, 0, shift], np.float32)
        box = np.concatenate([box[:2], [box[2] + shift], box[3:]])
    if recipe.jitter:
        noise = rng.standard_normal(coords.shape) * recipe.jitter
        coords = coords + np.clip(noise, -recipe.jitter_clip, recipe.jitter_clip)
    if drop < recipe.color_drop and "colors" in features:
        features = features | {"colors": np.zeros_like(features["colors"])}
    return coords, features, box
