"""Several raylets on this machine, added and removed by Ray's real autoscaler.

The head is a process group of its own, recorded in a state file, so that a later command can end exactly that group.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from slimray.cluster.jobs_api import get, token_path
from slimray.cluster.specs import LocalCluster, RayUpCluster, Target
from slimray.runs import lock
from slimray.spec import RunFailed, UserError, dump_yaml

HEAD_NODE_ID = "f" * 51 + "00000"  # node id of the head in the autoscaler's provider for one machine


def autoscaling_config(cluster: LocalCluster) -> dict[str, Any]:
    """Return the autoscaler's config for several raylets on one machine, with all the legacy lists that it requires."""
    worker = {"min_workers": cluster.min_nodes, "max_workers": cluster.max_nodes}
    empty = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    empty += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")
    return {
        "cluster_name": "slimray-local",
        "max_workers": cluster.max_nodes,
        "upscaling_speed": 100,
        "idle_timeout_minutes": cluster.idle_timeout_s / 60,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": HEAD_NODE_ID,
            "gcs_address": f"127.0.0.1:{cluster.port}",
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
            "worker": {"resources": {"CPU": cluster.node_cpus}, "node_config": {}, **worker},
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{name: [] for name in empty},
    }


START_TIMEOUT_S = 90  # of a head on this machine
STOP_GRACE_S = 5


def start_local(target: Target) -> str:
    """Start the head of a `local` cluster, with Ray's autoscaler, as a process group of its own; return its address.

    Raises UserError if it is already running or a port is in use, and RunFailed, with the last line of its log, if it
    does not start.
    """
    cluster = _local(target)
    if _running(target.name) is not None:
        raise UserError(
            f"{target.where}: is already running at {cluster.address} (`slimray cluster stop {target.name}` stops it)"
        )
    for field, port in (("port", cluster.port), ("dashboard_port", cluster.dashboard_port)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                raise UserError(f"{target.where}: {field}: {port} is in use by another program, choose another port")
    folder = _state_folder()
    folder.mkdir(parents=True, exist_ok=True)
    config, log_file = folder / f"{target.name}.autoscaler.yaml", folder / f"{target.name}.log"
    config.write_text(dump_yaml(autoscaling_config(cluster)))
    head = HEAD_NODE_ID
    env = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": head,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # the whole cluster stops, there is no node to drain to
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # `python` of its jobs
    }
    env.pop("RAY_ADDRESS", None)
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    if env.get("RAY_AUTH_MODE") != "disabled":
        env["RAY_AUTH_MODE"] = "token"
        subprocess.run([*ray, "get-auth-token", "--generate"], env=env, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL, check=True, timeout=START_TIMEOUT_S)  # fmt: skip
        with contextlib.suppress(OSError):  # a token from the environment has no file
            token_path().chmod(0o600)  # Ray leaves it world-readable
    command = [*ray, "start", "--head", "--block", "--port", str(cluster.port), "--num-cpus", "0"]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(cluster.dashboard_port)]
    command += ["--autoscaling-config", str(config)]
    with open(log_file, "w") as out:
        child = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_for_head(child, target, log_file)
        state = {"pid": child.pid, "born": _born(child.pid), "address": cluster.address, "port": cluster.port}
        _state_file(target.name).write_text(json.dumps(state))
    except BaseException:
        _end_group(child.pid)
        raise
    return cluster.address


def stop_local(target: Target) -> bool:
    """End the processes that `start_local` started, and no others; return False if there were none."""
    _local(target)
    state = _running(target.name)
    if state is not None:
        _end_group(state["pid"])
    _state_file(target.name).unlink(missing_ok=True)
    return state is not None


def _local(target: Target) -> LocalCluster:
    if not isinstance(target.cluster, LocalCluster):
        tool = "`ray up` and `ray down`" if isinstance(target.cluster, RayUpCluster) else "its own tools"
        raise UserError(
            f"{target.where}: is of kind {target.cluster.kind}, and only kind local is started by slimray: use {tool}"
        )
    return target.cluster


def _wait_for_head(child: subprocess.Popen, target: Target, log_file: Path) -> None:
    """Return once the head's Jobs API responds and lists the head's node."""
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        if child.poll() is not None:
            lines = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
            reason = lines[-1] if lines else "no output"
            raise RunFailed(f"{target.where}: Ray did not start: {reason} (log: {log_file})")
        with contextlib.suppress(RunFailed, KeyError, TypeError):
            nodes = get(target, "/api/v0/nodes")["data"]["result"]["result"]
            if any(one["state"] == "ALIVE" for one in nodes):
                return
        time.sleep(0.5)
    raise RunFailed(f"{target.where}: Ray did not start within {START_TIMEOUT_S} s (log: {log_file})")


def _state_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slimray" / "clusters"


def _state_file(name: str) -> Path:
    return _state_folder() / f"{name}.json"


def _running(name: str) -> dict[str, Any] | None:
    """Return the recorded state of the head of that name, or None if that very process is no longer alive."""
    try:
        state = json.loads(_state_file(name).read_text())
        return state if _born(int(state["pid"])) == state["born"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _born(pid: int) -> str:
    """Return a unique identity of the process `pid`, valid across restarts of the machine; "" if it does not exist."""
    birth = lock.process_birth(pid)
    return f"{lock.this_host()} {birth}" if birth else ""


def _end_group(leader: int) -> None:
    """Send SIGTERM, then SIGKILL, to the process group of `leader`; return when it is gone."""
    for sent, patience_s in ((signal.SIGTERM, STOP_GRACE_S), (signal.SIGKILL, STOP_GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, sent)
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(leader, os.WNOHANG)
            try:
                os.killpg(leader, 0)
            except ProcessLookupError:
                return
            time.sleep(0.2)
