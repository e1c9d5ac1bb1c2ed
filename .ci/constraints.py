"""Resolve constraints.txt against the package index, for every machine and Python that slimray supports.

    python .ci/constraints.py            check: exit 1 and show the conflict if some machine could not install it
    python .ci/constraints.py --write    resolve it anew; versions that still fit are kept (--upgrade: take the newest)

Only metadata is read and no wheel is downloaded, so this takes seconds. If the index does not answer, the check reports
that and passes. CPU builds of torch require a subset of what the CUDA build on the index requires, so they are covered.
uv uses the public index unless UV_DEFAULT_INDEX names another one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uv

ROOT = Path(__file__).resolve().parents[1]
UV = uv.find_uv_bin()
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = {
    "Linux x86-64": "x86_64-manylinux_2_35",
    "Linux arm64": "aarch64-manylinux_2_35",
    "macOS arm64": "aarch64-apple-darwin",
}
FROM_SOURCE = "antlr4-python3-runtime"  # pure Python without wheels, required by executorch
HEADER = """\
# Exact versions for Linux x86-64 (CUDA and CPU builds of torch), Linux arm64 and macOS arm64, Python 3.11 to 3.13.
# Written by `make constraints`, checked by `make resolve`.
"""
NO_ANSWER = ("Failed to fetch", "error sending request", "Request failed after", "network was disabled")


def resolve(project: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `uv pip compile` on `project`/pyproject.toml with all extras."""
    command = [UV, "pip", "compile", "--no-config", "--no-python-downloads", "--python", sys.executable, "--quiet"]
    env = {"UV_HTTP_TIMEOUT": "20"} | os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}  # what torch's wheels need
    command += ["--all-extras", "pyproject.toml", *options]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=False)


def check(project: Path) -> int:
    """Return 0 if every machine and Python can install `project` with its constraints.txt, else 1."""

    def one(case: tuple[str, str]) -> subprocess.CompletedProcess[str]:
        machine, python = case
        return resolve(
            project, "--constraints", "constraints.txt", "--only-binary", ":all:", "--no-binary", FROM_SOURCE,
            "--python-platform", MACHINES[machine], "--python-version", python,
        )  # fmt: skip

    cases = [(machine, python) for machine in MACHINES for python in PYTHONS]
    conflicts = unanswered = 0
    with ThreadPoolExecutor(3) as pool:
        for case, result in zip(cases, pool.map(one, cases), strict=True):
            if result.returncode == 0:
                continue
            if any(words in result.stderr for words in NO_ANSWER):
                unanswered += 1
                continue
            conflicts += 1
            print(f"constraints.txt cannot be installed on {case[0]} with Python {case[1]}:\n{result.stderr}")
    if unanswered:
        print(f"the package index did not answer: {unanswered} of {len(cases)} resolutions not checked")
    if not conflicts and not unanswered:
        print(f"constraints.txt resolves on {', '.join(MACHINES)} with Python {', '.join(PYTHONS)}")
    return 1 if conflicts else 0


def write(project: Path, *options: str) -> int:
    """Resolve `project`/constraints.txt anew, the same versions for every machine and Python."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "constraints.txt"  # uv prefers the versions in this file
        kept.write_text((project / "constraints.txt").read_text())
        result = resolve(
            project, "--universal", "--fork-strategy", "fewest", "--python-version", PYTHONS[0],
            "--no-header", "--no-annotate", "--no-emit-index-url", "--output-file", str(kept), *options,
        )  # fmt: skip
        if result.returncode:
            print(result.stderr)
            return 1
        (project / "constraints.txt").write_text(HEADER + kept.read_text())
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="resolve constraints.txt anew")
    parser.add_argument("--upgrade", action="store_true", help="with --write: take the newest versions")
    parser.add_argument("--project", type=Path, default=ROOT, help="the folder of pyproject.toml and constraints.txt")
    args = parser.parse_args()
    if args.write:
        sys.exit(write(args.project, *(["--upgrade"] if args.upgrade else [])))
    sys.exit(check(args.project))
