"""Ray Data feeds the ranks: plan positions in, decoded uint8 batches out, in the plan's order.

A feeder actor serves a group of ranks. It turns a list of phases (data/plan.py) into numbered blocks and streams them
through Ray Data: one CPU task reads and decodes one block, whose rows of the index come with it, `preserve_order` keeps
the sequence, and the feeder hands the *reference* of each finished block to its rank, so that pixels never pass through
the feeder. Several epochs and the
validations between them share one execution, and the next execution starts before the last has drained: a restart
costs seconds, an epoch of a large batch may last eight. `RankStream` is the rank's end; it collects a step's rows,
checks that they are its own, and never waits without bound.
Sample failures stay in their slot (`valid` 0, `reason`); storage failures are retried, then raised.
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

from slimray.data.decode import decoded
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

TASK_RETRIES = 3  # of a task whose process died; Ray's own number is "for ever", and a file may be what kills it
STEPS_AHEAD = 2  # decoded steps kept ready for every rank


@dataclass(frozen=True)
class Source:
    """One split of a dataset as the pipeline reads it: where its files lie and, in the object store, its index."""

    root: str
    index: "ray.ObjectRef[pa.Table]"
    num_samples: int


@dataclass(frozen=True)
class FeedConfig:
    """Settings that all feeders of a run share. `max_rows` is the microbatch of one rank; times are seconds.

    `decode_cpus` is what a decoding task reserves: 1, or 0 where the workers of an elastic run hold every CPU there is
    (they then share the cores, as on a laptop; a reservation would wait for ever). Nodes `left_out` decode nothing.
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
    blocks_per_execution: int = 2000  # planning 2,000 read tasks takes about 1.5 s, while the execution before runs on


class Batch:
    """The rows of one step (or microbatch) of one rank, as numpy arrays that share memory with the object store.

    `data` and `label` `[n, ...]` as modality and target of the recipe have them, `sample` int64 `[n]` row in the index,
    `position` int64 `[n]` place in the plan, `valid` bool `[n]`, `path` and `reason` lists of str (reason ""
    where valid). Blocks of shorter samples are filled up with `pads`, of data and of labels.
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
        """Return rows [lo, hi) as a batch of its own, as long as the longest of them."""
        one = copy.copy(self)
        for name in ("position", "sample", "valid", "path", "reason"):
            setattr(one, name, getattr(self, name)[lo:hi])
        one.data, one.label = tight(self.data[lo:hi], self.label[lo:hi], pads)
        return one


def batch_of(tables: Sequence[pa.Table], phase: Phase) -> Batch:
    """Return rows of blocks as the batch of a step, as long as its own longest sample: a block may hold longer ones."""
    pads = pads_of(phase.recipe)
    batch = Batch(tables, pads)
    return batch if modality_of(phase.recipe).pad is None else batch.cut(0, len(batch), pads)


# ---------------------------------------------------------------------------------------- in the decoding tasks


def rows_of(cut: Sequence[Block], config: FeedConfig) -> list[pa.Table]:
    """Return what the decoding task of each block of `cut` is given: its rows of the index, and where they belong."""
    index = {split: source.index for split, source in config.sources.items()}
    return rows_of_blocks(
        cut, config.phases, config.seed, lambda split: _rows(index[split]), lambda split: _by_length(index[split])
    )


def decode_block(rows: pa.Table, config: FeedConfig) -> dict[str, np.ndarray]:
    """Decode one block: `rows` are those that `rows_of` gives."""
    phase = config.phases[rows.column("phase")[0].as_py()]
    source = config.sources[phase.split]
    return decoded(rows, phase, source.root, source.index.hex(), config.seed, config.decode_timeout_s)


def block_sizes(config: FeedConfig, num_ranks: int) -> tuple[list[int], int]:
    """Return of how many microbatches a block of each phase is for a feeder of `num_ranks`, and the bytes of the
    largest that is of several."""
    sizes, largest = [], 0
    for phase in config.phases:
        bags, rows = phase.bags, config.max_rows
        rows = rows if bags is None else ceil_div(bags.tokens, sample_shape(phase.recipe)[-1])
        num_bytes = rows * sample_bytes(phase.recipe)
        sizes.append(block_size(num_ranks, num_bytes))
        largest = max(largest, sizes[-1] * num_bytes if sizes[-1] > 1 else 0)
    return sizes, largest


def all_nodes_but(left_out: Iterable[str]) -> dict[str, str]:
    """Return the label selector of every node but those, by their ids."""
    return {"ray.io/node-id": f"!in({','.join(left_out)})"}


def map_rows(
    blocks: Sequence[pa.Table], task: Callable[[pa.Table], dict[str, np.ndarray]], at_once: int | None = None
) -> ray.data.Dataset:
    """Return the dataset of `task(rows)` for each of `blocks`: a Ray task with a CPU each, retried if its process dies.

    The rows travel with the task. With `at_once` that many tasks run at a time, and reserve no CPU. Reading and mapping
    have equal options, because Ray Data then makes one task of both.
    """
    ray.data.DataContext.get_current().enable_progress_bars = False
    options: dict[str, Any] = {"num_cpus": 1 if at_once is None else 0, "max_retries": TASK_RETRIES}
    source = ray.data.read_datasource(
        _Rows(blocks), override_num_blocks=len(blocks), ray_remote_args=options, concurrency=at_once
    )
    with warnings.catch_warnings():  # `max_retries` has no parameter of its own, and other ones are deprecated
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return source.map_batches(task, batch_size=None, batch_format="pyarrow", concurrency=at_once, **options)


class _Rows(Datasource):
    """Tables of a few rows, each in the read task that gives it."""

    def __init__(self, tables: Sequence[pa.Table]):
        self.tables = [(table.num_rows, packed(table)) for table in tables]

    def estimate_inmemory_data_size(self) -> int:
        """The bytes of all tables."""
        return sum(len(data) for _, data in self.tables)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A task for each table."""
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
    """The rows of an index from short samples to long ones; its column `frames` is their length."""
    order = np.argsort(_fetch(index).column("frames").to_numpy(), kind="stable")
    return order.astype(np.int32) if len(order) < 2**31 else order  # half as much, for as long as the feeder lives


