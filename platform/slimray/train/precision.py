"""Loss scale for training in fp16; tasks/precision.py defines the precisions."""

import torch
from torch import Tensor

START_SCALE, GROWTH_STEPS = 2.0**16, 2000  # as torch.amp.GradScaler has them


class LossScale:
    """Factor of the loss that keeps gradients within the range of fp16; 1 in other arithmetic.

    As in torch.amp.GradScaler (arXiv 1710.03740): halved after a step that is not finite, doubled after GROWTH_STEPS
    finite ones. Unlike there, the gradients are judged after the all-reduce, so that all ranks keep the same scale.
    """

    def __init__(self, arithmetic: str, device: torch.device):
        start = START_SCALE if arithmetic == "fp16" else 1.0
        self.used = arithmetic == "fp16"
        self.state = torch.tensor([start, 0.0], dtype=torch.float64, device=device)  # scale, finite steps in a row

    @property
    def factor(self) -> Tensor | float:
        """The factor: a tensor on the device for fp16, else 1."""
        return self.state[0].float() if self.used else 1.0

    @property
    def value(self) -> float:
        """The factor as a number; waits for the device."""
        return float(self.factor)

    def update(self, finite: Tensor | bool) -> None:
        """Adapt the factor to `finite`, the flag of a step, which stays on the device."""
        if not self.used:
            return
        finite = torch.as_tensor(finite, device=self.state.device)
        scale, steps = self.state
        grows = steps + 1 >= GROWTH_STEPS
        scale = torch.where(finite, torch.where(grows, scale * 2, scale), scale / 2)
        self.state.copy_(torch.stack([scale, torch.where(finite & ~grows, steps + 1, 0.0)]))
