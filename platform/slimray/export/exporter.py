"""Exports a network to one format after another: converts it, compares it with torch on samples, and times it.

`exporter_of` takes a network in eval mode (`graph.ready`) and samples that were decoded once. A network that
classifies, labels or finds boxes is one graph, or with `online` the step of a causal TSM (arXiv 1811.08383); one that
answers token by token is an encoder and a step (`translation`). `Exporter.write` converts to one format in a folder and
returns the content of export.json, including the result of the verification. Surprising: it raises whatever a converter
raises.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from slimray.compress.quantized import float_layers, rounds_inputs, with_float_inputs
from slimray.data.modalities import modality_of
from slimray.data.text.vocabulary import PAD
from slimray.edge import runtimes
from slimray.edge.hardware import inference_energy
from slimray.export import exported, translation, verify
from slimray.export.exported import ExportedNet, Ports
from slimray.export.formats import FORMATS, Format, Runner
from slimray.export.graph import Graph, step, whole
from slimray.export.verify import Samples
from slimray.models.text.decoding import greedy
from slimray.runs.folder import digest
from slimray.tasks import TASKS
from slimray.tasks.network import Network

ROUNDED = 0.05  # allowed relative difference of a network with rounded inputs, which may round to either side


@dataclass(frozen=True)
class Wanted:
    """Requirements on an export, and how it is timed: fields of the job `export`."""

    max_difference: float
    """Largest relative difference from torch in fp32 (L2, all samples)."""
    min_agreement: float
    """Smallest percent of answers in fp32 that agree with torch."""
    max_drop: float | None
    """Largest loss of int8 in the task's first metric; None: no limit."""
    threads: int
    pairs: int

    def disagreement(self, network: Network, precision: str, verification: Mapping[str, Any]) -> str:
        """Return the reason, in a sentence, why an export of `precision` does not agree with torch; "" if it does."""
        best = TASKS[network.task].best
        gap, agreement = verification["relative"], verification.get("agreement")
        if not gap < float("inf"):
            return "its outputs are not finite"
        if precision == "fp32":
            if sentence := verify.disagreement(verification, self.most(network)):
                return sentence
            if agreement is not None and agreement < self.min_agreement:
                return f"agrees with torch on {agreement:.2f} % of the answers, less than {self.min_agreement:g} %"
        elif self.max_drop is not None:
            lost = verification["torch"][best.name] - verification["metrics"][best.name]
            lost = lost if best.better == "higher" else -lost
            if not lost <= self.max_drop:
                return f"loses {lost:.2f} of {best.name}, more than max_drop {self.max_drop:g}"
        return ""

    def judged(self, network: Network, precision: str, verification: dict[str, Any]) -> dict[str, Any]:
        """Return the verification with `reason` and `passed`."""
        reason = self.disagreement(network, precision, verification)
        return {**verification, "reason": reason, "passed": not reason}

    def most(self, network: Network) -> float:
        """Return the largest difference from torch in fp32 that is accepted without a comparison with float64."""
        return max(self.max_difference, ROUNDED) if rounds_inputs(network.net) else self.max_difference


class Exporter(Protocol):
    """A network that can be written in several formats."""

    numbers: Mapping[str, float]
    """Metrics of the network in torch on the samples."""
    states: list[dict[str, Any]]
    """States that a step hands on, as listed in export.json."""

    def write(self, name: str, folder: Path) -> dict[str, Any]:
        """Convert to the format `name` in `folder`, verify and time it; return the content of export.json."""
        ...


def exporter_of(
    network: Network, samples: Samples, seen: Samples, wanted: Wanted, online: bool, where: str
) -> Exporter:
    """Return the exporter of a network; it is compared and scored on `samples`, and int8 is calibrated on `seen`.

    Raises UserError, with `where`, for a network that has no step although one is needed.
    """
    if TASKS[network.task].stepwise:
        return _Translation(network, samples, wanted, where)
    return _Whole(network, samples, seen, wanted, online, where)


