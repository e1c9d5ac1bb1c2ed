"""`kind: export`: a finished network leaves torch, in one format or several, verified and timed.

Reads a run that holds a network and its dataset; writes `export/<format>/` with the file and `export.json`: names and
shapes of inputs and outputs, what training did with a file to make an input, how the export compares with torch on
samples of the validation split, how long it takes here. An export that does not agree with torch is a failed run.
`online` exports a causal TSM as a step (arXiv 1811.08383): a frame and states in, logits and states out. Needs no Ray.
"""

import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from slimray import runs
from slimray.data.modalities import modality_of
from slimray.runs.folder import digest, to_json
from slimray.runs.notify import NotifySpec
from slimray.spec import RunFailed, Spec, UserError
from slimray.verbs import inputs
from slimray.verbs.checks import split_names
from slimray.verbs.context import CheckContext, Context, Made

if TYPE_CHECKING:
    from slimray.export.graph import Graph
    from slimray.export.verify import Outputs, Samples
    from slimray.tasks.network import Network

ROUNDED = 0.05  # relative difference that a network with rounded inputs may have: borders are met on either side
FormatName = Literal["onnx", "onnx_int8", "openvino", "executorch", "executorch_int8", "ncnn", "litert", "torch"]


class ExportJob(Spec):
    """Write a finished network in formats that run without torch, verified and timed."""

    kind: Literal["export"]
    name: str
    """Name of the run, a folder of the storage."""
    run: str
    """The run with the network, by name or URI."""
    formats: tuple[FormatName, ...] = Field(("onnx",), min_length=1)
    """Formats; those in int8 are calibrated on samples of the training split."""
    online: bool = False
    """A causal TSM as a step: one frame and states in, logits and states out."""
    samples: int = Field(200, ge=2)
    """Samples of the validation split on which an export is compared with torch and scored."""
    calibrate: int = Field(128, ge=1)
    """Samples of the training split, seen as in validation, that int8 is calibrated on."""
    max_difference: float = Field(1e-4, gt=0)
    """Largest relative difference (L2, all samples) from torch of an export in fp32 (0.05 if it rounds inputs). Beyond
    that, what torch computes in float64 decides: an export may be three times as far from it as torch is."""
    min_agreement: float = Field(99.5, ge=0, le=100)
    """Smallest percent of answers in which an export in fp32 names the same class as torch, or of sentences that it
    translates into the same tokens."""
    max_drop: float | None = Field(None, ge=0)
    """Most that an export in int8 may lose of the task's first number; null tells it and lets it pass."""
    threads: int = Field(1, ge=1)
    """Threads with which it is timed."""
    pairs: int = Field(15, ge=9)
    """Pairs of times, of the export and of torch in turn; fewer than nine tell little of their spread."""
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
    """Return the run, the formats, and the dataset if it is there."""
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
    """Raise UserError, with `where`, for what a network of `task` (None: not known yet) is not exported as."""
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
                f"{where}formats: {name} does not hold an encoder and a step, which a network of task {task!r} is: "
                f"take {fitting}"
            )


def makes(job: ExportJob) -> dict[str, Made]:
    """Return the exports of the network."""
    return {job.name: Made("export", like=job.run)}


def _find(job: ExportJob, where: str, storage: str) -> runs.Run:
    return inputs.finished_run(job.run, storage, ("network",), f"{where}: run")


def run(job: ExportJob, ctx: Context) -> None:
    """Convert, verify and time each format, and write them to the run folder `ctx.run`."""
    from slimray.export import verify
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
    best, exporter = TASKS[network.task].best, _exporter(job, ctx.where, network, samples, seen)
    number = exporter.numbers.get(best.name)
    rows: list[dict[str, Any]] = [{"run": found.name, "format": "torch, eager", best.name: number}]
    with tempfile.TemporaryDirectory(prefix="slimray-export-") as scratch:
        for name in job.formats:
            folder = Path(scratch, name)
            folder.mkdir()
            row: dict[str, Any] = {"run": f"{ctx.run.name}:{name}", "format": name}
            try:
                facts = exporter.write(name, folder)
            except Exception as error:  # noqa: BLE001  a converter may raise anything: the others are written all the same
                row |= {"reason": _sentence(error)}
            else:
                facts |= {"run": found.uri, "input": taken, "model": model}
                for file, _ in facts["files"].items():
                    runs.write_file(ctx.run, f"export/{name}/{file}", folder / file)
                runs.write_file(ctx.run, f"export/{name}/export.json", to_json(facts))
                row |= _row(facts, best.name)
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
        "cpu": _cpu(),
        "states": exporter.states,
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


@dataclass(frozen=True)
class _Exporter:
    """How a network leaves torch: its `numbers` in torch, the states of a step, and what converts to a format in a
    folder, verifies and times it, and returns what export.json says."""

    numbers: Mapping[str, float]
    states: list[dict[str, Any]]
    write: Callable[[str, Path], dict[str, Any]]


