"""A generated video dataset whose classes are motions, which only the order of the frames reveals.

A textured shape moves across the frame and wraps around, once or three times per clip, to the right or to the left,
from a random place, with random shape and colours. A single frame is equally likely in every class. So is a whole *set*
of frames: 1 and 3 have no common factor with 4, 8 or 16, so that this many evenly spaced frames show the same places in
every class, only in a different order. Hence a network that ignores the order stays at chance, 25 %, and one that uses
it drops to chance when the frames are shuffled.
"""

import io

import av
import numpy as np

CLASSES = ("slow_right", "fast_right", "fast_left", "slow_left")
ROUNDS = (1, 3, -3, -1)  # rounds across the frame per clip
FPS = 12


def make_clip(number: int, seed: int, size: int = 64, num_frames: int = 16) -> tuple[np.ndarray, int]:
    """Return clip `number` of the dataset `seed`: uint8 `[num_frames, size, size, 3]` and its class, index of CLASSES.

    Labels are balanced: the class is `number` modulo 4.
    """
    label = number % len(CLASSES)
    rng = np.random.default_rng([seed, number])
    background = _texture(rng, size, low=30, high=120)
    sprite, alpha = _sprite(rng, size)
    x, y = rng.uniform(0, size, 2)
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    for t in range(num_frames):
        place = (int(y), round(x + ROUNDS[label] * size * t / num_frames) % size)
        mask, picture = (np.roll(a, place, (0, 1)) for a in (alpha, sprite))
        frames[t] = np.where(mask[..., None], picture, background)
    return frames, label


def _texture(rng: np.random.Generator, size: int, low: int, high: int) -> np.ndarray:
    """Return coarse coloured noise, uint8 `[size, size, 3]`."""
    coarse = rng.integers(low, high, (8, 8, 3))
    return np.kron(coarse, np.ones((-(-size // 8), -(-size // 8), 1)))[:size, :size].astype(np.uint8)


def _sprite(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a disc, square or diamond in the upper left corner: picture uint8 `[size, size, 3]`, mask `[size, size]`."""
    radius = int(rng.integers(size // 8, size // 5))
    y, x = np.mgrid[:size, :size] - radius
    kind = rng.integers(3)
    inside = (x**2 + y**2, np.maximum(abs(x), abs(y)) ** 2, (abs(x) + abs(y)) ** 2)[kind] < radius**2
    colour = rng.integers(150, 256, 3)
    stripes = ((x // 3 + y // 3) % 2 * rng.integers(20, 60))[..., None]
    return np.clip(colour - stripes, 0, 255).astype(np.uint8), inside


def encode_h264(frames: np.ndarray, fps: int = FPS, gop: int = 12, crf: int = 18) -> bytes:
    """Encode uint8 `[T, H, W, 3]` (even sides) as an H.264 mp4 file; the same frames give the same bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": str(crf), "g": str(gop), "bf": "0", "rc-lookahead": "0", "threads": "1"}  # as in decoder.py
        stream = container.add_stream("libx264", rate=fps, options={**options, "preset": "veryfast"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
