"""Time as the device of a rank spends it: moments in the work that it is given, and the seconds between them.

On a CPU, work is done when the call returns: a moment is a reading of the clock. A GPU works through a queue, steps
behind the CPU that fills it: a moment is an event in that queue, which passes when the GPU reaches it. The same spans
are thus valid for both: work counts the time on the device, and waiting for data counts the time in which the device
was idle, not the time that the CPU waited while the GPU was busy. The events have not been measured on a GPU yet.
"""

import time
from typing import Any, Protocol

import torch

Moment = Any


class Timer(Protocol):
    """The timer of one device. At most `ahead` steps are queued behind the one that it computes."""

    ahead: int

    def now(self) -> Moment:
        """Return the moment at which all work queued so far is done."""
        ...

    def has_passed(self, moment: Moment) -> bool:
        """Return True if the device is past `moment`, without waiting for it."""
        ...

    def seconds(self, start: Moment, end: Moment) -> float:
        """Return the seconds between two moments, once both have passed."""
        ...

    def finish(self) -> None:
        """Return once all queued work is done."""
        ...


class ProcessorTimer:
    """The clock of the CPU."""

    ahead = 0

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> float:
        """Return the reading of the clock, in seconds."""
        return time.perf_counter()

    def has_passed(self, moment: float) -> bool:
        """Return True: all work is done when its call returns."""
        return True

    def seconds(self, start: float, end: float) -> float:
        """Return the seconds between two readings."""
        return end - start

    def finish(self) -> None:
        """Return at once: all work is done when its call returns."""


class CudaTimer:
    """CUDA events on the stream on which a GPU computes."""

    ahead = 2

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> torch.cuda.Event:
        """Return an event that is recorded after everything queued so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def has_passed(self, moment: torch.cuda.Event) -> bool:
        """Return True if the GPU is past the event."""
        return moment.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the seconds that the GPU took from one event to the other, once it is past both."""
        start.synchronize()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def finish(self) -> None:
        """Return once all queues of the GPU are empty."""
        torch.cuda.synchronize(self.device)


TIMERS: dict[str, type[ProcessorTimer] | type[CudaTimer]] = {"cpu": ProcessorTimer, "cuda": CudaTimer}


def timer_of(device: torch.device) -> Timer:
    """Return the timer of `device`; that of the CPU for a device type without one."""
    return TIMERS.get(device.type, ProcessorTimer)(device)
