"""Training and evaluation mode of networks, and how one is called on an example."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


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


def called(net: nn.Module, example: Any) -> Any:
    """Return what `net` gives for an input, or for a tuple of arguments."""
    return net(*example) if isinstance(example, tuple) else net(example)


def samples_in(example: Any) -> int:
    """The batch of an input or a tuple of arguments: the first size of the first tensor."""
    return len(next(leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)))
