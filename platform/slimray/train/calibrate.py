"""Calibration of the planner: time a dozen steps of a job's network on one worker here, and decode a few samples.

`measure` times them without Ray, `save` stores the result in `<storage>/calibration.json` by network, input and device,
and `find` reads it for later plans, which name it as their basis. `work` collects the planner's inputs for a training
job; without a calibration, its times come from MACs and data sheets. Surprising: the median step counts, and a worker's
steps are measured with as many torch threads as it reserves CPUs, so that the planner may let workers share the cores.
"""

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from slimray import compress, runs
from slimray.data.bytes import read_whole
from slimray.data.modalities import MODALITIES, input_shape, modality_of, read_recipe, sample_shape, target_of
from slimray.data.samples import BadSample
from slimray.spec import UserError, did_you_mean, parse, read_yaml
from slimray.storage import join, open_uri, read_bytes, write_atomic
from slimray.tasks.classify import CLASSIFY
from slimray.tasks.network import Input
from slimray.tasks.task import Task
from slimray.train import machines, planner
from slimray.train.methods.method import Piece, Setup
from slimray.train.methods.plain import PlainReplica
from slimray.train.spec import OptimSpec

FILE = "calibration.json"
STEPS, WARM = 12, 3
DECODED = 12  # samples
REQUESTS = 1.0  # requests to a bucket per file, or per clip of a shard
SPREAD = (0.9, 1.0, 1.15)  # of a measured time on another day of the same machine (an assumption)


@dataclass(frozen=True)
class Calibration:
    """Times of one worker: seconds of the forward and backward pass per sample, fixed seconds per step (optimizer),
    core-seconds to decode a sample (None without a dataset), and megabytes of a sample on storage."""

    device: str
    threads: int
    per_worker: int
    compute_s: float
    step_s: float
    decode_s: float | None
    sample_mb: float | None
    date: str


def device_name(on_gpu: bool) -> str:
    """Return the name of this machine's GPU if the job trains `on_gpu` and there is one, else "cpu"."""
    return torch.cuda.get_device_name() if on_gpu and torch.cuda.is_available() else "cpu"


def this_machine(on_gpu: bool) -> machines.Cluster:
    """Describe this machine to the planner, with its GPUs if it has any and the job wants them."""
    device = device_name(on_gpu)
    return machines.this_machine(device, 0 if device == "cpu" else torch.cuda.device_count())


def key_of(model: Mapping[str, Any], recipe: Mapping[str, Any], per_worker: int, device: str) -> str:
    """Return the key of a calibration: a digest of network, input, microbatch and device."""
    what = [dict(model), list(input_shape(dict(recipe))), per_worker, device]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def measure(
    model: Mapping[str, Any],
    recipe: dict[str, Any],
    optim: OptimSpec,
    per_worker: int,
    threads: int,
    on_gpu: bool = False,
    table: pa.Table | None = None,
    root: str = "",
    task: Task = CLASSIFY,
) -> Calibration:
    """Time a dozen optimizer steps of `model` on random input, and the decoding of a few samples of `table`, if given.

    Uses a GPU if the job wants one and there is one. UserError if no sample of the table decodes.
    """
    device = torch.device("cpu" if device_name(on_gpu) == "cpu" else "cuda")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        single, double = (_step_times(model, recipe, optim, per_worker, count, device, task) for count in (1, 2))
    finally:
        torch.set_num_threads(before)
    passes = max(
        median(double) - median(single), 0.25 * median(single)
    )  # seconds of one microbatch; the rest is fixed per step
    compute_s = passes / per_worker
    decode_s, sample_mb = (None, None) if table is None else _decode_times(table, root, recipe)
    date = datetime.now(UTC).date().isoformat()
    step_s = max(0.0, median(single) - passes)
    return Calibration(device_name(on_gpu), threads, per_worker, compute_s, step_s, decode_s, sample_mb, date)


