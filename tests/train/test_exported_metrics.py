"""The metrics of a run that Prometheus gets, read from Ray's real exporter on loopback."""

import re
import socket
import urllib.request

import pytest
import ray
from tests.test_job import ROOT
from tests.waits import patience, wait_for

from slimray.train.metrics import GAUGES, Gauges


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("no_ray")
def test_dashboards_and_alerts_ask_for_numbers_that_the_exporter_has(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init("local", num_cpus=1, include_dashboard=False, _metrics_export_port=port, log_to_driver=False)
    try:
        row = {"train/samples_per_s": 40.0, "train/loss": 1.5, "time/step_s": 0.5, "data/wait_s": 0.1}
        Gauges("exported").show(30, row | {"time/communication_s": 0.05})
        found: dict[str, float] = {}

        def read() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=patience(10)) as answer:
                    text = answer.read().decode()
            except OSError:
                return False
            lines = re.findall(r'^(ray_slimray_\w+)\{.*run="exported".*\} (\S+)$', text, re.MULTILINE)
            found.update({name: float(value) for name, value in lines})
            return len(found) == len(GAUGES)

        wait_for("the exporter to have all gauges", read, 60)
    finally:
        ray.shutdown()
    assert found["ray_slimray_data_wait_fraction"] == pytest.approx(0.2)
    assert found["ray_slimray_communication_fraction"] == pytest.approx(0.1)
    assert (found["ray_slimray_step"], found["ray_slimray_step_s"]) == (30, 0.5)
    files = [ROOT / "cluster/alerts.yml", *(ROOT / "cluster/grafana").glob("*.json")]
    asked = {name for path in files for name in re.findall(r"\bray_slimray_\w+", path.read_text())}
    assert asked == set(found), "what is asked for is exported, and what is exported is shown"
