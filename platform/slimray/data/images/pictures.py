"""Turns a picture into the input of an image network by cropping, mirroring and colour jitter. numpy and PIL only.

`ImageRecipe` is a value that defines the steps, `make_image` applies them: training draws a crop of random area and
aspect ratio (with `padding` one of fixed size, as usual for small pictures) and jitters brightness and saturation;
validation takes the centre (or several crops) of the picture scaled to a short side. Recipe and order of the steps are
those of Once-for-All (arXiv 1908.09791; the crop is Inception's, 1409.4842). The recipe has one `size`, the largest: a
network of elastic resolution gets smaller pictures from its trainer, which resizes them on the device. All randomness
is a function of the key (seed, epoch, sample).
"""

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from slimray.data.video.clips import MAX_SCALED_PIXELS, view_crops

CENTRE = 0.875  # share of the short side that a centre crop takes
CROP_TRIES = 10


@dataclass(frozen=True)
class ImageRecipe:
    """Preparation of a picture. Sizes are pixels; `resize` is the short side before a centre crop, 0 = size / 0.875.

    `mode` "train" draws at random, any other takes `crops`: 1 (centre), 3, 5, or 10 (five and their mirrors). `scale`
    is the range of a training crop's share of the area, `ratio` of its width over its height; `brightness` and
    `saturation` are the largest relative changes. With `padding`, a training crop has `size` pixels and is taken from
    the picture at `short_side` with this many black pixels around it; `scale` and `ratio` do not apply (as in arXiv
    1512.03385 for CIFAR-10). `channels` is 3, or 1 for grayscale (ITU-R 601 luma).
    """

    size: int = 224
    resize: int = 0
    mode: str = "train"
    crops: int = 1
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    brightness: float = 32 / 255
    saturation: float = 0.5
    flip: bool = False
    flip_labels: tuple[tuple[int, int], ...] = ()
    padding: int = 0
    channels: int = 3
    kind: str = "image"

    @property
    def short_side(self) -> int:
        """The short side before a centre or test crop, never below `size`."""
        return max(self.size, self.resize or math.ceil(self.size / CENTRE))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "ImageRecipe":
        """Return the recipe that `to_dict` stored; accepts the lists of JSON."""
        pairs = tuple((int(a), int(b)) for a, b in plain.get("flip_labels", ()))
        ranges = {name: tuple(plain[name]) for name in ("scale", "ratio") if name in plain}
        return cls(**{**plain, **ranges, "flip_labels": pairs})


def make_image(picture: np.ndarray, recipe: ImageRecipe, rng: random.Random) -> tuple[np.ndarray, bool]:
    """Return the views of a picture uint8 `[H, W, 3]` as uint8 `[V, size, size, channels]`, and if they were mirrored.

    Raises ValueError for a picture so elongated that scaling its short side would exceed MAX_SCALED_PIXELS.
    """
    if recipe.mode != "train":
        return _in_channels(_views(picture, recipe), recipe), False
    if recipe.padding:
        image = _padded_crop(picture, recipe, rng)
    else:
        height, width = picture.shape[:2]
        x, y, w, h = draw_area_crop(width, height, recipe.scale, recipe.ratio, rng)
        image = _resized(picture[y : y + h, x : x + w], recipe.size, recipe.size)
    flipped = recipe.flip and rng.random() < 0.5
    if flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _in_channels(np.asarray(_jittered(image, recipe, rng))[None], recipe), flipped


def draw_area_crop(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """Return a random crop (x, y, w, h): its share of the area uniform in `scale`, w / h log-uniform in `ratio`.

    After ten draws that do not fit into the picture, returns its centre, as large as `ratio` allows.
    """
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, width - w), rng.randint(0, height - h), w, h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def _padded_crop(picture: np.ndarray, recipe: ImageRecipe, rng: random.Random) -> Image.Image:
    scaled, edge = _scaled(picture, recipe), recipe.padding
    padded = np.pad(scaled, ((edge, edge), (edge, edge), (0, 0)))
    x, y = (rng.randint(0, side - recipe.size) for side in (padded.shape[1], padded.shape[0]))
    return Image.fromarray(np.ascontiguousarray(padded[y : y + recipe.size, x : x + recipe.size]))


def _in_channels(views: np.ndarray, recipe: ImageRecipe) -> np.ndarray:
    """Convert views `[V, S, S, 3]` to the channels of the recipe."""
    if recipe.channels == 3:
        return views
    return np.stack([np.asarray(Image.fromarray(view).convert("L")) for view in views])[..., None]


def _jittered(image: Image.Image, recipe: ImageRecipe, rng: random.Random) -> Image.Image:
    """Change brightness and saturation by random factors, in random order."""
    changes = [(ImageEnhance.Brightness, recipe.brightness), (ImageEnhance.Color, recipe.saturation)]
    rng.shuffle(changes)
    for change, most in changes:
        if most:
            image = change(image).enhance(rng.uniform(max(0.0, 1 - most), 1 + most))
    return image


def _views(picture: np.ndarray, recipe: ImageRecipe) -> np.ndarray:
    """Return the crops of a picture scaled to `recipe.short_side`; mirrored ones follow their originals."""
    size, scaled = recipe.size, _scaled(picture, recipe)
    views = []
    for x, y in view_crops(scaled.shape[1], scaled.shape[0], size, 5 if recipe.crops == 10 else recipe.crops):
        view = scaled[y : y + size, x : x + size]
        views += [view, view[:, ::-1]] if recipe.crops == 10 else [view]
    return np.ascontiguousarray(np.stack(views))


def _scaled(picture: np.ndarray, recipe: ImageRecipe) -> np.ndarray:
    """Return the picture scaled to a short side of `recipe.short_side`."""
    short, (height, width) = recipe.short_side, picture.shape[:2]
    w, h = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    if w * h > MAX_SCALED_PIXELS:
        raise ValueError(f"is {width} x {height} pixels, too elongated for a short side of {short}")
    return picture if (width, height) == (w, h) else np.asarray(_resized(picture, w, h))


def _resized(picture: np.ndarray, width: int, height: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(picture))
    return image.resize((width, height), Image.Resampling.BILINEAR)
