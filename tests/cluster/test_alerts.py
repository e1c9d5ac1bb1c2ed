"""Alerts and panels on series as Ray's exporter writes them: names, labels, units, and when alerts fire."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from tests.cluster.promql import Series, evaluate
from tests.test_job import ROOT

from slimray.train.metrics import GAUGES

HOUR, MINUTE = 3600.0, 60.0
NOW = 10 * HOUR
RULES = {
    rule["alert"]: rule
    for group in yaml.safe_load((ROOT / "cluster/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
}
PANELS = [
    pytest.param(panel, id=f"{path.stem}-{panel['title']}")
    for path in sorted((ROOT / "cluster/grafana").glob("*.json"))
    for panel in json.loads(path.read_text())["panels"]
]
NODE = {"instance": "10.0.0.1:8080", "job": "ray", "SessionName": "session_1", "Version": "2.60.0"}
Value = Callable[[float], float | None]


def of_run(name: str, value: Value, worker: str = "a", run: str = "tsm") -> Series:
    """A gauge of slimray: Ray adds the labels of the process that set it, so each start is a series of its own."""
    labels = NODE | {"run": run, "WorkerId": worker, "JobId": "01000000", "Component": "core_worker"}
    return Series(f"ray_{name}", labels, value)


def of_node(name: str, value: Value, **labels: str) -> Series:
    return Series(name, NODE | {"NodeAddress": "10.0.0.1", **labels}, value)


def starts(times: list[float], name: str, value: Callable[[float, float], float]) -> list[Series]:
    """Return one series per start of a run; `value` of (time, start time), until half a minute after the run's end."""
    ends = [*times[1:], NOW + HOUR]
    return [
        of_run(name, lambda t, s=start, e=end: value(t, s) if s <= t < e + 30 else None, f"worker-{k}")
        for k, (start, end) in enumerate(zip(times, ends))
    ]


