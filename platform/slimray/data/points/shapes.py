"""A generated point-cloud dataset with labelled parts that cannot be inferred from the coordinates of a single point.

Five classes (lamp, rocket, table, pan, hammer) of two or three parts each, with random proportions, lying, standing or
upside down, rotated about z by any angle, at a random size. The part of a point depends on the shape around it: which
end is the head, which class it is. A network that sees one point at a time stays far below 50 % part mIoU. numpy only.
"""

from collections.abc import Callable

import numpy as np

PARTS = {
    "lamp": ("stand", "shade"),
    "rocket": ("body", "nose", "fins"),
    "table": ("top", "legs"),
    "pan": ("bowl", "handle"),
    "hammer": ("head", "grip"),
}
CLASSES = tuple(PARTS)
NUM_PARTS = sum(len(parts) for parts in PARTS.values())
MIN_SHARE = 0.2  # of the points for every part; the rest is distributed at random, so that the mean reveals little

Sampler = Callable[[np.random.Generator, int], np.ndarray]  # (rng, n) -> points on the surface, float64 [n, 3]
Piece = tuple[float, Sampler]  # area and sampler of a surface


def make_cloud(number: int, seed: int, num_points: int = 1024) -> tuple[np.ndarray, np.ndarray, int]:
    """Return cloud `number` of the dataset `seed`: coords float32 `[N, 3]`, part labels int64 `[N]`, and the class.

    The class is `number` modulo 5. Parts are numbered through all classes, in the order of PARTS. Points are in random
    order.
    """
    label = number % len(CLASSES)
    rng = np.random.default_rng([seed, number])
    parts = _SHAPES[CLASSES[label]](rng)
    shares = MIN_SHARE + (1 - MIN_SHARE * len(parts)) * rng.dirichlet(np.ones(len(parts)))
    counts = np.diff(np.round(np.cumsum([0, *shares]) * num_points).astype(int))
    coords = np.concatenate([_sample(pieces, count, rng) for pieces, count in zip(parts, counts, strict=True)])
    labels = np.repeat(np.arange(len(parts)) + part_range(label).start, counts)
    coords = (coords - (coords.min(0) + coords.max(0)) / 2) * rng.uniform(0.85, 1.2, 3)
    coords = _pose(coords, rng)
    order = rng.permutation(num_points)
    return coords[order].astype(np.float32), labels[order].astype(np.int64), label


def part_range(label: int) -> range:
    """Return the part numbers of class `label`."""
    start = sum(len(PARTS[name]) for name in CLASSES[:label])
    return range(start, start + len(PARTS[CLASSES[label]]))


