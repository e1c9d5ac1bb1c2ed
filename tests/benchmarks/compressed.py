"""A TSM on generated clips and a PVCNN on generated shapes, pruned to half of the MACs, and in int8.

`python -m tests.benchmarks compressed`: for every seed the network is trained and pruned (`slimray.compress.prune`),
and the pruned network is trained further with the whole one as teacher. Latency is measured in ONNX Runtime, one
thread, one sample, whole and pruned in turn. int8 is what `slimray export` writes (onnx_int8, executorch_int8),
calibrated on training samples, scored on the test samples in its own runtime and timed against the same format in
float; ResNet-20 and ResNet-50 are timed in the same way, with seeded weights. The gain that the tool itself reports is
printed with each. Weights and results are kept in `SLIMRAY_BENCH_DIR`: what is there is not computed again.
`SLIMRAY_NETS=clips`, `SLIMRAY_SEEDS=0` (default "0 1 2") and `SLIMRAY_FORMATS=onnx` select a part.
"""

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import safetensors.torch
import torch
from tests.benchmarks import shrinking
from torch import Tensor, nn

from slimray import compress, models
from slimray.data.modalities import input_shape
from slimray.edge import comparing, cost, runtimes
from slimray.export import exported, graph, verify
from slimray.export.formats import FORMATS
from slimray.tasks import TASKS
from slimray.tasks.classify import ClassScore
from slimray.tasks.network import Input, to_input
from slimray.tasks.segment import SegmentationScore
from slimray.train.methods.distilled import Distilled, DistilledReplica
from slimray.train.methods.method import Setup
from slimray.train.methods.plain import PlainReplica
from slimray.train.spec import OptimSpec
from slimray.verbs import compressing

SHARE, PAIRS, CALIBRATED = 0.5, 11, 64
INT8 = tuple(os.environ.get("SLIMRAY_FORMATS", "onnx,executorch").split(","))
ROUND_TO = 16  # what a vector of the processor holds: other numbers of channels are computed as if they were more
SCORES = {"classify": ClassScore, "segment": SegmentationScore}
TIMED_ONLY = {"resnet20": (32, {"num_classes": 10}), "resnet50": (224, {"num_classes": 100})}


@dataclass(frozen=True, eq=False)
class Case:
    """A network, its data, samples in a batch; epochs and rates of training and of fine-tuning."""

    data: Callable[[Any], shrinking.Data]
    setting: str
    task: str
    model: dict[str, Any]
    batch: int
    epochs: tuple[int, int]
    rates: tuple[float, float]


CASES = {
    "clips": Case(
        shrinking.clips,
        "clips",
        "classify",
        {"name": "tsm_resnet18", "width": 0.5, "num_segments": 8},
        16,
        (8, 5),
        (0.004, 0.001),
    ),
    "clouds": Case(
        shrinking.points,
        "points",
        "segment",
        {"name": "pvcnn_s3dis", "in_channels": 3, "width": 0.5, "voxel": 0.25},
        8,
        (40, 40),  # after 16 it is half trained, mIoU 59 to 69 %; pruned it needs as long: after half of it -1.9 points
        (0.008, 0.004),
    ),
}


def folder() -> Path:
    return Path(os.environ.get("SLIMRAY_BENCH_DIR", Path(tempfile.gettempdir()) / "slimray-bench"))


