"""Time as the device of a rank spends it: moments in the work that it is given, and the seconds between them.

A processor has done what it was given when the call returns: a moment is a reading of the clock. A GPU works off a
queue, steps behind whoever fills it: a moment is an event in that queue, which passes when the GPU comes to it. So the
same spans hold for both: work takes what it takes on the device, and waiting for data is what the device had nothing to
do for, not what the processor waited while the GPU was busy. The events were not measured on a GPU yet.
"""

import time
from typing import Any, Protocol

import torch

Moment = Any


class Timer(Protocol):
    """The time of one device. At most `ahead` steps are queued behind the one that it computes."""

    ahead: int

    def now(self) -> Moment:
        """Return the moment at which all work that was given so far is done."""
        ...

    def has_passed(self, moment: Moment) -> bool:
        """Return whether the device is beyond `moment`, without waiting for it."""
        ...

    def seconds(self, start: Moment, end: Moment) -> float:
        """Return the seconds between two moments, once both have passed."""
        ...

    def finish(self) -> None:
        """Return once all work that was given is done."""
        ...


class ProcessorTimer:
    """The clock of the processor."""

    ahead = 0

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> float:
        """Return what the clock says."""
        return time.perf_counter()

    def has_passed(self, moment: float) -> bool:
        """Return True: what was given is done."""
        return True

    def seconds(self, start: float, end: float) -> float:
        """Return the seconds between two readings."""
        return end - start

    def finish(self) -> None:
        """Return: what was given is done."""


class CudaTimer:
    """CUDA events on the stream on which a GPU computes."""

    ahead = 2

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> torch.cuda.Event:
        """Return an event that is recorded behind what was queued so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def has_passed(self, moment: torch.cuda.Event) -> bool:
        """Return whether the GPU is beyond it."""
        return moment.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the seconds that the GPU took from one to the other, once it is beyond both."""
        start.synchronize()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def finish(self) -> None:
        """Return once the GPU has worked off all of its queues."""
        torch.cuda.synchronize(self.device)


TIMERS: dict[str, type[ProcessorTimer] | type[CudaTimer]] = {"cpu": ProcessorTimer, "cuda": CudaTimer}


def timer_of(device: torch.device) -> Timer:
    """Return the timer of `device`; that of the processor where its kind has none."""
    return TIMERS.get(device.type, ProcessorTimer)(device)
