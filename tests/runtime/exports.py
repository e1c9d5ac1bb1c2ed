"""Makes export folders of small networks for tests, with torch.onnx.export, in the layout of `slimray export`."""

import hashlib
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimray.models.tsm import OnlineTSM


class Step(nn.Module):
    """An online network with its buffers as inputs and outputs of their own."""

    def __init__(self, net: OnlineTSM):
        super().__init__()
        self.net = net

    def forward(self, frame: Tensor, *buffers: Tensor) -> tuple[Tensor, ...]:
        logits, after = self.net(frame, buffers)
        return logits, *(one.clone() for one in after)


def seeded(net: nn.Module) -> nn.Module:
    """Return `net` in eval mode with weights that make its classes differ."""
    torch.manual_seed(0)
    for name, value in net.state_dict().items():
        if value.is_floating_point() and value.ndim > 1:
            value.normal_(0, (1 / value[0].numel()) ** 0.5)
        elif name.endswith("running_var"):
            value.fill_(0.5)
    return net.eval()


def place(name: str, value: Tensor, dynamic: tuple[int, ...]) -> dict[str, Any]:
    shape = [None if axis in dynamic else side for axis, side in enumerate(value.shape)]
    return {"name": name, "shape": shape, "dtype": "float32"}


def export(
    folder: Path, net: nn.Module, example: Tensor, taken: dict[str, Any], *, dynamic: tuple[int, ...] = (0,),
    states: tuple[Tensor, ...] = (),
) -> Path:  # fmt: skip
    """Write `folder` with model.onnx and export.json of `net`; `taken` is the content of model/input.json."""
    names = ["input", *(f"state_{i}" for i in range(len(states)))]
    after = ["logits", *(f"new_state_{i}" for i in range(len(states)))]
    free = (dict.fromkeys(dynamic, torch.export.Dim.AUTO),) if dynamic else None
    log, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            net, (example, *states), dynamo=True, verbose=False, input_names=names, output_names=after,
            dynamic_shapes=free,
        )  # fmt: skip
    log.setLevel(level)
    assert made is not None
    folder.mkdir(parents=True, exist_ok=True)
    made.save(folder / "model.onnx", external_data=False)
    with torch.no_grad():
        found = net(example, *states)
    outputs = found if isinstance(found, tuple) else (found,)
    write(folder, {
        "inputs": [place(n, v, dynamic) for n, v in zip(names, (example, *states), strict=True)],
        "outputs": [place(n, v, dynamic) for n, v in zip(after, outputs, strict=True)],
        "states": [
            {"input": a, "output": b, "shape": list(v.shape), "dtype": "float32"}
            for a, b, v in zip(names[1:], after[1:], states, strict=True)
        ],
        "input": taken,
    })  # fmt: skip
    return folder


def write(folder: Path, facts: dict[str, Any]) -> None:
    """Write export.json for the model.onnx in `folder`."""
    data = (folder / "model.onnx").read_bytes()
    plain = {
        "version": 1, "format": "onnx", "file": "model.onnx", "bytes": len(data), "model": {}, "precision": "fp32",
        "sha256": hashlib.sha256(data).hexdigest(), "verification": {}, "timing": {}, "versions": {}, "cpu": "",
    }  # fmt: skip
    (folder / "export.json").write_text(json.dumps(plain | facts))


def read(folder: Path) -> dict[str, Any]:
    """Return export.json."""
    return json.loads((folder / "export.json").read_text())
