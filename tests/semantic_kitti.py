"""SemanticKITTI's classes and raw ids, with which the shipped cards are compared."""

import numpy as np

CLASSES = (
    "car", "bicycle", "motorcycle", "truck", "other-vehicle", "person", "bicyclist", "motorcyclist", "road", "parking",
    "sidewalk", "other-ground", "building", "fence", "vegetation", "trunk", "terrain", "pole", "traffic-sign",
)  # fmt: skip
IGNORED = -1
IDS = {  # raw id -> class, as in the dataset's semantic-kitti.yaml; moving things with standing ones
    0: IGNORED, 1: IGNORED, 10: 0, 11: 1, 13: 4, 15: 2, 16: 4, 18: 3, 20: 4, 30: 5, 31: 6, 32: 7, 40: 8, 44: 9, 48: 10,
    49: 11, 50: 12, 51: 13, 52: IGNORED, 60: 8, 70: 14, 71: 15, 72: 16, 80: 17, 81: 18, 99: IGNORED, 252: 0, 253: 6,
    254: 5, 255: 7, 256: 4, 257: 4, 258: 3, 259: 4,
}  # fmt: skip


def labels_of(raw: np.ndarray) -> np.ndarray:
    """Raw ids (the lower 16 bits of a .label file) as classes 0..18, IGNORED for what is not scored, int64 `[N]`.

    KeyError for an id that the dataset has not.
    """
    return np.array([IDS[number] for number in (np.asarray(raw, np.int64) & 0xFFFF).tolist()], np.int64)
