"""A job as Kubernetes objects: ConfigMap, RayJob, disruption budgets, NetworkPolicy; `ray.io/v1` as of KubeRay 1.7."""

import json
from collections.abc import Mapping
from typing import Any

from slimray.cluster.script import SCRIPT, Submission, env_vars, files
from slimray.cluster.specs import GroupSpec, KubeRayCluster, NetworkSpec, PodSpec, capacity
from slimray.cluster.tools import STORAGE
from slimray.spec import dump_yaml

JOBS_DIR = "/etc/slimray"  # where pods find the job
GCS, DASHBOARD, METRICS = 6379, 8265, 8080  # ports of Ray's pods


def kuberay(job: Submission, cluster: KubeRayCluster, values: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a ConfigMap with the job, the RayJob, disruption budgets for its pods and, if wanted, a network policy."""
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
        "backoffLimit": cluster.head_retries,  # other retries are slimray's own, on the existing cluster
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
    about = meta | {"labels": labels | queue, "annotations": {STORAGE: job.storage}}
    objects = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": files(job, cluster)},
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": about, "spec": ray_job},
        _budget("head", 1, job, meta),
    ]
    # Pods of a RayCluster do not belong to a built-in controller, so a budget can only use `minAvailable`.
    sizes = {name: group.min if cluster.autoscale else group.max for name, group in cluster.workers.items()}
    objects += [_budget(name, size, job, meta) for name, size in sizes.items() if size]
    return objects + ([] if cluster.network is None else [_network(cluster.network, job, meta)])


def _network(network: NetworkSpec, job: Submission, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Admit only the pods of the job itself, the pod that submits it, KubeRay's operator and Prometheus.

    The submitting pod belongs to a Kubernetes Job with the RayJob's name, which Kubernetes writes into a pod label.
    """

    def of(place: str) -> dict[str, Any]:
        return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": place}}}

    def ports(number: int) -> list[dict[str, Any]]:
        return [{"protocol": "TCP", "port": number}]

    own = {"matchLabels": {"slimray.io/job": job.id}}
    submitter = {"podSelector": {"matchLabels": {"batch.kubernetes.io/job-name": job.id}}}
    rules = [{"from": [{"podSelector": own}]}, {"from": [submitter, of(network.operator)], "ports": ports(DASHBOARD)}]
    rules += [{"from": [of(network.monitoring)], "ports": ports(METRICS)}] if network.monitoring else []
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": meta,
        "spec": {"podSelector": own, "policyTypes": ["Ingress"], "ingress": rules},
    }


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
    """Return the template of a pod that drains its Ray node when Kubernetes ends it, and has the time to do so."""
    gpus = pod.gpus if isinstance(pod, GroupSpec) else 0
    asks = {"cpu": f"{pod.cpus:g}", "memory": pod.memory, **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    asks |= {name: str(count) for name, count in pod.devices.items()}
    drain_s = cluster.grace_period_s - 20  # the rest is for Ray's processes to end
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
    if pod.capabilities:
        container["securityContext"] = {"capabilities": {"add": list(pod.capabilities)}}
    if role == "head":
        volumes.append({"name": "job", "configMap": {"name": job.id}})
        mounts.append({"name": "job", "mountPath": JOBS_DIR, "readOnly": True})
        container["ports"] = [
            {"name": name, "containerPort": port}
            for name, port in (("gcs-server", GCS), ("dashboard", DASHBOARD), ("metrics", METRICS))
        ]
    else:  # `ray start` is a child of the container's shell, which would not pass SIGTERM on
        # The agent polls the cloud's metadata service (AWS: needs a hop limit of 2) and exits if none responds.
        agent = "nohup slimray watch-preemption > /tmp/slimray-watch.log 2>&1 &"
        wait = "pid=$(pgrep -of '[b]in/ray start') && kill -TERM $pid"
        wait += " && while kill -0 $pid 2> /dev/null; do sleep 1; done"
        container["lifecycle"] = {
            "postStart": {"exec": {"command": ["/bin/sh", "-c", agent]}},
            "preStop": {"exec": {"command": ["/bin/sh", "-c", f"{wait}; true"]}},
        }
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": cluster.grace_period_s,
        "containers": [container],
        "volumes": volumes,
        **({"serviceAccountName": cluster.service_account} if cluster.service_account else {}),
        **({"nodeSelector": pod.node_selector} if pod.node_selector else {}),
        **({"tolerations": list(pod.tolerations)} if pod.tolerations else {}),
        **({"affinity": pod.affinity} if pod.affinity else {}),
        **({"priorityClassName": pod.priority_class} if pod.priority_class else {}),
        **({"imagePullSecrets": [{"name": name} for name in cluster.pull_secrets]} if cluster.pull_secrets else {}),
    }
    about: dict[str, Any] = {"labels": {"slimray.io/job": job.id, "slimray.io/group": role}}
    about |= {"annotations": pod.annotations} if pod.annotations else {}
    return {"metadata": about, "spec": spec}
