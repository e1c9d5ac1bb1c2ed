"""The `data:` section of a job: the dataset, and how its samples are prepared. No decoder, Ray or torch here."""

from typing import Any, Literal

from pydantic import Field, model_validator

from slimray.data.images.pictures import ImageRecipe
from slimray.spec import Spec


class PointsSpec(Spec):
    """Preparation of samples from clouds of points (arXiv 1907.03739; augmentation as in 2206.04670)."""

    num_points: int = Field(1024, ge=4, le=1_000_000)
    """Points of a sample, redrawn each epoch."""
    channels: tuple[str, ...] = ()
    """Features besides x y z: `normals` (estimated if the files have none), `colors`, `intensity`, ..."""
    one_hot: int = Field(0, ge=0)
    """Number of shapes whose one-hot is appended to the channels (16 for ShapeNet part); 0 appends none."""
    normalize: Literal["sphere", "block", "none"] = "sphere"
    """`sphere`: centred, largest radius 1; `block`: middle of x and y and lowest z at 0, metres; `none`: unchanged."""
    replace: bool = False
    """Always draw points with replacement, not only if a cloud has too few."""
    rotate_z: float = Field(0.0, ge=0, le=180)
    """Rotate training clouds about z by up to this many degrees in either direction."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of the factor by which training clouds are scaled."""
    flip: bool = False
    """Mirror half of the training clouds along x."""
    jitter: float = Field(0.0, ge=0)
    """Standard deviation of noise on training coordinates."""
    jitter_clip: float = Field(0.05, ge=0)
    """Largest absolute value of that noise."""
    color_drop: float = Field(0.0, ge=0, le=1)
    """Probability that a training cloud loses its colors."""
    published_shift: bool = False
    """Move training frustums by 0.8 times their distance from the axis: a bug that the published KITTI numbers
    include."""


class ImagesSpec(Spec):
    """Augmentation of training images, besides `flip` (arXiv 1908.09791)."""

    area: tuple[float, float] = ImageRecipe.scale
    """Range of the training crop's share of the picture's area; `[1, 1]` takes all of it."""
    ratio: tuple[float, float] = ImageRecipe.ratio
    """Range of the ratio of width to height of the training crop, before it is made square."""
    padding: int = Field(0, ge=0, le=256)
    """Black pixels around a training picture of short side `resize`, from which a crop of `size` is drawn instead of by
    `area` and `ratio`: 4 is the usual recipe for CIFAR. Pictures are then not enlarged unless `resize` is set."""
    brightness: float = Field(ImageRecipe.brightness, ge=0, le=1)
    """Largest relative change of brightness."""
    saturation: float = Field(ImageRecipe.saturation, ge=0, le=1)
    """Largest relative change of saturation."""

    @model_validator(mode="after")
    def _ranges_fit(self) -> "ImagesSpec":
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area: must be a range above 0 and up to 1, got {list(self.area)}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio: must be a range above 0, got {list(self.ratio)}")
        return self


class CacheSpec(Spec):
    """Cache on each machine for the files of a bucket."""

    dir: str = Field(min_length=1)
    """Folder on a disk of each machine, such as local NVMe; several datasets and jobs may share it."""
    max_gb: float = Field(gt=0)
    """Largest size of the folder in GB; beyond it the least recently used files are deleted."""


class DataSpec(Spec):
    """The dataset, and how its samples are prepared. Give `card` (with `root`) or `run` (a finished `prepare`)."""

    card: str | dict[str, Any] | None = None
    """Dataset card: its name, the path of its YAML, or the card itself."""
    run: str | None = None
    """A `prepare` run to read, by name or URI, instead of `card`."""
    root: str | None = None
    """Folder of the dataset: a path, s3:// or gs://."""
    cache: CacheSpec | None = None
    """Cache the files of a dataset in a bucket, as whole shards, on the machines that read them. If `max_gb` is enough
    for the dataset, nothing is read from the bucket from the second epoch on. null: no cache. May change when a run
    resumes."""
    train: str = "train"
    """Split to train on."""
    val: str | None = "val"
    """Split to validate on; null: no validation."""
    size: int = Field(224, ge=16, le=1024)
    """Side of the square input in pixels."""
    resize: int | None = Field(None, ge=16)
    """Short side of frames and images before a centre or test crop; default: 8/7 of `size` (256 for 224), or `size`
    itself with `images.padding`."""
    sampling: Literal["uniform", "dense"] = "uniform"
    """Choice of frames: `uniform` takes one per segment of the clip (TSN), `dense` takes `num_segments` from a window
    of 64 (I3D)."""
    short_clips: Literal["spread", "published"] | None = None
    """Clips with fewer frames than the network takes: `spread` takes frames from all over the clip, some several times;
    `published`, as in the recipes of TSM, turns such a clip (in validation also one with exactly as many) into a still.
    null: `spread`, or `published` for a run that began before this field existed."""
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """Sides of the training crop as fractions of the short side."""
    flip: bool = True
    """Mirror half of the training clips or images, if the card allows it; labels are exchanged as in the card."""
    reader: Literal["pyav", "decord"] = "pyav"
    """Library that decodes videos. PyAV returns the requested frame or none; decord 0.6 sometimes returns another."""
    images: ImagesSpec = ImagesSpec.model_validate({})
    """Augmentation of training images, instead of `scales`."""
    points: PointsSpec = PointsSpec.model_validate({})
    """Preparation of clouds of points, instead of the fields about frames above."""
    task: dict[str, Any] = {}
    """Options of the task that the card names; `slimray explain tasks` lists them."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Largest fraction of the training files that may fail to decode before the run ends."""
    decode_timeout_s: float = Field(30, gt=0)
    """Longest time in seconds a file may take to decode; after that its decoder is killed and the file quarantined."""
    record_samples: bool = False
    """Record the samples each step consumed in `samples/` of the run, to verify that each is seen once per epoch."""

    @model_validator(mode="after")
    def _pixels_fit(self) -> "DataSpec":
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize: must be at least size ({self.size}), got {self.resize}")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError(f"scales: must be numbers above 0 and at most 1, got {list(self.scales)}")
        return self

    def at_size(self, size: int) -> "DataSpec":
        """Return the section with another `size` and the same zoom: `resize` is scaled along."""
        resize = self.resize and scaled_resize(self.resize, self.size, size)
        return self.model_copy(update={"size": size, "resize": resize})


def scaled_resize(resize: int, size: int, new: int) -> int:
    """Return the short side in pixels before a crop of side `new`, for the zoom that `size` out of `resize` has."""
    return max(new, round(resize * new / size))
