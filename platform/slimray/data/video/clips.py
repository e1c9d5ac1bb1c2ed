"""Turns a video's frames into a clip: choice of frames, crop, mirroring. numpy and PIL only.

`ClipRecipe` is a value that defines the steps; `frame_indices` chooses frames (TSN's segments, arXiv 1608.00859; I3D's
dense window, 1705.07750), `make_clip` crops and resizes. All conventions, even odd ones, are those of TSM (1811.08383),
so that published accuracies can be reached. All randomness is a function of the key (seed, epoch, sample).
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

DENSE_WINDOW = 64  # frames that dense sampling spans
NUM_DENSE_CLIPS = 10
MAX_SCALED_PIXELS = 64_000_000  # limit after scaling to a short side; 1 x 60,000 pixels would become gigabytes


@dataclass(frozen=True)
class ClipRecipe:
    """Preparation of a clip. Sizes are pixels; `resize` is the short side before a centre or test crop, 0 = as is.

    `mode` "train" draws at random, "val" takes segment centres, "test" likewise without the guard for short videos;
    `num_clips` is 1, 2 (centres, then left edges) or 10 (dense); `crops` 1, 3, 5, or 10 (five and their mirrors).
    `short` defines how videos with fewer frames than are taken are handled: "spread" takes frames from all over the
    video, some several times; "published" follows TSM, which repeats the first frame as a still (in mode "val" also if
    there are as many frames as segments) and wraps around in dense sampling. Recipes older than this field are
    "published". `reader` "pyav" or "decord" decodes (movies.py).
    """

    num_segments: int = 8
    size: int = 224
    resize: int = 256
    sampling: str = "uniform"
    mode: str = "train"
    num_clips: int = 1
    crops: int = 1
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    max_distort: int = 1
    flip: bool = False
    flip_labels: tuple[tuple[int, int], ...] = ()
    frame_order: str = "natural"
    short: str = "published"
    reader: str = "pyav"
    kind: str = "clip"

    @property
    def num_views(self) -> int:
        """Number of views: clips times crops."""
        return self.num_clips * self.crops

    @property
    def span(self) -> int:
        """Minimum number of frames of a video for which no frame is taken twice."""
        dense = 1 + (self.num_segments - 1) * (DENSE_WINDOW // self.num_segments)
        return dense if self.sampling == "dense" else self.num_segments

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "ClipRecipe":
        """Return the recipe that `to_dict` stored; accepts the lists of JSON."""
        pairs = tuple((int(a), int(b)) for a, b in plain.get("flip_labels", ()))
        return cls(**{**plain, "scales": tuple(plain.get("scales", cls.scales)), "flip_labels": pairs})


def generators(key: Sequence[int]) -> tuple[np.random.RandomState, random.Random]:
    """Return the two random streams of a sample (frames, crop), a function of its key alone."""
    frames, crop = np.random.SeedSequence(list(key)).generate_state(2)
    return np.random.RandomState(int(frames)), random.Random(int(crop))


# --------------------------------------------------------------------------------------------------- frames


def frame_indices(recipe: ClipRecipe, num_frames: int, rng: np.random.RandomState) -> np.ndarray:
    """Return the frames of all clips of a sample, 0-based int64 `[num_clips * num_segments]`, clip after clip.

    Raises ValueError for a video without frames.
    """
    if num_frames < 1:
        raise ValueError("has no frames")
    train, dense = recipe.mode == "train", recipe.sampling == "dense"
    if recipe.short == "spread" and num_frames < recipe.span and (dense or recipe.mode != "test"):
        one = spread(num_frames, recipe.num_segments, rng if train else None)
        picked = np.tile(one, 1 if train else recipe.num_clips)
    elif dense:
        picked = _dense(recipe, num_frames, rng)
    elif train:
        picked = uniform_train(num_frames, recipe.num_segments, rng)
    elif recipe.mode == "val" and recipe.num_clips == 1 and recipe.short == "published":
        picked = uniform_val(num_frames, recipe.num_segments)
    else:
        picked = uniform_test(num_frames, recipe.num_segments, twice=recipe.num_clips == 2)
    if recipe.frame_order == "shuffled":
        clips = picked.reshape(-1, recipe.num_segments)
        picked = clips[:, rng.permutation(recipe.num_segments)].reshape(-1)
    return picked


def spread(num_frames: int, num_segments: int, rng: np.random.RandomState | None = None) -> np.ndarray:
    """Return frames from all over a video that has fewer than are taken, in order, int64 `[num_segments]`.

    Takes the middle of each segment, or with `rng` a random place in it. Segments are shorter than a frame, so some
    frames are taken several times.
    """
    within = 0.5 if rng is None else rng.random_sample(num_segments)
    places = (np.arange(num_segments) + within) * num_frames / num_segments
    return np.minimum(places.astype(np.int64), num_frames - 1)


def uniform_train(num_frames: int, num_segments: int, rng: np.random.RandomState, new_length: int = 1) -> np.ndarray:
    """Return a random frame of each segment; only the first frame if there are fewer frames than segments."""
    length = (num_frames - new_length + 1) // num_segments
    if length > 0:
        return np.arange(num_segments) * length + rng.randint(length, size=num_segments)
    return np.zeros(num_segments, np.int64)


def uniform_val(num_frames: int, num_segments: int, new_length: int = 1) -> np.ndarray:
    """Return the centre of each segment; only the first frame unless there are more frames than segments."""
    if num_frames > num_segments + new_length - 1:
        return uniform_test(num_frames, num_segments, new_length=new_length)
    return np.zeros(num_segments, np.int64)


def uniform_test(num_frames: int, num_segments: int, twice: bool = False, new_length: int = 1) -> np.ndarray:
    """Return the centre of each segment, with `twice` followed by the left edge of each segment."""
    tick = (num_frames - new_length + 1) / num_segments
    places = np.arange(num_segments)
    centres = (tick / 2 + tick * places).astype(np.int64)
    return np.concatenate([centres, (tick * places).astype(np.int64)]) if twice else centres


def _dense(recipe: ClipRecipe, num_frames: int, rng: np.random.RandomState) -> np.ndarray:
    """Return evenly spaced frames of a window of 64: ten windows for ten clips, else a random one (also in "val")."""
    steps = np.arange(recipe.num_segments) * (DENSE_WINDOW // recipe.num_segments)
    room = max(1, 1 + num_frames - DENSE_WINDOW)
    if recipe.num_clips == NUM_DENSE_CLIPS:
        starts = np.linspace(0, room - 1, NUM_DENSE_CLIPS, dtype=np.int64)
    else:
        starts = np.array([0 if room == 1 else rng.randint(0, room - 1)])
    return ((starts[:, None] + steps[None]) % num_frames).reshape(-1).astype(np.int64)


# ---------------------------------------------------------------------------------------------------- crops


def crop_pairs(
    width: int, height: int, size: int, scales: Sequence[float], max_distort: int = 1
) -> list[tuple[int, int]]:
    """Return the (w, h) of all multi-scale crops: scales of the short side, snapped to `size` within 3 pixels."""
    base = min(width, height)
    sides = [max(1, int(base * scale)) for scale in scales]
    sides = [size if abs(side - size) < 3 else side for side in sides]
    return [
        (w, h) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= max_distort
    ]  # row by row: heights outside, widths inside


def crop_offsets(width: int, height: int, w: int, h: int) -> list[tuple[int, int]]:
    """Return the 13 places (x, y) of a multi-scale crop on a grid of quarters: corners, centre, edges, quarters."""
    x, y = (width - w) // 4, (height - h) // 4
    corners = [(0, 0), (4 * x, 0), (0, 4 * y), (4 * x, 4 * y), (2 * x, 2 * y)]
    edges = [(0, 2 * y), (4 * x, 2 * y), (2 * x, 4 * y), (2 * x, 0)]
    return corners + edges + [(x, y), (3 * x, y), (x, 3 * y), (3 * x, 3 * y)]


def draw_crop(
    width: int, height: int, size: int, scales: Sequence[float], max_distort: int, rng: random.Random
) -> tuple[int, int, int, int]:
    """Return a random multi-scale crop (x, y, w, h)."""
    w, h = rng.choice(crop_pairs(width, height, size, scales, max_distort))
    x, y = rng.choice(crop_offsets(width, height, w, h))
    return x, y, w, h


def view_crops(width: int, height: int, size: int, crops: int) -> list[tuple[int, int]]:
    """Return the places (x, y) of the test crops: centre; left, right, centre; or the four corners and the centre."""
    x, y = (width - size) // 4, (height - size) // 4
    if crops == 1:
        return [(round((width - size) / 2), round((height - size) / 2))]
    if crops == 3:
        return [(0, 2 * y), (4 * x, 2 * y), (2 * x, 2 * y)]
    return [(0, 0), (4 * x, 0), (0, 4 * y), (4 * x, 4 * y), (2 * x, 2 * y)]


# ---------------------------------------------------------------------------------------------------- clips


def make_clip(frames: Sequence[np.ndarray], recipe: ClipRecipe, rng: random.Random) -> tuple[np.ndarray, bool]:
    """Crop and resize decoded frames to uint8 `[V, T, size, size, 3]`; also return whether the clip was mirrored.

    `frames` are the uint8 `[H, W, 3]` pictures of `frame_indices`, in that order. One draw applies to the whole clip.
    Views are ordered by crop, then by clip (mirrored crops follow their originals), as in the published tests. Raises
    ValueError for frames that would become too large.
    """
    height, width = frames[0].shape[:2]
    if recipe.mode == "train":
        x, y, w, h = draw_crop(width, height, recipe.size, recipe.scales, recipe.max_distort, rng)
        flipped = recipe.flip and rng.random() < 0.5
        out = np.stack([_resized(frame[y : y + h, x : x + w], recipe.size, recipe.size) for frame in frames])
        out = out[:, :, ::-1] if flipped else out
        return np.ascontiguousarray(out)[None], flipped
    frames = [_short_side(frame, recipe) for frame in frames]
    height, width = frames[0].shape[:2]
    crops, s = recipe.crops, recipe.size
    views = []
    for x, y in view_crops(width, height, s, 5 if crops == 10 else crops):
        view = np.stack([frame[y : y + s, x : x + s] for frame in frames])
        views += [view, view[:, :, ::-1]] if crops == 10 else [view]
    shape = (recipe.num_views, recipe.num_segments, s, s, 3)
    return np.ascontiguousarray(np.stack(views)).reshape(shape), False


def _short_side(frame: np.ndarray, recipe: ClipRecipe) -> np.ndarray:
    """Scale a frame to a short side of `resize`, at least `size`; raise ValueError if it would become too large."""
    height, width = frame.shape[:2]
    short = max(recipe.resize or min(height, width), recipe.size)
    if min(height, width) == short:
        return frame
    w, h = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    if w * h > MAX_SCALED_PIXELS:
        raise ValueError(f"is {width} x {height} pixels, too elongated for a short side of {short}")
    return _resized(frame, w, h)


def _resized(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))


def flip_label(label: int, pairs: Sequence[tuple[int, int]]) -> int:
    """Return the label of a mirrored clip or image; `pairs` ("left to right", "right to left") are exchanged."""
    for a, b in pairs:
        if label in (a, b):
            return b if label == a else a
    return label
