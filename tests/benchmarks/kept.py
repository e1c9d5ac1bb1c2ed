"""What benchmarks keep in SLIMRAY_BENCH_DIR, so that it is not computed again: rows, and the progress of trainings."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import safetensors
import safetensors.torch
import torch

from slimray.train.methods.method import Piece, Replica

KEEP_S, TELL = 30, 100  # seconds between two writes of a state, steps between two lines
Row = dict[str, Any]


@dataclass(frozen=True)
class Filled(Piece):
    """A piece as arrays."""

    data: np.ndarray
    labels: np.ndarray


class Bench(Protocol):
    """What has files by name, of one seed."""

    seed: int

    def file(self, name: str) -> Path:
        """The file of that name."""
        ...


Some = TypeVar("Some", bound=Bench)


def row_of(bench: Bench, name: str, make: Callable[[], Row], file: str = "rows.jsonl") -> Row:
    """The row `name` of a bench: the one in its file, else made and added there."""
    path = bench.file(file)
    for one in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
        if one["row"] == name:
            return one
    row = {"row": name, **make()}
    with path.open("a") as out:
        out.write(json.dumps(row) + "\n")
    return row


def print_rows(
    bench_of: Callable[[Path, int], Some], rows: Mapping[str, Callable[[Some], Row]], file: str = "rows.jsonl"
) -> None:
    """Print the rows of SLIMRAY_ROWS (all) for each of SLIMRAY_SEEDS (0), with one thread."""
    torch.set_num_threads(1)
    folder = Path(os.environ.get("SLIMRAY_BENCH_DIR", tempfile.gettempdir()))
    for seed in [int(one) for one in os.environ.get("SLIMRAY_SEEDS", "0").split()]:
        bench = bench_of(folder, seed)
        for name in os.environ.get("SLIMRAY_ROWS", " ".join(rows)).split():
            row = row_of(bench, name, lambda name=name, bench=bench: rows[name](bench), file)  # type: ignore[misc]
            print(f"seed {seed}: {row}", flush=True)


class Training:
    """How far a training of `replica` is: steps, processor time in seconds, tokens; kept in `file` beside its tensors.

    Goes on from what is there.
    """

    def __init__(self, file: Path, replica: Replica, name: str = ""):
        self.file, self.replica, self.name = file, replica, name
        self.steps, self.seconds, self.tokens = 0, 0.0, 0
        if file.exists():
            with safetensors.safe_open(file, "pt") as opened:
                notes = json.loads(opened.metadata()["notes"])
            replica.load(safetensors.torch.load_file(file))
            self.steps, self.seconds, self.tokens = notes["steps"], notes["seconds"], notes["tokens"]
        self.kept, self.loss, self.count = time.perf_counter(), 0.0, 0.0
        self.go_on()

    def go_on(self) -> None:
        """Count the processor time from now on."""
        self.last = time.process_time()

    def add(self, loss: float, tokens: float, steps_of_epoch: int) -> None:
        """Count a step, with its sum of losses over `tokens`; print and keep now and then."""
        now = time.process_time()
        self.seconds, self.last = self.seconds + now - self.last, now
        self.steps, self.tokens = self.steps + 1, self.tokens + int(tokens)
        self.loss, self.count = self.loss + loss, self.count + tokens
        if time.perf_counter() - self.kept > KEEP_S:
            self.keep()
        if self.steps % TELL == 0:
            told = f"loss {self.loss / self.count:.3f}, {self.tokens / self.seconds:,.0f} tokens a second of the core"
            epoch = self.steps / steps_of_epoch
            print(" ".join(filter(None, [self.name, f"step {self.steps}, epoch {epoch:.2f}: {told}"])), flush=True)
            self.loss, self.count = 0.0, 0.0

    def keep(self) -> None:
        """Write the state; the time that this takes is not counted."""
        notes = json.dumps({"steps": self.steps, "seconds": self.seconds, "tokens": self.tokens})
        tensors = {name: value.contiguous() for name, value in self.replica.tensors().items()}
        safetensors.torch.save_file(tensors, part := self.file.with_suffix(".part"), {"notes": notes})
        part.rename(self.file)
        self.kept = time.perf_counter()
        self.go_on()

    @property
    def spent(self) -> dict[str, Any]:
        """Steps, tokens, minutes of a core."""
        return {"steps": self.steps, "tokens": self.tokens, "core_minutes": self.seconds / 60}
