"""A job as a script for `sbatch`: Ray runs on every machine of the allocation, the command on the first."""

import shlex
from collections.abc import Mapping
from typing import Any

from slimray.cluster.script import SCRIPT, Submission, env_vars, write_files
from slimray.cluster.specs import SlurmCluster, capacity

SIGNAL_S = 120  # before the time limit, when the driver is told to end and the job is requeued
PORTS = 1000  # ports from `port` on, one per job, because jobs may share a machine


def slurm(job: Submission, cluster: SlurmCluster, values: Mapping[str, str]) -> str:
    """Return the script for `sbatch`: Ray on every machine, the command on the first; Ray ends with the command.

    Before the time limit Slurm sends SIGUSR1: the command saves and ends, and the job is requeued and resumes. On
    SIGTERM (`slimray stop`, scancel) it saves and ends for good; a job that Slurm preempts is requeued by Slurm.
    """
    options: dict[str, Any] = {
        "job-name": job.id,
        "nodes": cluster.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": cluster.cpus_per_node,
        "time": cluster.time,
        "output": f"{job.id}-%j.log",
        "open-mode": "append",
        "requeue": None,
        "signal": f"B:USR1@{SIGNAL_S}",
    }
    options |= {"gpus-per-node": cluster.gpus_per_node} if cluster.gpus_per_node else {}
    options |= {"partition": cluster.partition} if cluster.partition else {}
    options |= {"account": cluster.account} if cluster.account else {}
    options |= cluster.options
    env = env_vars(cluster, capacity(cluster), values)
    resources = f"--num-cpus {cluster.cpus_per_node} --num-gpus {cluster.gpus_per_node}"
    others = cluster.nodes - 1
    step = f"srun --overlap --cpus-per-task={cluster.cpus_per_node}"  # srun does not inherit it from sbatch
    join = [
        f'{step} --nodes={others} --ntasks={others} --exclude="$head" \\',
        f'  ray start --address "$RAY_ADDRESS" {resources} --block --disable-usage-stats &',
    ]
    return "\n".join(
        [
            "#!/bin/bash",
            *[f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in options.items()],
            "set -euo pipefail",
            *cluster.setup,
            *[f"export {name}={shlex.quote(value)}" for name, value in env.items()],
            "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0",
            "ray get-auth-token --generate > /dev/null   # stored in the home folder, which all machines share",
            "work=$(mktemp -d)",
            *write_files(job, cluster, '"$work"'),
            "head=${SLURMD_NODENAME:-$(hostname -s)}",
            f"port=$(({cluster.port} + SLURM_JOB_ID % {PORTS}))",
            "export RAY_ADDRESS=$(hostname -I | cut -d' ' -f1):$port",
            f'{step} --nodes=1 --ntasks=1 --nodelist="$head" \\',
            f"  ray start --head --port $port {resources} --block --disable-usage-stats &",
            "for _ in $(seq 60); do ray health-check 2> /dev/null && break; sleep 2; done",
            "ray health-check || { echo 'Ray did not start on the first machine within two minutes' >&2; exit 1; }",
            *(join if others else []),
            f"srun --overlap --cpus-per-task=1 --nodes={cluster.nodes} --ntasks-per-node=1 \\",
            "  slimray watch-preemption &   # on cloud machines; elsewhere it exits at once",
            f'setsid sh "$work/{SCRIPT}" &   # a session of its own, so that all its children can be ended',
            "command=$!; again= stopped=",
            "trap 'again=1; kill -TERM -- -$command' USR1",
            "trap 'kill -${stopped:-TERM} -- -$command; stopped=KILL' TERM   # a second SIGTERM does not wait",
            "code=0; wait $command || code=$?",
            "while kill -0 $command 2> /dev/null; do code=0; wait $command || code=$?; done   # traps interrupt wait",
            'if [ -n "$again" ] && [ -z "$stopped" ] && [ "$code" -ne 0 ]; then',
            '  echo "slimray: the time limit is near, the job is requeued and resumes" >&2',
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$code"',
            "",
        ]
    )
