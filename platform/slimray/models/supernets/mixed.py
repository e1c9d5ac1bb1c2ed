"""The supernet of ProxylessNAS and the networks found in it: every block chooses among candidates with own weights.

In: pictures and a path, a number per block; out: logits of that path, the only one that runs and is kept in memory
(ProxylessNAS, arXiv 1812.00332). Candidates are kernels {3, 5, 7} with expansions {3, 6}, and nothing at all if the
block has a shortcut. With `Gates` the backward pass computes how the loss changes with the probability of each
candidate: the gate of the active one is 1, those of the others are 0, and their outputs are computed then, one after
another. `alphas`, whose softmax are the probabilities, are buffers: the optimizer of the weights must not see them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimray.models.supernets.elastic import Unit, make_divisible, take
from slimray.models.supernets.ofa_mobilenet import KERNELS, MBConv, MobileLayout, proxyless_layout
from slimray.models.supernets.supernet import Nothing, Part, Subnet, Supernet, initialise, make_subnet
from slimray.spec import UserError

EXPANDS = (3, 6)
NOTHING = "-"  # the code of a block that is only its shortcut; the others are "kernel/expansion"
Path = tuple[int, ...]  # the number of the candidate of each mixed block


def candidates(widest: MBConv) -> dict[str, Part]:
    """Return the candidates of a block by code: `3/3`, `5/3`, ..., `7/6`, and `-` if it has a shortcut."""
    inputs = widest.inputs
    out: dict[str, Part] = {
        f"{kernel}/{expand}": replace(widest, kernel=kernel, middle=make_divisible(round(inputs * expand)))
        for expand in EXPANDS
        for kernel in KERNELS
    }
    return out | ({NOTHING: Nothing()} if widest.residual else {})


# ----------------------------------------------------------------------------------------------------- one block


@dataclass(frozen=True)
class Gates:
    """The candidates of a block that a step compares (`members`, including the active one) and their `probabilities`.

    The latter `[len(members)]` sum to 1 and are a function of the block's alphas, so that these get gradients.
    """

    members: tuple[int, ...]
    probabilities: Tensor


class _Gate(torch.autograd.Function):
    """Returns `out`; its backward gives each gate the sum of (output of its candidate x gradient of the output)."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx: Any, out: Tensor, x: Tensor, gates: Tensor, others: Sequence[Callable | None]) -> Tensor:
        ctx.save_for_backward(out, x)
        ctx.others, ctx.dtype = others, gates.dtype
        return out.view_as(out)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        out, x = ctx.saved_tensors
        wide = grad.to(ctx.dtype)
        sums = []
        for other in ctx.others:
            value = out if other is None else other(x)
            sums.append((value.to(ctx.dtype) * wide).sum() if value is not None else wide.new_zeros(()))
        return grad, None, torch.stack(sums), None


def gated(out: Tensor, x: Tensor, gates: Tensor, others: Sequence[Callable | None]) -> Tensor:
    """Return `out`, the output of the active candidate, with a gradient for `gates` `[n]`: sum(out_k x dL/dout).

    `others[k]` returns the output of candidate k on `x`, or None for all zeros, and is itself None for the active one.
    They run in the backward pass, without a graph.
    """
    return cast(Tensor, _Gate.apply(out, x.detach(), gates, others))


class MixedBlock(nn.Module):
    """A block that is one of `candidates(widest)`: `[N, inputs, H, W]` -> `[N, outputs, H/stride, W/stride]`."""

    def __init__(self, widest: MBConv):
        super().__init__()
        self.parts, self.residual = candidates(widest), widest.residual
        self.choices = nn.ModuleList(part.make() for part in self.parts.values())
        self.alphas: Tensor
        self.register_buffer("alphas", 1e-3 * torch.randn(len(self.parts)))

    @property
    def codes(self) -> tuple[str, ...]:
        """Codes of the candidates in the order of their numbers."""
        return tuple(self.parts)

    def is_nothing(self, number: int) -> bool:
        """Return whether a candidate is only the shortcut."""
        return self.codes[number] == NOTHING

    def _branch(self, number: int, x: Tensor) -> Tensor | None:
        """Return the output of a candidate, without the shortcut; None for nothing."""
        return None if self.is_nothing(number) else cast(Any, self.choices[number]).conv(x)

    def forward(self, x: Tensor, active: int, gates: Gates | None = None) -> Tensor:
        out = self._branch(active, x)
        if out is None:
            return x
        if gates is not None:
            others = [
                None if number == active else lambda x, number=number: self._branch(number, x)
                for number in gates.members
            ]
            out = gated(out, x, gates.probabilities, others)
        return x + out if self.residual else out


# ------------------------------------------------------------------------------------------------------ the nets


