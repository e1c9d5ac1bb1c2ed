"""Live frames: from a camera, or from a video at its own frame rate.

A frame carries the time at which it became visible, so that its consumer can measure its own delay. A late consumer
gets the next frames at once; it never waits for a frame that is already due.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimray.data.samples import MAX_BYTES, BadSample, check_size
from slimray.data.video.movies import open_video

USUAL_FPS = 30.0  # assumed for files that do not declare it
INPUTS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture uint8 `[H, W, 3]` and the time it became visible (`time.monotonic`, seconds)."""

    picture: np.ndarray
    seen: float


def file_frames(path: Path, loop: bool = False) -> Iterator[Frame]:
    """Return an iterator over the frames of a video, each when it is due, again from the start with `loop`.

    Raises BadSample or OSError at once for a file that is not a video, and during iteration for a damaged one.
    """
    if path.stat().st_size > MAX_BYTES:
        raise BadSample(f"is larger than {MAX_BYTES:,} bytes")
    data = path.read_bytes()
    with open_video(data) as video:
        fps = video.fps if 0 < video.fps <= 1000 else USUAL_FPS

    def frames() -> Iterator[Frame]:
        due = time.monotonic()
        while True:
            with open_video(data) as video:
                for picture in video.walk():
                    now = time.monotonic()
                    if now < due:
                        time.sleep(due - now)
                    yield Frame(picture, due)
                    due += 1 / fps
            if not loop:
                return

    return frames()


def camera_frames(number: int) -> Iterator[Frame]:
    """Return an iterator over the frames of camera `number`; raise BadSample if it cannot be opened."""
    import av

    if sys.platform not in INPUTS:
        raise BadSample(f"cameras are supported on {' and '.join(INPUTS)} only: give a video")
    kind, name = INPUTS[sys.platform]
    try:
        container: Any = av.open(name.format(number), format=kind)
        stream = container.streams.video[0]
    except (OSError, IndexError) as error:
        raise BadSample(f"cannot be opened ({getattr(error, 'strerror', None) or error})") from None
    check_size(stream.codec_context.width, stream.codec_context.height, 1)

    def frames() -> Iterator[Frame]:
        with container:
            for frame in container.decode(stream):
                seen = time.monotonic()
                yield Frame(frame.to_ndarray(format="rgb24"), seen)

    return frames()
