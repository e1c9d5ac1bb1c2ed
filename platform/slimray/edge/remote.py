"""A device that runs `slimray agent`: sends networks there as ONNX files and receives times.

`connect` makes a `Remote`; `runtime(remote)` is a row like those of RUNTIMES, so that the code that measures a table
here also measures one on the device; `time_export` times a whole exported network. A request that the agent refuses
raises UserError with its message; an agent that dies raises RunFailed, and the table resumes after its last round.
"""

import hashlib
import http.client
import ipaddress
import json
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimray.edge import onnx_file
from slimray.edge.runtimes import RUNS_PER_READING, Chain, Clock, Reading, Runtime, Step
from slimray.runtime.agent import PROTOCOL, TOKEN_VARIABLE
from slimray.spec import RunFailed, UserError

HARDWARE = "device-onnx"  # its name in tables
CONNECT_S = 10.0
ANSWER_S = 600.0  # more than an agent's limit of a measurement
MAX_ANSWER_BYTES = 64 << 20


@dataclass(frozen=True)
class Remote:
    """An agent: its URL, its token, and its description of itself (`about`)."""

    url: str
    token: str = field(repr=False)
    about: dict[str, Any]

    def ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        """Return the agent's response; UserError if it refuses, RunFailed if it is unreachable."""
        return _ask(self.url, self.token, method, path, body)

    def send(self, data: bytes) -> str:
        """Return the name (SHA-256) of an ONNX file on the device, after sending it if it is missing there."""
        most = int(self.about["limits"]["max_mb"])
        if len(data) > most << 20:
            raise UserError(
                f"{self.url}: the network has {len(data) >> 20} MB, the agent accepts {most}: raise its --max-mb"
            )
        name = hashlib.sha256(data).hexdigest()
        if not self.ask("GET", f"/networks/{name}")["here"]:
            self.ask("PUT", f"/networks/{name}", data)
        return name

    def time(self, chains: Sequence[Mapping[str, Any]], threads: int) -> dict[str, Any]:
        """Return the ms of chains, see `slimray.runtime.worker`."""
        return self.ask("POST", "/time", json.dumps({"threads": threads, "chains": list(chains)}).encode())


def connect(url: str, plain_http: bool = False) -> Remote:
    """Return the agent at `url`, whose token is in the environment.

    Raises UserError for a missing or wrong token, for an invalid address, and, unless `plain_http` allows it, for plain
    HTTP to another host, which would expose the token to the network.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.path.strip("/"):
        raise UserError(f"--device {url}: must be http://HOST:PORT or https://HOST:PORT")
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise UserError(f"--device {url}: needs a token, set {TOKEN_VARIABLE} to the one that `slimray agent` printed")
    if parts.scheme == "http" and not _is_loopback(parts.hostname) and not plain_http:
        raise UserError(
            f"--device {url}: the token would be sent over the network unencrypted: use a tunnel "
            f"(ssh -L 8060:127.0.0.1:8060 {parts.hostname}, then --device http://127.0.0.1:8060), or --plain-http"
        )
    about = _ask(url, token, "GET", "/about", None)
    if about.get("protocol") != PROTOCOL:
        raise UserError(
            f"--device {url}: uses protocol {about.get('protocol')!r}, this slimray {PROTOCOL}: update the older one"
        )
    return Remote(url, token, about)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ask(url: str, token: str, method: str, path: str, body: bytes | None) -> dict[str, Any]:
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_S)
        try:
            connection.connect()
            connection.sock.settimeout(ANSWER_S)
            with suppress(BrokenPipeError, ConnectionResetError):  # it may respond before it has read everything
                connection.request(method, path, body, {"Authorization": f"Bearer {token}"})
            response = connection.getresponse()
            data = response.read(MAX_ANSWER_BYTES)
        finally:
            connection.close()
        found = json.loads(data)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
        sentence = f"{url}: the agent does not respond ({reason}): start `slimray agent` there and repeat the command"
        raise RunFailed(sentence) from None
    if response.status != 200:
        said = found.get("error") if isinstance(found, dict) else None
        raise UserError(f"{url}: {said or response.reason}")
    return found


# ------------------------------------------------------------------------------------------------- measuring


def runtime(remote: Remote) -> Runtime:
    """Return the device as a Runtime, for `profiler.profile`."""
    return Runtime(
        description=f"ONNX Runtime on {remote.about['device']}",
        prepare=partial(_prepare, remote),
        feed=lambda x: list(x.shape),
        timed=partial(_timed, remote),
        check=lambda: onnx_file.require(f"--device {remote.url}"),
        device=lambda: str(remote.about["device"]),
        per_shape=True,
        num_resolutions=5,
        reading=partial(_reading, remote),
        reference=lambda module, x: _prepare(remote, module, x, 1),
        versions=lambda: {f"device {name}": str(one) for name, one in remote.about["versions"].items()},
        conditions=lambda: remote.ask("GET", "/conditions"),
    )


@dataclass(frozen=True)
class _Network:
    """A network on the device: its name there and its number of threads."""

    name: str
    threads: int

    def __call__(self, given: Any) -> Any:
        raise TypeError("a network on a device can be timed there, but not called")


def _prepare(remote: Remote, module: nn.Module, x: Tensor, threads: int) -> Step:
    return _Network(remote.send(onnx_file.to_onnx(module, {"input": x})), threads)


def _steps(steps: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    return [
        [step.name, "input" if own is None else {"input": [own, "float32"]}]
        for step, own in zip(steps, inputs, strict=True)
    ]


def _timed(remote: Remote, steps: Sequence[Any], inputs: Sequence[Any], clock: Clock) -> list[float]:
    chain = {"skip": 0, "runs": 1, "steps": _steps(steps, inputs)}
    return remote.time([chain], steps[0].threads)["ms"][0][0]


def _reading(remote: Remote, reference: Chain, chain: Chain, runs: int, clock: Clock) -> Reading:
    """Return a reading from a single request: the reference, then the chain, so that nothing comes between them."""
    threads = chain.steps[0].threads  # type: ignore[attr-defined]
    chains = [
        {"skip": 1, "runs": runs - 1, "steps": _steps(reference.steps, reference.inputs)},
        {"skip": 1, "runs": RUNS_PER_READING, "steps": _steps(chain.steps, chain.inputs)},
    ]
    found = remote.time(chains, threads)
    first, rows = found["ms"]
    return Reading(
        min(row[0] for row in first), [min(ms) for ms in zip(*rows, strict=True)], found["wall_s"], found["busy_s"]
    )


def time_export(remote: Remote, data: bytes, feeds: Mapping[str, Any], threads: int, rounds: int) -> dict[str, Any]:
    """Return the latency of an exported network on the device: median, 10th and 90th percentile in ms of `rounds` runs.

    `feeds` are its inputs: name -> [shape, numpy type]. The result includes the device's conditions right afterwards.
    """
    name = remote.send(data)
    found = remote.time([{"skip": 3, "runs": rounds, "steps": [[name, dict(feeds)]]}], threads)
    ms = torch.tensor([row[0] for row in found["ms"][0]], dtype=torch.float64)
    low, middle, high = torch.quantile(ms, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    told = remote.ask("GET", "/conditions")
    out = {"threads": threads, "ms": middle, "p10_ms": low, "p90_ms": high, "runs": rounds, **told}
    if "throttled" in found:
        out["throttled"] = bool(found["throttled"] or told.get("throttled"))
    return out
