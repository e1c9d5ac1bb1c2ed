"""Fixtures for all tests: where the reference values are, and Ray kept local, quiet and short of patience."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with recorded reference values and real data: $SLIMRAY_SHARED, or `shared` beside the repository."""
    folder = Path(os.environ.get("SLIMRAY_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"reference values not found at {folder}: set SLIMRAY_SHARED")
    return folder
