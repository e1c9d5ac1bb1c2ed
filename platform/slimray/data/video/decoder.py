"""Decodes videos and pictures in a child process, which is killed if a file takes too long.

ffmpeg can hang in C code so that only SIGKILL ends it, and can crash the process on odd files. So a `Decoder` sends a
file's bytes to a child (`python -m slimray.data.video.decoder`) over a socket and gets a small uint8 clip back; a
timeout or a crash costs that one file (`BadSample`), which this decoder refuses at once from then on. The child reads
videos with movies.py and re-encodes them with repack.py.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
from av import logging as av_logging

from slimray.data.child import Child, serve
from slimray.data.images.files import read_picture
from slimray.data.images.pictures import ImageRecipe, make_image
from slimray.data.samples import BadSample
from slimray.data.video.clips import ClipRecipe, frame_indices, generators, make_clip
from slimray.data.video.movies import open_video
from slimray.data.video.repack import Pack, Probe, repack, shrink

# ------------------------------------------------------------------------------------------ the parent's side


class Decoder(Child):
    """A child process that decodes, with a time limit per file; a context manager."""

    module, doing = "slimray.data.video.decoder", "decoding"

    def clip(self, path: str, data: bytes, recipe: ClipRecipe, key: tuple[int, int, int]) -> tuple[np.ndarray, bool]:
        """Decode the clip of `recipe`: uint8 `[V, T, size, size, 3]`, and whether it was mirrored.

        `key` is (seed, epoch, sample). Raises BadSample.
        """
        header, body = self._ask(path, {"do": "clip", "recipe": recipe.to_dict(), "key": list(key)}, data)
        return np.frombuffer(body, np.uint8).reshape(header["shape"]), header["flipped"]

    def image(self, path: str, data: bytes, recipe: ImageRecipe, key: tuple[int, int, int]) -> tuple[np.ndarray, bool]:
        """Decode a picture for `recipe`: uint8 `[V, size, size, channels]`, and whether it was mirrored.

        `key` is (seed, epoch, sample). Raises BadSample.
        """
        header, body = self._ask(path, {"do": "image", "recipe": recipe.to_dict(), "key": list(key)}, data)
        return np.frombuffer(body, np.uint8).reshape(header["shape"]), header["flipped"]

    def picture(self, path: str, data: bytes) -> np.ndarray:
        """Decode a picture as it is: uint8 `[H, W, 3]`. Raises BadSample."""
        header, body = self._ask(path, {"do": "picture"}, data)
        return np.frombuffer(body, np.uint8).reshape(header["shape"])

    def shrink(
        self, path: str, data: bytes, short_side: int | None, quality: int = 90
    ) -> tuple[bytes, Probe, float | None]:
        """Return a picture's file unchanged or, if its short side is longer than `short_side`, as a smaller JPEG.

        Also returns its probe and, if it was re-encoded, the PSNR as in `repack`. Raises BadSample.
        """
        header, body = self._ask(path, {"do": "shrink", "short_side": short_side, "quality": quality}, data)
        return bytes(body) or data, Probe(**header["probe"]), header["psnr"]

    def probe(self, path: str, data: bytes) -> Probe:
        """Decode the whole file and describe its content. Raises BadSample if not every frame decodes."""
        return Probe(**self._ask(path, {"do": "probe"}, data)[0]["probe"])

    def repack(self, path: str, data: bytes, pack: Pack) -> tuple[bytes, Probe, float | None]:
        """Return the file re-encoded with all frames, its probe, and the PSNR in dB against the encoder's input.

        The PSNR is None if frames are stored without loss. Raises BadSample.
        """
        header, body = self._ask(path, {"do": "repack", "pack": asdict(pack)}, data)
        return bytes(body), Probe(**header["probe"]), header["psnr"]


# ------------------------------------------------------------------------------------------- the child's side


def main() -> None:
    """Answer requests until the parent is gone."""
    av_logging.set_level(av_logging.PANIC)
    serve(_answer, "decode")


def _answer(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes | memoryview]:
    if request["do"] == "clip":
        recipe = ClipRecipe.from_dict(request["recipe"])
        frames_rng, crop_rng = generators(request["key"])
        with open_video(data, recipe.reader) as video:
            wanted = frame_indices(recipe, video.num_frames, frames_rng)
            unique, place = np.unique(wanted, return_inverse=True)
            pictures = video.frames(unique.tolist())
        if len({picture.shape for picture in pictures}) > 1:
            raise BadSample("its frames differ in size")
        try:
            clip, flipped = make_clip([pictures[i] for i in place], recipe, crop_rng)
        except ValueError as error:
            raise BadSample(str(error)) from None
        return {"shape": clip.shape, "flipped": bool(flipped)}, clip.data.cast("B")
    if request["do"] == "image":
        picture = read_picture(data)
        try:
            views, flipped = make_image(
                picture, ImageRecipe.from_dict(request["recipe"]), generators(request["key"])[1]
            )
        except ValueError as error:
            raise BadSample(str(error)) from None
        return {"shape": views.shape, "flipped": bool(flipped)}, np.ascontiguousarray(views).data.cast("B")
    if request["do"] == "picture":
        picture = np.ascontiguousarray(read_picture(data))
        return {"shape": picture.shape}, picture.data.cast("B")
    if request["do"] == "shrink":
        return shrink(read_picture(data), request["short_side"], request["quality"])
    with open_video(data) as video:
        if request["do"] == "probe":
            return {"probe": asdict(Probe(video.num_frames, video.fps, *video.check(), video.codec))}, b""
        return repack(video, Pack(**request["pack"]))


if __name__ == "__main__":
    main()
