"""The house rules: imports go down only, Ray and the big libraries stay in their files, no Ray where none is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "platform/slimray"
FLOORS = (  # the folders and files of the package from the top down: a floor imports from those below it
    "cli", "cluster", "job", "verbs", "report", "train", "export", "search", "edge", "tasks", "compress", "models",
    "data", "runs", "spec arch storage credentials",
)  # fmt: skip
PENDING = {  # upward imports of before the floors, each to be removed
    ("edge/arch_costs.py", "search"), ("edge/latency.py", "search"), ("tasks/predict.py", "train"),
}  # fmt: skip
ONLY_IN = {
    "ray": ("data/pipeline.py", "train/*.py", "verbs/*.py", "cluster/*.py"),
    "decord": ("data/video/movies.py",),
    "open3d": ("data/points/geometry.py",),
    "wandb": ("runs/tracking.py",),
}
NEVER_IN = {
    "torch": ("arch.py", "spec.py", "storage.py", "runs/*.py", "data/*.py", "data/*/*.py", "search/encoding.py",
              "search/strategies.py", "train/planner.py", "train/machines.py", "train/gpus.py",
              "train/spec.py"),
    "ray": ("train/spec.py", "train/planner.py", "train/machines.py", "train/gpus.py"),
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


def floor_of(name: str) -> int | None:
    """The number of the floor that a folder or file of the package is on, 0 at the top; None if it is on none."""
    return next((number for number, names in enumerate(FLOORS) if name in names.split()), None)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_folder_is_a_floor():
    assert {room(path) for path in FILES} <= {name for names in FLOORS for name in names.split()}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_from_lower_floors_only(path: Path):
    mine, here = room(path), path.relative_to(PACKAGE).as_posix()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "slimray" or len(parts) < 2 or floor_of(parts[1]) is None or (here, parts[1]) in PENDING:
            continue
        below = floor_of(parts[1]) > floor_of(mine) or (floor_of(parts[1]) == floor_of(mine) == len(FLOORS) - 1)
        assert parts[1] == mine or below, f"{here} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_big_libraries_stay_in_their_files(path: Path):
    here, tops = path.relative_to(PACKAGE), {name.split(".")[0] for name in imports(path)}
    for library, places in ONLY_IN.items():
        assert library not in tops or any(here.match(place) for place in places), f"{library} in {here}"
    for library, places in NEVER_IN.items():
        assert library not in tops or not any(here.match(place) for place in places), f"{library} in {here}"


def test_the_platform_folder_is_no_package():
    assert not (ROOT / "platform/__init__.py").exists()
    code = "import platform, torch, ray; print(platform.system())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip(), done.stderr


def test_what_needs_no_ray_works_without_ray():
    code = """
import sys
sys.modules.update(ray=None, decord=None, open3d=None)
from slimray import models, runs
from slimray.edge import cost
from slimray.report import pages
from slimray.runs import tracking
from slimray.tasks import predict
from slimray.train import learn
from slimray.train.methods import plain
print(cost.count_params(models.build("tsm_resnet18", num_classes=4, width=0.25)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().isdigit(), done.stderr


def test_the_decoding_child_imports_neither_torch_nor_ray():
    code = "import sys, slimray.data.video.decoder; print({'torch', 'ray', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
