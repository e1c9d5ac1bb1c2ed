"""Cluster files and their products: real schemas, scripts that run, one-sentence errors. No cluster is started."""

import contextlib
import copy
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import validate_config
from tests.cluster import schemas
from tests.test_job import ROOT
from tests.waits import patience, wait_for

from slimray import job, runs
from slimray.cli import main
from slimray.cluster import jobs_api, kuberay, local, script, slurm, specs, submit
from slimray.spec import RunFailed, UserError, parse, parse_yaml
from slimray.train.metrics import GAUGES

CHAIN = """
{kind: prepare, name: clips, data: {card: moving_shapes, clips: 40, size: 32, frames: 12}}
---
kind: train
name: tsm
data: {run: clips, size: 32}
model: {name: tsm_resnet18, width: 0.125, num_segments: 4}
batch: {total: 8, per_worker: 4}
optim: {lr: 0.02, reference_batch: 8, epochs: 2}
scale: {workers: 2}
"""
JOBS = "{kind: jobs, address: 'http://127.0.0.1:1', storage: 's3://team/runs'%s}"
FILES = {path.stem: parse_yaml(path.read_text(), str(path)) for path in (ROOT / "cluster").glob("*.yaml")}
NAMES = sorted(name for name, documents in FILES.items() if documents[0].get("kind") in specs.KINDS)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder with a job, without storage or token of the person who runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in ("SLIMRAY_STORAGE", "SLIMRAY_CLUSTER", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/chain.yaml").write_text(CHAIN)
    return tmp_path


@pytest.fixture
def shell(here, monkeypatch, capsys):
    """`shell("submit", ...)` is (exit code, standard output, standard error) of `slimray submit ...`."""

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["slimray", *arguments])
        code: Any = 0
        try:
            main.main()
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out, printed.err

    return run


def ready_for(name: str, storage: str = "/shared/runs") -> tuple[specs.Target, script.Submission]:
    target = submit.load_cluster(name, "jobs/chain.yaml")
    return target, submit.make_submission(["jobs/chain.yaml"], target, storage=storage)


def as_cluster(text: str) -> specs.Target:
    Path("cluster").mkdir(exist_ok=True)
    Path("cluster/mine.yaml").write_text(text)
    return submit.load_cluster("mine", "jobs/chain.yaml")


# ------------------------------------------------------------------------------------------- the files that ship


def test_every_kind_has_a_file_and_every_file_is_found_by_its_name(here):
    assert {submit.load_cluster(name).cluster.kind for name in NAMES} == set(specs.KINDS)
    assert sorted(submit.list_clusters()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_is_complete(here, name):
    target, ready = ready_for(name)
    text = submit.render(ready, target)
    if target.cluster.kind == "kuberay":
        shipped = next(one["data"] for one in yaml.safe_load_all(text) if one["kind"] == "ConfigMap")
    else:
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
        shipped = dict(re.findall(r"^cat > \S*/([\w.]+)\"? <<'END_OF_FILE'\n(.*?\n)END_OF_FILE$", text, re.S | re.M))
    assert shipped["run.sh"].strip() == script.run_script(ready, target.cluster).strip()
    alone = [one.document for one in job.load(["jobs/chain.yaml"])]
    assert parse_yaml(shipped["chain.yaml"], "shipped") == alone, "the same resolved job as `run`"
    Path("again.yaml").write_text(shipped["chain.yaml"])
    assert [one.document for one in job.load(["again.yaml"])] == alone


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_clouds_are_as_ray_takes_them_with_a_head_that_holds_no_work(name):
    spec: Any = submit.load_cluster(name).cluster
    config = spec.ray_up
    validate_config(config)
    nodes = config["available_node_types"]
    assert nodes[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert {which: set(node["resources"]) for which, node in nodes.items()} == {
        "head": {"CPU"}, "gpu": {"CPU", "GPU"}, "decode": {"CPU"},
    }  # fmt: skip
    assert "spot" in json.dumps(nodes["gpu"]["node_config"]).lower()
    assert "spot" not in json.dumps(nodes["head"]["node_config"]).lower()
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "--object-spilling-directory=/mnt/nvme" in commands[1]
        subprocess.run(["bash", "-n"], input="\n".join(commands), text=True, check=True)
    assert f"slimray watch-preemption --cloud {name} " in config["worker_start_ray_commands"][-1]
    subprocess.run(["bash", "-n"], input="\n".join(config["initialization_commands"]), text=True, check=True)
    assert specs.capacity(spec) == specs.Capacity(8 * 96 + 16 * 64, 64, 96, 8)


def test_every_option_of_our_ray_start_commands_exists():
    done = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--help"], capture_output=True, text=True, check=True
    )
    texts = [path.read_text() for path in (ROOT / "cluster").glob("*.yaml")]
    backends = [path.read_text() for path in (ROOT / "platform/slimray/cluster").glob("*.py")]
    texts += [line for text in backends for line in text.splitlines() if "ray start" in line]
    starts = [
        part for text in texts for part in re.findall(r"ray start ((?:--\S+\s+|[^-]\S*\s+)*?--\S+(?:\s+--\S+)*)", text)
    ]
    options = {option for start in starts for option in re.findall(r"(--[a-z-]+)", start)}
    assert {"--head", "--autoscaling-config", "--object-spilling-directory"} <= options
    assert options <= set(re.findall(r"--[a-z-]+", done.stdout))


def test_the_cluster_on_one_machine_is_as_ray_takes_it():
    spec: Any = submit.load_cluster("local").cluster
    config = local.autoscaling_config(spec)
    validate_config(config)
    assert config["available_node_types"]["ray.head.default"]["resources"] == {"CPU": 0}
    assert specs.capacity(spec) == specs.Capacity(4, 0, 2, 0)


def test_the_image_has_the_libraries_that_the_makefile_asks_for():
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("SYSTEM :="))
    packages = [pair.partition(":")[2] for pair in line.split()[2:]]
    text = (ROOT / "cluster/Dockerfile").read_text()
    assert packages
    assert all(re.search(rf"\s{re.escape(package)}\s", text) for package in packages)
    for source in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())


