"""Runs exports on a machine that has neither torch nor Ray.

    net = slimray.runtime.load("runs/tsm-export/export/onnx")
    net("some.mp4").top                  the likeliest classes, as `slimray predict` prints them
    net(clips)                           scores of arrays that are prepared as in training
    scores, states = net.step(frame, net.start())        an online network, frame by frame

The engine is imported when an export is loaded.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimray.runtime.loaded import Loaded


def load(path: Any, **options: Any) -> "Loaded":
    """Return an export as a function; `options` are those of `slimray.runtime.loaded.load`."""
    from slimray.runtime import loaded

    return loaded.load(path, **options)
