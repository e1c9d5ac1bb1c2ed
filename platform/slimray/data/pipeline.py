"""Feeds the ranks through Ray Data: plan positions in, decoded batches out, in the plan's order.

A feeder actor serves a group of ranks. It turns a list of phases (data/plan.py) into numbered blocks and streams them
through Ray Data: one CPU task reads and decodes one block from the rows of the index sent with it, `preserve_order`
keeps the sequence, and the feeder passes the *reference* of each finished block to its rank, so that pixels never pass
through the feeder. Several epochs and the validations between them share one execution, and the next execution starts
before the last has drained, because a restart costs seconds and an epoch of large batches may last only eight.
`RankStream` is the rank's end: it collects the rows of a step, checks that they are its own, and limits every wait.
Samples that fail keep their slot (`valid` 0, `reason`); storage failures are retried, then raised.
"""

import asyncio
import copy
import functools
import itertools
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray import exceptions
from ray._private.state import available_resources_per_node
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.util.annotations import RayDeprecationWarning
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from slimray.data.decode import DecodeConfig, decode_block
from slimray.data.modalities import modality_of, pads_of, sample_bytes, sample_shape
from slimray.data.plan import (
    Block,
    Phase,
    block_size,
    blocks,
    ceil_div,
    feeder_nodes,
    feeder_ranks,
    num_feeders,
    rank_slice,
)
from slimray.data.ragged import joined, tight
from slimray.data.rows import Rows, Unpacked, divided, packed, rows_of_blocks
from slimray.spec import RunFailed, UserError
from slimray.storage import StorageError

TASK_RETRIES = 3  # for a task whose process died; Ray would retry forever, but a file may be what kills it
STEPS_AHEAD = 2  # decoded steps kept ready for every rank


@dataclass(frozen=True)
class Source:
    """One split of a dataset as the pipeline reads it: the root of its files and, in the object store, its index."""

    root: str
    index: "ray.ObjectRef[pa.Table]"
    num_samples: int


@dataclass(frozen=True)
class FeedConfig:
    """Settings that all feeders of a run share. `max_rows` is the microbatch of one rank; times are seconds.

    `decode_cpus` is the number of CPUs a decoding task reserves: 1, or 0 if the workers of an elastic run hold all CPUs
    (decoding then shares their cores, as on a laptop; reservations would wait forever). `left_out` nodes do not decode.
    """

    phases: tuple[Phase, ...]
    sources: dict[str, Source]
    seed: int
    world: int
    max_rows: int
    decode_slots: int
    decode_timeout_s: float = 30.0
    wait_timeout_s: float = 600.0
    decode_cpus: int = 1
    left_out: tuple[str, ...] = ()
    blocks_per_execution: int = 2000  # planning 2,000 read tasks takes about 1.5 s, while the last execution runs on


class Batch:
    """The rows of one step (or microbatch) of one rank, as numpy arrays that share memory with the object store.

    `data` and `label` `[n, ...]` are as modality and target of the recipe define them, `sample` int64 `[n]` the row in
    the index, `position` int64 `[n]` the position in the plan, `valid` bool `[n]`, `path` and `reason` lists of str
    (reason "" if valid). Blocks of shorter samples are padded with `pads`, the values for data and labels.
    """

    def __init__(self, tables: Sequence[pa.Table], pads: tuple[float, float] = (0, -1)):
        parts: list[Any] = [BlockAccessor.for_block(table).to_batch_format("numpy") for table in tables]
        order = np.argsort(np.concatenate([p["position"] for p in parts]), kind="stable") if len(parts) > 1 else None

        def column(name: str) -> np.ndarray:
            pad = pads[name == "label"]
            whole = parts[0][name] if len(parts) == 1 else joined([p[name] for p in parts], pad)
            return whole if order is None else whole[order]

        self.position, self.sample, self.label = column("position"), column("sample"), column("label")
        self.valid, self.data = column("valid").astype(bool), column("data")
        self.path, self.reason = column("path").tolist(), column("reason").tolist()

    def __len__(self) -> int:
        return len(self.position)

    def cut(self, lo: int, hi: int, pads: tuple[float, float]) -> "Batch":
        """Return rows [lo, hi) as a batch of its own, trimmed to the longest of them."""
        one = copy.copy(self)
        for name in ("position", "sample", "valid", "path", "reason"):
            setattr(one, name, getattr(self, name)[lo:hi])
        one.data, one.label = tight(self.data[lo:hi], self.label[lo:hi], pads)
        return one


