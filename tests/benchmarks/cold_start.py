"""From the shell to the first training step: `slimray run` of two tiny jobs on a prepared dataset, no Ray before them.

The clock of the first job starts before the process does, that of the second when the first one has ended; both stop at
the time stamp of the run's first metrics row (log_every: 1).
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

RUNS = 5
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


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder, "runs")
        _run(folder, "prepare", PREPARE)
        first, second = [], []
        for i in range(RUNS):
            names = (f"cold-{i}", f"next-{i}")
            start = time.time()
            _run(folder, f"chain-{i}", "---".join(TRAIN % name for name in names))
            first.append(_first_step(storage / names[0]) - start)
            second.append(_first_step(storage / names[1]) - (storage / names[0] / "status.json").stat().st_mtime)
    for what, seconds in (("cold start", first), ("the next job of the chain", second)):
        print(
            f"{what} to the first step done: median {median(seconds):.1f} s, {[round(s, 1) for s in sorted(seconds)]}"
        )


def _first_step(run: Path) -> float:
    parts = sorted((run / "metrics").glob("*.jsonl"))
    rows = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    return min(row["time"] for row in rows if row["phase"] == "train")


def _run(folder: str, name: str, text: str) -> None:
    path = Path(folder, f"{name}.yaml")
    path.write_text(text)
    command = [sys.executable, "-m", "slimray.cli", "run", str(path), "--storage", f"{folder}/runs"]
    subprocess.run(command, check=True, timeout=300)
