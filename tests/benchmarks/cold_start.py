"""From the shell to the first training step: `slimray run` of a tiny job on a prepared dataset, nothing running before.

The clock starts before the process does and stops at the time stamp of the run's first metrics row (log_every: 1).
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
name: cold-%d
data: {run: data, size: 64}
model: {name: tsm_resnet18, width: 0.25}
batch: {total: 16, per_worker: 8}
optim: {lr: 0.01, reference_batch: 16, epochs: 1}
scale: {workers: 2}
log_every: 1
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _run(folder, "prepare", PREPARE)
        seconds = []
        for i in range(RUNS):
            start = time.time()
            _run(folder, f"train-{i}", TRAIN % i)
            rows = [
                json.loads(line)
                for part in sorted(Path(folder, "runs", f"cold-{i}", "metrics").glob("*.jsonl"))
                for line in part.read_text().splitlines()
            ]
            seconds.append(min(row["time"] for row in rows if row["phase"] == "train") - start)
    print(
        f"cold start to the first step done: median {median(seconds):.1f} s, {[round(s, 1) for s in sorted(seconds)]}"
    )


def _run(folder: str, name: str, text: str) -> None:
    path = Path(folder, f"{name}.yaml")
    path.write_text(text)
    command = [sys.executable, "-m", "slimray.cli", "run", str(path), "--storage", f"{folder}/runs"]
    subprocess.run(command, check=True, timeout=300)
