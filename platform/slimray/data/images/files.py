"""Reads picture files by content, upright as their EXIF says, and stores the frames of a clip as a ZIP.

PIL reads them, in the formats that run no program. A picture that breaks off is noticed, and wrong bits in a PNG, but
hardly ever wrong bits within a JPEG.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from slimray.data.samples import MAX_FRAMES, BadSample, check_size

PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")  # of those of PIL that run no program
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
    """Return the pixels of a picture file, uint8 `[H, W, 3]`, upright; of a moving picture the first. By its content.

    BadSample where it does not decode.
    """
    return read_frames(data, [0])[0]


def read_frames(data: bytes, indices: Sequence[int]) -> list[np.ndarray]:
    """Return the ascending frames `indices` of a moving picture, each uint8 `[H, W, 3]`, upright; else BadSample."""
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
    """Return how many frames a picture file has, and for how many milliseconds the first is shown (0 unknown)."""
    with _opened(data) as image:
        count = getattr(image, "n_frames", 1)
        if count > MAX_FRAMES:
            raise BadSample(f"holds more than {MAX_FRAMES:,} frames")
        if count > 1:
            image.load()  # how long a frame is shown is known when it was read
        return count, float(image.info.get("duration", 0))


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """A picture file, its checksums compared where it has any; errors become BadSample, also in the block."""
    try:
        if data[:8] == PNG:
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                image.verify()  # the checksums, which decoding passes over
        with Image.open(io.BytesIO(data), formats=PICTURES) as image:
            check_size(image.width, image.height, 1)
            yield image
    except UnidentifiedImageError:
        raise BadSample("is not a picture that can be read") from None
    except (OSError, SyntaxError, EOFError) as error:  # PIL calls a damaged PNG a wrong syntax
        raise BadSample(f"does not decode ({error})") from None


def _orientation(image: Image.Image) -> int:
    """Return how the camera was held, as EXIF numbers it; 1 (upright) where it does not say, or is damaged."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  (a damaged note is no damage to the picture)
        return 1


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """16 bits a value become their upper 8, which PIL would cut off at 255."""
    if image.mode == "F":
        raise BadSample("holds real numbers, not brightness in 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() >= 1 << 16:
        raise BadSample("holds numbers of more than 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def zip_frames(frames: dict[int, bytes], num_frames: int, fps: float = 0.0) -> bytes:
    """Encoded pictures by frame number as a stored ZIP; `num_frames` is the length of the video they are from."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for number, data in frames.items():
            archive.writestr(zipfile.ZipInfo(f"{number:06d}.jpg"), data)
        archive.comment = json.dumps({"frames": num_frames, "fps": fps}).encode()
    return buffer.getvalue()
