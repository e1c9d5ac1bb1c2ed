"""Runtimes of networks on this device, and their timing: torch, torch.compile, ONNX Runtime, a GPU."""

import contextlib
import importlib.metadata
import itertools
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimray import __version__
from slimray.edge import onnx_file
from slimray.spec import UserError

RUNS_PER_READING = 2  # after an untimed run; the fastest counts
THREAD_CLOCK = time.get_clock_info("thread_time").resolution <= 1e-6  # coarse on Windows
Step = Callable[[Any], Any]
Clock = Callable[[], float]  # seconds


@dataclass(frozen=True, eq=False)
class Chain:
    """Steps that run one after another, their names, and inputs of their own (None: the previous step's output)."""

    keys: tuple[str, ...]
    steps: tuple[Step, ...]
    inputs: tuple[Any, ...]


@dataclass(frozen=True)
class Reading:
    """The fastest ms of each step of a chain, those of the reference just before, and the total seconds: wall time and
    processor time of the measuring thread."""

    reference_ms: float
    ms: list[float]
    wall_s: float
    busy_s: float


@dataclass(frozen=True)
class Runtime:
    """A way to run networks on a device: `prepare(module, x, threads)` makes a step, `feed` converts an input for it.

    `timed(steps, inputs, clock)` runs a chain and returns the ms of each step; `inputs[i]` None stands for the output
    of the previous step. `check` raises UserError if it cannot run here. `per_shape`: a step is specific to one input
    shape, takes seconds to prepare and is prepared once for equal units; otherwise a step is the module itself, one per
    place.
    """

    description: str
    prepare: Callable[[nn.Module, Tensor, int], Step]
    feed: Callable[[Tensor], Any]
    timed: Callable[[Sequence[Step], Sequence[Any], Clock], list[float]]
    check: Callable[[], None]
    device: Callable[[], str]
    per_shape: bool = False
    num_resolutions: int | None = None
    reading: Callable[[Chain, Chain, int, Clock], Reading] | None = None
    """Reads (reference, chain, runs of the reference, clock) in one request, for a remote device."""
    reference: Callable[[nn.Module, Tensor], Step] | None = None
    """Prepares the reference network, if it does not run in torch here."""
    versions: Callable[[], dict[str, str]] | None = None
    conditions: Callable[[], dict[str, Any]] | None = None
    """Returns temperature, clock, throttling and watts, as far as the device reports them."""


def _timed_on_cpu(steps: Sequence[Step], inputs: Sequence[Any], clock: Clock) -> list[float]:
    out, x = [], None
    start = clock()
    for step, own in zip(steps, inputs, strict=True):
        x = step(x if own is None else own)
        end = clock()
        out.append(1e3 * (end - start))
        start = end
    return out


def timed_on_gpu(steps: Sequence[Step], inputs: Sequence[Any], clock: Clock) -> list[float]:
    marks, x = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)], None
    marks[0].record()
    for mark, step, own in zip(marks[1:], steps, inputs, strict=True):
        x = step(x if own is None else own)
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def _eager(module: nn.Module, x: Tensor, threads: int) -> Step:
    return module


def _compiled(module: nn.Module, x: Tensor, threads: int) -> Step:
    # exported first, so that every graph has code of its own; otherwise Dynamo's limit of graphs per class falls back
    # to eager mode
    return torch.compile(torch.export.export(module, (x,)).module(), dynamic=False)


def _onnx(module: nn.Module, x: Tensor, threads: int) -> Step:
    session = onnx_file.open_session(onnx_file.to_onnx(module, {"input": x}), threads)
    return lambda value: session.run(None, {"input": value})[0]


def _on_gpu(module: nn.Module, x: Tensor, threads: int) -> Step:
    return module.to("cuda")


def _nothing() -> None:
    """Check nothing: it runs everywhere."""


def _needs_compiler() -> None:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        raise UserError("hardware: cpu-compiled needs a C++ compiler (g++ or clang++): install one, or use cpu-eager")


def _needs_onnx() -> None:
    onnx_file.require("hardware: cpu-onnx")


def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        raise UserError("hardware: cuda: torch finds no CUDA device here: use cpu-eager, cpu-compiled or cpu-onnx")


def cpu_name() -> str:
    """Return the name of this machine's processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)


def cpu_flags() -> list[str]:
    """Return those of INSTRUCTIONS that this processor has; the int8 ones change the outputs of int8 networks."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    words = {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
    return [name for name in INSTRUCTIONS if name in words]


RUNTIMES: dict[str, Runtime] = {
    "cpu-eager": Runtime("torch, eager", _eager, lambda x: x, _timed_on_cpu, _nothing, cpu_name),
    "cpu-compiled": Runtime(
        "torch.compile", _compiled, lambda x: x, _timed_on_cpu, _needs_compiler, cpu_name, True, num_resolutions=3
    ),
    "cpu-onnx": Runtime(
        "ONNX Runtime", _onnx, lambda x: x.numpy(), _timed_on_cpu, _needs_onnx, cpu_name, True, num_resolutions=5
    ),
    "cuda": Runtime(
        "torch, eager, on a GPU",
        _on_gpu,
        lambda x: x.to("cuda"),
        timed_on_gpu,
        _needs_gpu,
        lambda: torch.cuda.get_device_name(),
    ),
}


def reference_module() -> nn.Module:
    """Return a small network, timed repeatedly to track the speed of the machine. Takes `[1, 24, 28, 28]`."""
    return nn.Sequential(
        nn.Conv2d(24, 96, 1), nn.ReLU(), nn.Conv2d(96, 96, 3, padding=1, groups=96), nn.ReLU(), nn.Conv2d(96, 24, 1)
    ).eval()


@contextlib.contextmanager
def settings(threads: int) -> Iterator[None]:
    """Set the number of threads, and flush denormals to zero, which are slow and only frequent in untrained nets."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(False)


def versions(hardware: str) -> dict[str, str]:
    out = {"slimray": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if hardware == "cpu-onnx":
        out |= {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime", "onnxscript")}
    return out
