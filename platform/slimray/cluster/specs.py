"""Fields of a cluster file: the YAML of `cluster/NAME.yaml`, a union by `kind`, and the capacity of such a cluster.

Secrets are named but never stored: their values are in the environment of the cluster's nodes, or in a Kubernetes
secret. A value that Ray forwards appears in its logs and dashboard, so `pass_env` refuses names that look like secrets.
Nothing here talks to a cluster or needs Ray.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from slimray.credentials import find, held, is_secret_name
from slimray.spec import Spec

COMMIT_NAME = re.compile(r"commit|sha|rev|hash|digest|checksum", re.IGNORECASE)  # here 40 hex digits are not a W&B key
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _is_http(value: str) -> str:
    if not re.fullmatch(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?(/[A-Za-z0-9._~/-]*)?", value):
        raise ValueError("must look like http://HOST:8265, without a password")
    return value


def _is_one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must be one line of printable characters, because it is written into a script")
    return value


Address = Annotated[str, AfterValidator(_is_http)]
OneLine = Annotated[str, AfterValidator(_is_one_line)]
# As Kubernetes accepts them; its schemas only require a string, and `kubectl apply` checks the rest.
NamespaceName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
SecretKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,253}$")]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]


class CapacitySpec(Spec):
    """The largest size of a cluster, summed over its nodes without the head."""

    cpus: float = Field(gt=0)
    """Logical CPUs of all nodes."""
    gpus: float = Field(0, ge=0)
    """GPUs of all nodes."""
    node_cpus: float | None = Field(None, gt=0)
    """Logical CPUs of the largest node. Default: `cpus`."""
    node_gpus: float | None = Field(None, ge=0)
    """GPUs of the largest node. Default: `gpus`."""


class DriverSpec(Spec):
    """Placement of the command itself: by default on the head, otherwise on a node with these resources and labels."""

    cpus: float = Field(0, ge=0)
    """Logical CPUs reserved for the command."""
    resources: dict[str, float] = {}
    """Custom resources that only safe (non-spot) nodes have, such as `safe: 0.01`."""
    labels: dict[str, str] = {}
    """Labels of the node, such as `ray.io/market-type: on-demand`."""


class ClusterSpec(Spec):
    """Fields that all kinds of clusters have."""

    storage: str | None = None
    """Storage of runs if --storage is not given: s3://, gs://, or a folder that all nodes share."""
    retries: int = Field(3, ge=0)
    """Number of restarts of a failed run on the cluster, where it resumes. User errors are not retried."""
    env: dict[EnvName, str] = {}
    """Environment variables of the job, with their values. Never a secret."""
    pass_env: tuple[EnvName, ...] = ()
    """Environment variables of the job, copied from the environment of `slimray submit`. Never a secret."""
    machine: dict[str, Any] = {}
    """Description of the machines for `slimray plan`."""

    @model_validator(mode="after")
    def _no_secrets(self) -> "ClusterSpec":
        for name, value in self.env.items():
            if any(find({name: value}, names=True)) and held(value) is None:
                raise ValueError(f"env: {name} looks like a secret: name it in `secrets`, never write its value")
            if held(value) or (re.fullmatch(r"[0-9a-f]{40}", value) and not COMMIT_NAME.search(name)):
                raise ValueError(f"env.{name}: holds what looks like a secret: remove it and name it in `secrets`")
        for name in self.pass_env:
            if is_secret_name(name):
                raise ValueError(f"pass_env: {name} looks like a secret, which Ray would log: name it in `secrets`")
        return self


class NodeSecrets(Spec):
    """Secrets on a cluster whose nodes get their environment from its administrator."""

    secrets: tuple[EnvName, ...] = ()
    """Environment variables that the nodes must have, such as WANDB_API_KEY; checked before the job starts."""


class JobsCluster(ClusterSpec, NodeSecrets):
    """An existing Ray cluster, used through its Jobs API."""

    kind: Literal["jobs"]
    address: Address
    """URL of the head's dashboard, http://HOST:8265."""
    token_env: EnvName | None = None
    """Environment variable with the cluster's token. Default: as Ray, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray."""
    driver: DriverSpec = DriverSpec.model_validate({})
    """A safe node for the command."""
    capacity: CapacitySpec | None = None
    """For a cluster that grows by itself: its largest size. Default: its size when the job is submitted."""


