"""Archs as integer matrices, and costs looked up in tables, which let a search try 50,000 archs per second.

`GeneTable` turns the archs of a `Space` into rows with a column per gene, and draws, mutates, crosses and encodes many
at a time; its results agree with those of `Space`. `cost_tables` sums the costs of the parts of a network, looked up by
the genes each part depends on, like the latency tables of ProxylessNAS (arXiv 1812.00332) and Once-for-All (arXiv
1908.09791). Surprising: rows keep the genes of skipped blocks, as archs do, because the block may run again in a child.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from slimray.arch import Arch, Gene, Space

Codes = NDArray[np.intp]  # [n, genes]: for every gene, the index of its value among its choices
Floats = NDArray[np.float64]
Costs = Callable[[Codes], Mapping[str, Floats]]  # cost name -> [n]


@dataclass(frozen=True)
class GeneTable:
    """The archs of `space` as integer rows `[n, genes]`, with the genes in the order of `space.choices`.

    `sample`, `mutate` and `cross` do what those of `Space` do, for many archs at a time. Rows keep the genes of skipped
    blocks, as archs do; `canonical` drops them.
    """

    space: Space

    @cached_property
    def genes(self) -> tuple[tuple[str, int], ...]:
        """The dimension of every column, and its index within the dimension."""
        return tuple((name, i) for name, choices in self.space.choices for i in range(len(choices)))

    @cached_property
    def values(self) -> tuple[tuple[Gene, ...], ...]:
        """The choices of every column, ascending."""
        return tuple(values for _, choices in self.space.choices for values in choices)

    @cached_property
    def sizes(self) -> Codes:
        """The number of choices of every column."""
        return np.array([len(values) for values in self.values], np.intp)

    @cached_property
    def smallest(self) -> Codes:
        """The row of the smallest arch, `[genes]`."""
        return np.zeros(len(self.genes), np.intp)

    @cached_property
    def num_archs(self) -> int:
        """The number of different archs."""
        return self.space.num_archs()

    @cached_property
    def columns(self) -> dict[tuple[str, int], int]:
        """(dimension, index within it) -> column."""
        return {gene: i for i, gene in enumerate(self.genes)}

    def codes(self, archs: Iterable[Arch]) -> Codes:
        """Return the rows of `archs`; raise KeyError for a gene that is not in the space."""
        places = [{value: i for i, value in enumerate(values)} for values in self.values]
        rows = []
        for arch in archs:
            flat: list[Gene] = []
            for name, _ in self.space.choices:
                genes = arch[name]
                flat.extend(genes if isinstance(genes, tuple) else (genes,))
            rows.append([place[gene] for place, gene in zip(places, flat, strict=True)])
        return np.array(rows, np.intp).reshape(len(rows), len(self.genes))

    def archs(self, codes: Codes) -> list[Arch]:
        """Return the archs that the rows represent."""
        cuts, start = [], 0
        for name, choices in self.space.choices:
            cuts.append((name, start, start + len(choices), self.space.dimensions[name].of == "net"))
            start += len(choices)
        out = []
        for row in codes.tolist():
            flat = [values[code] for values, code in zip(self.values, row, strict=True)]
            genes = tuple((name, flat[lo] if single else tuple(flat[lo:hi])) for name, lo, hi, single in cuts)
            out.append(Arch(genes, self.space.depths))
        return out

    def sample(self, count: int, rng: np.random.Generator) -> Codes:
        """Draw `count` rows: every gene uniformly and independently."""
        return (rng.random((count, len(self.genes))) * self.sizes).astype(np.intp)

    def mutate(self, codes: Codes, rng: np.random.Generator, prob: float, single_prob: float) -> Codes:
        """Redraw genes: all genes of a block together, or any other gene, with `prob`; single numbers `single_prob`."""
        together, single = self._together
        hit = rng.random((len(codes), len(single))) < np.where(single, single_prob, prob)
        return np.where(hit[:, together], self.sample(len(codes), rng), codes)

    def cross(self, mothers: Codes, fathers: Codes, rng: np.random.Generator) -> Codes:
        """Return rows that take each gene from either parent with equal probability."""
        return np.where(rng.random(mothers.shape) < 0.5, fathers, mothers)

    def neighbours(self, row: Codes) -> Codes:
        """Return all rows that differ from `row` in one gene."""
        column = np.repeat(np.arange(len(self.sizes)), self.sizes)
        code = np.concatenate([np.arange(size) for size in self.sizes])
        differs = code != row[column]
        rows = np.repeat(row[None], int(differs.sum()), axis=0)
        rows[np.arange(len(rows)), column[differs]] = code[differs]
        return rows

    def runs(self, codes: Codes) -> NDArray[np.bool_]:
        """Return a mask `[n, genes]` that is False for the genes of skipped blocks."""
        layout = self._blocks
        out = np.ones(codes.shape, bool)
        if layout is not None:
            counts = layout.counts[layout.stages, codes[:, layout.depths]]  # [n, stages]
            out[:, layout.columns] = counts[:, layout.stage] > layout.place
        return out

    def canonical(self, codes: Codes) -> Codes:
        """Return rows that are equal exactly when the archs are: genes without effect are set to their first choice."""
        layout = self._blocks
        if layout is None:
            return codes
        out = np.where(self.runs(codes), codes, 0)
        out[:, layout.depths] = layout.same[layout.stages, codes[:, layout.depths]]
        return out

    def keys(self, codes: Codes) -> list[bytes]:
        """Return a key per row; keys are equal exactly when the archs are."""
        small = np.uint8 if self.sizes.max(initial=0) <= 256 else np.intp
        rows = np.ascontiguousarray(self.canonical(codes), small)
        return rows.view(f"V{rows.shape[1] * rows.itemsize}")[:, 0].tolist()  # bytes; far faster than row by row

    def features(self, codes: Codes) -> NDArray[np.float32]:
        """Return `space.encode` of every row, float32 `[n, features]`."""
        columns, starts, width = self._one_hot
        codes = self.canonical(codes)
        out = np.zeros((len(codes), width), np.float32)
        np.put_along_axis(out, codes[:, columns] + starts, self.runs(codes)[:, columns].astype(np.float32), axis=1)
        return out

    @cached_property
    def _together(self) -> tuple[Codes, NDArray[np.bool_]]:
        """The group of every column (a block's are mutated together), and for each group if it is a single number."""
        dimensions = self.space.dimensions
        groups: dict[tuple[str, int], tuple[str, str, int]] = {}
        for name, i in self.genes:
            depth = dimensions[name].skipped_by
            groups[name, i] = ("gene", name, i) if depth is None else ("block", depth, i)
        numbers = {group: i for i, group in enumerate(dict.fromkeys(groups.values()))}
        single = np.array([kind == "gene" and dimensions[name].of == "net" for kind, name, _ in numbers], bool)
        return np.array([numbers[groups[gene]] for gene in self.genes], np.intp), single

    @cached_property
    def _blocks(self) -> "_Blocks | None":
        """The positions of the genes of blocks; None if no block can be skipped."""
        space = self.space
        if not space.depths:
            return None
        pairs = [
            (depth.name, s, stage, space.dimensions[depth.name].choices[s])
            for depth in space.depths
            for s, stage in enumerate(depth.stages)
        ]
        counts, same = np.zeros((2, len(pairs), max(len(choices) for *_, choices in pairs)), np.intp)
        for number, (_, _, stage, choices) in enumerate(pairs):
            active = [stage.active(choice) for choice in choices]
            counts[number, : len(active)] = active
            same[number, : len(active)] = [active.index(n) if stage.blocks else i for i, n in enumerate(active)]
        columns, stage_of, place_of, first = [], [], [], 0
        for depth in space.depths:
            blocks = [(first + s, i) for s, stage in enumerate(depth.stages) for i in range(stage.blocks)]
            for name in depth.skips:
                columns += [self.columns[name, block] for block in range(len(blocks))]
                stage_of += [number for number, _ in blocks]
                place_of += [place for _, place in blocks]
            first += len(depth.stages)
        depths = [self.columns[name, s] for name, s, *_ in pairs]
        genes = [np.array(one, np.intp) for one in (columns, stage_of, place_of)]
        return _Blocks(np.arange(len(pairs)), np.array(depths, np.intp), counts, same, *genes)

    @cached_property
    def _one_hot(self) -> tuple[Codes, Codes, int]:
        """The columns a predictor sees, the first feature of each of them, and the total number of features."""
        columns, starts, width = [], [], 0
        told = {depth.name: self.space.depth_told(depth) for depth in self.space.depths}
        for column, (name, i) in enumerate(self.genes):
            if len(self.values[column]) > 1 and not (name in told and told[name][i]):
                columns.append(column)
                starts.append(width)
                width += len(self.values[column])
        return np.array(columns, np.intp), np.array(starts, np.intp), width


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Per stage: its number, the column of its depth, the blocks that run for each choice, and the first choice that
    runs as many; per gene of a block: its column, its stage, and the index of the block within the stage."""

    stages: Codes
    depths: Codes
    counts: Codes
    same: Codes
    columns: Codes
    stage: Codes
    place: Codes


@dataclass(frozen=True, eq=False)
class Part:
    """Cost of one part of the network by the genes it depends on: `values[code of columns[0], columns[1], ...]`."""

    columns: tuple[int, ...]
    values: Floats


def part(table: GeneTable, genes: Sequence[tuple[str, int]], value: Callable[..., float]) -> Part:
    """Tabulate `value(gene, gene, ...)` for all choices of `genes`, pairs of dimension and index (`("kernel", 3)`).

    If a gene belongs to a block that may be skipped, the table also depends on the depth of its stage: the part costs 0
    where the block is skipped.
    """
    space = table.space
    gates: dict[tuple[str, int], int] = {}  # depth and stage -> how many of its blocks must run for this part to
    for name, i in genes:
        for depth in space.depths:
            if name not in depth.skips:
                continue
            places = [(s, place) for s, stage in enumerate(depth.stages) for place in range(stage.blocks)]
            s, place = places[i]
            if any(depth.stages[s].active(gene) <= place for gene in space.dimensions[depth.name].choices[s]):
                gates[depth.name, s] = max(gates.get((depth.name, s), 0), place + 1)
    columns = tuple(table.columns[gene] for gene in [*genes, *gates])
    values = np.zeros([len(table.values[column]) for column in columns])
    for place in np.ndindex(*values.shape):
        chosen = [table.values[column][code] for column, code in zip(columns, place, strict=True)]
        given, depths = chosen[: len(genes)], chosen[len(genes) :]
        runs = zip(gates.items(), depths, strict=True)
        if all(space.dimensions[name].stages[s].active(gene) >= needed for ((name, s), needed), gene in runs):
            values[place] = value(*given)
    return Part(columns, values)


def cost_tables(table: GeneTable, parts: Mapping[str, Sequence[Part]], peaks: Sequence[str] = ()) -> Costs:
    """Return a function that sums costs over the parts of the network, or takes the largest for names in `peaks`.

    `peaks` are costs such as memory. Nothing is run: all costs are looked up.
    """
    lookups = {}
    for name, of_name in parts.items():
        strides, starts, flat = np.zeros((len(table.genes), len(of_name))), [], []
        for p, one in enumerate(of_name):
            step = one.values.size
            for column, size in zip(one.columns, one.values.shape, strict=True):
                step //= size
                strides[column, p] += step
            starts.append(sum(map(len, flat)))
            flat.append(one.values.ravel())
        lookups[name] = (strides, np.array(starts, float), np.concatenate(flat), name in peaks)

    def costs(codes: Codes) -> dict[str, Floats]:
        rows = codes.astype(float)  # the float product uses BLAS, and is exact far beyond the size of any table
        out = {}
        for name, (strides, starts, flat, peak) in lookups.items():
            found = flat[(rows @ strides + starts).astype(np.intp)]
            out[name] = found.max(1) if peak else found.sum(1)
        return out

    return costs


def costs_by_arch(table: GeneTable, costs: Callable[[Arch], Mapping[str, float]]) -> Costs:
    """Return costs from a function of one arch, which is called once per different arch; slower than tables."""
    known: dict[bytes, Mapping[str, float]] = {}

    def of_rows(codes: Codes) -> dict[str, Floats]:
        keys = table.keys(codes)
        missing = {key: row for row, key in enumerate(keys) if key not in known}
        for key, arch in zip(missing, table.archs(codes[list(missing.values())]), strict=True):
            known[key] = costs(arch)
        names = known[keys[0]] if keys else {}
        return {name: np.array([known[key][name] for key in keys], float) for name in names}

    return of_rows
