"""Start of a rank: the network with its starting weights, wrapped by the training method."""

from typing import Any

import torch

from slimray import compress
from slimray.data.modalities import input_shape
from slimray.models import published
from slimray.spec import UserError
from slimray.tasks import TASKS
from slimray.train.config import FitConfig
from slimray.train.methods.method import Replica, Setup


def make_replica(config: FitConfig, device: torch.device, rank: int, world: int) -> Replica:
    """Return the replica of a rank at the start of training; the same weights on every rank, a function of the seed."""
    torch.manual_seed(config.seed)
    net = compress.build(**config.model)
    if config.init:
        report = load_start(net, config.init)
        if rank == 0:
            config.progress_actor.update.remote(note=f"starts from {config.init['from']}: {report}")
    setup = Setup(
        optim=config.optim,
        pixels=config.pixels,
        sample_shape=input_shape(config.recipes["train"]),
        device=device,
        rank=rank,
        world=world,
        bucket_mb=config.scale.bucket_mb,
        compress=config.scale.compress,
        batch_total=config.batch_total,
        task=TASKS[config.task],
    )
    return config.method.replica(net, lambda: compress.build(**config.model), setup)


def load_start(net: torch.nn.Module, init: dict[str, Any]) -> published.LoadReport:
    """Load starting weights as `init` says: {"from": path, "exclude": [...], "freeze": [prefixes]}."""
    report = published.load(net, init["from"], exclude=tuple(init.get("exclude", ())))
    for prefix in init.get("freeze", ()):
        frozen = [parameter for name, parameter in net.named_parameters() if name.startswith(prefix)]
        if not frozen:
            raise UserError(f"init.freeze: no weight of this network starts with {prefix!r}")
        for parameter in frozen:
            parameter.requires_grad_(False)
    return report
