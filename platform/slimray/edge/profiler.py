"""Measures the latency of every operator of a supernet on this device, and writes the latency table.

Surprising: units are not measured alone but in context: subnets that together contain every unit run unit by unit, with
the clock read in between, so that caches are as warm as in use. A single thread is timed by its processor time, which
equals the latency on a quiet machine and excludes waiting on a busy one. A reference network, timed repeatedly, tracks
the speed of the machine. A few further subnets, measured as a whole, give an offset and a slope.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimray.arch import Arch
from slimray.edge.arch_costs import Meter, Prices, draw_archs
from slimray.edge.cost import build_on_meta
from slimray.edge.latency_table import (
    FORMAT,
    Calibration,
    CalibrationRow,
    Conditions,
    LatencyTable,
    Subnet,
    UnitTime,
    meter,
    take_up,
    write_table,
)
from slimray.edge.runtimes import (
    RUNS_PER_READING,
    RUNTIMES,
    THREAD_CLOCK,
    Chain,
    Clock,
    Reading,
    Runtime,
    Step,
    reference_module,
    settings,
    timed_on_gpu,
    versions,
)
from slimray.spec import UserError, did_you_mean

NEW_ARCHS = 400  # archs drawn without a new unit until a space without a `cover` counts as covered
MOST_UNITS = 20_000
REFERENCE_RUNS = 4  # before each reading
DETERMINED = 1e-3  # weight of the prior "no offset, slope 1", relevant only if calibration subnets are too alike


def _chains(runtime: Runtime, archs: Sequence[Sequence[Any]], threads: int, known: dict[str, Step]) -> Iterator[Chain]:
    """Yield prepared chains of units, one for each of `archs`, which have the same layers and differ only in shapes.

    A unit that does not take the output of the previous one has an input of its own. `known` caches prepared units.
    """
    steps: list[Step] = []
    for units in archs:
        if runtime.per_shape:
            for unit in units:
                if unit.key not in known:
                    known[unit.key] = runtime.prepare(unit.make().eval(), torch.randn(1, *unit.input), threads)
            steps = [known[unit.key] for unit in units]
        elif not steps:
            steps = [runtime.prepare(unit.make().eval(), torch.empty(0), threads) for unit in units]
        inputs, shape = [], None
        for unit in units:
            inputs.append(None if shape == (1, *unit.input) else runtime.feed(torch.randn(1, *unit.input)))
            shape = tuple(build_on_meta(unit.make).eval()(torch.empty(1, *unit.input, device="meta")).shape)
        yield Chain(tuple(unit.key for unit in units), tuple(steps), tuple(inputs))


def _whole(runtime: Runtime, net: Any, arch: Arch, first: Any, threads: int) -> Chain:
    """Return a subnet in its final form as a chain: one network, one step. `first` is its first unit."""
    module, shape = net.measured(arch, first.input)
    x = torch.randn(1, *shape)
    return Chain(("whole",), (runtime.prepare(module.eval(), x, threads),), (runtime.feed(x),))


def _reference(runtime: Runtime) -> Chain:
    """Return the chain of the reference network, which tracks the speed of the machine."""
    module, x = reference_module(), torch.randn(1, 24, 28, 28)
    if runtime.reference is not None:
        return Chain(("reference",), (runtime.reference(module, x),), (runtime.feed(x),))
    on_gpu = runtime.timed is timed_on_gpu
    return Chain(
        ("reference",), (module.to("cuda") if on_gpu else module,), (x.to("cuda") if on_gpu else x,)
    )  # in eager mode for all runtimes


@dataclass(frozen=True, eq=False)
class Readings:
    """The ms of each chain, `[rounds, steps]`, and the times of the reference."""

    chains: list[np.ndarray]
    reference_ms: np.ndarray
    waited: float
    """Share of the time in which this thread did not have the processor."""


def take_readings(runtime: Runtime, chains: Sequence[Chain], threads: int, rounds: int, rng: random.Random) -> Readings:
    """Time all `chains` in `rounds` rounds, each in a new order; a reading is the fastest of a few runs, by step."""
    reference, order = _reference(runtime), list(range(len(chains)))
    clock = time.thread_time if threads == 1 and THREAD_CLOCK else time.perf_counter
    read = runtime.reading or partial(_reading_here, runtime)
    wall = busy = 0.0
    rows: list[list[list[float]]] = [[] for _ in chains]
    seen: list[float] = []
    with torch.inference_mode():
        for _ in range(rounds):
            rng.shuffle(order)
            for i in order:
                found = read(reference, chains[i], REFERENCE_RUNS, clock)
                seen.append(found.reference_ms)
                rows[i].append(found.ms)
                wall, busy = wall + found.wall_s, busy + found.busy_s
    return Readings([np.array(one) for one in rows], np.array(seen), max(0.0, 1 - busy / wall))


def _reading_here(runtime: Runtime, reference: Chain, chain: Chain, runs: int, clock: Clock) -> Reading:
    wall, busy = time.perf_counter(), time.thread_time()
    now = [runtime.timed(reference.steps, reference.inputs, clock)[0] for _ in range(runs)]
    runtime.timed(chain.steps, chain.inputs, clock)
    rows = [runtime.timed(chain.steps, chain.inputs, clock) for _ in range(RUNS_PER_READING)]
    fastest = [min(times) for times in zip(*rows, strict=True)]
    wall, busy = time.perf_counter() - wall, time.thread_time() - busy
    return Reading(min(now[1:]), fastest, wall, busy)  # in the first run, the cache holds other data


@dataclass(frozen=True)
class Measured:
    """Subnets measured as a whole: typical ms of each, its readings, the reference's ms, the share of waiting."""

    ms: tuple[float, ...]
    readings_ms: tuple[np.ndarray, ...]
    reference_ms: float
    waited: float


