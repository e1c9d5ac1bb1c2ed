"""From the shell to the first training step: `slimray run` of two tiny jobs on a prepared dataset, with no Ray running.

The clock of the first job starts before its process does, that of the second job when the first one has ended; both
stop at the time stamp of the run's first metrics row (log_every: 1). With SLIMRAY_AGAINST, the folder of another
checkout, the two versions are measured in alternating pairs, with the libraries of this environment.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

from slimray.runtime.pairs import Pairs

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 9
PREPARE = "{kind: prepare, name: data, data: {card: moving_shapes, clips: 32, size: 64}}"
TRAIN = """
kind: train
name: %s
data: {run: data, size: 64}
model: {name: tsm_resnet18, width: 0.25}
batch: {total: 16, per_worker: 8}
optim: {lr: 0.01, reference_batch: 16, epochs: 1}
scale: {workers: 2}
log_every: 1
"""


WHAT = ("cold start", "the next job of the chain")


def main() -> None:
    against = os.environ.get("SLIMRAY_AGAINST")
    roots = [ROOT, *([Path(against)] if against else [])]
    with tempfile.TemporaryDirectory() as folder:
        measures = [partial(_seconds, root, Path(folder, str(number))) for number, root in enumerate(roots)]
        for number, root in enumerate(roots):
            _run(root, Path(folder, str(number)), "prepare", PREPARE)
        took: list[list[tuple[float, float]]] = [[] for _ in roots]
        for turn in range(PAIRS):
            for number in range(len(roots)) if turn % 2 == 0 else reversed(range(len(roots))):
                took[number].append(measures[number](turn))
    for number, what in enumerate(WHAT):
        ours = [one[number] for one in took[0]]
        told = f"{what} to the first step done: median {median(ours):.1f} s ({min(ours):.1f} to {max(ours):.1f})"
        if against:
            theirs = [one[number] for one in took[1]]
            pairs = Pairs(tuple(ours), tuple(theirs))
            low, high = pairs.interval
            told += f", against {median(theirs):.1f} s: ratio {pairs.ratio:.2f} [{low:.2f}, {high:.2f}]"
        print(told, flush=True)


def _seconds(root: Path, folder: Path, turn: int) -> tuple[float, float]:
    """Seconds until the first step of the first job, and of the second from the end of the first."""
    names = [f"first-{turn}", f"next-{turn}"]
    start = time.time()
    _run(root, folder, f"chain-{turn}", "---".join(TRAIN % name for name in names))
    first, second = (folder / "runs" / name for name in names)
    return _first_step(first) - start, _first_step(second) - (first / "status.json").stat().st_mtime


def _first_step(run: Path) -> float:
    parts = sorted((run / "metrics").glob("*.jsonl"))
    rows = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    return min(row["time"] for row in rows if row["phase"] == "train")


def _run(root: Path, folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(text)
    command = [sys.executable, "-m", "slimray.cli", "run", str(path), "--storage", f"{folder}/runs"]
    environment = os.environ | {"PYTHONPATH": str(root / "platform")}
    subprocess.run(command, check=True, timeout=300, env=environment, stdout=subprocess.DEVNULL)
