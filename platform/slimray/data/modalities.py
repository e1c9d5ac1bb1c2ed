"""Clips, images, clouds of points, frustums, texts: everything specific to a modality is in its row of MODALITIES.

A recipe travels as a plain dict whose `kind` names the row. `load` makes one sample from one row of an index: an array
of the row's shape and type, and its target (a number, or one per point). All randomness is a function of the key (seed,
epoch, sample). Files that do not decode raise BadSample, storage failures StorageError. The prediction is defined by a
task (slimray.tasks), of whose targets only `Target` is known here. No torch.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from slimray.data import conversion, synthetic
from slimray.data.bytes import read_sample, read_whole
from slimray.data.images.pairs import PairRecipe, load_pair, open_pair, pair_recipe, require_pair
from slimray.data.images.pictures import ImageRecipe, make_image
from slimray.data.labels import Labelling
from slimray.data.modality import Key, Modality, Target, Top
from slimray.data.open import decoder, filesystem
from slimray.data.own_files import open_clip, open_image, open_points
from slimray.data.paths import ALL_FILES, NUMBERED
from slimray.data.points import point_sets
from slimray.data.points.columns import parse_columns
from slimray.data.points.reader import cloud_reader
from slimray.data.points.recipe import PointRecipe
from slimray.data.samples import BadSample
from slimray.data.spec import DataSpec
from slimray.data.text import samples as text
from slimray.data.text.conversion import convert_text, learn_vocabulary
from slimray.data.text.vocabulary import PAD
from slimray.data.video.clips import ClipRecipe, flip_label, make_clip
from slimray.data.views import clip_views, clip_views_fit, image_views, point_views, text_views
from slimray.runs import examples
from slimray.spec import lookup

if TYPE_CHECKING:
    from slimray.data.cards import Card


def _show_image(view: np.ndarray, truth: str, top: Top, _: Sequence[Any]) -> dict[str, Any]:
    return examples.clip(view[None], truth, top)


def _show_clip(view: np.ndarray, truth: str, top: Top, _: Sequence[Any]) -> dict[str, Any]:
    return examples.clip(view, truth, top)


def _show_cloud(view: np.ndarray, truth: str, top: Top, responses: Sequence[Any]) -> dict[str, Any]:
    return examples.CloudView("", view[:3].T, truth, top=top, responses=responses).to_plain()


def _clip_frame(recipe: ClipRecipe, picture: np.ndarray) -> np.ndarray:
    alone = replace(recipe, mode="val", num_segments=1, num_clips=1, crops=1)
    return make_clip([picture], alone, random.Random(0))[0][0, 0]


def _image_frame(recipe: ImageRecipe, picture: np.ndarray) -> np.ndarray:
    return make_image(picture, replace(recipe, mode="val", crops=1), random.Random(0))[0][0]


def modality_of(recipe: Mapping[str, Any]) -> Modality:
    """Return the row of MODALITIES that a plain recipe names; raise UserError for an unknown one."""
    return lookup(MODALITIES, recipe.get("kind", "clip"), "kind of sample")


def read_recipe(recipe: Mapping[str, Any]) -> Any:
    """Return a plain recipe as a recipe, without its target; raise TypeError or ValueError for invalid fields."""
    return modality_of(recipe).recipe.from_dict({key: value for key, value in recipe.items() if key != "target"})


def target_of(recipe: Mapping[str, Any]) -> Target:
    """Return the target of a plain recipe; recipes of older versions that name none get that of their modality."""
    plain = recipe.get("target")
    if plain is not None:
        return Target(tuple(plain["shape"]), plain["dtype"], plain["fill"])
    return modality_of(recipe).target(read_recipe(recipe))


def pads_of(recipe: Mapping[str, Any]) -> tuple[float, float]:
    """Return the values that pad shorter samples of a plain recipe, and their targets."""
    return modality_of(recipe).pad or 0, target_of(recipe).fill


def empty_sample(recipe: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return a placeholder for a sample that does not decode, with its target, if samples differ in length."""
    modality, target = modality_of(recipe), target_of(recipe)
    shape = modality.shape(replace(read_recipe(recipe), length=1))
    return np.full(shape, modality.pad, modality.dtype), np.full((*target.shape[:-1], 1), target.fill, target.dtype)


