"""Kinds of samples: `Modality`, the form of a row of MODALITIES, and `Target`, what is predicted from one."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from slimray.data import conversion, synthetic
from slimray.data.bytes import write_shard
from slimray.data.own_files import FileOptions, FileReader
from slimray.data.spec import DataSpec
from slimray.data.views import all_fit, same_views

if TYPE_CHECKING:
    from slimray.data.cards import Card
    from slimray.data.text.spec import TextSpec
    from slimray.data.video.decoder import Decoder

Key = tuple[int, int, int]
Top = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Target:
    """Target of a sample as the data path knows it: `shape` without the batch, numpy `dtype`, and the value that
    `fill`s the place of a sample that does not decode. Travels in a plain recipe as `target`."""

    shape: tuple[int, ...] = ()
    dtype: str = "int64"
    fill: float = -1

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"shape": list(self.shape), "dtype": self.dtype, "fill": self.fill}

    def empty(self, count: int) -> np.ndarray:
        """Return the targets of `count` samples of which none is known, `[count, ...]`."""
        return np.full((count, *self.shape), self.fill, self.dtype)


@dataclass(frozen=True)
class Modality:
    """A row of MODALITIES."""

    noun: str
    """A sample in words."""
    plural: str
    """Samples in words."""
    recipe: Any
    """The class of its recipes, with `from_dict` and `to_dict`."""
    make_recipe: Callable[[DataSpec, "Card", int, str], dict[str, Any]]
    """The `data` section of a job, a card, the number of segments and a mode ("train", "val", "test") to the fields of
    a recipe."""
    shape: Callable[[Any], tuple[int, ...]]
    """A recipe to the shape of a sample's array, its views first."""
    input_shape: Callable[[Any], tuple[int, ...]]
    """A recipe to the shape of what a network takes of one view, without the batch."""
    target: Callable[[Any], Target]
    """A recipe to the target of recipes that name none."""
    dtype: type
    """Type of a sample's array."""
    load: Callable[[dict[str, Any], str, Any, Key, float], tuple[np.ndarray, Any]]
    """Row of an index, root, recipe, key, seconds a file may take to decode: to a sample and its target."""
    convert: Callable[[conversion.Raw, dict[str, Any], "Decoder"], Iterator[conversion.Made | conversion.Bad]]
    """A raw file to the samples that `prepare` stores of it."""
    require: Callable[["Card"], None]
    """Raises ValueError, as the validators of a card do, for a card that does not fit."""
    decode_s: float
    """Core-seconds to decode a sample, assumed until measured."""
    sample_mb: float
    """Megabytes of a sample on storage, assumed until measured."""
    packed: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The same two for the formats of `pack`, where it changes what is stored."""
    endings: frozenset[str] = frozenset()
    """Endings of the names of files that hold samples, in lower case; in folders of samples, others are left out."""
    generate: Callable[[int, int, synthetic.Sizes], synthetic.Generated] | None = None
    """Number, seed and sizes to a generated sample; None where there are none."""
    layouts: frozenset[str] = frozenset()
    """Layouts of cards that hold nothing else."""
    stored: bool = False
    """Whether samples are read from what `prepare` stored only, never from the files as they came."""
    write: Callable[[Any, str, Iterable[dict[str, Any]]], list[tuple[int, int]]] = write_shard
    """Filesystem, path and rows (`path`, `label`, `data`) to a shard on storage, and the places in it (`offset` and
    `length` of an index) of samples that are read alone."""
    rows_per_shard: int = 0
    """Samples of a shard; 0 puts all of the files that are prepared together into one."""
    learn: Callable[["Card", str, "TextSpec"], str] | None = None
    """A raw card, its root and the section `text` of a `prepare` job to the vocabulary of its training split; None
    where a file is a sample, and there is nothing to learn before one is stored."""
    pad: int | None = None
    """Value that fills up the samples of a block along their last axis, to the length of the longest; None where all
    samples of a recipe have one shape. Targets are filled up with the value of those that are not known."""
    segmented: bool = False
    """Whether a sample is made of segments in time, as many as the network takes (`num_segments`)."""
    in_channels: int | None = None
    """Channels of an input where all samples have the same, 3 for pixels."""
    varying: Mapping[int, str] = field(default_factory=dict)
    """Axes of what a network takes `[B, ...]` that may have any size, beside the batch, and what varies along them;
    negative ones count from the end."""
    early_input: Callable[[DataSpec, int], tuple[int, ...]] | None = None
    """The `data` section and the number of segments to the shape of an input, before the dataset is known; None where
    that depends on it."""
    notes: Callable[[np.ndarray, Any], str] | None = None
    """The column `frames` of an index, and a recipe if one is known, to what users may not expect: a sentence or ""."""
    views: frozenset[str] = frozenset()
    """Fields of an evaluation that choose its views."""
    view_recipe: Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]] = same_views
    """The plain recipe of a validation and the options of an evaluation to the recipe of the latter."""
    views_fit: Callable[[Mapping[str, Any], Mapping[str, Any], str], str] = all_fit
    """A plain recipe, the options of an evaluation and the name of a run to why they do not fit each other, or ""."""
    open_file: Callable[[Any, FileOptions], FileReader] | None = None
    """A recipe and options to what makes samples of a user's own files; None where no file is a sample."""
    frame: Callable[[Any, np.ndarray], np.ndarray] | None = None
    """A recipe and a picture uint8 [H, W, 3], such as a camera gives, to a frame as the network takes it, uint8
    [size, size, channels]; None where a sample is made of something else."""
    example: Callable[[np.ndarray, str, Top, Sequence[Any]], dict[str, Any]] | None = None
    """One view of a classified sample, its class, the likeliest ones, and what the branches of the network respond to,
    to an example of a report."""
