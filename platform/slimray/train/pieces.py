"""The samples of a rank's step as the microbatches that a replica takes, cut while the step before computes.

`cut` runs in the thread that fetches (`RankStream`): what is left to the training step is to look at them. To a GPU
they go from there too, out of memory that is pinned (torch keeps such blocks and uses them in turn), over a stream of
their own, beside what it computes; the step makes its stream wait for them, never itself. On a GPU this was not run
yet.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from slimray.data.modalities import pads_of
from slimray.data.pipeline import Batch
from slimray.data.plan import Phase, microbatches
from slimray.data.ragged import tight
from slimray.train.methods.method import Piece, Sent
from slimray.train.ranks import Ranks


@dataclass(frozen=True)
class Cut:
    """A step of a rank: its `batch`, None where it has no rows, which of these count, bool `[n]`, and their `pieces`:
    as many on every rank, empty ones at the end."""

    batch: Batch | None
    keep: np.ndarray
    pieces: list[Piece]


def cut(batch: Batch | None, keep: np.ndarray, phase: Phase, step: int, per_worker: int, ranks: Ranks) -> Cut:
    """Return the rows of `batch` that `keep` as microbatches of at most `per_worker` samples, or bags."""
    cuts = microbatches(phase, step, ranks.rank, ranks.world, per_worker)
    if batch is None:
        return Cut(None, keep, [Piece(np.zeros((0,), np.uint8), np.zeros(0, np.int64)) for _ in cuts])
    pieces, first = [], cuts[0][0]
    for lo, hi in cuts:
        rows = np.flatnonzero(keep[lo - first : hi - first]) + lo - first
        data, labels = batch.data[rows], batch.label[rows]
        data, labels = tight(data, labels, pads_of(phase.recipe)) if phase.bags else (data, labels)
        pieces.append(Piece(sent(data, ranks.device), sent(labels, ranks.device)))
    return Cut(batch, keep, pieces)


def parts(batch: Batch, phase: Phase, step: int, per_worker: int, ranks: Ranks) -> list[Batch]:
    """Return the rows of a step that are scored together: all, or those of each bag."""
    if phase.bags is None:
        return [batch]
    cuts = microbatches(phase, step, ranks.rank, ranks.world, per_worker)
    return [batch.cut(lo - cuts[0][0], hi - cuts[0][0], pads_of(phase.recipe)) for lo, hi in cuts if lo < hi]


def sent(data: np.ndarray, device: torch.device) -> np.ndarray | Sent:
    """Return `data` on its way to a GPU; as it is for a CPU, and where there is nothing to send."""
    if device.type != "cuda" or not len(data):
        return data
    stream = _copies(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):  # a thread of its own would begin with the first GPU
        tensor = torch.from_numpy(np.ascontiguousarray(data)).pin_memory().to(device, non_blocking=True)
        return Sent(tensor, stream.record_event())


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream of this process on which samples go to a GPU."""
    return torch.cuda.Stream(device)
