"""An architecture is a value: `Arch` says which subnet of a supernet is meant, `Space` which ones there are.

An arch is a few named dimensions: `depth` (a number per stage), lists with a gene per block (`kernel`, `expand`) or per
stage (`width`), and single numbers (`resolution`, `frames`). All lists keep their full length; of a stage's blocks the
first ones run, and equality and hash ignore the genes of blocks that do not. Order and meaning are those of
Once-for-All (arXiv 1908.09791). Surprising: a random generator needs no more than `random()`, which gives a float in
[0, 1), so both `random.Random` and numpy's Generator do. Nothing but the standard library.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from slimray.spec import UserError, did_you_mean

Gene = int | float


class Rng(Protocol):
    """What draws need of a generator of random numbers."""

    def random(self) -> float:
        """A float in [0, 1)."""
        ...


@dataclass(frozen=True)
class Stage:
    """The blocks that a gene of `depth` decides about: of `blocks`, the first `always` + depth run (at most all)."""

    blocks: int
    always: int = 0

    def active(self, depth: Gene) -> int:
        """How many blocks run."""
        return min(self.blocks, self.always + int(depth))


@dataclass(frozen=True, eq=False)
class Arch:
    """A subnet: dimension -> its genes. `stages` says which blocks the genes of `depth` skip.

    `arch["kernel"]` is a tuple, `arch["resolution"]` a number.
    """

    dimensions: tuple[tuple[str, tuple[Gene, ...] | Gene], ...]
    stages: tuple[Stage, ...] = ()

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> "Arch":
        """Read what `to_dict` wrote, or `{"kernel": [...], "expand": [...], "depth": [...], "resolution": 224}`.

        Without an entry `stages` all stages have equally many blocks, which is right for MobileNets. UserError, with
        the dimension, for genes that are no numbers.
        """
        given = dict(plain)
        stages = given.pop("stages", None)
        genes = {name: _genes(name, value) for name, value in given.items()}
        try:
            layout = _equal_stages(genes) if stages is None else tuple(Stage(int(b), int(a)) for b, a in stages)
        except (TypeError, ValueError):
            raise UserError(f"arch: stages: must be pairs [blocks, always] (got {stages!r})") from None
        return Arch(tuple(genes.items()), layout)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, full lists; with `stages` [[blocks, always], ...] where they cannot be guessed."""
        out: dict[str, Any] = {n: list(v) if isinstance(v, tuple) else v for n, v in self.dimensions}
        if self.stages and self.stages != _equal_stages(dict(self.dimensions)):
            out["stages"] = [[stage.blocks, stage.always] for stage in self.stages]
        return out

    def __getitem__(self, name: str) -> Any:
        return self._by_name[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The genes of a dimension, `default` if there is none of that name."""
        return self._by_name.get(name, default)

    def replace(self, **genes: Any) -> "Arch":
        """The same arch with other genes in some dimensions."""
        changed = {name: _genes(name, value) for name, value in genes.items()}
        return Arch(tuple((self._by_name | changed).items()), self.stages)

    @cached_property
    def active(self) -> tuple[bool, ...]:
        """For each block of all stages in a row, whether it runs."""
        depth = self._by_name.get("depth", ())
        out = []
        for stage, gene in zip(self.stages, depth, strict=False):
            out += [i < stage.active(gene) for i in range(stage.blocks)]
        return tuple(out)

    @cached_property
    def _by_name(self) -> dict[str, Any]:
        return dict(self.dimensions)

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        """The arch without what has no effect: genes of blocks that do not run, depth beyond the last block."""
        out = []
        for name, genes in sorted(self._by_name.items()):
            if name == "depth" and self.stages and len(genes) == len(self.stages):
                pairs = zip(self.stages, genes, strict=True)
                genes = tuple(stage.active(gene) if stage.blocks else gene for stage, gene in pairs)
            elif isinstance(genes, tuple) and len(genes) == len(self.active) and self.active:
                genes = tuple(gene for gene, runs in zip(genes, self.active, strict=True) if runs)
            out.append((name, genes))
        return tuple(out)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Arch) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"Arch({self.to_dict()})"


def _genes(name: str, value: Any) -> tuple[Gene, ...] | Gene:
    many = isinstance(value, list | tuple)
    for gene in value if many else [value]:
        if isinstance(gene, bool) or not isinstance(gene, int | float) or not math.isfinite(gene):
            raise UserError(f"arch: {name}: {gene!r} is no number")
    return tuple(value) if many else value


def _equal_stages(genes: Mapping[str, Any]) -> tuple[Stage, ...]:
    """As many blocks in every stage: those of the longest list over the genes of `depth`; () if that does not fit."""
    depth = genes.get("depth")
    if not isinstance(depth, tuple) or not depth:
        return ()
    longest = max((len(v) for n, v in genes.items() if isinstance(v, tuple) and n != "depth"), default=0)
    return (Stage(longest // len(depth)),) * len(depth) if longest and longest % len(depth) == 0 else ()


@dataclass(frozen=True)
class Space:
    """All archs of a supernet: dimension -> for each of its genes the values it may take, in ascending order.

    `single` names the dimensions that are one number and no list.
    """

    choices: tuple[tuple[str, tuple[tuple[Gene, ...], ...]], ...]
    stages: tuple[Stage, ...] = ()
    single: frozenset[str] = frozenset({"resolution", "frames"})

    @staticmethod
    def of(choices: Mapping[str, Sequence[Sequence[Gene]]], stages: Sequence[Stage] = ()) -> "Space":
        """A space out of plain values: `{"kernel": [(3, 5, 7)] * 20, "resolution": [(128, 160)]}`."""
        ordered = {name: tuple(tuple(sorted(set(values))) for values in genes) for name, genes in choices.items()}
        return Space(tuple(ordered.items()), tuple(stages))

    @cached_property
    def dimensions(self) -> dict[str, tuple[tuple[Gene, ...], ...]]:
        """Dimension -> the choices of each of its genes."""
        return dict(self.choices)

    @cached_property
    def per_block(self) -> tuple[str, ...]:
        """The dimensions that have a gene for every block of the stages."""
        num_blocks = sum(stage.blocks for stage in self.stages)
        return tuple(n for n, v in self.choices if n != "depth" and num_blocks and len(v) == num_blocks)

    @cached_property
    def depth_told(self) -> tuple[bool, ...]:
        """For each stage, whether its blocks' genes tell its depth: every block that may be skipped has a choice."""
        out, start = [], 0
        for stage, depths in zip(self.stages, self.dimensions.get("depth", ()), strict=False):
            skipped = range(start + min(map(stage.active, depths)), start + max(map(stage.active, depths)))
            chosen = [any(len(self.dimensions[name][i]) > 1 for name in self.per_block) for i in skipped]
            out.append(bool(stage.blocks) and all(chosen))
            start += stage.blocks
        return tuple(out)

    def arch(self, plain: "Mapping[str, Any] | Arch") -> Arch:
        """An arch of this space from plain values: a number for all genes of a dimension or a list; missing: largest.

        UserError, with the dimension and what it may be, for one that is not of this space.
        """
        given = plain.to_dict() if isinstance(plain, Arch) else dict(plain)
        given.pop("stages", None)
        for name in given:
            if name not in self.dimensions:
                raise UserError(f"arch: no dimension {name!r} here{did_you_mean(name, self.dimensions)}")
        genes = {}
        for name, choices in self.choices:
            value = given.get(name, [max(values) for values in choices])
            values = list(value) if isinstance(value, list | tuple) else [value] * len(choices)
            if len(values) != len(choices):
                raise UserError(f"arch: {name}: must be {len(choices)} numbers (got {len(values)})")
            for gene, allowed in zip(values, choices, strict=True):
                if gene not in allowed:
                    raise UserError(f"arch: {name}: {gene!r} is none of {', '.join(map(str, allowed))}")
            genes[name] = values
        return self._arch(genes)

    def largest(self) -> Arch:
        """The arch of the highest values: the whole supernet."""
        return self._arch({name: [max(values) for values in genes] for name, genes in self.choices})

    def smallest(self) -> Arch:
        """The arch of the lowest values."""
        return self._arch({name: [min(values) for values in genes] for name, genes in self.choices})

    def sample(self, rng: Rng) -> Arch:
        """Every gene drawn evenly and on its own."""
        return self._arch({name: [_pick(values, rng) for values in genes] for name, genes in self.choices})

    def mutate(self, arch: Arch, rng: Rng, prob: float = 0.1, single_prob: float = 0.5) -> Arch:
        """Draw anew: all genes of a block together, each other gene, with `prob`; each single number with its own."""
        genes = self._lists(arch)
        num_blocks = sum(stage.blocks for stage in self.stages)
        hit = [rng.random() < prob for _ in range(num_blocks)]
        for name, choices in self.choices:
            for i, values in enumerate(choices):
                chance = single_prob if name in self.single else prob
                if hit[i] if name in self.per_block else rng.random() < chance:
                    genes[name][i] = _pick(values, rng)
        return self._arch(genes)

    def cross(self, mother: Arch, father: Arch, rng: Rng) -> Arch:
        """Each gene from one or the other with even chance."""
        first, second = self._lists(mother), self._lists(father)
        mixed = {n: [b if rng.random() < 0.5 else a for a, b in zip(first[n], second[n], strict=True)] for n in first}
        return self._arch(mixed)

    def encode(self, arch: Arch) -> list[float]:
        """One-hot of every gene that has a choice, zeros for a block that does not run: what a predictor learns from.

        Depth is told by those zeros, and has places of its own only where they do not tell it (`depth_told`).
        """
        out: list[float] = []
        genes = self._lists(arch)
        for name, choices in self.choices:
            for i, values in enumerate(choices):
                runs = arch.active[i] if name in self.per_block else True
                gene, of_stage = genes[name][i], name == "depth" and i < len(self.depth_told)
                if of_stage and self.stages[i].blocks:  # depths beyond the last block are one and the same
                    gene = next(v for v in values if self.stages[i].active(v) == self.stages[i].active(gene))
                if len(values) > 1 and not (of_stage and self.depth_told[i]):
                    out += [float(runs and value == gene) for value in values]
        return out

    def restrict(self, **allowed: Sequence[Gene]) -> "Space":
        """The part of this space whose genes take only values of `allowed`: what a stage of shrinking has freed.

        A gene none of whose values is allowed keeps its largest. UserError for a dimension that is not here.
        """
        for name in allowed:
            if name not in self.dimensions:
                raise UserError(f"no dimension {name!r} here{did_you_mean(name, self.dimensions)}")
        cut = {}
        for name, genes in self.choices:
            keep = set(allowed.get(name, ()))
            kept = tuple(tuple(v for v in values if v in keep) or (max(values),) for values in genes)
            cut[name] = kept if name in allowed else genes
        return Space(tuple(cut.items()), self.stages, self.single)

    def num_archs(self) -> int:
        """How many different archs there are."""
        total = 1
        for name, genes in self.choices:
            if name not in self.per_block and name != "depth":
                total *= math.prod(map(len, genes))
        start = 0
        for stage, depths in zip(self.stages, self.dimensions.get("depth", ()), strict=False):
            if not stage.blocks:
                total *= len(depths)
                continue
            counts = {stage.active(depth) for depth in depths}
            per_block = [
                math.prod(len(self.dimensions[name][start + i]) for name in self.per_block) for i in range(stage.blocks)
            ]
            total *= sum(math.prod(per_block[:count]) for count in counts)
            start += stage.blocks
        if not self.stages:
            total *= math.prod(map(len, self.dimensions.get("depth", ())))
        return total

    def archs(self) -> Iterator[Arch]:
        """All different archs, one by one; for small spaces only (see `num_archs`)."""
        seen: set[Arch] = set()
        names = [(name, i) for name, genes in self.choices for i in range(len(genes))]
        for values in itertools.product(*(values for _, genes in self.choices for values in genes)):
            genes: dict[str, list[Gene]] = {name: [] for name, _ in self.choices}
            for (name, _), value in zip(names, values, strict=True):
                genes[name].append(value)
            arch = self._arch(genes)
            if arch not in seen:
                seen.add(arch)
                yield arch

    def _lists(self, arch: Arch) -> dict[str, list[Gene]]:
        return {
            name: list(arch[name]) if isinstance(arch[name], tuple) else [arch[name]] * len(genes)
            for name, genes in self.choices
        }

    def _arch(self, genes: Mapping[str, Sequence[Gene]]) -> Arch:
        flat = tuple((n, v[0] if n in self.single else tuple(v)) for n, v in genes.items())
        return Arch(flat, self.stages)


def _pick(values: Sequence[Gene], rng: Rng) -> Gene:
    return values[int(rng.random() * len(values))]