class LocalCluster(ClusterSpec, NodeSecrets):
    """Several raylets on this machine, added and removed by Ray's real autoscaler; `slimray cluster start NAME`."""

    kind: Literal["local"]
    node_cpus: int = Field(2, ge=1)
    """Logical CPUs of each node that is added."""
    max_nodes: int = Field(2, ge=1, le=64)
    """Most nodes besides the head, which runs no work."""
    min_nodes: int = Field(0, ge=0)
    """Nodes that are kept even when idle."""
    idle_timeout_s: float = Field(60, gt=0)
    """Idle time after which an added node is removed."""
    port: int = Field(6379, ge=1024, le=65535)
    """Port of Ray on this machine."""
    dashboard_port: int = Field(8265, ge=1024, le=65535)
    """Port of the Jobs API and the dashboard, on 127.0.0.1."""

    @model_validator(mode="after")
    def _nodes_fit(self) -> "LocalCluster":
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes: must be at most max_nodes ({self.max_nodes}), got {self.min_nodes}")
        return self

    @property
    def address(self) -> str:
        """Return the URL of its Jobs API."""
        return f"http://127.0.0.1:{self.dashboard_port}"


class RayUpCluster(ClusterSpec, NodeSecrets):
    """Cloud machines started by `ray up`; jobs go through `ray dashboard`, which forwards the head's port."""

    kind: Literal["ray_up"]
    address: Address = "http://127.0.0.1:8265"
    """URL of the head's dashboard as seen from here."""
    token_env: EnvName | None = None
    """As for `jobs`."""
    driver: DriverSpec = DriverSpec.model_validate({})
    """A safe node for the command."""
    ray_up: dict[str, Any]
    """The cluster config that `ray up` takes."""

    @field_validator("ray_up")
    @classmethod
    def _is_complete(cls, value: dict[str, Any]) -> dict[str, Any]:
        nodes = value.get("available_node_types")
        if not isinstance(nodes, dict) or not all(isinstance(node, dict) for node in nodes.values()):
            raise ValueError("available_node_types is required and must be a mapping of node types")
        if value.get("head_node_type") not in nodes:
            raise ValueError("head_node_type must be one of available_node_types")
        return value


class SecretRef(Spec):
    """A key of a Kubernetes secret."""

    secret: ObjectName
    """Name of the secret."""
    key: SecretKey
    """The key in it."""


class VolumeSpec(Spec):
    """A persistent volume claim that all pods mount."""

    claim: ObjectName
    """Name of the claim; many nodes write to it (ReadWriteMany)."""
    mount: str = Field(pattern=r"^/.+")
    """Folder in the pods."""


class PodSpec(Spec):
    """Resources that a pod of the cluster requests."""

    cpus: float = Field(4, gt=0)
    """CPUs."""
    memory: Quantity = "16Gi"
    """Memory."""
    shm: Quantity = "4Gi"
    """Shared memory, where Ray keeps its objects."""
    spill: Quantity | None = None
    """Size of the emptyDir for objects that do not fit into shared memory, on the node's NVMe."""
    node_selector: dict[str, LabelValue] = {}
    """Labels of the nodes that it may run on."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """Tolerated taints, as Kubernetes writes them."""
    devices: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Devices other than GPUs that a pod requests, by resource: `vpc.amazonaws.com/efa: 4`, `rdma/hca: 1`."""
    capabilities: tuple[Annotated[str, Field(pattern=r"^[A-Z_]+$")], ...] = ()
    """Linux capabilities of its container, such as `IPC_LOCK`, which RDMA needs."""
    affinity: dict[str, Any] = {}
    """Node and pod affinity, as Kubernetes writes it, to keep the pods of one training close together."""
    annotations: dict[str, str] = {}
    """Annotations of the pods."""
    priority_class: ObjectName | None = None
    """Kubernetes priority class of the pods."""


class GroupSpec(PodSpec):
    """A group of identical worker pods."""

    gpus: int = Field(0, ge=0)
    """GPUs of each pod."""
    min: int = Field(0, ge=0)
    """Fewest pods."""
    max: int = Field(ge=1)
    """Most pods."""
    resources: dict[str, float] = {}
    """Custom Ray resources of each pod."""
    labels: dict[str, LabelValue] = {}
    """Ray labels of each pod."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> "GroupSpec":
        if self.min > self.max:
            raise ValueError(f"min: must be at most max ({self.max}), got {self.min}")
        return self


class NetworkSpec(Spec):
    """Namespaces that may reach the pods of a job, if the Kubernetes network enforces network policies."""

    operator: NamespaceName
    """Namespace of KubeRay's operator, which polls the head for the job's status."""
    monitoring: NamespaceName | None = None
    """Namespace of Prometheus, which reads the pods' metrics."""


