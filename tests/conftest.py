"""Fixtures for all tests: the path of the reference values, and Ray kept local, quiet and with short timeouts."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from moto.server import ThreadedMotoServer
from tests.faulty_s3 import FaultyS3, faulty_s3
from tests.waits import patience

os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")  # clients of buckets ask the machine's cloud for credentials
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a script starts in the background ignores it
if not Path("/dev/nvidia0").exists():  # before anything imports Triton: its kernels are interpreted then
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let every test take the longer, the slower the machine: its `timeout` is in seconds of a quick, quiet one."""
    if config.getoption("timeout") is not None:
        return
    for item in items:
        mark = item.get_closest_marker("timeout")
        seconds = float(mark.args[0] if mark else config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patience(seconds)), append=False)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their length: their content, as a time inside gzip, may differ between pytest's processes."""
    return f"{argname}-{len(val)}-bytes" if isinstance(val, bytes) else None


@pytest.fixture
def no_ray() -> Iterator[None]:
    """Nothing of Ray in this process, before and after a test that has a cluster of its own."""
    import ray

    ray.shutdown()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with recorded reference values and real data: $SLIMRAY_SHARED, or `shared` beside the repository."""
    folder = Path(os.environ.get("SLIMRAY_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"reference values not found at {folder}: set SLIMRAY_SHARED")
    return folder


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyS3]:
    """An S3 server on loopback whose requests are counted and may fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        with faulty_s3() as server:
            yield server


@pytest.fixture(scope="module")
def bucket():
    """A function from a folder name to its URI in a bucket of an S3 server on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        endpoint = f"http://127.0.0.1:{port}"
        pafs.S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True).create_dir("team")
        yield lambda name: f"s3://team/{name}?endpoint_override=127.0.0.1:{port}&scheme=http"
    server.stop()
