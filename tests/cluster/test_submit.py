"""From `slimray submit` to the result, on raylets of one machine that Ray's real autoscaler adds and removes."""

import json
import socket
import subprocess
import urllib.request

import pytest
from tests.verbs.conftest import DATA, Shell, train_yaml
from tests.waits import patience, wait_for

from slimray import runs

pytestmark = [pytest.mark.ray, pytest.mark.benchmark, pytest.mark.timeout(480)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_job_goes_from_submit_to_its_result_while_nodes_come_and_go(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("RAY_ADDRESS", "SLIMRAY_STORAGE", "SLIMRAY_CLUSTER", "SECRET_OF_NOBODY"):
        monkeypatch.delenv(name, raising=False)
    shell, port = Shell(tmp_path), free_port()
    shell.write("chain.yaml", f"{DATA}\n---{train_yaml('tsm')}")
    here = f"kind: local\nidle_timeout_s: 6\nport: {free_port()}\ndashboard_port: {port}\n"
    shell.write("here.yaml", here)
    shell.write("closed.yaml", f"{here}secrets: [SECRET_OF_NOBODY]\n")
    on = ("--cluster", "./here.yaml")

    def nodes() -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v0/nodes", timeout=patience(20)) as answer:
            found = json.load(answer)["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in found)

    try:
        assert f"here: running at http://127.0.0.1:{port}" in shell.ok("cluster", "start", "./here.yaml")
        assert nodes() == 1, "the head, which runs no work"
        refuse(shell, "needs 2 GPUs, but here.yaml can have at most 0", *on, "--set", "scale.gpus_per_worker=1")
        refuse(shell, "SECRET_OF_NOBODY: is not set on this cluster", "--cluster", "./closed.yaml")

        job = shell.start("submit", "chain.yaml", *on, "--follow")
        wait_for("the autoscaler's two nodes beside the head", lambda: nodes() == 3)
        out, err = job.communicate(timeout=patience(300))
        assert job.returncode == 0, out + err
        assert "tsm-2: submitted to here" in out, "the one without its secret was attempt 1"
        assert "tsm: done in" in out
        for name in ("data", "tsm"):
            assert (runs.read_status(runs.open_run(str(shell.storage), name)) or pytest.fail(name)).state == "finished"
        assert (shell.storage / "tsm/model/weights.safetensors").is_file()

        rows = json.loads(shell.ok("status", "--json", *on))
        assert [(row["id"], row["status"]) for row in rows] == [("tsm-1", "failed"), ("tsm-2", "succeeded")]
        assert "already finished, skipped" in shell.ok("submit", "chain.yaml", *on, "-f")
        wait_for("the idle nodes to go", lambda: nodes() == 1)

        shell.write("long.yaml", train_yaml("long", epochs=200))
        started = shell.ok("submit", "long.yaml", *on)
        assert "next: slimray logs -f long-1 --cluster ./here.yaml" in started
        running = shell.run("submit", "long.yaml", "--unchecked", *on)
        assert (running.returncode, "long-1 is already running" in running.stderr) == (2, True)
        assert "long: is being stopped" in shell.ok("stop", "long", *on)
        ended = shell.run("logs", "-f", "long", *on)
        assert (ended.returncode, "long-1 was stopped, submit it again to resume it" in ended.stderr) == (1, True)
    finally:
        state = next((tmp_path / "cache").rglob("here.json"), None)
        leader = json.loads(state.read_text())["pid"] if state else None
        stopped = shell.run("cluster", "stop", "./here.yaml")
    assert stopped.stdout == "here: stopped\n", stopped.stderr
    left = subprocess.run(["ps", "-eo", "pgid,stat,args"], capture_output=True, text=True).stdout.splitlines()[1:]
    assert [line for line in left if line.split()[0] == str(leader) and not line.split()[1].startswith("Z")] == []


def refuse(shell: Shell, sentence: str, *arguments: str) -> None:
    done = shell.run("submit", "chain.yaml", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
