"""Costs of the archs of a supernet, many at a time: sums over their units, looked up by gene.

The cost of an arch is the sum over its units (`net.units`). `Prices.arch_costs` adds them up for one arch, `matrix` for
rows of genes: it determines which genes the unit at each place depends on and tabulates the place over those, so that a
search prices 50,000 archs in a second. Surprising: these dependencies are found by changing genes, not declared; they
are checked on random archs, and if they do not hold, archs are priced one by one.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from slimray.arch import Arch
from slimray.edge import COUNTED, COUNTED_INT8, peak_memory
from slimray.edge.cost import build_on_meta, count_macs, count_params
from slimray.encoding import Codes, Costs, GeneTable, Part, cost_tables, costs_by_arch
from slimray.spec import UserError

MOST_ENTRIES = 100_000  # in the table of one place; beyond that, archs are priced one by one


@dataclass(frozen=True, eq=False)
class Meter:
    """Source of the costs of units on a device: `of(unit)`, None for an unknown unit.

    `how` is "table" (measured) or "model"; `fixed` is added once per arch. `resolutions` are those whose units it
    knows; in between, costs are interpolated by the number of pixels. None: it knows all.
    """

    name: str
    how: str
    source: str
    names: tuple[str, ...]
    of: Callable[[Any], Mapping[str, float] | None]
    fixed: Mapping[str, float] = field(default_factory=dict)
    resolutions: tuple[int, ...] | None = None

    def unknown(self, unit: Any) -> UserError:
        """Return the error about an unknown unit."""
        return UserError(f"{self.name}: has no time of {unit.key}, it is of another model: profile this supernet")


@dataclass(frozen=True, eq=False)
class Prices:
    """Prices the archs of a supernet: counts costs itself, and takes those of a device from `meter`.

    `num_points` is for point networks. Counted units are cached in this object.
    """

    net: Any
    num_points: int | None = None
    meter: Meter | None = None

    @cached_property
    def _counted(self) -> dict[tuple[str, str], int]:
        return {}

    @cached_property
    def _traced(self) -> dict[str, list[peak_memory.Operator]]:
        return {}

    @cached_property
    def table(self) -> GeneTable:
        """The table that encodes archs as rows."""
        return GeneTable(self.net.space)

    def on(self, meter: Meter | None) -> "Prices":
        """Return the prices of the same supernet on another device, sharing the caches of its layout and units."""
        other = Prices(self.net, self.num_points, meter)
        other.__dict__.update(_counted=self._counted, _traced=self._traced, _places=self._places, table=self.table)
        return other

    def units(self, arch: Arch) -> list[Any]:
        """Return the units of `arch`."""
        return self.net.units(arch) if self.num_points is None else self.net.units(arch, self.num_points)

    def count(self, unit: Any, name: str) -> int:
        """Return the `params` or the `macs` (per sample) of a unit."""
        if (name, unit.key) not in self._counted:
            module = build_on_meta(unit.counted or unit.make).eval()
            counted = count_params(module) if name == "params" else count_macs(module, (1, *unit.input))
            self._counted[name, unit.key] = counted
        return self._counted[name, unit.key]

    # ---------------------------------------------------------------------------------------------- one by one

    def arch_costs(self, arch: Arch) -> dict[str, float]:
        """Return all costs of one arch: `params`, `macs` (per sample), `memory_mb`, and those of the meter.

        MACs are sums over the units; memory is float32 weights plus the largest sum of the inputs of two successive
        units, in MB of 10^6 bytes. Raises UserError for an arch with units that the meter does not know.
        """
        units = self.units(arch)
        params, macs = (sum(self.count(unit, name) for unit in units) for name in ("params", "macs"))
        peak = max(a + b for a, b in itertools.pairwise(_sizes(units)))
        out = {"params": float(params), "macs": float(macs), "memory_mb": 4e-6 * (params + peak)}
        return out | (self.metered(arch) if self.meter else {})

    def in_int8(self, arch: Arch) -> dict[str, float]:
        """Return the needs of an arch in int8 on a microcontroller, in 1,000 bytes: `peak_kb`, `int8_kb`
        (peak_memory.py).

        Raises UserError for a network that TinyEngine cannot run.
        """
        units = self.units(arch)
        for unit in units:
            if unit.key not in self._traced:
                module = build_on_meta(unit.make).eval()
                self._traced[unit.key] = peak_memory.operators(module, unit.input)
        operators = peak_memory.joined([self._traced[unit.key] for unit in units])
        peak = peak_memory.memory(operators, int(np.prod(units[0].input))).peak
        return {"peak_kb": peak / peak_memory.KB, "int8_kb": peak_memory.size(operators) / peak_memory.KB}

    def metered(self, arch: Arch) -> dict[str, float]:
        """Return the meter's costs of an arch, interpolated for resolutions that it does not know."""
        assert self.meter is not None
        name = self.net.space.input_name("side")
        if self.meter.resolutions is None or name is None or arch[name] in self.meter.resolutions:
            return self._metered(arch)
        side = int(arch[name])
        low, high = neighbours(side, self.meter)
        share = (side**2 - low**2) / (high**2 - low**2)
        below, above = (self._metered(arch.replace(**{name: one})) for one in (low, high))
        return {name: (1 - share) * below[name] + share * above[name] for name in below}

    def _metered(self, arch: Arch) -> dict[str, float]:
        assert self.meter is not None
        out = {name: self.meter.fixed.get(name, 0.0) for name in self.meter.names}
        for unit in self.units(arch):
            costs = self.meter.of(unit)
            if costs is None:
                raise self.meter.unknown(unit)
            for name in out:
                out[name] += costs[name]
        return out

    # -------------------------------------------------------------------------------------------------- as rows

    def matrix(self, names: Sequence[str]) -> Costs:
        """Return a function of rows of codes to the costs `names`, `[n]` each, equal to `arch_costs` up to rounding.

        Building it takes a second or two for a published space; `peak_kb` and `int8_kb` are counted row by row. Raises
        UserError for units that the meter does not know.
        """
        int8, rest = ([name for name in names if (name in COUNTED_INT8) == asked] for asked in (True, False))
        if int8:
            others, by_arch = self.matrix(rest) if rest else None, costs_by_arch(self.table, self.in_int8)

            def both(codes: Codes) -> dict[str, Any]:
                found = by_arch(codes)
                return {**(others(codes) if others else {}), **{name: found[name] for name in int8}}

            return both
        wanted = [name for name in names if name in COUNTED or (self.meter and name in self.meter.names)]
        places = self._places
        if places is None:
            return costs_by_arch(self.table, lambda arch: {name: self.arch_costs(arch)[name] for name in wanted})
        parts: dict[str, list[Part]] = {}
        for name in wanted:
            if name == "memory_mb":
                parts["weights"] = [_part(place, lambda u: self.count(u.unit, "params")) for place in places]
                parts["peak"] = [_part(place, lambda u: u.moved) for place in places]
            elif name in COUNTED:
                parts[name] = [_part(place, lambda u, name=name: self.count(u.unit, name)) for place in places]
            else:
                parts[name] = [self._metered_part(place, name) for place in places]
        sums, fixed = cost_tables(self.table, parts, peaks=["peak"]), self.meter.fixed if self.meter else {}

        def costs(codes: Codes) -> dict[str, Any]:
            found = dict(sums(codes))
            if "peak" in found:
                found["memory_mb"] = 4e-6 * (found["weights"] + found["peak"])
            return {name: found[name] + fixed.get(name, 0.0) for name in wanted}

        return costs

    def _metered_part(self, place: "_Place", name: str) -> Part:
        """Return the meter's cost `name` of a place; unknown resolutions are interpolated."""
        meter = self.meter
        assert meter is not None

        def value(entry: _Entry) -> float:
            costs = meter.of(entry.unit)
            return float("nan") if costs is None else costs[name]

        part = _part(place, value)
        column = self.table.columns.get((self.net.space.input_name("side"), 0))
        if meter.resolutions is not None and column in part.columns:
            axis = part.columns.index(column)
            values = np.moveaxis(part.values, axis, 0)  # a view
            sides = [int(side) for side in self.table.values[column]]
            for code, side in enumerate(sides):
                if side not in meter.resolutions:
                    low, high = neighbours(side, meter)
                    share = (side**2 - low**2) / (high**2 - low**2)
                    values[code] = (1 - share) * values[sides.index(low)] + share * values[sides.index(high)]
        for codes, entry in place.entries.items():
            if entry is not None and np.isnan(part.values[codes]):
                raise meter.unknown(entry.unit)
        return part

    @cached_property
    def _places(self) -> "list[_Place] | None":
        """The places of the network, tabulated over the genes they depend on; None if that is not possible."""
        if not hasattr(self.net, "layout") or not hasattr(self.net.layout, "plan"):
            return None
        for tries in (8, 32):
            places = self._tabulated(tries)
            if places is not None and self._holds(places, self.table.sample(64, np.random.default_rng(1))):
                return list(places.values())
        return None

    def _tabulated(self, tries: int) -> "dict[str, _Place] | None":
        """Return the places over the genes that changed them in one of `tries` archs, half of them at full depth."""
        bases = self.table.sample(tries, np.random.default_rng(0))
        depths = {depth.name for depth in self.net.space.depths}
        deep = [column for (name, _), column in self.table.columns.items() if name in depths]
        bases[::2, deep] = (self.table.sizes - 1)[deep]
        depends: dict[str, set[int]] = {}
        for base in np.concatenate([(self.table.sizes - 1)[None], bases]):
            here = self._entries(base)
            for row in self.table.neighbours(base):
                changed = int(np.flatnonzero(row != base)[0])
                there = self._entries(row)
                for name in here.keys() | there.keys():
                    depends.setdefault(name, set())
                    if here.get(name) != there.get(name):
                        depends[name].add(changed)
        columns = {name: tuple(sorted(found)) for name, found in depends.items()}
        shapes = {name: tuple(int(self.table.sizes[c]) for c in cs) for name, cs in columns.items()}
        if max(int(np.prod(shape)) for shape in shapes.values()) > MOST_ENTRIES:
            return None
        places = {name: _Place(columns[name], shapes[name], {}) for name in columns}
        self._fill(places)
        return places

    def _fill(self, places: "dict[str, _Place]") -> None:
        """Fill all entries of all places from as few archs as possible: first archs with equal genes, then the rest."""
        largest = self.table.sizes - 1

        def look(row: Codes) -> None:
            here = self._entries(row)
            for name, place in places.items():
                place.entries.setdefault(tuple(row[list(place.columns)].tolist()), here.get(name))

        dimensions = [name for name, _ in self.net.space.choices]
        group = np.array([dimensions.index(name) for name, _ in self.table.genes])
        counts = [int(self.table.sizes[group == i].max()) for i in range(len(dimensions))]
        for levels in itertools.product(*map(range, counts)):
            look(np.minimum(np.array(levels)[group], largest))
        for place in places.values():
            for codes in np.ndindex(*place.shape):
                if codes not in place.entries:
                    row = largest.copy()
                    row[list(place.columns)] = codes
                    look(row)

    def _holds(self, places: "dict[str, _Place]", rows: Codes) -> bool:
        """Return True if the tabulated places agree with the network for `rows`."""
        for row in rows:
            here = self._entries(row)
            for name, place in places.items():
                if place.entries[tuple(row[list(place.columns)].tolist())] != here.get(name):
                    return False
        return True

    def _entries(self, row: Codes) -> "dict[str, _Entry]":
        """Return the entry at each place of the network of one row."""
        (arch,) = self.table.archs(row[None])
        units = self.units(arch)
        sizes = _sizes(units)
        plan = self.net.layout.plan(arch)
        return {
            placed.source: _Entry(unit, sizes[i] + sizes[i + 1])
            for i, (placed, unit) in enumerate(zip(plan, units, strict=True))
        }


