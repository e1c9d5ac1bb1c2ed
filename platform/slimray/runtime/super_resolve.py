"""Super resolution of a user's picture, which is enlarged in tiles that overlap by the network's receptive field."""

from pathlib import Path

import numpy as np

from slimray import storage
from slimray.data.images.pairs import as_pixels
from slimray.data.modalities import modality_of, read_recipe
from slimray.data.own_files import Readers
from slimray.runs.examples import png_bytes
from slimray.runtime.answers import Answer, Answerer, AnswerOptions, Answers, Model, only_array, require_apart
from slimray.spec import UserError

TILE = 256  # side of the tiles, in pixels of the small picture


def answer(model: Model, options: AnswerOptions) -> Answerer:
    """Return a function of a file that writes it enlarged as NAME.x2.png (or another scale), beside it or to `out`."""
    recipe = read_recipe(model.recipe)
    modality = modality_of(model.recipe)
    assert modality.open_file is not None
    read = modality.open_file(recipe, options.file)

    def target_of(path: Path) -> Path:
        return (path.parent if options.out is None else options.out) / f"{path.stem}.x{recipe.scale}.png"

    require_apart(options.paths, lambda path: [target_of(path)], "picture")

    def one(path: Path, readers: Readers) -> Answer:
        views, notes = read(str(path), path.read_bytes(), readers)
        large = enlarged(model, views[0], recipe.scale)
        storage.write_atomic(*storage.open_uri(target_of(path)), png_bytes(large))
        size = f"{large.shape[1]} x {large.shape[0]} pixels"
        return Answer(path, written=(target_of(path),), what=f"enlarged to {size}", notes=notes)

    return one


def to_pixels(outputs: np.ndarray) -> np.ndarray:
    """Return outputs `[n, 3, H, W]` in [0, 1] as pictures uint8 `[n, H, W, 3]`."""
    return as_pixels(np.moveaxis(outputs, 1, -1).astype(np.float32) * 255)


def enlarged(model: Model, picture: np.ndarray, scale: int, tile: int = TILE) -> np.ndarray:
    """Return a picture uint8 `[h, w, 3]` enlarged. A network with a fixed input size gets tiles of that size, with the
    border of the picture repeated where it is smaller."""
    (height, width), margin = picture.shape[:2], model.reach
    sides = [side for side in model.frame_shape[-2:] if side is not None]
    side = min(sides, default=0)
    if side:
        tile = side - 2 * margin
        if tile < 1:
            raise UserError(
                f"the export takes pictures of {side} pixels, too few to enlarge in tiles (each pixel depends on "
                f"{margin} pixels around it): export it with a dynamic size"
            )
    out = np.zeros((height * scale, width * scale, 3), np.uint8)
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            top, left = max(0, y - margin), max(0, x - margin)
            piece = picture[top : y + tile + margin, left : x + tile + margin]
            if side:
                piece = np.pad(piece, ((0, side - piece.shape[0]), (0, side - piece.shape[1]), (0, 0)), "edge")
            found = only_array(model.outputs(piece[None, None], 1))
            large = to_pixels(found)[0][(y - top) * scale :, (x - left) * scale :][: tile * scale, : tile * scale]
            place = out[y * scale : (y + tile) * scale, x * scale : (x + tile) * scale]
            place[:] = large[: place.shape[0], : place.shape[1]]
    return out


SUPER_RESOLVE = Answers("super_resolve", answer, writes=True)
