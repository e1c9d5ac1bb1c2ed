"""Training and evaluation mode of networks."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(*nets: nn.Module) -> Iterator[None]:
    """Put `nets` into eval mode; afterwards every module has its own mode again, which need not be its parent's."""
    modes = [(module, module.training) for net in nets for module in net.modules()]
    try:
        for net in nets:
            net.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