def measure_whole(
    net: Any,
    archs: Sequence[Arch],
    hardware: str | Runtime,
    threads: int,
    rounds: int,
    seed: int,
    num_points: int | None = None,
) -> Measured:
    """Measure the subnets `archs` of `net` (with weights, not on "meta") in their final form, with batch 1."""
    runtime = RUNTIMES[hardware] if isinstance(hardware, str) else hardware
    prices = Prices(net, num_points)
    with settings(threads):
        chains = [_whole(runtime, net, arch, prices.units(arch)[0], threads) for arch in archs]
        readings = take_readings(runtime, chains, threads, rounds, random.Random(f"{seed} whole"))
    rows = tuple(one[:, 0] for one in readings.chains)
    return Measured(tuple(map(typical, rows)), rows, float(np.median(readings.reference_ms)), readings.waited)


def halves(readings: Any) -> tuple[float, float]:
    """Return the typical time of a subnet by its even and by its odd readings, as a test and a retest."""
    return typical(readings[::2]), typical(readings[1::2])


def noise_percent(rows: Sequence[Any]) -> float:
    """Return the median difference in percent between test and retest of subnets, given their readings."""
    return 100 * statistics.median(abs(a / b - 1) for a, b in map(halves, rows))


def profile(
    net: Any,
    model: Mapping[str, Any],
    path: str | Path,
    *,
    hardware: str = "cpu-eager",
    runtime: Runtime | None = None,
    threads: int = 1,
    num_points: int | None = None,
    resolutions: Sequence[int] | None = None,
    rounds: int = 15,
    calibrate: int = 12,
    say: Callable[[str], None] = lambda text: None,
) -> LatencyTable:
    """Measure the latency table of supernet `net` (with weights) on this device, store it in the file `path`, return
    it.

    An existing table is resumed after its last complete round, or returned if it is finished; UserError if it measures
    something else. `model` (build name and options) is only recorded. `rounds`: readings of every unit; `calibrate`:
    subnets measured as a whole, between the units; `runtime`: a device that is not in RUNTIMES, called `hardware` in
    the file. Restores torch's number of threads.
    """
    if runtime is None and hardware not in RUNTIMES:
        raise UserError(f"hardware: unknown runtime {hardware!r}{did_you_mean(hardware, RUNTIMES)}")
    runtime = runtime or RUNTIMES[hardware]
    runtime.check()
    if rounds < 2 or calibrate < 4 or threads < 1:
        raise UserError("profile: rounds must be >= 2, calibrate >= 4 and threads >= 1")
    sides = _resolutions(net, resolutions, runtime)
    table = take_up(_empty_table(model, hardware, runtime, threads, num_points, sides, rounds), path)
    if table.calibration is not None:
        return table
    start, before = time.perf_counter(), table.seconds
    prices = Prices(net, num_points)
    if not table.subnets:
        archs = draw_archs(Prices(net, num_points, _by_macs(prices, sides)), calibrate, seed=0)
        subnets = tuple(Subnet(arch=arch.to_dict(), readings_ms=()) for arch in archs)
        table = table.model_copy(update={"subnets": subnets})
    whole = [Arch.from_dict(subnet.arch) for subnet in table.subnets]
    cover, known = _cover(net, sides, num_points), dict[str, Step]()
    with settings(threads):
        chains = [_whole(runtime, net, arch, prices.units(arch)[0], threads) for arch in whole]
        for number, archs in enumerate(cover):
            say(f"preparing {number + 1}/{len(cover)} subnets that contain all units")
            chains += _chains(runtime, [prices.units(arch) for arch in archs], threads, known)
        for number in range(table.done, rounds):
            readings = take_readings(runtime, chains, threads, 1, random.Random(f"{number} units"))
            table = _with_readings(table, chains, readings, before + time.perf_counter() - start)
            if runtime.conditions is not None:
                told = Conditions.model_validate(runtime.conditions())
                table = table.model_copy(update={"conditions": (*table.conditions, told)})
            write_table(table, path)
            left = (table.seconds - before) / (number + 1) * (rounds - number - 1)
            say(f"{table.done}/{rounds} rounds, {len(table.units)} units, about {left:.0f} s left")
    table = table.model_copy(update={"calibration": _calibrate(net, table)})
    write_table(table, path)
    return table


