"""Follows channels through a network to find which channels of which layers can only be removed together.

A network is run once on an example, and every activation is accompanied by a tensor of the same shape that holds, for
every element, the number of its channel. Operators that move elements (views, permutations, concatenation, gathering,
pixel shuffle) move the numbers in the same way, so they need no rules; a sum or a product of two channels joins them
(union-find); a convolution or linear layer starts new ones. Number 0 marks what cannot be removed (inputs, outputs,
constants), -1 marks zeros. If an operator has no rule, all its input channels are kept: a network may be pruned less,
but never wrongly. Whether zeros stay zero is followed too: wherever a removed channel is summed over, it must be 0 once
the layers that make it are 0, which x + 1 or sigmoid(x) is not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

Lane = NDArray[np.int64]  # the number of every channel of one dimension
FIXED, ZEROS = 0, -1


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVES = _names(
    "view _unsafe_view reshape permute transpose t expand squeeze unsqueeze slice select alias detach clone unfold "
    "index_select index gather repeat split split_with_sizes unbind pixel_shuffle pixel_unshuffle _to_copy "
    "lift_fresh constant_pad_nd flip roll _reshape_alias contiguous narrow"
)
SAME = _names("clone _to_copy contiguous detach alias lift_fresh")
VIEWS = _names("view _unsafe_view reshape _reshape_alias")
PARTS = _names("slice select split split_with_sizes unbind index_select gather narrow roll")
STAY_ZERO = _names(
    "relu leaky_relu elu gelu silu hardswish tanh abs neg square hardtanh clamp clamp_min clamp_max relu6 celu mish "
    "native_dropout dropout sign nan_to_num round floor trunc sqrt pow selu"
)
NOT_ZERO = _names("sigmoid hardsigmoid exp cos reciprocal rsqrt log softplus log1p erf logical_not ne eq gt lt ge le")
BINARY = _names("add sub rsub mul div maximum minimum")
ALONG = _names("cumsum _softmax _log_softmax")
REDUCE = ALONG | _names("sum mean amax amin max min var std linalg_vector_norm prod argmax argmin topk sort logsumexp")
POOL = _names(
    "max_pool2d_with_indices max_pool3d_with_indices max_pool2d avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d "
    "upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_linear1d upsample_trilinear3d "
    "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"
)
PRODUCTS = _names("mm bmm")
CREATE = _names("zeros zeros_like new_zeros empty empty_like new_empty empty_strided new_empty_strided")


class Union:
    """Union-find of channel numbers; every number joined with 0 becomes 0."""

    def __init__(self) -> None:
        self.parent = [0]

    def fresh(self, count: int) -> Lane:
        """Return `count` new numbers."""
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def find(self, number: int) -> int:
        """Return the representative of all numbers joined with `number`."""
        root = number
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[number] != root:
            self.parent[number], number = root, self.parent[number]
        return root

    def join(self, one: Lane, other: Lane) -> None:
        """Join the numbers of both arrays elementwise; ZEROS is compatible with everything."""
        differ = (one != other) & (one != ZEROS) & (other != ZEROS)
        if differ.any():
            for a, b in {(int(a), int(b)) for a, b in zip(one[differ], other[differ])}:
                low, high = sorted((self.find(a), self.find(b)))
                self.parent[high] = low

    def roots(self, lane: Lane) -> Lane:
        """Return `lane` with representatives in place of its numbers; ZEROS becomes FIXED."""
        return np.array([self.find(int(n)) if n > 0 else FIXED for n in lane], np.int64)


@dataclass(frozen=True, eq=False)
class Mark:
    """Numbers of an activation's elements, and whether removed channels are 0 there."""

    numbers: Tensor
    zero: bool = True


@dataclass(eq=False)
class Layer:
    """A module with channels: the numbers of its inputs and outputs, None if it has no such axis."""

    name: str
    module: nn.Module
    inputs: Lane | None = None
    outputs: Lane | None = None


@dataclass(frozen=True, eq=False)
class Work:
    """MACs of one call: `factor` times the product of the numbers of channels left in `lanes`."""

    factor: float
    lanes: tuple[Lane, ...]
    layer: str = ""


