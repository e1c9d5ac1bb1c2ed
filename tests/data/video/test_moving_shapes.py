"""Generated clips: the class is the motion, and only the order of the frames reveals it."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from slimray.data.video.movies import open_video
from slimray.data.video.moving_shapes import CLASSES, FPS, ROUNDS, encode_h264, make_clip

SIZE, FRAMES, PER_CLASS = 64, 16, 120


def place(frame: np.ndarray) -> list[float]:
    """Return the place of the shape as angles (x, y) on the torus: the mean of pixels brighter than any background."""
    y, x = np.nonzero(frame.min(-1) >= 140)
    return [float(np.angle(np.exp(2j * np.pi * axis / SIZE).mean())) for axis in (x, y)]


@pytest.fixture(scope="module")
def places() -> np.ndarray:
    """The places of the shape in all frames: `[classes, clips, frames, 2]`."""
    found: list[list] = [[] for _ in CLASSES]
    for number in range(PER_CLASS * len(CLASSES)):
        frames, label = make_clip(number, seed=7, size=SIZE, num_frames=FRAMES)
        found[label].append([place(frame) for frame in frames])
    return np.array(found)


def test_labels_are_balanced_and_each_clip_is_a_function_of_its_number():
    labels = [make_clip(number, seed=0, num_frames=2)[1] for number in range(40)]
    assert Counter(labels) == dict.fromkeys(range(4), 10)
    assert np.array_equal(make_clip(5, seed=1)[0], make_clip(5, seed=1)[0])
    assert not np.array_equal(make_clip(5, seed=1)[0], make_clip(5, seed=2)[0])
    assert not np.array_equal(make_clip(5, seed=1)[0], make_clip(9, seed=1)[0])


@pytest.mark.parametrize("frame", [0, 5, 15])
def test_the_shape_is_equally_likely_everywhere_under_every_class(places, frame):
    for harmonic in (1, 2):
        pull = np.abs(np.exp(1j * harmonic * places[:, :, frame]).mean(1))  # 0 if uniform
        assert (PER_CLASS * pull**2).max() < 10  # exceeded with probability exp(-10) where uniform


def test_one_frame_says_nothing_of_the_class_and_two_in_order_say_all(places):
    angles = places[:, :, 7]
    features = np.concatenate([np.cos(angles), np.sin(angles), np.cos(2 * angles), np.sin(2 * angles)], -1)
    centres = features[:, ::2].mean(1)
    nearest = np.linalg.norm(features[:, 1::2, None] - centres, axis=-1).argmin(-1)
    truth = np.arange(len(CLASSES))[:, None]
    assert (nearest == truth).mean() == pytest.approx(1 / 4, abs=0.08)
    moved = np.angle(np.exp(1j * (places[:, :, 8, 0] - places[:, :, 7, 0])))
    steps = 2 * np.pi * np.array(ROUNDS) / FRAMES
    assert (np.abs(moved[..., None] - steps).argmin(-1) == truth).all()


@pytest.mark.parametrize("count", [4, 8, 16])
def test_evenly_spaced_frames_show_the_same_places_under_every_class(places, count):
    start = FRAMES // count // 2
    x = np.sort(places[:, :, start :: FRAMES // count, 0] % (2 * np.pi), axis=2)
    gaps = np.diff(x, axis=2, append=x[:, :, :1] + 2 * np.pi)
    assert np.abs(gaps - 2 * np.pi / count).max() < 2 * np.pi * 1.1 / SIZE  # evenly round, to the pixel


def test_brightness_does_not_depend_on_the_class():
    means = np.array([[make_clip(4 * n + label, 3, num_frames=1)[0].mean() for n in range(100)] for label in range(4)])
    assert np.abs(means.mean(1) - means.mean()).max() < 4 * means.std() / np.sqrt(100)


@pytest.mark.parametrize("size", [64, 80, 160])  # with x264's lookahead one in a hundred differed at 80 and 160
def test_the_same_frames_give_the_same_bytes(size):
    frames, _ = make_clip(6, seed=1, size=size)
    rng, digests = np.random.default_rng(0), set()
    for _ in range(40):
        litter = [np.full(int(rng.integers(1, 400_000)), int(rng.integers(256)), np.uint8) for _ in range(20)]
        del litter  # it is what the next allocations find in memory
        digests.add(hashlib.sha256(encode_h264(frames)).hexdigest())
    assert len(digests) == 1


def test_an_encoded_clip_keeps_its_frames():
    frames, _ = make_clip(2, seed=0)
    with open_video(encode_h264(frames)) as video:
        assert (video.num_frames, video.fps) == (len(frames), FPS)
        error = np.stack(list(video.walk())).astype(float) - frames
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 30
