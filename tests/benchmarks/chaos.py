"""Chaos: thirty trainings, each under one or two injected faults, compared with an undisturbed one.

Run `python -m tests.benchmarks.chaos`. The environment variable SEEDS sets how many seeds (default 30) or which ones
(`5,12:20`). EVENTS=cloud draws only from the faults of a spot cloud.
"""

import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from tests.chaos import CLOUD_EVENTS, EVENTS, SICK, Site, compare, disturbed, outcome
from tests.faulty_s3 import faulty_s3

QUIET = {
    "AWS_ACCESS_KEY_ID": "id",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def seeds_of(text: str) -> list[int]:
    """Return the seeds that `text` means: `30` is 0 to 29, `5,12:20` is 5 and 12 to 19."""
    if text.isdigit():
        return list(range(int(text)))
    ends = [[int(end) for end in part.split(":")] for part in text.split(",")]
    return [seed for one in ends for seed in (range(*one) if len(one) == 2 else one)]


def main() -> None:
    """Print a line per seed and how many ended as they must."""
    os.environ.update(QUIET)
    seeds, good, kinds = seeds_of(os.environ.get("SEEDS", "0:30")), 0, Counter()
    drawn = CLOUD_EVENTS if os.environ.get("EVENTS") == "cloud" else EVENTS + CLOUD_EVENTS
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = str(cluster.address)
    with faulty_s3() as faults, tempfile.TemporaryDirectory() as folder:
        faults.refused = SICK
        site = Site.build(cluster, faults, Path(folder))
        quiet = site.start("calm", "2")
        _, err = quiet.communicate(timeout=400)
        assert quiet.returncode == 0, err
        calm = outcome(site, "calm")
        print(f"calm: loss {calm.loss:.4f}, goodput {calm.goodput}", flush=True)
        for seed in seeds:
            name, began = f"chaos-{seed:02d}", time.monotonic()
            try:
                events, workers = disturbed(site, name, seed, drawn)
                found = outcome(site, name)
                result = compare(calm, name, found, workers)
                good += 1
                kinds.update(events)
                told = f"{result}; goodput {found.goodput.get('goodput')}"
                told += f", {found.goodput.get('repeated_steps')} steps repeated"
            except AssertionError as error:
                events, workers, told = [], "", f"FAILED: {str(error)[:1500]}"
            site.tidy()
            seconds = time.monotonic() - began
            print(f"{name}: workers {workers}, {', '.join(events)}: {told} ({seconds:.0f} s)", flush=True)
    print(f"{good} of {len(seeds)} ended as they must; events: {dict(kinds)}; faults {dict(faults.done)}", flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
