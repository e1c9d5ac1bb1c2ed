"""Records that a rank writes while it trains: metric rows, gauges, bad samples, and reports to the driver."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from ray.util.metrics import Gauge
from torch import Tensor

from slimray import runs
from slimray.data.pipeline import Batch
from slimray.data.plan import Phase
from slimray.runs import tracking
from slimray.train.config import FitConfig
from slimray.train.health import slow_ranks
from slimray.train.methods.method import Span
from slimray.train.ranks import Ranks
from slimray.train.timing import Moment, Timer

# Gauges that Ray exports to Prometheus (prefixed with `ray_`), computed from a row of training metrics, its step, and
# the time at which this process began to train (Unix seconds): Ray gives each start of a run its own series.
GAUGES: dict[str, Callable[[Mapping[str, float]], float]] = {
    "slimray_samples_per_s": lambda row: row["train/samples_per_s"],
    "slimray_loss": lambda row: row["train/loss"],
    "slimray_step": lambda row: row["step"],
    "slimray_start_time_s": lambda row: row["start_time_s"],
    "slimray_step_s": lambda row: row["time/step_s"],
    "slimray_data_wait_fraction": lambda row: row["data/wait_s"] / max(row["time/step_s"], 1e-9),
    "slimray_communication_fraction": lambda row: row["time/communication_s"] / max(row["time/step_s"], 1e-9),
}


class Gauges:
    """The gauges of a run; rank 0 sets them."""

    def __init__(self, run: str):
        self.run, self.gauges = run, {name: Gauge(name, f"{name} of a run", ("run",)) for name in GAUGES}
        self.start_time_s = time.time()

    def show(self, step: int, row: Mapping[str, float]) -> None:
        """Set them to a row of training metrics."""
        told = {**row, "step": step, "start_time_s": self.start_time_s}
        for name, gauge in self.gauges.items():
            gauge.set(float(GAUGES[name](told)), {"run": self.run})


class Clock:
    """Seconds and sums over the steps since the last metric row.

    `seconds` has one entry per span name. The seconds of a step are known once the device has finished it; `settle`
    adds those of the steps that are `queued`. `timed` counts the samples of the steps whose seconds are known.
    """

    def __init__(self, timer: Timer):
        self.timer, self.timed = timer, 0
        self.seconds: dict[str, float] = dict.fromkeys(("total", "wait", "sum", "work", "transfer", "reduce"), 0.0)
        self.spans: list[Span] = []
        self.queued: deque[tuple[list[Span], int]] = deque()
        self.steps = self.samples = self.dropped = 0
        self.weight = 0.0
        self.loss: Tensor | float = 0.0  # a tensor stays on the device, so that nothing waits for it

    def add(self, *spans: Span) -> None:
        """Add spans of the current step."""
        self.spans += spans

    def end_step(self, start: Moment) -> Moment:
        """Add the step that began at `start`, and return the moment at which it ends. Waits until the device has
        finished all but the last few steps, so that no more than these are ever queued."""
        end = self.timer.now()
        self.queued.append(([*self.spans, ("total", start, end)], self.samples))
        self.spans, self.steps = [], self.steps + 1
        self.settle(self.timer.ahead)
        return end

    def settle(self, queued: int = 0) -> None:
        """Wait for all steps except the last `queued`, and add their seconds."""
        while len(self.queued) > queued:
            spans, self.timed = self.queued.popleft()
            for name, start, end in spans:
                self.seconds[name] += self.timer.seconds(start, end)

    @property
    def compute_s(self) -> float:
        """Seconds of the rank's own work on its steps, without transfers."""
        return self.seconds["work"] - self.seconds["transfer"] - self.seconds["reduce"]


class Dropped:
    """Counts, on the device, the steps that were dropped because of a gradient that was not finite."""

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # in a row; since `look`: most in a row, total

    def note(self, fits: Tensor) -> None:
        """Count a step by its flag `StepReport.fits`, which stays on the device."""
        in_row, most, dropped = self.counts
        in_row = torch.where(fits, 0, in_row + 1)
        self.counts = torch.stack([in_row, torch.maximum(most, in_row), dropped + ~fits])

    def look(self) -> tuple[int, int]:
        """Return the most steps dropped in a row, and the total dropped, since the last call. Waits for the device."""
        _, most, dropped = self.counts.tolist()
        self.counts[1:] = 0
        return most, dropped


class Records:
    """Append-only records of one rank: metrics (rank 0), bad samples, and consumed samples on request."""

    def __init__(self, config: FitConfig, run: runs.Run, rank: int):
        self.run = run
        self.bad = runs.PartWriter(run, "quarantine", config.attempt, rank)
        self.samples = runs.PartWriter(run, "samples", config.attempt, rank) if config.record_samples else None
        self.rows = runs.PartWriter(run, "metrics", config.attempt, rank) if rank == 0 else None
        self.tracker = None
        if self.rows is not None:
            self.tracker = tracking.Tracker(config.tracking, self.rows, run.name, run.uri, config.job)
        self.gauges = Gauges(run.name) if rank == 0 else None

    def write_row(self, step: int, row: dict[str, Any]) -> None:
        """Write a metric row of `step` on rank 0; do nothing on the others."""
        if self.tracker is not None:
            self.tracker.log({"step": step, "time": time.time(), **row})

    def show(self, step: int, row: dict[str, Any]) -> None:
        """Set the gauges to a row of training metrics on rank 0; do nothing on the others."""
        if self.gauges is not None:
            self.gauges.show(step, row)

    def flush(self) -> None:
        """Return once every row is on storage: a checkpoint must not outlive the records of its steps."""
        for writer in (self.rows, self.bad, self.samples):
            if writer is not None:
                writer.flush()
        if self.tracker is not None:
            self.tracker.copy()

    def close(self) -> None:
        """Close the records, with everything written to storage."""
        for writer in (self.tracker, self.rows, self.bad, self.samples):
            if writer is not None:
                writer.close()


