"""Kubernetes objects checked by the schemas of their readers, with invalid variants; Prometheus rules by promtool."""

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from tests.cluster import schemas
from tests.test_job import ROOT
from tests.waits import patience

from slimray.cluster import jobs_api, kuberay, script, specs
from slimray.spec import UserError, parse, parse_yaml

SHIPPED = {name: parse_yaml((ROOT / f"cluster/{name}.yaml").read_text(), name)[0] for name in ("kuberay", "kueue")}
GPU = SHIPPED["kuberay"]["workers"]["gpu"]
EVERYTHING = SHIPPED["kuberay"] | {  # every field that ends in an object
    "network": {"operator": "kuberay-system", "monitoring": "monitoring"},
    "pull_secrets": ["registry"],
    "deadline_s": 86400,
    "workers": {"gpu": GPU | {
        "min": 2, "resources": {"fast": 1}, "labels": {"ray.io/market-type": "spot"}, "priority_class": "training",
        "devices": {"vpc.amazonaws.com/efa": 4}, "capabilities": ["IPC_LOCK"], "annotations": {"a": "b c"},
        "affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "topology.kubernetes.io/zone", "labelSelector": {"matchLabels": {"a": "b"}}},
        ]}},
    }},
}  # fmt: skip


def made_of(document: dict[str, Any], name: str = "tsm") -> dict[str, dict[str, Any]]:
    """Return the objects of a job on the cluster of `document`, by kind; UserError if slimray refuses it."""
    cluster = parse(specs.KubeRayCluster, document, "mine.yaml")
    job = script.Submission(jobs_api.submission_id(name, 1), "job.yaml", "kind: train\n", "s3://team/runs")
    return {one["kind"]: one for one in yaml.safe_load_all(yaml.safe_dump_all(kuberay.kuberay(job, cluster, {})))}


@pytest.mark.parametrize("document", [*SHIPPED.values(), EVERYTHING], ids=[*SHIPPED, "everything"])
def test_manifests_are_as_their_readers_publish_them(document):
    objects = made_of(document)
    assert {"ConfigMap", "RayJob", "PodDisruptionBudget"} <= objects.keys()
    for one in objects.values():
        schemas.validate(one)
    assert schemas.refusals(objects["RayJob"]) == []


Change = Callable[[dict[str, Any]], object]


def workers_of(ray_job: dict[str, Any]) -> dict[str, Any]:
    return ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def pod_of(ray_job: dict[str, Any]) -> dict[str, Any]:
    return workers_of(ray_job)["template"]


@pytest.mark.parametrize(
    ("kind", "change", "complaint"),
    [
        # a misspelt field
        ("RayJob", lambda job: job["spec"].update(backOffLimit=1), "'backOffLimit' was unexpected"),
        ("RayJob", lambda job: job["spec"]["rayClusterSpec"].update(rayversion="2"), "'rayversion' was unexpected"),
        ("RayJob", lambda job: workers_of(job).update(maxReplica=1), "'maxReplica' was unexpected"),
        ("RayJob", lambda job: pod_of(job)["spec"].update(toleration=[]), "'toleration' was unexpected"),
        ("RayJob", lambda job: pod_of(job)["metadata"].update(generateName="a"), "'generateName' was unexpected"),
        ("RayJob", lambda job: pod_of(job)["spec"]["containers"][0].update(lifeCycle={}), "'lifeCycle' was unexpected"),
        ("RayJob", lambda job: job["metadata"].update(label={}), "'label' was unexpected"),
        ("PodDisruptionBudget", lambda one: one["spec"].update(minavailable=1), "'minavailable' was unexpected"),
        ("NetworkPolicy", lambda one: one["spec"]["ingress"][0].update(port=[]), "'port' was unexpected"),
        ("ConfigMap", lambda one: one.update(datas={}), "'datas' was unexpected"),
        # a wrong type or value
        ("RayJob", lambda job: job["spec"].update(ttlSecondsAfterFinished="60"), "'60' is not of type 'integer'"),
        ("RayJob", lambda job: job["spec"].update(submissionMode="Job"), "'Job' is not one of"),
        ("RayJob", lambda job: job["spec"].update(runtimeEnvYAML={"env_vars": {}}), "is not of type 'string'"),
        ("RayJob", lambda job: job["spec"].update(preRunningDeadlineSeconds=0), "0 is less than the minimum of 1"),
        ("RayJob", lambda job: workers_of(job)["rayStartParams"].update(cpus=1), "1 is not of type 'string'"),
        ("RayJob", lambda job: workers_of(job).update(replicas=2**31), "is greater than the maximum"),
        ("RayJob", lambda job: pod_of(job)["spec"].update(nodeSelector=["a"]), "is not of type 'object'"),
        ("RayJob", lambda job: pod_of(job)["spec"].update(terminationGracePeriodSeconds="9"), "'9' is not of type"),
        ("PodDisruptionBudget", lambda one: one.update(apiVersion="policy/v1beta1"), "'policy/v1beta1' is not one of"),
        ("ConfigMap", lambda one: one["data"].update(a=1), "1 is not of type 'string'"),
        # a missing one
        ("RayJob", lambda job: job["spec"]["rayClusterSpec"].pop("headGroupSpec"), "'headGroupSpec' is a required"),
        ("RayJob", lambda job: workers_of(job).pop("maxReplicas"), "'maxReplicas' is a required"),
        ("RayJob", lambda job: workers_of(job).pop("template"), "'template' is a required"),
        ("RayJob", lambda job: pod_of(job)["spec"].pop("containers"), "'containers' is a required"),
        ("RayJob", lambda job: pod_of(job)["spec"]["containers"][0].pop("name"), "'name' is a required"),
        ("RayJob", lambda job: pod_of(job)["spec"]["volumes"][0].pop("name"), "'name' is a required"),
        ("RayJob", lambda job: pod_of(job)["spec"]["affinity"]["podAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"][0].pop("topologyKey"), "'topologyKey' is a required"),
    ],
)  # fmt: skip
def test_the_schemas_refuse_what_their_readers_would(kind, change: Change, complaint):
    one = copy.deepcopy(made_of(EVERYTHING)[kind])
    schemas.validate(one)
    change(one)
    with pytest.raises(jsonschema.ValidationError, match=re.escape(complaint)):
        schemas.validate(one)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda job: job["metadata"].update(name="3d-1"), "begins with a letter"),
        (lambda job: job["metadata"].update(name="a" * 48), "at most 47 characters"),
        (lambda job: workers_of(job).update(resources={"CPU": "4"}), "resources are given twice"),
        (lambda job: workers_of(job)["rayStartParams"].update(labels="a=b"), "labels are in rayStartParams"),
        (lambda job: workers_of(job)["labels"].update(pool="big one"), "pool: big one is no label"),
        (lambda job: pod_of(job)["spec"].update(restartPolicy="Always"), "pods are restarted"),
        (lambda job: job["spec"].pop("shutdownAfterJobFinishes"), "ttlSecondsAfterFinished without"),
        (lambda job: job["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "team"}), "Kueue admits clusters"),
    ],
)
def test_what_the_operators_refuse_beyond_their_schemas_is_told(change: Change, complaint):
    ray_job = made_of(EVERYTHING)["RayJob"]
    assert schemas.refusals(ray_job) == []
    change(ray_job)
    assert any(complaint in found for found in schemas.refusals(ray_job)), schemas.refusals(ray_job)