def kept(path: Path, make: Callable[[], nn.Module], net: nn.Module) -> nn.Module:
    """`net` with the weights at `path`, which are those of `make()` where there are none yet."""
    if not path.exists():
        state = {name: value.contiguous() for name, value in make().state_dict().items()}
        safetensors.torch.save_file(state, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    net.load_state_dict(safetensors.torch.load_file(path))
    return net.eval()


class Seed:
    """Everything of a case with one seed."""

    def __init__(self, name: str, seed: int):
        self.case, self.seed = CASES[name], seed
        job, batch = shrinking.SETTINGS[self.case.setting].of_seed(seed), self.case.batch
        self.job = job.model_copy(update={"batch": job.batch.model_copy(update={"total": batch, "per_worker": batch})})
        self.data = self.case.data(self.job)
        said = json.dumps([self.case.model, batch, self.case.epochs, self.case.rates, SHARE, ROUND_TO])
        self.path = folder() / f"compressed-{name}-{hashlib.sha256(said.encode()).hexdigest()[:8]}-{seed}"
        self.task = TASKS[self.case.task]
        samples = [self.data.test(i) for i in range(self.data.num_test)]
        self.x = torch.cat([to_input(x[None], Input(), torch.device("cpu")) for x, _ in samples])
        self.labels = torch.stack([torch.as_tensor(y) for _, y in samples])
        seen = [self.data.train(i, (seed, 0, i))[0] for i in range(CALIBRATED)]
        self.seen = torch.cat([to_input(x[None], Input(), torch.device("cpu")) for x in seen])

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return models.build(**self.case.model, num_classes=self.data.num_classes)

    def train(self, net: nn.Module, teacher: nn.Module | None) -> nn.Module:
        part = teacher is not None
        optim = OptimSpec.model_validate(
            {**shrinking.OPTIM, "reference_batch": 16, "epochs": self.case.epochs[part], "lr": self.case.rates[part]}
            | {"warmup_epochs": 0 if part else 1}
        )
        setup = Setup(optim, Input(), input_shape(self.data.recipe), torch.device("cpu"), task=self.task)
        replica = PlainReplica(net, setup)
        if teacher is not None:
            replica = DistilledReplica(net, teacher, Distilled("", temperature=2.0), setup)
        shrinking.fit(replica, self.data, optim, self.job, self.seed + 100 * part)
        return replica.averaged()

    @torch.no_grad()
    def score(self, net: Callable[[Tensor], Any]) -> float:
        """The first metric of the task on the test samples, in percent."""
        score = SCORES[self.case.task](self.data.num_classes)
        for x, labels in zip(self.x.split(8), self.labels.split(8), strict=True):
            score.add(net(x), labels)
        return float(score.result()[self.task.best.name])

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """The whole network and the pruned one, both trained."""
        whole = kept(self.path.with_suffix(".whole.safetensors"), lambda: self.train(self.build(), None), self.build())
        macs = cost.count_macs(whole, (1, *self.x.shape[1:]))
        limits = {"macs": SHARE * macs}
        cut = compress.prune(whole, self.x[:2], limits=limits, criterion="group", round_to=ROUND_TO)
        print("\n".join(f"  {line}" for line in str(cut).splitlines()), flush=True)
        trained = self.path.with_suffix(".pruned.safetensors")
        return whole, kept(trained, lambda: self.train(copy.deepcopy(cut.net), whole), cut.net)


def one_format(name: str, net: nn.Module, example: Tensor, seen: Tensor) -> tuple[Any, Any]:
    """The network in a format: the module that runs it, and its runner on arrays."""
    row, one = FORMATS[name], graph.whole(graph.ready(net), example, {})
    if not row.varies:
        one = replace(one, inputs={key: value[:1] for key, value in one.inputs.items()}, varying={})
    with tempfile.TemporaryDirectory() as scratch:
        row.convert(one, Path(scratch), verify.calibration(one, seen) if row.calibrated else [])
        runner = row.load(Path(scratch, row.file), 1, True)
    return exported.ExportedNet(runner, exported.ports_of(one, row.varies)).eval(), runner


def int8(
    net: nn.Module, x: Tensor, seen: Tensor, score: Callable[[Any], float] | None, formats: tuple[str, ...] = INT8
) -> dict[str, Any]:
    """Of each format in int8 its score, and how many times as fast as the same format in float it is."""
    out: dict[str, Any] = {}
    array = [x[:1].numpy()]
    for name in formats:
        try:
            _, plain = one_format(name, net, x[:2], seen)
            small, rounded = one_format(f"{name}_int8", net, x[:2], seen)
        except Exception as error:  # noqa: BLE001  the reason is the result
            out[name] = {"reason": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]}"}
            continue
        with runtimes.settings(1):
            pairs = verify.timed_pairs(lambda: plain(array), lambda: rounded(array), PAIRS)  # noqa: B023
        out[name] = {"ratio": pairs.ratio, "low": pairs.interval[0], "high": pairs.interval[1]}
        out[name] |= {} if score is None else {"metric": score(small)}
        if name == "onnx":
            told = {"speedup": pairs.ratio, "speedup_low": pairs.interval[0], "speedup_high": pairs.interval[1]}
            print(f"  int8 in ONNX Runtime: {compressing.verdict(told)}", flush=True)
    return out