def _empty_table(
    model: Mapping[str, Any],
    hardware: str,
    runtime: Runtime,
    threads: int,
    num_points: int | None,
    resolutions: tuple[int, ...] | None,
    rounds: int,
) -> LatencyTable:
    """Return an empty table of this device."""
    return LatencyTable(
        format=FORMAT,
        model=dict(model),
        num_points=num_points,
        hardware=hardware,
        device=runtime.device(),
        threads=threads,
        versions=versions(hardware) | (runtime.versions() if runtime.versions else {}),
        date=datetime.now(UTC).date().isoformat(),
        resolutions=resolutions,
        rounds=rounds,
        seconds=0.0,
        done=0,
        reference_ms=(),
        waited_percent=0.0,
        units={},
        subnets=(),
        calibration=None,
    )


def _resolutions(net: Any, wanted: Sequence[int] | None, runtime: Runtime) -> tuple[int, ...] | None:
    """Return the resolutions to measure: those `wanted`, or else those of the space, only a few for a slow runtime."""
    name = net.space.input_name("side")
    if name is None:
        if wanted:
            raise UserError("--resolutions: this supernet has no resolutions")
        return None
    sides = [int(side) for side in net.space.dimensions[name].choices[0]]
    for side in wanted or ():
        if side not in sides:
            raise UserError(f"--resolutions: {side} is not one of {', '.join(map(str, sides))}")
    if wanted:
        return tuple(sorted(set(wanted)))
    if runtime.num_resolutions and len(sides) > runtime.num_resolutions:
        places = np.linspace(0, len(sides) - 1, runtime.num_resolutions).round().astype(int)
        return tuple(sides[place] for place in places)
    return tuple(sides)


def _cover(net: Any, sides: Sequence[int] | None, num_points: int | None) -> list[list[Arch]]:
    """Return archs that together contain every unit of the space, as lists of archs that differ only in resolution."""
    if hasattr(net, "layout") and hasattr(net.layout, "cover"):
        name = net.space.input_name("side")
        return [[arch.replace(**{name: side}) for side in sides or ()] or [arch] for arch in net.layout.cover()]
    rng, seen, chosen, since = random.Random("cover"), set(), [], 0
    prices = Prices(net, num_points)
    while since < NEW_ARCHS:
        arch = net.space.sample(rng) if chosen else net.space.largest()
        keys = {unit.key for unit in prices.units(arch)}
        since = since + 1 if keys <= seen else 0
        if not keys <= seen:
            chosen.append([arch])
            seen |= keys
        if len(seen) > MOST_UNITS:
            raise UserError(
                f"profile: this supernet has more than {MOST_UNITS} different units, too many to measure: use a "
                "described device (slimray.edge.hardware.HARDWARE) instead of a table"
            )
    return chosen


