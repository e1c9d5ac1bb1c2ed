"""A picture and its smaller version: reduced by the published rule, cropped and rotated as a function of the key."""

import random

import numpy as np
import pytest

from slimray.data.images.pairs import PairRecipe, as_pixels, crop, resize
from slimray.data.samples import BadSample


@pytest.fixture(scope="module")
def recorded(shared):
    return np.load(shared / "parity/images/sr_images.npz")


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_pictures_shrink_as_published(recorded, scale):
    small = resize(recorded["hr"], 48 // scale, 60 // scale)
    np.testing.assert_allclose(small, recorded[f"lr_x{scale}_matlab_style_float"], atol=1e-4)
    np.testing.assert_array_equal(as_pixels(small), recorded[f"lr_x{scale}_matlab_style_uint8"])


def test_a_flat_picture_stays_flat_at_any_size():
    flat = np.full((7, 5, 3), 77, np.uint8)
    for height, width in ((14, 10), (3, 2), (21, 4)):
        np.testing.assert_allclose(resize(flat, height, width), 77)


def test_a_crop_is_part_of_the_picture_and_a_function_of_the_key():
    picture = np.arange(40 * 50 * 3).reshape(40, 50, 3).astype(np.uint8)
    plain = PairRecipe(scale=2, size=8)
    drawn = {crop(picture, plain, random.Random(seed)).tobytes() for seed in range(20)}
    assert len(drawn) > 10
    windows = np.lib.stride_tricks.sliding_window_view(picture, (16, 16, 3)).reshape(-1, 16 * 16 * 3)
    assert drawn <= {window.tobytes() for window in windows}
    again = [crop(picture, plain, random.Random(3)) for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_turned_and_mirrored_crops_keep_their_pixels():
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    recipe = PairRecipe(scale=2, size=8, flip=True)
    drawn = {crop(picture, recipe, random.Random(seed)).tobytes() for seed in range(60)}
    turned = [np.rot90(side, k) for k in range(4) for side in (picture, picture[:, ::-1])]
    assert drawn == {np.ascontiguousarray(one).tobytes() for one in turned}


def test_a_validation_takes_the_centre_and_a_small_picture_is_one_sentence():
    picture = np.arange(30 * 20 * 3).reshape(30, 20, 3).astype(np.uint8)
    recipe = PairRecipe(scale=2, size=8, mode="val", flip=True)
    np.testing.assert_array_equal(crop(picture, recipe, random.Random(0)), picture[7:23, 2:18])
    with pytest.raises(BadSample, match="is 20 x 30 pixels, a crop needs 32"):
        crop(picture, PairRecipe(scale=2, size=16), random.Random(0))
