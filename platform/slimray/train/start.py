"""Start of a rank: the network with its starting weights, wrapped by the training method."""

import json
from collections.abc import Sequence
from functools import partial

import torch

from slimray import compress, runs
from slimray.data.modalities import input_shape
from slimray.models import published
from slimray.spec import UserError
from slimray.tasks import TASKS
from slimray.tasks.network import load_network
from slimray.train.config import FitConfig
from slimray.train.methods.method import Replica, Setup
from slimray.train.ranks import Ranks


def make_replica(config: FitConfig, ranks: Ranks) -> Replica:
    """Return the replica of a rank at the start of training, with the same weights on every rank for a given seed.

    Rank 0 reads the starting weights, if there are any. A collective.
    """
    torch.manual_seed(config.seed)
    net = compress.build(**config.model)
    if config.init:
        if ranks.rank == 0:
            report = published.load(net, config.init["from"], exclude=tuple(config.init.get("exclude", ())))
            config.progress_actor.update.remote(note=f"starts from {config.init['from']}: {report}")
        ranks.give(net.state_dict().values())
        freeze(net, config.init.get("freeze", ()))
    setup = Setup(
        optim=config.optim,
        pixels=config.pixels,
        sample_shape=input_shape(config.recipes["train"]),
        device=ranks.device,
        rank=ranks.rank,
        world=ranks.world,
        bucket_mb=config.scale.bucket_mb,
        compress=config.scale.compress,
        batch_total=config.batch_total,
        task=TASKS[config.task],
        compile=config.compile,
        load=partial(network_of, ranks),
    )
    return config.method.replica(net, lambda: compress.build(**config.model), setup)


def network_of(ranks: Ranks, uri: str) -> torch.nn.Module:
    """Return the network of the run at `uri` in eval mode; rank 0 reads it for all. A collective."""
    found = load_network(runs.run_at(uri)) if ranks.rank == 0 else None
    told = ranks.share(None if found is None else json.dumps(found.model).encode())
    net = compress.build(**json.loads(told)).eval() if found is None else found.net
    ranks.give(net.state_dict().values())
    return net


def freeze(net: torch.nn.Module, prefixes: Sequence[str]) -> None:
    """Freeze the weights whose names start with one of `prefixes`; UserError for a prefix that matches no weight."""
    for prefix in prefixes:
        frozen = [parameter for name, parameter in net.named_parameters() if name.startswith(prefix)]
        if not frozen:
            raise UserError(f"init.freeze: no weight of this network starts with {prefix!r}")
        for parameter in frozen:
            parameter.requires_grad_(False)
