"""A feeder gives every rank its own positions of the plan in order, across phases and Ray Data executions."""

import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.annotations import RayDeprecationWarning
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tests.waits import patience, wait_for

from slimray.data.decode import decode_block
from slimray.data.index import index_table
from slimray.data.pipeline import (
    FeedConfig,
    RankStream,
    Source,
    block_sizes,
    decode_config,
    feeder_of,
    map_rows,
    rows_of,
    start_feeders,
)
from slimray.data.plan import RANKS_AT_ONCE, Block, Phase, epoch_order, rank_slice
from slimray.data.points.clouds import Cloud, write_cloud
from slimray.data.points.recipe import PointRecipe
from slimray.spec import RunFailed
from slimray.train import workers

pytestmark = [pytest.mark.ray, pytest.mark.timeout(200)]

NUM, BATCH, WORLD = 21, 8, 2
RECIPE = PointRecipe(num_points=4, mode="val").to_dict()


@pytest.fixture(scope="module")
def cluster() -> None:
    workers.connect(2)


def clouds(folder) -> pa.Table:
    """Write NUM clouds as files, with all points of a cloud at x = its number."""
    for i in range(NUM):
        (folder / f"{i}.npz").write_bytes(write_cloud(Cloud(np.full((5, 3), i, np.float32) + np.eye(5, 3) / 9)))
    return index_table([{"path": f"{i}.npz", "label": i} for i in range(NUM)])


def feed(folder, table: pa.Table, blocks_per_execution: int) -> FeedConfig:
    phases = tuple(
        Phase(
            name,
            "all",
            epoch,
            NUM,
            BATCH,
            name == "train",
            RECIPE,
            first_step=1 if (name, epoch) == ("train", 0) else 0,
        )
        for epoch in range(3)
        for name in ("train", "val")
    )
    source = Source(str(folder), ray.put(table), NUM)
    return FeedConfig(phases, {"all": source}, 7, WORLD, 3, 2, blocks_per_execution=blocks_per_execution)


def consume(config: FeedConfig, name: str) -> list[list[tuple[str, int, int, list[int]]]]:
    """Return what each rank received: (phase, epoch, step, samples), with samples read off their points, -1 if bad."""
    _, feeders = start_feeders(config, name)

    def rank_sees(rank: int) -> list[tuple[str, int, int, list[int]]]:
        stream = RankStream(feeder_of(rank, config.world, len(feeders), name), config, rank)
        return [
            (
                phase.name,
                phase.epoch,
                step,
                []
                if batch is None
                else np.where(batch.valid, np.floor(batch.data[:, 0, 0].min(1)), -1).astype(int).tolist(),
            )
            for phase, step, batch in stream
        ]

    with ThreadPoolExecutor(config.world) as pool:
        return list(pool.map(rank_sees, range(config.world)))


@pytest.mark.parametrize("at_once", [None, 2])
def test_a_block_is_read_and_mapped_by_one_task(cluster, at_once):
    blocks = [pa.table({"number": [number]}) for number in range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RayDeprecationWarning)  # a user would see it
        dataset = map_rows(blocks, lambda rows: {"number": rows["number"].to_numpy() + 1}, at_once)
    done = dataset.materialize()
    assert sorted(row["number"] for row in done.take_all()) == [1, 2, 3, 4, 5, 6]
    operators = [line for line in done.stats().splitlines() if line.startswith("Operator ") and "executed" in line]
    assert len(operators) == 1
    assert "6 tasks executed" in operators[0]


@pytest.mark.parametrize("blocks_per_execution", [2000, 5])
def test_every_rank_sees_its_own_samples_in_order(cluster, tmp_path, blocks_per_execution):
    config = feed(tmp_path, clouds(tmp_path), blocks_per_execution)
    seen = consume(config, f"feeder-{blocks_per_execution}")
    for rank in range(WORLD):
        wanted = []
        for phase in config.phases:
            order = epoch_order(NUM, 7, phase.epoch, phase.shuffle)
            for step in range(phase.first_step, phase.num_steps):
                lo, hi = rank_slice(phase, step, rank, WORLD)
                wanted.append((phase.name, phase.epoch, step, order[lo:hi].tolist()))
        assert seen[rank] == wanted