class _Whole:
    """Exporter of a network that is a single graph in all formats."""

    def __init__(self, network: Network, samples: Samples, seen: Samples, wanted: Wanted, online: bool, where: str):
        self.network, self.samples, self.seen, self.wanted = network, samples, seen, wanted
        example = verify.inputs_of(network, samples)[:2]
        varying = dict(modality_of(network.recipe).varying)
        net = network.net
        self.graph = step(net, example, f"{where}: online") if online else whole(net, example, varying)
        self.expected = verify.outputs_of(network, samples)
        self.numbers: Mapping[str, float] = verify.score(network, samples, network.recipe)
        self.states = [{**vars(state), "shape": list(state.shape)} for state in self.graph.states]
        self.runners: dict[str, Runner] = {}
        self.logits = TASKS[network.task].logits

    def write(self, name: str, folder: Path) -> dict[str, Any]:
        """See `Exporter`."""
        row = FORMATS[name]
        graph, any_batch = self._graph_for(row), row.varies and not self.graph.states
        calibration = verify.calibration(graph, verify.inputs_of(self.network, self.seen)) if row.calibrated else []
        row.convert(graph, folder, calibration)
        runner = self.runners[name] = row.load(folder / row.file, self.wanted.threads, True)
        ports = exported.ports_of(graph, any_batch)
        files = _files(folder, (row.file, *row.files))
        outputs = runner([value.numpy() for value in graph.inputs.values()])
        return {
            **_origin(name, row),
            "file": row.file,
            **files[row.file],
            "files": files,
            **exported.described(graph, any_batch, outputs),
            "verification": self._verified(row, folder, runner, ports),
            **self._costs(name, graph, runner),
        }

    def _graph_for(self, row: Format) -> Graph:
        """Return the graph as a format needs it: one sample if sizes are fixed, float inputs if it is calibrated."""
        graph = self.graph
        if not row.varies or graph.states:
            graph = replace(graph, inputs={key: value[:1] for key, value in graph.inputs.items()}, varying={})
        if row.calibrated:  # its quantizer determines the ranges of inputs, even if some are already set
            floats = tuple(float_layers(graph.module))
            graph = replace(graph, module=with_float_inputs(copy.deepcopy(graph.module)), floats=floats)
        return graph

    def _verified(self, row: Format, folder: Path, runner: Runner, ports: Ports) -> dict[str, Any]:
        """Return the comparison of the export with torch on the samples."""
        network, expected = self.network, self.expected
        outside = replace(network, net=ExportedNet(runner, ports).eval())
        found = verify.outputs_of(outside, self.samples)
        out: dict[str, Any] = {"samples": len(self.samples), **verify.differences(found, expected)}
        out |= {"metrics": verify.score(outside, self.samples, network.recipe), "torch": dict(self.numbers)}
        if self.logits:
            out["agreement"] = verify.agreement(found, expected)
        if row.calibrated and row.optimises:
            plain = ExportedNet(row.load(folder / row.file, self.wanted.threads, False), ports).eval()
            as_written = verify.outputs_of(replace(network, net=plain), self.samples)
            out["unoptimised"] = verify.differences(as_written, expected)
            if self.logits:
                out["unoptimised"] |= {
                    "agreement": verify.agreement(as_written, expected),
                    "agreement_optimised": verify.agreement(as_written, found),
                }
        if row.precision == "fp32" and out["relative"] > self.wanted.most(network):
            out["float64"] = verify.from_float64(network, self.samples, found, expected)
            out["close"] = verify.close(found, expected, self.wanted.most(network))
        return self.wanted.judged(network, row.precision, out)

    def _costs(self, name: str, graph: Graph, runner: Runner) -> dict[str, Any]:
        """Return latency (alternating with torch and, for int8, with fp32) and energy of one sample or frame."""
        row, wanted = FORMATS[name], self.wanted
        example = tuple(value[:1] for value in graph.inputs.values())
        arrays = [value.numpy() for value in example]
        timing = verify.time_against_eager(graph, runner, graph.module, wanted.threads, wanted.pairs)
        fp32 = self.runners.get(name.removesuffix("_int8"))
        with runtimes.settings(wanted.threads):
            if row.calibrated and fp32 is not None:
                pairs = verify.timed_pairs(lambda: runner(arrays), lambda: fp32(arrays), wanted.pairs)
                timing["against_fp32"] = pairs.to_plain("int8", "fp32")
            bits = 8 if row.calibrated else 32
            energy = inference_energy(graph.module, example, bits, lambda: runner(arrays))
        return {"timing": timing, "energy": energy}


