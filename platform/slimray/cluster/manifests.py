"""What a cluster file may say, and what is made of it: shell and Slurm scripts, a RayJob, the autoscaler's config.

In: the YAML of `cluster/NAME.yaml`, a union by `kind`. Out: plain text and dicts that a person can review and apply by
hand; nothing here talks to a cluster or needs Ray. Secrets are named, never held: their values are in the environment
of the cluster's nodes, or in a Kubernetes secret. A value that is forwarded by Ray would stand in its logs and
dashboard, so `pass_env` refuses names that look like one. Field names of `ray.io/v1` are those of KubeRay 1.7.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from slimray.credentials import find, held, is_secret_name
from slimray.spec import Spec, UserError, dump_yaml

HEAD_NODE_ID = "f" * 51 + "00000"  # what the autoscaler's provider for one machine calls its head
JOBS_DIR = "/etc/slimray"  # where pods find the job
SCRIPT = "run.sh"
COMMIT_NAME = re.compile(r"commit|sha|rev|hash|digest|checksum", re.IGNORECASE)  # 40 hex digits are then no old W&B key
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _is_http(value: str) -> str:
    if not re.fullmatch(r"https?://[^/@\s]+/?", value):
        raise ValueError("must look like http://HOST:8265, without a password")
    return value


Address = Annotated[str, AfterValidator(_is_http)]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]


# ------------------------------------------------------------------------------------------- what one may write


class CapacitySpec(Spec):
    """The most a cluster can ever have, counted over its nodes without the head."""

    cpus: float = Field(gt=0)
    """Logical CPUs of all nodes."""
    gpus: float = Field(0, ge=0)
    """GPUs of all nodes."""
    node_cpus: float | None = Field(None, gt=0)
    """Logical CPUs of the largest node; default as many as `cpus`."""
    node_gpus: float | None = Field(None, ge=0)
    """GPUs of the largest node."""


class DriverSpec(Spec):
    """Where the command itself runs: by default on the head, else on a node with these resources and labels."""

    cpus: float = Field(0, ge=0)
    """Logical CPUs reserved for the command."""
    resources: dict[str, float] = {}
    """Custom resources that only safe (not spot) nodes have, such as `safe: 0.01`."""
    labels: dict[str, str] = {}
    """Labels of the node, such as `ray.io/market-type: on-demand`."""


class ClusterSpec(Spec):
    """What all kinds of clusters have in common."""

    storage: str | None = None
    """Where runs lie when --storage does not say it: s3://, gs://, or a folder that all nodes share."""
    retries: int = Field(3, ge=0)
    """How often a run that failed is started again, on the cluster; it resumes. A user's mistake is not repeated."""
    env: dict[EnvName, str] = {}
    """Environment variables of the job, written out here. Never a secret."""
    pass_env: tuple[EnvName, ...] = ()
    """Environment variables of the job, taken from the environment of `slimray submit`. Never a secret."""
    machine: dict[str, Any] = {}
    """What `slimray plan` reads about the machines."""

    @model_validator(mode="after")
    def _no_secrets(self) -> "ClusterSpec":
        for name, value in self.env.items():
            if any(find({name: value}, names=True)) and held(value) is None:
                raise ValueError(f"env: {name} looks like a secret: name it in `secrets`, never write its value")
            if held(value) or (re.fullmatch(r"[0-9a-f]{40}", value) and not COMMIT_NAME.search(name)):
                raise ValueError(f"env.{name}: holds what looks like a secret: take it out, and name it in `secrets`")
        for name in self.pass_env:
            if is_secret_name(name):
                raise ValueError(f"pass_env: {name} looks like a secret, Ray would log it: name it in `secrets`")
        return self


class NodeSecrets(Spec):
    """Secrets on a cluster whose nodes get their environment from whoever runs it."""

    secrets: tuple[EnvName, ...] = ()
    """Environment variables that the nodes must have, such as WANDB_API_KEY; checked before the job starts."""


class JobsCluster(ClusterSpec, NodeSecrets):
    """A Ray cluster that is there already, through its Jobs API."""

    kind: Literal["jobs"]
    address: Address
    """The head's dashboard, http://HOST:8265."""
    token_env: EnvName | None = None
    """Environment variable with the cluster's token; default as Ray: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray."""
    driver: DriverSpec = DriverSpec.model_validate({})
    """A safe node for the command."""
    capacity: CapacitySpec | None = None
    """For a cluster that grows by itself: its largest size. Default: what is there when the job is submitted."""


