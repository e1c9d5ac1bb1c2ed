"""The precision that a network must have to be compressed."""

from collections.abc import Iterable

import torch
from torch import Tensor

from slimray.spec import UserError


def require(step: str, tensors: Iterable[tuple[str, Tensor]], *allowed: torch.dtype) -> None:
    """Raise UserError where one of the `tensors`, by name, is of floats that are not `allowed` (or of no floats)."""
    for name, one in tensors:
        if one.dtype not in allowed:
            found, wanted = (str(dtype).removeprefix("torch.") for dtype in (one.dtype, allowed[0]))
            raise UserError(f"{step}: the layer {name} is {found}, not {wanted}: call .float() on the network first")
