"""Samples of the generated datasets, as files to be stored: functions of their number and the seed."""

from dataclasses import dataclass
from typing import Any

from slimray.data.images import image_shapes
from slimray.data.points import clouds, shapes


@dataclass(frozen=True)
class Generated:
    """A generated sample: the bytes of its file, its class, the file extension, and columns of the index that describe
    it (`shape`). With `alone` it is stored as a file of its own, otherwise packed into a shard."""

    data: bytes
    label: int
    ending: str
    shape: dict[str, Any]
    alone: bool = False


@dataclass(frozen=True)
class Sizes:
    """Sizes of generated samples: side of frames and images in pixels, frames of a clip, points of a cloud."""

    size: int
    frames: int
    points: int


def generate_clip(number: int, seed: int, sizes: Sizes) -> Generated:
    """Return a clip whose class is a motion, as H.264."""
    from slimray.data.video import moving_shapes  # PyAV is slow to import

    frames, label = moving_shapes.make_clip(number, seed, size=sizes.size, num_frames=sizes.frames)
    shape = {"frames": sizes.frames, "fps": float(moving_shapes.FPS), "width": sizes.size, "height": sizes.size}
    return Generated(moving_shapes.encode_h264(frames), int(label), ".mp4", shape, alone=True)


def generate_image(number: int, seed: int, sizes: Sizes) -> Generated:
    """Return an image of a patterned shape, as PNG."""
    picture, label = image_shapes.make_image(number, seed, size=sizes.size)
    return Generated(image_shapes.encode_png(picture), int(label), ".png", {"width": sizes.size, "height": sizes.size})


def generate_cloud(number: int, seed: int, sizes: Sizes) -> Generated:
    """Return a cloud of points on a shape with parts, as .npz."""
    coords, labels, label = shapes.make_cloud(number, seed, num_points=sizes.points)
    stored = clouds.write_cloud(clouds.Cloud(coords, labels=labels))
    return Generated(stored, int(label), ".npz", {"frames": sizes.points})
