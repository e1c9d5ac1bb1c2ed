"""Generated images: each is a function of its number, and colour and coarse brightness do not reveal the class."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from slimray.data.cards import load_card
from slimray.data.images import image_shapes
from slimray.data.images.image_shapes import CLASSES, encode_png, make_image
from slimray.data.video.movies import open_video

DATASETS = Path(__file__).resolve().parents[3] / "datasets"


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    made = [make_image(number, 5) for number in range(720)]
    return np.stack([picture for picture, _ in made]), np.array([label for _, label in made])


def test_a_picture_is_a_function_of_seed_and_number():
    assert np.array_equal(make_image(7, 3)[0], make_image(7, 3)[0])
    assert not np.array_equal(make_image(7, 3)[0], make_image(7, 4)[0])
    assert not np.array_equal(make_image(7, 3)[0], make_image(19, 3)[0])
    for size in (16, 64, 96):
        picture, label = make_image(30, 0, size)
        assert (picture.shape, picture.dtype, label) == ((size, size, 3), np.uint8, 30 % 12)


def test_the_card_names_the_classes_in_their_order_and_they_are_balanced(pictures):
    assert tuple(load_card("image_shapes", [DATASETS]).class_names()) == CLASSES
    assert Counter(pictures[1].tolist()) == dict.fromkeys(range(12), 60)


def test_a_png_keeps_every_pixel():
    picture, _ = make_image(3, 0)
    with open_video(encode_png(picture)) as opened:
        assert np.array_equal(opened.frames([0])[0], picture)


def nearest(features: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of the second half that is nearest to the mean of its class in the first half."""
    features = (features - features.mean(0)) / (features.std(0) + 1e-9)
    half = len(labels) // 2
    centres = np.stack([features[:half][labels[:half] == label].mean(0) for label in range(len(CLASSES))])
    guess = np.linalg.norm(features[half:, None] - centres, axis=2).argmin(1)
    return float((guess == labels[half:]).mean())


def test_colour_and_coarse_brightness_say_little_of_the_class(pictures):
    data, labels = pictures
    coarse = data.reshape(len(data), 8, 8, 8, 8, 3).mean((2, 4))  # 8 x 8 cells
    assert nearest(data.mean((1, 2)), labels) < 0.2
    assert nearest(coarse.reshape(len(data), -1), labels) < 0.2, "chance is 0.083"


def test_the_outline_and_the_pattern_are_what_the_label_says():
    grid = np.meshgrid(*[(np.arange(128) + 0.5) / 64 - 1] * 2)
    areas = {name: float(image_shapes._inside(name, *grid, 0.8, 128).mean() * 4) for name in image_shapes.OUTLINES}
    assert areas["triangle"] == pytest.approx(3 * np.sqrt(3) / 4 * 0.64, rel=0.02)
    assert areas["square"] == pytest.approx(2 * 0.64, rel=0.02)
    assert areas["disc"] == pytest.approx(np.pi * 0.64**2, rel=0.02)
    waves = {name: image_shapes._waves(name, *grid, 0.25) for name in image_shapes.PATTERNS}
    assert np.ptp(waves["stripes"], axis=0).max() == 0, "stripes are the same all along"
    assert np.allclose(waves["checks"], waves["checks"].T)
    assert np.allclose(waves["rings"], waves["rings"][::-1, ::-1])
    assert np.allclose(waves["rings"], np.rot90(waves["rings"]))
