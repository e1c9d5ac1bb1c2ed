"""Errors of a latency table of `ofa_mobilenetv3` on this device, one thread, eager (or the runtime in
SLIMRAY_BENCH_HARDWARE).

The table is measured and calibrated first (slimray.edge.profiler); then 50 other subnets are measured whole, spread
evenly over the logarithm of a latency range of at least 4. Beside it, fitted to the same calibration subnets: a
constant, and a line over MACs; and the test-retest noise, the difference between the odd and the even readings of a
subnet. Some subnets lie between the measured resolutions. A clock of processor time excludes waiting for a core, but
not the effect of other processes on caches: a quiet machine gives better figures. Goal: median error at most 5 %.
"""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimray import models
from slimray.arch import Arch
from slimray.edge import latency_table, profiler, remote
from slimray.edge.arch_costs import Prices, draw_archs
from slimray.edge.runtimes import Runtime

RESOLUTIONS = (128, 160, 192, 224)
TESTED, BETWEEN = 50, 20
HARDWARE = os.environ.get("SLIMRAY_BENCH_HARDWARE", "cpu-eager")
ROUNDS = int(os.environ.get("SLIMRAY_BENCH_ROUNDS", "15"))
OPTIONS = {"name": "ofa_mobilenetv3", "num_classes": 1000}


def main() -> None:
    report(models.build(**OPTIONS).eval(), OPTIONS, HARDWARE, RESOLUTIONS, TESTED, BETWEEN)


def report(
    net: Any,
    options: dict[str, Any],
    hardware: str | Runtime,
    resolutions: Sequence[int],
    num_tested: int,
    num_between: int = 0,
    rounds: int = ROUNDS,
) -> None:
    """Print the errors of a table that is measured first on `hardware`, a runtime here or a device."""
    with contextlib.ExitStack() as kept:
        folder = os.environ.get("SLIMRAY_BENCH_DIR") or kept.enter_context(tempfile.TemporaryDirectory())
        given: dict[str, Any] = (
            {"hardware": hardware} if isinstance(hardware, str) else {"hardware": remote.HARDWARE, "runtime": hardware}
        )
        name = hardware if isinstance(hardware, str) else remote.HARDWARE
        path = Path(folder, f"table-{name}.json")
        table = profiler.profile(net, options, path, resolutions=resolutions, rounds=rounds, **given)
    print(", ".join(f"{name} {_plain(value)}" for name, value in latency_table.summary(table).items()))
    assert table.calibration is not None
    prices = Prices(net, None, latency_table.meter(table, "table"))
    used = [Arch.from_dict(row.arch) for row in table.calibration.rows]
    tested = draw_archs(prices, num_tested, seed=1, exclude=used)
    largest = max(resolutions)
    between = [a.replace(resolution=a["resolution"] + (12 if a["resolution"] < largest else -12)) for a in tested]
    between = between[:: max(1, len(between) // num_between)][:num_between] if num_between else []
    assert not set(used) & {*tested, *between}
    measured = profiler.measure_whole(net, [*tested, *between], hardware, 1, rounds, seed=1)
    ms, others = np.array(measured.ms[: len(tested)]), np.array(measured.ms[len(tested) :])
    print(
        f"{len(tested)} subnets, {ms.min():.2f} to {ms.max():.2f} ms ({ms.max() / ms.min():.1f} times), waited for a "
        f"core {100 * measured.waited:.0f} % of the time, reference {measured.reference_ms:.3f} ms"
    )
    known = np.array([row.measured_ms for row in table.calibration.rows])
    macs = np.array([prices.arch_costs(arch)["macs"] for arch in [*used, *tested]]) / 1e6
    fixed, slope = profiler.fit_line(macs[: len(used)] / 10, known)
    _row("table", _says(prices, tested), ms)
    drift = measured.reference_ms / np.median(table.reference_ms)
    bias = 100 * float(np.median(_says(prices, tested) / ms) - 1)
    print(f"median of said over measured {bias:+.1f} %; the reference took {100 * (drift - 1):+.1f} % since the table")
    _row("table, put to the speed of the reference", drift * _says(prices, tested), ms)
    _row("constant", np.full(len(ms), np.median(known)), ms)
    _row("MACs alone", fixed + slope * macs[len(used) :] / 10, ms)
    pairs = [profiler.halves(rows) for rows in measured.readings_ms[: len(tested)]]
    _row("test and retest", *(np.array(half) for half in zip(*pairs, strict=True)))
    if between:
        _row(f"table, {len(between)} subnets between its resolutions", _says(prices, between), others)


def _says(prices: Prices, archs: list[Arch]) -> np.ndarray:
    return np.array([prices.metered(arch)["latency_ms"] for arch in archs])


def _row(name: str, said: np.ndarray, ms: np.ndarray) -> None:
    errors = 100 * np.abs(said / ms - 1)
    print(
        f"{name}: median error {np.median(errors):.2f} %, nine of ten below {np.quantile(errors, 0.9):.2f} %, "
        f"largest {errors.max():.2f} %",
        flush=True,
    )


def _plain(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
