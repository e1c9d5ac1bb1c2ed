"""A network for a microcontroller that detects people: `jobs/visual_wake_words.yaml` on shared pictures, three seeds.

The job's supernet is shrunk and searched, and the subnet found is trained further, with the job's settings (one
process, no Ray; subnets scored on pictures held out of shrinking). It is scored on the last quarter of each class's
files, before and after the further training, exported in int8, then scored and sized again. Beside it: MLPerf Tiny's
MobileNetV1 0.25 for the same task, trained on COCO, on the same pictures. Weights and lines of JSON are kept in
`SLIMRAY_BENCH_DIR`: what is there is not computed again. `python -m tests.benchmarks.people_search 0` runs one seed;
`EPOCHS="9 5 5"` sets other epochs than the job's for the teacher, for shrinking and for the further training.
"""

import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from PIL import Image
from tests.benchmarks import shrinking
from tests.benchmarks.tflite import layers
from torch import Tensor, nn

from slimray.arch import Arch
from slimray.data.images.pictures import ImageRecipe, make_image
from slimray.data.modalities import input_shape
from slimray.data.spec import DataSpec
from slimray.data.video.clips import generators
from slimray.edge import cost
from slimray.edge.arch_costs import Prices
from slimray.export import graph
from slimray.export.exported import ExportedNet, ports_of
from slimray.export.formats import FORMATS
from slimray.search.problem import Problem
from slimray.search.strategies import search
from slimray.tasks.network import to_input
from slimray.train import batchnorm, learn
from slimray.train.methods.method import Setup
from slimray.train.methods.plain import PlainReplica
from slimray.verbs.search import SearchJob
from slimray.verbs.shrink import ShrinkJob
from slimray.verbs.specs import TrainJob

JOB = Path(__file__).resolve().parents[2] / "jobs/visual_wake_words.yaml"
SEEDS = (0, 1, 2)
CALIBRATED = 160  # pictures that int8 is calibrated on
CLASSES = ("no_person", "person")
Picture = tuple[np.ndarray, int]


@functools.cache
def pictures() -> tuple[list[Picture], list[Picture]]:
    """Those to train with and the last quarter of each class, to test with: near duplicates have numbers nearby."""
    train: list[Picture] = []
    test: list[Picture] = []
    for label, name in enumerate(CLASSES):
        files = sorted((shrinking._shared() / "data/images/person" / name).iterdir())
        found = [(np.asarray(Image.open(file).convert("RGB")), label) for file in files]
        cut = len(found) * 3 // 4
        train, test = train + found[:cut], test + found[cut:]
    return train, test


def data(section: DataSpec, seed: int, hold_out: int) -> shrinking.Data:
    """The pictures as a job's recipe makes samples of them, `hold_out` of them kept out of training."""
    train, test = pictures()
    order = np.random.default_rng(seed).permutation(len(train))
    held, kept = order[:hold_out], order[hold_out:]
    images, size = section.images, int(section.size)
    varied = ImageRecipe(
        size, size, "train", 1, images.area, images.ratio, images.brightness, images.saturation, flip=True
    )
    plain = ImageRecipe(size, size, "val")

    def one(picture: Picture, recipe: ImageRecipe, key: shrinking.Key) -> shrinking.Sample:
        return make_image(picture[0], recipe, generators(key)[1])[0], picture[1]

    return shrinking.Data(
        varied.to_dict(),
        len(CLASSES),
        len(kept),
        len(held),
        len(test),
        lambda i, key: one(train[kept[i]], varied, key),
        lambda i: one(train[held[i]], plain, (0, 0, 0)),
        lambda i: one(test[i], plain, (0, 0, 0)),
    )


def jobs(seed: int) -> tuple[ShrinkJob, SearchJob, TrainJob]:
    """The documents of the shipped job."""
    shrink, found, train, _ = yaml.safe_load_all(JOB.read_text())
    parts = [*shrink["stages"], train["optim"]]
    for part, epochs in zip(parts, os.environ.get("EPOCHS", "").split(), strict=False):
        part["epochs"] = int(epochs)
    given = {"seed": seed}
    return (
        ShrinkJob.model_validate(shrink | given),
        SearchJob.model_validate(found | given),
        TrainJob.model_validate(train | given),
    )


