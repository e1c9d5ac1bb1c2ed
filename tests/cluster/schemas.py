"""The schemas of the readers of our manifests: Kubernetes, and KubeRay for a RayJob.

Kubernetes' published schemas come with the package kubernetes-validate (unknown fields are refused). KubeRay's schema
is a CRD of 0.8 MB that no package contains, so the fields of `ray.io/v1` RayJob's spec are written here as in its CRDs
(KubeRay 1.7), with the parts from Kubernetes, above all pod templates, taken from Kubernetes' own schemas. `refusals`
holds the operator's further rules: objects that pass the schema but that the operator calls invalid.
"""

import json
import re
from importlib import resources
from typing import Any

import jsonschema
from referencing import Registry, Resource

KUBERNETES = "1.37"
FILES = resources.files("kubernetes_validate") / f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict"
DEFINITIONS = json.loads((FILES / "_definitions.json").read_text())
TEXT, FLAG, NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": "number"}
INT32 = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}
NAME_LENGTH = 47  # of a RayJob: the name of its cluster gets six characters more, and a service ten


def choice(*values: str) -> dict[str, Any]:
    return {"enum": [*values]}


def many(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


def fields(*required: str, **properties: Any) -> dict[str, Any]:
    """Return the schema of an object with these fields and no others."""
    return {"type": "object", "required": [*required], "additionalProperties": False, "properties": properties}


def core(name: str, group: str = "core") -> dict[str, Any]:
    """Return the schema of a type of Kubernetes' v1."""
    return {"$ref": f"{DEFINITIONS['$id']}#/$defs/io.k8s.api.{group}.v1.{name}"}


# A RayJob keeps only these fields of a pod template's metadata.
POD = {"allOf": [core("PodTemplateSpec"), {"properties": {"metadata": fields(
    name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS, finalizers=many(TEXT),
), "spec": {"type": "object"}}}]}  # fmt: skip
POLICY = choice("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone")
DELETION = fields(
    onSuccess=fields(policy=POLICY),
    onFailure=fields(policy=POLICY),
    deletionRules=many(fields(
        "condition", "policy", policy=POLICY, condition=fields(
            jobStatus=choice("SUCCEEDED", "FAILED"), jobDeploymentStatus=choice("Failed"),
            ttlSeconds=INT32 | {"minimum": 0},
        ),
    )) | {"minItems": 1},
)  # fmt: skip
CONTAINER = {
    "env": many(core("EnvVar")), "image": TEXT, "imagePullPolicy": TEXT, "resources": core("ResourceRequirements"),
}  # fmt: skip
CREDENTIAL = fields(value=TEXT, valueFrom=core("EnvVarSource"))
RULES = {
    "ingressRules": many(core("NetworkPolicyIngressRule", "networking")),
    "egressRules": many(core("NetworkPolicyEgressRule", "networking")),
}
HEAD = fields(
    "template",
    template=POD, rayStartParams=TEXTS, resources=TEXTS, labels=TEXTS, serviceType=TEXT, headService=core("Service"),
    enableIngress=FLAG, ingressOptions=fields(
        host=TEXT, path=TEXT, pathType=choice("Exact", "Prefix", "ImplementationSpecific"),
        tls=many(core("IngressTLS", "networking")),
    ),
)  # fmt: skip
WORKERS = fields(
    "groupName", "maxReplicas", "minReplicas", "template",
    groupName=TEXT, replicas=INT32, minReplicas=INT32, maxReplicas=INT32, idleTimeoutSeconds=INT32, priority=INT32,
    numOfHosts=INT32, resources=TEXTS, labels=TEXTS, rayStartParams=TEXTS, suspend=FLAG, template=POD,
    scaleStrategy=fields(workersToDelete=many(TEXT)),
)  # fmt: skip
RAY_CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        version=choice("v1", "v2"), idleTimeoutSeconds=INT32, command=many(TEXT), args=many(TEXT),
        upscalingMode=choice("Default", "Aggressive", "Conservative"), envFrom=many(core("EnvFromSource")),
        volumeMounts=many(core("VolumeMount")), securityContext=core("SecurityContext"), **CONTAINER,
    ),
    authOptions=fields(mode=choice("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=FLAG),
    gcsFaultToleranceOptions=fields(
        backend=TEXT, externalStorageNamespace=TEXT, redisAddress=TEXT, redisUsername=CREDENTIAL,
        redisPassword=CREDENTIAL, storage={"type": "object"},
    ),
    headServiceAnnotations=TEXTS,
    historyServerOptions=fields(collectorOptions=fields(**CONTAINER)),
    networkPolicy=fields(
        mode=choice("DenyAll", "DenyAllIngress", "DenyAllEgress"), head=fields(**RULES), worker=fields(**RULES),
        workerGroups=many(fields("groupName", groupName=TEXT, **RULES)),
    ),
    tlsOptions=fields(enabled=FLAG),
    suspend=FLAG,
    managedBy=choice("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    upgradeStrategy=fields(type=choice("Recreate", "None")),
    headGroupSpec=HEAD,
    workerGroupSpecs=many(WORKERS),
)  # fmt: skip
RAY_JOB = fields(
    "apiVersion", "kind", "metadata", "spec",
    apiVersion=choice("ray.io/v1"), kind=choice("RayJob"),
    metadata={"$ref": f"{DEFINITIONS['$id']}#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"},
    spec=fields(
        entrypoint=TEXT, runtimeEnvYAML=TEXT, jobId=TEXT, metadata=TEXTS, entrypointNumCpus=NUMBER,
        entrypointNumGpus=NUMBER, entrypointResources=TEXT, rayClusterSpec=RAY_CLUSTER, clusterSelector=TEXTS,
        submissionMode=choice("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"), submitterPodTemplate=POD,
        submitterConfig=fields(backoffLimit=INT32), activeDeadlineSeconds=INT32,
        preRunningDeadlineSeconds=INT32 | {"minimum": 1}, backoffLimit=INT32, shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=INT32, deletionStrategy=DELETION, suspend=FLAG,
        managedBy=choice("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    ),
)  # fmt: skip


def validate(manifest: dict[str, Any]) -> None:
    """Validate an object against the schema of its reader; raises jsonschema.ValidationError."""
    kind = manifest.get("kind", "")
    if kind == "RayJob":
        schema = RAY_JOB
    else:
        group = str(manifest.get("apiVersion")).split("/")[0].split(".")[0]
        name = kind.lower() + ("-v1" if group == "v1" else f"-{group}-v1")
        schema = json.loads((FILES / f"{name}.json").read_text())
    registry: Any = Registry().with_resource(DEFINITIONS["$id"], Resource.from_contents(DEFINITIONS))
    jsonschema.Draft202012Validator(schema, registry=registry).validate(manifest)


def refusals(ray_job: dict[str, Any]) -> list[str]:
    """Return the reasons why KubeRay's operator, or Kueue if there is a queue, refuses a RayJob of a valid schema."""
    meta, spec = ray_job["metadata"], ray_job["spec"]
    cluster, found = spec["rayClusterSpec"], []
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    if len(meta["name"]) > NAME_LENGTH or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", meta["name"]):
        found.append(f"its name is no label of DNS of at most {NAME_LENGTH} characters that begins with a letter")
    for group in groups:
        params, env = group.get("rayStartParams", {}), group["template"]["spec"]["containers"][0].get("env", [])
        if group.get("resources") and params.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            found.append("resources are given twice")
        if "labels" in params:
            found.append("labels are in rayStartParams")
        for key, value in group.get("labels", {}).items():
            if not (is_label(value) and is_label(key.rpartition("/")[2])):
                found.append(f"{key}: {value} is no label")
        if group["template"]["spec"].get("restartPolicy", "Never") != "Never" and cluster["enableInTreeAutoscaling"]:
            found.append("pods are restarted")
        if {one["name"] for one in env} & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "RAY_enable_autoscaler_v2"}:
            found.append("the environment sets what has fields")
    if not spec.get("shutdownAfterJobFinishes") and spec.get("ttlSecondsAfterFinished"):
        found.append("ttlSecondsAfterFinished without shutdownAfterJobFinishes")
    if any(spec.get(name, 1) <= 0 for name in ("activeDeadlineSeconds",)) or spec.get("backoffLimit", 0) < 0:
        found.append("a limit that is not positive")
    if queue := meta.get("labels", {}).get("kueue.x-k8s.io/queue-name"):
        if not is_label(queue):
            found.append(f"{queue} is no label")
        if not spec.get("shutdownAfterJobFinishes") or cluster.get("enableInTreeAutoscaling"):
            found.append("Kueue admits clusters of a fixed size that end with their job")
    return found


def is_label(value: str) -> bool:
    """Return True if Kubernetes accepts the text as a label's value, or as its name without the prefix."""
    return len(value) <= 63 and re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?", value) is not None
