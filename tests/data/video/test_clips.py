"""Sampling and crops equal the recorded draws of the published implementation; clips depend on their key alone."""

import itertools
import json
import random

import numpy as np
import pytest

from slimray.data.video import clips
from slimray.data.video.clips import (
    ClipRecipe,
    crop_offsets,
    crop_pairs,
    draw_crop,
    flip_label,
    frame_indices,
    make_clip,
)


@pytest.fixture(scope="module")
def sampling(shared):
    return json.loads((shared / "parity/tsm_sampling.json").read_text())


@pytest.fixture(scope="module")
def crops(shared):
    return json.loads((shared / "parity/tsm_crops.json").read_text())


def indices(case, **options):
    recipe = ClipRecipe(num_segments=case["num_segments"], **options)
    rng = np.random.RandomState(case.get("seed", 0))
    return (frame_indices(recipe, case["num_frames"], rng) + 1).tolist()  # recorded numbers are 1-based


def test_uniform_sampling_as_recorded(sampling):
    for case in sampling["uniform"]:
        assert indices(case, mode="val") == case["val"], case
        assert indices(case, mode="test") == case["test"], case


def test_twice_and_dense_sampling_as_recorded(sampling):
    for case in sampling["twice"]:
        assert indices(case, mode="test", num_clips=2) == case["test"], case
    for case in sampling["dense"]:
        assert indices(case, mode="test", sampling="dense", num_clips=10) == case["test"], case


def test_random_sampling_draws_as_recorded(sampling):
    for case in sampling["random_train_uniform"]:
        assert indices(case) == case["idx"], case
    for case in sampling["random_train_dense"]:
        assert indices(case, sampling="dense") == case["idx"], case


def test_flow_sampling_as_recorded(sampling):
    for case in sampling["uniform_flow_new_length5"]:
        n, s = case["num_frames"], case["num_segments"]
        assert (clips.uniform_val(n, s, new_length=5) + 1).tolist() == case["val"]
        assert (clips.uniform_test(n, s, new_length=5) + 1).tolist() == case["test"]


def test_multi_scale_crops_as_recorded(crops):
    for case in crops["multi_scale"]:
        (width, height), scales = case["size"], case["scales"]
        pairs = crop_pairs(width, height, 224, scales)
        assert [list(p) for p in pairs] == case["pairs"]
        for (w, h), recorded in zip(pairs, case["offsets_for_each_pair"], strict=True):
            assert [list(o) for o in crop_offsets(width, height, w, h)] == recorded
        for seed, (w, h, x, y) in case["draws_seed_to_(w,h,x,y)"]:
            assert draw_crop(width, height, 224, scales, 1, random.Random(seed)) == (x, y, w, h)


def test_test_crops_as_recorded(crops):
    for case in crops["fullres"]:
        recorded = [tuple(o) for o in case["offsets_order_left_right_center"]]
        assert clips.view_crops(*case["size"], case["crop"], 3) == recorded
    for case in crops["five"]:
        assert clips.view_crops(*case["size"], case["crop"], 5) == [tuple(o) for o in case["offsets"]]


def pictures(num: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(num)]


@pytest.mark.parametrize("crops_", [1, 3, 5, 10])
@pytest.mark.parametrize("num_clips", [1, 2])
def test_views_are_clips_times_crops(crops_, num_clips):
    recipe = ClipRecipe(4, 32, 36, mode="test", num_clips=num_clips, crops=crops_)
    clip, flipped = make_clip(pictures(4 * num_clips), recipe, random.Random(0))
    assert clip.shape == (recipe.num_views, 4, 32, 32, 3)
    assert clip.dtype == np.uint8
    assert not flipped


def test_a_training_clip_is_a_function_of_its_key():
    recipe, frames = ClipRecipe(4, 32, flip=True), pictures(4)

    def clip(key):
        return make_clip(frames, recipe, clips.generators(key)[1])

    assert np.array_equal(clip((0, 1, 2))[0], clip((0, 1, 2))[0])
    assert len({clip((0, epoch, 2))[0].tobytes() for epoch in range(8)}) > 4
    assert {clip((0, epoch, 2))[1] for epoch in range(20)} == {True, False}


def test_mirroring_mirrors_pixels_and_swaps_labels():
    recipe = ClipRecipe(1, 48, scales=(1.0,), flip=True, flip_labels=((2, 5),))
    frame = pictures(1, 48, 48)
    seen = {}
    for epoch in range(20):
        clip, flipped = make_clip(frame, recipe, clips.generators((0, epoch, 0))[1])
        seen[flipped] = clip[0, 0]
    assert np.array_equal(seen[True], seen[False][:, ::-1])
    assert [flip_label(label, recipe.flip_labels) for label in (2, 5, 3)] == [5, 2, 3]


def test_shuffled_frames_are_the_same_frames_in_another_order():
    natural = frame_indices(ClipRecipe(8, mode="val"), 24, np.random.RandomState(3))
    shuffled = frame_indices(ClipRecipe(8, mode="val", frame_order="shuffled"), 24, np.random.RandomState(3))
    assert sorted(natural) == sorted(shuffled)
    assert list(natural) != list(shuffled)


def test_a_recipe_survives_json():
    recipe = ClipRecipe(flip_labels=((1, 2),), scales=(1.0, 0.5))
    assert ClipRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_the_frames_of_a_short_video_are_spread():
    def taken(num_frames, **fields):
        recipe = ClipRecipe(short="spread", **fields)
        return frame_indices(recipe, num_frames, np.random.RandomState(0)).tolist()

    assert taken(8, mode="val") == taken(8, mode="train") == list(range(8))
    assert taken(4, mode="val") == [0, 0, 1, 1, 2, 2, 3, 3]
    assert taken(4, mode="test", num_clips=2) == [0, 0, 1, 1, 2, 2, 3, 3] * 2
    assert taken(1, mode="train") == [0] * 8
    assert taken(16, sampling="dense", mode="val") == [1, 3, 5, 7, 9, 11, 13, 15]
    assert taken(16, sampling="dense", mode="test", num_clips=10) == [1, 3, 5, 7, 9, 11, 13, 15] * 10
    for num_frames, seed in itertools.product(range(1, 8), range(20)):
        drawn = frame_indices(ClipRecipe(short="spread"), num_frames, np.random.RandomState(seed))
        assert (np.diff(drawn) >= 0).all()
        assert drawn.min() >= 0
        assert drawn.max() < num_frames
        assert len(set(drawn)) > num_frames // 3  # of seven segments or fewer, few stay empty


@pytest.mark.parametrize("fields", [{"mode": "val"}, {"mode": "train"}, {"sampling": "dense", "mode": "train"},
                                    {"sampling": "dense", "mode": "test", "num_clips": 10}])  # fmt: skip
def test_a_video_that_is_long_enough_is_sampled_as_published(fields):
    for num_frames in range(ClipRecipe(**fields).span + 1, 120):
        both = [
            frame_indices(ClipRecipe(short=short, **fields), num_frames, np.random.RandomState(3))
            for short in ("spread", "published")
        ]
        assert np.array_equal(*both), num_frames


def test_recipes_written_before_short_videos_were_spread_stay_as_published():
    old = {key: value for key, value in ClipRecipe(mode="val").to_dict().items() if key != "short"}
    assert frame_indices(ClipRecipe.from_dict(old), 8, np.random.RandomState(0)).tolist() == [0] * 8
