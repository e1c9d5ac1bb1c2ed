"""Ratios that hold on a noisy machine: two things, or two checkouts, measured in turn; median ratio and interval."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from slimray.runtime.pairs import enclosing


@dataclass(frozen=True)
class Ratio:
    """`a / b`, pair by pair: median, and the order statistics that enclose it with 95 % or more."""

    name: str
    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        return sorted(x / y for x, y in zip(self.a, self.b, strict=True))

    def __str__(self) -> str:
        ratios, skip = self.ratios, enclosing(len(self.a))
        low, high = ratios[skip], ratios[-1 - skip]
        return (
            f"{self.name}: median {median(ratios):.3f} [{low:.3f}, {high:.3f}] of {len(ratios)} pairs "
            f"(a median {median(self.a):.4g}, b median {median(self.b):.4g})"
        )


def alternate(name: str, a: Callable[[], float], b: Callable[[], float], pairs: int = 9) -> Ratio:
    """Measure `a` and `b` in turn `pairs` times after one unmeasured round; each returns its own figure."""
    a(), b()
    measured = [(a(), b()) if i % 2 == 0 else tuple(reversed((b(), a()))) for i in range(pairs)]
    return Ratio(name, tuple(x for x, _ in measured), tuple(y for _, y in measured))


def environment_of(root: Path, **more: str) -> dict[str, str]:
    """Return the environment in which the checkout in `root` runs with this environment's libraries."""
    kept = {name: value for name, value in os.environ.items() if name != "SLIMRAY_AGAINST"}
    return kept | {"PYTHONPATH": f"{root / 'platform'}:{root}"} | more


def printed_by(root: Path, name: str, **more: str) -> str:
    """Return what the measurement `name` of the checkout in `root` prints within an hour; `more` is its environment."""
    command = [sys.executable, "-m", "tests.benchmarks", name]
    environment = environment_of(root, **more)
    done = subprocess.run(command, cwd=root, env=environment, check=True, timeout=3600, capture_output=True, text=True)
    return done.stdout
