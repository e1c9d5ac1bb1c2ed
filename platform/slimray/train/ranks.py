"""The ranks of a run among themselves: sums, gathers and unions over all of them, watched for ranks that hang.

Numbers go from processor to processor, also where ranks compute on GPUs: whoever sums a number at each step waits for
the other ranks' processors then, which are steps ahead, and for no GPU. Tensors go from device to device.
Every method named a collective must be called by all ranks alike. A rank that does not move inside one waits for the
others and is not stuck itself: `Watchdog` (health.py) is told so.
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

SHARED = 2**26  # bytes that `share` sends at a time, through the memory of the device


class Ranks:
    """This rank of `world`, the device it computes on, and the watchdog that looks after it.

    `stuck(doing, seconds, stacks)` is called when the rank did not move for `limit_s` seconds; see `Watchdog`.
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
        self.numbers: Any = None  # the group of what goes from processor to processor: that of all on a CPU
        if world > 1 and device.type != "cpu":
            timeout = datetime.timedelta(seconds=limit_s + 20)  # as that of all has it
            self.numbers = dist.new_group(backend="gloo", timeout=timeout)
        self.watchdog = Watchdog(limit_s, stuck, waits)

    @contextlib.contextmanager
    def waiting(self, settled: bool = False) -> Iterator[None]:
        """A rank that does not move within the block waits for the other ranks, and is not stuck itself.

        What its device has still to do is its own work and done first, unless the block does without (`settled`).
        """
        doing = self.watchdog.doing
        if not settled:
            self.timer.finish()
        self.watchdog.beat(OTHERS if self.world > 1 else doing)
        yield
        self.watchdog.beat(doing)

    def require_all_reduce(self) -> None:
        """Raise RunFailed unless the ranks can add numbers: a broken network is found before work starts."""
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
        """Return what is among the `numbers` (not negative) of any rank, sorted. A collective."""
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
        """Return the `value` of every rank, which is pickled: not for what is done at each step. A collective."""
        found: list[Any] = [value] * self.world
        with self.waiting(settled=True):
            if self.world > 1:
                dist.all_gather_object(found, value, group=self.numbers)
        return found

    def share(self, data: bytes | None) -> bytes:
        """Return the `data` of rank 0, which alone has read it; the others pass None. A collective."""
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
        """Give every rank in place the values that `tensors`, wherever they lie, have on rank 0. A collective."""
        with self.waiting():
            for tensor in (one for one in tensors if self.world > 1 and one.numel()):
                sent = tensor.to(self.device).contiguous()
                dist.broadcast(sent.view(-1).view(torch.uint8), 0)  # gloo knows no bool
                tensor.copy_(sent)

    def agree(self, decided: bool) -> bool:
        """Return what rank 0 decided. A collective."""
        flag = torch.tensor([float(decided)])
        with self.waiting(settled=True):
            if self.world > 1:
                dist.broadcast(flag, 0, group=self.numbers)
        return bool(flag)


def merge_scores(score: Score, world: int, device: torch.device) -> None:
    """Sum the counts of all ranks into everybody's `score`. A collective."""
    for tensor in score.tensors() if world > 1 else ():
        moved = tensor.to(device)
        dist.all_reduce(moved)
        tensor.copy_(moved)
