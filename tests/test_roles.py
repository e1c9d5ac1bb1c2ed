"""Each process of a run imports only what its role needs, because every process pays for its imports.

A role is the module whose classes and functions a process receives; Ray's worker itself imports ray.
"""

import subprocess
import sys

import pytest
from tests.waits import patience

from slimray.train.progress_actor import ProgressActor

PICTURES = {"matplotlib", "jinja2", "rich", "slimray.report"}
SEARCHES = {"optuna", "ray.tune", "scipy", "sklearn", "slimray.search"}
DECODERS = {"av", "decord", "open3d", "slimray.data.video.movies"}
ELSEWHERE = {"typer", "wandb", "dash", "onnx", "slimray.cli", "slimray.job", "slimray.verbs"}
NEVER = PICTURES | SEARCHES | DECODERS | ELSEWHERE
ROLES = {  # what it is -> the module it is given, and what that must not import
    "progress actor": ("slimray.train.progress_actor", NEVER | {"ray", "torch", "numpy", "pydantic", "pyarrow"}),
    "who joins a cluster": (
        "slimray.train.connection",
        NEVER | {"torch", "pandas", "ray.data", "ray.train"},
    ),
    "feeder, decoding task": (
        "slimray.data.pipeline",
        NEVER | {"torch", "ray.train", "slimray.models", "slimray.tasks"},
    ),
    "training worker": ("slimray.train.loop", NEVER | {"torch._dynamo", "triton", "sympy"}),
    "scoring worker": (
        "slimray.verbs.scoring",
        (SEARCHES - {"slimray.search"}) | {"torch._dynamo", "matplotlib", "wandb", "slimray.report"},
    ),
}


def imported(module: str) -> set[str]:
    """The modules that a process holds once it has imported `module`."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patience(120))
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("role", ROLES)
def test_a_process_imports_what_its_role_needs(role):
    module, never = ROLES[role]
    assert not imported(module) & never


def test_the_progress_actor_is_given_a_class_of_its_own_file():
    assert ProgressActor.__module__ == ROLES["progress actor"][0]