class LocalCluster(ClusterSpec, NodeSecrets):
    """Several raylets on this machine, added and removed by Ray's real autoscaler; `slimray cluster start NAME`."""

    kind: Literal["local"]
    node_cpus: int = Field(2, ge=1)
    """Logical CPUs of each node that is added."""
    max_nodes: int = Field(2, ge=1, le=64)
    """Most nodes beside the head, which holds no work."""
    min_nodes: int = Field(0, ge=0)
    """Nodes that are kept."""
    idle_timeout_s: float = Field(60, gt=0)
    """An added node goes after it had nothing to do for so long."""
    port: int = Field(6379, ge=1024, le=65535)
    """Of Ray on this machine."""
    dashboard_port: int = Field(8265, ge=1024, le=65535)
    """Of the Jobs API and the dashboard, on 127.0.0.1."""

    @model_validator(mode="after")
    def _nodes_fit(self) -> "LocalCluster":
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes: must be at most max_nodes ({self.max_nodes}), got {self.min_nodes}")
        return self

    @property
    def address(self) -> str:
        """Where its Jobs API answers."""
        return f"http://127.0.0.1:{self.dashboard_port}"


class RayUpCluster(ClusterSpec, NodeSecrets):
    """Machines of a cloud that `ray up` starts; jobs go through `ray dashboard`, which forwards the head's port."""

    kind: Literal["ray_up"]
    address: Address = "http://127.0.0.1:8265"
    """Where the head's dashboard is reached from here."""
    token_env: EnvName | None = None
    """As for `jobs`."""
    driver: DriverSpec = DriverSpec.model_validate({})
    """A safe node for the command."""
    ray_up: dict[str, Any]
    """The cluster as `ray up` takes it."""

    @field_validator("ray_up")
    @classmethod
    def _is_complete(cls, value: dict[str, Any]) -> dict[str, Any]:
        nodes = value.get("available_node_types")
        if not isinstance(nodes, dict) or not all(isinstance(node, dict) for node in nodes.values()):
            raise ValueError("available_node_types is required, a mapping of node types")
        if value.get("head_node_type") not in nodes:
            raise ValueError("head_node_type must be one of available_node_types")
        return value


class SecretRef(Spec):
    """A key of a Kubernetes secret."""

    secret: str
    """Name of the secret."""
    key: str
    """The key in it."""


class VolumeSpec(Spec):
    """A persistent volume claim that all pods mount."""

    claim: str
    """Name of the claim; many nodes write it (ReadWriteMany)."""
    mount: str = Field(pattern=r"^/.+")
    """Folder in the pods."""


class PodSpec(Spec):
    """What a pod of the cluster asks for."""

    cpus: float = Field(4, gt=0)
    """CPUs."""
    memory: Quantity = "16Gi"
    """Memory."""
    shm: Quantity = "4Gi"
    """Shared memory, where Ray keeps its objects."""
    spill: Quantity | None = None
    """Size of the emptyDir for objects that do not fit into shared memory, on the node's NVMe."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes it may run on."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """Taints it puts up with, as Kubernetes writes them."""


class GroupSpec(PodSpec):
    """A group of equal worker pods."""

    gpus: int = Field(0, ge=0)
    """GPUs of each pod."""
    min: int = Field(0, ge=0)
    """Fewest pods."""
    max: int = Field(ge=1)
    """Most pods."""
    resources: dict[str, float] = {}
    """Custom Ray resources of each pod."""
    labels: dict[str, str] = {}
    """Ray labels of each pod."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> "GroupSpec":
        if self.min > self.max:
            raise ValueError(f"min: must be at most max ({self.max}), got {self.min}")
        return self