class _Translation:
    """Exporter of an encoder and a decoder step with caches, which are two files in each format."""

    def __init__(self, network: Network, samples: Samples, wanted: Wanted, where: str):
        self.network, self.samples, self.wanted = network, samples, wanted
        self.source = verify.inputs_of(network, samples)[:2, 0].long()
        self.graphs = translation.graphs_of(network.net, self.source, f"{where}: run")
        self.numbers: Mapping[str, float] = translation.counted(network, samples)
        self.states: list[dict[str, Any]] = []

    def write(self, name: str, folder: Path) -> dict[str, Any]:
        """See `Exporter`."""
        row, runners, parts = FORMATS[name], dict[str, Runner](), dict[str, dict[str, Any]]()
        for part, graph in self.graphs.items():
            row.convert(graph, folder, [])
            file = (folder / row.file).rename(folder / f"{part}{Path(row.file).suffix}")
            runners[part] = row.load(file, self.wanted.threads, True)
            outputs = runners[part]([value.numpy() for value in graph.inputs.values()])
            parts[part] = {"file": file.name, **_files(folder, (file.name,))[file.name]}
            parts[part] |= exported.described(graph, True, outputs)
        speaker = translation.speaker(runners, *translation.ports_of(self.graphs))
        outside = replace(self.network, net=translation.ExportedTranslation(speaker).eval())
        return {
            **_origin(name, row),
            **parts[translation.ENCODER],
            "step": parts[translation.STEP],
            "files": _files(folder, tuple(part["file"] for part in parts.values())),
            "verification": self._verified(row, outside),
            "timing": self._timed(outside),
        }

    def _verified(self, row: Format, outside: Network) -> dict[str, Any]:
        """Return the comparison of the export with torch on the samples."""
        out = {"samples": len(self.samples), **translation.compare(self.network, outside, self.samples)}
        out |= {"metrics": translation.counted(outside, self.samples), "torch": dict(self.numbers)}
        return self.wanted.judged(self.network, row.precision, out)

    def _timed(self, outside: Network) -> dict[str, Any]:
        """Return the latency of decoding one sentence greedily, alternating with torch."""
        one = self.source[:1, : int((self.source[0] != PAD).sum())]
        most, net = self.network.recipe["max_length"], self.network.net
        with runtimes.settings(self.wanted.threads), torch.inference_mode():
            pairs = verify.timed_pairs(
                lambda: greedy(outside.net, one, most), lambda: greedy(net, one, most), self.wanted.pairs
            )
        given = {"threads": self.wanted.threads, "warm_up": verify.WARM_UP, "batch": 1}
        return pairs.to_plain("export", "eager") | given


def cpu() -> str:
    """Return the name of this processor and its instructions for small integers, for export.json."""
    return f"{runtimes.cpu_name()} ({' '.join(runtimes.cpu_flags())})"


def _origin(name: str, row: Format) -> dict[str, Any]:
    return {
        "version": exported.VERSION,
        "format": name,
        "precision": row.precision,
        "versions": row.versions(),
        "cpu": cpu(),
    }


def _files(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of files, by name."""
    found = {name: digest(folder / name) for name in names}
    return {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in found.items()}
