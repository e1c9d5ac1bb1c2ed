"""Architectures as values: an `Arch` identifies one subnet of a supernet, a `Space` defines all of them.

An arch maps dimensions to genes: lists with a gene per block (`kernel`, `expand`) or per stage (`width`, `depth`), and
single numbers (`resolution`, `frames`). A `Dimension` states what its genes belong to; nothing is guessed from the
length of a list. Lists keep their full length; the genes of a depth set how many blocks of each stage run, and equality
and hash ignore the genes of blocks that do not run. Order and meaning follow Once-for-All (arXiv 1908.09791).
Surprising: a random generator only needs `random()`, which returns a float in [0, 1), so both `random.Random` and
numpy's Generator can be used. Imports only the standard library.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

from slimray.spec import UserError, did_you_mean

Gene = int | float
Choices = tuple[tuple[Gene, ...], ...]  # for each gene of a dimension, the values it may take, ascending


class Rng(Protocol):
    """The one method of a random number generator that drawing genes requires."""

    def random(self) -> float:
        """Return a float in [0, 1)."""
        ...


@dataclass(frozen=True)
class Stage:
    """The blocks that one gene of a depth controls: of `blocks`, the first `always` + gene run (at most all)."""

    blocks: int
    always: int = 0

    def active(self, depth: Gene) -> int:
        """Return how many blocks run."""
        return min(self.blocks, self.always + int(depth))


@dataclass(frozen=True)
class Depth:
    """A dimension that skips blocks: its gene i sets how many blocks of `stages[i]` run.

    `skips` names the dimensions that have one gene for every block of these stages.
    """

    name: str
    stages: tuple[Stage, ...]
    skips: tuple[str, ...]

    @property
    def num_blocks(self) -> int:
        """The number of blocks of all stages."""
        return sum(stage.blocks for stage in self.stages)

    def active(self, genes: Sequence[Gene]) -> tuple[bool, ...]:
        """Return for each block, over all stages in order, whether it runs."""
        pairs = zip(self.stages, genes, strict=True)
        return tuple(i < stage.active(gene) for stage, gene in pairs for i in range(stage.blocks))


@dataclass(frozen=True)
class Dimension:
    """One dimension of a space: the values each of its genes may take, and what the genes belong to.

    `of` "net" is one number for the whole network, "stage" and "block" are lists. A dimension with `stages`, one
    `Stage` per gene, is a depth; one that is `skipped_by` a depth has a gene for every block of that depth, which has
    no effect where the block does not run. `input` names the property of the input that the number sets: the side in
    pixels, or the number of frames of a clip.
    """

    choices: Choices
    of: Literal["net", "stage", "block"]
    skipped_by: str | None = None
    stages: tuple[Stage, ...] = ()
    input: Literal["side", "frames"] | None = None

    @staticmethod
    def number(values: Sequence[Gene], input: Literal["side", "frames"] | None = None) -> "Dimension":
        """Return a dimension that is one number for the whole network."""
        return Dimension(_choices([values]), "net", input=input)

    @staticmethod
    def per_block(choices: Sequence[Sequence[Gene]], skipped_by: str | None = "depth") -> "Dimension":
        """Return a dimension with a gene per block; `skipped_by` names the depth whose blocks these are."""
        return Dimension(_choices(choices), "block", skipped_by)

    @staticmethod
    def per_stage(choices: Sequence[Sequence[Gene]]) -> "Dimension":
        """Return a dimension with a gene per stage that skips nothing."""
        return Dimension(_choices(choices), "stage")

    @staticmethod
    def depth(choices: Sequence[Sequence[Gene]], stages: Sequence[Stage]) -> "Dimension":
        """Return a dimension with a gene per stage that sets how many of the stage's blocks run.

        Raises ValueError if there are not as many genes as stages.
        """
        if len(choices) != len(stages):
            raise ValueError(f"{len(choices)} genes of depth, but {len(stages)} stages")
        return Dimension(_choices(choices), "stage", stages=tuple(stages))


@dataclass(frozen=True, eq=False)
class Arch:
    """A subnet: dimension -> its genes. `depths` lists the dimensions that skip blocks, and what each of them skips.

    `arch["kernel"]` is a tuple, `arch["resolution"]` a number.
    """

    dimensions: tuple[tuple[str, tuple[Gene, ...] | Gene], ...]
    depths: tuple[Depth, ...] = ()

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> "Arch":
        """Read what `to_dict` wrote, or `{"kernel": [...], "expand": [...], "depth": [...], "resolution": 224}`.

        Without an entry `skips`, `depth` skips the lists that have one gene per block of its stages; without an entry
        `stages`, all stages have the same number of blocks, which is right for MobileNets. A caller that knows the
        space should use `Space.arch`. Raises UserError, naming the dimension, for genes that are not numbers.
        """
        given = dict(plain)
        stages, skips = given.pop("stages", None), given.pop("skips", None)
        genes = {name: _genes(name, value) for name, value in given.items()}
        if skips is None:
            return Arch(tuple(genes.items()), _unsaid_depths(genes, stages))
        try:
            depths = tuple(
                Depth(str(name), _stages(one["stages"]), tuple(sorted(map(str, one["skips"]))))
                for name, one in skips.items()
            )
            for depth in depths:
                lengths = {name: len(genes[name]) for name in (depth.name, *depth.skips)}  # type: ignore[arg-type]
                if lengths.pop(depth.name) != len(depth.stages) or {*lengths.values()} - {depth.num_blocks}:
                    raise ValueError
        except (TypeError, ValueError, KeyError, AttributeError):
            raise UserError(f"arch: skips: does not fit the genes (got {skips!r})") from None
        return Arch(tuple(genes.items()), depths)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON with full lists, and `stages` or `skips` where `from_dict` cannot infer them."""
        out: dict[str, Any] = {n: list(v) if isinstance(v, tuple) else v for n, v in self.dimensions}
        if self.depths == _unsaid_depths(self._by_name, None):
            return out
        stages = [[stage.blocks, stage.always] for stage in self.depths[0].stages] if self.depths else []
        if self.depths == _unsaid_depths(self._by_name, stages):
            return out | {"stages": stages}
        skips = {
            d.name: {"stages": [[s.blocks, s.always] for s in d.stages], "skips": list(d.skips)} for d in self.depths
        }
        return out | {"skips": skips}

    def __getitem__(self, name: str) -> Any:
        return self._by_name[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return the genes of a dimension, or `default` if the arch has no dimension of that name."""
        return self._by_name.get(name, default)

    def replace(self, **genes: Any) -> "Arch":
        """Return the same arch with other genes in some dimensions."""
        changed = {name: _genes(name, value) for name, value in genes.items()}
        return Arch(tuple((self._by_name | changed).items()), self.depths)

    def runs(self, name: str) -> tuple[bool, ...]:
        """Return for each gene of a list whether its block runs."""
        for depth in self.depths:
            if name in depth.skips:
                return depth.active(self[depth.name])
        return (True,) * len(self[name])

    @cached_property
    def _by_name(self) -> dict[str, Any]:
        return dict(self.dimensions)

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        """The arch without genes that have no effect: those of blocks that do not run, depth beyond the last block."""
        by_name, depths = dict(self._by_name), {depth.name: depth for depth in self.depths}
        for depth in self.depths:
            active = depth.active(self[depth.name])
            for name in depth.skips:
                by_name[name] = tuple(gene for gene, runs in zip(self[name], active, strict=True) if runs)
        for name, depth in depths.items():
            pairs = zip(depth.stages, self[name], strict=True)
            by_name[name] = tuple(stage.active(gene) if stage.blocks else gene for stage, gene in pairs)
        return tuple(sorted(by_name.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Arch) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"Arch({self.to_dict()})"


def _choices(genes: Sequence[Sequence[Gene]]) -> Choices:
    return tuple(tuple(sorted(set(values))) for values in genes)


def _stages(pairs: Any) -> tuple[Stage, ...]:
    return tuple(Stage(int(blocks), int(always)) for blocks, always in pairs)


def _genes(name: str, value: Any) -> tuple[Gene, ...] | Gene:
    many = isinstance(value, list | tuple)
    for gene in value if many else [value]:
        if isinstance(gene, bool) or not isinstance(gene, int | float) or not math.isfinite(gene):
            raise UserError(f"arch: {name}: {gene!r} is not a number")
    return tuple(value) if many else value


def _unsaid_depths(genes: Mapping[str, Any], stages: Any) -> tuple[Depth, ...]:
    """Infer what `depth` skips where no `skips` are stored: the lists with one gene per block of its stages.

    `stages` are pairs [blocks, always]; None means that all stages have the same number of blocks: the length of the
    longest list divided by the number of genes of `depth`. Archs of networks where this is wrong store `skips`.
    """
    depth = genes.get("depth")
    lists = {name: len(value) for name, value in genes.items() if isinstance(value, tuple) and name != "depth"}
    if not isinstance(depth, tuple) or not depth:
        return ()
    try:
        if stages is None:
            longest = max(lists.values(), default=0)
            layout = (Stage(longest // len(depth)),) * len(depth) if longest and longest % len(depth) == 0 else ()
        else:
            layout = _stages(stages)
    except (TypeError, ValueError):
        raise UserError(f"arch: stages: must be pairs [blocks, always] (got {stages!r})") from None
    if len(layout) != len(depth):
        return ()
    num_blocks = sum(stage.blocks for stage in layout)
    return (Depth("depth", layout, tuple(sorted(name for name, count in lists.items() if count == num_blocks))),)


@dataclass(frozen=True)
class Space:
    """All archs of a supernet, or all policies of a compression: named dimensions in a fixed order."""

    named: tuple[tuple[str, Dimension], ...]

    @staticmethod
    def of(dimensions: Mapping[str, Dimension]) -> "Space":
        """Return the space of these dimensions.

        Raises ValueError for a dimension whose `skipped_by` names no depth among them, or that does not have exactly
        one gene for each block of that depth.
        """
        for name, one in dimensions.items():
            if one.skipped_by is None:
                continue
            stages = dimensions[one.skipped_by].stages if one.skipped_by in dimensions else ()
            if len(one.choices) != sum(stage.blocks for stage in stages):
                raise ValueError(f"{name}: {len(one.choices)} genes do not fit the blocks of {one.skipped_by}")
        return Space(tuple(dimensions.items()))

    @cached_property
    def dimensions(self) -> dict[str, Dimension]:
        """Dimensions by name."""
        return dict(self.named)

    @cached_property
    def choices(self) -> tuple[tuple[str, Choices], ...]:
        """Pairs of a dimension and the values each of its genes may take, in the order of the genes."""
        return tuple((name, one.choices) for name, one in self.named)

    @cached_property
    def depths(self) -> tuple[Depth, ...]:
        """The dimensions that skip blocks, each with the dimensions it skips."""
        return tuple(
            Depth(name, one.stages, tuple(sorted(other for other, it in self.named if it.skipped_by == name)))
            for name, one in self.named
            if one.stages
        )

    def input_name(self, what: Literal["side", "frames"]) -> str | None:
        """Return the dimension that sets the side of the input in pixels, or the frames of a clip; None without one."""
        return next((name for name, one in self.named if one.input == what), None)

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        """The dimensions that set a property of the input."""
        return tuple(name for name, one in self.named if one.input is not None)

    def input_of(self, arch: Arch, what: Literal["side", "frames"]) -> int | None:
        """Return the side of the input in pixels, or the frames of a clip, that `arch` sets; None if it sets none."""
        name = self.input_name(what)
        return None if name is None else int(arch[name])

    def depth_told(self, depth: Depth) -> tuple[bool, ...]:
        """Return for each stage whether its depth follows from its blocks' encoded genes.

        It does where every block that may be skipped has a gene with a choice.
        """
        out, start = [], 0
        for stage, depths in zip(depth.stages, self.dimensions[depth.name].choices, strict=True):
            skipped = range(start + min(map(stage.active, depths)), start + max(map(stage.active, depths)))
            chosen = [any(len(self.dimensions[name].choices[i]) > 1 for name in depth.skips) for i in skipped]
            out.append(bool(stage.blocks) and all(chosen))
            start += stage.blocks
        return tuple(out)

    def arch(self, plain: "Mapping[str, Any] | Arch") -> Arch:
        """Return an arch of this space from plain values: per dimension a list, or one number for all of its genes.

        A missing dimension gets its largest values. Raises UserError, naming the dimension and the values allowed, for
        an arch that is not in this space.
        """
        given = plain.to_dict() if isinstance(plain, Arch) else dict(plain)
        for word in ("stages", "skips"):
            given.pop(word, None)
        for name in given:
            if name not in self.dimensions:
                raise UserError(f"arch: this space has no dimension {name!r}{did_you_mean(name, self.dimensions)}")
        genes = {}
        for name, choices in self.choices:
            value = given.get(name, [max(values) for values in choices])
            values = list(value) if isinstance(value, list | tuple) else [value] * len(choices)
            if len(values) != len(choices):
                raise UserError(f"arch: {name}: must be {len(choices)} numbers (got {len(values)})")
            for gene, allowed in zip(values, choices, strict=True):
                if gene not in allowed:
                    raise UserError(f"arch: {name}: {gene!r} is not one of {', '.join(map(str, allowed))}")
            genes[name] = values
        return self._arch(genes)

    def largest(self) -> Arch:
        """Return the arch with the largest value of every gene: the whole supernet."""
        return self._arch({name: [max(values) for values in genes] for name, genes in self.choices})

    def smallest(self) -> Arch:
        """Return the arch with the smallest value of every gene."""
        return self._arch({name: [min(values) for values in genes] for name, genes in self.choices})

    def sample(self, rng: Rng) -> Arch:
        """Draw an arch: every gene uniformly and independently."""
        return self._arch({name: [_pick(values, rng) for values in genes] for name, genes in self.choices})

    def mutate(self, arch: Arch, rng: Rng, prob: float = 0.1, single_prob: float = 0.5) -> Arch:
        """Redraw genes: all genes of a block together, or any other gene, with `prob`; single numbers `single_prob`."""
        genes = self._lists(arch)
        hit = {depth.name: [rng.random() < prob for _ in range(depth.num_blocks)] for depth in self.depths}
        for name, one in self.named:
            for i, values in enumerate(one.choices):
                chance = single_prob if one.of == "net" else prob
                if hit[one.skipped_by][i] if one.skipped_by else rng.random() < chance:
                    genes[name][i] = _pick(values, rng)
        return self._arch(genes)

    def cross(self, mother: Arch, father: Arch, rng: Rng) -> Arch:
        """Return an arch that takes each gene from either parent with equal probability."""
        first, second = self._lists(mother), self._lists(father)
        mixed = {n: [b if rng.random() < 0.5 else a for a, b in zip(first[n], second[n], strict=True)] for n in first}
        return self._arch(mixed)

    def encode(self, arch: Arch) -> list[float]:
        """Return the input of a predictor: one-hot of every gene that has a choice, zeros for blocks that do not run.

        Those zeros reveal the depth, which has columns of its own only where they do not (`depth_told`).
        """
        out: list[float] = []
        genes = self._lists(arch)
        told = {depth.name: self.depth_told(depth) for depth in self.depths}
        active = {depth.name: depth.active(genes[depth.name]) for depth in self.depths}
        for name, one in self.named:
            for i, values in enumerate(one.choices):
                runs = active[one.skipped_by][i] if one.skipped_by else True
                gene = genes[name][i]
                if one.stages and one.stages[i].blocks:  # all depths beyond the last block are equivalent
                    gene = next(v for v in values if one.stages[i].active(v) == one.stages[i].active(gene))
                if len(values) > 1 and not (one.stages and told[name][i]):
                    out += [float(runs and value == gene) for value in values]
        return out

    def restrict(self, **allowed: Sequence[Gene]) -> "Space":
        """Return the subspace whose genes take only values of `allowed`, such as one stage of progressive shrinking.

        A gene that has none of the allowed values keeps its largest. Raises UserError for an unknown dimension.
        """
        for name in allowed:
            if name not in self.dimensions:
                raise UserError(f"this space has no dimension {name!r}{did_you_mean(name, self.dimensions)}")
        cut = {}
        for name, one in self.named:
            keep = set(allowed.get(name, ()))
            kept = tuple(tuple(v for v in values if v in keep) or (max(values),) for values in one.choices)
            cut[name] = replace(one, choices=kept) if name in allowed else one
        return Space(tuple(cut.items()))

    def num_archs(self) -> int:
        """Return how many different archs there are."""
        total = 1
        for _, one in self.named:
            if not one.skipped_by and not one.stages:
                total *= math.prod(map(len, one.choices))
        for depth in self.depths:
            start = 0
            for stage, depths in zip(depth.stages, self.dimensions[depth.name].choices, strict=True):
                if not stage.blocks:
                    total *= len(depths)
                    continue
                counts = {stage.active(gene) for gene in depths}
                genes = [
                    math.prod(len(self.dimensions[name].choices[start + i]) for name in depth.skips)
                    for i in range(stage.blocks)
                ]
                total *= sum(math.prod(genes[:count]) for count in counts)
                start += stage.blocks
        return total

    def archs(self) -> Iterator[Arch]:
        """Yield all different archs; for small spaces only (see `num_archs`)."""
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
        flat = tuple((n, genes[n][0] if one.of == "net" else tuple(genes[n])) for n, one in self.named)
        return Arch(flat, self.depths)


def _pick(values: Sequence[Gene], rng: Rng) -> Gene:
    return values[int(rng.random() * len(values))]
