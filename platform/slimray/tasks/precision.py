"""The arithmetic in which networks run, in training and in every judgement of them: the one place that decides it.

`precision` is what a training may write (`optim.precision`): auto, bf16, fp16, tf32 or fp32. torch only.
"""

import contextlib
from collections.abc import Iterator

import torch

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def arithmetic_of(precision: str, device: torch.device) -> str:
    """Return what `precision` means on `device`: bf16, fp16, tf32 or fp32. "auto" is bf16 on a GPU that has it."""
    if precision != "auto":
        return precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def judged_in(precision: str) -> str:
    """Return the precision in which a network that was trained in `precision` is judged and used afterwards.

    float32 stays float32; half precision is a matter of the device then, on which it need not have been trained.
    """
    return precision if precision in ("tf32", "fp32") else "auto"


def set_products(precision: str) -> None:
    """Set how this process multiplies float32 matrices on a GPU: "tf32" on tensor cores, "fp32" strictly; others leave
    torch's own settings."""
    if precision in ("tf32", "fp32"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


@contextlib.contextmanager
def computing(device: torch.device, precision: str = "auto") -> Iterator[None]:
    """Compute in the arithmetic that `precision` means on `device` inside the block, which leaves no setting behind."""
    half = HALF.get(arithmetic_of(precision, device))
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_products(precision)
    try:
        with contextlib.nullcontext() if half is None else torch.autocast(device.type, half):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
