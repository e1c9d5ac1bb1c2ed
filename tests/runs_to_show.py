"""Run folders as training, shrinking and searching leave them, written by slimray.runs, for tests of the dashboard."""

import json
import random
from collections.abc import Sequence
from typing import Any

from slimray import runs
from slimray.report import charts, pages

CLASSES = ("left", "right", "up")


def metric_row(step: int, epoch: float) -> dict[str, Any]:
    """A row as the loop writes it."""
    return {
        "step": step, "time": 1.7e9 + step, "phase": "train", "epoch": epoch, "train/loss": 2.0 / (1 + step / 50),
        "train/lr": 0.1, "train/samples_per_s": 200.0 + step % 7, "time/step_s": 0.5, "data/wait_s": 0.05,
        "time/transfer_s": 0.01, "time/compute_s": 0.4, "time/communication_s": 0.02,
    }  # fmt: skip


def val_row(step: int, epoch: float, top1: float) -> dict[str, Any]:
    return {"step": step, "time": 1.7e9 + step, "phase": "val", "epoch": epoch, "val/top1": top1, "val/loss": 0.5}


def write_rows(run: runs.Run, rows: Sequence[dict[str, Any]], folder: str = "metrics", attempt: int = 1) -> None:
    """One more part of records."""
    writer = runs.PartWriter(run, folder, attempt, 0)
    for row in rows:
        writer.write(row)
    writer.close()


def trained(where: str, name: str, state: runs.State = "finished", rows: int = 20, message: str = "") -> runs.Run:
    """A training run of `rows` metric rows, in any state."""
    run = runs.open_run(where, name)
    runs.begin(run, {"kind": "train", "name": name, "optim": {"lr": 0.1}, "data": {"card": {"classes": CLASSES}}}, 1)
    metrics = [metric_row(10 * i, i / 10) for i in range(1, rows + 1)]
    metrics += [val_row(10 * i, i / 10, 50.0 + i) for i in range(5, rows + 1, 5)]
    write_rows(run, metrics)
    if state == "finished":
        confusion = {name: [[8, 1, 0], [2, 7, 0], [0, 0, 9]]}
        runs.write_file(run, "results.json", json.dumps({"classes": CLASSES, "confusion": confusion}).encode())
        best = {"val/top1": 50.0 + rows, "val/loss": 0.5}
        runs.write_card(run, {"metrics": {"best": best, "last": best}, "seconds": 12.5, "environment": {"cpus": 2}})
        runs.write_report(run, pages.render(name, headline={"best top-1": "70.0 %"}))
    if state != "running":
        runs.end(run, state, message)
    return run


def arch(rng: random.Random) -> dict[str, Any]:
    """A subnet of three stages of three blocks."""
    return {
        "kernel": [rng.choice((3, 5, 7)) for _ in range(9)],
        "expand": [rng.choice((3, 4, 6)) for _ in range(9)],
        "depth": [rng.choice((2, 3)) for _ in range(3)],
        "resolution": rng.choice((20, 24, 28, 32)),
    }


def trial(index: int, rng: random.Random) -> dict[str, Any]:
    """A trial as the search writes it."""
    genes = arch(rng)
    size = sum(genes["kernel"]) * sum(genes["expand"]) * sum(genes["depth"])
    top1 = min(99.0, 30 + size / 300 + rng.uniform(-5, 5))
    costs = {"params": 30.0 * size, "macs": 30.0 * size * genes["resolution"], "memory_mb": size / 5000}
    return {"index": index, "arch": genes, "metric": top1, "metrics": {"top1": top1}, "costs": costs}


def searched(where: str, name: str, num_trials: int, finished: bool = True) -> runs.Run:
    """A search for two targets of `num_trials` in all, over or (its trials only) under way."""
    run, rng = runs.open_run(where, name), random.Random(name)
    runs.begin(run, {"kind": "search", "name": name, "supernet": "s"}, 1)
    trials = [trial(i, rng) for i in range(num_trials)]
    for i, one in enumerate(trials):
        target = ("small", "large")[i % 2]
        runs.write_file(run, f"trials/{target}/{i // 2:06d}.json", json.dumps(one | {"index": i // 2}).encode())
    if finished:
        flat = [{"arch": one["arch"], "metric": one["metric"], **one["costs"]} for one in trials]
        best = max(flat, key=lambda one: one["metric"])
        rows = [{"target": t, "run": f"{name}-{t}", "searched": best["metric"], **best} for t in ("small", "large")]
        fronts = {}
        for cost in ("params", "macs", "memory_mb"):
            on = set(charts.Scatter("", cost, "top1", [(one[cost], one["metric"]) for one in flat]).front())
            fronts[cost] = [one for one in flat if (one[cost], one["metric"]) in on]
        runs.write_file(run, "front.json", json.dumps({"metric": "top1", "fronts": fronts}).encode())
        results = {"metric": "top1", "targets": rows, "trials": flat}
        runs.write_file(run, "results.json", json.dumps(results).encode())
        runs.write_card(run, {"metrics": {"rows": [{"run": name, "top1": best["metric"]}]}, "seconds": 99.0})
        runs.end(run, "finished")
    return run


def shrunk(where: str, name: str) -> runs.Run:
    """A supernet whose first stage is done and whose second one is being trained."""
    run = runs.open_run(where, name)
    runs.begin(run, {"kind": "shrink", "name": name}, 1)
    for number, stage_name in enumerate(("teacher", "kernel")):
        stage = runs.run_at(f"{run.uri}/stages/{number:02d}-{stage_name}")
        runs.begin(stage, {"kind": "train", "name": name}, 1)
        write_rows(stage, [metric_row(10 * i, i / 10) for i in range(1, 11)])
        if number == 0:
            rows = [
                {"subnet": "largest", "params": 9000, "top1": 80.0},
                {"subnet": "smallest", "params": 3000, "top1": 20.0},
            ]
            runs.write_file(stage, "results.json", json.dumps({"rows": rows}).encode())
            runs.end(stage, "finished")
    return run
