"""Our script for Slurm checked by Slurm itself: `sbatch --test-only`, with a controller on loopback and no machines."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.waits import patience, wait_for

from slimray.cluster import script, slurm, specs
from slimray.spec import parse_yaml

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=60
TreeWidth=65533
NodeName=n[1-4] CPUs=64 Gres=gpu:4 State=CLOUD
PartitionName=gpu Nodes=n[1-4] Default=YES MaxTime=2-0 State=UP
"""


@pytest.fixture(scope="module")
def controller(tmp_path_factory) -> Iterator[Path]:
    """A folder with the configuration of a running controller of four nodes that are never started."""
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    programs = {name: shutil.which(name, path=path) for name in ("munged", "slurmctld", "sbatch")}
    if not all(programs.values()) or os.getuid():
        pytest.skip("needs root, slurmctld, slurm-client and munge")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = CONFIG.format(host=socket.gethostname().partition(".")[0], port=port, folder=folder)
    (folder / "slurm.conf").write_text(text)
    ends = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    places = [f"--{name}={folder}/munge.{end}" for name, end in ends.items()]
    children: list[subprocess.Popen] = []
    try:
        for command in (
            [programs["munged"], "--force", "--foreground", *places],
            [programs["slurmctld"], "-D", "-f", f"{folder}/slurm.conf"],
        ):
            children.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            wait_for("munge", lambda: (folder / "munge.socket").exists(), 30)
        wait_for("the controller", lambda: _test(folder, "#!/bin/sh\ntrue\n")[0] == 0, 30)
        yield folder
    finally:
        for child in children:
            child.terminate()
            child.wait(timeout=patience(30))


def _test(folder: Path, text: str) -> tuple[int, str]:
    (folder / "job.sh").write_text(text)
    command, env = ["sbatch", "--test-only", "job.sh"], os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=patience(60))
    return done.returncode, done.stderr


def rendered(**fields: object) -> str:
    (document,) = parse_yaml("{kind: slurm, nodes: 4, cpus_per_node: 64, gpus_per_node: 4, storage: /shared}", "x.yaml")
    cluster = specs.SlurmCluster.model_validate(document | fields)
    return slurm.slurm(script.Submission("tsm-1", "job.yaml", "kind: train\n", "/shared", restart=True), cluster, {})


def test_slurm_takes_our_script(controller):
    code, said = _test(controller, rendered(partition="gpu", time="24:00:00", options={"exclusive": "user"}))
    assert code == 0, said
    assert "using 256 processors on nodes n[1-4] in partition gpu" in said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"nodes": 9}, "Requested node configuration is not available"),
        ({"gpus_per_node": 8}, "Requested node configuration is not available"),
        ({"partition": "gpus"}, "invalid partition specified: gpus"),
        ({"options": {"constraint": "nvme"}}, "Invalid feature specification"),
        ({"options": {"no-such-option": 1}}, "unrecognized option '--no-such-option=1'"),
    ],
)
def test_slurm_refuses_what_it_does_not_have(controller, fields, said):
    code, error = _test(controller, rendered(**fields))
    assert code != 0
    assert said in error
