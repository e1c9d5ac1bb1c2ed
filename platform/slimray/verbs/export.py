"""`kind: export`: convert a finished network to one or more formats that run without torch, verified and timed.

Reads a run that holds a network and its dataset; writes `export/<format>/` with the file and `export.json`: names and
shapes of inputs and outputs, the recipe that makes an input from a file, a comparison with torch on samples of the
validation split, and the latency on this machine. If an export does not agree with torch, the run fails. `online`
exports a causal TSM as a step (arXiv 1811.08383): a frame and states in, logits and states out. Needs no Ray.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from slimray import runs
from slimray.runs.folder import to_json
from slimray.runs.notify import NotifySpec
from slimray.spec import RunFailed, Spec, UserError
from slimray.verbs import inputs
from slimray.verbs.checks import split_names
from slimray.verbs.context import CheckContext, Context, Made

FormatName = Literal["onnx", "onnx_int8", "openvino", "executorch", "executorch_int8", "ncnn", "litert", "torch"]


class ExportJob(Spec):
    """Convert a finished network to formats that run without torch, verified and timed."""

    kind: Literal["export"]
    name: str
    """Name of the run, a folder of the storage."""
    run: str
    """Name or URI of the run with the network."""
    formats: tuple[FormatName, ...] = Field(("onnx",), min_length=1)
    """Formats to write; those in int8 are calibrated on samples of the training split. For TensorRT write `onnx`, and
    convert it on the device with `trtexec --onnx=model.onnx --fp16 --saveEngine=model.plan`."""
    online: bool = False
    """Export a causal TSM as a step: one frame and states in, logits and states out."""
    samples: int = Field(200, ge=2)
    """Samples of the validation split on which an export is compared with torch and scored."""
    calibrate: int = Field(128, ge=1)
    """Samples of the training split, prepared as in validation, on which int8 is calibrated."""
    max_difference: float = Field(1e-4, gt=0)
    """Largest relative difference (L2, all samples) from torch of an export in fp32 (0.05 if it rounds inputs). Above
    that, torch in float64 is the reference: an export may be three times as far from it as torch in float32."""
    min_agreement: float = Field(99.5, ge=0, le=100)
    """Smallest percentage of predictions in which an export in fp32 names the same class as torch, or of sentences that
    it translates into the same tokens."""
    max_drop: float | None = Field(None, ge=0)
    """Largest loss of the task's first metric in an export in int8; null: report it, but accept any."""
    threads: int = Field(1, ge=1)
    """Threads of the timing."""
    pairs: int = Field(15, ge=9)
    """Pairs of measurements, of the export and of torch in turn; fewer than nine say little about their spread."""
    notify: NotifySpec | None = None

    @property
    def local_cpus(self) -> int:
        """Logical CPUs with which a local cluster holds the job."""
        return 1

    @model_validator(mode="after")
    def _formats_fit(self) -> "ExportJob":
        if len(set(self.formats)) < len(self.formats):
            raise ValueError(f"formats: one is named twice ({', '.join(self.formats)})")
        return self


Job = ExportJob


def check(job: ExportJob, ctx: CheckContext) -> dict[str, Any]:
    """Return the run, the formats, and the dataset if it exists."""
    from slimray.export.formats import FORMATS
    from slimray.tasks.network import task_of

    out: dict[str, Any] = {"run": job.run, "formats": list(job.formats)}
    for name in job.formats:
        with ctx.noting():
            FORMATS[name].require(f"formats: {name}")
    with ctx.noting():
        made = ctx.require(job.run, ("network",), "run")
        if made is not None:
            _require_fitting(job, (made.resolved(ctx.ahead).card or {}).get("task"))
        else:
            found = _find(job, ctx.where, ctx.storage)
            _require_fitting(job, task_of(inputs.read_input(found, f"{ctx.where}: run")))
            if job.online and not inputs.read_model(found, f"{ctx.where}: run").get("causal"):
                raise UserError(f"online: {job.run!r} is not a causal TSM, which runs frame by frame")
            data = inputs.data_of(found, ctx.storage, f"{ctx.where}: run")
            splits = inputs.open_splits(data, ctx.where, ctx.storage, split_names(data))
            out |= {"dataset": splits.card.name, "samples": splits.tables[data.val or data.train].num_rows}
    return out


def _require_fitting(job: ExportJob, task: str | None, where: str = "") -> None:
    """Raise UserError, with `where`, if a network of `task` (None: not known yet) cannot be exported as `job` asks."""
    from slimray.export.formats import FORMATS
    from slimray.tasks import TASKS

    if task is None or not TASKS[task].stepwise:
        return
    if job.online:
        raise UserError(f"{where}online: a network of task {task!r} is exported as an encoder and a step: leave it out")
    for name in job.formats:
        if not FORMATS[name].stepwise:
            fitting = " or ".join(one for one, found in FORMATS.items() if found.stepwise)
            raise UserError(
                f"{where}formats: {name} cannot hold an encoder and a step, which a network of task {task!r} needs: "
                f"use {fitting}"
            )


def makes(job: ExportJob) -> dict[str, Made]:
    """Return the exports of the network."""
    return {job.name: Made("export", like=job.run)}


