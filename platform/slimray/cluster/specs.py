"""Fields of a cluster file: the YAML of `cluster/NAME.yaml`, a union by `kind`, and what such a cluster can hold.

Secrets are named, never held: their values are in the environment of the cluster's nodes, or in a Kubernetes secret. A
value that is forwarded by Ray would stand in its logs and dashboard, so `pass_env` refuses names that look like one.
Nothing here talks to a cluster or needs Ray.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from slimray.credentials import find, held, is_secret_name
from slimray.spec import Spec

COMMIT_NAME = re.compile(r"commit|sha|rev|hash|digest|checksum", re.IGNORECASE)  # 40 hex digits are then no old W&B key
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _is_http(value: str) -> str:
    if not re.fullmatch(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?(/[A-Za-z0-9._~/-]*)?", value):
        raise ValueError("must look like http://HOST:8265, without a password")
    return value


def _is_one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must be one line of printable characters, it is written into a script")
    return value


Address = Annotated[str, AfterValidator(_is_http)]
OneLine = Annotated[str, AfterValidator(_is_one_line)]
# As Kubernetes takes them; its schemas say `string`, and the rest is told by `kubectl apply`.
NamespaceName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
SecretKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,253}$")]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]


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
    """Place of the command itself: by default on the head, else on a node with these resources and labels."""

    cpus: float = Field(0, ge=0)
    """Logical CPUs reserved for the command."""
    resources: dict[str, float] = {}
    """Custom resources that only safe (not spot) nodes have, such as `safe: 0.01`."""
    labels: dict[str, str] = {}
    """Labels of the node, such as `ray.io/market-type: on-demand`."""


class ClusterSpec(Spec):
    """Fields that all kinds of clusters have."""

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
        """Return where its Jobs API answers."""
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

    secret: ObjectName
    """Name of the secret."""
    key: SecretKey
    """The key in it."""


class VolumeSpec(Spec):
    """A persistent volume claim that all pods mount."""

    claim: ObjectName
    """Name of the claim; many nodes write it (ReadWriteMany)."""
    mount: str = Field(pattern=r"^/.+")
    """Folder in the pods."""


class PodSpec(Spec):
    """Resources that a pod of the cluster asks for."""

    cpus: float = Field(4, gt=0)
    """CPUs."""
    memory: Quantity = "16Gi"
    """Memory."""
    shm: Quantity = "4Gi"
    """Shared memory, where Ray keeps its objects."""
    spill: Quantity | None = None
    """Size of the emptyDir for objects that do not fit into shared memory, on the node's NVMe."""
    node_selector: dict[str, LabelValue] = {}
    """Labels of the nodes it may run on."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """Tolerated taints, as Kubernetes writes them."""
    devices: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Devices beside GPUs that a pod asks for, by resource: `vpc.amazonaws.com/efa: 4`, `rdma/hca: 1`."""
    capabilities: tuple[Annotated[str, Field(pattern=r"^[A-Z_]+$")], ...] = ()
    """Linux capabilities its container is given: `IPC_LOCK`, which RDMA needs."""
    affinity: dict[str, Any] = {}
    """Node and pod affinity, as Kubernetes writes it: pods of one training close together."""
    annotations: dict[str, str] = {}
    """Annotations of the pods."""
    priority_class: ObjectName | None = None
    """Kubernetes' priority class of the pods."""


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
    labels: dict[str, LabelValue] = {}
    """Ray labels of each pod."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> "GroupSpec":
        if self.min > self.max:
            raise ValueError(f"min: must be at most max ({self.max}), got {self.min}")
        return self


class NetworkSpec(Spec):
    """Peers that reach the pods of a job, beside themselves, where the network of Kubernetes obeys policies."""

    operator: NamespaceName
    """Namespace of KubeRay's operator, which asks the head how the job is."""
    monitoring: NamespaceName | None = None
    """Namespace of Prometheus, which reads the pods' metrics."""


class KubeRayCluster(ClusterSpec):
    """A RayJob: KubeRay starts a cluster for the job and takes it away afterwards."""

    kind: Literal["kuberay"]
    image: str
    """Image with slimray, from cluster/Dockerfile."""
    namespace: NamespaceName = "default"
    """Kubernetes namespace."""
    ray_version: str = "2.60.0"
    """Version of Ray in the image."""
    secrets: dict[EnvName, SecretRef] = {}
    """Environment variables of all pods out of Kubernetes secrets."""
    service_account: ObjectName | None = None
    """Of the pods, for access to storage."""
    head: PodSpec = PodSpec.model_validate({})
    """The head, which holds no work; put it on a node that is not spot."""
    workers: dict[NamespaceName, GroupSpec] = Field(min_length=1)
    """Groups of worker pods, by name, which is part of the pods' own."""
    volumes: tuple[VolumeSpec, ...] = ()
    """Shared storage."""
    network: NetworkSpec | None = None
    """Write a NetworkPolicy that shuts all others out, as whoever reaches Ray's ports runs code there; null: none."""
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
    keep_s: int = Field(60, ge=0)
    """The cluster, with the GPUs that are paid for, stays so long after the job; what a run says is in its folder."""
    head_retries: int = Field(0, ge=0)
    """How often a job that ended badly gets a new cluster, where it resumes with all its `retries`. KubeRay cannot tell
    a head that is lost from a user's mistake or retries that are used up: more than 0 pays for those again, too."""
    pull_secrets: tuple[ObjectName, ...] = ()
    """Kubernetes secrets with which the image is pulled."""
    queue: NamespaceName | None = None
    """Kueue's LocalQueue: the job waits until all its pods fit. The cluster then has a fixed size, `max`."""
    priority: LabelValue | None = None
    """Kueue's priority class."""

    @model_validator(mode="after")
    def _queue_fits(self) -> "KubeRayCluster":
        if self.queue is not None and self.autoscale:
            raise ValueError("autoscale: must be false with a queue: Kueue admits a cluster of a fixed size")
        if self.priority is not None and self.queue is None:
            raise ValueError("priority: is Kueue's, it needs a queue")
        return self

    @field_validator("workers")
    @classmethod
    def _no_second_head(cls, value: dict[str, GroupSpec]) -> dict[str, GroupSpec]:
        if "head" in value:
            raise ValueError("head is the name of the head's group, take another")
        return value


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
    partition: OneLine | None = None
    """Partition."""
    account: OneLine | None = None
    """Account."""
    options: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")], OneLine | int] = {}
    """More options of sbatch, by name: `constraint: nvme`."""
    setup: tuple[OneLine, ...] = ()
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


@dataclass(frozen=True)
class Target:
    """A cluster with the words that name it in messages."""

    name: str
    where: str
    cluster: Cluster