class KubeRayCluster(ClusterSpec):
    """A RayJob: KubeRay starts a cluster for the job and takes it away afterwards."""

    kind: Literal["kuberay"]
    image: str
    """Image with slimray, from cluster/Dockerfile."""
    namespace: str = "default"
    """Kubernetes namespace."""
    ray_version: str = "2.60.0"
    """Version of Ray in the image."""
    secrets: dict[EnvName, SecretRef] = {}
    """Environment variables of all pods out of Kubernetes secrets."""
    service_account: str | None = None
    """Of the pods, for access to storage."""
    head: PodSpec = PodSpec.model_validate({})
    """The head, which holds no work; put it on a node that is not spot."""
    workers: dict[str, GroupSpec] = Field(min_length=1)
    """Groups of worker pods, by name."""
    volumes: tuple[VolumeSpec, ...] = ()
    """Shared storage."""
    autoscale: bool = True
    """Have Ray's autoscaler (v2) size the groups between `min` and `max`; needs `queue: null`."""
    idle_timeout_s: int = Field(300, gt=0)
    """A pod goes after it had nothing to do for so long."""
    grace_period_s: int = Field(120, ge=30)
    """Seconds from a pod's notice to its end: Ray drains the node, slimray writes a checkpoint."""
    start_deadline_s: int = Field(1800, gt=0)
    """Longest wait for the pods; then the job fails."""
    deadline_s: int | None = Field(None, gt=0)
    """Longest life of the job."""
    keep_s: int = Field(3600, ge=0)
    """The cluster stays so long after the job, for its logs."""
    queue: str | None = None
    """Kueue's LocalQueue: the job waits until all its pods fit. The cluster then has a fixed size, `max`."""
    priority: str | None = None
    """Kueue's priority class."""

    @model_validator(mode="after")
    def _queue_fits(self) -> "KubeRayCluster":
        if self.queue is not None and self.autoscale:
            raise ValueError("autoscale: must be false with a queue: Kueue admits a cluster of a fixed size")
        if self.priority is not None and self.queue is None:
            raise ValueError("priority: is Kueue's, it needs a queue")
        return self