def _fetch(ref: Any) -> Any:
    return ray.get(ref, timeout=300)


# ------------------------------------------------------------------------------------------------- the feeder


class _Feeder:
    """The actor behind `feeder_of`: streams the blocks of its ranks and hands out their references in order."""

    def __init__(self) -> None:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self.began, self.ready = False, asyncio.Event()

    async def prepare(self, slots: int) -> None:
        """Have `slots` processes for decoding import what they need, before it is known what is decoded."""
        threading.Thread(target=_prepare_decoding, args=(slots,), daemon=True, name="prepare").start()

    async def begin(self, config: FeedConfig, ranks: list[int]) -> bool:
        """Begin streaming in a background thread; False if this feeder did so before, for ranks that are gone."""
        if self.began:
            return False
        self.began = True
        self.config, self.ranks = config, ranks
        sizes, self.block_bytes = block_sizes(config, len(ranks))
        self.plan = blocks(config.phases, config.world, ranks, config.max_rows, sizes)  # lazily: there may be millions
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
        """The next block of `rank`: ([reference], rows). Raises what ended the pipeline: RunFailed, StorageError."""
        await self.ready.wait()  # a rank may ask before the call that begins is here
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
        except BaseException as error:  # noqa: BLE001  (whatever it is, the ranks must hear of it instead of waiting)
            self.failure = failure_of(error)
        for queue in self.queues.values():
            self.loop.call_soon_threadsafe(queue.put_nowait, (None, 0, 0))

    def _blocks(self) -> Iterator[tuple[int, Any, int, int]]:
        """All blocks in order: rank, reference, rows and microbatches, the latter with the first part of one that Ray
        Data has cut. The next execution is started when the current one has nothing left to begin."""
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
        """Start one Ray Data execution over `cut` and return its stream of bundles, the first one already there."""
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=self.config.decode_slots)
        if self.config.left_out:
            context.execution_options.label_selector = all_nodes_but(self.config.left_out)
        context.target_max_block_size = max(context.target_max_block_size or 0, self.block_bytes)  # it cuts larger ones
        context.raise_original_map_exception = True
        context.execution_no_progress_timeout_s = -1  # training may pause longer; a rank's wait has its own bound
        config = self.config
        at_once = None if config.decode_cpus else config.decode_slots
        dataset = map_rows(rows_of(cut, config), lambda rows: decode_block(rows, config), at_once)
        bundles = iter(dataset.iter_internal_ref_bundles())
        first = next(bundles, None)
        return _chain(first, bundles)


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    if first is not None:
        yield first
    yield from rest