def one_seed(name: str, seed: int) -> dict[str, Any]:
    """The row of a case and a seed, measured or found."""
    this = Seed(name, seed)
    path = this.path.with_suffix(".json")
    if path.exists():
        return json.loads(path.read_text())
    whole, pruned = this.networks()
    macs = [cost.count_macs(net, (1, *this.x.shape[1:])) for net in (whole, pruned)]
    row: dict[str, Any] = {"macs": macs, "whole": this.score(whole), "pruned": this.score(pruned)}
    row["latency"] = comparing.compare(whole, pruned, this.x[:1], "cpu-onnx", 1, PAIRS)
    told = {f"speedup{key}": row["latency"][of] for key, of in (("", "ratio"), ("_low", "low"), ("_high", "high"))}
    print(f"  pruned: {compressing.verdict(told)}", flush=True)
    made = compress.quantize(whole, this.x[:2], list(this.seen.split(8)))
    row["quantized"] = this.score(made.net)
    row["int8"] = {
        what: int8(net, this.x, this.seen, this.score) for what, net in zip(("whole", "pruned"), (whole, pruned))
    }
    path.write_text(json.dumps(row))
    return row


def _shown(values: list[float]) -> str:
    error = f" +- {stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{mean(values):+.2f}{error}"


def timed_only(name: str) -> dict[str, Any]:
    """The latency of int8 for a network of MODELS with seeded weights."""
    side, options = TIMED_ONLY[name]
    torch.manual_seed(0)
    x = torch.randn(8, 3, side, side)
    net = models.build(name, **options)
    with torch.no_grad():
        net.train()(x)
    return int8(net.eval(), x, x, None, ("onnx",))


def main() -> None:
    """Print a line per seed, and means with their standard errors."""
    torch.set_num_threads(1)
    folder().mkdir(parents=True, exist_ok=True)
    print(f"{runtimes.cpu_name()} ({' '.join(runtimes.cpu_flags())}), one thread", flush=True)
    chosen = os.environ.get("SLIMRAY_NETS", ",".join([*CASES, *TIMED_ONLY])).split(",")
    seeds = [int(seed) for seed in os.environ.get("SLIMRAY_SEEDS", "0 1 2").split()]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES if name in chosen}
    for seed in seeds:
        for name, found in rows.items():
            print(f"{name}, seed {seed}", flush=True)
            found.append(one_seed(name, seed))
            print(f"  {json.dumps(found[-1])}", flush=True)
    for name, found in rows.items():
        print(f"{name}: whole {mean(r['whole'] for r in found):.2f}, MACs {found[0]['macs']}", flush=True)
        print(f"  pruned {_shown([r['pruned'] - r['whole'] for r in found])} points")
        print(f"  quantize {_shown([r['quantized'] - r['whole'] for r in found])} points")
        print(f"  latency {[round(r['latency']['ratio'], 2) for r in found]}")
        for what in ("whole", "pruned"):
            for form in INT8:
                tried = [r["int8"][what][form] for r in found]
                if all("metric" in one for one in tried):
                    lost = [one["metric"] - r[what] for one, r in zip(tried, found, strict=True)]
                    print(f"  {what}, {form} int8: {_shown(lost)} points, {[round(one['ratio'], 2) for one in tried]}")
    for name in TIMED_ONLY:
        if name in chosen:
            print(f"{name}: {json.dumps(timed_only(name))}", flush=True)