def batch_of(tables: Sequence[pa.Table], phase: Phase) -> Batch:
    """Return rows of blocks as the batch of a step, trimmed to its longest sample, as blocks may hold longer ones."""
    pads = pads_of(phase.recipe)
    batch = Batch(tables, pads)
    return batch if modality_of(phase.recipe).pad is None else batch.cut(0, len(batch), pads)


# ---------------------------------------------------------------------------------------- in the decoding tasks


def rows_of(cut: Sequence[Block], config: FeedConfig) -> list[pa.Table]:
    """Return the input of the decoding task of each block of `cut`: its rows of the index with their plan positions."""
    index = {split: source.index for split, source in config.sources.items()}
    return rows_of_blocks(
        cut, config.phases, config.seed, lambda split: _rows(index[split]), lambda split: _by_length(index[split])
    )


def decode_config(cut: Sequence[Block], config: FeedConfig) -> DecodeConfig:
    """Return what the decoding tasks of the blocks `cut` share."""
    phases = {number: config.phases[number] for number in sorted({block.phase for block in cut})}
    splits = {split: (source.root, source.index.hex()) for split, source in config.sources.items()}
    return DecodeConfig(phases, splits, config.seed, config.decode_timeout_s)


def block_sizes(config: FeedConfig, num_ranks: int) -> tuple[list[int], int]:
    """Return how many microbatches make a block of each phase for a feeder of `num_ranks`, and the bytes of the largest
    block that holds several."""
    sizes, largest = [], 0
    for phase in config.phases:
        bags, rows = phase.bags, config.max_rows
        rows = rows if bags is None else ceil_div(bags.tokens, sample_shape(phase.recipe)[-1])
        num_bytes = rows * sample_bytes(phase.recipe)
        sizes.append(block_size(num_ranks, num_bytes))
        largest = max(largest, sizes[-1] * num_bytes if sizes[-1] > 1 else 0)
    return sizes, largest


def all_nodes_but(left_out: Iterable[str]) -> dict[str, str]:
    """Return the label selector that matches all nodes except those, given by their ids."""
    return {"ray.io/node-id": f"!in({','.join(left_out)})"}


def map_rows(
    blocks: Sequence[pa.Table], task: Callable[[pa.Table], dict[str, np.ndarray]], at_once: int | None = None
) -> ray.data.Dataset:
    """Return the dataset of `task(rows)` for each of `blocks`: a Ray task with a CPU each, retried if its process dies.

    The rows are sent with the task. With `at_once`, that many tasks run at a time, and they reserve no CPU. Reading and
    mapping have equal options, so that Ray Data fuses them into one task.
    """
    ray.data.DataContext.get_current().enable_progress_bars = False
    options: dict[str, Any] = {"num_cpus": 1 if at_once is None else 0, "max_retries": TASK_RETRIES}
    with warnings.catch_warnings():  # `max_retries` has no parameter of its own, and other ways are deprecated
        warnings.simplefilter("ignore", RayDeprecationWarning)
        source = ray.data.read_datasource(
            _Rows(blocks), override_num_blocks=len(blocks), ray_remote_args=options, concurrency=at_once
        )
        return source.map_batches(task, batch_size=None, batch_format="pyarrow", concurrency=at_once, **options)


