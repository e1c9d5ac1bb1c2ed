"""Collectives over the ranks of a run: sums, gathers and unions, with a watchdog for ranks that hang.

Numbers are exchanged between CPUs, also where ranks compute on GPUs: a sum at each step then waits only for the other
ranks' CPUs, which run steps ahead, and for no GPU. Tensors are exchanged between devices. Every method marked as a
collective must be called by all ranks alike. A rank that does not move inside one is waiting for the others, not stuck
itself, and the `Watchdog` (health.py) is informed of that.
"""

import contextlib
import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slimray.spec import RunFailed
from slimray.tasks.task import Score
from slimray.train.health import OTHERS, Watchdog
from slimray.train.timing import timer_of

SHARED = 2**26  # bytes that `share` sends at a time, through device memory


class Ranks:
    """This rank of `world`, the device it computes on, and its watchdog.

    `stuck(doing, seconds, stacks)` is called when the rank has not moved for `limit_s` seconds; see `Watchdog`.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        device: torch.device,
        limit_s: float,
        stuck: Callable[[str, float, str], None],
        waits: Callable[[], bool] = lambda: False,
    ):
        self.rank, self.world, self.device = rank, world, device
        self.timer = timer_of(device)
        self.numbers: Any = None  # process group of numbers, exchanged between CPUs; on a CPU the default group
        if world > 1 and device.type != "cpu":
            timeout = datetime.timedelta(seconds=limit_s + 20)  # as in the default group
            self.numbers = dist.new_group(backend="gloo", timeout=timeout)
        self.watchdog = Watchdog(limit_s, stuck, waits)

    @contextlib.contextmanager
    def waiting(self, settled: bool = False) -> Iterator[None]:
        """Within the block, a rank that does not move is waiting for the other ranks, not stuck itself.

        Queued work of its device is its own and is finished first, unless the block does not depend on it (`settled`).
        """
        doing = self.watchdog.doing
        if not settled:
            self.timer.finish()
        self.watchdog.beat(OTHERS if self.world > 1 else doing)
        yield
        self.watchdog.beat(doing)

    def require_all_reduce(self) -> None:
        """Raise RunFailed unless an all-reduce of the ranks works: this finds a broken network before work starts."""
        if self.world == 1:
            return
        numbers = torch.full((2**18,), float(self.rank + 1), device=self.device)
        dist.all_reduce(numbers)
        wanted = self.world * (self.world + 1) / 2
        if not bool((numbers == wanted).all()):
            raise RunFailed(f"the all-reduce of {self.world} ranks gives {float(numbers[0]):g}, not {wanted:g}")

    def sum(self, *values: float) -> list[float]:
        """Return the sums of `values` over all ranks. A collective."""
        total = torch.tensor(values, dtype=torch.float64)
        with self.waiting(settled=True):
            if self.world > 1:
                dist.all_reduce(total, group=self.numbers)
        return total.tolist()

    def gather(self, *values: float) -> Tensor:
        """Return `values` of every rank, float64 `[len(values), world]`. A collective."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.world == 1:
            return mine[:, None]
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        with self.waiting(settled=True):
            dist.all_gather(everyone, mine, group=self.numbers)
        return torch.stack(everyone, 1)

    def union(self, numbers: Sequence[int]) -> list[int]:
        """Return the sorted union of all ranks' `numbers`, which must not be negative. A collective."""
        if self.world == 1:
            return sorted(set(numbers))
        most = int(self.gather(len(numbers)).max())
        if not most:
            return []
        mine = torch.full((most,), -1, dtype=torch.int64)
        mine[: len(numbers)] = torch.tensor(list(numbers), dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        with self.waiting(settled=True):
            dist.all_gather(everyone, mine, group=self.numbers)
        found = torch.cat(everyone).unique().tolist()
        return [number for number in found if number >= 0]

    def everyone(self, value: Any) -> list[Any]:
        """Return the `value` of every rank. It is pickled, so do not call this at each step. A collective."""
        found: list[Any] = [value] * self.world
        with self.waiting(settled=True):
            if self.world > 1:
                dist.all_gather_object(found, value, group=self.numbers)
        return found

    def share(self, data: bytes | None) -> bytes:
        """Return the `data` of rank 0 on every rank; the others pass None. A collective."""
        if self.world == 1:
            assert data is not None
            return data
        with self.waiting():
            size = torch.tensor([len(data or b"")], device=self.device)
            dist.broadcast(size, 0)
            parts = []
            for at in range(0, int(size), SHARED):
                if data is None:
                    piece = torch.empty(min(SHARED, int(size) - at), dtype=torch.uint8, device=self.device)
                else:
                    piece = torch.frombuffer(bytearray(data[at : at + SHARED]), dtype=torch.uint8).to(self.device)
                dist.broadcast(piece, 0)
                parts += [piece.cpu().numpy().tobytes()] if data is None else []
        return b"".join(parts) if data is None else data

    @torch.no_grad()
    def give(self, tensors: Iterable[Tensor]) -> None:
        """Copy the values of `tensors`, on any device, in place from rank 0 to every rank. A collective."""
        with self.waiting():
            for tensor in (one for one in tensors if self.world > 1 and one.numel()):
                sent = tensor.to(self.device).contiguous()
                dist.broadcast(sent.view(-1).view(torch.uint8), 0)  # gloo does not support bool
                tensor.copy_(sent)

    def agree(self, decided: bool) -> bool:
        """Return the decision of rank 0. A collective."""
        flag = torch.tensor([float(decided)])
        with self.waiting(settled=True):
            if self.world > 1:
                dist.broadcast(flag, 0, group=self.numbers)
        return bool(flag)


def merge_scores(score: Score, world: int, device: torch.device) -> None:
    """Sum the counts of all ranks into the `score` of each. A collective."""
    for tensor in score.tensors() if world > 1 else ():
        moved = tensor.to(device)
        dist.all_reduce(moved)
        tensor.copy_(moved)
