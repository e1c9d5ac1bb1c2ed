"""Training and evaluation mode of networks, and calling them on an example."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@contextlib.contextmanager
def evaluating(*nets: nn.Module) -> Iterator[None]:
    """Put `nets` into eval mode; afterwards restore the mode of every module, which may differ from its parent's."""
    modes = [(module, module.training) for net in nets for module in net.modules()]
    try:
        for net in nets:
            net.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def called(net: nn.Module, example: Any) -> Any:
    """Return the output of `net` for an input, or for a tuple of arguments."""
    return net(*example) if isinstance(example, tuple) else net(example)


def samples_in(example: Any) -> int:
    """Return the batch size of an input or a tuple of arguments: the first dimension of the first tensor."""
    return len(next(leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)))
