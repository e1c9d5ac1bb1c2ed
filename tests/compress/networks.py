"""Every network of MODELS at a small width, with nontrivial statistics, and an input for it."""

from typing import Any

import torch
from torch import Tensor, nn

from slimray import models

SUPERNETS = [name for name, row in models.MODELS.items() if row.supernet]
REFUSED = [*SUPERNETS, "proxyless_supernet"]  # only their subnets are pruned
TEXT = [name for name, row in models.MODELS.items() if row.input == "text"]  # in test_text_networks.py
PRUNABLE = [name for name in models.MODELS if name not in REFUSED + TEXT]


def options(name: str) -> dict[str, Any]:
    known = models.options_of(name)
    small = {"num_classes": 5, "scale": 2, "num_segments": 4, "width": 0.25, "voxel": 0.25, "num_points": 32}
    if name.startswith("carn"):
        small |= {"width": 16, "blocks": 2, "units": 2}
    if name.startswith("frustum"):
        small |= {"num_classes": 3}
    if name.startswith("unet3d"):
        small |= {"voxel": 0.5, "width": 0.125}
    if name.startswith("i3d"):
        small |= {"num_segments": 8}
    if name.startswith(("resnet", "mobilenet", "proxyless", "ts")) and "101" in name:
        small |= {"width": 0.125}
    return {option: small[option] for option in small if option in known}


def network(name: str, **more: Any) -> nn.Module:
    """Return a network in eval mode, in float64 if possible, with BatchNorms and heads far from initial values."""
    torch.manual_seed(0)
    net = models.build(name, **options(name) | more).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
    return net if name.startswith("frustum") else net.double()  # which draws points in float32


def example(name: str) -> Tensor:
    generator, takes, known = torch.Generator().manual_seed(1), models.MODELS[name].input, models.options_of(name)
    side = known.get("side", 32)
    if takes == "clip":
        x = torch.randn(2, options(name)["num_segments"], 3, side, side, generator=generator)
    elif takes in ("image", "image_pair"):
        x = torch.randn(2, known.get("in_channels", 3), side, side, generator=generator)
    elif takes == "frustum":
        x = torch.rand(2, 7, 64, generator=generator)
        x[:, -3:] = torch.eye(3)[:2, :, None]
        return x
    else:
        x = torch.rand(2, known.get("in_channels", 22), 64, generator=generator)
        if x.shape[1] == 22:
            x[:, 6:] = torch.eye(16)[:2, :, None]
    return x.double()


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    """Return all outputs as one row, with the same points drawn every time."""
    torch.manual_seed(3)
    with torch.no_grad():
        out = net(x)
    return torch.cat([v.flatten() for v in out.values()]) if isinstance(out, dict) else out.flatten()
