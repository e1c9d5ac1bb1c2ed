"""Predictions of the planner against known times: Kinetics on 1,536 GPUs (arXiv 1910.00932), and trainings here.

The parameters of the first part are in cluster/summit.yaml and below; they were written down before the model was run,
and none is fitted to the 14 min 13 s. Assumptions: the 49 h 55 min are for one node of 6 GPUs (only the pair of times
is verified); the 100 epochs and the costs of the I3D variants are recalled. `REFILL_S`: torch's DataLoader before 1.7
restarted its processes in each epoch (pytorch/pytorch issue 15849); the time to its first 8 clips of 8 JPEG frames,
decoded by PIL, was measured on two x86 cores with one process and with six. The second part runs real trainings with 1,
2 and 4 workers.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil

from slimray import runs
from slimray.spec import parse, read_yaml
from slimray.train import machines, planner

ROOT = Path(__file__).resolve().parents[2]
BASE_S, TARGET_S = (49 * 60 + 55) * 60.0, 14 * 60 + 13.0
EPOCHS, SAMPLES, PER_GPU, CLIP_MB = 100, 240_000, 8, 1.2
REFILL_S = (0.10, 0.18, 0.33)
TSM = planner.Work("TSM 8f", 97.3, SAMPLES, EPOCHS, 48, PER_GPU, (0, 0, 0), decoded_mb=CLIP_MB, restart_s=REFILL_S)
# MACs of a clip (our count), gradient MB; 3D convolutions reach 0.55 to 0.72 of the rate of 2D ones (recalled table of
# arXiv 1811.08383: 33 G at 42.4 and 48 G at 37.9 against 33 G at 77.4 clips/s).
TSM_MACS, RATE_3D = 32.7e9, (0.55, 0.63, 0.72)
I3D = {"I3D 3x1x1": (1.6, 112.2, (33.13e9, 33.13e9, 33.13e9)), "I3D 3x3x3": (2.9, 188.0, (40.84e9, 45.56e9, 66.1e9))}

JOBS = """
kind: prepare
name: clips
data: {card: moving_shapes, clips: 320, size: 112}
---
kind: train
name: WORKERS
data: {run: clips, size: 112, val: null}
model: {name: tsm_resnet18, width: 0.5, num_segments: 8}
batch: {total: 32, per_worker: 8}
optim: {lr: 0.05, reference_batch: 32, epochs: 3, groups: plain}
scale: {workers: 1}
log_every: 2
"""


def main() -> None:
    kinetics()
    local()


def summit() -> machines.Cluster:
    machine = read_yaml(ROOT / "cluster/summit.yaml")[0]["machine"]
    return machines.make_cluster("summit", parse(machines.MachineSpec, machine, "summit.yaml: machine"), {})


def predict(work: planner.Work, workers: int) -> planner.Range:
    """Seconds of a training on `workers` GPUs of Summit with 8 clips each."""
    low, likely, high = (
        planner.train_s(replace(work, batch_total=PER_GPU * workers), summit(), workers, c) for c in range(3)
    )
    return low, likely, high


def kinetics() -> dict[str, planner.Range]:
    """Print what is predicted from the base; seconds by what."""
    base = planner.anchored(TSM, summit(), 6, BASE_S)
    out = {f"{n} GPUs": predict(base, n) for n in (96, 768, 1536)}
    for name, seconds in out.items():
        gpus = int(name.split()[0])
        ideal = BASE_S / (gpus / 6)
        shares = [f"{100 * ideal / s:.1f}" for s in reversed(seconds)]
        print(f"TSM, {name}: {_clock(seconds)}; efficiency {shares[1]} % [{shares[0]}, {shares[2]}]")
    errors = [f"{100 * (s / TARGET_S - 1):+.1f} %" for s in out["1536 GPUs"]]
    print(f"  published 14:13, efficiency 82.3 %: predicted is off by {errors[1]} [{errors[0]}, {errors[2]}]")
    largest = replace(base, batch_total=PER_GPU * 1536)
    blocks = planner.feeder_blocks(largest, summit(), 1536) / planner.split_step(largest, summit(), 1536).step_s
    print(f"  the largest feeder hands on {blocks:.1f} blocks/s: {blocks * planner.BLOCK_S:.0%} of a core")
    for name, (published, gradient_mb, macs) in I3D.items():
        ratios = []
        for case in range(3):
            cost = macs[case] / TSM_MACS / RATE_3D[2 - case]
            other = replace(base, gradient_mb=gradient_mb, compute_s=planner.scaled(base.compute_s, cost))
            ratios.append(predict(other, 1536)[1] / out["1536 GPUs"][1])
        out[name] = (ratios[0], ratios[1], ratios[2])
        print(f"{name} / TSM at 1536 GPUs: {ratios[1]:.2f} [{ratios[0]:.2f}, {ratios[2]:.2f}]; published {published}")
    return out


def _clock(seconds: planner.Range) -> str:
    low, likely, high = (f"{int(s) // 60}:{int(s) % 60:02d}" for s in seconds)
    return f"{likely} [{low}, {high}] min:s"


def local() -> dict[int, tuple[float, float]]:
    """Calibrate one worker, train on 1, 2 and 4, and print plan over measurement, from the runs' cards.

    On a machine with other work the second ratio counts: the rate that the run's processes would have with the cores
    to themselves, from the CPU time they took (their slowest, or all of them over the cores). It is a bound from above.
    """
    cores, ratios = machines.physical_cores(), {}
    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder, "job.yaml")
        document.write_text(JOBS.replace("WORKERS", "w0"))
        _slimray(folder, "run", "job.yaml", "--set", "w0:optim.epochs=1")  # makes the clips
        _slimray(folder, "plan", "job.yaml", "--measure", "--workers", "1,2,4")
        for workers in (1, 2, 4):
            name = f"w{workers}"
            document.write_text(JOBS.replace("WORKERS", name))
            used = _slimray(folder, "run", "job.yaml", "--set", f"{name}:scale.workers={workers}")
            run = runs.open_run(f"{folder}/runs", name)
            noted = (runs.read_card(run) or {})["plan"]
            rows = [row for row in runs.read_parts(run, "metrics") if row["phase"] == "train"]
            seconds = _own_seconds(used, rows[0]["time"], rows[-1]["time"], cores)
            alone = 32 * (rows[-1]["step"] - rows[0]["step"]) / seconds
            share = seconds / (rows[-1]["time"] - rows[0]["time"])
            ratios[workers] = (noted["ratio"], noted["predicted_samples_per_s"] / alone)
            print(f"{workers} workers on {cores} cores: plan / measured in clips per second: {noted}")
            print(
                f"  the run had {100 * share:.0f} % of what it could use; alone {alone:.2f} clips/s, plan / alone "
                f"{ratios[workers][1]:.3f}",
                flush=True,
            )
    return ratios


def _own_seconds(used: list[tuple[float, dict[int, float]]], start: float, end: float, cores: int) -> float:
    """Seconds that the processes of a run needed between two times, had they had `cores` for themselves."""
    first = max((entry for entry in used if entry[0] <= start), key=lambda entry: entry[0])[1]
    last = min((entry for entry in used if entry[0] >= end), key=lambda entry: entry[0], default=used[-1])[1]
    spent = [seconds - first.get(pid, 0.0) for pid, seconds in last.items()]
    return max(max(spent), sum(spent) / cores)


def _slimray(folder: str, *arguments: str) -> list[tuple[float, dict[int, float]]]:
    """Run a command; twice a second, the CPU seconds so far of each of its processes, those that ended included."""
    log, seen, out = Path(folder, "log.txt"), {}, []
    with log.open("w") as file:
        command = [sys.executable, "-m", "slimray.cli", *arguments]
        child = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        while child.poll() is None:
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(child.pid)
                for process in (root, *root.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        times = process.cpu_times()
                        seen[process.pid] = times.user + times.system
            out.append((time.time(), dict(seen)))
            time.sleep(0.5)
    if child.returncode:
        sys.exit(log.read_text())
    return out


if __name__ == "__main__":
    main()