def _exporter(job: ExportJob, where: str, network: "Network", samples: "Samples", seen: "Samples") -> _Exporter:
    """One graph, or of what answers token by token an encoder and a step; `seen` is what int8 is calibrated on."""
    from slimray.export import verify
    from slimray.tasks import TASKS

    if TASKS[network.task].stepwise:
        return _spoken(job, where, network, samples)
    graph, runners = _graph(job, where, network, samples), dict[str, Any]()
    expected, numbers = verify.outputs_of(network, samples), verify.score(network, samples, network.recipe)
    states = [{**vars(state), "shape": list(state.shape)} for state in graph.states]
    reference = (samples, expected, numbers)
    return _Exporter(
        numbers, states, lambda name, folder: _one(job, network, graph, name, folder, seen, reference, runners)
    )


def _spoken(job: ExportJob, where: str, network: "Network", samples: "Samples") -> _Exporter:
    import torch

    from slimray.data.text.vocabulary import PAD
    from slimray.edge.runtimes import settings
    from slimray.export import exported, translation, verify
    from slimray.export.formats import FORMATS
    from slimray.models.text.decoding import greedy

    source = verify.inputs_of(network, samples)[:2, 0].long()
    graphs, numbers = translation.graphs_of(network.net, source, f"{where}: run"), translation.counted(network, samples)
    ports, cached = translation.ports_of(graphs)

    def write(name: str, folder: Path) -> dict[str, Any]:
        row, runners, parts = FORMATS[name], {}, {}
        for part, graph in graphs.items():
            row.convert(graph, folder, [])
            file = (folder / row.file).rename(folder / f"{part}{Path(row.file).suffix}")
            runners[part] = row.load(file, job.threads, True)
            size, sha256 = digest(file)
            outputs = runners[part]([value.numpy() for value in graph.inputs.values()])
            parts[part] = {"file": file.name, "bytes": size, "sha256": sha256}
            parts[part] |= exported.described(graph, True, outputs)
        net = translation.ExportedTranslation(translation.speaker(runners, ports, cached)).eval()
        outside = replace(network, net=net)
        verification = {"samples": len(samples), **translation.compare(network, outside, samples)}
        verification |= {"metrics": translation.counted(outside, samples), "torch": dict(numbers)}
        verification["reason"] = _disagrees(job, network, row.precision, verification)
        verification["passed"] = not verification["reason"]
        one = source[:1, : int((source[0] != PAD).sum())]
        with settings(job.threads), torch.inference_mode():
            most = network.recipe["max_length"]
            pairs = verify.timed_pairs(
                lambda: greedy(net, one, most), lambda: greedy(network.net, one, most), job.pairs
            )
        files = {part["file"]: {"bytes": part["bytes"], "sha256": part["sha256"]} for part in parts.values()}
        return {
            "version": exported.VERSION,
            "format": name,
            **parts[translation.ENCODER],
            "step": parts[translation.STEP],
            "files": files,
            "precision": row.precision,
            "verification": verification,
            "timing": pairs.to_plain("export", "eager")
            | {"threads": job.threads, "warm_up": verify.WARM_UP, "batch": 1},
            "versions": row.versions(),
            "cpu": _cpu(),
        }

    return _Exporter(numbers, [], write)


def _graph(job: ExportJob, where: str, network: "Network", samples: "Samples") -> "Graph":
    """What is converted: the network as it is, or its step."""
    from slimray.export import graph, verify

    example = verify.inputs_of(network, samples)[:2]
    if job.online:
        return graph.step(network.net, example, f"{where}: online")
    return graph.whole(network.net, example, dict(modality_of(network.recipe).varying))


