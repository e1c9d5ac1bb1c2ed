"""Share of a device's peak that a training reaches (model FLOPs utilisation)."""

import functools
import time

import torch

from slimray.train.gpus import GPUS, find_gpu


def mfu(macs: int, samples_per_s: float, device: torch.device, arithmetic: str = "bf16") -> float:
    """Return the model FLOPs utilisation of a worker, 0-1: 6 x MACs x samples/s (forward, backward) over the peak."""
    return 6 * macs * samples_per_s / peak_flops(device, arithmetic)


def peak_flops(device: torch.device, arithmetic: str = "bf16") -> float:
    """Return the peak FLOP/s of `device` in `arithmetic` (bf16, fp16, tf32, fp32): from the GPU's data sheet, or else
    the best rate of a few float32 matrix products measured on the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x{torch.get_num_threads()}"
    row = find_gpu(name)
    return _measured_flops(device, name) if row is None else GPUS[row].peak(arithmetic)


@functools.cache
def _measured_flops(device: torch.device, name: str, size: int = 768, rounds: int = 20) -> float:
    """Measure the rate of float32 matrix products, FLOP/s; cached per process, device and `name`."""
    a = torch.ones(size, size, device=device)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