class SlurmCluster(ClusterSpec, NodeSecrets):
    """An allocation of Slurm: one Ray node per machine, the command on the first."""

    kind: Literal["slurm"]
    nodes: int = Field(ge=1)
    """Machines."""
    cpus_per_node: int = Field(ge=1)
    """CPUs of each."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs of each."""
    time: str = Field("24:00:00", pattern=r"^(\d+-)?\d{1,2}(:\d{2}){0,2}$|^\d+(:\d{2})?$")
    """Longest life of the allocation, as Slurm writes it."""
    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account."""
    options: dict[str, str | int] = {}
    """More options of sbatch, by name: `constraint: nvme`."""
    setup: tuple[str, ...] = ()
    """Shell commands on every machine before Ray starts: `module load ...`, `source .venv/bin/activate`."""
    port: int = Field(6379, ge=1024, le=65535)
    """Of Ray on the first machine."""


Cluster = JobsCluster | LocalCluster | RayUpCluster | KubeRayCluster | SlurmCluster
KINDS: dict[str, type[ClusterSpec]] = {
    "jobs": JobsCluster,
    "local": LocalCluster,
    "ray_up": RayUpCluster,
    "kuberay": KubeRayCluster,
    "slurm": SlurmCluster,
}


# ----------------------------------------------------------------------------------------------- what it can hold


@dataclass(frozen=True)
class Capacity:
    """The most a cluster can have in all and on its largest node."""

    cpus: float
    gpus: float
    node_cpus: float
    node_gpus: float


def capacity(cluster: Cluster) -> Capacity | None:
    """The most the cluster can ever have, as its file tells; None where only the cluster itself can tell."""
    if isinstance(cluster, JobsCluster):
        told = cluster.capacity
        if told is None:
            return None
        node_gpus = told.gpus if told.node_gpus is None else told.node_gpus
        return Capacity(told.cpus, told.gpus, told.node_cpus or told.cpus, node_gpus)
    if isinstance(cluster, LocalCluster):
        nodes = [(cluster.max_nodes, cluster.node_cpus, 0)]
    elif isinstance(cluster, SlurmCluster):
        nodes = [(cluster.nodes, cluster.cpus_per_node, cluster.gpus_per_node)]
    elif isinstance(cluster, KubeRayCluster):
        nodes = [(group.max, int(group.cpus), group.gpus) for group in cluster.workers.values()]
    else:
        types, most = cluster.ray_up["available_node_types"], cluster.ray_up.get("max_workers", 2)
        nodes = []
        for name, node in types.items():
            have = node.get("resources") or {}
            count = 1 if name == cluster.ray_up["head_node_type"] else min(node.get("max_workers", most), most)
            nodes.append((count, have.get("CPU", 0), have.get("GPU", 0)))
    return Capacity(
        sum(count * cpus for count, cpus, _ in nodes),
        sum(count * gpus for count, _, gpus in nodes),
        max(cpus for _, cpus, _ in nodes),
        max(gpus for _, _, gpus in nodes),
    )


# ------------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Submission:
    """A checked job on its way: `id` names this attempt, `documents` are resolved, `storage` is an absolute URI."""

    id: str
    file: str
    documents: str
    storage: str
    restart: bool = False


def run_script(job: Submission, cluster: Cluster) -> str:
    """The shell script that does the job beside it: `slimray run`, again while it fails for no fault of the user's.

    A missing secret ends it with one sentence and code 2. The loop lives beside the run, so that nobody has to stay.
    Its retries and those of the run's workers are one budget: a run is told how many are left, and code 3 says that
    its workers have used them up.
    """
    run = f'python -m slimray.cli run "$(dirname "$0")/"{shlex.quote(job.file)} --storage {shlex.quote(job.storage)}'
    said = "is not set on this cluster: put it into the environment of its nodes (secrets of the cluster file)"
    guard = [f'test -n "${{{name}:-}}" || {{ echo "{name}: {said}" >&2; exit 2; }}' for name in cluster.secrets]
    return "\n".join(
        [
            "#!/bin/sh",
            *guard,
            f"code=0; left={cluster.retries}; restart={'--restart' if job.restart else ''}",
            'test "${SLURM_RESTART_COUNT:-0}" -eq 0 || restart=   # a requeued job goes on',
            "export SLIMRAY_RETRIES_LEFT=$left",
            f"{run} $restart || code=$?",
            'while [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "$code" -ne 3 ] && [ "$left" -gt 0 ]; do',
            '  echo "slimray: the run ended with code $code and goes on, $left retries are left" >&2',
            "  left=$((left - 1)); code=0; export SLIMRAY_RETRIES_LEFT=$left; sleep 5",
            f"  {run} || code=$?",
            "done",
            'exit "$code"',
            "",
        ]
    )


def files(job: Submission, cluster: Cluster) -> dict[str, str]:
    """What the job needs on the cluster beside slimray itself: the resolved documents, and the script."""
    return {job.file: job.documents, SCRIPT: run_script(job, cluster)}


def _write_files(job: Submission, cluster: Cluster, folder: str) -> list[str]:
    """Shell lines that write the files of a job."""
    lines = []
    for name, text in files(job, cluster).items():
        lines += [f"cat > {folder}/{shlex.quote(name)} <<'END_OF_FILE'", text.rstrip(), "END_OF_FILE"]
    return lines


def env_vars(cluster: Cluster, have: Capacity | None, values: Mapping[str, str]) -> dict[str, str]:
    """The environment of the job: what the file writes out and passes on, and how far the cluster can grow.

    UserError if a variable of `pass_env` turns out to hold a secret: it would be written out, and Ray would log it.
    """
    for name in cluster.pass_env:
        if what := held(values.get(name, "")):
            raise UserError(f"pass_env: {name} holds what looks like a secret ({what}): name it in `secrets` instead")
    grown = {} if have is None else {"SLIMRAY_CLUSTER_CPUS": f"{have.cpus:g}", "SLIMRAY_CLUSTER_GPUS": f"{have.gpus:g}"}
    return grown | dict(cluster.env) | {name: values[name] for name in cluster.pass_env if name in values}


def jobs_script(job: Submission, cluster: JobsCluster | LocalCluster | RayUpCluster, package: str) -> str:
    """A shell script that submits the job by hand, as `slimray submit` does through the Jobs API.

    `package` is the folder of slimray's code. Values of `pass_env` are taken from the environment when it runs.
    """
    driver = cluster.driver if not isinstance(cluster, LocalCluster) else DriverSpec.model_validate({})
    options = ["--submission-id", job.id]
    options += ["--entrypoint-num-cpus", f"{driver.cpus:g}"] if driver.cpus else []
    options += ["--entrypoint-resources", json.dumps(driver.resources)] if driver.resources else []
    options += ["--entrypoint-label-selector", json.dumps(driver.labels)] if driver.labels else []
    start = ["# first: slimray cluster start NAME"] if isinstance(cluster, LocalCluster) else []
    if isinstance(cluster, RayUpCluster):
        start = [
            "cat > \"$work/cluster.yaml\" <<'END_OF_FILE'",
            dump_yaml(cluster.ray_up).rstrip(),
            "END_OF_FILE",
            'ray up --yes "$work/cluster.yaml"',
            'ray dashboard "$work/cluster.yaml" &   # forwards port 8265 of the head',
            "sleep 15",
        ]
    known = {"py_modules": [package], "env_vars": env_vars(cluster, capacity(cluster), {})}
    quote = "python -c 'import json, sys; print(json.dumps(sys.argv[1]))'"
    passed = [f'echo "  {name}: $({quote} "${{{name}:?is not set}}")" >> "$work/env.yaml"' for name in cluster.pass_env]
    known["env_vars"] |= {} if known["env_vars"] else {"SLIMRAY_SUBMITTED": "1"}  # a block that lines can follow
    return "\n".join(
        [
            "#!/bin/sh",
            "set -eu",
            'work=$(mktemp -d); mkdir "$work/job"',
            *start,
            *_write_files(job, cluster, '"$work/job"'),
            "cat > \"$work/env.yaml\" <<'END_OF_FILE'",
            dump_yaml(known).rstrip(),
            "END_OF_FILE",
            *passed,
            f"export RAY_API_SERVER_ADDRESS={cluster.address.rstrip('/')}",
            f'ray job submit --no-wait {shlex.join(options)} --working-dir "$work/job" \\',
            f'  --runtime-env "$work/env.yaml" -- sh {SCRIPT}',
            "",
        ]
    )


# ------------------------------------------------------------------------------------------------ one machine


def autoscaling_config(cluster: LocalCluster) -> dict[str, Any]:
    """The autoscaler's config for several raylets on one machine, every legacy list present."""
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