class MixedNet(nn.Module):
    """The supernet: `net(x, path)` runs one candidate per mixed block, `net.extract(path)` copies it as a plain one.

    Without a path, the candidates with the largest alphas run. Takes `[B, 3, H, W]`, returns `[B, num_classes]`.
    """

    head_name, first_conv_name = "classifier.linear", "first_conv.conv"

    def __init__(self, layout: MobileLayout):
        super().__init__()
        self.layout = layout
        self.plan = layout.plan(layout.space().largest())
        for placed in self.plan:
            top, _, _ = placed.name.partition(".")
            module = MixedBlock(cast(MBConv, placed.part)) if placed.elastic else placed.part.make()
            if top == placed.name:
                self.add_module(top, module)
            elif hasattr(self, top):
                cast(nn.Sequential, getattr(self, top)).append(module)
            else:
                self.add_module(top, nn.Sequential(module))
        initialise(self)

    @property
    def mixed(self) -> list[MixedBlock]:
        """The blocks with several candidates, in order."""
        return [module for module in self.modules() if isinstance(module, MixedBlock)]

    def most_likely(self) -> Path:
        """Return the path of the largest alphas (on the meta device, which has no values, of the first candidates)."""
        return tuple(0 if block.alphas.is_meta else int(block.alphas.argmax()) for block in self.mixed)

    def forward(self, x: Tensor, path: Sequence[int] | None = None, gates: Sequence[Gates] | None = None) -> Tensor:
        path = self._checked(self.most_likely() if path is None else path)
        number = 0
        for placed in self.plan:
            module = self.get_submodule(placed.name)
            if placed.elastic:
                x = module(x, path[number], None if gates is None else gates[number])
                number += 1
            else:
                x = module(x)
        return x

    def _checked(self, path: Sequence[int]) -> Path:
        blocks = self.mixed
        if len(path) != len(blocks) or not all(0 <= n < len(b.parts) for n, b in zip(path, blocks, strict=True)):
            sizes = [len(block.parts) for block in blocks]
            raise ValueError(f"path: {list(path)} must choose one of {sizes} candidates for each block")
        return tuple(path)

    def describe(self, path: Sequence[int]) -> str:
        """Return the path as text for `proxyless_found`: `5/3 3/3 - -, 7/3 ...`, with commas between stages."""
        codes = iter(block.codes[number] for number, block in zip(self._checked(path), self.mixed, strict=True))
        return ", ".join(" ".join(next(codes) for _ in range(max(stage.depths))) for stage in self.layout.stages)

    def extract(self, path: Sequence[int]) -> Subnet:
        """Return the path as an ordinary network, in the train or eval mode of this one, with copies of its weights."""
        numbers = iter(self._checked(path))
        modules: dict[str, nn.Module] = {}
        for placed in self.plan:
            source = self.get_submodule(placed.name)
            part = placed.part
            if placed.elastic:
                block, number = cast(MixedBlock, source), next(numbers)
                part, source = block.parts[block.codes[number]], block.choices[number]
            with torch.device("meta"):
                modules[placed.name] = part.make()
            take(modules[placed.name], source)
        return Subnet(modules, self.first_conv_name).train(self.training)

    def units(self, resolution: int | None = None) -> tuple[list[Unit], list[list[Unit | None]]]:
        """Return the units for costs on inputs of `resolution`: those common to all paths, and for each mixed block
        those of its candidates (None for nothing). Keys are those of the supernet `ofa_proxyless`, so that its latency
        tables can be used."""
        with torch.device("meta"):
            ruler = Supernet(self.layout)
        side = self.layout.resolution if resolution is None else resolution
        space = ruler.space
        by_code = {
            f"{kernel}/{expand}": ruler.units(space.largest().replace(**_all(space, kernel, expand)), side)
            for kernel in KERNELS
            for expand in EXPANDS
        }
        any_path = next(iter(by_code.values()))
        fixed = [unit for placed, unit in zip(self.plan, any_path, strict=True) if not placed.elastic]
        places = [place for place, placed in enumerate(self.plan) if placed.elastic]
        edges = [
            [None if code == NOTHING else by_code[code][place] for code in block.codes]
            for place, block in zip(places, self.mixed, strict=True)
        ]
        return fixed, edges


def _all(space: Any, kernel: int, expand: int) -> dict[str, Any]:
    """Return the genes of the arch in which all blocks have this kernel and expansion."""
    count = len(space.dimensions["kernel"].choices)
    return {"kernel": [kernel] * count, "expand": [expand] * count}


def proxyless_supernet(
    num_classes: int,
    width: float = 1.0,
    dropout: float = 0.0,
    preset: str = "imagenet",
    shortcuts: str = "defined",
) -> MixedNet:
    """Build the supernet of ProxylessNAS: 21 mixed blocks, or 10 with `preset: tiny` for pictures of 32 pixels."""
    return MixedNet(proxyless_layout(preset, shortcuts).scaled(width, num_classes=num_classes, dropout=dropout))


def proxyless_found(
    num_classes: int,
    blocks: str = "",
    width: float = 1.0,
    dropout: float = 0.0,
    preset: str = "imagenet",
    shortcuts: str = "defined",
) -> Subnet:
    """Build a path of `proxyless_supernet` as a network: `blocks` as returned by `describe`, "" for the largest."""
    layout = proxyless_layout(preset, shortcuts).scaled(width, num_classes=num_classes, dropout=dropout)
    plan = layout.plan(layout.space().largest())
    wanted = [stage.split() for stage in blocks.split(",")] if blocks else []
    sizes = [max(stage.depths) for stage in layout.stages]
    if blocks and [len(stage) for stage in wanted] != sizes:
        raise UserError(f"blocks: must be stages of {', '.join(map(str, sizes))} blocks (got {blocks!r})")
    codes = iter(code for stage in wanted for code in stage)
    parts: dict[str, Part] = {}
    for placed in plan:
        parts[placed.name] = placed.part
        if placed.elastic and blocks:
            known, code = candidates(cast(MBConv, placed.part)), next(codes)
            if code not in known:
                raise UserError(f"blocks: {code!r} is not one of {' '.join(known)} ({placed.name})")
            parts[placed.name] = known[code]
    return make_subnet(parts, MixedNet.first_conv_name)
