"""The rules of the package: imports go down only, large libraries stay in their files, Ray only where it is needed."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from tests.waits import patience

from slimray.data.cards import Card
from slimray.data.labels import LABELS
from slimray.data.modalities import MODALITIES
from slimray.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "platform/slimray"
FLOORS = (  # the folders and files of the package from the top down: a floor imports from those below it
    "cli", "cluster", "job", "verbs", "report", "train", "export", "search", "edge", "tasks", "compress", "models",
    "runtime", "data", "runs", "spec arch encoding storage objects credentials",
)  # fmt: skip
ONLY_IN = {
    "ray": ("data/pipeline.py", "train/*.py", "verbs/*.py", "cluster/*.py"),
    "decord": ("data/video/movies.py",),
    "open3d": ("data/points/geometry.py",),
    "wandb": ("runs/tracking.py",),
    "botocore": ("objects.py",),
    "sentencepiece": ("data/text/vocabulary.py",),
}
NEVER_IN = {
    "torch": ("arch.py", "spec.py", "storage.py", "runs/*.py", "runtime/*.py", "data/*.py", "data/*/*.py",
              "encoding.py", "search/strategies.py", "search/problem.py", "search/pareto.py", "train/planner.py",
              "train/machines.py", "train/gpus.py", "train/spec.py"),
    "ray": ("train/spec.py", "train/planner.py", "train/machines.py", "train/gpus.py"),
}  # fmt: skip


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """The full names of what a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "slimray" or node.module.startswith("slimray.") else {node.module}
    return frozenset(found)


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def floor_of(name: str) -> int | None:
    """The number of the floor that a folder or file of the package is on, 0 at the top; None if it is on none."""
    return next((number for number, names in enumerate(FLOORS) if name in names.split()), None)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_no_file_is_longer_than_five_hundred_lines():
    long = {str(path.relative_to(PACKAGE)): path.read_text().count("\n") for path in FILES}
    assert not {name: lines for name, lines in long.items() if lines > 500}


def test_every_folder_is_a_floor():
    assert {room(path) for path in FILES} <= {name for names in FLOORS for name in names.split()}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_from_lower_floors_only(path: Path):
    mine, here = room(path), path.relative_to(PACKAGE).as_posix()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "slimray" or len(parts) < 2 or floor_of(parts[1]) is None:
            continue
        below = floor_of(parts[1]) > floor_of(mine) or (floor_of(parts[1]) == floor_of(mine) == len(FLOORS) - 1)
        assert parts[1] == mine or below, f"{here} imports {name}"


def imports_when_run(path: Path) -> set[str]:
    """The imports of a file but those for type checkers alone."""
    tree = ast.parse(path.read_text())
    checked = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    for node in checked:
        node.body = [ast.Pass()]
    return {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    }


@pytest.mark.parametrize("folder", sorted({room(path) for path in FILES if path.parent != PACKAGE}))
def test_no_files_of_a_folder_import_each_other_in_a_circle(folder: str):
    files = {
        f"slimray.{path.relative_to(PACKAGE).as_posix().removesuffix('.py').replace('/', '.')}": path
        for path in FILES
        if room(path) == folder and path.name != "__init__.py"
    }
    waits = {name: imports_when_run(path) & files.keys() - {name} for name, path in files.items()}
    while ready := {name for name, needed in waits.items() if not needed & waits.keys()}:
        waits = {name: needed for name, needed in waits.items() if name not in ready}
    assert not waits, f"a circle among {', '.join(sorted(waits))}"


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
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=patience(120))
    assert done.stdout.strip(), done.stderr