class _Rows(Datasource):
    """A datasource of small tables, each sent within its read task."""

    def __init__(self, tables: Sequence[pa.Table]):
        self.tables = [(table.num_rows, packed(table)) for table in tables]

    def estimate_inmemory_data_size(self) -> int:
        """Return the bytes of all tables."""
        return sum(len(data) for _, data in self.tables)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return one task for each table."""
        return [
            ReadTask(
                Unpacked(data),
                BlockMetadata(num_rows=count, size_bytes=len(data), input_files=None, exec_stats=None),
                per_task_row_limit=per_task_row_limit,
            )
            for count, data in self.tables
        ]


@functools.lru_cache(maxsize=4)
def _rows(index: "ray.ObjectRef[pa.Table]") -> Rows:
    return Rows(_fetch(index))


@functools.lru_cache(maxsize=4)
def _by_length(index: "ray.ObjectRef[pa.Table]") -> np.ndarray:
    """Return the row numbers of an index from short to long samples; its column `frames` is their length."""
    order = np.argsort(_fetch(index).column("frames").to_numpy(), kind="stable")
    return order.astype(np.int32) if len(order) < 2**31 else order  # half the memory while the feeder lives


def _fetch(ref: Any) -> Any:
    return ray.get(ref, timeout=300)


# ------------------------------------------------------------------------------------------------- the feeder


class _Feeder:
    """The actor behind `feeder_of`: streams the blocks of its ranks and delivers their references in order."""

    def __init__(self) -> None:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self.began, self.ready = False, asyncio.Event()

    async def prepare(self, slots: int) -> None:
        """Start `slots` decoding processes and let them import what they need, before the phases are known."""
        threading.Thread(target=_prepare_decoding, args=(slots,), daemon=True, name="prepare").start()

    async def begin(self, config: FeedConfig, ranks: list[int]) -> bool:
        """Begin streaming in a background thread; return False if this feeder already did, for ranks that are gone."""
        if self.began:
            return False
        self.began = True
        self.config, self.ranks = config, ranks
        sizes, self.block_bytes = block_sizes(config, len(ranks))
        self.plan = blocks(config.phases, config.world, ranks, config.max_rows, sizes)  # lazy: there may be millions
        self.queues: dict[int, asyncio.Queue] = {rank: asyncio.Queue() for rank in ranks}
        ahead = max(STEPS_AHEAD * self._pieces_per_step(), *sizes, 1) * len(ranks)  # a block of each rank, or more
        self.room = threading.Semaphore(max(8, ahead))
        self.failure: RunFailed | None = None
        self.loop = asyncio.get_running_loop()
        threading.Thread(target=self._stream, daemon=True, name="feeder").start()
        self.ready.set()
        return True

    def _pieces_per_step(self) -> int:
        largest = max((phase.batch for phase in self.config.phases), default=1)
        if any(phase.bags is not None for phase in self.config.phases):
            return ceil_div(largest, self.config.world)
        return ceil_div(ceil_div(largest, self.config.world), self.config.max_rows)

    async def take(self, rank: int) -> tuple[list[Any], int]:
        """Return the next block of `rank`: ([reference], rows); raise RunFailed or StorageError if it ended."""
        await self.ready.wait()  # a rank may call before `begin` has arrived
        ref, num_rows, pieces = await self.queues[rank].get()
        if ref is None:
            self.queues[rank].put_nowait((None, 0, 0))
            raise self.failure or RunFailed("the data pipeline ended before the plan did")
        if pieces:
            self.room.release(pieces)
        return [ref], num_rows

    def _stream(self) -> None:
        try:
            for rank, ref, num_rows, pieces in self._blocks():
                for _ in range(pieces):
                    self.room.acquire()
                self.loop.call_soon_threadsafe(self.queues[rank].put_nowait, (ref, num_rows, pieces))
        except BaseException as error:  # noqa: BLE001  (whatever it is, ranks must get it instead of waiting)
            self.failure = failure_of(error)
        for queue in self.queues.values():
            self.loop.call_soon_threadsafe(queue.put_nowait, (None, 0, 0))

    def _blocks(self) -> Iterator[tuple[int, Any, int, int]]:
        """Yield all blocks in order: rank, reference, rows, microbatches. If Ray Data cuts a block, the microbatches
        come with its first part. The next execution is started when the current one has nothing left to begin."""
        with ThreadPoolExecutor(1) as starter:
            cut = self._next_cut()
            following: Future | None = starter.submit(self._execute, cut) if cut else None
            while cut:
                assert following is not None
                bundles, following, after = following.result(), None, self._next_cut()
                rows = iter([(block, block.num_rows) for block in cut])
                block, left = next(rows)
                done = 0
                for bundle in bundles:
                    for entry in bundle.blocks:
                        pieces = len(block.pieces) if left == block.num_rows else 0
                        yield block.rank, entry.ref, entry.metadata.num_rows, pieces
                        left -= entry.metadata.num_rows
                        if left == 0:
                            done += 1
                            block, left = next(rows, (block, 0))
                    if following is None and after and len(cut) - done <= 4 * self.config.decode_slots:
                        following = starter.submit(self._execute, after)
                if done != len(cut):
                    raise RunFailed(f"the data pipeline delivered {done} of {len(cut)} blocks")
                if following is None and after:
                    following = starter.submit(self._execute, after)
                cut = after

    def _next_cut(self) -> list[Block]:
        return list(itertools.islice(self.plan, self.config.blocks_per_execution))

    def _execute(self, cut: list[Block]) -> Iterator[Any]:
        """Start one Ray Data execution over `cut`, wait for its first bundle, and return its stream of bundles."""
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=self.config.decode_slots)
        if self.config.left_out:
            context.execution_options.label_selector = all_nodes_but(self.config.left_out)
        context.target_max_block_size = max(context.target_max_block_size or 0, self.block_bytes)  # larger ones are cut
        context.raise_original_map_exception = True
        context.execution_no_progress_timeout_s = -1  # training may pause for longer; a rank limits its own waits
        shared = decode_config(cut, self.config)
        at_once = None if self.config.decode_cpus else self.config.decode_slots
        dataset = map_rows(rows_of(cut, self.config), lambda rows: decode_block(rows, shared), at_once)
        bundles = iter(dataset.iter_internal_ref_bundles())
        first = next(bundles, None)
        return _chain(first, bundles)


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    if first is not None:
        yield first
    yield from rest


def failure_of(error: BaseException) -> RunFailed:
    """Return the root cause of a failed Ray task in one sentence; a StorageError, to be retried, if storage failed."""
    cause: Any = error
    while isinstance(cause, exceptions.RayTaskError) and cause.cause is not None and cause.cause is not cause:
        cause = cause.cause
    first = (str(cause).splitlines() or [type(cause).__name__])[0]  # Ray adds lines of its own
    if isinstance(cause, StorageError | UserError):  # opening a bucket that does not respond raises a UserError
        return StorageError(first)
    if isinstance(cause, RunFailed):
        return RunFailed(first)
    return RunFailed(f"the data pipeline failed: {type(cause).__name__}: {first}")


def start_feeders(
    config: FeedConfig, name: str, spare: str = "", node_of: Mapping[int, str] | None = None
) -> tuple[str, list[Any]]:
    """Start the feeders of a worker group as actors `name-0`, `name-1`, ...; returns that name and their handles.

    Each runs on the node of most of its ranks, if `node_of` (rank -> node) is given, else on this one.

    They live as long as the caller (rank 0) holds the handles; the other ranks find them by `feeder_of`. If one feeder
    is enough, the one that `spare_feeder` started under the name `spare` is used, unless it already serves ranks.
    """
    num = num_feeders(config.world, free_cpus(config.left_out))
    config = replace(config, decode_slots=max(1, config.decode_slots // num))
    if spare and num == 1 and (feeder := _begin_spare(config, spare)) is not None:
        return spare, [feeder]
    handles = []
    for group, node in enumerate(feeder_nodes(config.world, num, node_of or {})):
        feeder = _make_feeder(f"{name}-{group}", node)
        handles.append(feeder)
        feeder.begin.remote(config, list(feeder_ranks(config.world, num, group)))
    return name, handles


def free_cpus(left_out: Sequence[str] = ()) -> list[float]:
    """Return the free CPUs of each node that is not in `left_out`."""
    return [have.get("CPU", 0.0) for node, have in available_resources_per_node().items() if node not in left_out]


def spare_feeder(name: str, slots: int, environment: dict[str, Any]) -> Any:
    """Start a feeder under `name` before its ranks exist, with `slots` decoding processes; returns its handle.

    `environment` is the runtime environment of the ranks, which a feeder started by them inherits.
    """
    feeder = _make_feeder(f"{name}-0", runtime_env=environment)
    feeder.prepare.remote(slots)
    return feeder


def _make_feeder(name: str, node: str = "", **more: Any) -> Any:
    """Start a feeder on a node, by default this one, outside Ray Train's placement group."""
    there = NodeAffinitySchedulingStrategy(node or ray.get_runtime_context().get_node_id(), soft=True)
    # reserve one byte, because Ray ignores the strategy of an actor that requests no resources
    options = {"name": name, "num_cpus": 0, "memory": 1, "scheduling_strategy": there, "max_concurrency": 1000, **more}
    return ray.remote(_Feeder).options(**options).remote()