# ------------------------------------------------------------------------------------------------- Kubernetes


def kuberay(job: Submission, cluster: KubeRayCluster, values: Mapping[str, str]) -> list[dict[str, Any]]:
    """The job as Kubernetes objects: a ConfigMap with the job, the RayJob, and disruption budgets for its pods."""
    labels = {"app.kubernetes.io/managed-by": "slimray", "slimray.io/job": job.id}
    meta = {"name": job.id, "namespace": cluster.namespace, "labels": labels}
    queue = {"kueue.x-k8s.io/queue-name": cluster.queue, "kueue.x-k8s.io/priority-class": cluster.priority}
    queue = {name: value for name, value in queue.items() if value}
    env = env_vars(cluster, capacity(cluster), values)
    groups = [_group(name, group, job, cluster) for name, group in cluster.workers.items()]
    scaling = {"version": "v2", "idleTimeoutSeconds": cluster.idle_timeout_s, "upscalingMode": "Aggressive"}
    ray_job = {
        "entrypoint": f"sh {JOBS_DIR}/{SCRIPT}",
        "runtimeEnvYAML": dump_yaml({"env_vars": env}),
        "jobId": job.id,
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": cluster.keep_s,
        "preRunningDeadlineSeconds": cluster.start_deadline_s,
        **({"activeDeadlineSeconds": cluster.deadline_s} if cluster.deadline_s else {}),
        "backoffLimit": 0,  # slimray owns the retries: a new cluster for each would lose the warm one
        "submitterConfig": {"backoffLimit": 2},
        "rayClusterSpec": {
            "rayVersion": cluster.ray_version,
            "enableInTreeAutoscaling": cluster.autoscale,
            **({"autoscalerOptions": scaling} if cluster.autoscale else {}),
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # noqa: S104 inside its own pod
                "template": _template("head", cluster.head, job, cluster),
            },
            "workerGroupSpecs": groups,
        },
    }
    objects = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": files(job, cluster)},
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": meta | {"labels": labels | queue}, "spec": ray_job},
        _budget("head", 1, job, meta),
    ]
    # Pods of a RayCluster belong to no built-in controller: a budget may then count `minAvailable` only.
    return objects + [_budget(name, group.min, job, meta) for name, group in cluster.workers.items() if group.min]


def _budget(role: str, available: int, job: Submission, meta: Mapping[str, Any]) -> dict[str, Any]:
    match = {"matchLabels": {"slimray.io/job": job.id, "slimray.io/group": role}}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {**meta, "name": f"{job.id}-{role}"},
        "spec": {"minAvailable": available, "selector": match},
    }


def _group(name: str, group: GroupSpec, job: Submission, cluster: KubeRayCluster) -> dict[str, Any]:
    fixed = not cluster.autoscale
    params = {"resources": json.dumps(json.dumps(group.resources))} if group.resources else {}
    return {
        "groupName": name,
        "replicas": group.max if fixed else group.min,
        "minReplicas": group.max if fixed else group.min,
        "maxReplicas": group.max,
        "rayStartParams": params,
        **({"labels": group.labels} if group.labels else {}),
        "template": _template(name, group, job, cluster),
    }


