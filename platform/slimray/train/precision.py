"""The arithmetic of a training: autocast, loss scaling for fp16, and how float32 products are computed."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
START_SCALE, GROWTH_STEPS = 2.0**16, 2000  # as torch.amp.GradScaler has them


def arithmetic_of(precision: str, device: torch.device) -> str:
    """Return what `precision` ("auto", ...) means on `device`: bf16, fp16, tf32 or fp32."""
    if precision != "auto":
        return precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def set_products(precision: str) -> None:
    """Set how this process multiplies float32 matrices on a GPU: "tf32" on tensor cores, "fp32" strictly; others leave
    torch's own settings."""
    if precision in ("tf32", "fp32"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


@contextlib.contextmanager
def autocast(device: torch.device, precision: str = "auto") -> Iterator[None]:
    """Compute in bf16 or fp16 inside the block where `precision` says so; elsewhere nothing changes."""
    half = HALF.get(arithmetic_of(precision, device))
    with contextlib.nullcontext() if half is None else torch.autocast(device.type, half):
        yield


class LossScale:
    """The factor of the loss that keeps gradients within the range of fp16; 1 in other arithmetic.

    As in torch.amp.GradScaler (arXiv 1710.03740): halved after a step that is not finite, doubled after GROWTH_STEPS
    finite ones. Unlike there, the gradients are judged after the all-reduce, so that all ranks keep the same scale.
    """

    def __init__(self, arithmetic: str, device: torch.device):
        start = START_SCALE if arithmetic == "fp16" else 1.0
        self.used = arithmetic == "fp16"
        self.state = torch.tensor([start, 0.0], dtype=torch.float64, device=device)  # scale, finite steps in a row

    @property
    def value(self) -> float:
        """The factor."""
        return float(self.state[0]) if self.used else 1.0

    def update(self, finite: bool) -> None:
        """Note whether a step was finite."""
        if not self.used:
            return
        scale, steps = self.state.tolist()
        if not finite:
            scale, steps = scale / 2, 0
        elif steps + 1 >= GROWTH_STEPS:
            scale, steps = scale * 2, 0
        else:
            steps += 1
        self.state.copy_(Tensor([scale, steps]))
