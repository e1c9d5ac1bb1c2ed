"""The two limits beyond a thousand ranks, with Ray's own actors: the barrier, and the allocation of CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray
import ray.train
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor
from tests.waits import patience

from slimray.data.plan import num_feeders
from slimray.train import workers
from slimray.train.spec import ScaleSpec

WORLD, NODES, CPUS, GPUS = 1536, 192, 96, 8


@contextmanager
def requests_of(executions: int) -> Iterator[_AutoscalingCoordinatorActor]:
    """Return Ray's coordinator on a cluster of 192 nodes, with requests of 1,536 workers and so many executions."""
    nodes = [
        {"NodeID": f"{i:03d}", "Alive": True, "Resources": {"CPU": CPUS, "GPU": GPUS}, "Labels": {}}
        for i in range(NODES)
    ]
    coordinator = _AutoscalingCoordinatorActor(
        send_resources_request=lambda *what, **how: None, get_cluster_nodes=lambda: nodes
    )
    high = ResourceRequestPriority.HIGH
    coordinator.request_resources("train", [{"CPU": 4, "GPU": 1}] * WORLD, 3600, priority=high)
    for number in range(executions):
        coordinator.request_resources(f"data-{number}", [{"CPU": 1}], 3600, request_remaining=["CPU", "GPU", "memory"])
    yield coordinator


def cpus_of(coordinator: _AutoscalingCoordinatorActor, requester: str) -> float:
    return sum(one.get("CPU", 0) for one in coordinator.get_reserved_resources(requester).values())


def test_every_execution_of_1536_ranks_gets_cpus():
    free = [CPUS - 4 * GPUS] * NODES
    feeders = num_feeders(WORLD, free)
    assert feeders == 16
    for executions in (feeders, 2 * feeders):  # each has two while one replaces the other
        with requests_of(executions) as coordinator:
            got = [cpus_of(coordinator, f"data-{number}") for number in range(executions)]
            assert cpus_of(coordinator, "train") == 4 * WORLD
        assert min(got) >= NODES * ((CPUS - 4 * GPUS) // executions), got
        assert sum(got) >= 0.8 * sum(free)


def test_an_execution_per_node_would_get_none():
    with requests_of(100) as coordinator:
        got = [cpus_of(coordinator, f"data-{number}") for number in range(100)]
    assert min(got) <= 1


@pytest.mark.parametrize(
    ("ranks", "asked", "seconds"),
    [(1, None, 0.5), (2, "0.1", 0.1), (64, None, 0.5), (256, None, 1.28), (1536, "2", 7.68)],
)
def test_the_controller_looks_less_often_at_many_workers(ranks, asked, seconds):
    assert workers.poll_s(ranks, asked) == pytest.approx(seconds)


def _meet(config: dict) -> int:
    """Call the barrier that the controller made as each of `world` ranks at once, in the single worker."""
    from ray.train.v2._internal.execution.context import get_train_context

    actor, world = get_train_context().get_synchronization_actor(), config["world"]
    said = ["met", *[None] * (world - 1)]
    calls = [actor.broadcast_from_rank_zero.remote(rank, world, said[rank], "test") for rank in range(world)]
    return sum(answer == "met" for answer in ray.get(calls, timeout=patience(200)))


@pytest.mark.ray
@pytest.mark.benchmark
@pytest.mark.timeout(400)
def test_1536_callers_pass_the_barrier_that_the_controller_made():
    workers.connect(2)
    try:
        met = workers.launch(_meet, {"world": WORLD}, ScaleSpec(workers=1, retries=0), "barrier")
    finally:
        ray.shutdown()
    assert met == WORLD
