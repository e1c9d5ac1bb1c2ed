"""One training with random injected faults: an announced preemption of a node, and a killed driver."""

from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from tests.chaos import Site, compare, disturbed, outcome
from tests.faulty_s3 import faulty_s3
from tests.waits import patience

SEED = 8


@pytest.mark.ray
@pytest.mark.benchmark
@pytest.mark.timeout(500)
@pytest.mark.usefixtures("no_ray")
def test_a_drained_node_and_a_killed_driver_change_no_bit(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        with faulty_s3() as faults:
            site = Site.build(cluster, faults, tmp_path)
            calm = site.start("calm", "2")
            out, err = calm.communicate(timeout=patience(200))
            assert calm.returncode == 0, out + err
            events, workers = disturbed(site, "disturbed", SEED)
            assert events == ["drain a node", "kill the driver"]
            told = compare(outcome(site, "calm"), "disturbed", outcome(site, "disturbed"), workers)
            assert told == "same bits"
    finally:
        ray.shutdown()
        cluster.shutdown()
