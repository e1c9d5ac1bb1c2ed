"""Agent on a cloud machine: polls the metadata service for preemption notices and drains the Ray node.

On AWS, GCP and Azure nothing else informs Ray: `watch` polls every POLL_S seconds, and on a notice calls
`ray drain-node` with the remaining time; the runs on the node save and continue elsewhere. CLOUDS describes the
responses of each cloud: AWS spot instance actions (IMDSv2), GCP preemptions and maintenance, Azure scheduled events, as
documented by the clouds; none of it has been tried on their real machines.
"""

import datetime
import email.utils
import http.client
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from slimray.spec import RunFailed, UserError

POLL_S = 2.0
REQUEST_TIMEOUT_S = 2.0
DRAIN_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Notice:
    """Announcement that a machine will be preempted in `left_s` seconds, for `reason`."""

    left_s: float
    reason: str


@dataclass(frozen=True)
class Cloud:
    """A cloud's metadata service: its URL, the headers it needs, and the responses that are a notice.

    `token` is the path of AWS's session token, `me` the path of this machine's name, and `looks` maps each path to poll
    to a function of (response, this machine's name) that returns a Notice or None.
    """

    url: str
    me: str
    looks: Mapping[str, Callable[[str, str], Notice | None]]
    headers: Mapping[str, str] = field(default_factory=dict)
    token: str = ""


def _seconds_until(text: str) -> float:
    """Return the seconds until a time, given in ISO 8601 or as an HTTP date."""
    try:
        when = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        when = email.utils.parsedate_to_datetime(text)
    when = when if when.tzinfo else when.replace(tzinfo=datetime.UTC)
    return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())


def _aws(answer: str, me: str) -> Notice | None:
    found = json.loads(answer)
    return Notice(_seconds_until(found["time"]), f"AWS will {found['action']} this spot instance")


def _gcp_preempted(answer: str, me: str) -> Notice | None:
    return Notice(30.0, "GCP preempts this instance") if answer.strip() == "TRUE" else None


def _gcp_maintenance(answer: str, me: str) -> Notice | None:
    return Notice(60.0, "GCP terminates this instance for maintenance") if answer.startswith("TERMINATE") else None


def _azure(answer: str, me: str) -> Notice | None:
    for event in json.loads(answer).get("Events", []):
        if event["EventType"] in ("Preempt", "Terminate", "Redeploy", "Reboot") and me in event["Resources"]:
            left_s = _seconds_until(event["NotBefore"]) if event.get("NotBefore") else 30.0  # "" once it has started
            return Notice(left_s, f"Azure announces {event['EventType'].lower()} of this machine")
    return None


CLOUDS: dict[str, Cloud] = {
    "aws": Cloud(
        url="http://169.254.169.254",
        token="/latest/api/token",  # noqa: S106 a path
        me="/latest/meta-data/instance-id",
        looks={"/latest/meta-data/spot/instance-action": _aws},  # 404 while there is no notice
    ),
    "gcp": Cloud(
        url="http://metadata.google.internal",
        headers={"Metadata-Flavor": "Google"},
        me="/computeMetadata/v1/instance/id",
        looks={
            "/computeMetadata/v1/instance/preempted": _gcp_preempted,
            "/computeMetadata/v1/instance/maintenance-event": _gcp_maintenance,
        },
    ),
    "azure": Cloud(
        url="http://169.254.169.254",
        headers={"Metadata": "true"},
        me="/metadata/instance/compute/name?api-version=2021-02-01&format=text",
        looks={"/metadata/scheduledevents?api-version=2020-07-01": _azure},
    ),
}


class Service:
    """The metadata service of a cloud, as this machine reaches it; `url` replaces the cloud's own."""

    def __init__(self, cloud: Cloud, url: str = ""):
        self.cloud, self.url, self._token, self._token_until = cloud, (url or cloud.url).rstrip("/"), "", 0.0

    def ask(self, path: str) -> str | None:
        """Return the response at `path`, None for 404; OSError if there is neither."""
        for attempt in (1, 2):
            headers = dict(self.cloud.headers)
            if self.cloud.token:
                headers["X-aws-ec2-metadata-token"] = self._session()
            try:
                return self._get(urllib.request.Request(self.url + path, headers=headers))  # noqa: S310 http by the table
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401 or attempt == 2:
                    raise
                self._token_until = 0.0  # the token is from before the machine was restarted
        return None

    def _session(self) -> str:
        if time.monotonic() > self._token_until:
            headers = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
            request = urllib.request.Request(self.url + self.cloud.token, headers=headers, method="PUT")  # noqa: S310
            self._token, self._token_until = self._get(request), time.monotonic() + 20_000
        return self._token

    def _get(self, request: urllib.request.Request) -> str:
        try:
            with _DIRECT.open(request, timeout=REQUEST_TIMEOUT_S) as answer:
                return answer.read(1 << 20).decode("utf-8", "replace")
        except http.client.HTTPException as error:  # a truncated response, or one that is not HTTP
            raise ConnectionError(f"{type(error).__name__}: {str(error).strip()}") from None

    def notice(self, me: str) -> Notice | None:
        """Return the notice for the machine `me`, or None; OSError or ValueError if the service cannot be read."""
        for path, read in self.cloud.looks.items():
            answer = self.ask(path)
            try:
                found = None if answer is None else read(answer, me)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} returned an unknown response ({error})") from None
            if found is not None:
                return found
        return None


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the service must not be reached by a proxy


