"""The house rules: imports go down only, Ray and the big libraries stay in their files, no Ray where none is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "platform/slimray"
FLOORS = {
    "spec": 1, "arch": 1.2, "genes": 1.3, "storage": 1.5, "lars": 1.8,
    "models": 2, "learn": 2, "data": 2, "edge": 2, "runs": 2, "tracking": 2, "point_scores": 2, "strategies": 2,
    "planner": 2, "manifests": 2, "vitals": 2, "notify": 2, "report_points": 2.4,
    "predict": 2.5, "report": 2.5, "accuracy_predictor": 2.5, "replica": 2.6, "supernet_replica": 2.7,
    "proxyless_replica": 2.7,
    "workers": 3, "progress": 3, "loop": 3.3, "jobs": 3.6,
    "job": 4, "dashboard_watch": 4.8, "dashboard_views": 4.9, "cluster": 5, "dashboard": 5, "cli_cluster": 5.5,
    "cli": 6,
}  # fmt: skip
ONLY_IN = {
    "ray": ("data/pipeline.py", "workers.py", "progress.py", "loop.py", "jobs/*.py", "cluster.py"),
    "decord": ("data/decoder.py",),
    "open3d": ("data/points.py",),
    "wandb": ("tracking.py",),
}
NEVER_IN = {
    "torch": ("arch.py", "genes.py", "spec.py", "storage.py", "strategies.py", "runs.py", "planner.py",
              "data/decoder.py"),
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """The full names of what a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "slimray" or node.module.startswith("slimray.") else {node.module}
    return found


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_from_lower_floors_only(path: Path):
    mine = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "slimray" or len(parts) < 2 or parts[1] not in FLOORS:
            continue
        assert parts[1] == mine or FLOORS[parts[1]] < FLOORS[mine], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_big_libraries_stay_in_their_files(path: Path):
    here, tops = path.relative_to(PACKAGE), {name.split(".")[0] for name in imports(path)}
    for library, places in ONLY_IN.items():
        assert library not in tops or any(here.match(place) for place in places), f"{library} in {here}"
    for library, places in NEVER_IN.items():
        assert library not in tops or here.as_posix() not in places, f"{library} in {here}"


def test_the_platform_folder_is_no_package():
    assert not (ROOT / "platform/__init__.py").exists()
    code = "import platform, torch, ray; print(platform.system())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip(), done.stderr


def test_what_needs_no_ray_works_without_ray():
    code = """
import sys
sys.modules.update(ray=None, decord=None, open3d=None)
from slimray import learn, models, predict, replica, report, runs, tracking
from slimray.edge import cost
print(cost.count_params(models.build("tsm_resnet18", num_classes=4, width=0.25)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().isdigit(), done.stderr


def test_the_decoding_child_imports_neither_torch_nor_ray():
    code = "import sys, slimray.data.decoder; print({'torch', 'ray', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
