"""Run the benchmarks named on the command line, or all of them, and print their results."""

import importlib
import os
import platform
import sys
from datetime import date

NAMES = ("models", "overhead", "cold_start", "ingest", "fed", "packed", "point_models", "voxels", "knn", "folds")
NAMES += ("subnets", "rooms", "shrinking", "searching", "judging", "plan")
NAMES += ("latency", "specialise", "dashboard", "checkpoint", "amc", "export", "deep_compression", "int8", "compressed")
NAMES += ("haq", "translation", "pruned_translation", "translation_bits", "hat", "language_model")
NAMES += ("agent", "runtime", "people", "people_search")
# on request only: `make soak`
SOAK = ("chaos", "control_plane", "large_index", "control_path", "storage_requests", "live", "feeder")
SOAK += ("messages", "readers")


def main() -> None:
    names = sys.argv[1:] or NAMES
    print(f"# {date.today()}, {platform.machine()}, {os.cpu_count()} cores", flush=True)
    for name in names:
        if name not in NAMES + SOAK:
            sys.exit(f"unknown measurement {name!r}, one of {', '.join(NAMES + SOAK)}")
        print(f"## {name}", flush=True)
        importlib.import_module(f"tests.benchmarks.{name}").main()


if __name__ == "__main__":
    main()
