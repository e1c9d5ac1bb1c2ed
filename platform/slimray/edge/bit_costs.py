"""Costs of layers with few bits on modelled hardware: tables `[layers, 8, 8]` of latency, energy or size for HAQ.

In: layers from `compress.quantization.layers_of`, a row of HARDWARE. The time of a layer is the longer of its products
at the device's rate and its bits at the bandwidth, as in hardware.py. The device's `arithmetic` determines how the rate
depends on the bits: fixed (narrow numbers only save traffic), bit-serial (work is bits of weights x bits of inputs:
BISMO, arXiv 1806.08862) or fused from 2-bit units (widths of 2, 4 and 8: Bit Fusion, 1712.01507). Outputs are counted
with the bits of the layer's inputs. These are bounds of a model, good for comparing policies; no device was measured.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slimray.compress.quantization import LayerInfo
from slimray.edge.hardware import Device
from slimray.spec import UserError

HIGHEST = 8
COSTS = ("size_mb", "latency_ms", "energy_mj")


def relative_work(device: Device, weights: int, inputs: int) -> float:
    """Return the time or energy of a product of `weights` x `inputs` bits relative to the device's own width."""
    if device.arithmetic == "fixed":
        return 1.0
    if device.arithmetic == "fused":
        weights, inputs = (max(2, 1 << (bits - 1).bit_length()) for bits in (weights, inputs))
    return weights * inputs / device.bits**2


def bit_table(
    device: Device | None, layers: Sequence[LayerInfo], cost: str, books: bool = False
) -> NDArray[np.float64]:
    """Return the cost of each layer for one sample at every pair of bits: `[layers, weight bits - 1, input bits - 1]`.

    `size_mb` needs no device: megabytes of weights, with `books` also of a codebook of 2^bits values per layer, which
    dominates small layers of 8 bits. Raises UserError for an unknown cost, or for energy if the device has no figures.
    """
    if cost not in COSTS or (device is None and cost != "size_mb"):
        raise UserError(
            f"haq: {cost} cannot be computed from bits: must be one of {', '.join(COSTS)}, the last two need a device"
        )
    if device is not None and cost == "energy_mj" and (device.pj_per_mac is None or device.pj_per_byte is None):
        raise UserError(f"haq: energy_mj: {device.description} has no energies per operation")
    table = np.zeros((len(layers), HIGHEST, HIGHEST))
    for row, layer in zip(table, layers, strict=True):
        for w in range(1, HIGHEST + 1):
            for a in range(1, HIGHEST + 1):
                row[w - 1, a - 1] = _cost(device, layer, w, a, cost)
    if books and cost == "size_mb":
        table += 4e-6 * 2.0 ** np.arange(1, HIGHEST + 1)[None, :, None]
    return table


def _cost(device: Device | None, layer: LayerInfo, weights: int, inputs: int, cost: str) -> float:
    if device is None or cost == "size_mb":
        return layer.weights * weights / 8e6
    work = layer.macs * relative_work(device, weights, inputs)
    moved = (layer.weights * weights + (layer.inputs + layer.outputs) * inputs) / 8
    seconds = max(work / (1e9 * device.gmacs_per_s), moved / (1e9 * device.gb_per_s)) + 1e-6 * device.per_layer_us
    if cost == "latency_ms":
        return 1e3 * seconds
    joules = 1e-12 * (work * (device.pj_per_mac or 0) + moved * (device.pj_per_byte or 0))
    return 1e3 * (joules + device.static_w * seconds)
