"""Decides the arithmetic in which networks run, both in training and in every evaluation.

`precision` is the value of `optim.precision`: auto, bf16, fp16, tf32 or fp32. Needs only torch.
"""

import contextlib
from collections.abc import Iterator

import torch

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def arithmetic_of(precision: str, device: torch.device) -> str:
    """Return the meaning of `precision` on `device`: bf16, fp16, tf32 or fp32. "auto" is bf16 on GPUs that have it."""
    if precision != "auto":
        return precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def judged_in(precision: str) -> str:
    """Return the precision in which a network trained in `precision` is evaluated and used afterwards.

    float32 stays float32; half precision then depends on the device, which need not be the one of the training.
    """
    return precision if precision in ("tf32", "fp32") else "auto"


def set_products(precision: str) -> None:
    """Set how this process multiplies float32 matrices on a GPU: "tf32" uses tensor cores, "fp32" is exact; other
    values keep torch's settings."""
    if precision in ("tf32", "fp32"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


@contextlib.contextmanager
def computing(device: torch.device, precision: str = "auto") -> Iterator[None]:
    """Compute in the arithmetic of `precision` on `device` inside the block; settings are restored afterwards."""
    half = HALF.get(arithmetic_of(precision, device))
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_products(precision)
    try:
        with contextlib.nullcontext() if half is None else torch.autocast(device.type, half):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
