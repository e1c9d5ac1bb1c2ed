"""Check of the floating-point precision that compression needs."""

from collections.abc import Iterable

import torch
from torch import Tensor

from slimray.spec import UserError


def require(step: str, tensors: Iterable[tuple[str, Tensor]], *allowed: torch.dtype) -> None:
    """Raise UserError if one of `tensors` (name, tensor) has a dtype that is not in `allowed`."""
    for name, one in tensors:
        if one.dtype not in allowed:
            found, wanted = (str(dtype).removeprefix("torch.") for dtype in (one.dtype, allowed[0]))
            raise UserError(f"{step}: the layer {name} is {found}, not {wanted}, call .float() on the network first")