def _begin_spare(config: FeedConfig, name: str) -> Any:
    """Let the spare feeder of that name serve all ranks and return it; None if it is gone or has served others."""
    try:
        feeder = ray.get_actor(f"{name}-0")
    except ValueError:
        return None
    try:
        if ray.get(feeder.begin.remote(config, list(range(config.world))), timeout=config.wait_timeout_s):
            return feeder
    except exceptions.RayError:  # a new one is started
        pass
    ray.kill(feeder)
    return None


def _prepare_decoding(slots: int) -> None:
    numbers = [pa.table({"number": [number]}) for number in range(slots)]
    for _ in map_rows(numbers, lambda rows: {"number": rows["number"].to_numpy()}).iter_internal_ref_bundles():
        pass


def feeder_of(rank: int, world: int, num: int, name: str) -> Any:
    """Return the handle of the feeder actor that serves `rank`; the feeders were started under `name`."""
    group = next(g for g in range(num) if rank in feeder_ranks(world, num, g))
    return ray.get_actor(f"{name}-{group}")


# ---------------------------------------------------------------------------------------------- the rank's end


Ready = Callable[[Phase, int, Batch | None], Any]


class RankStream:
    """Iterates over the steps of one rank: yields (phase, step, batch), batch None if the rank has no rows.

    A thread fetches the step after the one in use, so that a wait here is a wait for decoding. If given,
    `ready(phase, step, batch)` is called in that thread, and its result is yielded instead of the batch.
    """

    def __init__(self, feeder: Any, config: FeedConfig, rank: int, ready: Ready | None = None):
        self.feeder, self.config, self.rank, self.ready = feeder, config, rank, ready
        self.rest: list[pa.Table] = []  # rows of later steps from a block that holds several

    def __iter__(self) -> Iterator[tuple[Phase, int, Any]]:
        steps = [
            (n, step) for n, phase in enumerate(self.config.phases) for step in range(phase.first_step, phase.num_steps)
        ]
        fetcher = ThreadPoolExecutor(1)
        try:
            following = fetcher.submit(self._collect, *steps[0]) if steps else None
            for i, (number, step) in enumerate(steps):
                assert following is not None
                batch = following.result()
                following = fetcher.submit(self._collect, *steps[i + 1]) if i + 1 < len(steps) else None
                yield self.config.phases[number], step, batch
        finally:
            fetcher.shutdown(wait=False, cancel_futures=True)

    def _collect(self, number: int, step: int) -> Any:
        """Return the batch of one step, after checking that its rows are the rank's own, passed through `ready`."""
        phase = self.config.phases[number]
        lo, hi = rank_slice(phase, step, self.rank, self.config.world)
        tables, deadline = self.rest, time.monotonic() + self.config.wait_timeout_s
        have = sum(table.num_rows for table in tables)
        while have < hi - lo:
            refs, num_rows = self._get(self.feeder.take.remote(self.rank), phase, step, deadline)
            tables.append(self._get(refs[0], phase, step, deadline))
            have += num_rows
        tables, self.rest = divided(tables, hi - lo)
        batch = batch_of(tables, phase) if tables else None
        if batch is not None and not np.array_equal(batch.position, np.arange(lo, hi)):
            raise RunFailed(
                f"rank {self.rank} got positions {batch.position[0]} to {batch.position[-1]} at step {step} of "
                f"{phase.name}, but its own are {lo} to {hi - 1}: this is a bug of the pipeline"
            )
        return batch if self.ready is None else self.ready(phase, step, batch)

    def _get(self, ref: Any, phase: Phase, step: int, deadline: float) -> Any:
        try:
            return ray.get(ref, timeout=max(0.1, deadline - time.monotonic()))
        except exceptions.GetTimeoutError:
            raise RunFailed(
                f"rank {self.rank} waited {self.config.wait_timeout_s:.0f} s for the data of {phase.name} epoch "
                f"{phase.epoch} step {step}: no decoding task delivered it, check that CPUs are free"
            ) from None
        except exceptions.RayTaskError as error:
            raise failure_of(error) from None
