"""The agent on loopback, in a process that cannot import torch: tables like local ones, one sentence for any error."""

import hashlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tests.runtime.exports import export, seeded
from tests.waits import as_in_a_terminal, patience

from slimray import models
from slimray.data.images.pictures import ImageRecipe
from slimray.edge import onnx_file, profiler, remote
from slimray.edge.runtimes import Chain
from slimray.runtime import agent, conditions
from slimray.spec import RunFailed, UserError

MODEL = {"name": "ofa_mobilenetv3", "num_classes": 10, "preset": "tiny"}
TOKEN = "a-token-of-the-tests"
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("torch", "ray", "onnx", "open3d", "safetensors", "matplotlib", "jinja2", "wandb")))
from slimray.cli.main import main
main()
"""


class Device:
    """An agent in a process of its own; with another `python`, the package installed there is used."""

    def __init__(self, *options: str, token: str | None = TOKEN, python: str = sys.executable):
        left_out = (agent.TOKEN_VARIABLE, *(("PYTHONPATH",) if python != sys.executable else ()))
        env = {key: value for key, value in os.environ.items() if key not in left_out}
        env |= {} if token is None else {agent.TOKEN_VARIABLE: token}
        self.process = subprocess.Popen(
            [python, "-c", WITHOUT, "agent", "--port", "0", *options],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            preexec_fn=as_in_a_terminal,
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        if token is None:
            self.said += self.process.stdout.readline()
        self.url = re.search(r"http://[\d.]+:\d+", self.said)[0]  # type: ignore[index]

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict]:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=patience(60))
        with suppress(BrokenPipeError, ConnectionResetError):  # it may respond before it has read everything
            connection.request(method, path, body, {"Authorization": f"Bearer {TOKEN}"} | headers)
        response = connection.getresponse()
        found = response.status, json.loads(response.read())
        connection.close()
        return found

    def send(self, data: bytes) -> tuple[int, dict]:
        return self.ask("PUT", f"/networks/{hashlib.sha256(data).hexdigest()}", data)

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(patience(30))
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    one = Device("--max-mb", "8", "--max-seconds", "20")
    yield one
    one.end()


@pytest.fixture(autouse=True)
def token(monkeypatch) -> None:
    monkeypatch.setenv(agent.TOKEN_VARIABLE, TOKEN)


@pytest.fixture(scope="module")
def net():
    return models.build(**MODEL).eval()


def model(*nodes: onnx.NodeProto, weights=(), shape=(1, 4)) -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes or [helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def timed(data: bytes, **changes) -> bytes:
    chain = {"skip": 1, "runs": 3, "steps": [[hashlib.sha256(data).hexdigest(), {"x": [[1, 4], "float32"]}]]}
    return json.dumps({"threads": 1, "chains": [chain]} | changes).encode()


# ------------------------------------------------------------------------------------------------------- tables


def test_a_chain_is_timed_on_the_device_step_by_step_beside_the_reference(device):
    modules = [torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 1)]
    here = remote.runtime(remote.connect(device.url))
    first, second = torch.randn(1, 3, 8, 8), torch.randn(1, 4, 6, 6)
    steps = tuple(here.prepare(one, x, 1) for one, x in zip(modules, (first, second), strict=True))
    chains = [Chain(("a", "b"), steps, (here.feed(first), None)), Chain(("b",), steps[1:], (here.feed(second),))]
    found = profiler.take_readings(here, chains, 1, 3, random.Random(0))
    assert [rows.shape for rows in found.chains] == [(3, 2), (3, 1)]
    assert all((rows > 0).all() for rows in (*found.chains, found.reference_ms))
    assert 0 <= found.waited < 1
    assert here.device() == conditions.device()["device"]


def test_an_export_is_timed_whole_with_one_thread_and_more(device, tmp_path):
    taken = {
        "recipe": ImageRecipe(size=32).to_dict(), "pixels": {}, "classes": ["a", "b"], "task": "classify"
    }  # fmt: skip
    where = export(tmp_path / "e", seeded(torch.nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 32, 32), taken)
    code = "from slimray.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "profile", str(where), "--device", device.url, "--json"],
        capture_output=True, text=True, timeout=patience(120), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"][0]["threads"] == 1
    assert all(0 < row["p10_ms"] <= row["ms"] <= row["p90_ms"] for row in found["rows"])


# ------------------------------------------------------------------------------------------------------- refusals


def test_the_token_is_printed_once_or_given_and_nothing_is_said_without_it(device, monkeypatch):
    assert TOKEN not in device.said
    alone = Device(token=None)
    alone.end()
    assert re.search(rf"export {agent.TOKEN_VARIABLE}=[\w-]{{32}}", alone.said)
    for path in ("/about", "/conditions", "/networks/" + "0" * 64, "/other"):
        assert device.ask("GET", path, Authorization="Bearer wrong")[0] == 401
        assert device.ask("GET", path, Authorization="")[0] == 401
    monkeypatch.setenv(agent.TOKEN_VARIABLE, "wrong-wrong-wrong-wrong")
    with pytest.raises(UserError, match="wrong token: set SLIMRAY_AGENT_TOKEN"):
        remote.connect(device.url)
    monkeypatch.delenv(agent.TOKEN_VARIABLE)
    with pytest.raises(UserError, match="set SLIMRAY_AGENT_TOKEN"):
        remote.connect(device.url)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://192.0.2.1:8060", "the token would be sent over the network unencrypted: use a tunnel"),
        ("http://device.example:8060", "unencrypted"),
        ("ftp://127.0.0.1", "must be http://HOST:PORT"),
        ("http://user@127.0.0.1:1", "must be http://HOST:PORT"),
        ("127.0.0.1:8060", "must be http://HOST:PORT"),
    ],
)
def test_the_token_is_never_shown_to_a_network_unasked(url, sentence):
    with pytest.raises(UserError, match=sentence):
        remote.connect(url)


def test_an_agent_that_is_not_there_is_one_sentence(device):
    with pytest.raises(RunFailed, match=r"http://127.0.0.1:9: the agent does not respond \(connection refused\)"):
        remote.connect("http://127.0.0.1:9")


def test_hostile_requests_get_a_sentence_each_and_the_agent_goes_on(device):
    ordinary = model()
    assert device.send(ordinary) == (200, {"here": True})
    weight = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="/etc/passwd")
    hostile = {
        "keeps weights in another file": model(weights=[weight]),
        "custom operator evil.ops::Run": model(helper.make_node("Run", ["x"], ["y"], domain="evil.ops")),
        "is not an ONNX file": b"\x00\x01",
        "9,000,000 bytes are more than the agent accepts": b"x" * 9_000_000,
    }
    for sentence, data in hostile.items():
        status, found = device.send(data)
        assert status in (413, 422), found
        assert sentence in found["error"]
    assert "its SHA-256 differs" in device.ask("PUT", "/networks/" + "0" * 64, ordinary)[1]["error"]
    assert device.ask("PUT", "/networks/../../etc/passwd", ordinary)[0] == 404
    assert device.ask("POST", "/run", b"{}")[0] == 404
    bad = [b"no", b"[]", b"{}", timed(ordinary, threads=0), timed(ordinary, chains=[]), timed(ordinary, threads=10**9)]
    bad.append(timed(ordinary).replace(b"float32", b"object"))
    bad.append(timed(ordinary).replace(b'"runs": 3', b'"runs": 100000'))
    assert [device.ask("POST", "/time", body)[0] for body in bad] == [400] * len(bad)
    huge = timed(ordinary).replace(b"[1, 4]", b"[100000, 100000, 1000]")
    assert "cannot have the shape" in device.ask("POST", "/time", huge)[1]["error"]
    assert device.ask("POST", "/time", timed(b"unknown"))[0] == 404
    status, found = device.ask("POST", "/time", timed(ordinary))
    assert status == 200
    assert len(found["ms"][0]) == 3


def test_a_network_that_never_ends_is_ended_and_the_next_one_is_timed():
    device = Device("--max-seconds", "2")
    try:
        endless = endless_loop()
        assert device.send(endless)[0] == 200
        status, found = device.ask("POST", "/time", timed(endless))
        assert (status, found["error"]) == (422, "computing took over 2 s")
        ordinary = model()
        device.send(ordinary)
        assert device.ask("POST", "/time", timed(ordinary))[0] == 200
    finally:
        device.end()


def endless_loop() -> bytes:
    """Return a network whose Loop never ends."""
    true = helper.make_tensor("go", TensorProto.BOOL, [], [True])
    inner = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Relu", ["v"], ["v2"])], "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [1, 4]),
        ],
        [
            helper.make_tensor_value_info("c2", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v2", TensorProto.FLOAT, [1, 4]),
        ],
    )  # fmt: skip
    return model(helper.make_node("Loop", ["", "go", "x"], ["y"], body=inner), weights=[true])


# ------------------------------------------------------------------------------------------------------- conditions


def put(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_a_raspberry_pi_tells_its_name_temperature_and_throttling(tmp_path):
    put(tmp_path, "proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    put(tmp_path, "sys/class/thermal/thermal_zone0/temp", "61850\n")
    put(tmp_path, "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "1500000\n")
    put(tmp_path, "sys/devices/platform/soc/soc:firmware/get_throttled", "50005\n")
    assert conditions.device(tmp_path)["device"] == "Raspberry Pi 5 Model B Rev 1.0"
    found = conditions.conditions(tmp_path, watts=False)
    assert found == {"temperature_c": 61.85, "clock_mhz": 1500.0, "throttled": True}
    put(
        tmp_path, "sys/devices/platform/soc/soc:firmware/get_throttled", "50000\n"
    )  # it was throttled earlier, but is not now
    assert conditions.conditions(tmp_path, watts=False)["throttled"] is False


@pytest.mark.parametrize(
    ("devices", "throttled"),
    [
        ({"Fan": 3}, None),
        ({"intel_powerclamp": -1, "Fan": 1}, None),
        ({"Processor": 0, "intel_powerclamp": -1, "Fan": 3, "TCC Offset": 3}, False),
        ({"Processor": 0, "thermal-cpufreq-0": 2}, True),
        ({"cpufreq-cpu0": 1}, True),
        ({"Processor": -1}, False),
    ],
)
def test_a_fan_that_turns_is_no_throttling(tmp_path, devices, throttled):
    for number, (kind, state) in enumerate(devices.items()):
        put(tmp_path, f"sys/class/thermal/cooling_device{number}/type", f"{kind}\n")
        put(tmp_path, f"sys/class/thermal/cooling_device{number}/cur_state", f"{state}\n")
    assert conditions.conditions(tmp_path, watts=False).get("throttled") is throttled


@pytest.mark.parametrize(("says", "watts"), [("RAM 1/2MB VDD_IN 5012mW/5000mW", 5.012), ("", None)])
def test_watts_of_a_jetson_are_waited_for_and_given_up(tmp_path, monkeypatch, says, watts):
    put(tmp_path, "tegrastats", "#!/bin/sh\n" + (f"echo {says}\n" if says else "") + "exec /bin/sleep 600\n")
    (tmp_path / "tegrastats").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(conditions, "TOOL_S", patience(30) if says else 0.2)
    assert conditions.conditions(tmp_path).get("watts") == watts


def test_watts_come_from_sensors_of_the_board(tmp_path):
    put(tmp_path, "sys/class/hwmon/hwmon1/curr1_input", "1200")
    put(tmp_path, "sys/class/hwmon/hwmon1/in1_input", "5000")
    assert conditions.conditions(tmp_path) == {"watts": 6.0, "source": "hwmon"}
    put(tmp_path, "sys/class/hwmon/hwmon2/power1_input", "7500000")
    assert conditions.conditions(tmp_path) == {"watts": 7.5, "source": "hwmon"}
    put(tmp_path, "sys/class/powercap/intel-rapl:0/energy_uj", "1000000")
    assert conditions.conditions(tmp_path) == {"watts": 0.0, "source": "rapl"}, "a counter that stands still"
    put(tmp_path, "sys/class/powercap/intel-rapl:0/energy_uj", "damaged")
    assert conditions.conditions(tmp_path)["source"] == "hwmon"


def test_watts_are_read_while_the_processor_is_busy(tmp_path):
    calls = list[int]()
    assert conditions.watts_while(lambda: calls.append(1), tmp_path) is None
    assert calls
    put(tmp_path, "sys/class/hwmon/hwmon2/power1_input", "7500000")
    watts, source, seconds = conditions.watts_while(lambda: time.sleep(0.01), tmp_path) or (0, "", 0)
    assert (watts, source) == (7.5, "hwmon")
    assert seconds >= 0.01


def test_onnx_files_of_the_profiler_pass_the_check_of_the_agent(net):
    unit = next(iter(net.all_units([20]).values()))
    data = onnx_file.to_onnx(unit.make().eval(), {"input": torch.randn(1, *unit.input)})
    assert agent.check_onnx(data, "unit").inputs[0].name == "input"
