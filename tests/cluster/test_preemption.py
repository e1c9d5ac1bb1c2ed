"""The agent of a cloud machine with a metadata server on loopback that responds as the clouds' documentation says."""

import contextlib
import datetime
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from email.utils import format_datetime

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import RpcError
from tests.waits import patience, wait_for

from slimray.cluster import preemption
from slimray.spec import RunFailed, UserError


class Metadata(http.server.ThreadingHTTPServer):
    """A cloud's service: `answers` by path, and its requirements for a request (`headers`, a session `token`)."""

    def __init__(self, cloud: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.cloud, self.asked, self.tokens, self.answers = preemption.CLOUDS[cloud], [], set(), {}
        self.answers[self.cloud.me] = "machine-1"
        self.down, self.garbled = False, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Metadata

    def _say(self, code: int, text: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self) -> None:
        if self.path != "/latest/api/token" or "X-aws-ec2-metadata-token-ttl-seconds" not in self.headers:
            return self._say(400)
        self.server.tokens.add(token := f"token-{len(self.server.tokens)}-{time.time_ns()}")
        return self._say(200, token)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.down:
            return self._say(503)
        if self.server.garbled:
            self.server.garbled -= 1
            self.wfile.write(b"what a proxy says that is no HTTP\r\n\r\n")
            return None
        if self.server.cloud.token and self.headers.get("X-aws-ec2-metadata-token") not in self.server.tokens:
            return self._say(401)
        if any(self.headers.get(name) != value for name, value in self.server.cloud.headers.items()):
            return self._say(403)
        answer = self.server.answers.get(self.path)
        return self._say(404) if answer is None else self._say(200, answer)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def metadata(cloud: str) -> Iterator[Metadata]:
    server = Metadata(cloud)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def soon(seconds: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


SPOT = "/latest/meta-data/spot/instance-action"
GCP = "/computeMetadata/v1/instance/"
AZURE = "/metadata/scheduledevents?api-version=2020-07-01"


def azure(kind: str, machine: str, not_before: str) -> str:
    event = {"EventId": "1", "EventType": kind, "Resources": [machine], "EventStatus": "Scheduled"}
    return json.dumps({"DocumentIncarnation": 2, "Events": [{**event, "NotBefore": not_before}]})


@pytest.mark.parametrize(
    ("cloud", "path", "calm", "answer", "reason", "left_s"),
    [
        ("aws", SPOT, None, lambda: json.dumps({"action": "terminate", "time": f"{soon(120):%Y-%m-%dT%H:%M:%SZ}"}),
         "AWS will terminate this spot instance", 120),
        ("gcp", f"{GCP}preempted", "FALSE", lambda: "TRUE", "GCP preempts this instance", 30),
        ("gcp", f"{GCP}maintenance-event", "NONE", lambda: "TERMINATE_ON_HOST_MAINTENANCE",
         "GCP terminates this instance for maintenance", 60),
        ("azure", AZURE, azure("Preempt", "another", "Mon, 19 Sep 2016 18:29:47 GMT"),
         lambda: azure("Preempt", "machine-1", format_datetime(soon(3600), usegmt=True)),
         "Azure announces preempt of this machine", 3600),
        ("azure", AZURE, azure("Freeze", "machine-1", ""), lambda: azure("Reboot", "machine-1", ""),
         "Azure announces reboot of this machine", 30),
    ],
)  # fmt: skip
def test_each_cloud_announces_in_its_own_way(cloud, path, calm, answer, reason, left_s):
    with metadata(cloud) as server:
        if calm is not None:
            server.answers[path] = calm
        found = preemption.find_service(cloud, server.url)
        assert found is not None
        service, me = found
        assert me == "machine-1"
        assert service.notice(me) is None
        server.answers[path] = answer()
        notice = service.notice(me)
        assert notice is not None
        assert notice.reason == reason
        assert left_s - 30 <= notice.left_s <= left_s


def test_the_cloud_is_found_by_who_answers_and_a_wrong_one_is_one_sentence():
    for cloud in preemption.CLOUDS:
        with metadata(cloud) as server:
            found = preemption.find_service(None, server.url)
            assert found is not None
            assert found[0].cloud is preemption.CLOUDS[cloud]
            for other in set(preemption.CLOUDS) - {cloud}:
                with contextlib.suppress(UserError):
                    assert preemption.find_service(other, server.url) is None
    assert preemption.find_service(None, "http://127.0.0.1:1") is None
    with pytest.raises(UserError, match=r"--cloud aws: the metadata service at http://127.0.0.1:1 does not respond"):
        preemption.find_service("aws", "http://127.0.0.1:1")


def test_a_session_of_aws_that_has_ended_is_renewed_and_an_answer_that_is_not_known_is_no_notice():
    with metadata("aws") as server:
        service, me = preemption.find_service("aws", server.url) or pytest.fail("no service")
        server.tokens.clear()
        assert service.notice(me) is None
        server.answers[SPOT] = '{"action": "terminate"}'
        with pytest.raises(ValueError, match="returned an unknown response"):
            service.notice(me)


def test_an_answer_that_is_no_http_and_a_head_that_is_away_do_not_end_the_agent(monkeypatch):
    """The head is looked up until the time has passed; each error is reported once."""
    monkeypatch.setattr(preemption, "POLL_S", 0.05)
    told: list[str] = []
    heads: list[int] = []

    def head() -> str:
        heads.append(len(heads))
        raise RpcError("Timed out while waiting for GCS to become available.")

    with metadata("gcp") as server:
        service, me = preemption.find_service("gcp", server.url) or pytest.fail("no service")
        server.garbled = 3
        server.answers[f"{GCP}preempted"] = "TRUE"
        left_s = patience(1)
        looks = {f"{GCP}preempted": lambda answer, me: preemption.Notice(left_s, "GCP preempts this instance")}
        service.cloud = replace(service.cloud, looks=looks)
        with pytest.raises(RunFailed, match="the node could not be drained in time: Timed out while waiting for GCS"):
            preemption.watch(service, me, head, "", told.append)
        assert server.garbled == 0
        assert len(heads) > 1
        assert told == [
            f"the metadata service at {server.url} does not respond (BadStatusLine: what a proxy says that is no HTTP"
            "), trying again",
            f"GCP preempts this instance in {left_s:.0f} s: draining its Ray node",
            "Timed out while waiting for GCS to become available., trying again",
        ]


@pytest.mark.ray
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("no_ray")
def test_on_notice_the_agent_drains_the_node_of_its_machine(monkeypatch):
    """A real cluster of a head and a node, the command as in the cluster files, and a service with an outage."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    agent = None
    try:
        spot = cluster.add_node(num_cpus=1)
        with metadata("aws") as server:
            command = [sys.executable, "-m", "slimray.cli", "watch-preemption", "--address", cluster.address]
            command += ["--metadata-url", server.url, "--node-id", spot.node_id]
            env = os.environ | {"PYTHONUNBUFFERED": "1"}
            agent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
            wait_for("the agent to ask", lambda: SPOT in server.asked)
            server.down = True
            count = len(server.asked)
            wait_for("the agent to ask again", lambda: len(server.asked) > count + 1)
            server.down = False
            server.answers[SPOT] = json.dumps({"action": "stop", "time": f"{soon(3600):%Y-%m-%dT%H:%M:%SZ}"})
            out, _ = agent.communicate(timeout=patience(90))
            assert agent.returncode == 0, out
            lines = out.splitlines()
            assert lines[0] == f"watching {server.url} for notices to machine-1"
            assert "does not respond (HTTP Error 503: Service Unavailable), trying again" in lines[1]
            assert "AWS will stop this spot instance in 3" in lines[2]
            assert lines[3].startswith("drained: ")
        ray.init(cluster.address, log_to_driver=False)
        from ray._private.state import state

        def drains() -> bool:  # nothing runs there, and a draining node ends when it is idle
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            return spot.node_id in state.get_draining_nodes() or spot.node_id not in alive

        wait_for("the node to drain", drains, 30)
    finally:
        if agent is not None and agent.poll() is None:
            agent.send_signal(signal.SIGKILL)
        ray.shutdown()
        cluster.shutdown()