def _step_times(
    model: Mapping[str, Any],
    recipe: dict[str, Any],
    optim: OptimSpec,
    rows: int,
    count: int,
    device: torch.device,
    task: Task,
) -> list[float]:
    """Return the seconds of each step of `count` microbatches of `rows` random samples.

    A single CPU thread is timed in processor time, so that other load on the machine does not count.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    shape, dtype, target = sample_shape(recipe), modality_of(recipe).dtype, target_of(recipe)
    rng = np.random.default_rng(0)
    if dtype == np.uint8:
        data = rng.integers(0, 256, (rows, *shape), dtype=np.uint8)
    else:
        data = rng.standard_normal((rows, *shape)).astype(dtype)
    labels = rng.integers(0, int(model.get("num_classes", 256)), (rows, *target.shape)).astype(target.dtype)
    torch.manual_seed(0)
    replica = PlainReplica(compress.build(**model), Setup(optim, Input(), input_shape(recipe), device, task=task))
    times = []
    for step in range(WARM + STEPS):
        start = clock()
        replica.step([Piece(data, labels)] * count, rows * count, 1e-6, (0, step))
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return times[WARM:]


def _decode_times(table: pa.Table, root: str, recipe: dict[str, Any]) -> tuple[float, float]:
    """Return the median seconds and mean megabytes of a few samples spread over the index."""
    (fs, folder), made = open_uri(root), read_recipe(recipe)
    seconds, sizes = [], []
    for place in np.linspace(0, table.num_rows - 1, min(DECODED, table.num_rows)).round().astype(int):
        row = table.slice(int(place), 1).to_pylist()[0]
        try:
            start = time.perf_counter()
            modality_of(recipe).load(row, root, made, (0, 0, int(place)), 60.0)
            seconds.append(time.perf_counter() - start)
            sizes.append(len(read_whole(fs, folder, row)))
        except (BadSample, FileNotFoundError):
            continue
    if not seconds:
        raise UserError(f"{root}: no sample decodes, so decoding cannot be measured: check the dataset first")
    return median(seconds[1:] or seconds), sum(sizes) / len(sizes) / 1e6  # the first one also starts the decoder


# -------------------------------------------------------------------------------------------------- storage


def save(storage: str, key: str, found: Calibration) -> str:
    """Add a calibration to the file on the storage, which holds those of all jobs; return the file's URI."""
    fs, path = open_uri(join(storage, FILE))
    everything = _read(storage) | {key: dataclasses.asdict(found)}
    write_atomic(fs, path, json.dumps(everything, indent=2).encode())
    return join(storage, FILE)


def find(storage: str, key: str) -> Calibration | None:
    """Return the calibration `key` of a storage, or None; UserError for a file that slimray did not write."""
    row = _read(storage).get(key)
    try:
        return None if row is None else Calibration(**row)
    except TypeError:
        raise UserError(f"{join(storage, FILE)}: was not written by slimray: delete it and measure again") from None


def _read(storage: str) -> dict[str, Any]:
    fs, path = open_uri(join(storage, FILE))
    try:
        found = json.loads(read_bytes(fs, path))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{join(storage, FILE)}: was not written by slimray: delete it and measure again")
    return found


# ---------------------------------------------------------------------------------------------- for the planner


