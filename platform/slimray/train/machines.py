"""Machines as a training sees them: the `machine:` section of a cluster file, prices, and `Cluster` for the planner.

Figures come from data sheets (gpus.py), or from the machine this runs on. Imports neither torch nor Ray.
"""

import datetime
import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from slimray.spec import Spec, UserError, did_you_mean
from slimray.train.gpus import GPUS, find_gpu

Range = tuple[float, float, float]  # low, likely, high
UTILISATION = {"fp32": (0.2, 0.35, 0.5), "bf16": (0.05, 0.12, 0.3), "fp16": (0.05, 0.12, 0.3)}  # convolutional nets
CORE_TMACS, CORE_UTILISATION = 0.08, (0.1, 0.3, 0.7)  # a core with wide vectors; a guess that --measure replaces


class MachineSpec(Spec):
    """Resources that a node gives a training; the section `machine:` of a cluster file. Everything is optional."""

    gpus_per_node: int = Field(0, ge=0)
    """GPUs of a node; 0 trains on its cores."""
    gpu: str | None = None
    """Name of the GPU: V100, T4, A10G, L4, L40S, A100, H100 or H200."""
    tmacs: float | None = Field(None, gt=0)
    """Peak of a GPU, or of a core, in 10^12 multiply-accumulates per second; replaces the figure of the data sheet."""
    utilisation: tuple[float, float, float] | None = None
    """Share of the peak that training reaches: low, likely, high."""
    link_gb_s: float = Field(50.0, gt=0)
    """Bandwidth between two workers of a node in one direction, GB/s."""
    link_latency_us: float = Field(5.0, ge=0)
    """Latency of a hop within a node, microseconds."""
    nic_gb_s: float = Field(1.25, gt=0)
    """Bandwidth of all network cards of a node together in one direction, GB/s (1.25 = 10 Gbit/s)."""
    nic_latency_us: float = Field(20.0, ge=0)
    """Latency of a hop between nodes, microseconds."""
    bandwidth_share: tuple[float, float, float] = (0.5, 0.8, 1.0)
    """Share of these bandwidths that an all-reduce reaches: low, likely, high."""
    cores: int | None = Field(None, ge=1)
    """Physical cores of a node for decoding (and training without GPUs); default: those of this machine."""
    disk_gb_s: float = Field(1.0, gt=0)
    """Rate at which a node reads from and writes to the storage of dataset and checkpoints, GB/s."""
    storage_gb_s: float | None = Field(None, gt=0)
    """Rate of the shared storage for all nodes together, GB/s; default: no limit."""
    storage_requests_s: float | None = Field(None, gt=0)
    """Requests per second that the storage answers for the dataset (a prefix of a bucket); default: no limit."""
    nodes: int | None = Field(None, ge=1)
    """Largest number of nodes."""
    mtbf_hours: float = Field(5000.0, gt=0)
    """Mean time between failures of a node, hours."""
    jitter: tuple[float, float, float] = (0.01, 0.02, 0.04)
    """Standard deviation of a rank's step time over its mean: low, likely, high."""
    price: str | float | None = None
    """Name of a row of prices.yaml, or US dollars per node and hour."""
    unverified: tuple[str, ...] = ()
    """Fields whose figures are recalled, not looked up."""
    source: str = ""
    """Source and date of the figures."""


class PriceSpec(Spec):
    """Price of a node."""

    usd_per_hour: float = Field(ge=0)
    """US dollars per node and hour."""
    source: str
    """Source of the price."""
    date: datetime.date
    """Date of the price, year-month-day."""
    unverified: bool = False
    """The price is recalled, not looked up, and is shown as such."""


class PriceTable(Spec):
    """`prices.yaml`: dated prices by name."""

    prices: dict[str, PriceSpec]


@dataclass(frozen=True)
class Link:
    """Connection between two ranks: `gb_s` in one direction, `latency_us` per hop."""

    gb_s: float
    latency_us: float = 0.0

    def seconds(self, num_bytes: float) -> float:
        return num_bytes / (self.gb_s * 1e9)

    @property
    def latency_s(self) -> float:
        return self.latency_us * 1e-6