@dataclass(eq=False)
class Followed:
    """Findings of one run: the layers in the order in which they ran, their work, and the temporal shifts."""

    union: Union = field(default_factory=Union)
    layers: dict[str, Layer] = field(default_factory=dict)
    work: list[Work] = field(default_factory=list)
    places: dict[str, Lane] = field(default_factory=dict)  # input channels of temporal shifts, by module


# ------------------------------------------------------------------------------------------------ numbers


def thin(*tensors: Tensor) -> list[Tensor]:
    """Return views of tensors of equal shape with a single element along every dimension in which all are constant."""
    shape = tensors[0].shape
    for dim in range(len(shape)):
        if shape[dim] > 1 and all(t.stride(dim) == 0 for t in tensors):
            tensors = tuple(t.narrow(dim, 0, 1) for t in tensors)
    return list(tensors)


def varies(numbers: Tensor, dim: int) -> bool:
    """Return True if numbers differ along `dim`, ignoring zeros."""
    (few,) = thin(numbers)
    if few.shape[dim] == 1:
        return False
    top = few.amax(dim, keepdim=True)
    return bool(((few != top) & (few != ZEROS)).any())


def to_lane(numbers: Tensor) -> Lane:
    return numbers.reshape(-1).numpy().astype(np.int64)


class Follow(TorchDispatchMode):
    """Mode in which activations carry numbers (`marks`); `paused` inside layers that have a rule of their own."""

    def __init__(self, found: Followed):
        super().__init__()
        self.found, self.marks, self.paused = found, WeakIdKeyDictionary(), 0

    # -------------------------------------------------------------------------------- marks

    def mark_of(self, tensor: Any) -> Mark | None:
        return self.marks.get(tensor) if isinstance(tensor, Tensor) else None

    def set(self, tensor: Any, numbers: Tensor | None, zero: bool = True) -> None:
        """Mark `tensor`, or remove its mark if `numbers` is None, that is, all are fixed."""
        if not isinstance(tensor, Tensor):
            return
        if numbers is None:
            self.marks.pop(tensor, None)
        else:
            self.marks[tensor] = Mark(numbers.expand(tensor.shape), zero)

    def lock(self, *tensors: Any) -> None:
        """Mark all channels of `tensors` as not removable."""
        for tensor in tree_leaves(tensors):
            mark = self.mark_of(tensor)
            if mark is not None:
                lane = np.unique(to_lane(thin(mark.numbers)[0]))
                self.found.union.join(lane, np.zeros_like(lane))

    def lane(self, tensor: Tensor, dim: int) -> Lane:
        """Return the numbers along `dim`, over which a layer sums; different numbers at one index are joined."""
        mark = self.mark_of(tensor)
        if mark is None:
            return np.zeros(tensor.shape[dim], np.int64)
        if not mark.zero:
            self.lock(tensor)
        return self.merged(mark.numbers, dim)

    def merged(self, numbers: Tensor, dim: int) -> Lane:
        """Return one number for each index along `dim`; different numbers at one index are joined."""
        size = numbers.shape[dim]
        (few,) = thin(numbers)
        rows = few.movedim(dim, 0).reshape(few.shape[dim], -1)
        top = rows.amax(1)
        fixed = ((rows == FIXED).any(1)) & (top > 0)
        odd = (rows != top[:, None]) & (rows != ZEROS)
        if odd.any():
            where = odd.nonzero()
            self.found.union.join(to_lane(rows[where[:, 0], where[:, 1]]), to_lane(top[where[:, 0]]))
        lane = to_lane(torch.where(fixed, 0, top))
        return np.repeat(lane, size) if len(lane) == 1 else lane

    # -------------------------------------------------------------------------------- operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.paused:
            return out
        name = func._schema.name.removeprefix("aten::")
        base = name.rstrip("_") if not name.startswith("_") else "_" + name[1:].rstrip("_")
        target = kwargs.get("out") if "out" in kwargs else None
        kwargs = {key: value for key, value in kwargs.items() if key != "out"}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if base in CREATE:
            if isinstance(out, Tensor) and out.is_floating_point():
                self.set(out, torch.full(out.shape, ZEROS, dtype=torch.int32))
        elif base in PRODUCTS or any(t in self.marks for t in tensors):  # products always count
            result = out if target is None else torch.empty_like(target)
            self.rule(base, func, args, kwargs, result, tensors)
            if target is not None:
                self.copied(target, self.mark_of(result))
        elif target is not None:
            self.copied(target, None)
        return out

    def rule(self, base: str, func: Any, args: Any, kwargs: Any, out: Any, tensors: Sequence[Tensor]) -> None:
        """Number the output of an operator."""
        first = self.mark_of(args[0]) if args else None
        if base in MOVES and first is not None:
            self.moved(base, func, args, kwargs, out)
        elif base == "as_strided" and first is not None and same_places(args[0], out):
            self.set(out, first.numbers, first.zero)
        elif base in ("cat", "stack"):
            self.joined(func, args, kwargs, out)
        elif base in BINARY and isinstance(args[0], Tensor):
            self.binary(base, args, out)
        elif base in STAY_ZERO | NOT_ZERO and first is not None:
            stays = base in STAY_ZERO and keeps_zero(base, args, kwargs)
            self.set(out[0] if isinstance(out, tuple) else out, first.numbers, first.zero and stays)
        elif base in REDUCE and first is not None:
            self.reduced(base, args, kwargs, out, first)
        elif base in POOL and first is not None:
            result = out[0] if isinstance(out, tuple) else out
            lane = torch.from_numpy(self.merged(first.numbers, 1)).int()
            self.set(result, lane.view(1, -1, *[1] * (result.ndim - 2)), first.zero)
        elif base in PRODUCTS:
            self.product(args[0], args[1], out)
        elif base in ("_embedding_bag", "_embedding_bag_forward_only") and first is not None:
            self.set(out[0], torch.from_numpy(self.lane(args[0], 1)).int()[None])
        elif base == "index_add" and self.mark_of(args[3]) is not None:
            self.added(args, out)
        elif base == "copy":
            self.copied(args[0], self.mark_of(args[1]))
        elif base in ("zero", "fill"):
            numbers = torch.full(out.shape, ZEROS if base == "zero" else FIXED, dtype=torch.int32)
            self.copied(out, Mark(numbers))
        elif base not in ("sym_size", "size", "stride", "is_same_size"):
            self.lock(tensors)
            for leaf in tree_leaves(out):
                self.set(leaf, None)

    def moved(self, base: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Move the numbers as the elements are moved; keep all channels if a channel dimension is cut into parts."""
        mark, rest = self.marks[args[0]], args[1:]
        numbers = mark.numbers
        if base in SAME:
            copied = numbers if base in ("detach", "alias") or 0 in numbers.stride() else numbers.clone()
            self.set(out, copied, mark.zero)
            return
        if self.cuts(base, numbers, rest, kwargs, out):
            self.lock(args[0])
        if base in VIEWS:
            moved = numbers.reshape(out.shape)
        elif base == "constant_pad_nd":
            moved = func(numbers, rest[0], ZEROS if not (rest[1:] and rest[1]) else FIXED)
        else:
            moved = func(numbers, *rest, **kwargs)
        for one, its in zip(tree_leaves(out), tree_leaves(moved), strict=True):
            self.set(one, its, mark.zero)

    def cuts(self, base: str, numbers: Tensor, rest: Any, kwargs: Any, out: Any) -> bool:
        """Return True if an operator divides a channel dimension by fixed sizes, which pruning does not change."""
        channels = [dim for dim in range(numbers.ndim) if varies(numbers, dim)]
        if not channels:
            return False
        if base in VIEWS:
            return splits(numbers.shape, out.shape, channels)
        if base in PARTS:
            place = 1 if base in ("split", "split_with_sizes", "roll") else 0  # position of `dim` in the arguments
            dim = kwargs.get("dim", rest[place] if len(rest) > place else 0)
            whole = isinstance(out, Tensor) and out.shape == numbers.shape and base == "slice"
            return not whole and any(d % numbers.ndim in channels for d in ([dim] if isinstance(dim, int) else dim))
        if base == "index":
            return any(index is not None and dim in channels for dim, index in enumerate(rest[0]))
        if base == "unfold":
            return rest[0] % numbers.ndim in channels
        if base == "constant_pad_nd":
            padded = {numbers.ndim - 1 - i // 2 for i, amount in enumerate(rest[0]) if amount}
            return bool(padded & set(channels))
        return False

    def joined(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        numbers = []
        for tensor in args[0]:
            mark = self.mark_of(tensor)
            if mark is not None and not mark.zero:
                self.lock(tensor)
            numbers.append(torch.zeros((), dtype=torch.int32).expand(tensor.shape) if mark is None else mark.numbers)
        self.set(out, func(numbers, *args[1:], **kwargs))

    def binary(self, base: str, args: Any, out: Tensor) -> None:
        one, other = self.mark_of(args[0]), self.mark_of(args[1])
        product = base in ("mul", "div")
        if one is not None and other is not None:
            a, b = thin(one.numbers.expand(out.shape), other.numbers.expand(out.shape))
            a, b = torch.broadcast_tensors(a, b)
            if base == "div":
                self.lock(args[1])
            both = (a > 0) & (b > 0) if product else (a != ZEROS) & (b != ZEROS)
            self.found.union.join(to_lane(a[both]), to_lane(b[both]))
            nothing, left, right = (a == ZEROS) | (b == ZEROS), (a > 0) & one.zero, (b > 0) & other.zero
            numbers = torch.where(nothing, ZEROS, a.maximum(b)) if product else a.maximum(b)
            if base == "mul":  # 0 if either factor is
                zero = bool((left | right | nothing | ((a <= 0) & (b <= 0))).all())
            else:
                zero = one.zero and (other.zero or base == "div")
            self.set(out, numbers, zero)
            return
        mark, marked, constant = (one, args[0], args[1]) if one is not None else (other, args[1], args[0])
        assert mark is not None
        numbers, zero = mark.numbers.expand(out.shape), mark.zero
        if isinstance(constant, Tensor) and constant.numel() > 1:
            shape = [1] * (out.ndim - constant.ndim) + list(constant.shape)
            tied = any(shape[dim] > 1 and varies(numbers, dim) for dim in range(out.ndim))
            if tied or not product:
                self.lock(marked)
                self.set(out, None)
                return
        zero = zero and (product or bool(constant == 0)) and not (base == "div" and marked is args[1])
        self.set(out, numbers, zero)

    def reduced(self, base: str, args: Any, kwargs: Any, out: Any, mark: Mark) -> None:
        numbers, result = mark.numbers, out[0] if isinstance(out, tuple) else out
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if base == "linalg_vector_norm":
            dims = kwargs.get("dim", args[2] if len(args) > 2 else None)
        if base == "topk":
            dims = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        if base == "sort":
            dims = kwargs.get("dim", args[1] if len(args) > 1 and not isinstance(args[1], bool) else -1)
        if isinstance(dims, Tensor):  # max(x, y)
            self.lock(args[0], dims)
            return
        dims = (
            list(range(numbers.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
        )
        dims = [dim % numbers.ndim for dim in dims]
        if any(varies(numbers, dim) for dim in dims):
            if base not in ("sum", "linalg_vector_norm") or not mark.zero:
                self.lock(args[0])
            self.set(result, None)
            return
        if base in ("argmax", "argmin"):
            self.set(result, None)
            return
        if base in ALONG:
            self.set(result, numbers, mark.zero and base == "cumsum")
            return
        (few,) = thin(numbers)
        few = few.amax(dims, keepdim=True)
        if result.ndim < numbers.ndim:
            few = few.reshape([size for dim, size in enumerate(few.shape) if dim not in dims])
        self.set(result, few, mark.zero and base not in ("logsumexp", "prod"))

    def product(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Follow a matrix product: channels summed over are joined, rows and columns keep their numbers."""
        sides = []
        for tensor, rows in ((left, True), (right, False)):
            mark = self.mark_of(tensor)
            summed, kept = (-1, -2) if rows else (-2, -1)
            lanes: list[Lane | None] = [None, None]
            if mark is not None:
                vary = [varies(mark.numbers, dim) for dim in range(mark.numbers.ndim)]
                if sum(vary) != 1 or not (vary[summed] or vary[kept]):
                    self.lock(tensor)
                else:
                    if vary[summed] and not mark.zero:
                        self.lock(tensor)
                    lanes[0 if vary[summed] else 1] = self.merged(mark.numbers, summed if vary[summed] else kept)
            sides.append((lanes, mark))
        (a_sum, a_row), (b_sum, b_column) = sides[0][0], sides[1][0]
        inner = left.shape[-1]
        if a_sum is not None or b_sum is not None:
            both = [np.zeros(inner, np.int64) if lane is None else lane for lane in (a_sum, b_sum)]
            self.found.union.join(*both)
        if a_row is not None and b_column is not None:
            self.lock(left)
            a_row = None
        rows, columns = out.shape[-2], out.shape[-1]
        fixed = out.numel() // (rows * columns)
        lanes = [a_sum if a_sum is not None else b_sum, a_row, b_column]
        sizes = [inner, rows, columns]
        factor = fixed * float(np.prod([size for lane, size in zip(lanes, sizes) if lane is None]))
        self.found.work.append(Work(factor, tuple(lane for lane in lanes if lane is not None)))
        if a_row is not None:
            mark = sides[0][1]
            self.set(out, torch.from_numpy(a_row).int()[:, None], mark is None or mark.zero)
        elif b_column is not None:
            mark = sides[1][1]
            self.set(out, torch.from_numpy(b_column).int()[None, :], mark is None or mark.zero)

    def added(self, args: Any, out: Tensor) -> None:
        """Follow `index_add`: rows of channels are summed into rows of an empty table."""
        mark, dim = self.marks[args[3]], args[1]
        into = self.mark_of(args[0])
        if varies(mark.numbers, dim) or not mark.zero or into is None or bool((thin(into.numbers)[0] == FIXED).any()):
            self.lock(args[0], args[3])
            self.set(out, None)
            return
        (few,) = thin(mark.numbers)
        self.copied(out, Mark(few.amax(dim, keepdim=True)))

    def copied(self, target: Tensor, source: Mark | None) -> None:
        numbers = torch.zeros((), dtype=torch.int32) if source is None else source.numbers
        into = self.mark_of(target)
        if into is not None and 0 not in [s for s, n in zip(into.numbers.stride(), into.numbers.shape) if n > 1]:
            into.numbers.copy_(numbers.expand(target.shape))
            self.marks[target] = Mark(into.numbers, source is None or source.zero)
        else:
            self.set(target, None if source is None else numbers, source is None or source.zero)


def same_places(before: Tensor, after: Tensor) -> bool:
    """Return True if a strided view equals its base, as at the end of pooling channels-last images to 1x1."""
    steps = [[s for s, n in zip(t.stride(), t.shape) if n > 1] for t in (before, after)]
    return before.shape == after.shape and steps[0] == steps[1] and before.storage_offset() == after.storage_offset()


def keeps_zero(base: str, args: Any, kwargs: Any) -> bool:
    """Return True if 0 stays 0 with the bounds or exponent given to an operator."""
    limits: Iterable[Any] = [*args[1:3], *(kwargs.get(k) for k in ("min", "max", "min_val", "max_val"))]
    numbers = [x for x in limits if isinstance(x, int | float)]
    if base in ("clamp", "hardtanh"):
        low, high = (
            (args[1] if len(args) > 1 else kwargs.get("min", -1)),
            (args[2] if len(args) > 2 else kwargs.get("max", 1)),
        )
        return (low is None or low <= 0) and (high is None or high >= 0)
    if base == "clamp_min":
        return all(x <= 0 for x in numbers)
    if base == "clamp_max":
        return all(x >= 0 for x in numbers)
    if base == "pow":
        return isinstance(args[1], int | float) and args[1] > 0
    return True


def splits(before: Sequence[int], after: Sequence[int], channels: Sequence[int]) -> bool:
    """Return True if a view from one shape to another splits one of the dimensions `channels` into several."""
    i = j = 0
    while i < len(before) and j < len(after):
        first_in, first_out, size_in, size_out = i, j, before[i], after[j]
        while size_in != size_out:
            if size_in < size_out:
                i += 1
                size_in *= before[i]
            else:
                j += 1
                size_out *= after[j]
        i, j = i + 1, j + 1
        if any(dim in channels for dim in range(first_in, i)) and sum(n > 1 for n in after[first_out:j]) > 1:
            return True
    return False