def _pose(coords: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Place a shape standing, upside down or (half of them) lying, rotated about z, at a size of 0.6 to 1.4."""
    tilt = rng.choice([0.0, 1.0, 0.5, 0.5]) * np.pi
    turn = rng.uniform(0, 2 * np.pi)
    coords = _turn(_turn(coords, rng.uniform(0, 2 * np.pi), 2), tilt, 0)
    return _turn(coords, turn, 2) * rng.uniform(0.6, 1.4)


def _turn(coords: np.ndarray, angle: float, axis: int) -> np.ndarray:
    """Return the coordinates rotated about axis `axis`, right-handed, by an angle in radians."""
    a, b = (axis + 1) % 3, (axis + 2) % 3
    out = coords.copy()
    out[:, a] = np.cos(angle) * coords[:, a] - np.sin(angle) * coords[:, b]
    out[:, b] = np.sin(angle) * coords[:, a] + np.cos(angle) * coords[:, b]
    return out


def _sample(pieces: list[Piece], count: int, rng: np.random.Generator) -> np.ndarray:
    areas = np.array([area for area, _ in pieces])
    counts = rng.multinomial(count, areas / areas.sum())
    return np.concatenate([sampler(rng, n) for (_, sampler), n in zip(pieces, counts, strict=True)])


# --------------------------------------------------------------------------------------------------- surfaces


def _tube(r0: float, r1: float, z0: float, z1: float) -> Piece:
    """The side of a cylinder or cone about z, radius r0 at z0 to r1 at z1; a flat ring if z0 equals z1."""

    def sample(rng: np.random.Generator, n: int) -> np.ndarray:
        r = np.sqrt(r0**2 + (r1**2 - r0**2) * rng.random(n))
        z = z0 + (z1 - z0) * ((r - r0) / (r1 - r0) if r0 != r1 else rng.random(n))
        angle = rng.uniform(0, 2 * np.pi, n)
        return np.stack([r * np.cos(angle), r * np.sin(angle), z], 1)

    return np.pi * (r0 + r1) * float(np.hypot(r1 - r0, z1 - z0)), sample


def _plate(corner: tuple[float, ...], u: tuple[float, ...], v: tuple[float, ...]) -> Piece:
    """The parallelogram of `corner` and the edges u and v."""

    def sample(rng: np.random.Generator, n: int) -> np.ndarray:
        return np.array(corner) + rng.random((n, 1)) * np.array(u) + rng.random((n, 1)) * np.array(v)

    return float(np.linalg.norm(np.cross(u, v))), sample


def _box(centre: tuple[float, float, float], size: tuple[float, float, float]) -> list[Piece]:
    """The six sides of a box, top and bottom last."""
    low = np.array(centre) - np.array(size) / 2
    edges = np.diag(size)
    pieces = []
    for axis in range(3):
        u, v = edges[(axis + 1) % 3], edges[(axis + 2) % 3]
        pieces += [_plate(tuple(low), tuple(u), tuple(v)), _plate(tuple(low + edges[axis]), tuple(u), tuple(v))]
    return pieces


# ----------------------------------------------------------------------------------------------------- shapes


def _lamp(rng: np.random.Generator) -> list[list[Piece]]:
    pole, radius = rng.uniform(0.15, 1.2), rng.uniform(0.2, 0.6)
    low, wide = rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.6)
    base = [_tube(0, radius, 0, 0), _tube(radius, radius, 0, 0.06), _tube(0, radius, 0.06, 0.06)]
    shade = [_tube(wide * rng.uniform(1.0, 1.2), wide * rng.uniform(0.4, 0.6), pole, pole + low)]
    return [[*base, _tube(0.04, 0.04, 0.06, pole)], shade]


def _rocket(rng: np.random.Generator) -> list[list[Piece]]:
    length, radius = rng.uniform(0.3, 0.9), rng.uniform(0.2, 0.3)
    nose, fin, height = rng.uniform(0.25, 0.6), rng.uniform(0.35, 0.6), rng.uniform(0.2, 0.7)
    fins = []
    for angle in np.arange(3) * 2 * np.pi / 3:
        out = (np.cos(angle), np.sin(angle), 0.0)
        fins.append(_plate((out[0] * radius, out[1] * radius, 0), (out[0] * fin, out[1] * fin, -0.15), (0, 0, height)))
    body = [_tube(radius, radius, 0, length), _tube(0, radius, 0, 0)]
    return [body, [_tube(radius, 0, length, length + nose)], fins]


def _table(rng: np.random.Generator) -> list[list[Piece]]:
    w, d, h = rng.uniform(0.5, 1.2), rng.uniform(0.5, 1.0), rng.uniform(0.3, 0.9)
    leg, thick = rng.uniform(0.06, 0.12), rng.uniform(0.05, 0.15)
    x, y = (w - leg) / 2 * rng.uniform(0.4, 1), (d - leg) / 2 * rng.uniform(0.4, 1)
    legs = [piece for i in (-x, x) for j in (-y, y) for piece in _box((i, j, h / 2), (leg, leg, h))[:4]]
    return [_box((0, 0, h + thick / 2), (w, d, thick)), legs]


def _pan(rng: np.random.Generator) -> list[list[Piece]]:
    radius, height, wide = rng.uniform(0.25, 0.5), rng.uniform(0.15, 0.5), rng.uniform(1, 1.3)
    handle = (rng.uniform(0.4, 1.0), rng.uniform(0.06, 0.15), rng.uniform(0.06, 0.15))
    place = (radius * wide + handle[0] / 2, 0, height - handle[2] / 2)
    return [[_tube(radius, radius * wide, 0, height), _tube(0, radius, 0, 0)], _box(place, handle)]


def _hammer(rng: np.random.Generator) -> list[list[Piece]]:
    length, r = rng.uniform(0.2, 1.0), rng.uniform(0.06, 0.14)
    size = (rng.uniform(0.3, 0.6), rng.uniform(0.25, 0.4), rng.uniform(0.2, 1.0))
    return [_box((0, 0, length + size[2] / 2), size), [_tube(r, r, 0, length), _tube(0, r, 0, 0)]]


_SHAPES: dict[str, Callable[[np.random.Generator], list[list[Piece]]]] = {
    "lamp": _lamp,
    "rocket": _rocket,
    "table": _table,
    "pan": _pan,
    "hammer": _hammer,
}