def steps(times: list[float], until: float = NOW) -> list[Series]:
    """A step every 20 seconds until `until`, counted from 0 after each start."""
    return starts(times, "slimray_step", lambda t, start: (min(t, until) - start) // 20 + 1)


def always(value: float) -> Value:
    return lambda time_s: value


def spilled(size: float) -> list[Series]:
    return [of_node("ray_object_store_memory", always(size / 2), Location=place, ObjectState="SEALED")
            for place in ("SPILLED", "MMAP_SHM")] + [
        of_node("ray_object_store_memory", always(size / 2), Location="SPILLED", ObjectState="UNSEALED")
    ]  # fmt: skip


def disk(free: float, used: float) -> list[Series]:
    return [of_node("ray_node_disk_free", always(free)), of_node("ray_node_disk_usage", always(used))]


def begun(times: list[float]) -> list[Series]:
    return starts(times, "slimray_start_time_s", lambda t, start: start)


FREQUENT = [NOW - 4 * HOUR, *(NOW - k * 10 * MINUTE for k in (4, 3, 2, 1))]
# For each alert: series on which it fires, and some on which it stays silent.
ALERTS: dict[str, tuple[list[list[Series]], list[list[Series]]]] = {
    "TrainingStandsStill": (
        [
            steps([NOW - 4 * HOUR], until=NOW - 25 * MINUTE),
            steps([NOW - 4 * HOUR, NOW - 30 * MINUTE], until=NOW - 25 * MINUTE),
        ],
        [
            steps([NOW - 4 * HOUR]),
            steps([NOW - 4 * HOUR, NOW - MINUTE]),
            steps([NOW - 5 * MINUTE], until=NOW - 4 * MINUTE),
            [of_run("slimray_step", lambda t: 500.0 if t < NOW - 25 * MINUTE else None)],
        ],
    ),
    "TrainingWaitsForData": (
        [[of_run("slimray_data_wait_fraction", always(0.3))]],
        [[of_run("slimray_data_wait_fraction", always(0.1))]],
    ),
    "TrainingStartsAgain": (
        [begun(FREQUENT)],
        [begun(FREQUENT[:-1]), begun([NOW - 4 * HOUR]), begun([NOW - k * HOUR for k in (8, 7, 6, 5, 4, 3, 2, 1, 0)])],
    ),
    "ObjectsAreSpilled": ([spilled(150e9)], [spilled(90e9)]),
    "DiskNearlyFull": ([disk(9e11, 9.1e12)], [disk(2e12, 8e12), disk(1, 0)]),
}


def fires(rule: dict[str, Any], series: list[Series], time_s: float = NOW) -> list[dict[str, str]]:
    """Return the labels for which the alert has held for the whole duration of `for`."""
    minutes = int(rule.get("for", "0m").removesuffix("m"))
    times = [time_s - k * 30 for k in range(2 * minutes + 1)]
    held = [set(evaluate(rule["expr"], series, one)) for one in times]
    return [dict(labels) for labels in set.intersection(*held)]


def test_every_alert_is_tried():
    assert set(ALERTS) == set(RULES)


@pytest.mark.parametrize("alert", sorted(RULES))
def test_an_alert_fires_on_its_trouble_and_on_nothing_else(alert):
    rule, (trouble, calm) = RULES[alert], ALERTS[alert]
    named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    assert named
    for series in trouble:
        (labels,) = fires(rule, series)
        assert named <= set(labels), "what the summary names is a label of the answer"
    for series in calm:
        assert fires(rule, series) == []


def test_a_reset_of_a_series_is_never_seen_as_each_start_has_its_own():
    """The previous expression, which could not fire."""
    assert evaluate("resets(ray_slimray_step[1h]) > 0", steps(FREQUENT), NOW) == {}
    assert evaluate("resets(ray_slimray_step[1h]) > 0", [of_run("slimray_step", lambda t: t // 20 % 30)], NOW)


UNITS = {"_fraction": "percentunit", "_per_s": "short", "_s": "s", "_bytes": "bytes"}  # the first that matches
OF_RAY = {"ray_node_gram_used": "mbytes", "ray_node_cpu_utilization": "percent", "ray_node_gpus_utilization": "percent",
          "ray_node_mem_used_host": "bytes", "ray_object_store_memory": "bytes", "ray_node_disk_free": "bytes",
          "ray_node_network_receive_speed": "Bps", "ray_node_network_send_speed": "Bps"}  # fmt: skip


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_has_the_unit_and_the_labels_of_its_numbers(panel):
    unit = panel["fieldConfig"]["defaults"]["unit"]
    for target in panel["targets"]:
        (name,) = set(re.findall(r"\b(?:ray|autoscaler)_\w+", re.sub(r"by \([^)]*\)", "", target["expr"])))
        expected = [one for end, one in UNITS.items() if name.endswith(end)] or [OF_RAY.get(name, "short")]
        assert unit == expected[0], name
        by = re.match(r"\w+ by \(([^)]*)\)|\w+\(", target["expr"])
        assert by is not None
        shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert shown <= {label.strip() for label in (by[1] or "").split(",")}, "what the legend names is kept"
        if name.removeprefix("ray_") in GAUGES:
            assert shown == {"run"}, "rank 0 alone sets these: there is no other label of ours"
            assert "rank" not in target["legendFormat"]


@pytest.mark.parametrize("panel", [one for one in PANELS if "ray_slimray" in str(one.values)])
def test_a_run_that_started_again_is_one_line_and_nothing_is_counted_twice(panel):
    """Right after a restart the series of the previous process still exists."""
    for target in panel["targets"]:
        (name,) = set(re.findall(r"ray_(slimray_\w+)", target["expr"]))
        series = [of_run(name, always(0.5), worker) for worker in ("before", "now")]
        series.append(of_run(name, always(0.25), run="other"))
        expression = target["expr"].replace("$run", ".*").replace("$instance", ".*")
        found = {dict(labels)["run"]: value for labels, value in evaluate(expression, series, NOW).items()}
        assert found == {"tsm": 0.5, "other": 0.25}
