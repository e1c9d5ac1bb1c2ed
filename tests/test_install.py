"""Installing: one file of exact versions that resolve on every machine; extras that may be missing."""

import ast
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import packages_distributions
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
FOLDERS_OF_EXTRAS = {
    "report/dashboard/": ("dashboard",),
    "edge/": ("edge",),
    "export/": ("edge", "openvino", "executorch", "litert", "ncnn", "compress"),
    "runtime/": ("openvino",),
    "data/text/": ("text",),
    "tasks/text_scores.py": ("text",),
}
LATE = {
    "botocore",
    "decord",
    "open3d",
    "openvino",
    "safetensors",
    "sentencepiece",
}  # what a runtime reads or computes with only where it is there


def canonical(requirement: str) -> str:
    """The normalized name of what a requirement asks for."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]).lower()


def publish(index: Path, name: str, version: str, *requires: str) -> None:
    """Put a wheel that holds nothing but its metadata into a package index."""
    folder = index / name
    folder.mkdir(exist_ok=True, parents=True)
    wheel = f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(folder / wheel, "w") as archive:
        inside = f"{name}-{version}.dist-info"
        lines = [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            f"Version: {version}",
            *(f"Requires-Dist: {r}" for r in requires),
        ]
        archive.writestr(f"{inside}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{inside}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{inside}/RECORD", "")
    wheels = "".join(f'<a href="{path.name}">{path.name}</a>' for path in folder.glob("*.whl"))
    (folder / "index.html").write_text(wheels)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder that is served as a package index, and its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = tmp_path / "index"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`resolve(address, constraints)`: the check of the constraints of a project that needs torch and triton."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(
        '[project]\nname = "some"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["torch"]\n'
        "[project.optional-dependencies]\ndev = [\"triton; sys_platform == 'linux'\"]\n"
    )

    def run(address: str, constraints: str, *options: str) -> subprocess.CompletedProcess[str]:
        (project / "constraints.txt").write_text(constraints)
        env = os.environ | {
            "UV_DEFAULT_INDEX": address,
            "UV_CACHE_DIR": str(tmp_path / "cache"),
            "UV_HTTP_RETRIES": "0",
        }
        command = [sys.executable, str(ROOT / ".ci/constraints.py"), "--project", str(project), *options]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    return run


def a_cuda_build(index: Path) -> None:
    publish(index, "torch", "2.13.0", "triton==3.7.1; sys_platform == 'linux'")
    for version in ("3.6.0", "3.7.1"):
        publish(index, "triton", version)


def test_constraints_that_no_machine_can_install_fail_the_check(index, resolve):
    folder, address = index
    a_cuda_build(folder)
    done = resolve(address, "torch==2.13.0\ntriton==3.6.0\n")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "constraints.txt cannot be installed on Linux x86-64 with Python 3.11" in done.stdout
    assert "triton" in done.stdout


def test_constraints_without_a_conflict_pass_the_check(index, resolve):
    folder, address = index
    a_cuda_build(folder)
    done = resolve(address, "torch==2.13.0\ntriton==3.7.1\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("constraints.txt resolves on Linux x86-64, Linux arm64, macOS arm64")


def test_a_version_that_the_index_does_not_have_fails_the_check(index, resolve):
    folder, address = index
    a_cuda_build(folder)
    done = resolve(address, "torch==2.13.1\n")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "there is no version of torch==2.13.1" in done.stdout


def test_a_broken_constraints_file_fails_the_check(index, resolve):
    folder, address = index
    a_cuda_build(folder)
    done = resolve(address, "torch=2.13.0\n")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "torch=2.13.0" in done.stdout


def test_an_index_that_does_not_answer_passes_the_check_with_a_sentence(resolve):
    with socket.socket() as closed:  # a port that nobody listens on
        closed.bind(("127.0.0.1", 0))
        done = resolve(f"http://127.0.0.1:{closed.getsockname()[1]}", "torch==2.13.0\ntriton==3.6.0\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "the package index did not answer: 9 of 9 resolutions not checked\n"


def test_resolving_anew_keeps_the_versions_that_fit_and_replaces_those_that_do_not(index, resolve, tmp_path):
    folder, address = index
    a_cuda_build(folder)
    publish(folder, "torch", "2.14.0")
    done = resolve(address, "torch==2.13.0\ntriton==3.6.0\n", "--write")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "project/constraints.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "torch==2.13.0",
        "triton==3.7.1 ; sys_platform == 'linux'",
    ]


def test_every_dependency_has_an_exact_version_and_no_index_is_named():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    wanted = {canonical(requirement) for group in groups for requirement in group} - {"slimray"}
    lines = [line for line in CONSTRAINTS.splitlines() if not line.startswith("#")]
    assert all(re.match(r"[A-Za-z0-9._-]+==\S+( ; .+)?$", line) for line in lines)
    assert wanted <= {canonical(line) for line in lines}
    assert "://" not in CONSTRAINTS


def test_what_the_package_imports_is_declared_and_the_extras_stay_in_their_folders():
    """Triton alone is undeclared: a CUDA build of torch brings it, and without it torch does the work."""
    package, brings, optional = ROOT / "platform/slimray", packages_distributions(), PROJECT["optional-dependencies"]
    declared = {"": {canonical(one) for one in [*PROJECT["dependencies"], *optional["train"]]}}
    for folder, extras in FOLDERS_OF_EXTRAS.items():
        declared[folder] = {canonical(one) for extra in extras for one in optional[extra]}
    for path in package.rglob("*.py"):
        here = path.relative_to(package).as_posix()
        allowed = set().union(*(names for folder, names in declared.items() if here.startswith(folder)))
        for node in ast.walk(ast.parse(path.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"slimray", "triton"}:
                assert allowed & {canonical(one) for one in brings.get(name, [name])}, f"{here} imports {name}"


def test_the_dependencies_are_exactly_what_running_an_export_imports():
    code = """
