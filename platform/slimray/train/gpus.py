"""Peaks of GPUs from their data sheets: the one table for utilisation (speed.py) and plans (planner.py)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Dense peaks in FLOP/s (a multiply-accumulate is two) by arithmetic; 0 where the GPU does not support it.

    fp16 and bf16 accumulate in fp32; tf32 is float32 as the tensor cores round it.
    """

    fp32: float
    fp16: float
    bf16: float = 0.0
    tf32: float = 0.0

    @property
    def arithmetic(self) -> str:
        """The default arithmetic of a training on this GPU: bf16 if the GPU supports it, else fp32."""
        return "bf16" if self.bf16 else "fp32"

    def peak(self, arithmetic: str) -> float:
        """Return the peak in `arithmetic` ("fp32", "tf32", "fp16", "bf16"), FLOP/s; that of fp32 if unsupported."""
        return getattr(self, arithmetic) or self.fp32


GPUS: dict[str, Gpu] = {  # `find_gpu` takes the longest name that a device's name contains
    "H200": Gpu(67e12, 989e12, 989e12, 494.5e12),
    "H100": Gpu(67e12, 989e12, 989e12, 494.5e12),
    "A100": Gpu(19.5e12, 312e12, 312e12, 156e12),
    "L40S": Gpu(91.6e12, 362e12, 362e12, 183e12),
    "A10G": Gpu(31.5e12, 70e12, 70e12, 35e12),
    "L4": Gpu(30.3e12, 121e12, 121e12, 60e12),
    "V100": Gpu(15.7e12, 125e12),
    "T4": Gpu(8.1e12, 65e12),
}


def find_gpu(device_name: str) -> str | None:
    """Return the longest name in GPUS that a device's name contains (an L40S is not an L4), or None."""
    return max((name for name in GPUS if name in device_name), key=len, default=None)