def test_dashboards_and_alerts_ask_for_numbers_that_exist():
    import ray

    folder = Path(ray.__file__).parent
    known = " ".join(path.read_text() for path in folder.glob("dashboard/modules/metrics/dashboards/*_panels.py"))
    known += " ".join(f"ray_{name}" for name in GAUGES)  # what is exported: tests/train/test_exported_metrics.py
    asked: dict[str, str] = {}
    for path in (ROOT / "cluster/grafana").glob("*.json"):
        board = json.loads(path.read_text())
        assert board["uid"].startswith("slimray-")
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids) > 5
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
        assert len(set(places)) == len(places)
        asked |= {target["expr"]: path.name for panel in board["panels"] for target in panel["targets"]}
        asked |= {one["query"]["query"]: path.name for one in board["templating"]["list"] if one["type"] == "query"}
    rules = yaml.safe_load((ROOT / "cluster/alerts.yml").read_text())["groups"][0]["rules"]
    asked |= {rule["expr"]: rule["alert"] for rule in rules}
    assert "alerts.yml" in yaml.safe_load((ROOT / "cluster/prometheus.yml").read_text())["rule_files"]
    names = {name: where for expr, where in asked.items() for name in re.findall(r"\b(?:ray|autoscaler)_\w+", expr)}
    assert len(names) > 20
    unknown = {name: where for name, where in names.items() if not re.search(rf"\b{name}\b", known)}
    assert unknown == {}


# -------------------------------------------------------------------------------------------------- Kubernetes


def objects_of(name: str, kind: str) -> list[dict[str, Any]]:
    target, ready = ready_for(name)
    found = [one for one in yaml.safe_load_all(submit.render(ready, target)) if one["kind"] == kind]
    assert found
    return found