@pytest.mark.parametrize("name", ["3d_unet", "3d-unet", "2026", "___", "Ünet", "a" * 60, "a-" * 30, "tsm"])
def test_a_job_of_any_name_gets_one_that_kuberay_takes(name):
    objects = made_of(SHIPPED["kuberay"], name)
    assert schemas.refusals(objects["RayJob"]) == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"namespace": "My ML"}, "namespace"),
        ({"workers": {"GPU": GPU}}, "workers.GPU"),
        ({"workers": {"head": GPU}}, "workers"),
        ({"workers": {"gpu": GPU | {"labels": {"pool": "big one"}}}}, "workers.gpu.labels.pool"),
        ({"workers": {"gpu": GPU | {"node_selector": {"pool": "big one"}}}}, "workers.gpu.node_selector.pool"),
        ({"workers": {"gpu": GPU | {"priority_class": "Very High"}}}, "workers.gpu.priority_class"),
        ({"queue": "my team", "autoscale": False}, "queue"),
        ({"queue": "team", "priority": "Very High", "autoscale": False}, "priority"),
        ({"service_account": "My Account"}, "service_account"),
        ({"pull_secrets": ["My Registry"]}, "pull_secrets"),
        ({"secrets": {"WANDB_API_KEY": {"secret": "My Secret", "key": "api-key"}}}, "secrets.WANDB_API_KEY.secret"),
        ({"secrets": {"WANDB_API_KEY": {"secret": "wandb", "key": "api key"}}}, "secrets.WANDB_API_KEY.key"),
        ({"volumes": [{"claim": "My Data", "mount": "/mnt/shared"}]}, "volumes"),
        ({"start_deadline_s": 0}, "start_deadline_s"),
    ],
)
def test_names_that_kubernetes_would_refuse_are_refused_when_the_file_is_read(change, field):
    """Schemas do not check these: the API server would report them at `kubectl apply`, about objects nobody wrote."""
    with pytest.raises(UserError, match=rf"^mine\.yaml: {re.escape(field)}"):
        made_of(SHIPPED["kuberay"] | change)


# --------------------------------------------------------------------------------------------------- Prometheus


def promtool(*arguments: str) -> tuple[int, str]:
    """Return exit code and output of promtool (Debian: prometheus); skip the test if it is not installed."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool: install the Debian package prometheus")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=patience(60))
    return done.returncode, done.stdout + done.stderr


def test_prometheus_takes_its_configuration_and_the_alerts():
    code, said = promtool("check", "config", str(ROOT / "cluster/prometheus.yml"))
    assert code == 0, said
    assert "SUCCESS: 5 rules found" in said


def test_prometheus_can_read_the_queries_of_the_dashboards(tmp_path: Path):
    boards = [json.loads(path.read_text()) for path in sorted((ROOT / "cluster/grafana").glob("*.json"))]
    queries = [target["expr"] for board in boards for panel in board["panels"] for target in panel["targets"]]
    queries = [re.sub(r"\$\{?\w+(:\w+)?\}?", "x", query) for query in queries]  # Grafana's variables
    assert len(queries) > 20
    rules = [{"record": f"panel_{place}", "expr": query} for place, query in enumerate(queries)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    code, said = promtool("check", "rules", str(tmp_path / "rules.yml"))
    assert code == 0, said


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda rule: rule.update(exprs=rule.pop("expr")), "field exprs not found"),
        (lambda rule: rule.pop("expr"), "field 'expr' must be set"),
        (lambda rule: rule.update(expr="rate(ray_slimray_step[5m"), "could not parse expression"),
        (lambda rule: rule.update({"for": "5 minutes"}), "not a valid duration string"),
    ],
)
def test_prometheus_refuses_rules_that_are_none(tmp_path: Path, change: Change, complaint):
    document = yaml.safe_load((ROOT / "cluster/alerts.yml").read_text())
    change(document["groups"][0]["rules"][0])
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(document))
    code, said = promtool("check", "rules", str(tmp_path / "alerts.yml"))
    assert code != 0
    assert complaint in said