def sample_shape(recipe: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of a sample of a plain recipe; the first axis is views."""
    return modality_of(recipe).shape(read_recipe(recipe))


def sample_bytes(recipe: Mapping[str, Any]) -> int:
    """Return the bytes of a decoded sample of a plain recipe, target included; of the longest if they differ."""
    return (
        math.prod(sample_shape(recipe)) * np.dtype(modality_of(recipe).dtype).itemsize
        + target_of(recipe).empty(1).nbytes
    )


def input_shape(recipe: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of one view as the input of a network, without the batch: (T, 3, H, W), (C, H, W) or (C, N)."""
    return modality_of(recipe).input_shape(read_recipe(recipe))


# ------------------------------------------------------------------------------------------------------- reading


def load_clip(row: dict[str, Any], root: str, recipe: ClipRecipe, key: Key, timeout_s: float) -> tuple[np.ndarray, int]:
    """Return a clip uint8 `[V, T, size, size, 3]` and its label."""
    fs, path = filesystem(root)
    data = read_sample(fs, path, row, recipe, key)
    clip, flipped = decoder(timeout_s).clip(row["path"], data, recipe, key)
    return clip, flip_label(row["label"], recipe.flip_labels) if flipped else row["label"]


def load_image(
    row: dict[str, Any], root: str, recipe: ImageRecipe, key: Key, timeout_s: float
) -> tuple[np.ndarray, int]:
    """Return an image uint8 `[V, size, size, channels]` and its label."""
    fs, path = filesystem(root)
    image, flipped = decoder(timeout_s).image(row["path"], read_whole(fs, path, row), recipe, key)
    return image, flip_label(row["label"], recipe.flip_labels) if flipped else row["label"]


def load_points(
    row: dict[str, Any], root: str, recipe: PointRecipe, key: Key, timeout_s: float
) -> tuple[np.ndarray, Any]:
    """Return a cloud float32 `[V, C, N]` and its label, or a label per point int64 `[N]` with `recipe.per_point`.

    `row["label"]` is the class of the whole cloud. In mode "test", labels per point are int64 `[2, V, N]`: the label of
    each point and its row in the file or room, both -1 in blank views (see `PointRecipe.fill`).
    """
    fs, path = filesystem(root)
    data = read_whole(fs, path, row)
    sample = cloud_reader(timeout_s).sample(row["path"], data, recipe, key, shape=max(0, row["label"]))
    if not recipe.per_point:
        return sample.points, row["label"]
    if sample.labels is None:
        raise BadSample("has no label per point")
    if recipe.mode != "test":
        return sample.points, sample.labels[0]
    assert sample.rows is not None
    blank = ((0, recipe.num_views() - len(sample.points)), (0, 0))
    labels = np.pad(np.stack([sample.labels, sample.rows]), ((0, 0), *blank), constant_values=-1)
    return np.pad(sample.points, (*blank, (0, 0))), labels


def load_frustum(
    row: dict[str, Any], root: str, recipe: PointRecipe, key: Key, timeout_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of a frustum float32 `[1, C + classes, N]`, with the one-hot class last, and its truth.

    The truth, float32 `[N + 11]`, holds in this order: a mask (1 for points on the object, 0 for others), the box
    (centre x y z, l w h, heading), the class, the angle by which the points were rotated, the detector's score, and the
    height of the 2D box in pixels. If no object is known, the mask is -1 and the box nan.
    """
    fs, path = filesystem(root)
    frustum, sample = cloud_reader(timeout_s).frustum(row["path"], read_whole(fs, path, row), recipe, key)
    number = point_sets.KITTI_CLASSES.index(frustum.kind)
    mask, box = np.full(recipe.num_points, -1), np.full(7, np.nan)
    if sample.labels is not None and sample.box is not None:
        mask, box = sample.labels[0], sample.box
    height = frustum.box_2d[3] - frustum.box_2d[1]
    truth = np.concatenate([mask, box, [number, frustum.rotation, frustum.score, height]], dtype=np.float32)
    return sample.points, truth


# ------------------------------------------------------------------------------------------------------- recipes


def _flips(data: DataSpec, card: "Card", mode: str) -> dict[str, Any]:
    return {"flip": data.flip and mode == "train" and card.flip != "never", "flip_labels": card.flip_labels()}


def _clip_recipe(data: DataSpec, card: "Card", num_segments: int, mode: str) -> dict[str, Any]:
    return {
        "num_segments": num_segments,
        "size": data.size,
        "resize": data.resize or round(data.size * 8 / 7),
        "sampling": data.sampling,
        "short": data.short_clips or "spread",
        "mode": mode,
        "scales": data.scales,
        "reader": data.reader,
        **_flips(data, card, mode),
    }


def _image_recipe(data: DataSpec, card: "Card", _: int, mode: str) -> dict[str, Any]:
    varied = data.images
    return {
        "size": data.size,
        "resize": data.resize or (data.size if varied.padding else 0),
        "mode": mode,
        "scale": varied.area,
        "ratio": varied.ratio,
        "brightness": varied.brightness,
        "saturation": varied.saturation,
        "padding": varied.padding,
        "channels": card.channels,
        **_flips(data, card, mode),
    }


def _points_recipe(data: DataSpec, card: "Card", _: int, mode: str) -> dict[str, Any]:
    given = data.points.model_dump(exclude={"one_hot"})
    return given | {"num_shapes": data.points.one_hot, "per_point": card.labelling.per_point, "mode": mode}


def _frustum_recipe(data: DataSpec, card: "Card", _: int, mode: str) -> dict[str, Any]:
    given = data.points.model_dump(exclude={"one_hot"})
    given |= {"channels": ("intensity",), "num_shapes": card.num_classes, "normalize": "none"}
    return given | {"mode": mode, "kind": "frustum"}


def _clip_shape(recipe: ClipRecipe) -> tuple[int, ...]:
    return (recipe.num_views, recipe.num_segments, recipe.size, recipe.size, 3)


def _clip_input(recipe: ClipRecipe) -> tuple[int, ...]:
    return (recipe.num_segments, 3, recipe.size, recipe.size)


def _short_clips(frames: np.ndarray, recipe: ClipRecipe | None) -> str:
    """Describe how many clips have fewer frames than are taken, and the consequence; unknown `frames` are 0."""
    taken = ClipRecipe.num_segments if recipe is None else recipe.num_segments
    most = taken if recipe is None else recipe.span - (recipe.short == "spread")
    count, single = (int(((frames > 0) & (frames <= limit)).sum()) for limit in (most, 1))
    if not count:
        return ""
    fate = "a network that takes more gets some frames several times"
    if recipe is not None:
        fate = f"{taken} are taken, " + ("some several times" if recipe.short == "spread" else "which may make stills")
    alone = f" ({single:,} only one)" if single else ""
    return f"{count:,} of {len(frames):,} clips have {most} frames or fewer{alone}: {fate}"


def _image_shape(recipe: ImageRecipe) -> tuple[int, ...]:
    return (recipe.crops, recipe.size, recipe.size, recipe.channels)


def _image_input(recipe: ImageRecipe) -> tuple[int, ...]:
    return (recipe.channels, recipe.size, recipe.size)


def _points_shape(recipe: PointRecipe) -> tuple[int, ...]:
    return (recipe.num_views(), recipe.num_channels, recipe.num_points)


def _points_input(recipe: PointRecipe) -> tuple[int, ...]:
    return (recipe.num_channels, recipe.num_points)


def _points_target(recipe: PointRecipe) -> Target:
    if not recipe.per_point:
        return Target()
    return Target((2, recipe.num_views(), recipe.num_points) if recipe.mode == "test" else (recipe.num_points,))


# --------------------------------------------------------------------------------------------------------- cards


def _require_pixels(card: "Card") -> None:
    if card.labelling.per_point or card.point_columns or card.point_labels or card.tile:
        raise ValueError("labels: point_columns, point_labels, tile and labels per point require sample: points")
    if card.channels != 3 and card.sample != "image":
        raise ValueError("channels: 1 requires sample: image")


def _require_image(card: "Card") -> None:
    _require_pixels(card)
    if NUMBERED.search(card.file) or ALL_FILES in str(card.splits):
        raise ValueError("file: must be one image per sample, not a folder of them")


def _require_points(card: "Card") -> None:
    try:
        parse_columns(card.point_columns)
    except ValueError as error:
        raise ValueError(f"point_columns: {error}") from None


def _require_text(card: "Card") -> None:
    if card.layout not in ("texts", "index"):
        raise ValueError("layout: must be texts for sample: text")
    if card.labelling != Labelling():
        raise ValueError("labels: must be none for sample: text, because texts have no classes")
    if card.text_columns and len(card.text_columns) != card.sides:
        raise ValueError(f"text_columns: must be {card.sides}, as many as sides")


def _require_frustum(card: "Card") -> None:
    if card.layout not in ("kitti", "index"):
        raise ValueError("layout: must be kitti for sample: frustum")
    if tuple(card.classes or ()) != point_sets.KITTI_CLASSES:
        raise ValueError(f"classes: must be [{', '.join(point_sets.KITTI_CLASSES)}], in this order, for frustums")


def _endings(names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names.split())


IMAGES = _endings("jpg jpeg jpe jfif png apng webp bmp dib gif tif tiff ppm pgm pbm pnm jp2 j2k jpf jpx")
VIDEOS = _endings(
    "mp4 m4v mov qt avi divx mkv webm flv f4v wmv asf mpg mpeg mpe m1v m2v vob ts mts m2ts m2t 3gp 3g2 ogv ogg h264 "
    "264 avc h265 265 hevc ivf obu av1 nut mxf dv y4m mjpeg mjpg rm rmvb zip"
)
TEXTS = _endings("txt tsv")
CLOUDS = _endings("ply las laz npy npz pcd off obj stl bin txt xyz xyzn xyzrgb pts csv asc")

MODALITIES: dict[str, Modality] = {
    "clip": Modality(
        noun="clip",
        plural="clips",
        recipe=ClipRecipe,
        make_recipe=_clip_recipe,
        shape=_clip_shape,
        input_shape=_clip_input,
        target=lambda _: Target(),
        dtype=np.uint8,
        load=load_clip,
        convert=conversion.convert_clip,
        require=_require_pixels,
        decode_s=0.14,  # PyAV, 340 x 256
        sample_mb=0.77,  # ten seconds of H.264 with GOP 12
        packed={"h264": (0.067, 0.77), "jpeg": (0.04, 7.5)},
        endings=VIDEOS | IMAGES,
        generate=synthetic.generate_clip,
        segmented=True,
        notes=_short_clips,
        in_channels=3,
        early_input=lambda data, segments: (segments, 3, data.size, data.size),
        views=frozenset({"clips", "crops", "frame_orders"}),
        view_recipe=clip_views,
        views_fit=clip_views_fit,
        open_file=open_clip,
        frame=_clip_frame,
        example=_show_clip,
    ),
    "image": Modality(
        noun="image",
        plural="images",
        recipe=ImageRecipe,
        make_recipe=_image_recipe,
        shape=_image_shape,
        input_shape=_image_input,
        target=lambda _: Target(),
        dtype=np.uint8,
        load=load_image,
        convert=conversion.convert_image,
        require=_require_image,
        decode_s=0.01,
        sample_mb=0.1,
        endings=IMAGES,
        generate=synthetic.generate_image,
        layouts=frozenset({"cifar10", "cifar100", "idx", "visual_wake_words"}),
        in_channels=3,
        views=frozenset({"crops"}),
        view_recipe=image_views,
        open_file=open_image,
        frame=_image_frame,
        example=_show_image,
    ),
    "image_pair": Modality(
        noun="picture",
        plural="pictures with a smaller one",
        recipe=PairRecipe,
        make_recipe=pair_recipe,
        shape=lambda recipe: (1, recipe.size, recipe.size, 3),
        input_shape=lambda recipe: (3, recipe.size, recipe.size),
        target=lambda recipe: Target((recipe.size * recipe.scale, recipe.size * recipe.scale, 3), "uint8", 0),
        dtype=np.uint8,
        load=load_pair,
        convert=conversion.convert_image,
        require=require_pair,
        decode_s=0.02,
        sample_mb=0.3,
        endings=IMAGES,
        in_channels=3,
        varying={2: "height", 3: "width"},
        early_input=lambda data, _: (3, data.size, data.size),
        open_file=open_pair,
    ),
    "points": Modality(
        noun="cloud",
        plural="clouds",
        recipe=PointRecipe,
        make_recipe=_points_recipe,
        shape=_points_shape,
        input_shape=_points_input,
        target=_points_target,
        dtype=np.float32,
        load=load_points,
        convert=conversion.convert_cloud,
        require=_require_points,
        decode_s=0.01,
        sample_mb=0.1,
        endings=CLOUDS,
        generate=synthetic.generate_cloud,
        stored=True,
        varying={2: "points"},
        views=frozenset({"votes"}),
        view_recipe=point_views,
        open_file=open_points,
        example=_show_cloud,
    ),
    "frustum": Modality(
        noun="frustum",
        plural="frustums",
        recipe=PointRecipe,
        make_recipe=_frustum_recipe,
        shape=_points_shape,
        input_shape=_points_input,
        target=lambda recipe: Target((recipe.num_points + 11,), "float32"),
        dtype=np.float32,
        load=load_frustum,
        convert=conversion.convert_scan,
        require=_require_frustum,
        decode_s=0.01,
        sample_mb=0.05,
        layouts=frozenset({"kitti"}),
        stored=True,
        varying={2: "points"},
    ),
    "text": Modality(
        noun="text",
        plural="texts",
        recipe=text.TextRecipe,
        make_recipe=text.text_recipe,
        shape=text.text_shape,
        input_shape=text.text_input,
        target=lambda recipe: Target((recipe.length,), "int64", PAD),
        dtype=np.int32,
        load=text.load_text,
        convert=convert_text,
        require=_require_text,
        decode_s=0.00005,
        sample_mb=0.0001,
        endings=TEXTS,
        layouts=frozenset({"texts"}),
        stored=True,
        write=text.write_text_shard,
        rows_per_shard=text.ROWS_PER_SHARD,
        learn=learn_vocabulary,
        view_recipe=text_views,
        pad=PAD,
        varying={-1: "tokens"},
    ),
}
