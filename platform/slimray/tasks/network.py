"""A run's network as a function from arrays of samples to outputs, for validation, `evaluate` and `predict`.

`Input` defines how arrays become the network's input and how views are averaged; it is stored in the run's
`model/input.json`, so that predictions prepare their input as training did. Needs only torch, so that a machine without
Ray can predict too.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from slimray import compress, runs
from slimray.compress import slim_file
from slimray.data.modalities import read_recipe
from slimray.models import published
from slimray.runtime import answers
from slimray.runtime.answers import Arrays
from slimray.runtime.inputs import Input
from slimray.spec import UserError
from slimray.tasks.precision import computing
from slimray.tasks.task import Outputs, task_before

SLIM = "model/model.slim"  # the file of a compressed run that holds its whole network


@dataclass(frozen=True)
class Network:
    """A run's network, ready to use: the module in eval mode, its input, the recipe of its samples, its classes.

    `task` is a name in TASKS, `precision` that of its computation (tasks/precision.py), `model` the arguments of
    `compress.build`.
    """

    net: nn.Module
    pixels: Input
    recipe: dict[str, Any]
    classes: tuple[str, ...]
    model: dict[str, Any]
    task: str
    precision: str = "auto"

    @property
    def device(self) -> torch.device:
        """Return the device of its weights."""
        return next(self.net.parameters()).device

    @property
    def reach(self) -> int:
        """Largest distance in pixels at which an input still affects an output."""
        return int(getattr(self.net, "reach", 32))

    @property
    def frame_shape(self) -> tuple[int | None, ...]:
        """Always (): a network in torch takes any size that its layers accept."""
        return ()

    def outputs(self, data: np.ndarray, rows: int) -> Arrays:
        """Return float32 outputs `[n, ...]` of samples `[n, V, ...]` as arrays, averaged over views."""
        outputs = predict_outputs(self.net, data, self.pixels, self.device, rows, self.precision)
        if isinstance(outputs, Mapping):
            return {name: value.cpu().numpy() for name, value in outputs.items()}
        return outputs.cpu().numpy()


def task_of(input_json: Mapping[str, Any]) -> str:
    """Return the name of the task of a run, from its `model/input.json`."""
    recipe = input_json["recipe"]
    return input_json.get("task") or task_before(recipe.get("kind", "clip"), bool(recipe.get("per_point")))


def load_network(run: runs.Run, device: torch.device | str = "cpu") -> Network:
    """Load the network that `run` wrote; UserError if it wrote none, or one whose weights are NaN."""
    if runs.exists(run, SLIM) and not runs.exists(run, "model/weights.safetensors"):
        return load_slim(runs.read_file(run, SLIM), f"{run.uri}/{SLIM}", device)
    weights, model, input_json = runs.read_model(run)
    read_recipe(input_json["recipe"])  # a recipe of another version fails here, not at the first file
    net = compress.build(**model)
    tensors = safetensors.torch.load(weights)
    published.require_finite(tensors, f"{run.uri}/model/weights.safetensors")
    net.load_state_dict(tensors)
    return _ready(net, model, input_json, device)


def load_slim(data: bytes, where: str, device: torch.device | str = "cpu") -> Network:
    """Load the network of a `model.slim`, which holds all of it; UserError, with `where`, for an invalid file.

    Its tensors are checked against the network that it names before any of them is allocated.
    """
    header = slim_file.read_header(data, where)
    if not header.model or not {"recipe", "pixels", "classes"} <= header.input.keys():
        raise UserError(f"{where}: holds tensors but no network, it was not written by a compress job")
    read_recipe(header.input["recipe"])
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in compress.build(**header.model).state_dict().items()}
    tensors = slim_file.decode(data, where, shapes)
    published.require_finite(tensors, where)
    net = compress.build(**header.model)
    net.load_state_dict(tensors)
    return _ready(net, header.model, header.input, device)


def _ready(net: nn.Module, model: dict[str, Any], input_json: Mapping[str, Any], device: torch.device | str) -> Network:
    classes, pixels = tuple(input_json["classes"]), Input.of(input_json["pixels"])
    precision = input_json.get("precision", "auto")  # what earlier versions did
    return Network(net.to(device).eval(), pixels, input_json["recipe"], classes, model, task_of(input_json), precision)


def to_input(data: np.ndarray | Tensor, pixels: Input, device: torch.device) -> Tensor:
    """Return samples `[n, V, ...]` as input of a network, `[n*V, ...]` on `device`, where a tensor may already be.

    The type of the array is that of its modality: uint8 frames `[n, V, T, H, W, 3]` become normalised
    `[n*V, T, 3, H, W]`, images `[n, V, H, W, 3]` `[n*V, 3, H, W]` (pixels are transferred as uint8); floats (points)
    become floats of torch's default type; other integers (tokens) are unchanged.
    """
    tensor = data.contiguous() if isinstance(data, Tensor) else torch.from_numpy(np.ascontiguousarray(data))
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    tensor = tensor.to(device, non_blocking=True).flatten(0, 1)
    if tensor.dtype != torch.uint8:
        return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor
    mean, std = _of_pixels(tuple(pixels.mean), tuple(pixels.std), torch.get_default_dtype(), device)
    return (tensor.movedim(-1, -3).to(torch.get_default_dtype()) - mean) / std


@functools.cache
def _of_pixels(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """Return mean and standard deviation of pixels 0-255, `[C, 1, 1]` each; copied once, as copies wait for the GPU."""
    return tuple(torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1) * 255 for values in (mean, std))


def merge_views(logits: Tensor, num_views: int, average: str) -> Tensor:
    """Return scores `[n, C, ...]` of logits `[n*V, C, ...]` of V views: the mean, or the log of mean probabilities."""
    views = logits.view(-1, num_views, *logits.shape[1:])
    if average == "prob":
        return torch.logsumexp(torch.log_softmax(views, 2), 1) - math.log(num_views)
    return views.mean(1)


@torch.no_grad()
def predict_outputs(
    net: Callable[[Tensor], Outputs],
    data: np.ndarray,
    pixels: Input,
    device: torch.device,
    rows: int,
    precision: str = "auto",
) -> Outputs:
    """Return float32 outputs, `[n, ...]` or several by name, of samples `[n, V, ...]`, averaged over views.

    The network sees at most `rows` samples at once and computes in `precision` (tasks/precision.py). Raises ValueError
    without samples.
    """
    parts: list[Outputs] = []
    for i in range(0, len(data), rows):
        with computing(device, precision):
            outputs = net(to_input(data[i : i + rows], pixels, device))
        if isinstance(outputs, Mapping):
            parts.append({k: merge_views(value.float(), data.shape[1], "logits") for k, value in outputs.items()})
        else:
            parts.append(merge_views(outputs.float(), data.shape[1], pixels.average))
    return joined(parts)


def joined(parts: Sequence[Outputs]) -> Outputs:
    """Return the concatenated outputs of several pieces; ValueError if there are none."""
    if not parts:
        raise ValueError("no samples, so there are no outputs")
    if isinstance(parts[0], Mapping):
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}  # type: ignore[call-overload]
    return torch.cat(parts)  # type: ignore[arg-type]


def chosen_rows(outputs: Outputs, which: Any) -> Outputs:
    """Return the outputs of the samples `which` (a slice, a mask, indices)."""
    if isinstance(outputs, Mapping):
        return {name: value[which] for name, value in outputs.items()}
    return outputs[which]


def top_classes(scores: Tensor, classes: Sequence[str], k: int) -> list[tuple[str, float]]:
    """Return the `k` best (class, probability) of a score vector `[C]`, best first."""
    return answers.top_classes(scores.float().cpu().numpy(), classes, k)
