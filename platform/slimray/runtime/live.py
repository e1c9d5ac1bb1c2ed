"""Labels what a camera sees, frame by frame: reading, computing and showing each run at their own pace.

One thread reads frames when they are due, another computes on the newest; between them is a buffer of one frame. A
frame that is not used before the next arrives is dropped and counted, so that the delay never grows. The page shows a
`View`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from slimray.data.modalities import modality_of, read_recipe
from slimray.data.samples import BadSample
from slimray.data.video.camera import Frame, camera_frames, file_frames
from slimray.runtime.answers import only_array, softmax
from slimray.runtime.loaded import Loaded
from slimray.spec import UserError

KEPT = 300  # number of frames over which latency percentiles are taken
RATE_S = 2.0  # interval over which frames per second are counted


@dataclass(frozen=True)
class View:
    """Content of the page: the latest labelled picture, its label, the smoothed label, and statistics."""

    number: int = 0
    picture: np.ndarray | None = None
    label: str = ""
    smoothed: str = ""
    probability: float = 0.0
    fps: float = 0.0
    latency_ms: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """50th, 90th and 99th percentile over the last 300 frames, from the arrival of a frame to its label."""
    dropped: int = 0
    ended: bool = False
    trouble: str = ""

    def to_plain(self) -> dict[str, Any]:
        """Return plain values for the page."""
        plain = {key: value for key, value in vars(self).items() if key != "picture"}
        return plain | {"latency_ms": [round(ms, 2) for ms in self.latency_ms], "fps": round(self.fps, 1)}


@dataclass(eq=False)
class Live:
    """A session of `live`: `start` begins it, `view` is its current state, `stop` ends it."""

    label: Callable[[np.ndarray], tuple[np.ndarray, tuple[str, ...]]]
    frames: Iterator[Frame]
    smooth: int = 12
    view: View = field(default_factory=View)

    def __post_init__(self) -> None:
        self._newest: Frame | None = None
        self._over = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start reading and computing."""
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._read, self._compute)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads; a waiting frame is no longer labelled."""
        with self._changed:
            self._over, self._newest = True, None
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(5.0)

    def wait(self, timeout_s: float) -> bool:
        """Wait until the frames have ended, at most `timeout_s`; return True if they have."""
        with self._changed:
            return self._changed.wait_for(lambda: self.view.ended, timeout_s)

    def _read(self) -> None:
        trouble = ""
        try:
            for frame in self.frames:
                with self._changed:
                    if self._over:
                        break
                    if self._newest is not None:
                        self.view = replace(self.view, dropped=self.view.dropped + 1)
                    self._newest = frame
                    self._changed.notify_all()
        except (BadSample, OSError, ValueError) as error:
            trouble = str(error)
        with self._changed:
            self._over = True
            self.view = replace(self.view, trouble=trouble)
            self._changed.notify_all()

    def _compute(self) -> None:
        probabilities: deque[np.ndarray] = deque(maxlen=self.smooth)
        latencies: deque[float] = deque(maxlen=KEPT)
        done: deque[float] = deque()
        trouble = ""
        while not trouble:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._over)
                frame, self._newest = self._newest, None
            if frame is None:
                break
            try:
                scores, classes = self.label(frame.picture)
            except (UserError, BadSample, ValueError) as error:
                trouble = str(error)
                break
            now = time.monotonic()
            probabilities.append(softmax(scores, 0))
            latencies.append(1e3 * (now - frame.seen))
            done.append(now)
            while done[0] < now - RATE_S:
                done.popleft()
            mean = np.mean(probabilities, 0)
            low, high, most = np.percentile(latencies, [50, 90, 99])
            with self._changed:
                self.view = replace(
                    self.view,
                    number=self.view.number + 1,
                    picture=frame.picture,
                    label=classes[int(scores.argmax())],
                    smoothed=classes[int(mean.argmax())],
                    probability=float(mean.max()),
                    fps=(len(done) - 1) / (now - done[0]) if len(done) > 1 else 0.0,
                    latency_ms=(float(low), float(high), float(most)),
                )
        with self._changed:
            self._over = True
            self.view = replace(self.view, ended=True, trouble=trouble or self.view.trouble)
            self._changed.notify_all()


def labeller(net: Loaded) -> Callable[[np.ndarray], tuple[np.ndarray, tuple[str, ...]]]:
    """Return a function of the successive pictures `[H, W, 3]` of one camera to logits `[C]` and the classes.

    An online network is stepped; a clip network sees as many of the last frames as it takes (at the start, the first
    one repeated); an image network sees each frame alone. Raises UserError for a network that does not classify
    pictures.
    """
    modality, recipe = modality_of(net.recipe), read_recipe(net.recipe)
    if modality.frame is None:
        raise UserError(f"{net.where}: takes {modality.plural}, but live needs a network of images or clips")
    prepare, classes = modality.frame, tuple(net.classes)
    window: deque[np.ndarray] = deque(maxlen=net.facts.inputs[0].shape[1] if modality.segmented else 1)
    states = net.start() if net.online else {}

    def label(picture: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
        nonlocal states
        frame = prepare(recipe, picture)
        if net.online:
            scores, states = net.step(frame[None], states)
        else:
            window.extend([frame] * (1 if window else window.maxlen or 1))
            given = np.stack(window)[None] if modality.segmented else frame[None]
            scores = only_array(net.outputs(given[:, None], 1))
        if scores.shape != (1, len(classes)):
            raise UserError(f"{net.where}: outputs have shape {scores.shape}, but live needs a network that classifies")
        return scores[0], classes

    return label


def open_live(net: Loaded, camera: int | None, file: Path | None, loop: bool, smooth: int) -> Live:
    """Return a session of `live`, not yet started, on a camera or a video; UserError unless exactly one is given."""
    if (camera is None) == (file is None):
        raise UserError("live: give a video, or --camera 0")
    label = labeller(net)
    try:
        frames = camera_frames(camera) if camera is not None else file_frames(file, loop)  # type: ignore[arg-type]
    except (BadSample, OSError) as error:
        raise UserError(f"{file if file is not None else f'--camera {camera}'}: {error}") from None
    return Live(label, frames, smooth)
