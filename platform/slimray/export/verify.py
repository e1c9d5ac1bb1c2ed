"""Verification of an export: its outputs on real samples compared with torch, and its latency.

In: the network in torch, the same exported, samples that were decoded once. Out: plain values for export.json:
differences, agreement of the likeliest class for logits, the task's metrics of both, and latencies measured alternately
with torch. Surprising: relative differences use the L2 norm over all samples, with the worst sample reported
separately, because networks that sort points into voxels may put a point on an edge into the neighbouring voxel.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimray.data.modalities import modality_of, pads_of, read_recipe
from slimray.data.ragged import joined
from slimray.data.samples import BadSample
from slimray.edge import runtimes
from slimray.export.graph import Graph
from slimray.runtime.pairs import Pairs, alternate
from slimray.spec import RunFailed
from slimray.tasks import TASKS
from slimray.tasks.evaluation import Samples, Setting
from slimray.tasks.network import Network, predict_outputs, to_input
from slimray.tasks.task import Outputs

ROWS = 8  # samples per forward pass
ROUNDINGS = 3  # an export sums in another order than torch and may be this many times as far from the exact values
WARM_UP = 3


def read_samples(table: Any, root: str, recipe: dict[str, Any], count: int, seed: int, timeout_s: float) -> Samples:
    """Return `count` decoded samples, spread evenly over an index; those that cannot be decoded are left out.

    Raises RunFailed if none can be decoded.
    """
    modality, read = modality_of(recipe), read_recipe(recipe)
    numbers = np.unique(np.linspace(0, table.num_rows - 1, min(count, table.num_rows)).round().astype(int))
    data, targets, paths, kept = [], [], [], []
    for number in map(int, numbers):
        row = table.slice(number, 1).to_pylist()[0]
        try:
            sample, target = modality.load(row, root, read, (seed, 0, number), timeout_s)
        except BadSample:
            continue
        for values, value in zip((data, targets, paths, kept), (sample, target, row["path"], number), strict=True):
            values.append(value)
    if not data:
        raise RunFailed(f"none of {len(numbers)} samples can be decoded")
    fill, no_target = pads_of(recipe)
    rows, wanted = ([np.asarray(one)[None] for one in values] for values in (data, targets))
    return Samples(joined(rows, fill), joined(wanted, no_target), paths, kept)


def score(network: Network, samples: Samples, recipe: dict[str, Any]) -> dict[str, float]:
    """Return the task's metrics of a network on samples."""
    task = TASKS[network.task]
    current = task.start(Setting(task, network, recipe, lambda: samples.paths, len(samples), ROWS))
    for start in range(0, len(samples), ROWS):
        part = slice(start, start + ROWS)
        current.take(replace(samples, **{name: getattr(samples, name)[part] for name in vars(samples)}))
        current.settle(start // ROWS, 1)
    return {name: float(value) for name, value in current.result().items() if isinstance(value, int | float)}


def outputs_of(network: Network, samples: Samples) -> Outputs:
    """Return the outputs of a network for samples, averaged over views."""
    return predict_outputs(network.net, samples.data, network.pixels, network.device, ROWS)


def differences(found: Outputs, expected: Outputs) -> dict[str, float]:
    """Return `max_abs`, `relative` (L2) and `worst_sample` (L2 of a single sample), each the largest of all outputs."""
    out = {"max_abs": 0.0, "relative": 0.0, "worst_sample": 0.0}
    for one, other in _pairs(found, expected):
        gaps, norms = _distances(one, other)
        values = {
            "max_abs": float((one - other).abs().max()),
            "relative": float(gaps.norm() / norms.norm()),
            "worst_sample": float((gaps / norms).max()),
        }
        out = {name: max(out[name], value) if value == value else float("nan") for name, value in values.items()}
    return out


def close(found: Outputs, expected: Outputs, most: float) -> float:
    """Return the percent of samples with no output further from torch than `most` (relative, L2).

    A network with internal decisions (such as which points form a box) amplifies rounding only in samples near a
    decision boundary, whereas a converter's fault shows in most samples.
    """
    near = [gaps <= most * norms for gaps, norms in (_distances(*pair) for pair in _pairs(found, expected))]
    return 100 * float(torch.stack(near).all(0).double().mean())


def _pairs(found: Outputs, expected: Outputs) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of outputs and expected outputs, in float64."""
    if isinstance(found, Tensor) or isinstance(expected, Tensor):
        return [(found.double(), expected.double())]  # type: ignore[union-attr]
    return [(found[name].double(), expected[name].double()) for name in expected]


def _distances(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the L2 distance of each sample, and the norm of `other`."""
    return (one - other).flatten(1).norm(dim=1), other.flatten(1).norm(dim=1).clamp_min(1e-12)


def from_float64(network: Network, samples: Samples, found: Outputs, expected: Outputs) -> dict[str, float]:
    """Return the distances (relative, L2) of an export and of torch from the same network computed in float64."""
    exact, before = copy.deepcopy(network.net).double(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # for inputs, and for tensors that networks create
    try:
        judge = outputs_of(replace(network, net=exact), samples)
    finally:
        torch.set_default_dtype(before)
    return {name: differences(one, judge)["relative"] for name, one in (("export", found), ("torch", expected))}


def disagreement(verification: Mapping[str, Any], most: float) -> str:
    """Return a sentence if an export is further from torch (`relative`) than `most` and than rounding explains, or "".

    Deep networks amplify float32 rounding, so beyond `most` the distances from `float64`, if measured, decide: an
    export may be up to ROUNDINGS times as far from float64 as torch is by rounding alone.
    """
    gap, exact = verification["relative"], verification.get("float64")
    if gap <= most or (exact is not None and exact["export"] <= max(most, ROUNDINGS * exact["torch"])):
        return ""
    sentence = f"differs from torch by {gap:.1e} (relative), more than max_difference {most:g}"
    if "close" in verification:
        sentence += f", {100 - verification['close']:.3g} % of the samples by more than that"
    if exact is None:
        return sentence
    return f"{sentence}, and from float64 by {exact['export']:.1e}, torch by {exact['torch']:.1e}"


def agreement(found: Outputs, expected: Outputs) -> float:
    """Return the percent of answers in which the likeliest class, over dimension 1, is the same."""
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        raise TypeError("agreement on a class needs logits, not several outputs")
    return 100 * float((found.argmax(1) == expected.argmax(1)).double().mean())


def inputs_of(network: Network, samples: Samples) -> Tensor:
    """Return the first view of each sample as input of the network."""
    return to_input(samples.data[:, :1], network.pixels, torch.device("cpu"))


@torch.no_grad()
def calibration(graph: Graph, inputs: Tensor) -> list[list[np.ndarray]]:
    """Return the calibration arrays of an int8 quantizer: by sample, or, for a step, by frame with its states."""
    if not graph.states:
        return [[one[None].numpy()] for one in inputs]
    found = []
    for clip in inputs:
        states: Sequence[Tensor] = [torch.zeros(state.shape) for state in graph.states]
        for frame in clip:
            found.append([frame[None].numpy(), *(state.numpy() for state in states)])
            _, *states = graph.module(frame[None], *states)
    return found


def timed_pairs(a: Callable[[], Any], b: Callable[[], Any], pairs: int, repeats: int = 3) -> Pairs:
    """Time `a` and `b` alternately, in ms, `pairs` times after WARM_UP rounds; takes the fastest of `repeats` calls."""

    def once(call: Callable[[], Any]) -> float:
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
        return 1e3 * best

    for call in (a, b) * WARM_UP:
        call()
    return alternate(lambda: once(a), lambda: once(b), pairs)


def time_against_eager(graph: Graph, runner: Any, module: nn.Module, threads: int, pairs: int) -> dict[str, Any]:
    """Return the latency of one sample, or frame, in the exported network compared with the module in eager torch."""
    tensors = tuple(value[:1] for value in graph.inputs.values())
    arrays = [np.ascontiguousarray(value.numpy()) for value in tensors]

    def eager() -> None:
        with torch.inference_mode():
            module(*tensors)

    with runtimes.settings(threads):
        measured = timed_pairs(lambda: runner(arrays), eager, pairs)
    return measured.to_plain("export", "eager") | {"threads": threads, "warm_up": WARM_UP, "batch": 1}