def test_ranks_of_which_blocks_hold_several_steps_see_their_own_samples_too(cluster, tmp_path):
    """Start in mid-epoch, with ranks without rows at some steps, a short last step, two executions, and a bad file."""
    world, num, batch = 2 * RANKS_AT_ONCE + 1, 20 * NUM, 90
    clouds(tmp_path)
    (tmp_path / "5.npz").write_bytes(b"damaged")
    table = index_table([{"path": f"{i % NUM}.npz", "label": i % NUM} for i in range(num)])
    phases = (
        Phase("train", "all", 0, num, batch, True, RECIPE, first_step=1),
        Phase("val", "all", 0, RANKS_AT_ONCE, batch, False, RECIPE),
        Phase("train", "all", 1, num, batch, True, RECIPE),
    )
    config = FeedConfig(phases, {"all": Source(str(tmp_path), ray.put(table), num)}, 7, world, 4, 2)
    assert block_sizes(config, world)[0] == [3, 3, 3]
    seen = consume(replace(config, blocks_per_execution=60), "feeder-several")
    for rank in range(world):
        wanted = []
        for phase in phases:
            order = epoch_order(phase.num_samples, 7, phase.epoch, phase.shuffle) % NUM
            for step in range(phase.first_step, phase.num_steps):
                samples = order[slice(*rank_slice(phase, step, rank, world))]
                wanted.append((phase.name, phase.epoch, step, np.where(samples == 5, -1, samples).tolist()))
        assert seen[rank] == wanted


def test_a_file_that_is_gone_ends_the_stream_of_every_rank_with_its_name(cluster, tmp_path):
    config = feed(tmp_path, clouds(tmp_path), 5)
    (tmp_path / "3.npz").unlink()
    with pytest.raises(RunFailed, match=r"a file of the index is missing \(.*/3\.npz\)"):
        consume(config, "feeder-gone")


def test_a_training_file_that_does_not_decode_is_not_decoded_again(cluster, tmp_path):
    """Each decoding may take `decode_timeout_s`; a validation sample is decoded each time."""
    index = clouds(tmp_path)
    good = (tmp_path / "1.npz").read_bytes()
    source = Source(str(tmp_path), ray.put(index), NUM)
    phases = tuple(Phase(name, name, 0, NUM, NUM, False, RECIPE) for name in ("train", "val"))
    config = FeedConfig(phases, {"train": source, "val": source}, 0, 1, NUM, 1)
    cut = [Block(phase, 0, 0, 0, NUM) for phase in (0, 1)]
    rows, shared = rows_of(cut, config), decode_config(cut, config)
    (tmp_path / "1.npz").write_bytes(b"damaged")
    for number in (0, 1):
        assert decode_block(rows[number], shared)["valid"].tolist() == [1, 0] + [1] * (NUM - 2)
    (tmp_path / "1.npz").write_bytes(good)
    again = decode_block(rows[0], shared)
    assert again["valid"].tolist() == [1, 0] + [1] * (NUM - 2), "it keeps its slot with weight 0"
    assert again["reason"][1]
    assert decode_block(rows[1], shared)["valid"].all()


def test_what_a_decoding_task_unpickles_is_no_larger_for_a_thousand_epochs_and_holds_no_reference(cluster, tmp_path):
    source = Source(str(tmp_path), ray.put(clouds(tmp_path)), NUM)
    data = []
    for epochs in (2, 1000):
        phases = tuple(Phase("train", "all", epoch, NUM, BATCH, True, RECIPE) for epoch in range(epochs))
        config = FeedConfig(phases, {"all": source}, 0, WORLD, BATCH, 1)
        data.append(pickle.dumps(decode_config([Block(1, 0, 0, 0, 4)], config)))
    assert len(data[0]) == len(data[1])
    assert b"ObjectRef" in pickle.dumps(source)
    assert b"ObjectRef" not in data[1]


@ray.remote(num_cpus=0)
def _node_asked_from(first: str, *others: str) -> str:
    """Return the node of a task with affinity to the last of these nodes, started by one with affinity to the first."""
    if not others:
        return ray.get_runtime_context().get_node_id()
    there = NodeAffinitySchedulingStrategy(others[0], soft=True)
    return ray.get(_node_asked_from.options(scheduling_strategy=there).remote(*others))


def test_feeders_run_where_their_ranks_do(tmp_path):
    """Run on a separate cluster of two nodes; the last test of this file, as it ends the other cluster."""
    ray.shutdown()
    two = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
    try:
        two.add_node(num_cpus=8)
        ray.init(two.address, log_to_driver=False)
        here, there = sorted(node["NodeID"] for node in ray.nodes())
        start = NodeAffinitySchedulingStrategy(there, soft=False)
        asked = _node_asked_from.options(scheduling_strategy=start)
        wait_for(
            "the nodes to know each other",
            lambda: (
                ray.get(asked.remote(there, here)) == here and ray.get(_node_asked_from.remote(here, there)) == there
            ),
        )
        config = FeedConfig((), {}, 0, 128, 1, 2)
        node_of = dict.fromkeys(range(60), here) | dict.fromkeys(range(60, 128), there)
        _, feeders = start_feeders(config, "feeder-places", node_of=node_of)
        found = [feeder.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for feeder in feeders]
        assert ray.get(found, timeout=patience(60)) == [here, there]
        for rank, feeder in ((0, feeders[0]), (127, feeders[1])):
            with pytest.raises(RunFailed, match="ended before the plan did"):
                ray.get(feeder.take.remote(rank), timeout=patience(60))
    finally:
        ray.shutdown()
        two.shutdown()
