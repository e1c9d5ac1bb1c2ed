"""Runs that hold networks, without training: seeded weights, statistics as after training, a dataset made by code.

Also the allowed difference between an export and a network, see `bound`.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from slimray import models, runs
from slimray.data.modalities import input_shape
from slimray.data.spec import DataSpec
from slimray.export.formats import Format
from slimray.verbs import inputs

CLASSES = ("left", "right", "up")
RELATIVE = 1e-4  # of the L2 norm
ROUNDINGS = 3


def gap(found: Any, exact: torch.Tensor) -> float:
    """Return the distance of `found` from `exact`, relative to its L2 norm."""
    return float((torch.as_tensor(found).double() - exact).norm() / exact.norm())


def bound(rounded: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the allowed distance of a runtime's float32 results from `exact`, which is in float64.

    It is RELATIVE, or ROUNDINGS times the distance of torch's own float32 (`rounded`) if that is larger. Deep networks
    amplify rounding: torch on random weights is up to 1.5e-4 away, and a runtime that sums in another order may be
    nearer or further.
    """
    return max(RELATIVE, ROUNDINGS * gap(rounded, exact))


def pictures(root: Path, per_class: int = 6, size: int = 40) -> Path:
    """Write a folder of small pictures per split and class."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = generator.integers(0, 160, (size, size, 3)) + 40 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def clips(root: Path, files: list[Path]) -> Path:
    """Copy video files and write lists of them, each once in either split."""
    root.mkdir()
    for number, file in enumerate(files):
        shutil.copyfile(file, root / f"{number}.mp4")
    lines = "".join(f"{number}.mp4 {number % len(CLASSES)}\n" for number in range(len(files)))
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text(lines)
    return root


def require_converter(row: Format) -> None:
    """Skip a format whose converter needs an environment of its own if none is named."""
    if row.converter is not None and row.converter[1] not in os.environ:
        pytest.skip(f"{row.converter[1]} names no Python with {row.converter[0]}")


def ready(net: nn.Module, x: torch.Tensor) -> nn.Module:
    """Return `net` in eval mode with statistics of inputs `x`, so that these matter, and a head of varied outputs."""
    torch.manual_seed(0)
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            nn.init.normal_(module.weight, 1, 0.1)
            nn.init.normal_(module.bias, 0, 0.1)
        if name == net.head_name:
            nn.init.normal_(module.weight, 0, 0.2)
    with torch.no_grad():
        net.train()(x)
    return net.eval()


def hold(storage: str, name: str, card: str, root: Path, model: dict[str, Any], **data: Any) -> runs.Run:
    """Write the finished run `name` with a network over the dataset of a packaged card."""
    found = inputs.embed_card(card, str(root), name, [inputs.packaged("datasets")])
    section = {"card": found.model_dump(mode="json", exclude_defaults=True)}
    section |= {"root": str(root), "val": "val", **data}
    spec = DataSpec.model_validate(section)
    splits = inputs.open_splits(spec, name, storage, ["train", "val"])
    recipe = inputs.make_recipe(spec, splits.card, model.get("num_segments", 8), "val")
    classes = list(splits.card.class_names())
    model = {**model, "num_classes": len(classes)}
    net = ready(models.build(**model), torch.randn(8, *input_shape(recipe)))
    run = runs.open_run(storage, name)
    runs.begin(run, {"kind": "train", "name": name, "data": section}, 1)
    pixels = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "average": "logits"}
    weights = safetensors.torch.save({key: value.contiguous() for key, value in net.state_dict().items()})
    taken = {"recipe": recipe, "pixels": pixels, "classes": classes, "task": "classify"}
    runs.write_model(run, weights, model, taken)
    runs.end(run, "finished")
    return run
