"""Shared by all readers of samples: the failure that costs one sample, and the bounds of what is read."""

MAX_PIXELS = 64_000_000  # a declared frame larger than this is refused before anything is allocated
MAX_FRAMES = 1_000_000
MAX_BYTES = 2_000_000_000  # of a file, and of the decoded frames of one request


class BadSample(Exception):
    """A file that does not decode, with the reason in one sentence; it goes to the quarantine."""


def check_size(width: int, height: int, count: int) -> None:
    """Raise BadSample if `count` frames of these sizes are more than is decoded."""
    if width * height > MAX_PIXELS or width * height * 3 * count > MAX_BYTES:
        raise BadSample(f"{count} frames of {width} x {height} pixels are larger than what is decoded")
