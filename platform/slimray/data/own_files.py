"""Makes samples from a user's own files for `predict`, by modality.

A file becomes a sample as in a dataset, the same one every time. Files that do not decode raise BadSample; options that
do not apply raise UserError before a file is read. PyAV is imported only in the decoder's process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from slimray.data.images.pictures import ImageRecipe
from slimray.data.points.clouds import Cloud, removal_note
from slimray.data.points.reader import CloudReader
from slimray.data.points.recipe import PointRecipe, PointSample, make_points
from slimray.data.samples import BadSample
from slimray.data.video.clips import ClipRecipe
from slimray.spec import UserError

if TYPE_CHECKING:
    from slimray.data.video.decoder import Decoder

KEY = (0, 0, 0)  # seed, epoch, sample


@dataclass(frozen=True)
class FileOptions:
    """Options for files outside a dataset: `columns` of clouds as text, and the number of the `shape` of all clouds,
    for networks that take it."""

    columns: tuple[str, ...] = ()
    shape: int | None = None


@dataclass(frozen=True)
class Readers:
    """The processes that read files."""

    decoder: "Decoder"
    clouds: CloudReader


FileReader = Callable[[str, bytes, Readers], tuple[np.ndarray, str]]
"""(name, bytes, readers) of a file -> its sample `[V, ...]`, and a note about it for the user or ""."""


def open_clip(recipe: ClipRecipe, options: FileOptions) -> FileReader:
    """Read a video as a clip."""
    _require_no_cloud(options, "clips")
    return lambda path, data, readers: (readers.decoder.clip(path, data, recipe, KEY)[0], "")


def open_image(recipe: ImageRecipe, options: FileOptions) -> FileReader:
    """Read a picture as an image."""
    _require_no_cloud(options, "images")
    return lambda path, data, readers: (readers.decoder.image(path, data, recipe, KEY)[0], "")


def open_points(recipe: PointRecipe, options: FileOptions) -> FileReader:
    """Read a point file as a cloud."""
    check_cloud_options(recipe, options)

    def read(path: str, data: bytes, readers: Readers) -> tuple[np.ndarray, str]:
        _, sample, notes = read_own_cloud(path, data, recipe, options, readers)
        return sample.points, notes

    return read


def _require_no_cloud(options: FileOptions, plural: str) -> None:
    if options.columns:
        raise UserError(f"--columns: is for clouds of points, but this network takes {plural}: leave it out")
    if options.shape is not None:
        raise UserError("--shape: this network does not take the class of a cloud: leave it out")


def check_cloud_options(recipe: PointRecipe, options: FileOptions) -> None:
    """Raise UserError if a shape is missing though the network takes one, or given though it does not."""
    if recipe.num_shapes and options.shape not in range(recipe.num_shapes):
        last = recipe.num_shapes - 1
        raise UserError(f"--shape: this network takes the class of each cloud: give a number from 0 to {last}")
    if options.shape is not None and not recipe.num_shapes:
        raise UserError("--shape: this network does not take the class of a cloud: leave it out")


def read_own_cloud(
    path: str, data: bytes, recipe: PointRecipe, options: FileOptions, readers: Readers
) -> tuple[Cloud, PointSample, str]:
    """Return a user's cloud, the sample made from it, and a note about points that were left out.

    Raises BadSample, with the next step, if the cloud lacks channels.
    """
    cloud = readers.clouds.cloud(path, data, options.columns, needs=recipe.channels)
    notes = removal_note(cloud.removed, len(cloud) + cloud.num_removed)
    missing = [name for name in recipe.channels if name not in cloud.features and name != "normals"]
    if missing:
        for name in missing:
            if name in cloud.unclear:
                raise BadSample(cloud.unclear[name])
        hint = ": name its columns with --columns" if "extra" in cloud.features else ""
        there = ", ".join(cloud.features) or "coordinates only"
        raise BadSample(f"has no {', '.join(missing)}, which the network takes (it has: {there}){hint}")
    sample = make_points(cloud, recipe, KEY, options.shape or 0)
    if sample.points.shape[1] != recipe.num_channels:
        raise BadSample(f"gives {sample.points.shape[1]} channels, but the network takes {recipe.num_channels}")
    return cloud, sample, notes
