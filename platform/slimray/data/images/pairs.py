"""Makes pairs of a picture and a smaller version of it, for super resolution.

`PairRecipe` defines the crop, the augmentation and the scale; the small picture is the input of a network, the large
one its target. Pictures are reduced by bicubic interpolation with antialiasing, a = -0.5, mirrored at their borders, as
in published results (MATLAB's imresize); numpy only. All randomness is a function of the key (seed, epoch, sample).
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
    """Recipe of a pair: the small picture has `size` pixels per side, the large one `scale` times as many.

    `mode` "train" crops at random and, with `flip`, mirrors and rotates by multiples of 90 degrees; any other mode
    takes the centre.
    """

    scale: int = 2
    size: int = 32
    mode: str = "train"
    flip: bool = False
    kind: str = "image_pair"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "PairRecipe":
        """Return the recipe that `to_dict` stored."""
        return cls(**plain)


def pair_recipe(data: DataSpec, card: "Card", _: int, mode: str) -> dict[str, Any]:
    """Return the fields of a recipe for the `data` section of a job."""
    training = mode == "train"
    size = data.size if training else data.task.get("val_size") or data.size
    return {"scale": data.task["scale"], "size": size, "mode": mode, "flip": data.flip and training}


def load_pair(
    row: dict[str, Any], root: str, recipe: PairRecipe, key: tuple[int, int, int], timeout_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return a small picture uint8 `[1, size, size, 3]`, and the large one it is made from
    `[size*scale, size*scale, 3]`."""
    fs, path = filesystem(root)
    picture = decoder(timeout_s).picture(row["path"], read_whole(fs, path, row))
    large = crop(picture, recipe, random.Random(f"{key[0]}-{key[1]}-{key[2]}-pair"))
    side = recipe.size
    return as_pixels(resize(large, side, side))[None], large


def crop(picture: np.ndarray, recipe: PairRecipe, rng: random.Random) -> np.ndarray:
    """Return the large picture uint8 `[S, S, 3]` cropped from `[H, W, 3]`; raise BadSample if that is too small."""
    side, (height, width) = recipe.size * recipe.scale, picture.shape[:2]
    if min(height, width) < side:
        raise BadSample(f"is {width} x {height} pixels, a crop needs {side}: lower data.size or data.task.val_size")
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
    """Resize a picture `[H, W, C]` by bicubic interpolation, float64, with antialiasing where it is reduced."""
    rows, columns = _weights(picture.shape[0], height), _weights(picture.shape[1], width)
    return np.einsum("hy,yxc,wx->hwc", rows, picture.astype(np.float64), columns, optimize=True)


def as_pixels(picture: np.ndarray) -> np.ndarray:
    """Return the values rounded and clipped to 0-255, uint8."""
    return np.round(picture).clip(0, 255).astype(np.uint8)


def _weights(before: int, after: int) -> np.ndarray:
    """Return the weight of each of `before` pixels in each of `after` pixels, `[after, before]`; rows sum to 1."""
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
    """Evaluate Keys' cubic kernel with a = -0.5."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def require_pair(card: "Card") -> None:
    """Raise ValueError for a card with labels, as the target is the picture itself."""
    if card.labelling != Labelling():
        raise ValueError("labels: must be none for sample: image_pair, because the target is the picture itself")


def open_pair(recipe: PairRecipe, options: FileOptions) -> FileReader:
    """Return a reader for pictures that are to be enlarged."""
    if options.columns or options.shape is not None:
        option = "--columns" if options.columns else "--shape"
        raise UserError(f"{option}: is for clouds of points, but this network takes pictures: leave it out")

    def read(path: str, data: bytes, readers: Readers) -> tuple[np.ndarray, str]:
        return readers.decoder.picture(path, data)[None], ""

    return read
