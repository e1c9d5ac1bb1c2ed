"""A generated image dataset on which networks of different sizes differ: a bright shape filled with a pattern.

Twelve classes: four outlines (triangle, square, star, disc) with three patterns (stripes, checks, rings), at a random
position, rotation, size, stretch and colour. Patches of the same patterns and plain shapes of the same outlines are
scattered around it, so that neither a single outline or pattern in the picture nor colour and brightness reveals the
class. Patterns are fine, so that resolution matters, too. A picture is a function of (seed, number); numpy only.
"""

import io

import numpy as np
from PIL import Image

OUTLINES = ("triangle", "square", "star", "disc")
PATTERNS = ("stripes", "checks", "rings")
CLASSES = tuple(f"{pattern}_{outline}" for outline in OUTLINES for pattern in PATTERNS)


def make_image(number: int, seed: int, size: int = 64) -> tuple[np.ndarray, int]:
    """Return picture `number` of the dataset `seed`: uint8 `[size, size, 3]` and its class, an index of CLASSES.

    Labels are balanced: the class is `number` modulo 12.
    """
    label = number % len(CLASSES)
    outline, pattern = divmod(label, len(PATTERNS))
    rng = np.random.default_rng([seed, number])
    x, y = np.meshgrid(*[(np.arange(size) + 0.5) / size * 2 - 1] * 2)  # -1 to 1
    slopes = rng.uniform(-30, 30, (2, 3))
    picture = rng.uniform(30, 110, 3) + x[..., None] * slopes[0] + y[..., None] * slopes[1]
    for _ in range(rng.integers(3)):  # patches of a pattern, with an irrelevant outline
        u, v = _turned(x, y, rng, reach=1.0)
        patch = _edge(rng.uniform(0.2, 0.4) - np.hypot(u * rng.uniform(0.5, 1), v) + 0.1 * np.sin(9 * u), size)
        waves = _waves(PATTERNS[rng.integers(3)], u, v, rng.uniform(0.1, 0.2))
        picture = _laid(picture, patch * waves, rng.uniform(30, 150, 3))
    for _ in range(rng.integers(3)):  # outlines without a pattern
        u, v = _turned(x, y, rng, reach=1.0)
        inside = _inside(OUTLINES[rng.integers(4)], u, v, rng.uniform(0.15, 0.3), size)
        picture = _laid(picture, inside, rng.uniform(60, 200, 3))
    radius, bright = rng.uniform(0.4, 0.8), rng.uniform(150, 255, 3)
    u, v = _turned(x, y, rng, reach=1 - radius)
    waves = _waves(PATTERNS[pattern], u, v, radius * rng.uniform(0.35, 0.55))
    shape = _laid(bright, waves, bright * rng.uniform(0.3, 0.7))
    picture = _laid(picture, _inside(OUTLINES[outline], u, v, radius, size), shape)
    picture = picture + rng.normal(0, rng.uniform(2, 12), picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8), label


def encode_png(picture: np.ndarray) -> bytes:
    """Return uint8 `[H, W, 3]` as a PNG file, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _turned(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates for a random position up to `reach` from the centre, randomly rotated and stretched."""
    x, y = x - rng.uniform(-reach, reach), y - rng.uniform(-reach, reach)
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.18)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    return u * stretch, v / stretch


def _inside(outline: str, u: np.ndarray, v: np.ndarray, radius: float, size: int) -> np.ndarray:
    """Return the fraction of each pixel, 0 to 1, inside an outline whose corners are `radius` from its centre."""
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    if outline == "disc":
        return _edge(0.8 * radius - r, size)  # about as large as the square
    corners = {"triangle": 3, "square": 4, "star": 5}[outline]
    part = np.abs((angle * corners / (2 * np.pi)) % 1 - 0.5) * 2  # 0 in the middle of a side, 1 at a corner
    if outline == "star":
        return _edge(radius * (0.45 + 0.55 * part) - r, size)
    return _edge(radius * np.cos(np.pi / corners) - r * np.cos(part * np.pi / corners), size)


def _waves(pattern: str, u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    """Return a pattern, 0 to 1, `[H, W]`."""
    u, v = 2 * np.pi * u / period, 2 * np.pi * v / period
    if pattern == "stripes":
        waves = np.sin(u)
    elif pattern == "checks":
        waves = 1.5 * np.sin(u) * np.sin(v)
    else:
        waves = np.sin(np.hypot(u, v))
    return np.clip(0.5 + 1.5 * waves, 0, 1)


def _edge(distance: np.ndarray, size: int) -> np.ndarray:
    """Return 1 where `distance` is positive and 0 where it is negative, with a soft edge of one pixel."""
    return np.clip(distance * size / 2 + 0.5, 0, 1)


def _laid(below: np.ndarray, share: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Return `above` blended over `below` with opacity `share` `[H, W]`."""
    return below + share[..., None] * (above - below)
