"""Real runs for the tests of verbs: one local Ray cluster, one small generated dataset, the command line."""

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.numpy
from tests.waits import as_in_a_terminal, patience, wait_for

from slimray import runs
from slimray.cli import main as cli

DATA = "{kind: prepare, name: data, data: {card: moving_shapes, clips: 60, size: 32, frames: 12}}"
TRAIN = """
kind: train
name: {name}
data: {{run: data, size: 32, record_samples: true}}
model: {{name: tsm_resnet18, width: 0.125, num_segments: 4}}
batch: {{total: 8, per_worker: {per_worker}}}
optim: {{lr: 0.02, reference_batch: 8, epochs: {epochs}, schedule: cosine}}
scale: {{workers: {workers}}}
checkpoint: {{every_steps: 2}}
log_every: 1
"""


def train_yaml(name: str, workers: int = 2, epochs: int = 2, per_worker: int = 4) -> str:
    """Return the YAML of a training of 6 steps per epoch on 48 small clips."""
    return TRAIN.format(name=name, workers=workers, epochs=epochs, per_worker=per_worker)


class Shell:
    """Run the `slimray` command in a folder of its own, as a user types it."""

    def __init__(self, folder: Path):
        self.folder, self.storage = folder, folder / "runs"

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return name

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "slimray.cli", *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, preexec_fn=as_in_a_terminal,
        )  # fmt: skip

    def run(self, *arguments: str, seconds: float = 240) -> subprocess.CompletedProcess:
        child = self.start(*arguments)
        try:
            out, err = child.communicate(timeout=patience(seconds))
        except subprocess.TimeoutExpired:
            end_session(child)
            raise
        return subprocess.CompletedProcess(arguments, child.returncode, out, err)

    def ok(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


class Here(Shell):
    """Do the same, but run commands that are not killed in this process, on one cluster whose processes are reused."""

    def run(self, *arguments: str, seconds: float = 0) -> subprocess.CompletedProcess:
        """Run a command until it ends; the `timeout` of the test limits its duration."""
        code, out, err, before = 0, io.StringIO(), io.StringIO(), sys.argv
        sys.argv = ["slimray", *arguments]
        try:
            with contextlib.chdir(self.folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception:  # noqa: BLE001 as the interpreter shows what nobody caught
            code = 1
            traceback.print_exc(file=err)
        finally:
            sys.argv = before
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def end_session(child: subprocess.Popen) -> None:
    """Send SIGKILL to the command and everything it started."""
    for pid in session_of(child.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    child.wait(timeout=patience(30))


def session_of(leader: int) -> list[int]:
    """Return `leader` and all processes below it."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found, grew = {leader}, True
    while grew:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        found |= children
        grew = bool(children)
    return sorted(found)


def find_process(leader: int, words: str) -> int:
    """Return the first process below `leader` whose command line contains `words`."""
    for pid in session_of(leader):
        try:
            if words in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
        except OSError:
            continue
    raise AssertionError(f"no process with {words!r} below {leader}")


def write_list(shell: Shell, folder: str, files: list[Path], labels: int = 2) -> None:
    """Make a folder with links to `files` and lists of them, the same for both splits."""
    root = shell.folder / folder
    root.mkdir()
    for file in files:
        (root / file.name).symlink_to(file)
    lines = [f"{file.name} {i % labels}" for i, file in enumerate(files)]
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")


def weights(shell: Shell, name: str) -> str:
    """Return a digest of the trained weights, bit for bit."""
    data = (shell.storage / name / "model/weights.safetensors").read_bytes()
    tensors = safetensors.numpy.load(data)
    return hashlib.sha256(b"".join(tensors[k].tobytes() for k in sorted(tensors))).hexdigest()


def seen(shell: Shell, name: str) -> dict[int, list[int]]:
    """Return epoch -> samples that its steps consumed, sorted by id."""
    out: dict[int, list[int]] = {}
    for row in runs.read_parts(runs.open_run(str(shell.storage), name), "samples"):
        out.setdefault(row["epoch"], []).extend(row["ids"])
    return {epoch: sorted(ids) for epoch, ids in out.items()}


def has_checkpoint(shell: Shell, name: str, step: int) -> bool:
    return any(
        int(folder.name.removeprefix("step_")) >= step and (folder / "complete.json").exists()
        for folder in (shell.storage / name / "checkpoints").glob("step_*")
    )


def run_and_kill_a_worker(shell: Shell, file: str, name: str) -> None:
    """Start the training `name` of `file`, kill a worker after step 8, in mid-epoch, and check that it finishes."""
    killed: list[int] = []

    def kill() -> None:
        wait_for("a checkpoint in mid-epoch", lambda: has_checkpoint(shell, name, 8))
        killed.append(find_process(os.getpid(), "ray::RayTrainWorker"))
        os.kill(killed[0], signal.SIGKILL)

    killing = threading.Thread(target=kill, daemon=True)
    killing.start()
    shell.ok("run", file)
    killing.join()
    assert killed
    assert runs.count_writers(runs.open_run(str(shell.storage), name), "metrics") > 1, "its workers were started again"


@pytest.fixture(scope="session")
def shell(tmp_path_factory) -> Iterator[Here]:
    """Make a folder with the prepared dataset `data` in its storage."""
    import ray

    from slimray.train import connection

    connection.connect(2 + (os.cpu_count() or 1))  # as much as a training on two workers needs
    shell = Here(tmp_path_factory.mktemp("shell"))
    shell.ok("run", shell.write("data.yaml", DATA))
    yield shell
    ray.shutdown()