import ast, json, sys
import slimray.cli.main, slimray.data.points.reader, slimray.data.video.decoder, slimray.runtime.loaded
files = [m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "slimray" and m.__file__]
print(json.dumps([files, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    files, loaded = json.loads(done.stdout)
    assert not {"torch", "ray", "open3d", "dash", "wandb", "onnx", "decord", "safetensors", "matplotlib"} & set(loaded)
    found: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(Path(file).read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {name.partition(".")[0] for name in names}
    needed, brings = found - set(sys.stdlib_module_names) - LATE - {"slimray"}, packages_distributions()
    wanted = {canonical(one) for name in needed for one in brings[name]}
    assert wanted == {canonical(one) for one in PROJECT["dependencies"]}


def test_a_command_that_needs_torch_says_what_to_install_where_it_is_missing(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    run = tmp_path / "runs/net/model"
    run.mkdir(parents=True)
    (run.parent / "status.json").write_text("{}")
    (run / "model.json").write_text("{}")
    code = "import sys; sys.modules['torch'] = None; from slimray.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", "net", "a.jpg"], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "this needs torch, which a plain install (for exports) lacks" in done.stderr
    assert "pip install 'slimray[train]'" in done.stderr


def test_running_installs_neither_the_tests_nor_the_extras_and_all_install_from_the_constraints():
    makefile, dockerfile = (ROOT / "Makefile").read_text(), (ROOT / "cluster/Dockerfile").read_text()
    assert "\n\t$(INSTALL) --editable '.[train]'\n" in makefile
    assert "\n\t$(INSTALL) --editable '.[dev]'\n" in makefile
    installs = re.findall(r"^.*pip install .*$", makefile + dockerfile, re.MULTILINE)
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in line for line in installs)
    groups = [PROJECT["dependencies"], PROJECT["optional-dependencies"]["train"]]
    core = {canonical(requirement) for group in groups for requirement in group}
    for extra in ("dashboard", "edge"):
        names = {canonical(requirement) for requirement in PROJECT["optional-dependencies"][extra]} - {"slimray"}
        assert not core & names


@pytest.mark.parametrize(
    ("missing", "command", "sentence"),
    [
        ("dash", "dashboard .", "slimray dashboard needs dash, not installed here: pip install 'slimray[dashboard]'"),
        (
            "onnxscript",
            "profile ofa_mobilenetv3 --hardware cpu-onnx --out phone.json",
            "hardware: cpu-onnx needs onnxscript, not installed here: pip install 'slimray[edge]'",
        ),
    ],
)
def test_what_needs_a_missing_extra_names_it_in_one_sentence(tmp_path, missing, command, sentence):
    code = f"import sys; sys.modules[{missing!r}] = None; from slimray.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_every_shipped_job_is_read_without_the_extras():
    code = """
import sys
sys.modules.update(dash=None, plotly=None, onnx=None, onnxruntime=None, onnxscript=None, triton=None)
import slimray.cli.main, slimray.job
print(*[one.job.name for path in sys.argv[1:] for one in slimray.job.load([path])])
"""
    jobs = sorted(map(str, (ROOT / "jobs").glob("*.yaml")))
    done = subprocess.run([sys.executable, "-c", code, *jobs], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "quickstart" in done.stdout, done.stderr