def _find(job: ExportJob, where: str, storage: str) -> runs.Run:
    return inputs.finished_run(job.run, storage, ("network",), f"{where}: run")


def run(job: ExportJob, ctx: Context) -> None:
    """Convert, verify and time each format, and write them to the run folder `ctx.run`."""
    from slimray.export import exporter, verify
    from slimray.export.formats import FORMATS
    from slimray.export.graph import ready
    from slimray.report import pages
    from slimray.tasks import TASKS
    from slimray.tasks.network import load_network, task_of

    found = _find(job, ctx.where, ctx.storage)
    _require_fitting(job, task_of(inputs.read_input(found, f"{ctx.where}: run")), f"{ctx.where}: ")
    for name in job.formats:
        FORMATS[name].require(f"{ctx.where}: formats: {name}")
    data = inputs.data_of(found, ctx.storage, f"{ctx.where}: run")
    splits = inputs.open_splits(data, ctx.where, ctx.storage, split_names(data))
    _, model, taken = runs.read_model(found)
    network = load_network(found)
    network = replace(network, net=ready(network.net))
    samples = verify.read_samples(
        splits.tables[data.val or data.train], splits.root, network.recipe, job.samples, 0, data.decode_timeout_s
    )
    seen = samples
    if any(FORMATS[name].calibrated for name in job.formats):
        seen = verify.read_samples(
            splits.tables[data.train], splits.root, network.recipe, job.calibrate, 1, data.decode_timeout_s
        )
    best = TASKS[network.task].best
    wanted = exporter.Wanted(job.max_difference, job.min_agreement, job.max_drop, job.threads, job.pairs)
    made = exporter.exporter_of(network, samples, seen, wanted, job.online, ctx.where)
    rows: list[dict[str, Any]] = [{"run": found.name, "format": "torch, eager", best.name: made.numbers.get(best.name)}]
    with tempfile.TemporaryDirectory(prefix="slimray-export-") as scratch:
        for name in job.formats:
            folder = Path(scratch, name)
            folder.mkdir()
            row: dict[str, Any] = {"run": f"{ctx.run.name}:{name}", "format": name}
            try:
                details = made.write(name, folder)
            except Exception as error:  # noqa: BLE001  a converter may raise anything: the other formats are still written
                row |= {"reason": _sentence(error)}
            else:
                details |= {"run": found.uri, "input": taken, "model": model}
                for file in details["files"]:
                    runs.write_file(ctx.run, f"export/{name}/{file}", folder / file)
                runs.write_file(ctx.run, f"export/{name}/export.json", to_json(details))
                row |= _row(details, best.name)
            rows.append(row)
            ctx.console.print(f"{row['run']}: {_told(row)}", highlight=False, soft_wrap=True)
            shutil.rmtree(folder)
    results = {
        "task": network.task,
        "metrics": [metric.to_plain() for metric in TASKS[network.task].metrics],
        "rows": rows,
        "best": best.name,
        "samples": len(samples),
        "online": job.online,
        "cpu": exporter.cpu(),
        "states": made.states,
    }
    ctx.finish(
        {
            "metrics": {"rows": rows},
            "metric": best.to_plain(),
            "run": found.uri,
            "dataset": {"name": splits.card.name, "fingerprint": splits.fingerprint},
        },
        results,
    )
    runs.write_report(ctx.run, pages.export_report(ctx.run))
    if bad := [f"{row['format']}: {row['reason']}" for row in rows if row.get("reason")]:
        raise RunFailed("; ".join(bad))


def _row(details: Mapping[str, Any], best: str) -> dict[str, Any]:
    """Return the row of an export in tables."""
    verification, timing, energy = details["verification"], details["timing"], details.get("energy", {})
    row = {
        best: verification["metrics"].get(best),
        "relative": verification["relative"],
        "worst_sample": verification["worst_sample"],
        "max_abs": verification["max_abs"],
        "agreement": verification.get("agreement"),
        "unoptimised_agreement": verification.get("unoptimised", {}).get("agreement"),
        "mb": sum(one["bytes"] for one in details["files"].values()) / 1e6,
        "ms": timing["export_ms"],
        "eager_ms": timing["eager_ms"],
        "ratio": timing["ratio"],
        "ratio_low": timing["interval"][0],
        "ratio_high": timing["interval"][1],
        "energy_mj": energy.get("energy_mj"),
        "energy": energy.get("how"),
        "reason": verification["reason"],
    }
    return {key: value for key, value in row.items() if value is not None and value != ""}


def _told(row: Mapping[str, Any]) -> str:
    """Return a line about an export."""
    if "ms" not in row:
        return f"failed: {row['reason']}"
    agreed = f", the same prediction {row['agreement']:.2f} % of the time" if "agreement" in row else ""
    speed = f"{row['ms']:.2f} ms, {row['ratio']:.2f} of eager torch [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    verdict = f"FAILED: {row['reason']}: " if row.get("reason") else ""
    return f"{verdict}{row['mb']:.2f} MB, relative difference {row['relative']:.1e}{agreed}, {speed}"


def _sentence(error: BaseException) -> str:
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if isinstance(error, RunFailed | UserError) else f"{type(error).__name__}: {text}"[:500]
