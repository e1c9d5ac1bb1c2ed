"""Two functions measured alternately, so that disturbances affect both: ratios by pair, and their confidence interval.

Reported are the median of the ratios and the order statistics that enclose the true median with 95 % confidence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Pairs:
    """Alternating measurements of two functions, in the same unit."""

    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Return the median of `a` over `b`."""
        return median(self._ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """Return the ratios that enclose the true median with at least 95 %; with five pairs or fewer, all of them."""
        skip = enclosing(len(self.a))
        return self._ratios[skip], self._ratios[-1 - skip]

    @property
    def _ratios(self) -> list[float]:
        return sorted(x / y for x, y in zip(self.a, self.b, strict=True))

    def to_plain(self, a: str, b: str) -> dict[str, Any]:
        """Return milliseconds as plain values for JSON, `a` over `b`."""
        return {
            f"{a}_ms": median(self.a),
            f"{b}_ms": median(self.b),
            "ratio": self.ratio,
            "interval": list(self.interval),
            "pairs": len(self.a),
        }


def enclosing(count: int) -> int:
    """Return how many of `count` sorted values can be dropped at either end of a 95 % interval of their median."""
    skip, ways, tail = 0, count, 1 + count  # outcomes of `count` coin tosses with exactly, with at most skip + 1 heads
    while 40 * tail <= 2**count:
        skip += 1
        ways = ways * (count - skip) // (skip + 1)
        tail += ways
    return skip


def alternate(a: Callable[[], float], b: Callable[[], float], pairs: int) -> Pairs:
    """Measure `a` and `b` alternately, each first every other time; each returns its own measurement."""
    measured = [(a(), b()) if number % 2 == 0 else tuple(reversed((b(), a()))) for number in range(pairs)]
    return Pairs(tuple(x for x, _ in measured), tuple(y for _, y in measured))