def work(
    job: Any,
    summary: planner.Summary,
    samples: int,
    val_samples: int,
    sample: str,
    cluster: machines.Cluster,
    pack: str = "",
) -> planner.Work:
    """Return the work that a training `job` gives `cluster`, with times from MACs and data sheets.

    `sample` (a name in MODALITIES) and `pack`, the format in which clips are packed, set the assumed costs of decoding
    and reading.
    """
    (params, macs), threads = summary.counted, max(1, int(job.scale.cpus_per_worker))
    modality = MODALITIES[sample]
    decode_s, sample_mb = modality.packed.get(pack, (modality.decode_s, modality.sample_mb))
    peak = cluster.tmacs * (threads if cluster.shares_cores else 1)
    epochs = job.optim.epochs if job.optim.steps is None else job.optim.steps / max(1, -(-samples // job.batch.size))
    return planner.Work(
        name=job.name,
        gradient_mb=4 * params / 1e6,
        samples=samples,
        epochs=epochs,
        batch_total=job.batch.size,
        per_worker=job.batch.microbatch,
        compute_s=planner.compute_s(macs, peak, cluster.utilisation),
        decode_s=decode_s,
        sample_mb=sample_mb,
        decoded_mb=math.prod(summary.sides) * np.dtype(modality.dtype).itemsize / 1e6,
        requests=0.0 if job.data.cache else REQUESTS,
        val_passes=-(-epochs // job.val_every) if val_samples else 0,
        val_samples=val_samples,
        checkpoint_mb=8 * params / 1e6,  # weights and momentum
        threads=threads,
        basis="MACs and data sheets, decoding assumed (plan --measure measures both)",
    )


def calibrated(planned: planner.Work, found: Calibration) -> planner.Work:
    """Return `planned` with measured times in place of those from data sheets."""
    low, likely, high = SPREAD
    decoding = "" if found.decode_s else ", decoding assumed"
    return dataclasses.replace(
        planned,
        compute_s=(found.compute_s * low, found.compute_s * likely, found.compute_s * high),
        step_s=found.step_s,
        decode_s=found.decode_s or planned.decode_s,
        sample_mb=found.sample_mb or planned.sample_mb,
        basis=f"measured on one worker ({found.device}, {found.threads} threads, {found.date}){decoding}",
    )


def compared(job: Any, summary: planner.Summary, config: Any, ctx: Any) -> dict[str, Any] | None:
    """Compare the plan with the measured rate of a run that finished on this machine, for its card.

    None without a calibration of this job's network (`plan --measure` writes one), for a run on another machine, and
    for batches counted in tokens, which are not planned. `config` is the FitConfig of its workers, `ctx` has its run
    and storage.
    """
    on_gpu = bool(job.scale.gpus_per_worker)
    key = key_of(config.model, config.recipes["train"], job.batch.microbatch, device_name(on_gpu))
    found = None if os.environ.get("RAY_ADDRESS") or job.batch.tokens else find(ctx.storage, key)
    if found is None:
        return None
    cluster = this_machine(on_gpu)
    planned = calibrated(
        work(job, summary, summary.train_samples or 0, 0, config.recipes["train"]["kind"], cluster), found
    )
    rows = [row for row in runs.read_parts(ctx.run, "metrics") if row.get("phase") == "train"]
    return planner.compare(job.batch.size / planner.split_step(planned, cluster, job.scale.most).step_s, rows)


def find_cluster(name: str | None, search: Sequence[Path], on_gpu: bool) -> machines.Cluster:
    """Read the cluster file `name` (a path, or a name in the folders `search`) for the planner; None is this machine.

    UserError if there is no such file, if it has no `machine:` section, or if no prices.yaml lists its price.
    """
    if name is None:
        return this_machine(on_gpu)
    places = [Path(name)] if name.endswith((".yaml", ".yml")) else [folder / f"{name}.yaml" for folder in search]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        known = {file.stem for folder in search for file in folder.glob("*.yaml")} - {"prices"}
        raise UserError(f"--cluster {name}: there is no such cluster file{did_you_mean(name, known)}")
    document = (read_yaml(path) or [{}])[0]
    single = document.get("kind") == "local"
    if single and "machine" not in document:
        return this_machine(on_gpu)
    if not isinstance(document.get("machine"), dict):
        raise UserError(f"{path}: machine: is required to plan (`gpus_per_node`, `gpu`, `nic_gb_s`, ...)")
    machine = parse(machines.MachineSpec, document["machine"], f"{path}: machine")
    return machines.make_cluster(path.stem, machine, _prices([path.parent, *search]), single)


def _prices(search: Sequence[Path]) -> dict[str, machines.PriceSpec]:
    path = next((folder / "prices.yaml" for folder in search if (folder / "prices.yaml").is_file()), None)
    if path is None:
        return {}
    return parse(machines.PriceTable, (read_yaml(path) or [{}])[0], str(path)).prices