def test_what_needs_no_ray_works_without_ray():
    code = """
import sys
sys.modules.update(ray=None, decord=None, open3d=None)
from slimray import models, runs
from slimray.edge import cost

from slimray.runs import tracking
from slimray.tasks import predict
from slimray.train import learn
from slimray.train.methods import plain
print(cost.count_params(models.build("tsm_resnet18", num_classes=4, width=0.25)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patience(120))
    assert done.stdout.strip().isdigit(), done.stderr


def test_the_decoding_child_imports_neither_torch_nor_ray():
    code = "import sys, slimray.data.video.decoder; print({'torch', 'ray', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patience(60))
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------- time in tests

TESTS = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path.parent.name != "benchmarks"]
CLOCKS = {"time", "monotonic", "perf_counter", "process_time", "thread_time", "time_ns", "perf_counter_ns"}
WAITS = {"timeout", "timeout_s", "patience_s"}
WAITING = {"wait", "join", "sleep_until", "set_default_timeout", "wait_for_timeout"}


def calls(node: ast.AST, *names: str) -> bool:
    """Whether `node` calls a function or method of one of these names."""
    found = [one.func for one in ast.walk(node) if isinstance(one, ast.Call)]
    return any((f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "")) in names for f in found)


def absolute_times(source: str) -> list[str]:
    """The lines of a test file that hold a measured duration, or a wait, against a number of seconds.

    A name is measured if a clock goes into it. It may be compared with another measured one, or with `patience(...)`,
    which scales with the machine; waits are `patience(...)` too, but limits below a second, which are to be overrun.
    """
    tree, found = ast.parse(source), []
    measured: set[str] = set()

    def is_measured(node: ast.AST) -> bool:
        names = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
        return calls(node, *CLOCKS) or bool(names & measured)

    size = -1
    while size != len(measured):
        size = len(measured)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AugAssign | ast.NamedExpr | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if is_measured(node.value):
                    measured |= {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("append", "extend", "add")
                and isinstance(node.func.value, ast.Name)
                and any(is_measured(one) for one in node.args)
            ):
                measured.add(node.func.value.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            for compared in (one for one in ast.walk(node) if isinstance(one, ast.Compare)):
                sides = [compared.left, *compared.comparators]
                if any(map(is_measured, sides)) and not all(is_measured(s) or calls(s, "patience") for s in sides):
                    found.append(f"line {node.lineno}: {ast.unparse(compared)}")
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = [one.value for one in node.keywords if one.arg in WAITS]
            given += node.args[:1] if name in WAITING else []
            seconds = [one.value for one in given if isinstance(one, ast.Constant) and not isinstance(one.value, str)]
            if any(one is not None and one >= 1 for one in seconds):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(ROOT / "tests")))
def test_no_test_knows_how_many_seconds_something_takes(path: Path):
    assert absolute_times(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "start = time.monotonic()\nassert time.monotonic() - start < 5",
        "took = perf_counter() - start\nbest = took\nassert 0 < best < LIMIT_S",
        "seconds.append(time.process_time() - start)\nassert min(seconds) < 0.05",
        "process.communicate(timeout=20)",
        "assert event.wait(10)",
        "page.wait_for_timeout(300)",
        "Decoder(timeout_s=20)",
    ],
)
def test_an_absolute_time_is_found(source: str):
    assert len(absolute_times(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "a = time.monotonic() - start\nb = time.monotonic() - start\nassert a < b",
        "end = time.monotonic() + patience(20)\nassert time.monotonic() < end",
        "process.communicate(timeout=patience(20))",
        "Decoder(timeout_s=0.3)",
    ],
)
def test_a_ratio_and_a_wait_that_scales_are_no_absolute_times(source: str):
    assert absolute_times(source) == []


# ------------------------------------------------------------------------------------- tasks and modalities are tables

TABLES = {"data/modalities.py", "data/labels.py"}
BRANCH_FREE = [path for path in FILES if room(path) != "tasks" and path.relative_to(PACKAGE).as_posix() not in TABLES]
LABELLED = set(LABELS)  # too common to be looked for but beside `labels`
KINDS = {*TASKS, *MODALITIES}
OF_KINDS = {"ClipRecipe", "ImageRecipe", "PointRecipe", "PairRecipe", "ClassScore", "SegmentationScore", "ShapeScore",
            "FrustumScore", "PictureScore", "FrustumNet", "TextRecipe",
            "TokenScore"}  # fmt: skip
SIGNS = {"per_point", "num_shapes", "num_segments", "kind"}  # attributes by which a recipe or network would be told
EXCEPTIONS = {  # (file, what it does): why that asks neither for a task nor for a modality
    ("data/video/decoder.py", "compares with 'clip'"): "what a request to the decoding process is for",
    ("data/video/decoder.py", "compares with 'image'"): "what a request to the decoding process is for",
    ("runs/examples.py", "compares ndim"): "a scene checks its own arrays",
}


@functools.cache
def branches(path: Path) -> frozenset[str]:
    return frozenset(branches_in(path.read_text(), path))


def branches_in(code: str, path: Path) -> set[str]:
    """What in the code of a file asks for a task or modality: comparison, membership, class, table, ndim, hasattr."""
    found: set[str] = set()
    shapes = room(path) in ("verbs", "report", "train", "cli", "job", "runs", "search")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Compare | ast.MatchValue):
            inside = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            found |= {f"compares with {name!r}" for name in inside & KINDS}
            if any(isinstance(n, ast.Attribute) and n.attr == "labels" for n in ast.walk(node)):
                found |= {f"compares labels with {name!r}" for name in inside & LABELLED}
            if shapes and any(isinstance(n, ast.Attribute) and n.attr == "ndim" for n in ast.walk(node)):
                found.add("compares ndim")
        elif isinstance(node, ast.Dict):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            found |= {f"a table by {', '.join(sorted(keys & own))}" for own in (KINDS, LABELLED) if len(keys & own) > 1}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            said = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            if node.func.id in ("isinstance", "issubclass"):
                found |= {f"asks for {name}" for name in names & OF_KINDS}
            if node.func.id in ("hasattr", "getattr"):
                found |= {f"looks for {name}" for name in said & SIGNS if isinstance(name, str)}
    return found


@pytest.mark.parametrize("path", BRANCH_FREE, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_outside_the_tables_asks_which_task_or_modality_it_is(path: Path):
    here = path.relative_to(PACKAGE).as_posix()
    assert {what for what in branches(path) if (here, what) not in EXCEPTIONS} == set()


def test_every_exception_is_still_needed():
    there = {(path.relative_to(PACKAGE).as_posix(), what) for path in BRANCH_FREE for what in branches(path)}
    assert set(EXCEPTIONS) <= there


def test_a_card_may_say_what_the_table_of_labels_has():
    assert set(get_args(Card.model_fields["labels"].annotation)) == LABELLED


def test_the_tables_that_contributing_names_are_where_it_says():
    rows = re.findall(r"`([A-Z]\w+)` in `([\w/]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(rows) > 12
    for name, path in rows:
        assert re.search(rf"^(class )?{name}\b.*[=:]", (PACKAGE / path).read_text(), re.MULTILINE), f"{name} in {path}"


def test_a_branch_is_seen_in_every_form():
    forms = {
        'x = card.sample == "clip"': "compares with 'clip'",
        'x = kind in ("image", "other")': "compares with 'image'",
        'x = card.labels != "point"': "compares labels with 'point'",
        'x = "none" == self.labels or y': "compares labels with 'none'",
        'x = {"sample": 1, "point": 2}[card.labels]': "a table by point, sample",
        'match kind:\n    case "segment":\n        pass': "compares with 'segment'",
        'x = {"clip": 1, "points": 2}[kind]': "a table by clip, points",
        "x = isinstance(recipe, PointRecipe | int)": "asks for PointRecipe",
        'x = getattr(recipe, "per_point", False)': "looks for per_point",
    }
    for code, what in forms.items():
        assert branches_in(code, PACKAGE / "verbs/nowhere.py") == {what}
    assert branches_in("x = batch.data.ndim == 6", PACKAGE / "verbs/nowhere.py") == {"compares ndim"}
    for code in ('x = {"clip": 1}', 'x = normalize == "none"', "x = labels == predicted"):
        assert branches_in(code, PACKAGE / "verbs/nowhere.py") == set()
