"""The `data:` section of a job: which dataset, and how a sample of it is prepared. No decoder, Ray or torch here."""

from typing import Any, Literal

from pydantic import Field, model_validator

from slimray.data.images.pictures import ImageRecipe
from slimray.spec import Spec


class PointsSpec(Spec):
    """How a sample is made of a cloud of points (arXiv 1907.03739; augmentation as in 2206.04670)."""

    num_points: int = Field(1024, ge=4, le=1_000_000)
    """Points of a sample, redrawn each epoch."""
    channels: tuple[str, ...] = ()
    """Features beside x y z: `normals` (estimated where the files have none), `colors`, `intensity`, ..."""
    one_hot: int = Field(0, ge=0)
    """Number of shapes whose one-hot is appended to the channels (16 for ShapeNet part); 0 appends none."""
    normalize: Literal["sphere", "block", "none"] = "sphere"
    """`sphere`: centred, largest radius 1; `block`: middle of x and y and lowest z to 0, in metres; or as it is."""
    replace: bool = False
    """Draw points with replacement always, not only where they are too few."""
    rotate_z: float = Field(0.0, ge=0, le=180)
    """Training clouds are turned about z by up to so many degrees to either side."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of the factor by which training clouds are scaled."""
    flip: bool = False
    """Mirror x of half of the training clouds."""
    jitter: float = Field(0.0, ge=0)
    """Standard deviation of noise on training coordinates."""
    jitter_clip: float = Field(0.05, ge=0)
    """Largest noise."""
    color_drop: float = Field(0.0, ge=0, le=1)
    """Chance that a training cloud loses its colors."""
    published_shift: bool = False
    """Move training frustums by 0.8 times their distance from the axis: a slip in KITTI's published numbers."""


class ImagesSpec(Spec):
    """How training images are varied, beside `flip` (arXiv 1908.09791)."""

    area: tuple[float, float] = ImageRecipe.scale
    """Range of the training crop's share of the picture's area; `[1, 1]` takes all of it."""
    ratio: tuple[float, float] = ImageRecipe.ratio
    """Range of the training crop's width over its height, before it is made square."""
    padding: int = Field(0, ge=0, le=256)
    """Black pixels around a training picture of short side `resize`, out of which a crop of `size` is drawn in place of
    `area` and `ratio`: 4 is the usual recipe for CIFAR. Pictures are then not enlarged unless `resize` says so."""
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
    """Where files of a bucket are kept on each machine."""

    dir: str = Field(min_length=1)
    """Folder on a disk of each machine, such as local NVMe; several datasets and jobs may share it."""
    max_gb: float = Field(gt=0)
    """Largest size of the folder in GB; what was used longest ago goes."""


class DataSpec(Spec):
    """Which dataset, and how a sample is prepared. Give `card` (with `root`) or `run` (a finished `prepare`)."""

    card: str | dict[str, Any] | None = None
    """Dataset card: its name, the path of its YAML, or the card itself."""
    run: str | None = None
    """A `prepare` run to read, by name or URI, in place of `card`."""
    root: str | None = None
    """Folder of the dataset: a path, s3:// or gs://."""
    cache: CacheSpec | None = None
    """Keep the files of a dataset in a bucket on the machines that read them, whole shards, where `max_gb` holds them
    from the second epoch on nothing is read from the bucket; null reads it always. May change when a run resumes."""
    train: str = "train"
    """Split to train on."""
    val: str | None = "val"
    """Split to validate on; null validates never."""
    size: int = Field(224, ge=16, le=1024)
    """Side of the square input in pixels."""
    resize: int | None = Field(None, ge=16)
    """Short side that frames and images get before a centre or test crop; default 8/7 of `size` (256 for 224), with
    `images.padding` `size` itself."""
    sampling: Literal["uniform", "dense"] = "uniform"
    """Frames: one per segment of the clip (TSN), or `num_segments` out of a window of 64 (I3D)."""
    short_clips: Literal["spread", "published"] | None = None
    """Clips with fewer frames than the network takes: `spread` takes frames all over the clip, some several times;
    `published`, as in the recipes of TSM, makes such a clip (in validation also one with just as many) a still. null is
    `spread`, and for a run that was begun before there was a choice `published`."""
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """Sides of the training crop as parts of the short side."""
    flip: bool = True
    """Mirror half of the training clips or images, as far as the card allows it; labels follow the card's map."""
    reader: Literal["pyav", "decord"] = "pyav"
    """What decodes videos. PyAV gives the frame that was asked for, or none; decord 0.6 at times another one."""
    images: ImagesSpec = ImagesSpec.model_validate({})
    """How training images are varied, in place of `scales`."""
    points: PointsSpec = PointsSpec.model_validate({})
    """How samples of clouds are made, in place of the fields about frames above."""
    task: dict[str, Any] = {}
    """Options of the task that the card names; `slimray explain tasks` lists them."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Largest part of the training files that may fail to decode before the run ends."""
    decode_timeout_s: float = Field(30, gt=0)
    """Longest time a file may take to decode; then its decoder is killed and the file is quarantined."""
    record_samples: bool = False
    """Write which samples each step consumed to `samples/` of the run, to audit that each is seen once per epoch."""

    @model_validator(mode="after")
    def _pixels_fit(self) -> "DataSpec":
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize: must be at least size ({self.size}), got {self.resize}")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError(f"scales: must be numbers above 0 and at most 1, got {list(self.scales)}")
        return self

    def at_size(self, size: int) -> "DataSpec":
        """Return the section with another `size` and the same zoom: `resize` follows."""
        resize = self.resize and scaled_resize(self.resize, self.size, size)
        return self.model_copy(update={"size": size, "resize": resize})


def scaled_resize(resize: int, size: int, new: int) -> int:
    """Return the short side, in pixels, before a crop of side `new` that has the zoom of `size` cut out of `resize`."""
    return max(new, round(resize * new / size))
