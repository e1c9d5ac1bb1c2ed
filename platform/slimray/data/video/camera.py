"""Frames as they come: of a camera, or of a video at the pace at which it is shown.

A frame carries the moment from which on it could be seen, so that whoever computes on it can tell its own delay. A
reader that is late gets the next frames at once; it never waits for one that is due already.
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

USUAL_FPS = 30.0  # of files that do not say
INPUTS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture uint8 `[H, W, 3]` and when it was there (`time.monotonic`)."""

    picture: np.ndarray
    seen: float


def file_frames(path: Path, loop: bool = False) -> Iterator[Frame]:
    """Return the frames of a video, each when it is due, again from the start with `loop`.

    BadSample or OSError at once for a file that is no video, later for one that is damaged.
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
    """Return the frames of camera `number` until it is gone; BadSample if it cannot be opened."""
    import av

    if sys.platform not in INPUTS:
        raise BadSample(f"cameras are read on {' and '.join(INPUTS)} only: give a video")
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
