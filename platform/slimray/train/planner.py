"""Duration and cost of a training on a cluster, split into compute, data, exposed all-reduce and stragglers.

The input is a `Work` (the demands of a job) and a `Cluster` (the capacity of machines, from data sheets or
`plan --measure`), the output a `Row` per number of workers. Every uncertain figure is a range (low, likely, high), and
so is every answer: the high one combines the slow ends of all figures. Formulas: ring, double binary tree and two-level
all-reduce; linear scaling with accumulation as in arXiv 1706.02677; checkpoint intervals by Young and Daly; E[max of n]
~ sigma sqrt(2 ln n) for stragglers. The control path is the sum of a few numbers over all ranks with which each step
begins; a feeder's time for the blocks of a step is hidden behind computing, as decoding is. Surprising: a step is as
slow as its slowest rank, so jitter is charged per rank, not per node; and workers that share cores (a laptop) are
charged for each other's work and for decoding. numpy only: no torch, no Ray.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from slimray.data.plan import block_size, num_feeders
from slimray.spec import UserError
from slimray.train.machines import Cluster, Link, Range

LOW, LIKELY, HIGH = 0, 1, 2
BACKWARD = 2 / 3  # the backward pass's share of forward + backward: it costs twice the forward pass
LAST_BUCKET_MB = 25.0  # DDP's default bucket: no computing is left to hide the all-reduce of the last one
CONTROL_BYTES = 64  # size of the sum with which a step begins
BLOCK_S = 0.0045  # seconds that a feeder's process spends per block (tests/benchmarks/feeder.py)
RESTART_S = 60.0  # cost of a lost node besides the work since the last checkpoint: a new group of workers


@dataclass(frozen=True)
class Summary:
    """Summary of a training before it runs; None for what cannot be known without its dataset or network.

    `input` is the shape of one sample as the network takes it, without the batch dimension.
    """

    model: str
    classes: int | None = None
    params: int | None = None
    macs: int | None = None
    input: tuple[int, ...] | None = None
    batch: int | None = None
    accumulation: int | None = None
    peak_lr: float | None = None
    epochs: int | None = None
    train_samples: int | None = None
    steps_per_epoch: int | None = None
    steps: int | None = None

    @property
    def counted(self) -> tuple[int, int]:
        """Parameters and MACs, for a summary with a known dataset."""
        assert self.params is not None
        assert self.macs is not None
        return self.params, self.macs

    @property
    def sides(self) -> tuple[int, ...]:
        """The shape of an input, for a summary with a known dataset."""
        assert self.input is not None
        return self.input

    def to_plain(self) -> dict[str, Any]:
        """Return the known values by name, in display order."""
        plain = {name: value for name, value in asdict(self).items() if value is not None}
        return plain if self.input is None else plain | {"input": list(self.input)}


@dataclass(frozen=True)
class Work:
    """Demands of a training on its machines. Megabytes are 10^6 bytes; times are those of a rank running alone.

    `compute_s`: forward and backward pass of a sample; `step_s`: fixed cost of each step (optimizer); `decode_s`:
    core-seconds to decode a sample from `sample_mb` on storage, read with `requests` requests, to `decoded_mb`;
    `restart_s`: idle time at the beginning of an epoch. `threads`: cores a rank uses without a GPU. `basis`: source of
    the times.
    """

    name: str
    gradient_mb: float
    samples: int
    epochs: float
    batch_total: int
    per_worker: int
    compute_s: Range
    step_s: float = 0.0
    decode_s: float = 0.0
    sample_mb: float = 0.0
    decoded_mb: float = 0.0
    requests: float = 0.0
    val_passes: float = 0.0
    val_samples: int = 0
    checkpoint_mb: float = 0.0
    restart_s: Range = (0.0, 0.0, 0.0)
    threads: float = 1.0
    basis: str = ""

    def accumulation(self, workers: int) -> int:
        """Return the microbatches per step and rank; ValueError if they do not divide `batch_total` evenly."""
        per_pass = workers * self.per_worker
        if self.batch_total % per_pass:
            raise ValueError(
                f"batch.total {self.batch_total} is not a multiple of {workers} workers x batch.per_worker "
                f"{self.per_worker}"
            )
        return self.batch_total // per_pass


@dataclass(frozen=True)
class Split:
    """Seconds of a step: computing, waiting for data, exposed all-reduce, waiting for the slowest rank, and the control
    path (the sum of a few numbers with which it begins)."""

    compute_s: float
    data_s: float
    comm_s: float
    straggler_s: float
    algorithm: str
    data_cause: str
    control_s: float = 0.0

    @property
    def step_s(self) -> float:
        return self.compute_s + self.data_s + self.comm_s + self.straggler_s + self.control_s


@dataclass(frozen=True)
class Row:
    """A plan for one number of workers. Ranges are (low, likely, high); milliseconds are likely values.

    `efficiency` is the rate over `workers` times that of one worker of the same job (0-1). `goodput` is the useful
    share of the time, given failures and checkpoints every `checkpoint_every_s`. `decode_cores`, and `requests_s` to
    the storage, are totals over all nodes; `blocks_s` pass through the largest feeder.
    """

    workers: int
    nodes: int
    accumulation: int
    step_ms: float
    compute_ms: float
    data_ms: float
    comm_ms: float
    straggler_ms: float
    control_ms: float
    algorithm: str
    samples_per_s: Range
    efficiency: Range
    hours: Range
    usd: Range | None
    decode_cores: float
    storage_mb_s: float
    requests_s: float
    blocks_s: float
    checkpoint_every_s: float
    goodput: float
    bottleneck: str
    advice: str


@dataclass(frozen=True)
class Plan:
    """The rows of a job on a cluster, and notes about the figures behind them."""

    job: str
    cluster: str
    rows: tuple[Row, ...]
    basis: str
    notes: tuple[str, ...] = field(default=())


# ------------------------------------------------------------------------------------------------- all-reduce


def ring_s(ranks: int, num_bytes: float, link: Link) -> float:
    """Return the seconds of a ring all-reduce: 2 (n-1) hops, and 2 (n-1)/n of the bytes over each link."""
    return 2 * (ranks - 1) * link.latency_s + 2 * (ranks - 1) / ranks * link.seconds(num_bytes)


def tree_s(ranks: int, num_bytes: float, link: Link) -> float:
    """Return the seconds of an all-reduce by double binary tree: 2 log2 n hops and twice the bytes; 0 for one rank."""
    return 0.0 if ranks == 1 else 2 * math.log2(ranks) * link.latency_s + 2 * link.seconds(num_bytes)


def hierarchical_s(nodes: int, per_node: int, num_bytes: float, inner: Link, outer: Link) -> float:
    """Return the seconds of a two-level all-reduce: reduce-scatter per node, all-reduce across nodes, all-gather.

    Each of the `per_node` ranks reduces its share across nodes by ring or tree at 1/per_node of the node's bandwidth.
    """
    share = Link(outer.gb_s / per_node, outer.latency_us)
    within = ring_s(per_node, num_bytes, inner) if per_node > 1 else 0.0
    between = min(ring_s(nodes, num_bytes / per_node, share), tree_s(nodes, num_bytes / per_node, share))
    return within + (between if nodes > 1 else 0.0)


def allreduce_s(cluster: Cluster, workers: int, num_bytes: float, share: float = 1.0) -> dict[str, float]:
    """Return the seconds to all-reduce `num_bytes` over `workers` by algorithm, at a `share` of the nominal bandwidth.

    A flat ring or tree enters and leaves a node once, with all of its network bandwidth.
    """
    if workers == 1:
        return {"none": 0.0}
    nodes, per_node = cluster.place(workers)
    inner = replace(cluster.inner, gb_s=cluster.inner.gb_s * share)
    outer = replace(cluster.outer, gb_s=cluster.outer.gb_s * share)
    if nodes == 1:
        return {"ring": ring_s(workers, num_bytes, inner), "tree": tree_s(workers, num_bytes, inner)}
    flat = Link(min(inner.gb_s, outer.gb_s), outer.latency_us)
    return {
        "ring": ring_s(workers, num_bytes, flat),
        "tree": tree_s(workers, num_bytes, flat),
        "hierarchical": hierarchical_s(nodes, per_node, num_bytes, inner, outer),
    }


def control_s(cluster: Cluster, workers: int) -> float:
    """Return the seconds to sum a few numbers over all ranks by a tree; each step waits for this sum."""
    nodes, _ = cluster.place(workers)
    return tree_s(workers, CONTROL_BYTES, cluster.outer if nodes > 1 else cluster.inner)


def feeder_blocks(work: Work, cluster: Cluster, workers: int) -> float:
    """Return the blocks per step that pass through the largest feeder of `workers`; 0 if the sample size is unknown."""
    if not work.decoded_mb:
        return 0.0
    nodes, here = cluster.place(workers)
    num = num_feeders(workers, [max(1.0, cluster.cores - here * work.threads)] * nodes)
    ranks, rows = -(-workers // num), -(-work.batch_total // workers)
    microbatch = min(rows, work.per_worker)
    return ranks * -(-rows // microbatch) / block_size(ranks, int(microbatch * work.decoded_mb * 1e6))


def straggler_tax(ranks: int, jitter: float) -> float:
    """Return the relative delay of the slowest of `ranks` over the mean: jitter x sqrt(2 ln n); 0 for one rank."""
    return jitter * math.sqrt(2 * math.log(ranks))


# ------------------------------------------------------------------------------------------------------- a step


def split_step(work: Work, cluster: Cluster, workers: int, case: int = LIKELY, batch: int | None = None) -> Split:
    """Split the seconds of a step of `batch` samples (default: the global batch) on `workers`; `case` is LOW to HIGH.

    LOW and LIKELY hide the all-reduce behind the last backward pass and take its fastest algorithm; HIGH hides nothing
    and takes the slowest one except the tree. On CPUs nothing is hidden: the cores that compute also move the bytes.
    """
    nodes, here = cluster.place(workers)
    rows = -(-(batch or work.batch_total) // workers)  # of the rank with the most
    own = rows * work.compute_s[case] + work.step_s
    decode = here * rows * work.decode_s
    if cluster.shares_cores:
        compute = own * max(1.0, here * work.threads / cluster.cores)
        cores_busy = (here * own * work.threads + decode) / cluster.cores
        waits = {"cores": cores_busy - compute}
    else:
        compute = own
        waits = {"decode": decode / cluster.cores - compute}
    read_gb = rows * work.sample_mb / 1e3
    waits["disk"] = here * read_gb / cluster.disk_gb_s - compute
    if nodes > 1:
        waits["network"] = here * read_gb / cluster.outer.gb_s - compute
    if cluster.storage_gb_s:
        waits["storage"] = workers * read_gb / cluster.storage_gb_s - compute
    if cluster.storage_requests_s:
        waits["requests"] = workers * rows * work.requests / cluster.storage_requests_s - compute
    share = (batch or work.batch_total) / work.batch_total  # a short last step has fewer blocks
    waits["feeder"] = share * feeder_blocks(work, cluster, workers) * BLOCK_S - compute
    cause = max(waits, key=lambda name: waits[name])
    data = max(0.0, waits[cause])
    share = cluster.bandwidth_share[2 - case]
    ways = allreduce_s(cluster, workers, work.gradient_mb * 1e6, share)
    if case == HIGH:
        ways = {name: seconds for name, seconds in ways.items() if name != "tree" or len(ways) == 1}
    name = (max if case == HIGH else min)(ways, key=lambda way: ways[way])
    comm = ways[name]
    if case != HIGH and not cluster.shares_cores:
        backward = BACKWARD * min(rows, work.per_worker) * work.compute_s[case]
        comm = max(comm * min(1.0, LAST_BUCKET_MB / work.gradient_mb), comm - backward)
    late = compute * straggler_tax(workers, cluster.jitter[case])
    return Split(compute, data, comm, late, name, cause, control_s(cluster, workers))


def train_s(work: Work, cluster: Cluster, workers: int, case: int = LIKELY) -> float:
    """Return the seconds of the whole training: per epoch its start, full steps and a short last one; validations."""
    full, rest = divmod(work.samples, work.batch_total)
    epoch = full * split_step(work, cluster, workers, case).step_s + work.restart_s[case]
    if rest:
        epoch += split_step(work, cluster, workers, case, batch=rest).step_s
    validate = 0.0
    if work.val_samples:
        forward = replace(work, compute_s=scaled(work.compute_s, 1 - BACKWARD), step_s=0.0, gradient_mb=1e-6)
        validate = work.val_passes * split_step(forward, cluster, workers, case, batch=work.val_samples).step_s
    return work.epochs * epoch + validate


def scaled(values: Range, factor: float) -> Range:
    """Return `values` times `factor`."""
    low, likely, high = (value * factor for value in values)
    return low, likely, high


def anchored(work: Work, cluster: Cluster, workers: int, seconds: float) -> Work:
    """Return `work` with `compute_s` fitted, case by case, so that the training on `workers` lasts `seconds`.

    The known run's losses (stragglers, all-reduce, restarts) are thus subtracted first, by the figures of the case.
    """
    found = []
    for case in (LOW, LIKELY, HIGH):
        low, high = 0.0, seconds * workers / (work.samples * work.epochs)
        for _ in range(60):
            middle = (low + high) / 2
            takes = train_s(replace(work, compute_s=(middle, middle, middle)), cluster, workers, case)
            low, high = (middle, high) if takes < seconds else (low, middle)
        found.append((low + high) / 2)
    return replace(work, compute_s=(found[0], found[1], found[2]), basis=f"a known run on {workers} workers")


# ----------------------------------------------------------------------------------------- failures and storage


def checkpoint_interval_s(save_s: float, mtbf_s: float) -> float:
    """Return the optimal seconds between checkpoints (Young and Daly): sqrt(2 x seconds per save x MTBF of the job)."""
    return math.sqrt(2 * save_s * mtbf_s)


def goodput(save_s: float, every_s: float, mtbf_s: float, restart_s: float = RESTART_S) -> float:
    """Return the useful share of the time, 0-1: saves are lost, and per failure half an interval and a restart."""
    return max(0.0, 1 - save_s / every_s - (every_s / 2 + restart_s) / mtbf_s)


# ------------------------------------------------------------------------------------------------------- a plan


def make_plan(work: Work, cluster: Cluster, workers: Sequence[int]) -> Plan:
    """Return a plan with a row for each of `workers`; UserError for a number that the job or cluster does not allow."""
    rows = []
    for count in workers:
        try:
            work.accumulation(count)
        except ValueError as error:
            fit = [n for n in range(1, work.batch_total + 1) if work.batch_total % (n * work.per_worker) == 0]
            near = sorted(fit, key=lambda n: abs(math.log(n / max(count, 1))))[:3]
            said = ", ".join(map(str, sorted(near))) or "none: change batch.total"
            raise UserError(f"--workers {count}: {error} (near: {said})") from None
        nodes, _ = cluster.place(count)
        if cluster.nodes is not None and nodes > cluster.nodes:
            raise UserError(
                f"--workers {count}: needs {nodes} nodes, {cluster.name} has {cluster.nodes}: ask for fewer"
            )
        rows.append(_row(work, cluster, count))
    return Plan(work.name, cluster.name, tuple(rows), work.basis, cluster.notes)


def _row(work: Work, cluster: Cluster, workers: int) -> Row:
    splits = [split_step(work, cluster, workers, case) for case in (LOW, LIKELY, HIGH)]
    alone = [split_step(work, cluster, 1, case).step_s for case in (LOW, LIKELY, HIGH)]
    hours = [train_s(work, cluster, workers, case) / 3600 for case in (LOW, LIKELY, HIGH)]
    likely, (nodes, _) = splits[LIKELY], cluster.place(workers)
    rates = [work.batch_total / split.step_s for split in splits]
    save_s = max(work.checkpoint_mb, 1e-3) / 1e3 / cluster.disk_gb_s
    mtbf_s = cluster.mtbf_hours * 3600 / nodes
    every_s = checkpoint_interval_s(save_s, mtbf_s)
    usd = None
    if cluster.usd_per_node_hour is not None:
        usd = _range(nodes * cluster.usd_per_node_hour * hour for hour in hours)
    bottleneck = _bottleneck(likely)
    return Row(
        workers=workers,
        nodes=nodes,
        accumulation=work.accumulation(workers),
        step_ms=likely.step_s * 1e3,
        compute_ms=likely.compute_s * 1e3,
        data_ms=likely.data_s * 1e3,
        comm_ms=likely.comm_s * 1e3,
        straggler_ms=likely.straggler_s * 1e3,
        control_ms=likely.control_s * 1e3,
        algorithm=likely.algorithm,
        samples_per_s=_range(reversed(rates)),
        efficiency=_range(sorted(a / split.step_s / workers for a, split in zip(alone, splits, strict=True))),
        hours=_range(hours),
        usd=usd,
        decode_cores=rates[LIKELY] * work.decode_s,
        storage_mb_s=rates[LIKELY] * work.sample_mb,
        requests_s=rates[LIKELY] * work.requests,
        blocks_s=feeder_blocks(work, cluster, workers) / likely.step_s,
        checkpoint_every_s=every_s,
        goodput=goodput(save_s, every_s, mtbf_s),
        bottleneck=bottleneck,
        advice=_advice(work, cluster, workers, likely, bottleneck),
    )


def _range(values: Any) -> Range:
    low, likely, high = values
    return low, likely, high


def _bottleneck(split: Split) -> str:
    """Return the largest part of a step besides computing, if it is at least a tenth of the step; else "compute"."""
    parts = {split.data_cause: split.data_s, "all-reduce": split.comm_s, "stragglers": split.straggler_s}
    parts["control path"] = split.control_s
    worst = max(parts, key=lambda name: parts[name])
    return worst if parts[worst] >= 0.1 * split.step_s else "compute"


def _advice(work: Work, cluster: Cluster, workers: int, split: Split, bottleneck: str) -> str:
    """Return one sentence about what to change."""
    rate = work.batch_total / split.step_s
    crowded = cluster.shares_cores and cluster.place(workers)[1] * work.threads > cluster.cores
    if bottleneck == "decode":
        need = math.ceil(work.batch_total * work.decode_s / (split.compute_s + split.comm_s + split.straggler_s))
        return (
            f"decoding needs {need} cores, there are {cluster.place(workers)[0] * cluster.cores}: pack the dataset "
            "(prepare with pack: jpeg, or h264 with gop 12), or use nodes with more cores"
        )
    if bottleneck in ("disk", "network", "storage"):
        return (
            f"the {bottleneck} must deliver {rate * work.sample_mb:.0f} MB/s: pack the dataset smaller (short_side), "
            "or move it closer to the nodes"
        )
    if bottleneck == "requests":
        return (
            f"the storage must answer {rate * work.requests:,.0f} requests/s: keep the dataset on the nodes "
            "(data.cache), or use nodes that mount it"
        )
    if bottleneck == "feeder":
        return (
            f"a feeder's process passes on {1 / BLOCK_S:.0f} blocks a second: raise batch.per_worker, so that there "
            "are fewer"
        )
    if bottleneck == "control path":
        return "steps are too short for so many workers: raise batch.total, or use fewer workers"
    if crowded or bottleneck == "cores":
        return f"workers and decoders share {cluster.cores} cores: more workers do not help here"
    if bottleneck == "all-reduce":
        return "raise batch.total or batch.per_worker (more to compute per all-reduce), or use fewer workers"
    if bottleneck == "stragglers":
        return "the slowest of so many ranks sets the pace: leave out slow nodes, or use fewer workers"
    if work.accumulation(workers) > 1:
        return f"computing is the limit: up to {work.batch_total // work.per_worker} workers can share the same batch"
    return (
        "computing is the limit: use a smaller network, fewer frames or a faster device; more workers need a larger "
        "batch.total"
    )


# ------------------------------------------------------------------------------------------- from data sheets


def compute_s(macs: float, tmacs: float, utilisation: Range) -> Range:
    """Return the seconds of a sample's forward and backward pass (three times the forward MACs); low is fastest."""
    low, likely, high = utilisation
    return 3 * macs / (tmacs * 1e12 * high), 3 * macs / (tmacs * 1e12 * likely), 3 * macs / (tmacs * 1e12 * low)


# ------------------------------------------------------------------------------------------------- afterwards


def compare(predicted: float, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Compare the `predicted` rate with the median `train/samples_per_s` of `rows`, the first one left out if possible.

    None if nothing was measured.
    """
    rates = [row["train/samples_per_s"] for row in rows if isinstance(row.get("train/samples_per_s"), int | float)]
    if not rates or predicted <= 0:
        return None
    measured = float(np.median(rates[1:] or rates))
    out = {"predicted_samples_per_s": predicted, "measured_samples_per_s": measured, "ratio": predicted / measured}
    return {name: round(value, 4) for name, value in out.items()}