class KubeRayCluster(ClusterSpec):
    """A RayJob: KubeRay starts a cluster for the job and removes it afterwards."""

    kind: Literal["kuberay"]
    image: str
    """Image with slimray, from cluster/Dockerfile."""
    namespace: NamespaceName = "default"
    """Kubernetes namespace."""
    ray_version: str = "2.60.0"
    """Version of Ray in the image."""
    secrets: dict[EnvName, SecretRef] = {}
    """Environment variables of all pods, taken from Kubernetes secrets."""
    service_account: ObjectName | None = None
    """Service account of the pods, for access to storage."""
    head: PodSpec = PodSpec.model_validate({})
    """The head, which runs no work; put it on a non-spot node."""
    workers: dict[NamespaceName, GroupSpec] = Field(min_length=1)
    """Groups of worker pods, by name; the name becomes part of the pods' names."""
    volumes: tuple[VolumeSpec, ...] = ()
    """Shared storage."""
    network: NetworkSpec | None = None
    """Write a NetworkPolicy that admits nobody else, because whoever reaches Ray's ports can run code; null: none."""
    autoscale: bool = True
    """Let Ray's autoscaler (v2) size the groups between `min` and `max`; needs `queue: null`."""
    idle_timeout_s: int = Field(300, gt=0)
    """Idle time after which a pod is removed."""
    grace_period_s: int = Field(120, ge=30)
    """Seconds from a pod's notice to its end, in which Ray drains the node and slimray writes a checkpoint."""
    start_deadline_s: int = Field(1800, gt=0)
    """Longest wait for the pods, after which the job fails."""
    deadline_s: int | None = Field(None, gt=0)
    """Longest duration of the job."""
    keep_s: int = Field(60, ge=0)
    """Seconds for which the cluster, and its paid GPUs, is kept after the job; runs store their results anyway."""
    head_retries: int = Field(0, ge=0)
    """Number of new clusters for a failed job, which resumes there with all its `retries`. KubeRay cannot tell a lost
    head from a user error or from exhausted retries: a value above 0 pays for those again, too."""
    pull_secrets: tuple[ObjectName, ...] = ()
    """Kubernetes secrets for pulling the image."""
    queue: NamespaceName | None = None
    """Kueue's LocalQueue: the job waits until all its pods fit. The cluster then has a fixed size, `max`."""
    priority: LabelValue | None = None
    """Kueue's priority class."""

    @model_validator(mode="after")
    def _queue_fits(self) -> "KubeRayCluster":
        if self.queue is not None and self.autoscale:
            raise ValueError("autoscale: must be false with a queue, because Kueue admits clusters of a fixed size")
        if self.priority is not None and self.queue is None:
            raise ValueError("priority: is a setting of Kueue and needs a queue")
        return self

    @field_validator("workers")
    @classmethod
    def _no_second_head(cls, value: dict[str, GroupSpec]) -> dict[str, GroupSpec]:
        if "head" in value:
            raise ValueError("head is the name of the head's group, choose another")
        return value


class SlurmCluster(ClusterSpec, NodeSecrets):
    """A Slurm allocation: one Ray node per machine, the command on the first."""

    kind: Literal["slurm"]
    nodes: int = Field(ge=1)
    """Number of machines."""
    cpus_per_node: int = Field(ge=1)
    """CPUs of each machine."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs of each machine."""
    time: str = Field("24:00:00", pattern=r"^(\d+-)?\d{1,2}(:\d{2}){0,2}$|^\d+(:\d{2})?$")
    """Time limit of the allocation, as Slurm writes it."""
    partition: OneLine | None = None
    """Partition."""
    account: OneLine | None = None
    """Account."""
    options: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")], OneLine | int] = {}
    """Further options of sbatch, by name: `constraint: nvme`."""
    setup: tuple[OneLine, ...] = ()
    """Shell commands on every machine before Ray starts: `module load ...`, `source .venv/bin/activate`."""
    port: int = Field(6379, ge=1024, le=65535)
    """Port of Ray on the first machine; each job adds an offset of its own."""


Cluster = JobsCluster | LocalCluster | RayUpCluster | KubeRayCluster | SlurmCluster
KINDS: dict[str, type[ClusterSpec]] = {
    "jobs": JobsCluster,
    "local": LocalCluster,
    "ray_up": RayUpCluster,
    "kuberay": KubeRayCluster,
    "slurm": SlurmCluster,
}


@dataclass(frozen=True)
class Capacity:
    """The most CPUs and GPUs that a cluster can have in total and on its largest node."""

    cpus: float
    gpus: float
    node_cpus: float
    node_gpus: float


def capacity(cluster: Cluster) -> Capacity | None:
    """Return the largest size of the cluster according to its file; None if only the cluster itself knows it."""
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


@dataclass(frozen=True)
class Target:
    """A cluster, with the name and the file that identify it in messages."""

    name: str
    where: str
    cluster: Cluster