def _one(
    job: ExportJob,
    network: "Network",
    graph: "Graph",
    name: str,
    folder: Path,
    seen: "Samples",
    reference: "tuple[Samples, Outputs, Mapping[str, float]]",
    runners: dict[str, Any],
) -> dict[str, Any]:
    """Convert to one format in `folder`, run it, compare and time it: what export.json says."""
    import torch

    from slimray.compress.quantized import float_layers, with_float_inputs
    from slimray.edge.hardware import inference_energy
    from slimray.edge.runtimes import settings
    from slimray.export import exported, verify
    from slimray.export.formats import FORMATS

    row, (samples, expected, numbers) = FORMATS[name], reference
    if not row.varies or graph.states:
        graph = replace(graph, inputs={key: value[:1] for key, value in graph.inputs.items()}, varying={})
    if row.calibrated:  # its quantizer finds the ranges of inputs, whether they have some already or not
        floats = tuple(float_layers(graph.module))
        graph = replace(graph, module=with_float_inputs(copy.deepcopy(graph.module)), floats=floats)
    arrays = verify.calibration(graph, verify.inputs_of(network, seen)) if row.calibrated else []
    row.convert(graph, folder, arrays)
    runner = runners[name] = row.load(folder / row.file, job.threads, True)
    any_batch = row.varies and not graph.states
    ports = exported.ports_of(graph, any_batch)
    outside = replace(network, net=exported.ExportedNet(runner, ports).eval())
    found = verify.outputs_of(outside, samples)
    verification: dict[str, Any] = {
        "samples": len(samples),
        **verify.differences(found, expected),
        "metrics": verify.score(outside, samples, network.recipe),
        "torch": dict(numbers),
    }
    if _has_logits(network):
        verification["agreement"] = verify.agreement(found, expected)
    if row.calibrated and row.optimises:
        plain = exported.ExportedNet(row.load(folder / row.file, job.threads, False), ports).eval()
        as_written = verify.outputs_of(replace(network, net=plain), samples)
        verification["unoptimised"] = verify.differences(as_written, expected)
        if _has_logits(network):
            verification["unoptimised"] |= {
                "agreement": verify.agreement(as_written, expected),
                "agreement_optimised": verify.agreement(as_written, found),
            }
    if row.precision == "fp32" and verification["relative"] > _most(job, network):
        verification["float64"] = verify.from_float64(network, samples, found, expected)
    verification["reason"] = _disagrees(job, network, row.precision, verification)
    verification["passed"] = not verification["reason"]
    with torch.no_grad():
        example = tuple(value[:1] for value in graph.inputs.values())
    timing = verify.time_against_eager(graph, runner, graph.module, job.threads, job.pairs)
    like = runners.get(name.removesuffix("_int8"))
    if row.calibrated and like is not None:
        with settings(job.threads):
            inputs_ = [value.numpy() for value in example]
            pairs = verify.timed_pairs(lambda: runner(inputs_), lambda: like(inputs_), job.pairs)
        timing["against_fp32"] = pairs.to_plain("int8", "fp32")
    with settings(job.threads):
        bits, given = (8 if row.calibrated else 32), [value.numpy() for value in example]
        energy = inference_energy(graph.module, example, bits, lambda: runner(given))
    files = {}
    for file in (row.file, *row.files):
        size, sha256 = digest(folder / file)
        files[file] = {"bytes": size, "sha256": sha256}
    outputs = runner([value.numpy() for value in graph.inputs.values()])
    return {
        "version": exported.VERSION,
        "format": name,
        "file": row.file,
        "bytes": files[row.file]["bytes"],
        "sha256": files[row.file]["sha256"],
        "files": files,
        **exported.described(graph, any_batch, outputs),
        "precision": row.precision,
        "verification": verification,
        "timing": timing,
        "energy": energy,
        "versions": row.versions(),
        "cpu": _cpu(),
    }


def _has_logits(network: "Network") -> bool:
    from slimray.tasks import TASKS

    return TASKS[network.task].logits


def _most(job: ExportJob, network: "Network") -> float:
    """The largest difference from torch that an export in fp32 may have without being compared with float64."""
    from slimray.compress.quantized import rounds_inputs

    return max(job.max_difference, ROUNDED) if rounds_inputs(network.net) else job.max_difference


def _disagrees(job: ExportJob, network: "Network", precision: str, verification: Mapping[str, Any]) -> str:
    """Why an export does not agree with torch, in a sentence; "" if it does."""
    from slimray.export import verify
    from slimray.tasks import TASKS

    best = TASKS[network.task].best
    gap, agreement = verification["relative"], verification.get("agreement")
    if not gap < float("inf"):
        return "its outputs are not finite"
    if precision == "fp32":
        if sentence := verify.disagreement(verification, _most(job, network)):
            return sentence
        if agreement is not None and agreement < job.min_agreement:
            return f"answers as torch does {agreement:.2f} % of the time, less than {job.min_agreement:g} %"
    elif job.max_drop is not None:
        lost = verification["torch"][best.name] - verification["metrics"][best.name]
        lost = lost if best.better == "higher" else -lost
        if not lost <= job.max_drop:
            return f"loses {lost:.2f} of {best.name}, more than max_drop {job.max_drop:g}"
    return ""


def _row(facts: Mapping[str, Any], best: str) -> dict[str, Any]:
    """What tables tell of an export."""
    verification, timing, energy = facts["verification"], facts["timing"], facts.get("energy", {})
    row = {
        best: verification["metrics"].get(best),
        "relative": verification["relative"],
        "worst_sample": verification["worst_sample"],
        "max_abs": verification["max_abs"],
        "agreement": verification.get("agreement"),
        "unoptimised_agreement": verification.get("unoptimised", {}).get("agreement"),
        "mb": sum(one["bytes"] for one in facts["files"].values()) / 1e6,
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
    """A line about an export."""
    if "ms" not in row:
        return f"failed: {row['reason']}"
    agreed = f", the same answer {row['agreement']:.2f} % of the time" if "agreement" in row else ""
    speed = f"{row['ms']:.2f} ms, {row['ratio']:.2f} of eager torch [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    verdict = f"FAILED: {row['reason']}: " if row.get("reason") else ""
    return f"{verdict}{row['mb']:.2f} MB, relative difference {row['relative']:.1e}{agreed}, {speed}"


def _cpu() -> str:
    from slimray.edge import runtimes

    return f"{runtimes.cpu_name()} ({' '.join(runtimes.cpu_flags())})"


def _sentence(error: BaseException) -> str:
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if isinstance(error, RunFailed | UserError) else f"{type(error).__name__}: {text}"[:500]
