"""Latency table of one device: the file, and the meter through which a search uses it.

As in ProxylessNAS (arXiv 1812.00332) and Once-for-All (1908.09791) the latency of a subnet is a sum over its units,
with an offset and a slope fitted to calibration subnets that were measured as a whole.
"""

import json
import statistics
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from slimray import storage
from slimray.edge.arch_costs import Meter
from slimray.spec import Spec, UserError, parse

FORMAT = 1
MAX_TABLE_BYTES = 200_000_000


class UnitTime(Spec):
    """Time of a unit, in milliseconds; `ms` is the lower quartile of its readings (see `typical`)."""

    ms: float = Field(gt=0)
    mean_ms: float = Field(gt=0)
    std_ms: float = Field(ge=0)
    count: int = Field(ge=1)
    readings_ms: tuple[float, ...]


class Subnet(Spec):
    """A subnet measured as a whole."""

    arch: dict[str, Any]
    readings_ms: tuple[float, ...]


class CalibrationRow(Spec):
    """A subnet measured as a whole, and the prediction of the table when calibrated without it."""

    arch: dict[str, Any]
    measured_ms: float = Field(gt=0)
    predicted_ms: float


class Calibration(Spec):
    """Latency of a subnet = `fixed_ms` + `slope` * the sum of its units."""

    fixed_ms: float
    slope: float = Field(gt=0)
    median_error_percent: float
    """Median error of the predictions of `rows`, each from a fit to the others."""
    largest_error_percent: float
    noise_percent: float
    """Test-retest noise: median difference between the odd and the even readings of a subnet."""
    rows: tuple[CalibrationRow, ...]


class Conditions(Spec):
    """State of the device at the end of a round, as far as it can be read."""

    temperature_c: float | None = None
    clock_mhz: float | None = None
    throttled: bool | None = None
    watts: float | None = None
    source: str | None = None
    """Source of the watts: rapl, hwmon, tegrastats, nvidia-smi."""


class LatencyTable(Spec):
    """A table of measured latencies as stored in a file; `done` of its `rounds` have been measured."""

    format: Literal[1]
    model: dict[str, Any]
    num_points: int | None
    hardware: str
    device: str
    threads: int
    versions: dict[str, str]
    date: str
    resolutions: tuple[int, ...] | None
    rounds: int
    seconds: float
    done: int
    reference_ms: tuple[float, ...]
    """Time of the reference network per round, which shows the speed of the machine."""
    waited_percent: float
    """Share of the time in which the measuring thread did not have the processor, which wall time would include."""
    units: dict[str, UnitTime]
    subnets: tuple[Subnet, ...]
    """Subnets for calibration."""
    calibration: Calibration | None
    conditions: tuple[Conditions, ...] = ()
    """Conditions per round, on a device with an agent."""


def summary(table: LatencyTable) -> dict[str, Any]:
    """Return a summary of a finished table: its origin and its accuracy."""
    calibration, reference = table.calibration, table.reference_ms
    out: dict[str, Any] = {"hardware": table.hardware, "device": table.device, "threads": table.threads}
    spread = [unit.std_ms / unit.mean_ms for unit in table.units.values()]
    out |= {"units": len(table.units), "rounds": table.rounds, "seconds": round(table.seconds, 1)}
    out |= {"unit_std_percent": 100 * statistics.median(spread), "waited_percent": table.waited_percent}
    out["drift_percent"] = 100 * (max(reference) / min(reference) - 1)
    for name, value in (("temperature_c", max), ("watts", statistics.fmean)):
        known = [getattr(one, name) for one in table.conditions if getattr(one, name) is not None]
        out |= {name: round(value(known), 1)} if known else {}
    if any(one.throttled for one in table.conditions):
        out["throttled_rounds"] = sum(bool(one.throttled) for one in table.conditions)
    if calibration:
        out |= {
            "calibrated_with": len(calibration.rows),
            "median_error_percent": calibration.median_error_percent,
            "largest_error_percent": calibration.largest_error_percent,
            "test_retest_percent": calibration.noise_percent,
        }
    return out


IDENTITY = ("model", "num_points", "hardware", "device", "threads", "resolutions", "rounds")


def read_table(path: str | Path) -> LatencyTable:
    """Read and check a table, from a path or a URI; UserError if the file is missing or not a table."""
    fs, at = storage.open_uri(path)
    try:
        data = storage.read_bytes(fs, at, first=MAX_TABLE_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such table, measure one with `slimray profile`") from None
    if len(data) > MAX_TABLE_BYTES:
        raise UserError(f"{path}: is larger than {MAX_TABLE_BYTES} bytes, so it is not a latency table")
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is not JSON, so not a latency table, measure one with `slimray profile`") from None
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        found = plain.get("format") if isinstance(plain, dict) else None
        raise UserError(f"{path}: is not a latency table of format {FORMAT} (got {found!r}), measure it again")
    return parse(LatencyTable, plain, str(path))


def finished_meter(path: str | Path) -> Meter:
    """Return the meter of the table in a file; UserError if it is not a table or its measurement is not finished."""
    table = read_table(path)
    if table.calibration is None:
        raise UserError(
            f"{path}: its measurement is not finished ({table.done} of {table.rounds} rounds): the same "
            "`slimray profile` resumes it"
        )
    return meter(table, str(path))


def meter(table: LatencyTable, name: str) -> Meter:
    """Return the meter of a table, calibrated if the table is finished; errors start with `name`.

    A unit takes `slope` x `ms`, and every arch has the offset `fixed_ms` once.
    """
    calibration = table.calibration
    fixed, slope = (calibration.fixed_ms, calibration.slope) if calibration else (0.0, 1.0)
    times = {key: {"latency_ms": slope * unit.ms} for key, unit in table.units.items()}
    source = f"measured on {table.device}, {table.hardware}, {table.threads} threads, {table.date}"
    return Meter(
        name=name,
        how="table",
        source=source,
        names=("latency_ms",),
        of=lambda unit: times.get(unit.key),
        fixed={"latency_ms": fixed},
        resolutions=table.resolutions,
    )


def take_up(new: LatencyTable, path: str | Path) -> LatencyTable:
    """Return the table in the file, or `new` if there is no file; UserError if the two measure different things."""
    fs, at = storage.open_uri(path)
    if not storage.exists(fs, at):
        return new
    old = read_table(path)
    for name in IDENTITY:
        was, now = getattr(old, name), getattr(new, name)
        if was != now:
            shown = f"{_short(was)}, not {_short(now)}"
            raise UserError(f"{path}: {name}: the table there was measured for {shown}, give another --out")
    return old


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict | tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_table(table: LatencyTable, path: str | Path) -> None:
    fs, at = storage.open_uri(path)
    storage.write_atomic(fs, at, json.dumps(table.model_dump(mode="json")).encode())