@dataclass(frozen=True)
class _Entry:
    """A unit at a place, and the number of its input and output values together."""

    unit: Any
    moved: float


@dataclass(frozen=True, eq=False)
class _Place:
    """Units at a place by the codes of the genes `columns`; None for codes with which nothing runs there."""

    columns: tuple[int, ...]
    shape: tuple[int, ...]
    entries: dict[tuple[int, ...], _Entry | None]


def _part(place: _Place, value: Callable[[_Entry], float]) -> Part:
    values = np.zeros(place.shape)
    for codes, entry in place.entries.items():
        values[codes] = 0.0 if entry is None else value(entry)
    return Part(place.columns, values)


def _sizes(units: Iterable[Any]) -> list[float]:
    """Return the number of input values of each unit, followed by 0 for the output of the last one."""
    return [float(np.prod(unit.input)) for unit in units] + [0.0]


def neighbours(side: int, meter: Meter) -> tuple[int, int]:
    """Return the next lower and higher resolutions of `meter`; UserError outside their range."""
    known = sorted(meter.resolutions or ())
    below, above = [one for one in known if one < side], [one for one in known if one > side]
    if not below or not above:
        raise UserError(
            f"{meter.name}: was measured at resolutions {', '.join(map(str, known))}, but {side} is outside these: "
            "profile with it in --resolutions"
        )
    return below[-1], above[0]