@dataclass(frozen=True)
class Cluster:
    """Machines as the planner sees them. `ranks_per_node` 0 puts all ranks on one node (a laptop).

    `inner` connects the ranks of a node, `outer` is a node's network, shared by its ranks. `shares_cores` is True where
    ranks compute on the node's `cores`; `gpu` is then "". `tmacs` is the peak of a rank in 10^12 MACs per second,
    `utilisation` the share of it that training reaches.
    """

    name: str
    ranks_per_node: int
    inner: Link
    outer: Link
    cores: int
    shares_cores: bool
    tmacs: float
    utilisation: Range
    gpu: str = ""
    disk_gb_s: float = 1.0
    storage_gb_s: float | None = None
    storage_requests_s: float | None = None
    nodes: int | None = None
    bandwidth_share: Range = (0.5, 0.8, 1.0)
    jitter: Range = (0.01, 0.02, 0.04)
    mtbf_hours: float = 5000.0
    usd_per_node_hour: float | None = None
    notes: tuple[str, ...] = ()

    def place(self, workers: int) -> tuple[int, int]:
        """Return the number of nodes for `workers`, and the largest number of ranks on one of them."""
        per_node = self.ranks_per_node or workers
        return -(-workers // per_node), min(workers, per_node)


def make_cluster(name: str, machine: MachineSpec, prices: Mapping[str, PriceSpec], single: bool = False) -> Cluster:
    """Return the planner's view of a machine; `single`: all workers on one node (a laptop). UserError for a field."""
    notes = [f"recalled, not looked up: {', '.join(machine.unverified)}"] if machine.unverified else []
    notes += [machine.source] if machine.source else []
    usd, cores = None, machine.cores or physical_cores()
    if isinstance(machine.price, str):
        if machine.price not in prices:
            raise UserError(f"{name}: machine.price: no such row in prices.yaml{did_you_mean(machine.price, prices)}")
        row = prices[machine.price]
        usd = row.usd_per_hour
        recalled = " (recalled, unverified)" if row.unverified else ""
        notes.append(f"price of {machine.price}: {row.usd_per_hour:g} USD/h, {row.source}, {row.date}{recalled}")
    elif machine.price is not None:
        usd = machine.price
    tmacs, utilisation = machine.tmacs or CORE_TMACS, machine.utilisation or CORE_UTILISATION
    if machine.gpus_per_node:
        if machine.gpu is None and machine.tmacs is None:
            raise UserError(f"{name}: machine.gpu: is required where there are GPUs{did_you_mean('', GPUS)}")
        if machine.tmacs is None and machine.gpu not in GPUS:
            raise UserError(f"{name}: machine.gpu: unknown {machine.gpu!r}{did_you_mean(str(machine.gpu), GPUS)}")
        known = GPUS.get(str(machine.gpu))
        arithmetic = "bf16" if known is None else known.arithmetic
        tmacs = machine.tmacs or (0.0 if known is None else known.peak(arithmetic) / 2e12)
        utilisation = machine.utilisation or UTILISATION[arithmetic]
    return Cluster(
        name=name,
        ranks_per_node=machine.gpus_per_node or (0 if single else cores),
        inner=Link(machine.link_gb_s, machine.link_latency_us),
        outer=Link(machine.nic_gb_s, machine.nic_latency_us),
        cores=cores,
        shares_cores=machine.gpus_per_node == 0,
        tmacs=tmacs,
        utilisation=utilisation,
        gpu=machine.gpu or "" if machine.gpus_per_node else "",
        disk_gb_s=machine.disk_gb_s,
        storage_gb_s=machine.storage_gb_s,
        storage_requests_s=machine.storage_requests_s,
        nodes=1 if single else machine.nodes,
        bandwidth_share=machine.bandwidth_share,
        jitter=machine.jitter,
        mtbf_hours=machine.mtbf_hours,
        usd_per_node_hour=usd,
        notes=tuple(notes),
    )


def this_machine(gpu: str = "", gpus: int = 0) -> Cluster:
    """Return the machine this runs on, with workers on its `gpus` GPUs named `gpu`, or as processes on its cores.

    Without GPUs, gloo moves the gradients, at about 1 GB/s (an assumption).
    """
    if not gpus:
        fields: dict[str, Any] = {"link_gb_s": 1.0, "link_latency_us": 50.0, "source": "gradients at 1 GB/s assumed"}
        return make_cluster("this machine", MachineSpec.model_validate(fields), {}, single=True)
    known = find_gpu(gpu)
    fields = {"gpus_per_node": gpus, "gpu": known, "nodes": 1, "source": f"{gpus} x {gpu}"}
    if known is None:
        fields |= {"tmacs": 50.0, "source": f"{gpus} x {gpu}, its peak assumed: plan --measure measures it"}
    return make_cluster("this machine", MachineSpec.model_validate(fields), {})


@functools.cache
def physical_cores(cpuinfo: str = "/proc/cpuinfo", quota: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Return the number of physical cores this process may use, at least 1: hyper-threads count once, and a container's
    quota limits them."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = set()
    try:
        for block in Path(cpuinfo).read_text().split("\n\n"):
            fields = dict(line.split(":", 1) for line in block.replace("\t", "").splitlines() if ":" in line)
            if int(fields.get("processor", -1)) in allowed and "core id" in fields:
                cores.add((fields.get("physical id"), fields["core id"]))
    except (OSError, ValueError):
        cores = set()
    count = len(cores) or len(allowed)
    try:
        most, period = Path(quota).read_text().split()
        count = min(count, math.ceil(int(most) / int(period)))
    except (OSError, ValueError):
        pass
    return max(1, count)
