"""The peaks of GPUs as their data sheets have them: the one table for utilisation (speed.py) and plans (planner.py)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Dense peaks in FLOP/s (a multiply-accumulate is two) by arithmetic; 0 for one that the GPU has not.

    fp16 and bf16 accumulate in fp32; tf32 is the tensor cores' reading of float32.
    """

    fp32: float
    fp16: float
    bf16: float = 0.0
    tf32: float = 0.0

    @property
    def arithmetic(self) -> str:
        """The arithmetic in which a training runs there by default: bf16 where the GPU has it, else fp32."""
        return "bf16" if self.bf16 else "fp32"

    def peak(self, arithmetic: str) -> float:
        """Return the peak in `arithmetic` ("fp32", "tf32", "fp16", "bf16"), FLOP/s; where it is 0 that of fp32."""
        return getattr(self, arithmetic) or self.fp32


GPUS: dict[str, Gpu] = {  # the longest name that a device's name contains counts
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
    """Return the row of GPUS that a device's name contains, the longest one (an L40S is not an L4); None if none."""
    return max((name for name in GPUS if name in device_name), key=len, default=None)