def draw_archs(priced: Prices, count: int, seed: int, exclude: Iterable[Arch] = ()) -> list[Arch]:
    """Return `count` different archs, spread evenly over the logarithm of their expected latency, ascending.

    Only resolutions that the meter knows are used. Every candidate is biased by a random amount towards the smallest or
    the largest arch, because uniformly drawn archs are all alike. Returns fewer if the space has fewer.
    """
    table, rng = priced.table, random.Random(f"{seed} archs")
    known, side = priced.meter.resolutions if priced.meter else None, priced.net.space.input_name("side")
    taken, found = set(exclude), {}
    draw = np.random.default_rng(rng.randrange(2**31))
    for row in table.sample(40 * count, draw):
        lean = 2 * draw.random() - 1
        end = table.smallest if lean < 0 else table.sizes - 1
        (arch,) = table.archs(np.where(draw.random(len(row)) < abs(lean), end, row)[None])
        if known and side is not None:
            arch = arch.replace(**{side: rng.choice(known)})
        if arch not in taken:
            found[arch] = priced.metered(arch)["latency_ms"]
    left = sorted(found, key=lambda arch: found[arch])
    if len(left) <= count:
        return left
    chosen = []
    for target in np.geomspace(found[left[0]], found[left[-1]], count):
        nearest = min(left, key=lambda arch: abs(found[arch] - target))
        chosen.append(nearest)
        left.remove(nearest)
    return sorted(chosen, key=lambda arch: found[arch])