def keep(seed: int) -> shrinking.Keep:
    """Keeps the weights of stages as files."""

    def kept(stage: str, make: Any) -> dict[str, torch.Tensor]:
        path = shrinking.folder() / f"people-{seed}-{stage}.safetensors"
        if not path.exists():
            tensors = {key: value.contiguous() for key, value in make().items()}
            safetensors.torch.save_file(tensors, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        return safetensors.torch.load_file(path)

    return kept


def results() -> Path:
    return shrinking.folder() / "people.jsonl"


def one_seed(seed: int) -> None:
    """Shrink, search, train on, export and score with a seed."""
    job, wanted, training = jobs(seed)
    samples = data(job.data, seed, job.hold_out)
    *_, (_, net) = shrinking.shrink(job, samples, keep(seed))
    held, judge = shrinking.Judge(samples, job, held=True), shrinking.Judge(samples, job)
    prices = Prices(cost.build_on_meta(lambda: shrinking.build(job, samples)))
    limits = dict(wanted.targets[0].limits)
    problem = Problem(prices.table, prices.matrix(list(limits)), limits)

    def score(codes: np.ndarray) -> np.ndarray:
        return np.array([held.score(net.extract(arch), arch) for arch in prices.table.archs(codes)])

    def find() -> dict[str, Any]:
        found = search(problem, wanted.strategy, score, seed)
        return {"arch": found.top(1).trials(prices.table)[0].arch.to_dict(), "searched": float(found.metric.max())}

    found = noted(seed, "found", find)
    arch = Arch.from_dict(found["arch"])
    row = {"seed": seed, "limits": limits, **prices.arch_costs(arch), **prices.in_int8(arch), **found}
    row["top1 as found"] = judge.score(net.extract(arch), arch)
    at_size = data(training.data.at_size(int(arch["resolution"])), seed, 0)

    def trained() -> dict[str, Tensor]:
        part = batchnorm.recalibrate_norms(
            net.extract(arch), (learn.fit_input(x, net.space, arch) for x in judge.inputs)
        )
        setup = Setup(training.optim, shrinking.PIXELS, input_shape(at_size.recipe), shrinking.DEVICE)
        replica = PlainReplica(part, setup)
        shrinking.fit(replica, at_size, training.optim, training, seed)
        return dict(replica.averaged().state_dict())

    plain = net.extract(arch)
    plain.load_state_dict(keep(seed)("trained", trained))
    row |= shipped(plain.eval(), at_size)
    with results().open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def noted(seed: int, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, kept as a file."""
    path = shrinking.folder() / f"people-{seed}-{name}.json"
    if not path.exists():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def shipped(net: nn.Module, samples: shrinking.Data) -> dict[str, float]:
    """Top-1 of the network on the test pictures, and top-1 and bytes of its int8 files."""

    def inputs(made: list[shrinking.Sample]) -> tuple[Tensor, Tensor]:
        x = to_input(np.stack([one for one, _ in made]), shrinking.PIXELS, shrinking.DEVICE)
        return x, torch.tensor([label for _, label in made])

    x, labels = inputs([samples.test(i) for i in range(samples.num_test)])
    seen, _ = inputs([samples.train(i, (0, 0, i)) for i in range(CALIBRATED)])
    out = {"top1": accuracy(net, x, labels)}
    for form in ("onnx_int8", "executorch_int8"):
        row, one = FORMATS[form], graph.whole(graph.ready(net), x[:2], {})
        if not row.varies:
            one = graph.Graph(one.module, {"input": x[:1]}, one.outputs)
        with tempfile.TemporaryDirectory() as folder:
            row.convert(one, Path(folder), [[picture[None].numpy()] for picture in seen])
            size = sum(Path(folder, file).stat().st_size for file in (row.file, *row.files))
            outside = ExportedNet(row.load(Path(folder, row.file), 1, True), ports_of(one, row.varies))
            out |= {f"{form} top1": accuracy(outside, x, labels), f"{form} bytes": float(size)}
    return out


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of the test pictures that get their class."""
    found = torch.cat([net(part) for part in x.split(32)]).argmax(1)
    return 100 * float((found == y).double().mean())


def mlperf() -> float:
    """The same of MLPerf Tiny's float network, whose inputs are pixels of 0 to 1."""
    data = (shrinking._shared() / "data/models/mlperf_tiny/vww_96_float.tflite").read_bytes()
    _, test = pictures()
    x = torch.from_numpy(np.stack([pixels for pixels, _ in test])).permute(0, 3, 1, 2).float() / 255
    return accuracy(nn.Sequential(*layers(data)).eval(), x, torch.tensor([y for _, y in test]))


def main(seeds: tuple[int, ...] = SEEDS) -> None:
    """Print what each seed found, and the means."""
    torch.set_num_threads(1)
    shrinking.folder().mkdir(parents=True, exist_ok=True)
    labels = [label for _, label in pictures()[1]]
    print(f"{len(labels)} pictures to test, {100 * mean(labels):.1f} % of them with people")
    print(f"MLPerf Tiny's MobileNetV1 0.25 (trained on COCO): {mlperf():.1f} %", flush=True)
    results().touch()
    known = {json.loads(line)["seed"] for line in results().read_text().splitlines()}
    for seed in seeds:
        if seed not in known:
            one_seed(seed)
    rows = [json.loads(line) for line in results().read_text().splitlines()]
    for name in ("top1 as found", "top1", "onnx_int8 top1", "executorch_int8 top1", "onnx_int8 bytes",
                 "executorch_int8 bytes", "int8_kb", "peak_kb", "macs"):  # fmt: skip
        values = [row[name] for row in rows]
        error = f" +- {stdev(values) / len(values) ** 0.5:,.1f}" if len(values) > 1 else ""
        print(f"{name}: {mean(values):,.1f}{error}  ({', '.join(f'{value:,.1f}' for value in values)})")


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1:])) or SEEDS)
