"""Microbatches of a rank's step, cut from its samples while the previous step computes.

`cut` runs in the thread that fetches batches (`RankStream`), so that the training step finds them ready. That thread
also sends them to a GPU, from pinned memory (torch caches such blocks and reuses them) and over a stream of their own,
so that copies overlap with computing; the step makes its stream wait for them and never waits itself. This has not been
run on a GPU yet.
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
    """The step of a rank: its `batch` (None if it has no rows), `keep`, a bool `[n]` for the rows that count, and their
    `pieces`: equally many on every rank, with empty ones at the end."""

    batch: Batch | None
    keep: np.ndarray
    pieces: list[Piece]


def cut(batch: Batch | None, keep: np.ndarray, phase: Phase, step: int, per_worker: int, ranks: Ranks) -> Cut:
    """Return the rows of `batch` where `keep` is True as microbatches of at most `per_worker` samples, or as bags."""
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
    """Return the rows of a step in the groups that are scored together: all of them, or one group per bag."""
    if phase.bags is None:
        return [batch]
    cuts = microbatches(phase, step, ranks.rank, ranks.world, per_worker)
    return [batch.cut(lo - cuts[0][0], hi - cuts[0][0], pads_of(phase.recipe)) for lo, hi in cuts if lo < hi]


def sent(data: np.ndarray, device: torch.device) -> np.ndarray | Sent:
    """Start copying `data` to a GPU and return the handle; return `data` itself for a CPU, or if it is empty."""
    if device.type != "cuda" or not len(data):
        return data
    stream = _copies(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):  # a new thread would otherwise use the first GPU
        tensor = torch.from_numpy(np.ascontiguousarray(data)).pin_memory().to(device, non_blocking=True)
        return Sent(tensor, stream.record_event())


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which this process copies samples to a GPU."""
    return torch.cuda.Stream(device)
