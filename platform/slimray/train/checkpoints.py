"""Progress of a training, and checkpoints written in the background: `Progress`, `Saver`."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import safetensors.torch
from torch import Tensor

from slimray import runs


@dataclass
class Progress:
    """Progress of a training. `step` counts within `epoch`, `total_steps` over all epochs.

    `validated` is the epoch of the last validation, `best` and `last` hold validation metrics; `seconds` and
    `worker_seconds` add up training time over all attempts, for the limits.
    """

    epoch: int = 0
    step: int = 0
    total_steps: int = 0
    validated: int = 0
    seconds: float = 0.0
    worker_seconds: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a copy as plain values, which later steps do not change."""
        return {**vars(self), "best": dict(self.best), "last": dict(self.last)}


class Saver:
    """Writes checkpoints in the background, one at a time, and deletes those that are no longer kept.

    `flush` is called before each one: a checkpoint must not outlive the records of its steps.
    """

    def __init__(
        self,
        run: runs.Run,
        keep_last: int,
        best: tuple[str, Literal["higher", "lower"]],
        flush: Callable[[], None],
        tell: Callable[[int], Any] = lambda step: None,
    ):
        """`best` is the metric that selects one checkpoint to keep besides the last ones, and its better direction.

        `tell` is called with the step of each checkpoint once it is on storage.
        """
        self.run, self.keep_last, self.best, self.flush, self.tell = run, keep_last, best, flush, tell
        self.pool = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def save(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Take a snapshot now and write it later. Waits for the previous write first, and raises its error if any."""
        self.wait()
        snapshot = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
        self.pending = self.pool.submit(self._write, snapshot, meta)

    def _write(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self.flush()
        files = {"state.safetensors": safetensors.torch.save(tensors)}
        step = meta["progress"]["total_steps"]
        runs.save_checkpoint(self.run, step, files, meta)
        self.tell(step)
        metric, better = self.best
        runs.keep(self.run, metric=metric, last=self.keep_last, mode="max" if better == "higher" else "min")

    def wait(self) -> None:
        """Return once everything saved so far is on storage."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None