def training_row(clock: Clock, ranks: Ranks) -> dict[str, Any]:
    """Return the metrics of the steps of `clock`, over all ranks. A collective."""
    clock.settle()
    seconds = clock.seconds
    loss, own = ranks.gather(float(clock.loss), clock.compute_s + seconds["transfer"])
    slow = slow_ranks((own / clock.steps).tolist())
    row = {
        "train/loss": float(loss.sum()) / (clock.weight or 1.0),
        "train/samples_per_s": clock.samples / max(seconds["total"], 1e-9),
        "time/step_s": seconds["total"] / clock.steps,
        "data/wait_s": seconds["wait"] / clock.steps,
        "time/transfer_s": seconds["transfer"] / clock.steps,
        "time/compute_s": clock.compute_s / clock.steps,
        "time/communication_s": (seconds["sum"] + seconds["reduce"]) / clock.steps,
    }
    if clock.dropped:
        row["train/dropped_steps"] = clock.dropped
    if slow:
        worst = max(slow, key=slow.__getitem__)
        row |= {"straggler/rank": worst, "straggler/ratio": slow[worst]}
    return row


class News:
    """Reports progress from rank 0 to the driver, at most three times a second and without waiting."""

    def __init__(self, config: FitConfig, rank: int):
        self.config, self.rank, self.told_at = config, rank, 0.0

    def tell(self, phase: Phase, step: int, total_steps: int, clock: Clock) -> None:
        """Report the end of `step` of a pass."""
        now = time.monotonic()
        if self.rank != 0 or (now - self.told_at < 0.3 and step + 1 != phase.num_steps):
            return
        self.told_at = now
        state = {"phase": phase.name, "epoch": phase.epoch, "epochs": self.config.optim.epochs}
        state |= {"step": step + 1, "steps": phase.num_steps, "total_steps": total_steps}
        if total := clock.seconds["total"]:
            state |= {"samples_per_s": clock.timed / total, "wait": clock.seconds["wait"] / total}
        self.config.progress_actor.update.remote(**state)


class BadSamples:
    """Training samples that do not decode, by number. Those that were `known` when the epoch began have weight 0.

    `seen` are those that this rank found or received from others; ranks exchange the numbers of new ones.
    """

    def __init__(self, num_train: int, ranks: Ranks):
        self.num_train, self.ranks = num_train, ranks
        self.known = np.zeros(0, np.int64)
        self.seen: set[int] = set()
        self.untold: list[int] = []

    def is_known(self, samples: np.ndarray) -> np.ndarray:
        """Return a bool per entry of `samples`: True where the sample has weight 0."""
        if not len(self.known):
            return np.zeros(len(samples), bool)
        place = np.searchsorted(self.known, samples)
        return self.known[np.minimum(place, len(self.known) - 1)] == samples

    def note(self, batch: Batch, phase: Phase, quarantine: runs.PartWriter) -> None:
        """Record each sample of `batch` that did not decode in the quarantine, once per attempt and rank."""
        for i in np.flatnonzero(~batch.valid):
            sample = int(batch.sample[i])
            if phase.split == "train":
                if sample in self.seen:
                    continue
                self.seen.add(sample)
                self.untold.append(sample)
            row = {"path": batch.path[i], "split": phase.split, "sample": sample, "reason": batch.reason[i]}
            quarantine.write(row)

    def end_epoch(self) -> None:
        """Give weight 0 from now on to the samples that any rank has found bad. A collective."""
        self._tell()
        self.known = np.array(sorted(self.seen), np.int64)

    def _tell(self) -> None:
        self.seen.update(self.ranks.union(self.untold))
        self.untold = []

    def too_many(self, bound: float) -> str | None:
        """Return the sentence that ends the run if more than `bound` (a share) of the samples are bad. A collective."""
        self._tell()
        num_bad, num_train = len(self.seen), self.num_train
        if num_bad <= bound * num_train:
            return None
        return (
            f"{num_bad} of {num_train} training files do not decode, more than data.max_bad_fraction ({bound:g}) "
            "allows: see quarantine/ in the run folder, then raise the bound, or fix the files and --restart"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors for a checkpoint, with what all ranks know. A collective."""
        self._tell()
        return {
            "bad.known": torch.from_numpy(self.known),
            "bad.seen": torch.tensor(sorted(self.seen), dtype=torch.int64),
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load what `tensors` returned, also in its form before 2026-11-30: masks over all samples."""
        if "mask" in tensors:
            known, seen = tensors["mask"].nonzero().flatten(), tensors["bad_seen"].nonzero().flatten()
        else:
            known, seen = tensors["bad.known"], tensors["bad.seen"]
        self.known, self.seen, self.untold = known.numpy().copy(), set(seen.tolist()), []