def failure_of(error: BaseException) -> RunFailed:
    """Return the root cause of a failed Ray task in a sentence; a StorageError, to be retried, if storage failed."""
    cause: Any = error
    while isinstance(cause, exceptions.RayTaskError) and cause.cause is not None and cause.cause is not cause:
        cause = cause.cause
    first = (str(cause).splitlines() or [type(cause).__name__])[0]  # Ray adds lines of its own
    if isinstance(cause, StorageError | UserError):  # a bucket that did not answer when it was opened is a UserError
        return StorageError(first)
    if isinstance(cause, RunFailed):
        return RunFailed(first)
    return RunFailed(f"the data pipeline failed: {type(cause).__name__}: {first}")


def start_feeders(
    config: FeedConfig, name: str, spare: str = "", node_of: Mapping[int, str] | None = None
) -> tuple[str, list[Any]]:
    """Start the feeders of a worker group as actors `name-0`, `name-1`, ...; returns that name and their handles.

    Each runs where most of its ranks do, as far as `node_of` (rank -> node) says, else here.

    They live as long as the caller (rank 0) holds the handles; `feeder_of` finds them from the other ranks. Where one
    feeder is enough it is the one that `spare_feeder` started under the name `spare`, if that serves nobody yet.
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
    """Return the CPUs that nothing holds now of each node but those."""
    return [have.get("CPU", 0.0) for node, have in available_resources_per_node().items() if node not in left_out]


def spare_feeder(name: str, slots: int, environment: dict[str, Any]) -> Any:
    """Start a feeder under `name` before its ranks live, and `slots` processes for decoding; returns its handle.

    `environment` is the runtime environment of the ranks, which a feeder that they start has by itself.
    """
    feeder = _make_feeder(f"{name}-0", runtime_env=environment)
    feeder.prepare.remote(slots)
    return feeder


def _make_feeder(name: str, node: str = "", **more: Any) -> Any:
    """Start a feeder on a node, by default this one, and outside of the group of Train."""
    there = NodeAffinitySchedulingStrategy(node or ray.get_runtime_context().get_node_id(), soft=True)
    # a byte: Ray puts an actor that asks for nothing on any node, whatever its strategy prefers
    options = {"name": name, "num_cpus": 0, "memory": 1, "scheduling_strategy": there, "max_concurrency": 1000, **more}
    return ray.remote(_Feeder).options(**options).remote()


def _begin_spare(config: FeedConfig, name: str) -> Any:
    """The spare feeder of that name, which now serves all ranks; None if it served others before, or is gone."""
    try:
        feeder = ray.get_actor(f"{name}-0")
    except ValueError:
        return None
    try:
        if ray.get(feeder.begin.remote(config, list(range(config.world))), timeout=config.wait_timeout_s):
            return feeder
    except exceptions.RayError:  # another one is started
        pass
    ray.kill(feeder)
    return None


def _prepare_decoding(slots: int) -> None:
    numbers = [pa.table({"number": [number]}) for number in range(slots)]
    for _ in map_rows(numbers, lambda rows: {"number": rows["number"].to_numpy()}).iter_internal_ref_bundles():
        pass


def feeder_of(rank: int, world: int, num: int, name: str) -> Any:
    """The handle of the feeder actor that serves `rank`; the feeders were started under `name`."""
    group = next(g for g in range(num) if rank in feeder_ranks(world, num, g))
    return ray.get_actor(f"{name}-{group}")


# ---------------------------------------------------------------------------------------------- the rank's end


Ready = Callable[[Phase, int, Batch | None], Any]


class RankStream:
    """Iterates over the steps of one rank: yields (phase, step, batch), batch None where the rank has no rows.

    The step after the one in use is fetched by a thread, so that waiting here is waiting for decoding. That thread
    calls `ready(phase, step, batch)` too: what it returns comes in place of the batch.
    """

    def __init__(self, feeder: Any, config: FeedConfig, rank: int, ready: Ready | None = None):
        self.feeder, self.config, self.rank, self.ready = feeder, config, rank, ready
        self.rest: list[pa.Table] = []  # of a block that holds several steps

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
        """The rank's rows of one step, checked to be its own, and ready."""
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
                f"{phase.name}, its own are {lo} to {hi - 1}: a fault of the pipeline"
            )
        return batch if self.ready is None else self.ready(phase, step, batch)

    def _get(self, ref: Any, phase: Phase, step: int, deadline: float) -> Any:
        try:
            return ray.get(ref, timeout=max(0.1, deadline - time.monotonic()))
        except exceptions.GetTimeoutError:
            raise RunFailed(
                f"rank {self.rank} waited {self.config.wait_timeout_s:.0f} s for the data of {phase.name} epoch "
                f"{phase.epoch} step {step}: no decoding task delivered it (are there free CPUs?)"
            ) from None
        except exceptions.RayTaskError as error:
            raise failure_of(error) from None
