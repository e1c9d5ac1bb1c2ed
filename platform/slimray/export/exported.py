"""An exported network as a module: `export/<format>/` of a run, loaded and called like the module it was made from.

`ExportedNet` takes the inputs of the original network: also batches if the file holds a single sample, and clips if it
holds a step, which runs frame by frame with the logits averaged. `load_exported` returns it as a run's network, so that
exports are scored by the same code. Sizes and SHA-256 of the files are compared with export.json before they are used.
"""

import contextlib
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimray import runs
from slimray.export.formats import FORMATS, Runner
from slimray.export.graph import Graph
from slimray.export.translation import ENCODER, STEP, ExportedTranslation, speaker
from slimray.runs.folder import digest
from slimray.runtime.inputs import Input
from slimray.runtime.translate import PAST
from slimray.spec import RunFailed, UserError, lookup
from slimray.tasks.network import Network, task_of

VERSION = 1


@dataclass(frozen=True)
class Ports:
    """Names of the outputs, shapes of the states (only of a step), and whether any batch size is accepted."""

    outputs: tuple[str, ...]
    states: tuple[tuple[int, ...], ...] = ()
    any_batch: bool = True


class ExportedNet(nn.Module):
    """The exported network with the original network's outputs: a tensor, or several by name."""

    def __init__(self, runner: Runner, ports: Ports):
        super().__init__()
        self.runner, self.ports = runner, ports
        self.nothing = nn.Parameter(torch.zeros(0), requires_grad=False)  # gives the module a device

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        array = np.ascontiguousarray(x.detach().cpu().numpy())
        if self.ports.states:
            return torch.from_numpy(np.concatenate([self._stream(clip[None]) for clip in array]))
        pieces = [array] if self.ports.any_batch else [array[i : i + 1] for i in range(len(array))]
        found = [self._run(piece) for piece in pieces]
        whole = [torch.from_numpy(np.concatenate(parts)) for parts in zip(*found, strict=True)]
        return whole[0] if self.ports.outputs == ("output",) else dict(zip(self.ports.outputs, whole, strict=True))

    def _run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        try:
            return [np.asarray(one) for one in self.runner(arrays)]
        except Exception as error:  # each runtime has its own error classes
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise RunFailed(f"the exported network does not run: {lines[0]}") from error

    def _stream(self, clip: np.ndarray) -> np.ndarray:
        """Return the mean logits of the frames of a clip `[1, T, 3, H, W]`, stepped in order."""
        states: Sequence[np.ndarray] = [np.zeros(shape, np.float32) for shape in self.ports.states]
        logits = []
        for number in range(clip.shape[1]):
            one, *states = self._run(np.ascontiguousarray(clip[:, number]), *states)
            logits.append(one)
        return np.mean(logits, 0)


def ports_of(graph: Graph, any_batch: bool) -> Ports:
    """Return the ports of a graph."""
    return Ports(graph.outputs, tuple(state.shape for state in graph.states), any_batch)


def described(graph: Graph, any_batch: bool, outputs: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return inputs, outputs and states for export.json; None stands for a size that varies."""
    varying = graph.varying if any_batch else {}

    def shape(name: str, value: Any) -> list[int | None]:
        return [None if axis in varying.get(name, {}) else int(size) for axis, size in enumerate(value.shape)]

    free = any_batch and bool(graph.varying)
    return {
        "inputs": [
            {"name": name, "shape": shape(name, value), "dtype": str(value.numpy().dtype)}
            for name, value in graph.inputs.items()
        ],
        "outputs": [
            {"name": name, "shape": [None if free and not axis else int(n) for axis, n in enumerate(value.shape)],
             "dtype": str(value.dtype)}
            for name, value in zip(graph.outputs, outputs, strict=True)
        ],
        "states": [{**vars(state), "shape": list(state.shape)} for state in graph.states],
    }  # fmt: skip


def list_formats(run: runs.Run) -> list[str]:
    """Return the formats that an export run holds."""
    return [name for name in FORMATS if runs.exists(run, f"export/{name}/export.json")]


def read_export(run: runs.Run, name: str) -> dict[str, Any]:
    """Return export.json of a format; UserError if the run does not hold it, or it is of another version."""
    lookup(FORMATS, name, "format")
    if not runs.exists(run, f"export/{name}/export.json"):
        raise UserError(f"{run.uri}: has no export {name!r} (it has: {', '.join(list_formats(run)) or 'none'})")
    found = runs.parse_json(runs.read_file(run, f"export/{name}/export.json"), f"{run.uri}/export/{name}/export.json")
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise UserError(f"{run.uri}/export/{name}/export.json: is of another version, export the run again")
    return found


def load_exported(run: runs.Run, name: str, threads: int) -> Network:
    """Return an export as a network on the CPU; UserError if it is missing or damaged, or its runtime not installed."""
    found, row = read_export(run, name), FORMATS[name]
    row.require(f"{run.name}:{name}")
    with contextlib.ExitStack() as kept:
        folder = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="slimray-export-")))
        for file, facts in found["files"].items():
            data = runs.read_file(run, f"export/{name}/{file}")
            if digest(data) != (facts["bytes"], facts["sha256"]):
                sentence = "differs from the exported file: restore it, or export the run again"
                raise UserError(f"{run.uri}/export/{name}/{file}: {sentence}")
            (folder / file).write_bytes(data)
        net = _network(found, lambda file: row.load(folder / file, threads, True))
        weakref.finalize(net, kept.pop_all().close)  # a runtime may read its files as long as it runs
    return network_of(net, found["input"], found["model"])


def _network(found: Mapping[str, Any], load: Callable[[str], Runner]) -> nn.Module:
    """Return the module described by export.json; `load` opens its files."""
    step = found.get("step")
    if step is not None:
        ports = {
            part: ([one["name"] for one in facts["inputs"]], [one["name"] for one in facts["outputs"]])
            for part, facts in ((ENCODER, found), (STEP, step))
        }
        widths = {one["name"]: int(one["shape"][-1]) for one in step["inputs"] if one["name"].startswith(PAST)}
        return ExportedTranslation(speaker({ENCODER: load(found["file"]), STEP: load(step["file"])}, ports, widths))
    outputs = tuple(one["name"] for one in found["outputs"])
    states = tuple(tuple(one["shape"]) for one in found["states"])
    ports = Ports(outputs, states, found["inputs"][0]["shape"][0] is None)
    return ExportedNet(load(found["file"]), ports)


def network_of(net: nn.Module, taken: Mapping[str, Any], model: Mapping[str, Any]) -> Network:
    """Return a module as the network of a run with this `model/input.json` and `model/model.json`."""
    pixels: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in taken["pixels"].items()}
    return Network(net.eval(), Input(**pixels), taken["recipe"], tuple(taken["classes"]), dict(model), task_of(taken))
