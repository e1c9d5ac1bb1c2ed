"""A finished network as a function: samples in, class scores out; for validation, `evaluate` and `predict`.

`Input` is how pixels become numbers and views become one score; it is stored in the run's `model/input.json`, so that
a prediction prepares its input as training did. Torch only: a machine without Ray predicts too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from slimray import learn, models, runs
from slimray.data.decoder import BadSample, Decoder
from slimray.data.video import ClipRecipe


@dataclass(frozen=True)
class Input:
    """What a network takes: normalisation of uint8 pixels, and how the views of a sample are averaged."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    average: Literal["logits", "prob"] = "logits"


@dataclass(frozen=True)
class Network:
    """A run's network ready to use: the module in eval mode, its input, the recipe of its samples, its classes."""

    net: nn.Module
    pixels: Input
    recipe: dict[str, Any]
    classes: tuple[str, ...]
    model: dict[str, Any]


def load_network(run: runs.Run, device: torch.device | str = "cpu") -> Network:
    """Load the network that `run` wrote; UserError if it wrote none."""
    weights, model, taken = runs.read_model(run)
    net = models.build(**model)
    net.load_state_dict(safetensors.torch.load(weights))
    pixels: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in taken["pixels"].items()}
    return Network(net.to(device).eval(), Input(**pixels), taken["recipe"], tuple(taken["classes"]), model)


def to_input(data: np.ndarray, pixels: Input, device: torch.device) -> Tensor:
    """Samples `[n, V, ...]` as a network takes them, `[n*V, ...]` on `device`.

    uint8 frames `[n, V, T, H, W, 3]` become normalised `[n*V, T, 3, H, W]` (pixels travel as uint8); points go as they
    are.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(data))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    tensor = tensor.to(device, non_blocking=True).flatten(0, 1)
    if data.dtype != np.uint8:
        return tensor.to(torch.get_default_dtype())
    mean = torch.tensor(pixels.mean, device=device).view(1, 1, -1, 1, 1) * 255
    std = torch.tensor(pixels.std, device=device).view(1, 1, -1, 1, 1) * 255
    return (tensor.movedim(-1, 2).to(torch.get_default_dtype()) - mean) / std


@torch.no_grad()
def predict_scores(net: nn.Module, data: np.ndarray, pixels: Input, device: torch.device, rows: int) -> Tensor:
    """Scores `[n, C]`, or `[n, C, N]` per point, of samples `[n, V, ...]`, views averaged, at most `rows` at once."""
    parts = []
    for i in range(0, len(data), rows):
        with learn.autocast(device):
            logits = net(to_input(data[i : i + rows], pixels, device))
        parts.append(learn.merge_views(logits.float(), data.shape[1], pixels.average))
    return torch.cat(parts)


def top_classes(scores: Tensor, classes: Sequence[str], k: int) -> list[tuple[str, float]]:
    """The `k` best (class, probability) of a score vector `[C]`, best first."""
    probabilities = torch.softmax(scores.float(), 0)
    values, indices = probabilities.topk(min(k, len(classes)))
    return [(classes[int(i)], float(v)) for i, v in zip(indices, values, strict=True)]


def predict_files(
    network: Network, paths: Sequence[Path], k: int, timeout_s: float = 30
) -> Iterator[tuple[Path, list[tuple[str, float]], str]]:
    """For each file (path, top-`k` classes, ""), or (path, [], reason) when it does not decode."""
    recipe = ClipRecipe.from_dict(network.recipe)
    with Decoder(timeout_s=timeout_s) as decoder:
        for path in paths:
            try:
                clip, _ = decoder.clip(str(path), path.read_bytes(), recipe, (0, 0, 0))
            except (BadSample, OSError) as error:
                yield path, [], str(error)
                continue
            device = next(network.net.parameters()).device
            scores = predict_scores(network.net, clip[None], network.pixels, device, 1)
            yield path, top_classes(scores[0], network.classes, k), ""