def _template(role: str, pod: PodSpec, job: Submission, cluster: KubeRayCluster) -> dict[str, Any]:
    """A pod that drains its Ray node when it is told to go, and gets the time for it."""
    gpus = pod.gpus if isinstance(pod, GroupSpec) else 0
    asks = {"cpu": f"{pod.cpus:g}", "memory": pod.memory, **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    drain_s = cluster.grace_period_s - 20  # what is left is for Ray's processes to end
    env: list[dict[str, Any]] = [{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": str(drain_s)}]
    env += [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}]
    env += [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": ref.secret, "key": ref.key}}}
        for name, ref in cluster.secrets.items()
    ]
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": pod.shm}}]
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108 inside its own pod
    if pod.spill:
        volumes.append({"name": "spill", "emptyDir": {"sizeLimit": pod.spill}})
        mounts.append({"name": "spill", "mountPath": "/tmp/ray"})  # noqa: S108
    for place, volume in enumerate(cluster.volumes):
        volumes.append({"name": f"shared-{place}", "persistentVolumeClaim": {"claimName": volume.claim}})
        mounts.append({"name": f"shared-{place}", "mountPath": volume.mount})
    container: dict[str, Any] = {
        "name": f"ray-{'head' if role == 'head' else 'worker'}",
        "image": cluster.image,
        "resources": {"requests": asks, "limits": asks},
        "env": env,
        "volumeMounts": mounts,
    }
    if role == "head":
        volumes.append({"name": "job", "configMap": {"name": job.id}})
        mounts.append({"name": "job", "mountPath": JOBS_DIR, "readOnly": True})
        container["ports"] = [
            {"name": name, "containerPort": port}
            for name, port in (("gcs-server", 6379), ("dashboard", 8265), ("metrics", 8080))
        ]
    else:  # `ray start` is a child of the container's shell, which would not pass SIGTERM on
        wait = "pid=$(pgrep -of '[b]in/ray start') && kill -TERM $pid"
        wait += " && while kill -0 $pid 2> /dev/null; do sleep 1; done"
        container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", f"{wait}; true"]}}}
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": cluster.grace_period_s,
        "containers": [container],
        "volumes": volumes,
        **({"serviceAccountName": cluster.service_account} if cluster.service_account else {}),
        **({"nodeSelector": pod.node_selector} if pod.node_selector else {}),
        **({"tolerations": list(pod.tolerations)} if pod.tolerations else {}),
    }
    return {"metadata": {"labels": {"slimray.io/job": job.id, "slimray.io/group": role}}, "spec": spec}


# -------------------------------------------------------------------------------------------------------- Slurm


def slurm(job: Submission, cluster: SlurmCluster, values: Mapping[str, str]) -> str:
    """The script for `sbatch`: Ray on every machine, the command on the first, all gone when it ends."""
    options: dict[str, Any] = {
        "job-name": job.id,
        "nodes": cluster.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": cluster.cpus_per_node,
        "time": cluster.time,
        "output": f"{job.id}-%j.log",
        "open-mode": "append",
        "requeue": None,
    }
    options |= {"gpus-per-node": cluster.gpus_per_node} if cluster.gpus_per_node else {}
    options |= {"partition": cluster.partition} if cluster.partition else {}
    options |= {"account": cluster.account} if cluster.account else {}
    options |= cluster.options
    env = env_vars(cluster, capacity(cluster), values)
    resources = f"--num-cpus {cluster.cpus_per_node} --num-gpus {cluster.gpus_per_node}"
    others = cluster.nodes - 1
    join = [
        f'srun --overlap --nodes={others} --ntasks={others} --exclude="$head" \\',
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
            "ray get-auth-token --generate > /dev/null   # in the home folder that all machines share",
            "work=$(mktemp -d)",
            *_write_files(job, cluster, '"$work"'),
            "head=${SLURMD_NODENAME:-$(hostname -s)}",
            f"export RAY_ADDRESS=$(hostname -I | cut -d' ' -f1):{cluster.port}",
            'srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \\',
            f"  ray start --head --port {cluster.port} {resources} --block --disable-usage-stats &",
            "for _ in $(seq 60); do ray health-check 2> /dev/null && break; sleep 2; done",
            "ray health-check || { echo 'Ray did not start on the first machine within two minutes' >&2; exit 1; }",
            *(join if others else []),
            f'sh "$work/{SCRIPT}"',
            "",
        ]
    )
