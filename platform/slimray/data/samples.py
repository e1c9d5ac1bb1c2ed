"""Definitions shared by all readers of samples: the error that costs one sample, and the limits on what is read."""

MAX_PIXELS = 64_000_000  # a larger declared frame is refused before anything is allocated
MAX_FRAMES = 1_000_000
MAX_BYTES = 2_000_000_000  # for a file, and for the decoded frames of one request


class BadSample(Exception):
    """A file that does not decode, with the reason in one sentence; it is quarantined."""


def check_size(width: int, height: int, count: int) -> None:
    """Raise BadSample if `count` frames of this size exceed MAX_PIXELS or MAX_BYTES."""
    if width * height > MAX_PIXELS or width * height * 3 * count > MAX_BYTES:
        raise BadSample(f"{count} frames of {width} x {height} pixels are too large to decode")