def find_service(name: str | None, url: str = "") -> tuple[Service, str] | None:
    """Return the metadata service and this machine's name there; None if no cloud of CLOUDS responds.

    With `name`, only that cloud is tried; UserError if it does not respond.
    """
    for one, cloud in CLOUDS.items() if name is None else [(name, CLOUDS[name])]:
        service = Service(cloud, url)
        try:
            me = service.ask(cloud.me)
        except (OSError, ValueError) as error:
            if name is not None:
                raise UserError(
                    f"--cloud {one}: the metadata service at {service.url} does not respond ({error}): check that this "
                    "is a machine of that cloud, and that containers can reach the service (AWS: hop limit 2)"
                ) from None
            continue
        if me is not None:
            return service, me.strip()
    return None


def head_of(address: str) -> str:
    """Return HOST:PORT of the Ray cluster at `address`, or on this machine if it is ""; ConnectionError if none."""
    from ray._private.services import canonicalize_bootstrap_address_or_die

    return canonicalize_bootstrap_address_or_die(address or "auto")


def this_node(address: str) -> str:
    """Return the id of this machine's Ray node in the cluster at `address`; RunFailed unless there is exactly one."""
    import ray.util
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]

    here = ray.util.get_node_ip_address()
    nodes = GcsClient(address=address).get_all_node_info(timeout=DRAIN_TIMEOUT_S)
    mine = [key.hex() for key, node in nodes.items() if node.state == 0 and node.node_manager_address == here]
    if len(mine) != 1:
        raise RunFailed(f"{len(mine)} Ray nodes of {address} run at {here}, choose one with --node-id")
    return mine[0]


def drain(address: str, node_id: str, notice: Notice) -> None:
    """Tell the Ray cluster at `address` that a node will be preempted; RunFailed with Ray's last line if it refuses."""
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node_id,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", notice.reason,
        "--deadline-remaining-seconds", str(int(notice.left_s)),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRAIN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"`ray drain-node` did not end within {DRAIN_TIMEOUT_S:g} s") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"code {done.returncode}").splitlines()
        raise RunFailed(f"`ray drain-node`: {lines[-1][:300]}")


def watch(service: Service, me: str, address: Callable[[], str], node_id: str, say: Callable[[str], Any]) -> Notice:
    """Poll `service` until it announces the preemption of the machine `me`, drain its Ray node, and return the notice.

    `address` finds the Ray cluster, which may start later than this agent. Failed requests to the service or to Ray are
    repeated, and each error is printed once. RunFailed if the node is not drained before the notice expires.
    """
    said = ""
    while True:
        try:
            notice = service.notice(me)
        except (OSError, ValueError) as error:
            said = _once(f"the metadata service at {service.url} does not respond ({error}), trying again", said, say)
            notice = None
        if notice is not None:
            break
        time.sleep(POLL_S)
    say(f"{notice.reason} in {notice.left_s:.0f} s: draining its Ray node")
    end = time.monotonic() + max(notice.left_s, POLL_S)
    while True:
        left = Notice(max(0.0, end - time.monotonic()), notice.reason)
        try:
            where = address()
            drain(where, node_id or this_node(where), left)
            say("drained: its runs save and continue elsewhere")
            return notice
        except (RunFailed, OSError, RuntimeError, RayError) as error:
            said = _once(f"{error}, trying again", said, say)
            if time.monotonic() > end:
                raise RunFailed(f"the node could not be drained in time: {error}") from None
        time.sleep(POLL_S)


def _once(sentence: str, before: str, say: Callable[[str], Any]) -> str:
    if sentence != before:
        say(sentence)
    return sentence
