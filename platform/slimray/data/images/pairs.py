"""Pictures with a smaller version of themselves, for super resolution: which crop, turned how, shrunk by what rule.

`PairRecipe` says how; the small picture is what a network takes, the large one its target. Shrinking is bicubic with
antialiasing, a = -0.5, the picture mirrored at its border, as published results make it (MATLAB's imresize); numpy
alone. All randomness is a function of the key (seed, epoch, sample).
"""

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slimray.data.bytes import read_whole
from slimray.data.labels import Labelling
from slimray.data.open import decoder, filesystem
from slimray.data.own_files import FileOptions, FileReader, Readers
from slimray.data.samples import BadSample
from slimray.data.spec import DataSpec
from slimray.spec import UserError

if TYPE_CHECKING:
    from slimray.data.cards import Card


@dataclass(frozen=True)
class PairRecipe:
    """Recipe of a pair: the small picture has `size` pixels a side, the large one `scale` times as many.

    `mode` "train" crops, mirrors and turns (by quarters, with `flip`) at random; any other takes the centre.
    """

    scale: int = 2
    size: int = 32
    mode: str = "train"
    flip: bool = False
    kind: str = "image_pair"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "PairRecipe":
        """The recipe of `to_dict`."""
        return cls(**plain)


def pair_recipe(data: DataSpec, card: "Card", _: int, mode: str) -> dict[str, Any]:
    """The fields of a recipe out of the `data` section of a job."""
    training = mode == "train"
    size = data.size if training else data.task.get("val_size") or data.size
    return {"scale": data.task["scale"], "size": size, "mode": mode, "flip": data.flip and training}


def load_pair(
    row: dict[str, Any], root: str, recipe: PairRecipe, key: tuple[int, int, int], timeout_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """A small picture uint8 `[1, size, size, 3]`, and the large one it was made of `[size*scale, size*scale, 3]`."""
    fs, path = filesystem(root)
    picture = decoder(timeout_s).picture(row["path"], read_whole(fs, path, row))
    large = crop(picture, recipe, random.Random(f"{key[0]}-{key[1]}-{key[2]}-pair"))
    side = recipe.size
    return as_pixels(resize(large, side, side))[None], large


def crop(picture: np.ndarray, recipe: PairRecipe, rng: random.Random) -> np.ndarray:
    """The large picture uint8 `[S, S, 3]` cut out of one `[H, W, 3]`; BadSample for one that is smaller."""
    side, (height, width) = recipe.size * recipe.scale, picture.shape[:2]
    if min(height, width) < side:
        raise BadSample(f"is {width} x {height} pixels, a crop takes {side}: lower data.size or data.task.val_size")
    if recipe.mode != "train":
        y, x = (height - side) // 2, (width - side) // 2
        return np.ascontiguousarray(picture[y : y + side, x : x + side])
    y, x = rng.randint(0, height - side), rng.randint(0, width - side)
    large = picture[y : y + side, x : x + side]
    if recipe.flip:
        large = np.rot90(large, rng.randrange(4))
        large = large[:, ::-1] if rng.random() < 0.5 else large
    return np.ascontiguousarray(large)


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture `[H, W, C]` at another size by bicubic interpolation, float64; antialiased where it shrinks."""
    rows, columns = _weights(picture.shape[0], height), _weights(picture.shape[1], width)
    return np.einsum("hy,yxc,wx->hwc", rows, picture.astype(np.float64), columns, optimize=True)


def as_pixels(picture: np.ndarray) -> np.ndarray:
    """Values rounded and cut to 0-255, uint8."""
    return np.round(picture).clip(0, 255).astype(np.uint8)


def _weights(before: int, after: int) -> np.ndarray:
    """The part of each of `before` places in each of `after`, `[after, before]`; rows sum to 1."""
    scale = after / before
    stretch = max(1.0, 1 / scale)
    centres = (np.arange(after) + 0.5) / scale - 0.5
    first = np.floor(centres - 2 * stretch).astype(int)
    places = first[:, None] + np.arange(int(np.ceil(4 * stretch)) + 2)
    parts = _cubic((centres[:, None] - places) / stretch)
    parts /= parts.sum(1, keepdims=True)
    mirrored = places % (2 * before)
    mirrored = np.where(mirrored < before, mirrored, 2 * before - 1 - mirrored)
    out = np.zeros((after, before))
    np.add.at(out, (np.arange(after)[:, None], mirrored), parts)
    return out


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def require_pair(card: "Card") -> None:
    """Raise ValueError for a card with labels: the target is the picture itself."""
    if card.labelling != Labelling():
        raise ValueError("labels: must be none for sample: image_pair, the target is the picture itself")


def open_pair(recipe: PairRecipe, options: FileOptions) -> FileReader:
    """Read a picture as it is, to be enlarged."""
    if options.columns or options.shape is not None:
        option = "--columns" if options.columns else "--shape"
        raise UserError(f"{option}: is for clouds of points, this network takes pictures")

    def read(path: str, data: bytes, readers: Readers) -> tuple[np.ndarray, str]:
        return readers.decoder.picture(path, data)[None], ""

    return read
