"""Ranks of a gloo group for tests: real processes, forked from one that has imported torch and the test's module."""

import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.waits import patience

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(function: Callable[..., None], *arguments: Any, world: int = 2, seconds: float = 180) -> None:
    """Call `function(rank, *arguments)`, a function of a test's module, on every rank; the arguments are plain values.

    AssertionError with what they said if one of them fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    asked = json.dumps([function.__module__, function.__name__, world, arguments])
    done = subprocess.run(
        [sys.executable, "-m", "tests.ranks", asked], cwd=ROOT, env=env, capture_output=True, timeout=patience(seconds)
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def main(asked: str) -> None:
    """Import the module, fork the ranks, and end with the code of the first that fails."""
    module, name, world, arguments = json.loads(asked)
    function = getattr(importlib.import_module(module), name)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(function, rank, world, arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks) and not any(process.exitcode for process in ranks):
        time.sleep(0.02)
    failed = [process.exitcode for process in ranks if process.exitcode]
    for process in ranks if failed else ():
        process.kill()  # it waits for the one that failed
    sys.exit(abs(failed[0]) if failed else 0)


def _rank(function: Callable[..., None], rank: int, world: int, arguments: list[Any]) -> None:
    import torch

    from slimray.edge.compiler import without_compiler

    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    with without_compiler():
        function(rank, *arguments)
    torch.distributed.barrier()  # gloo aborts when one side goes away while the other still talks
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