@pytest.mark.parametrize("name", ["kuberay", "kueue"])
def test_a_rayjob_ends_with_its_job_and_repeats_nothing_by_itself(here, name):
    (ray_job,) = objects_of(name, "RayJob")
    assert (ray_job["apiVersion"], ray_job["metadata"]["name"]) == ("ray.io/v1", "tsm-1")
    env = yaml.safe_load(ray_job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert all(isinstance(value, str) for value in env.values())
    assert float(env["SLIMRAY_CLUSTER_GPUS"]) == (64 if name == "kuberay" else 32)
    assert ray_job["spec"]["backoffLimit"] == 0, "retries are slimray's: KubeRay would repeat a user's mistake, too"
    assert ray_job["spec"]["ttlSecondsAfterFinished"] == 60, "GPUs are paid for"


def test_pods_get_the_devices_and_rights_that_their_group_asks_for(here):
    document = FILES["kuberay"][0]
    gpu = document["workers"]["gpu"] | {
        "devices": {"vpc.amazonaws.com/efa": 4}, "capabilities": ["IPC_LOCK"], "priority_class": "training",
        "annotations": {"a": "b"}, "affinity": {"podAffinity": {}},
    }  # fmt: skip
    cluster = specs.KubeRayCluster.model_validate(
        document | {"workers": {"gpu": gpu}, "pull_secrets": ["registry"], "machine": {}}
    )
    ready = script.Submission("tsm-1", "job.yaml", "kind: train\n", "s3://team/runs")
    ray_job = next(one for one in kuberay.kuberay(ready, cluster, {}) if one["kind"] == "RayJob")
    schemas.validate(ray_job)
    template = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    (container,) = template["spec"]["containers"]
    assert container["resources"]["limits"]["vpc.amazonaws.com/efa"] == "4"
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    assert template["metadata"]["annotations"] == {"a": "b"}
    assert template["spec"]["priorityClassName"] == "training"
    assert template["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert template["spec"]["affinity"] == {"podAffinity": {}}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda config: config.update(max_worker=3), "max_worker"),
        (lambda config: config["available_node_types"]["gpu"].pop("node_config"), "node_config"),
        (lambda config: config["provider"].update(type=7), "7 is not of type 'string'"),
    ],
)
def test_rays_schema_refuses_what_ray_up_would(tmp_path, change, complaint):
    document = copy.deepcopy(FILES["aws"][0])
    change(document["ray_up"])
    (tmp_path / "aws.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(UserError, match=rf"aws.yaml: ray_up.*{complaint}"):
        submit.load_cluster(str(tmp_path / "aws.yaml"))


def test_a_pod_that_is_told_to_go_drains_its_node_first(here):
    (ray_job,) = objects_of("kuberay", "RayJob")
    spec = ray_job["spec"]["rayClusterSpec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        stop = container["lifecycle"]["preStop"]["exec"]["command"]
        assert subprocess.run([*stop[:1], "-n", "-c", stop[2]], capture_output=True, text=True).stderr == ""
        env = {one["name"]: one for one in container["env"]}
        assert 0 < int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]["value"]) < pod["terminationGracePeriodSeconds"]
        assert env["WANDB_API_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "wandb", "key": "api-key"}}
    labels = spec["headGroupSpec"]["template"]["metadata"]["labels"]
    (budget,) = objects_of("kuberay", "PodDisruptionBudget")
    assert budget["spec"] == {"minAvailable": 1, "selector": {"matchLabels": labels}}


def lets_in(policy: dict[str, Any], namespace: str, labels: dict[str, str], port: int) -> bool:
    """Return True if `policy` lets a pod with `labels` in `namespace` reach `port` of the pods it protects."""

    def fits(selector: dict[str, Any], there: dict[str, str]) -> bool:
        return selector.get("matchLabels", {}).items() <= there.items()

    def is_meant(peer: dict[str, Any]) -> bool:
        own = {"kubernetes.io/metadata.name": namespace}
        same = fits(peer["namespaceSelector"], own) if "namespaceSelector" in peer else namespace == "ml"
        return same and fits(peer.get("podSelector", {}), labels)

    return any(
        any(map(is_meant, rule["from"])) and port in [one["port"] for one in rule.get("ports", [{"port": port}])]
        for rule in policy["spec"]["ingress"]
    )


def test_a_network_policy_lets_the_job_its_submitter_the_operator_and_prometheus_in():
    document = FILES["kuberay"][0] | {"network": {"operator": "kuberay-system", "monitoring": "monitoring"}}
    cluster = specs.KubeRayCluster.model_validate(document)
    ready = script.Submission("tsm-1", "job.yaml", "kind: train\n", "s3://team/runs")
    objects = {one["kind"]: one for one in kuberay.kuberay(ready, cluster, {})}
    policy, spec = objects["NetworkPolicy"], objects["RayJob"]["spec"]["rayClusterSpec"]
    assert policy["apiVersion"] == "networking.k8s.io/v1"
    assert (policy["metadata"]["name"], policy["metadata"]["namespace"]) == ("tsm-1", "ml")
    assert policy["metadata"]["labels"]["slimray.io/job"] == "tsm-1", "`stop` finds it by this label"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        labels = group["template"]["metadata"]["labels"]
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items(), "it holds for each pod"
        assert all(lets_in(policy, "ml", labels, port) for port in (6379, 8265, 8080, 10_002))
        assert not lets_in(policy, "other", labels, 6379), "the same labels in another namespace"
    assert lets_in(policy, "ml", {"batch.kubernetes.io/job-name": "tsm-1"}, 8265)
    assert lets_in(policy, "kuberay-system", {}, 8265)
    assert lets_in(policy, "monitoring", {}, 8080)
    for namespace, labels, port in [("ml", {}, 8265), ("ml", {"slimray.io/job": "tsm-2"}, 8265), ("default", {}, 6379),
                                    ("monitoring", {}, 8265), ("kuberay-system", {}, 6379)]:  # fmt: skip
        assert not lets_in(policy, namespace, labels, port)


def test_without_a_network_section_there_is_no_policy_and_a_name_that_is_none_is_refused():
    ready = script.Submission("tsm-1", "job.yaml", "kind: train\n", "s3://team/runs")
    plain = specs.KubeRayCluster.model_validate(FILES["kuberay"][0])
    assert "NetworkPolicy" not in [one["kind"] for one in kuberay.kuberay(ready, plain, {})]
    with pytest.raises(UserError, match=r"x\.yaml: network\.operator"):
        parse(specs.KubeRayCluster, FILES["kuberay"][0] | {"network": {"operator": "Kube Ray"}}, "x.yaml")


def test_a_queue_fixes_the_size_of_the_cluster(here):
    (ray_job,) = objects_of("kueue", "RayJob")
    assert ray_job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    spec = ray_job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is False
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 4
    budgets = {
        one["metadata"]["name"]: one["spec"]["minAvailable"] for one in objects_of("kueue", "PodDisruptionBudget")
    }
    assert budgets == {"tsm-1-head": 1, "tsm-1-gpu": 4}, "all of them work, none may be taken"


# ------------------------------------------------------------------------------------------- the script of a job


def do_script(
    folder: Path, codes: list[int], retries: int, restart: bool = False, begin: str = "", **env: str
) -> tuple[int, str, list[str]]:
    """Run run.sh with a `python` that exits with `codes`, one after the other, and a `sleep` that does not sleep."""
    spec = parse_cluster(JOBS % f", retries: {retries}, secrets: [TEAM_TOKEN]")
    ready = script.Submission("tsm-1", "my job.yaml", "kind: train\n", "s3://team/my runs", restart)
    for name, text in script.files(ready, spec).items():
        (folder / name).write_text(text)
    programs = folder / "bin"
    programs.mkdir()
    (folder / "codes").write_text("\n".join(map(str, codes)) + "\n")
    (programs / "python").write_text(
        f'#!/bin/sh\n{begin}printf "%s|" "$@" >> {folder}/calls; echo >> {folder}/calls\n'
        f"code=$(head -n 1 {folder}/codes); sed -i 1d {folder}/codes; exit $code\n"
    )
    (programs / "sleep").write_text("#!/bin/sh\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    command, env = ["sh", str(folder / "run.sh")], {"PATH": path, **env}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=patience(20))
    calls = folder / "calls"
    return done.returncode, done.stderr, calls.read_text().splitlines() if calls.exists() else []


def parse_cluster(text: str) -> Any:
    (document,) = parse_yaml(text, "x.yaml")
    return specs.KINDS[document["kind"]].model_validate(document)


def test_a_run_that_fails_is_started_again_and_then_resumes(tmp_path):
    code, said, calls = do_script(tmp_path, [1, 137, 0], retries=3, restart=True, TEAM_TOKEN="x")
    assert code == 0
    run = f"-m|slimray.cli|run|{tmp_path}/my job.yaml|--storage|s3://team/my runs|--wait-s|150|"
    assert calls == [f"{run}--restart|"] * 3, "a submission clears a run once, see the test below"
    assert "ended with code 137 and is restarted, 2 retries are left" in said


def test_a_submission_clears_a_run_once_however_often_a_scheduler_starts_it(tmp_path, monkeypatch):
    """Kueue reruns the whole script on another pod at every admission, and so does a requeue in Slurm."""
    (tmp_path / "run").mkdir()
    document = {"kind": "prepare", "name": "run"}
    run = runs.open_run(str(tmp_path), "run")
    with runs.hold(run):
        runs.begin(run, document, 1)
    runs.write_file(run, "results.json", b"{}")
    tokens = [script.Submission("tsm-1", "job.yaml", "", "s3://team/runs", restart=True) for _ in range(2)]
    cluster = parse_cluster(JOBS % "")
    first, second = (re.findall("SLIMRAY_SUBMISSION=(.+)", script.run_script(one, cluster))[0] for one in tokens)
    assert first != second
    assert "SLIMRAY_SUBMISSION" not in script.run_script(replace(tokens[0], restart=False), cluster)
    assert runs.claim(run, document, restart=True, submission=first) == runs.Claim(False, 1)
    assert not runs.exists(run, "results.json")
    with runs.hold(run):
        runs.begin(run, document, 1, first)
    runs.write_file(run, "results.json", b"{}")
    assert runs.claim(run, document, restart=True, submission=first) == runs.Claim(False, 2), "it goes on"
    with runs.hold(run):
        runs.begin(run, document, 2, first)
    assert runs.exists(run, "results.json")
    assert runs.claim(run, document, restart=True, submission=second) == runs.Claim(False, 1), "another one clears it"
    assert not runs.exists(run, "results.json")


def test_retries_are_given_back_after_progress_that_is_on_storage(tmp_path):
    """A run writes to $SLIMRAY_PROGRESS when it has saved a checkpoint: four failures with progress, two retries."""
    saves = f'[ "$(wc -l < {tmp_path}/codes)" -gt 3 ] && echo 40 > "$SLIMRAY_PROGRESS"\n'
    code, said, calls = do_script(tmp_path, [1, 137, 1, 137, 1, 1, 1], retries=2, begin=saves, TEAM_TOKEN="x")
    assert (code, len(calls)) == (1, 7 - 1), said  # without progress after the fourth: two more


def test_retries_come_to_an_end(tmp_path):
    code, _, calls = do_script(tmp_path, [1, 1, 1, 1], retries=2, TEAM_TOKEN="x")
    assert (code, len(calls)) == (1, 3)


def test_a_mistake_of_the_user_is_not_tried_again(tmp_path):
    code, _, calls = do_script(tmp_path, [2, 0], retries=3, TEAM_TOKEN="x")
    assert (code, len(calls)) == (2, 1)


def test_a_missing_secret_ends_the_job_in_one_sentence(tmp_path):
    code, said, calls = do_script(tmp_path, [0], retries=3)
    assert (code, calls) == (2, [])
    there = "add it to the environment of its nodes (secrets of the cluster file)"
    assert said == f"TEAM_TOKEN: is not set on this cluster: {there}\n"


def test_no_secret_is_in_what_is_written(here, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2hunter2")
    monkeypatch.setenv("WANDB_PROJECT", "motion")
    for name in NAMES:
        target, ready = ready_for(name)
        assert "hunter2" not in submit.render(ready, target)
    target = as_cluster(JOBS % ", secrets: [WANDB_API_KEY], pass_env: [WANDB_PROJECT]")
    text = submit.render(ready_for("mine")[1], target)
    assert "hunter2" not in text
    assert "motion" not in text, "taken from the environment when the script runs"


def test_the_script_for_by_hand_takes_the_environment_when_it_runs(here, tmp_path):
    target = as_cluster(JOBS % ", pass_env: [WANDB_PROJECT], env: {NCCL_DEBUG: WARN}")
    os.environ["WANDB_PROJECT"] = 'a "b": $c'
    try:
        text = submit.render(ready_for("mine")[1], target)
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "ray").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/call\ncp -r "$work" {tmp_path}/work 2>&1\n')
        (folder / "ray").chmod(0o755)
        (folder / "python").symlink_to(sys.executable)
        text = text.replace("work=$(mktemp -d);", f"export work={tmp_path}/w; mkdir $work;")
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["sh"], input=text, text=True, env=os.environ | {"PATH": path}, check=True, timeout=patience(30))
    finally:
        del os.environ["WANDB_PROJECT"]
    env = yaml.safe_load((tmp_path / "w/env.yaml").read_text())
    assert env["env_vars"] == {"NCCL_DEBUG": "WARN", "WANDB_PROJECT": 'a "b": $c'}
    assert (Path(env["py_modules"][0]) / "cli/main.py").is_file()
    assert sorted(path.name for path in (tmp_path / "w/job").iterdir()) == ["chain.yaml", "run.sh"]
    assert (tmp_path / "call").read_text().startswith("job submit --no-wait --submission-id tsm-1 --working-dir")


# ------------------------------------------------------------------------------------------------- what goes wrong

WRONG = [
    ("{kind: job}", "kind: unknown kind 'job', did you mean 'jobs'?"),
    ("{storage: x}", "kind: unknown kind 'None' (known: jobs, kuberay, local, ray_up, slurm)"),
    ("{kind: plan, machine: {}}", "kind: plan describes machines for `slimray plan`, jobs cannot be submitted to it"),
    ("{kind: jobs}", "address: is required"),
    ("{kind: jobs, address: 'http://x:8265', adress: x}", "adress: unknown field, did you mean 'address'?"),
    ("{kind: jobs, address: 'ray://x:10001'}", "address: must look like http://HOST:8265, without a password"),
    (JOBS % ", env: {WANDB_API_KEY: abc}", "env: WANDB_API_KEY looks like a secret: name it in `secrets`"),
    (JOBS % ", env: {NOTE: AKIAABCDEFGHIJKLMNOP}", "env.NOTE: holds what looks like a secret"),
    (JOBS % ", pass_env: [HF_TOKEN]", "pass_env: HF_TOKEN looks like a secret, which Ray would log"),
    (JOBS % ", retries: -1", "retries: must be >= 0 (got -1)"),
    ("{kind: local, min_nodes: 3}", "min_nodes: must be at most max_nodes (2), got 3"),
    ("{kind: kuberay, image: x, workers: {}}", "workers: "),
    ("{kind: kuberay, image: x, queue: q, workers: {a: {max: 1}}}", "autoscale: must be false with a queue"),
    ("{kind: kuberay, image: x, workers: {a: {max: 1, min: 2}}}", "workers.a.min: must be at most max (1), got 2"),
    ("{kind: slurm, nodes: 1, cpus_per_node: 4, time: soon}", "time: "),
    ("{kind: ray_up, ray_up: {cluster_name: x}}", "ray_up: available_node_types is required"),
    (
        "{kind: ray_up, ray_up: {cluster_name: x, head_node_type: a, available_node_types: {a: {node_config: {}}}}}",
        "ray_up: 'provider' is a required property",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_a_wrong_cluster_file_is_one_sentence(shell, text, sentence):
    Path("cluster").mkdir()
    Path("cluster/mine.yaml").write_text(text)
    code, out, err = shell("submit", "jobs/chain.yaml", "--cluster", "mine")
    assert (code, out) == (2, "")
    line, *others = err.splitlines()
    assert others == []
    assert "cluster/mine.yaml: " in line
    assert sentence in line


def test_other_mistakes_are_one_sentence_too(shell):
    for command, sentence in [
        ("submit jobs/chain.yaml --cluster aw", "unknown cluster 'aw', did you mean 'aws'?"),
        ("submit jobs/chain.yaml --cluster summit", "describes machines for `slimray plan`"),
        ("submit jobs/gone.yaml --cluster local", "jobs/gone.yaml: no such file"),
        ("submit jobs/chain.yaml --cluster local --set tsm:model.width=0", "(tsm): model.width: must be > 0 (got 0)"),
        ("submit jobs/chain.yaml --cluster slurm --storage runs", "storage: 'runs' is a folder of this machine"),
        ("submit jobs/chain.yaml --cluster local", "start it with `slimray cluster start local`"),
        ("cluster start aws", "is of kind ray_up, and only kind local is started by slimray: use `ray up`"),
    ]:  # fmt: skip
        code, _, err = shell(*command.split())
        assert code == 2, command
        assert sentence in err
        assert len(err.splitlines()) == 1


def test_a_tool_that_is_not_installed_is_named(shell, here, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    code, _, err = shell("logs", "tsm", "--cluster", "slurm")
    assert code == 2
    assert "squeue is not installed here: run `squeue --me" in err


def test_what_can_never_fit_is_refused_before_anything_is_asked(shell):
    for name, option, sentence in [
        ("local", "scale.workers=8", "needs 9 CPUs, but {} can have at most 4: lower scale.workers"),
        ("local", "scale.gpus_per_worker=1", "needs 2 GPUs, but {} can have at most 0"),
        ("kueue", "scale.cpus_per_worker=100", "a worker needs 100 CPUs, but the largest node of {} has 92"),
    ]:
        arguments = ["--cluster", name, "--storage", "/shared/runs", "--set", option, "--set", "batch.per_worker=1"]
        code, _, err = shell("submit", "jobs/chain.yaml", *arguments)
        assert code == 2, err
        assert sentence.format(str(ROOT / f"cluster/{name}.yaml")) in err.replace(
            str(submit.inputs.packaged("cluster")), str(ROOT / "cluster")
        )


def test_what_is_passed_on_has_to_be_there(here):
    target = as_cluster(JOBS % ", pass_env: [WANDB_PROJECT_OF_NOBODY]")
    with pytest.raises(UserError, match="pass_env: WANDB_PROJECT_OF_NOBODY is not set here: export it"):
        submit.make_submission(["jobs/chain.yaml"], target, storage="/shared/runs")


class Answers(http.server.BaseHTTPRequestHandler):
    """A dashboard that refuses the token of every request."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_head_that_is_out_of_reach_silent_or_closed_is_one_sentence_in_time(here, monkeypatch):
    monkeypatch.setattr(jobs_api, "REQUEST_TIMEOUT_S", 0.5)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(
        RunFailed, match=r"mine.yaml: the cluster at http://127.0.0.1:1 does not respond \(connection ref"
    ):
        jobs_api.jobs(as_cluster(JOBS % ""))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RunFailed, match=r"does not respond \(timed out\)"):
            jobs_api.jobs(as_cluster(f"{{kind: jobs, address: '{address}'}}"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(
        UserError, match="rejects the token, set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"
    ):
        jobs_api.jobs(as_cluster(f"{{kind: jobs, address: '{address}'}}"))
    with pytest.raises(UserError, match="token_env: TEAM is not set, export the token of the cluster"):
        jobs_api.jobs(as_cluster(f"{{kind: jobs, address: '{address}', token_env: TEAM}}"))
    server.shutdown()


def test_a_port_that_is_taken_is_said_before_ray_starts(shell):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        Path("mine.yaml").write_text(f"{{kind: local, dashboard_port: {port}, port: 1025}}")
        code, _, err = shell("cluster", "start", "./mine.yaml")
    assert (code, err) == (2, f"mine.yaml: dashboard_port: {port} is in use by another program, choose another port\n")
    assert shell("cluster", "stop", "./mine.yaml") == (0, "mine: is not running\n", "")


def test_kubectl_and_sbatch_are_given_the_manifest_where_they_are(shell, here, monkeypatch):
    programs = here / "bin"
    programs.mkdir()
    (programs / "kubectl").write_text(
        f'#!/bin/sh\ncase "$*" in *get*) echo rayjob.ray.io/tsm-4;; *) cat > {here}/applied; echo ok;; esac\n'
    )
    (programs / "sbatch").write_text(f"#!/bin/sh\ncat > {here}/batch; echo Submitted batch job 7\n")
    for name in ("kubectl", "sbatch"):
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    options = ["--storage", "/shared/runs"]
    code, out, err = shell("submit", "jobs/chain.yaml", "--cluster", "kuberay", *options)
    assert (code, err) == (0, "")
    follow = "next: slimray logs -f tsm-5 --cluster kuberay\n"
    assert out == f"tsm-5: submitted to kuberay, its runs are in /shared/runs\n{follow}", "after those that are there"
    assert {one["metadata"]["name"] for one in yaml.safe_load_all(Path("applied").read_text())} == {
        "tsm-5",
        "tsm-5-head",
    }
    code, out, _ = shell("submit", "jobs/chain.yaml", "--cluster", "slurm", *options)
    follow = "next: slimray logs -f tsm-7 --cluster slurm\n"
    assert (code, out) == (0, f"tsm-7: submitted to slurm, its runs are in /shared/runs\n{follow}")
    assert "#SBATCH --nodes=4\n" in Path("batch").read_text()
    monkeypatch.setenv("PATH", str(here))
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(programs)
    code, _, err = shell("submit", "jobs/chain.yaml", "--cluster", "slurm", *options)
    assert code == 2
    assert "sbatch is not installed here: write the manifest with --dry-run --out FILE and run `sbatch FILE`" in err


def put_programs(here: Path, monkeypatch, **scripts: str) -> None:
    """Put programs of these names first on the PATH; each records its calls in `calls`."""
    programs = here / "bin"
    programs.mkdir()
    for name, text in scripts.items():
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {here}/calls\n{text}\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")


def test_jobs_on_kubernetes_are_listed_followed_and_stopped_by_kubectl(shell, here, monkeypatch):
    def rayjob(name: str, **status: str) -> dict[str, Any]:
        meta = {"name": name, "creationTimestamp": "2026-11-30T01:00:00Z"}
        return {"metadata": meta | {"annotations": {"slimray.io/storage": "s3://team/runs"}}, "status": status}

    done = {"jobStatus": "SUCCEEDED", "startTime": "2026-11-30T01:00:00Z", "endTime": "2026-11-30T01:02:00Z"}
    waits = rayjob("tsm-3", jobDeploymentStatus="Suspended") | {"spec": {"suspend": True}}
    late = {"jobStatus": "RUNNING", "jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}
    items = [rayjob("tsm-2", **done), waits, rayjob("other-1", jobStatus="RUNNING", jobDeploymentStatus="Running")]
    items += [rayjob("late-1", **late, endTime="2026-11-30T01:02:00Z"), rayjob("bad-1", jobDeploymentStatus="Failed")]
    (here / "jobs.json").write_text(json.dumps({"items": items}))
    put_programs(here, monkeypatch, kubectl=f'case "$*" in *get*) cat {here}/jobs.json;; *logs*) echo epoch 1;; esac')
    code, out, _ = shell("status", "--cluster", "kuberay", "--json")
    assert code == 0
    rows = {row["id"]: row for row in json.loads(out)}
    assert rows["tsm-2"] | {"status": "succeeded", "seconds": 120, "storage": "s3://team/runs"} == rows["tsm-2"]
    assert (rows["tsm-3"]["status"], rows["tsm-3"]["message"]) == ("pending", "suspended: waits in its queue")
    assert (rows["late-1"]["status"], rows["late-1"]["message"]) == ("failed", "DeadlineExceeded"), (
        "not running any more"
    )
    assert rows["bad-1"]["status"] == "failed"
    assert shell("logs", "other", "--cluster", "kuberay") == (0, "epoch 1\n", "")
    assert shell("stop", "tsm", "--cluster", "kuberay") == (0, "tsm: is being stopped\n", "")
    assert shell("stop", "tsm-2", "--cluster", "kuberay") == (0, "tsm-2: had already ended\n", "")
    calls = (here / "calls").read_text().splitlines()
    assert calls[0] == "kubectl -n ml get rayjobs -l app.kubernetes.io/managed-by=slimray -o json"
    assert "kubectl -n ml logs job/other-1 --all-containers" in calls
    removed = [call for call in calls if " delete " in call]
    assert removed == ["kubectl -n ml delete rayjob,configmap,poddisruptionbudget -l slimray.io/job=tsm-3"]


def test_the_status_of_a_job_tells_what_it_has_cost_and_what_it_waits_for(shell, here, monkeypatch):
    """The price is that of a node in the cluster file, or the job's own if it has one."""
    meta = {"name": "tsm-1", "creationTimestamp": "2026-11-30T01:00:00Z"}
    meta |= {"annotations": {"slimray.io/storage": str(here / "runs")}}
    (here / "jobs.json").write_text(json.dumps({"items": [{"metadata": meta, "status": {"jobStatus": "RUNNING"}}]}))
    put_programs(here, monkeypatch, kubectl=f"cat {here}/jobs.json")
    (here / "cluster").mkdir()
    priced = (ROOT / "cluster/kuberay.yaml").read_text() + "machine: {gpus_per_node: 8, gpu: A100, price: 24.0}\n"
    (here / "cluster/mine.yaml").write_text(priced)
    run = runs.open_run(str(here / "runs"), "tsm")
    for limits, cost in [({}, 6.0), ({"limits": {"cost": 100, "worker_hour": 2.5}}, 5.0)]:
        with runs.hold(run):
            runs.begin(run, {"kind": "train", "name": "tsm", **limits}, 1 + bool(limits))
            runs.save_checkpoint(run, 10, {"a": b"a"}, {"progress": {"worker_seconds": 7200.0}})
            runs.note(run, "waiting for nodes: there is room for 3 of 8 workers")
            code, out, _ = shell("status", "tsm", "--cluster", "mine", "--json")
            assert code == 0
            (row,) = json.loads(out)
            assert (row["run"], row["worker_hours"], row["cost"]) == ("tsm", 2.0, cost)
            assert row["message"] == "waiting for nodes: there is room for 3 of 8 workers"
    code, out, _ = shell("show", "tsm", "--storage", str(here / "runs"))
    assert "so far: 2 worker-hours, at a cost of 5.00\n" in out
    code, out, _ = shell("status", "--cluster", "mine", "--json")
    assert "cost" not in json.loads(out)[0], "a list asks no storage"


def test_the_run_of_a_job_whose_name_is_no_id_is_found(shell, here, monkeypatch):
    meta = {"name": jobs_api.submission_id("3d_unet", 1), "creationTimestamp": "2026-11-30T01:00:00Z"}
    meta |= {"annotations": {"slimray.io/storage": str(here / "runs")}}
    (here / "jobs.json").write_text(json.dumps({"items": [{"metadata": meta, "status": {"jobStatus": "RUNNING"}}]}))
    put_programs(here, monkeypatch, kubectl=f"cat {here}/jobs.json")
    run = runs.open_run(str(here / "runs"), "3d_unet")
    _, out, _ = shell("status", "3d_unet", "--cluster", "kuberay", "--json")
    assert json.loads(out)[0]["run"] == f"none in {here}/runs yet, or the cluster has another folder of that name"
    with runs.hold(run):
        runs.begin(run, {"kind": "train", "name": "3d_unet"}, 1)
    code, out, err = shell("status", "3d_unet", "--cluster", "kuberay", "--json")
    assert code == 0, err
    assert json.loads(out)[0]["run"] == "3d_unet"


def test_jobs_on_slurm_are_listed_followed_and_stopped_by_its_tools(shell, here, monkeypatch):
    (here / "log").write_text("epoch 1\n")
    lines = ["7|tsm-1|COMPLETED|2026-11-30T01:00:00|2026-11-30T01:05:00|None", "9|tsm-1|PENDING|N/A|N/A|Resources"]
    lines += ["12|interactive|RUNNING|2026-11-30T01:00:00|N/A|None"]
    listing, told = "cat <<'END'\n" + "\n".join(lines) + "\nEND", f"echo JobId=9 StdOut={here}/log Power="
    squeue = f'case "$*" in *--jobs*) cat {here}/state;; *) {listing}\n;; esac'
    (here / "state").write_text("PENDING\n")
    put_programs(here, monkeypatch, scancel="", squeue=squeue, scontrol=told)
    code, out, _ = shell("status", "--cluster", "slurm", "--json")
    assert code == 0
    rows = {row["id"]: row for row in json.loads(out)}
    assert sorted(rows) == ["tsm-7", "tsm-9"], "an interactive job is not slimray's"
    assert (rows["tsm-9"]["status"], rows["tsm-9"]["message"]) == ("pending", "waits: Resources")
    assert (rows["tsm-7"]["status"], rows["tsm-7"]["seconds"]) == ("succeeded", 300)
    assert shell("logs", "tsm", "--cluster", "slurm") == (0, "epoch 1\n", "")
    assert shell("stop", "tsm", "--cluster", "slurm") == (0, "tsm: is being stopped\n", "")
    assert (here / "calls").read_text().splitlines()[-1] == "scancel 9"
    (here / "state").write_text("RUNNING\n")
    assert shell("stop", "tsm", "--cluster", "slurm") == (0, "tsm: is being stopped\n", "")
    said = "its script alone: Ray is there until the run has saved"
    assert (here / "calls").read_text().splitlines()[-1] == "scancel --batch --signal=TERM 9", said


@pytest.mark.parametrize(
    ("signals", "again"),
    [
        ([signal.SIGUSR1], True),
        ([signal.SIGTERM], False),
        ([signal.SIGUSR1, signal.SIGTERM], False),
    ],
)
def test_under_slurm_the_run_saves_and_is_queued_again_before_the_limit_of_time_only(here, monkeypatch, signals, again):
    """Run the whole script with stand-ins for the programs of Slurm and Ray, and a run that takes a moment to end."""
    ends = f"trap 'touch {here}/told; sleep 1; echo released >> {here}/calls; exit 143' TERM"
    python = f"{ends}; touch {here}/began; while true; do sleep 0.1; done"
    put_programs(here, monkeypatch, srun="", scontrol="", ray="", slimray="", python=python)
    cluster = parse_cluster("{kind: slurm, nodes: 2, cpus_per_node: 8, retries: 5, storage: /shared}")
    ready = script.Submission("tsm-1", "job.yaml", "kind: train\n", "/shared")
    text = slurm.slurm(ready, cluster, {})
    (here / "job.sh").write_text(text)
    assert "#SBATCH --signal=B:USR1@120\n" in text
    assert text.count("--cpus-per-task=8") == 3, "srun does not take it over from sbatch"
    child = subprocess.Popen(
        ["bash", "job.sh"], env=os.environ | {"SLURM_JOB_ID": "4711"}, stderr=subprocess.PIPE, text=True
    )
    wait_for("the run to begin", lambda: (here / "began").exists())
    child.send_signal(signals[0])
    wait_for("the run to hear of it", lambda: (here / "told").exists())
    for other in signals[1:]:
        child.send_signal(other)
    _, err = child.communicate(timeout=patience(30))
    assert child.returncode == 143, err
    assert ("the job is requeued and resumes" in err) is again
    calls = (here / "calls").read_text().splitlines()
    assert "released" in calls, "it saves in any case"
    assert ("scontrol requeue 4711" in calls) is again
    assert sum(call.startswith("python ") for call in calls) == 1, "no retry after SIGTERM"
    assert any("ray start --head --port 7090 " in call for call in calls), "a port of its own"


def test_under_slurm_a_run_that_hangs_while_it_saves_is_ended_by_a_second_signal(here, monkeypatch):
    python = f"trap 'touch {here}/told' TERM; touch {here}/began; while true; do sleep 0.1; done"
    put_programs(here, monkeypatch, srun="", scontrol="", ray="", slimray="", python=python)
    cluster = parse_cluster("{kind: slurm, nodes: 2, cpus_per_node: 8, retries: 5, storage: /shared}")
    ready = script.Submission("tsm-1", "job.yaml", "kind: train\n", "/shared")
    (here / "job.sh").write_text(slurm.slurm(ready, cluster, {}))
    child = subprocess.Popen(["bash", "job.sh"], env=os.environ | {"SLURM_JOB_ID": "4711"})
    wait_for("the run to begin", lambda: (here / "began").exists())
    child.send_signal(signal.SIGTERM)
    wait_for("the run to hear of it", lambda: (here / "told").exists())
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=patience(30)) > 128
    assert "requeue" not in (here / "calls").read_text()


def test_a_token_never_travels_over_plain_http(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2")
    refused = "would receive the cluster's token over plain http: forward its port"
    for address, sent in [("http://head.example.org:8265", False), ("http://10.0.0.7:8265", False),
                          ("https://ray.example.org", True), ("http://127.0.0.1:8265", True)]:  # fmt: skip
        target = specs.Target("mine", "mine.yaml", parse_cluster(JOBS.replace("http://127.0.0.1:1", address) % ""))
        if sent:
            assert jobs_api._headers(target) == {"Authorization": "Bearer hunter2"}
            continue
        with pytest.raises(UserError, match=refused) as caught:
            jobs_api.get(target, "/api/jobs/")
        assert "hunter2" not in str(caught.value)


def test_a_manifest_is_written_with_the_command_that_applies_it(shell):
    options = ["--cluster", "kuberay", "--storage", "/shared/runs", "--dry-run", "--out", "my job.yaml"]
    code, out, _ = shell("submit", "jobs/chain.yaml", *options)
    assert (code, out) == (0, "next: kubectl apply -f 'my job.yaml'\n")
    assert len(list(yaml.safe_load_all(Path("my job.yaml").read_text()))) == 3


def test_init_brings_the_cluster_files_along(shell):
    assert shell("init", "demo")[0] == 0
    there = {str(path.relative_to("demo/cluster")) for path in Path("demo/cluster").rglob("*") if path.is_file()}
    assert {f"{name}.yaml" for name in NAMES} | {"Dockerfile", "prometheus.yml", "grafana/training.json"} <= there


@pytest.mark.parametrize(
    ("field", "named"),
    [
        ("env: {PGPASS: hunter2}", "env: PGPASS looks like a secret"),
        ("env: {DATABASE_URL: 'postgres://u:hunter2@h/db'}", "env.DATABASE_URL: holds what looks like a secret"),
        ("env: {SLACK_WEBHOOK_URL: 'https://hooks.slack.com/services/T/B/hunter2'}", "env.SLACK_WEBHOOK_URL: holds"),
        ("env: {NOTE: wandb_v1_hunter2hunter2hunter2}", "env.NOTE: holds what looks like a secret"),
        ("env: {NOTE: 0123456789abcdef0123456789abcdef01234567}", "env.NOTE: holds what looks like a secret"),
        ("pass_env: [SLACK_WEBHOOK]", "pass_env: SLACK_WEBHOOK looks like a secret, which Ray would log"),
        ("driver: {labels: {a: 's3://b/x?secret_key=hunter2'}}", "driver.labels.a: holds what looks like a secret"),
        ("machine: {note: glpat-hunter2hunter2hunter2}", "machine.note: holds what looks like a secret"),
    ],
)
def test_a_secret_in_a_cluster_file_is_refused_with_its_field_and_not_shown(field, named):
    (document,) = parse_yaml(JOBS % f", {field}", "x.yaml")
    with pytest.raises(UserError) as caught:
        parse(specs.JobsCluster, document, "x.yaml")
    assert named in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_paths_and_commits_in_a_cluster_file_are_no_secrets():
    env = "GIT_COMMIT: 0123456789abcdef0123456789abcdef01234567, GOOGLE_APPLICATION_CREDENTIALS: /etc/keys/gcp.json"
    assert len(parse_cluster(JOBS % f", env: {{{env}}}").env) == 2


def test_a_webhook_that_comes_through_a_variable_is_not_written_out(here, monkeypatch):
    monkeypatch.setenv("TEAM_HOOK", "https://hooks.slack.com/services/T0/B0/hunter2")
    for kind in (JOBS, "{kind: slurm, nodes: 1, cpus_per_node: 64, storage: /shared%s}"):
        as_cluster(kind % ", pass_env: [TEAM_HOOK]")
        with pytest.raises(UserError, match="pass_env: TEAM_HOOK holds what looks like a secret") as caught:
            ready_for("mine")
        assert "hunter2" not in str(caught.value)


def test_no_two_names_share_an_id():
    names = [
        "exp_1",
        "exp.1",
        "exp-1",
        "Exp-1",
        "EXP_1",
        "a" * 41,
        "a" * 42,
        "a" * 60 + "_x",
        "a" * 60 + "-x",
        "-a",
        "a-",
    ]
    ids = [jobs_api.submission_id(name, 1) for name in names]
    assert len(set(ids)) == len(names)
    assert jobs_api.submission_id("exp-1", 3) == "exp-1-3"
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", one) for one in ids)


@pytest.mark.parametrize(
    "address",
    [
        "http://h:8265; touch pwned",
        "http://h$(touch pwned)",
        "http://h`id`",
        "http://h:8265/ x",
        "ftp://h",
    ],
)
def test_an_address_is_an_address_and_no_command(address):
    with pytest.raises(UserError, match="address: must look like"):
        parse(specs.JobsCluster, {"kind": "jobs", "address": address}, "mine.yaml")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("partition", "gpu\ntouch pwned"),
        ("account", "me\r\ntouch pwned"),
        ("options", {"constraint": "nvme\ntouch pwned"}),
        ("options", {"constraint\ntouch pwned": "nvme"}),
        ("setup", ["module load x\x1b[2J"]),
    ],
)
def test_a_field_of_slurm_is_one_line(field, value):
    with pytest.raises(UserError, match=field):
        parse(specs.SlurmCluster, {"kind": "slurm", "nodes": 1, "cpus_per_node": 4, field: value}, "slurm.yaml")


def test_no_line_of_a_job_ends_the_file_it_is_written_into(tmp_path):
    text = "note: |\n  x\nEND_OF_FILE\ntouch pwned\nEND_OF_FILE_\n"
    lines = script.here_document(shlex.quote(str(tmp_path / "job.yaml")), text)
    subprocess.run(["sh", "-c", "\n".join(lines)], cwd=tmp_path, check=True)
    assert (tmp_path / "job.yaml").read_text() == text
    assert not (tmp_path / "pwned").exists()
