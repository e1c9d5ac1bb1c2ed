"""Two things measured in turn, so that what disturbs one disturbs both: their ratios pair by pair, how sure they are.

What is told is the median of the ratios, and the order statistics around it that enclose the true median with 95 %.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Pairs:
    """Figures of two things, of one unit, measured in turn."""

    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median of `a` over `b`."""
        return median(self._ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """The ratios that enclose the true median with 95 % or more; of five pairs or fewer all of them, with less."""
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
    """Return how many of `count` sorted values may be left out at either end of a 95 % interval of their median."""
    skip, ways, tail = 0, count, 1 + count  # of `count` signs, those in which skip + 1, and so many or fewer, are up
    while 40 * tail <= 2**count:
        skip += 1
        ways = ways * (count - skip) // (skip + 1)
        tail += ways
    return skip


def alternate(a: Callable[[], float], b: Callable[[], float], pairs: int) -> Pairs:
    """Measure `a` and `b` in turn, each first every other time; each returns its own figure."""
    measured = [(a(), b()) if number % 2 == 0 else tuple(reversed((b(), a()))) for number in range(pairs)]
    return Pairs(tuple(x for x, _ in measured), tuple(y for _, y in measured))
