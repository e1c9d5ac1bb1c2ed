"""Street scenes in the file formats of the KITTI object benchmark, for tests: boxes on a plane, seen by a lidar."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE = (1242, 375)
FOCAL, MIDDLE = 720.0, (609.0, 172.0)
SIZES = {"Car": (3.9, 1.6, 1.5), "Pedestrian": (0.8, 0.65, 1.75), "Cyclist": (1.75, 0.6, 1.75)}  # l, w, h
GROUND = 1.7  # metres below the camera
CALIBRATION = f"""P2: {FOCAL} 0 {MIDDLE[0]} 0 0 {FOCAL} {MIDDLE[1]} 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0
"""


def write_kitti(root: Path, num_train: int, num_val: int, seed: int = 0) -> None:
    """`num_train` + `num_val` scans with labels, calibration, images and lists under `root`."""
    folders = [root / f"training/{name}" for name in ("velodyne", "calib", "label_2", "image_2")]
    for folder in (*folders, root / "ImageSets"):
        folder.mkdir(parents=True, exist_ok=True)
    velodyne, calib, label, image = folders
    for number in range(num_train + num_val):
        rng, name = np.random.default_rng((seed, number)), f"{number:06d}"
        scan, lines = scene(rng)
        (velodyne / f"{name}.bin").write_bytes(scan.astype("<f4").tobytes())
        (calib / f"{name}.txt").write_text(CALIBRATION)
        (label / f"{name}.txt").write_text("\n".join(lines) + "\n")
        Image.new("RGB", IMAGE).save(image / f"{name}.png")
    names = [f"{number:06d}" for number in range(num_train + num_val)]
    (root / "ImageSets/train.txt").write_text("\n".join(names[:num_train]) + "\n")
    (root / "ImageSets/val.txt").write_text("\n".join(names[num_train:]) + "\n")


def corners_of(box: Sequence[float]) -> np.ndarray:
    """The eight corners of a box (x y z, l w h, heading), float64 `[8, 3]`: the lower four (y down) first, around."""
    x, y, z, length, width, height, heading = box
    signs = np.array([[1, 1, 1], [1, 1, -1], [-1, 1, -1], [-1, 1, 1]])
    signs = np.concatenate([signs, signs * [1, -1, 1]])
    corners = signs * np.array([length, height, width]) / 2
    cos, sin = np.cos(heading), np.sin(heading)
    return corners @ np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]).T + [x, y, z]


def scene(rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """A scan float64 `[N, 4]` and the lines of its labels."""
    clouds, lines = [_ground(rng)], []
    for kind, lane in zip(SIZES, rng.permutation(3), strict=True):
        length, width, height = np.array(SIZES[kind]) * rng.uniform(0.95, 1.05, 3)
        z, heading = rng.uniform(8, 16), rng.uniform(-np.pi, np.pi)
        box = (z * (lane - 1) * 0.45, GROUND - height / 2, z, length, width, height, heading)
        corners = corners_of(box)
        u = FOCAL * corners[:, 0] / corners[:, 2] + MIDDLE[0]
        v = FOCAL * corners[:, 1] / corners[:, 2] + MIDDLE[1]
        edges = [max(0, u.min()), max(0, v.min()), min(IMAGE[0] - 1, u.max()), min(IMAGE[1] - 1, v.max())]
        words = [kind, 0, 0, 0, *edges, height, width, length, box[0], GROUND, z, heading]
        lines.append(" ".join(f"{word:.4f}" if isinstance(word, float) else str(word) for word in words))
        clouds.append(_on_box(box, rng))
    camera = np.concatenate(clouds)
    lidar = np.stack([camera[:, 2], -camera[:, 0], -camera[:, 1], rng.random(len(camera))], 1)
    return lidar, lines


def _ground(rng: np.random.Generator) -> np.ndarray:
    return np.stack([rng.uniform(-12, 12, 2500), np.full(2500, GROUND), rng.uniform(4, 22, 2500)], 1)


def _on_box(box: tuple[float, ...], rng: np.random.Generator, count: int = 400) -> np.ndarray:
    """Points on the sides that face the camera, just inside."""
    x, y, z, length, width, height, heading = box
    local = rng.uniform(-0.499, 0.499, (4 * count, 3)) * [length, height, width]
    axis, side = rng.integers(0, 3, 4 * count), rng.choice([-0.499, 0.499], 4 * count)
    local[np.arange(4 * count), axis] = side * np.array([length, height, width])[axis]
    cos, sin = np.cos(heading), np.sin(heading)
    turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    normal = np.zeros_like(local)
    normal[np.arange(4 * count), axis] = np.sign(side)
    points, normal = local @ turn.T + [x, y, z], normal @ turn.T
    return points[(normal * points).sum(1) < 0][:count]
