"""Parses the raw releases of image datasets: bytes and text in, labels and places for an index out.

CIFAR-10 and CIFAR-100 in their binary form (the Python form is a pickle, which could run code, and is not read);
MNIST's grayscale idx files, gzipped or not; Visual Wake Words (arXiv 1906.05721) from the instance annotations of COCO,
where an object counts as present if one of its boxes covers more than 0.5 % of the picture. No files are opened here.
"""

import json
import math
import zlib
from typing import Any, NamedTuple

import numpy as np

from slimray.data.paths import GZIP, GZIP_ENDING

CIFAR_SIDE = 32
CIFAR_PIXELS = 3 * CIFAR_SIDE**2  # bytes: all red values, then green, then blue, row by row
MIN_OBJECT_SHARE = 0.005  # a box must cover more than this share of the picture's area


def cifar_records(data: bytes, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the class of each picture of a .bin file, int64 `[n]`, and the offset of its pixels, int64 `[n]`.

    The pixels follow `num_labels` bytes, of which the last is the class: 1 in CIFAR-10, 2 in CIFAR-100 (coarse, then
    fine). Raises ValueError for a file that is not a whole number of records.
    """
    length = num_labels + CIFAR_PIXELS
    if not data or len(data) % length:
        raise ValueError(f"{len(data):,} bytes are not a whole number of records of {length} bytes")
    table = np.frombuffer(data, np.uint8).reshape(-1, length)
    offsets = np.arange(len(table), dtype=np.int64) * length + num_labels
    return table[:, num_labels - 1].astype(np.int64), offsets


def cifar_picture(pixels: bytes) -> bytes:
    """Return the pixels of a record as a PPM file, unchanged; raise ValueError for a wrong number of bytes."""
    planes = np.frombuffer(pixels, np.uint8).reshape(3, CIFAR_SIDE, CIFAR_SIDE)
    return f"P6 {CIFAR_SIDE} {CIFAR_SIDE} 255\n".encode() + planes.transpose(1, 2, 0).tobytes()


IDX_BYTES = b"\0\0\x08"  # the first three bytes for elements of 8 bits; the number of axes follows
IDX_START = 16  # bytes before the first picture of an idx file
IDX_ENDINGS = ("ubyte", f"ubyte{GZIP_ENDING}")
MAX_EXPANSION = 1032  # bytes that one byte of gzip can expand to


def read_idx(data: bytes, num_axes: int) -> np.ndarray:
    """Return the array of an idx file of bytes with `num_axes` axes, gzipped or not, as read-only uint8.

    The declared size is compared with that of the file before anything is unpacked. Raises ValueError.
    """
    start = 4 + 4 * num_axes
    try:
        unpack = zlib.decompressobj(wbits=31) if data[:2] == GZIP else None
        head = data[:start] if unpack is None else unpack.decompress(data, start)
        if len(head) < start or head[:4] != IDX_BYTES + bytes([num_axes]):
            raise ValueError(f"it has no header of an idx file of bytes with {num_axes} axes")
        sides = [int.from_bytes(head[at : at + 4], "big") for at in range(4, start, 4)]
        size, most = math.prod(sides), len(data) if unpack is None else len(data) * MAX_EXPANSION
        if start + size > most:
            raise ValueError(f"it declares {size:,} bytes, more than a file of {len(data):,} bytes can hold")
        body = data[start:] if unpack is None else unpack.decompress(unpack.unconsumed_tail, size + 1)
    except zlib.error as error:
        raise ValueError(f"gzip: {error}") from None
    if len(body) != size or (unpack is not None and not unpack.eof):
        what = "ends before" if len(body) <= size else "holds more than"
        raise ValueError(f"it {what} the {size:,} bytes that it declares")
    return np.frombuffer(body, np.uint8).reshape(sides)


def gray_picture(pixels: bytes, width: int, height: int) -> bytes:
    """Return grayscale pixels, given row by row, as a PGM file, unchanged."""
    return f"P5 {width} {height} 255\n".encode() + pixels


def coco_presence(text: str, category: str) -> list[tuple[str, bool]]:
    """Return the file name of each image of COCO instance annotations, and whether an object of `category` is in it.

    An object counts if its box covers more than MIN_OBJECT_SHARE of the image. Raises ValueError for text that is not
    such JSON, or that does not define the category.
    """
    document = json.loads(text, object_hook=_slim)
    found = {one.get("name"): one.get("id") for one in _dicts(document, "categories")}
    if category not in found:
        known = ", ".join(sorted(str(name) for name in found)[:100])
        raise ValueError(f"has no category {category!r} (it has: {known})")
    areas: dict[int, float] = {}  # the largest box of each image
    for box in _list(document, "annotations"):
        if not isinstance(box, _Box):
            raise ValueError("has annotations without a box: must be instance annotations of COCO")
        if box.category == found[category]:
            areas[box.image] = max(areas.get(box.image, 0.0), box.area)
    out = []
    for image in _dicts(document, "images"):
        number, name = image.get("id"), image.get("file_name")
        sides = [side for side in (image.get("width"), image.get("height")) if isinstance(side, int) and side > 0]
        if not isinstance(number, int) or not isinstance(name, str) or len(sides) < 2:
            raise ValueError(f"image {number!r} lacks its id, file_name, width or height")
        out.append((name, areas.get(number, 0.0) > MIN_OBJECT_SHARE * sides[0] * sides[1]))
    return out


class _Box(NamedTuple):
    """The part of an annotation that is kept; with outlines, those of COCO would take gigabytes."""

    image: int
    category: int
    area: float


def _slim(entry: dict[str, Any]) -> Any:
    if "bbox" not in entry:
        return entry
    box, image, category = entry["bbox"], entry.get("image_id"), entry.get("category_id")
    fits = isinstance(box, list) and len(box) == 4 and all(isinstance(number, int | float) for number in box)
    if not fits or not isinstance(image, int) or not isinstance(category, int):
        raise ValueError(f"annotation {entry.get('id')!r} lacks its image_id, its category_id or the 4 numbers of bbox")
    return _Box(image, category, float(box[2]) * float(box[3]))


def _list(document: Any, name: str) -> list[Any]:
    found = document.get(name) if isinstance(document, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"has no list of {name}: must be instance annotations of COCO")
    return found


def _dicts(document: Any, name: str) -> list[dict[str, Any]]:
    found = _list(document, name)
    if not all(isinstance(one, dict) for one in found):
        raise ValueError(f"has values in {name} that are not objects")
    return found
