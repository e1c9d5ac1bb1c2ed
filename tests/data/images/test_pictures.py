"""From the bytes of a picture to the input of an image network: crops, colours, formats, damage, training."""

import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFile
from tests.waits import patience

from slimray import models
from slimray.data import modalities
from slimray.data.bytes import write_shard
from slimray.data.cards import Card
from slimray.data.images import image_shapes
from slimray.data.images.pictures import ImageRecipe, draw_area_crop, make_image
from slimray.data.samples import BadSample
from slimray.data.spec import DataSpec
from slimray.data.video.clips import generators
from slimray.data.video.decoder import Decoder
from slimray.edge import cost
from slimray.tasks.network import Input, to_input
from slimray.train import optimizers
from slimray.train.methods.method import Piece, Setup
from slimray.train.methods.plain import PlainReplica
from slimray.train.spec import OptimSpec

KEY = (0, 0, 0)
PLAIN = {"brightness": 0.0, "saturation": 0.0}
WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), **PLAIN}


def ramp(width: int, height: int) -> np.ndarray:
    """A picture whose red increases to the right and green downwards."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), np.full_like(x, 60)], 2).astype(
        np.uint8
    )


def encoded(picture: np.ndarray, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, form, **options)
    return buffer.getvalue()


def rng(epoch: int):
    return generators((0, epoch, 0))[1]


@pytest.fixture(scope="module")
def decoder():
    with Decoder(timeout_s=patience(30)) as one:
        yield one


# ---------------------------------------------------------------------------------------------------- the recipe


def test_a_recipe_survives_json_and_its_short_side_follows_its_size():
    recipe = ImageRecipe(size=96, flip_labels=((1, 2),), flip=True)
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in recipe.to_dict().items()}
    assert ImageRecipe.from_dict(plain) == recipe
    assert [ImageRecipe(size=size).short_side for size in (224, 160, 128, 32)] == [256, 183, 147, 37]
    assert ImageRecipe(size=32, resize=32).short_side == 32
    assert ImageRecipe(size=64, resize=32).short_side == 64, "never below the size"


def test_with_padding_a_training_crop_is_a_window_of_the_picture_in_black():
    picture = ramp(32, 32)
    padded = np.pad(picture, ((4, 4), (4, 4), (0, 0)))
    windows = {padded[y : y + 32, x : x + 32].tobytes() for y in range(9) for x in range(9)}
    recipe = ImageRecipe(32, 32, padding=4, **PLAIN)
    drawn = [make_image(picture, recipe, rng(epoch))[0] for epoch in range(300)]
    assert {view[0].tobytes() for view in drawn} <= windows
    assert len({view[0].tobytes() for view in drawn}) > 70, "all 81 places are drawn"
    mirrored = [make_image(picture, ImageRecipe(32, 32, padding=4, flip=True, **PLAIN), rng(e)) for e in range(40)]
    assert all(((view[0][:, ::-1] if back else view[0]).tobytes()) in windows for view, back in mirrored)
    assert {back for _, back in mirrored} == {True, False}


@pytest.mark.parametrize(("resize", "side"), [(None, 32), (40, 40)])
def test_padding_enlarges_no_picture_unless_a_short_side_is_asked_for(resize, side):
    card = Card.model_validate({"name": "x", "layout": "folders", "sample": "image", "splits": {"train": "."}})
    data = DataSpec.model_validate({"size": 32, "resize": resize, "flip": False, "images": {"padding": 4, **PLAIN}})
    train, val = (
        ImageRecipe.from_dict(modalities.MODALITIES["image"].make_recipe(data, card, 0, mode))
        for mode in ("train", "val")
    )
    picture = ramp(32, 32)
    scaled = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))
    padded, places = np.pad(scaled, ((4, 4), (4, 4), (0, 0))), range(side - 32 + 9)
    windows = {padded[y : y + 32, x : x + 32].tobytes() for y in places for x in places}
    drawn = [make_image(picture, train, rng(epoch))[0] for epoch in range(40)]
    assert all(view.shape == (1, 32, 32, 3) for view in drawn)
    assert {view[0].tobytes() for view in drawn} <= windows
    edge = (side - 32) // 2
    assert np.array_equal(make_image(picture, val, rng(0))[0][0], scaled[edge : edge + 32, edge : edge + 32])


def test_validation_takes_the_centre_of_the_picture_scaled_to_its_short_side():
    same = ramp(48, 40)
    view, flipped = make_image(same, ImageRecipe(size=40, resize=40, mode="val"), rng(0))
    assert (view.shape, flipped) == ((1, 40, 40, 3), False)
    assert np.array_equal(view[0], same[:, 4:44]), "a picture that has the short side already keeps its pixels"
    for width, height in ((500, 375), (375, 500), (20, 30)):
        scaled = Image.fromarray(ramp(width, height))
        w, h = (256, int(256 * height / width)) if width <= height else (int(256 * width / height), 256)
        x, y = round((w - 224) / 2), round((h - 224) / 2)
        expected = np.asarray(scaled.resize((w, h), Image.Resampling.BILINEAR))[y : y + 224, x : x + 224]
        view, _ = make_image(ramp(width, height), ImageRecipe(mode="val"), rng(0))
        assert np.array_equal(view[0], expected)


@pytest.mark.parametrize("crops", [1, 3, 5, 10])
def test_several_crops_are_as_many_views(crops):
    views, _ = make_image(ramp(60, 40), ImageRecipe(size=32, resize=40, mode="test", crops=crops), rng(0))
    assert views.shape == (crops, 32, 32, 3)
    if crops == 10:
        assert np.array_equal(views[1::2], views[::2, :, ::-1])
        assert len(np.unique(views[::2], axis=0)) == 5
    if crops == 3:
        left, right, centre = (int(view[0, 0, 0]) for view in views)
        assert left == 0
        assert centre == pytest.approx(right / 2, abs=2)
        assert right == pytest.approx(255 * 28 / 59, abs=2)


def test_a_training_crop_is_a_function_of_its_key():
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    recipe = ImageRecipe(size=32, flip=True)
    again = [make_image(picture, recipe, rng(epoch))[0] for epoch in (0, 0, 1)]
    assert np.array_equal(again[0], again[1])
    assert not np.array_equal(again[0], again[2])
    assert again[0].shape == (1, 32, 32, 3)
    assert again[0].dtype == np.uint8


def test_training_crops_have_areas_and_shapes_all_over_their_ranges():
    drawn = np.array([draw_area_crop(640, 480, (0.08, 1.0), (3 / 4, 4 / 3), rng(epoch)) for epoch in range(2000)])
    x, y, w, h = drawn.T
    assert x.min() >= 0
    assert y.min() >= 0
    assert (x + w).max() <= 640
    assert (y + h).max() <= 480
    area, shape = w * h / (640 * 480), w / h
    assert 0.079 < area.min() < 0.1
    assert area.max() > 0.9
    assert np.quantile(area, 0.25) == pytest.approx(0.08 + 0.92 / 4, abs=0.06)  # wide crops of the largest do not fit
    assert 0.74 < shape.min() < 0.78
    assert 1.29 < shape.max() < 1.35
    assert np.log(shape)[area < 0.5].mean() == pytest.approx(0, abs=0.02)
    assert x[area < 0.3].std() > 100, "they lie anywhere"


@pytest.mark.parametrize(("width", "height", "box"), [(1000, 9, (494, 0, 12, 9)), (9, 1000, (0, 494, 9, 12))])
def test_a_picture_too_long_for_any_crop_gives_its_middle(width, height, box):
    assert draw_area_crop(width, height, (0.5, 1.0), (3 / 4, 4 / 3), rng(0)) == box


def test_mirroring_mirrors_pixels_and_swaps_labels(tmp_path):
    recipe = ImageRecipe(size=40, flip=True, **WHOLE)
    seen = {}
    for epoch in range(20):
        view, flipped = make_image(ramp(40, 40), recipe, rng(epoch))
        seen[flipped] = view[0]
    assert np.array_equal(seen[False], ramp(40, 40))
    assert np.array_equal(seen[True], seen[False][:, ::-1])
    (tmp_path / "a.png").write_bytes(encoded(ramp(40, 40)))
    recipe, labels = ImageRecipe(size=40, flip=True, flip_labels=((2, 5),), **WHOLE), {}
    for epoch in range(20):
        view, label = modalities.load_image(row("a.png", 2), str(tmp_path), recipe, (0, epoch, 0), 30)
        labels[label] = view[0]
    assert np.array_equal(labels[5], labels[2][:, ::-1])


def test_colours_change_by_no_more_than_the_recipe_says():
    grey = np.full((8, 8, 3), 120, np.uint8)
    seen = [
        int(make_image(grey, ImageRecipe(size=8, saturation=0.9), rng(epoch))[0][0, 0, 0, 0]) for epoch in range(200)
    ]
    low, high = 120 * (1 - 32 / 255), 120 * (1 + 32 / 255)
    assert low - 1 <= min(seen) < low + 3
    assert high - 3 < max(seen) <= high + 1
    colour = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    spreads = []
    for epoch in range(200):
        view = make_image(colour, ImageRecipe(size=8, brightness=0.0), rng(epoch))[0][0, 0, 0].astype(int)
        spreads.append(view.max() - view.min())
    assert 75 <= min(spreads) < 85
    assert 210 < max(spreads) <= 226
    factor = 1.3
    expected = np.asarray(ImageEnhance.Color(Image.fromarray(colour)).enhance(factor))
    assert np.ptp(expected.astype(int), axis=2).max() == pytest.approx(150 * factor, abs=2), "as PIL has it"


def test_a_picture_that_would_become_gigabytes_is_refused(decoder):
    with pytest.raises(ValueError, match="is 1 x 60000 pixels, too elongated for a short side of 256"):
        make_image(np.zeros((60_000, 1, 3), np.uint8), ImageRecipe(mode="val"), rng(0))
    with pytest.raises(BadSample, match=r"^is 60000 x 1 pixels, too elongated for a short side of 256$"):
        decoder.image("thin.png", encoded(np.zeros((1, 60_000, 3), np.uint8)), ImageRecipe(mode="val"), KEY)


# ------------------------------------------------------------------------------------------- files as they come


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "JPEG2000", "WEBP", "GIF", "JPEG"])
def test_a_file_is_read_by_what_it_holds_whatever_its_name(decoder, form):
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    picture = np.kron(np.array([[[200, 30, 30], [30, 200, 30]]] * 2, np.uint8), np.ones((20, 20, 1), np.uint8))
    view, _ = decoder.image("a.jpeg", encoded(picture, form, **options), ImageRecipe(40, 40, "val"), KEY)
    worst = np.abs(view[0].astype(int) - picture).max()
    assert worst == 0 if form != "JPEG" else worst < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright_as_its_exif_says(decoder, orientation):
    upright = ramp(40, 40)
    undo = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a), 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encoded(np.ascontiguousarray(undo[orientation](upright)), exif=exif)
    view, _ = decoder.image("a.png", stored, ImageRecipe(40, 40, "val"), KEY)
    assert np.array_equal(view[0], upright)


def test_a_damaged_note_is_no_damage_to_the_picture(decoder):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(ramp(40, 40), "JPEG", exif=exif)
    at = data.index(b"Exif\0\0") + 6
    broken = data[:at] + b"\xff" * 20 + data[at + 20 :]
    view, _ = decoder.image("a.jpg", broken, ImageRecipe(40, 40, "val"), KEY)
    assert view[0, :, :, 0].mean(0).argmax() > 30, "not turned"


def test_sixteen_bits_become_their_upper_eight(decoder):
    values = (np.arange(1600).reshape(40, 40) * 40).astype(np.uint16)
    view, _ = decoder.image("a.png", encoded(values), ImageRecipe(40, 40, "val"), KEY)
    assert np.array_equal(view[0], np.repeat((values >> 8)[..., None], 3, 2))
    with pytest.raises(BadSample, match="holds floating-point numbers"):
        decoder.image("a.tiff", encoded(values.astype(np.float32), "TIFF"), ImageRecipe(40, 40, "val"), KEY)


def test_the_damaged_files_are_refused_with_a_reason_and_the_odd_ones_read(shared, decoder):
    reasons, recipe = {}, ImageRecipe(32, 32, "val")
    for path in sorted((shared / "data/images/damaged").glob("*.*g")):
        try:
            view, _ = decoder.image(path.name, path.read_bytes(), recipe, KEY)
            reasons[path.name] = ""
            assert view.std() > 5
        except BadSample as bad:
            reasons[path.name] = str(bad)
    assert reasons.pop("cmyk.jpg") == reasons.pop("grey.png") == ""
    assert reasons.pop("zero_length.jpg") == "the file is empty"
    assert reasons.pop("text_named_as.jpg") == "is not a picture that can be read"
    assert sorted(reasons) == ["bit_flips.jpg", "truncated.jpg"]
    assert all(reason.startswith("does not decode (") for reason in reasons.values())


def test_a_jpeg_cut_anywhere_is_refused(decoder):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(noise, "JPEG")
    for share in (0.02, 0.3, 0.6, 0.95):
        with pytest.raises(BadSample, match=r"does not decode|is not a picture"):
            decoder.image("cut.jpg", data[: int(len(data) * share)], ImageRecipe(32), KEY)


def test_one_wrong_bit_anywhere_in_a_png_is_noticed(decoder):
    data = encoded(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    assert decoder.image("a.png", data, ImageRecipe(40, 40, "val"), KEY)[0].shape == (1, 40, 40, 3)
    for place in np.linspace(16, len(data) - 20, 20).astype(int):
        broken = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        with pytest.raises(BadSample):
            decoder.image("a.png", broken, ImageRecipe(40, 40, "val"), KEY)


def test_a_declared_size_is_checked_before_anything_is_decoded(decoder):
    png = bytearray(encoded(np.zeros((8, 8, 3), np.uint8)))
    png[16:24] = struct.pack(">II", 12_000, 12_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    with pytest.raises(BadSample, match="12000 x 12000 pixels are too large to decode"):
        decoder.image("bomb.png", bytes(png), ImageRecipe(32), KEY)


def test_formats_that_run_programs_are_not_opened(decoder):
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    with pytest.raises(BadSample, match="is not a picture that can be read"):
        decoder.image("a.jpg", encoded(np.zeros((8, 8, 3), np.uint8), "EPS"), ImageRecipe(32), KEY)


def test_only_pictures_too_large_are_made_smaller(decoder):
    small, large = encoded(ramp(80, 60)), encoded(ramp(200, 100), "BMP")
    for side in (None, 60, 100):
        data, found, psnr = decoder.shrink("a", small, side)
        assert (data, found.width, found.height, psnr) == (small, 80, 60, None)
    data, found, psnr = decoder.shrink("b", large, 50)
    assert (found.width, found.height, data[:3]) == (100, 50, b"\xff\xd8\xff")
    assert len(data) < len(large) / 10
    assert psnr is not None
    assert psnr > 30
    view, _ = decoder.image("b", data, ImageRecipe(50, 50, "val"), KEY)
    expected, _ = decoder.image("b", large, ImageRecipe(50, 50, "val"), KEY)
    assert np.abs(view.astype(int) - expected).mean() < 3


# -------------------------------------------------------------------------------------------------- the networks


def row(path: str, label: int = 0, shard: str = "", number: int = -1) -> dict:
    return {"path": path, "label": label, "frames": 0, "shard": shard, "row": number}


def test_pixels_of_images_are_normalised_as_those_of_clips():
    data = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    pixels, device = Input(), torch.device("cpu")
    out = to_input(data, pixels, device)
    expected = (data[1, 2] / 255.0 - pixels.mean) / pixels.std
    assert out.shape == (6, 3, 8, 8)
    np.testing.assert_allclose(out[5].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    clips = to_input(data[:, :, None], pixels, device)
    assert torch.equal(clips[:, 0], out), "a clip of one frame gives the same numbers"


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [("resnet18", 11_689_512, 1.814e9), ("resnet50", 25_557_032, 4.089e9), ("mobilenetv2", 3_504_872, 0.3008e9)],
)
def test_image_networks_count_as_published(name, params, macs):
    net = cost.build_on_meta(lambda: models.build(name, num_classes=1000))
    assert cost.count_params(net) == params
    assert cost.count_macs(net, (1, 3, 224, 224)) == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenetv2"])
def test_every_image_network_is_trained_in_any_groups_from_its_own_head(name):
    net = models.build(name, num_classes=5, width=0.125)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    for groups in ("tsm", "no_norm_decay", "plain"):
        found = optimizers.parameter_groups(net, groups)
        assert sum(len(group["params"]) for group in found) == len(list(net.parameters()))
        if groups == "tsm":
            sizes = {group["name"]: len(group["params"]) for group in found}
            assert (sizes["first_conv_weight"], sizes["head_weight"], sizes["head_bias"]) == (1, 1, 1)


def test_a_network_learns_from_packed_images(tmp_path):
    rows = [image_shapes.make_image(number, 0, size=32) for number in range(36)]
    packed = [
        {"path": f"{n}.png", "label": label, "data": image_shapes.encode_png(p)} for n, (p, label) in enumerate(rows)
    ]
    write_shard(pafs.LocalFileSystem(), f"{tmp_path}/train.parquet", packed)
    recipe = ImageRecipe(size=32, scale=(0.8, 1.0), **PLAIN).to_dict()
    kind = modalities.modality_of(recipe)
    assert modalities.sample_shape(recipe) == (1, 32, 32, 3)
    assert modalities.input_shape(recipe) == (3, 32, 32)
    torch.manual_seed(0)
    net = models.build("resnet18", num_classes=len(image_shapes.CLASSES), width=0.25)
    optim = OptimSpec(optimizer="adamw", lr=0.003, reference_batch=36, epochs=1, groups="no_norm_decay")
    replica = PlainReplica(net, Setup(optim, Input(), modalities.input_shape(recipe), torch.device("cpu")))
    losses = []
    for epoch in range(12):
        loaded = [
            kind.load(
                row(f"{n}.png", n % 12, "train.parquet", n),
                str(tmp_path),
                modalities.read_recipe(recipe),
                (0, epoch, n),
                30,
            )
            for n in range(36)
        ]
        piece = Piece(np.stack([image for image, _ in loaded]), np.array([label for _, label in loaded]))
        losses.append(replica.step([piece], 36, 0.003, (0, epoch)).loss_sum / 36)
    assert losses[0] == pytest.approx(math.log(12), abs=0.6)
    assert losses[-1] < 0.4 * losses[0]


def test_a_missing_file_is_named_and_no_bad_sample(tmp_path):
    recipe = ImageRecipe(32)
    with pytest.raises(FileNotFoundError, match=r"gone.jpg"):
        modalities.load_image(row("gone.jpg"), str(tmp_path), recipe, KEY, 30)
    Path(tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(BadSample, match="is not a picture that can be read"):
        modalities.load_image(row("text.jpg"), str(tmp_path), recipe, KEY, 30)
