"""Roofline and energy models for devices you do not have, from a few numbers of a data sheet.

`HARDWARE` is the table; each row names the source of its numbers. The model is the roofline (Williams et al., CACM
52(4), 2009): the time of a layer is the longer of its multiply-accumulates at the peak rate and its bytes at the full
bandwidth; energy counts picojoules per MAC and per byte. Surprising: the result is a bound that no real device reaches,
good for comparing subnets and for detecting limits that cannot be met, and every figure is marked `how: model`. A table
that `slimray profile` measured can be used instead and is marked `how: table`; a YAML file with the fields of `Device`
describes a device of your own.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from slimray.edge import latency_table
from slimray.edge.arch_costs import Meter
from slimray.edge.cost import build_on_meta
from slimray.runtime import conditions
from slimray.spec import Spec, UserError, did_you_mean, located, parse, read_yaml


class Device(Spec):
    """A device as described by its data sheet."""

    description: str
    """The device, and the number format in which it computes."""
    source: str
    """Source of the numbers."""
    date: str
    """Publication date of the source."""
    gmacs_per_s: float = Field(gt=0)
    """Peak rate, 10^9 multiply-accumulates per second."""
    gb_per_s: float = Field(gt=0)
    """Bandwidth of the memory that holds weights and activations, 10^9 bytes per second."""
    bits: int = Field(ge=1, le=64)
    """Width of a weight and of an activation."""
    arithmetic: Literal["fixed", "bit_serial", "fused"] = "fixed"
    """Savings of fewer bits: none (fixed), by the product of both widths (bit_serial), in steps of 2, 4, 8 (fused)."""
    per_layer_us: float = Field(default=0.0, ge=0)
    """Microseconds for starting a layer; 0 if no source gives it."""
    pj_per_mac: float | None = Field(default=None, ge=0)
    """Picojoules per multiply-accumulate; without it there is no energy."""
    pj_per_byte: float | None = Field(default=None, ge=0)
    """Picojoules per byte read from or written to memory; without it there is no energy."""
    static_w: float = Field(default=0.0, ge=0)
    """Watts that are used even when nothing is computed."""


# Energy per operation: M. Horowitz, "Computing's energy problem", ISSCC 2014, 45 nm at 0.9 V: multiply and add of
# float16 1.1 + 0.4 pJ, float32 3.7 + 0.9 pJ, int8 0.2 and an int32 add 0.1 pJ; DRAM from 1.3 nJ for 64 bits. Newer
# processes need less energy, for arithmetic more so than for memory: use these figures to compare subnets.
_ENERGY = "; energy per operation from Horowitz, ISSCC 2014 (45 nm), not from the vendor"
_DRAM_PJ_PER_BYTE = 162.5
_PJ_PER_MAC = {8: 0.3, 32: 4.6}

HARDWARE: dict[str, Device] = {
    "edge_gpu": Device(
        description="NVIDIA Jetson Nano, 128 Maxwell cores at 921 MHz, float16",
        source="NVIDIA Jetson Nano module data sheet: 472 GFLOP/s in float16, 25.6 GB/s LPDDR4" + _ENERGY,
        date="2019",
        gmacs_per_s=236,
        gb_per_s=25.6,
        bits=16,
        pj_per_mac=1.5,
        pj_per_byte=_DRAM_PJ_PER_BYTE,
    ),
    "edge_gpu_int8": Device(
        description="NVIDIA Jetson Orin Nano 8GB, 1024 Ampere cores and 32 tensor cores, dense int8",
        source="NVIDIA Jetson Orin Nano data sheet: 40 TOPS with sparsity, half of it dense, 68 GB/s LPDDR5" + _ENERGY,
        date="2023",
        gmacs_per_s=10_000,
        gb_per_s=68,
        bits=8,
        pj_per_mac=0.3,
        pj_per_byte=_DRAM_PJ_PER_BYTE,
    ),
    "fpga": Device(
        description="AMD Zynq UltraScale+ ZU9EG on a ZCU102 board, every DSP slice two int8 MACs a cycle at 300 MHz",
        source="AMD DS891: 2,520 DSP slices; WP486: two int8 MACs a slice; 64 bits of DDR4-2400: 19.2 GB/s; "
        "300 MHz is assumed, a design of yours may differ" + _ENERGY,
        date="2017",
        gmacs_per_s=1512,
        gb_per_s=19.2,
        bits=8,
        pj_per_mac=0.3,
        pj_per_byte=_DRAM_PJ_PER_BYTE,
    ),
    "dsp": Device(
        description="Texas Instruments TMS320C6678, eight C66x cores at 1.25 GHz, float32",
        source="TI SPRS691: 20 GFLOP a core in float32, 64 bits of DDR3-1600: 12.8 GB/s" + _ENERGY,
        date="2014",
        gmacs_per_s=80,
        gb_per_s=12.8,
        bits=32,
        pj_per_mac=4.6,
        pj_per_byte=_DRAM_PJ_PER_BYTE,
    ),
    "bit_serial": Device(
        description="BISMO, a bit-serial overlay on the Zynq-7020 of a PYNQ-Z1 board, rated at 8 x 8 bits",
        source="BISMO (arXiv 1806.08862): 6.5 TOPS of single bits, 64 of which are a product of 8 x 8; "
        "Digilent PYNQ-Z1 manual: 16 bits of DDR3 at 1,050 Mb/s, 2.1 GB/s" + _ENERGY,
        date="2018",
        gmacs_per_s=50.8,
        gb_per_s=2.1,
        bits=8,
        arithmetic="bit_serial",
        pj_per_mac=0.3,
        pj_per_byte=_DRAM_PJ_PER_BYTE,
    ),
    "bit_fusion": Device(
        description="Bit Fusion, 512 units of one 8 x 8, four 4 x 4 or sixteen 2 x 2 products a cycle, at 500 MHz",
        source="Bit Fusion (arXiv 1712.01507); units, clock and 128 bits a cycle to memory are assumed" + _ENERGY,
        date="2018",
        gmacs_per_s=256,
        gb_per_s=8,
        bits=8,
        arithmetic="fused",
        pj_per_mac=0.3,
        pj_per_byte=_DRAM_PJ_PER_BYTE,
    ),
}


# ------------------------------------------------------------------------------------------------------- roofline


def layers_of(unit: Any) -> list[tuple[int, int]]:
    """Return (MACs, values moved) of every convolution and linear layer of a unit: input, weights and output, each
    once.

    BatchNorm, activations and additions count as part of the preceding layer; a unit without layers moves its input and
    its output. Gathers of point networks are not counted.
    """
    x = torch.zeros(1, *unit.input, device="meta")
    found, out = layers_in(build_on_meta(unit.make).eval(), x)
    return found or [(0, x.numel() + out.numel())]


def layers_in(module: nn.Module, *inputs: torch.Tensor) -> tuple[list[tuple[int, int]], Any]:
    """Return (MACs, values moved) of every convolution and linear layer of a module on `inputs`, and its output."""
    found: list[tuple[int, int]] = []

    def note(layer: Any, taken: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        weights = sum(parameter.numel() for parameter in layer.parameters())
        found.append((out.numel() * layer.weight[0].numel(), taken[0].numel() + weights + out.numel()))

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    hooks = [one.register_forward_hook(note) for one in module.modules() if isinstance(one, kinds)]
    try:
        with torch.no_grad():
            return found, module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()


def unit_costs(device: Device, unit: Any) -> dict[str, float]:
    """Return the costs of a unit on `device` by the roofline: `latency_ms`, and `energy_mj` if the device has figures.

    For one sample; see `layers_of` for what is counted.
    """
    seconds = joules = 0.0
    for macs, values in layers_of(unit):
        moved = values * device.bits / 8
        seconds += max(macs / (1e9 * device.gmacs_per_s), moved / (1e9 * device.gb_per_s)) + 1e-6 * device.per_layer_us
        joules += 1e-12 * (macs * (device.pj_per_mac or 0) + moved * (device.pj_per_byte or 0))
    out = {"latency_ms": 1e3 * seconds}
    if device.pj_per_mac is not None and device.pj_per_byte is not None:
        out["energy_mj"] = 1e3 * (joules + device.static_w * seconds)
    return out


def inference_energy(
    module: nn.Module, inputs: Sequence[torch.Tensor], bits: int, run: Callable[[], Any], root: Path = Path("/")
) -> dict[str, Any]:
    """Return the energy of one inference as plain values: `energy_mj`, `how` ("measured" or "model") and `source`.

    Measured if this device reports its power (of the whole device, including idle power) while `run` is called
    repeatedly on its processor. Otherwise modelled from the layers of `module` on `inputs`, for comparing networks.
    """
    told = conditions.watts_while(run, root)
    if told is not None:
        watts, source, seconds = told
        return {"energy_mj": 1e3 * watts * seconds, "how": "measured", "source": source}
    layers, _ = layers_in(module, *inputs)
    macs, values = (sum(column) for column in zip(*layers, strict=True)) if layers else (0, 0)
    joules = 1e-12 * (macs * _PJ_PER_MAC[bits] + values * bits / 8 * _DRAM_PJ_PER_BYTE)
    return {"energy_mj": 1e3 * joules, "how": "model", "source": f"MACs in {bits} bits and bytes of DRAM{_ENERGY}"}


# ------------------------------------------------------------------------------------------------ devices by name


def meter(name: str) -> Meter:
    """Return the meter of latency (and energy) on `name`: a row of HARDWARE, a described device, or a table.

    A row is given by its name, a device by a `.yaml` file with the fields of `Device`, a table by the `.json` file that
    `slimray profile` wrote. Raises UserError for anything else.
    """
    if Path(name).suffix.lower() == ".json":
        return latency_table.finished_meter(name)
    return model_meter(device(name), name)


def device(name: str) -> Device:
    """Return a row of HARDWARE by name, or the device that a `.yaml` file describes; UserError for anything else."""
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        documents = read_yaml(name)
        if len(documents) != 1:
            raise UserError(f"{name}: must hold one device (holds {len(documents)} documents)")
        return parse(Device, documents[0], name)
    if name not in HARDWARE:
        raise UserError(
            f"unknown device {name!r}{did_you_mean(name, HARDWARE)}; a measured table ends in .json, a described "
            "device in .yaml"
        )
    return HARDWARE[name]


def model_meter(device: Device, name: str) -> Meter:
    """Return the meter of `device` by its roofline."""
    known: dict[str, Mapping[str, float]] = {}

    def of(unit: Any) -> Mapping[str, float]:
        if unit.key not in known:
            known[unit.key] = unit_costs(device, unit)
        return known[unit.key]

    has_energy = device.pj_per_mac is not None and device.pj_per_byte is not None
    names = ("latency_ms", "energy_mj") if has_energy else ("latency_ms",)
    return Meter(name=name, how="model", source=device.source, names=names, of=of)


def named(name: str, where: str) -> Meter:
    """Return `meter(name)`; its errors start with `where` the name was written."""
    try:
        return meter(name)
    except UserError as error:
        raise UserError(located(str(error), where)) from None
