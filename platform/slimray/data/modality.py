"""Classes that describe modalities: `Modality`, a row of MODALITIES, and `Target`, the target of a sample."""

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
    """Target of a sample as the data path knows it: `shape` without the batch, numpy `dtype`, and the value `fill` for
    samples that do not decode. Travels in a plain recipe as `target`."""

    shape: tuple[int, ...] = ()
    dtype: str = "int64"
    fill: float = -1

    def to_plain(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"shape": list(self.shape), "dtype": self.dtype, "fill": self.fill}

    def empty(self, count: int) -> np.ndarray:
        """Return unknown targets of `count` samples, `[count, ...]`, filled with `fill`."""
        return np.full((count, *self.shape), self.fill, self.dtype)


@dataclass(frozen=True)
class Modality:
    """A row of MODALITIES; the descriptions of functions name their arguments, then what they return."""

    noun: str
    """Word for a sample."""
    plural: str
    """Word for several samples."""
    recipe: Any
    """Class of its recipes, with `from_dict` and `to_dict`."""
    make_recipe: Callable[[DataSpec, "Card", int, str], dict[str, Any]]
    """(`data` section of a job, card, number of segments, mode "train", "val" or "test") -> fields of a recipe."""
    shape: Callable[[Any], tuple[int, ...]]
    """Recipe -> shape of a sample's array; the first axis is views."""
    input_shape: Callable[[Any], tuple[int, ...]]
    """Recipe -> shape of one view as the input of a network, without the batch."""
    target: Callable[[Any], Target]
    """Recipe -> target, used for plain recipes that name none."""
    dtype: type
    """Type of a sample's array."""
    load: Callable[[dict[str, Any], str, Any, Key, float], tuple[np.ndarray, Any]]
    """(row of an index, root, recipe, key, seconds a file may take to decode) -> (sample, target)."""
    convert: Callable[[conversion.Raw, dict[str, Any], "Decoder"], Iterator[conversion.Made | conversion.Bad]]
    """(raw dataset, row of an index, decoder) -> samples that `prepare` stores for a raw file."""
    require: Callable[["Card"], None]
    """Raises ValueError, like the validators of a card, for a card that does not suit this modality."""
    decode_s: float
    """Core-seconds to decode a sample, assumed until measured."""
    sample_mb: float
    """Megabytes of a sample on storage, assumed until measured."""
    packed: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """`decode_s` and `sample_mb` for each format of `pack` that changes what is stored."""
    endings: frozenset[str] = frozenset()
    """File extensions of samples, in lower case; in folders of samples, other files are skipped."""
    generate: Callable[[int, int, synthetic.Sizes], synthetic.Generated] | None = None
    """(number, seed, sizes) -> generated sample; None if there are no generated datasets."""
    layouts: frozenset[str] = frozenset()
    """Layouts of cards that belong to this modality only."""
    stored: bool = False
    """True if samples are only read as `prepare` stored them, never from raw files."""
    write: Callable[[Any, str, Iterable[dict[str, Any]]], list[tuple[int, int]]] = write_shard
    """(filesystem, path, rows with `path`, `label`, `data`): writes a shard -> `offset` and `length` in it of each
    sample, for the index, if samples are read one by one."""
    rows_per_shard: int = 0
    """Samples per shard; 0 puts all files that are prepared together into one shard."""
    learn: Callable[["Card", str, "TextSpec"], str] | None = None
    """(raw card, its root, section `text` of a `prepare` job) -> vocabulary of the training split; None if nothing has
    to be learned before samples are stored."""
    pad: int | None = None
    """Value that pads the samples of a block along their last axis to the longest; None if all samples of a recipe have
    the same shape. Targets are padded with their `fill`."""
    segmented: bool = False
    """True if a sample consists of segments in time, as many as the network takes (`num_segments`)."""
    in_channels: int | None = None
    """Channels of an input if they are the same for all samples, 3 for pixels."""
    varying: Mapping[int, str] = field(default_factory=dict)
    """Axes of an input `[B, ...]`, besides the batch, that may have any size, with a word for what varies along them;
    negative axes count from the end."""
    early_input: Callable[[DataSpec, int], tuple[int, ...]] | None = None
    """(`data` section, number of segments) -> shape of an input before the dataset is known; None if it depends on the
    dataset."""
    notes: Callable[[np.ndarray, Any], str] | None = None
    """(column `frames` of an index, recipe or None) -> sentence about what users may not expect, or ""."""
    views: frozenset[str] = frozenset()
    """Fields of an evaluation that choose its views."""
    view_recipe: Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]] = same_views
    """(plain recipe of a validation, options of an evaluation) -> plain recipe of the evaluation."""
    views_fit: Callable[[Mapping[str, Any], Mapping[str, Any], str], str] = all_fit
    """(plain recipe, options of an evaluation, name of a run) -> why they do not match, or ""."""
    open_file: Callable[[Any, FileOptions], FileReader] | None = None
    """(recipe, options) -> function that makes samples from a user's own files; None if a sample is never a file."""
    frame: Callable[[Any, np.ndarray], np.ndarray] | None = None
    """(recipe, picture uint8 [H, W, 3], for instance from a camera) -> frame uint8 [size, size, channels] as the
    network takes it; None if samples are not made of frames."""
    example: Callable[[np.ndarray, str, Top, Sequence[Any]], dict[str, Any]] | None = None
    """(view of a classified sample, its class, most likely classes, responses of the network's branches) -> example for
    a report."""
