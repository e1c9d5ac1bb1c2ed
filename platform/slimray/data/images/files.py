"""Reads picture files by content, upright according to their EXIF data, and stores the frames of a clip as a ZIP.

PIL reads them, limited to formats that do not run external programs. Truncated pictures and wrong bits in a PNG are
detected, wrong bits within a JPEG hardly ever.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from slimray.data.samples import MAX_FRAMES, BadSample, check_size

PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")  # PIL runs no external program for these
PNG = b"\x89PNG\r\n\x1a\n"
EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_picture(data: bytes) -> np.ndarray:
    """Return the pixels of a picture file, uint8 `[H, W, 3]`, upright; of an animation the first frame.

    The format is recognized by content. Raises BadSample if the file does not decode.
    """
    return read_frames(data, [0])[0]


def read_frames(data: bytes, indices: Sequence[int]) -> list[np.ndarray]:
    """Return the frames at ascending `indices` of an animation, each uint8 `[H, W, 3]`, upright. Raises BadSample."""
    with _opened(data) as image:
        check_size(image.width, image.height, len(indices))
        turn, pictures = TURNS.get(_orientation(image)), []
        for index in indices:
            if index:
                image.seek(index)
            frame = _of_eight_bits(image).convert("RGB")
            pictures.append(np.asarray(frame if turn is None else frame.transpose(turn)))
        return pictures


def count_frames(data: bytes) -> tuple[int, float]:
    """Return the number of frames of a picture file, and the duration of the first in milliseconds (0 if unknown)."""
    with _opened(data) as image:
        count = getattr(image, "n_frames", 1)
        if count > MAX_FRAMES:
            raise BadSample(f"holds more than {MAX_FRAMES:,} frames")
        if count > 1:
            image.load()  # the duration of a frame is known only after it was read
        return count, float(image.info.get("duration", 0))


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open a picture file after verifying its checksums, if any; errors become BadSample, also those in the block."""
    try:
        if data[:8] == PNG:
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                image.verify()  # checksums, which decoding ignores
        with Image.open(io.BytesIO(data), formats=PICTURES) as image:
            check_size(image.width, image.height, 1)
            yield image
    except UnidentifiedImageError:
        raise BadSample("is not a picture that can be read") from None
    except (OSError, SyntaxError, EOFError) as error:  # PIL raises SyntaxError for a damaged PNG
        raise BadSample(f"does not decode ({error})") from None


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a picture; 1 (upright) if it is missing or damaged."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  (damaged metadata does not damage the picture)
        return 1


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """Reduce 16-bit values to their upper 8 bits, because PIL would clip them at 255."""
    if image.mode == "F":
        raise BadSample("holds floating-point numbers, not brightness in 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() >= 1 << 16:
        raise BadSample("holds numbers of more than 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def zip_frames(frames: dict[int, bytes], num_frames: int, fps: float = 0.0) -> bytes:
    """Return encoded pictures by frame number as a stored ZIP; `num_frames` is the length of the whole video."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for number, data in frames.items():
            archive.writestr(zipfile.ZipInfo(f"{number:06d}.jpg"), data)
        archive.comment = json.dumps({"frames": num_frames, "fps": fps}).encode()
    return buffer.getvalue()