def _by_macs(prices: Prices, sides: tuple[int, ...] | None) -> Meter:
    """Return a first estimate of latencies, for spreading the subnets that are measured as a whole."""

    def of(unit: Any) -> Mapping[str, float]:
        return {"latency_ms": 1e-6 * prices.count(unit, "macs")}

    return Meter("MACs", "model", "", ("latency_ms",), of, resolutions=sides)


def _with_readings(table: LatencyTable, chains: Sequence[Chain], readings: Readings, seconds: float) -> LatencyTable:
    """Return `table` with one more round; the chains of the subnets measured as a whole come first."""
    count = len(table.subnets)
    subnets = tuple(
        subnet.model_copy(update={"readings_ms": (*subnet.readings_ms, *rows[:, 0].tolist())})
        for subnet, rows in zip(table.subnets, readings.chains[:count], strict=True)
    )
    seen: dict[str, list[float]] = {}
    for chain, rows in zip(chains[count:], readings.chains[count:], strict=True):
        for key, ms in zip(chain.keys, rows.mean(0), strict=True):
            seen.setdefault(key, []).append(float(ms))
    units = dict(table.units)
    for key, ms in seen.items():
        units[key] = _unit_time([*(units[key].readings_ms if key in units else ()), statistics.fmean(ms)])
    return table.model_copy(
        update={
            "units": units,
            "subnets": subnets,
            "reference_ms": (*table.reference_ms, float(np.median(readings.reference_ms))),
            "waited_percent": (table.waited_percent * table.done + 100 * readings.waited) / (table.done + 1),
            "done": table.done + 1,
            "seconds": seconds,
        }
    )


def typical(readings: Any) -> float:
    """Return the lower quartile of readings, because disturbances only lengthen them and the fastest one is luck."""
    return float(np.quantile(readings, 0.25))


def _unit_time(readings: Sequence[float]) -> UnitTime:
    ms = [float(f"{one:.6g}") for one in readings]
    std = statistics.stdev(ms) if len(ms) > 1 else 0.0
    mean = statistics.fmean(ms)
    return UnitTime(ms=typical(ms), mean_ms=mean, std_ms=std, count=len(ms), readings_ms=tuple(ms))


def _calibrate(net: Any, table: LatencyTable) -> Calibration:
    prices = Prices(net, table.num_points, meter(table, "the table"))
    archs = [Arch.from_dict(subnet.arch) for subnet in table.subnets]
    rows = [np.array(subnet.readings_ms) for subnet in table.subnets]
    sums, ms = np.array([prices.metered(arch)["latency_ms"] for arch in archs]), np.array(list(map(typical, rows)))
    fixed, slope = fit_line(sums, ms)
    others = [fit_line(np.delete(sums, i), np.delete(ms, i)) for i in range(len(ms))]
    predicted = np.array([f + s * one for (f, s), one in zip(others, sums, strict=True)])
    errors = 100 * np.abs(predicted / ms - 1)
    return Calibration(
        fixed_ms=fixed,
        slope=slope,
        median_error_percent=float(np.median(errors)),
        largest_error_percent=float(errors.max()),
        noise_percent=noise_percent(rows),
        rows=tuple(
            CalibrationRow(arch=arch.to_dict(), measured_ms=float(m), predicted_ms=float(p))
            for arch, m, p in zip(archs, ms, predicted, strict=True)
        ),
    )


def fit_line(sums: np.ndarray, ms: np.ndarray) -> tuple[float, float]:
    """Return offset and slope of `ms` over `sums` by least squares of the relative error, with a weak prior of 0 and 1.

    The prior matters only if the subnets are too alike to separate the two. A slope that is not positive (pure noise)
    is replaced by the ratio of the medians.
    """
    lean = math.sqrt(DETERMINED * len(ms))
    rows = np.stack([1 / ms, sums / ms], 1)
    rows = np.concatenate([rows, [[lean / np.median(ms), 0.0], [0.0, lean]]])
    fixed, slope = np.linalg.lstsq(rows, np.concatenate([np.ones(len(ms)), [0.0, lean]]), rcond=None)[0]
    if slope <= 0:
        return 0.0, float(np.median(ms) / np.median(sums))
    return float(fixed), float(slope)
