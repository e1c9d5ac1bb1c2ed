"""Progressive shrinking against training alone: accuracy of the smallest and the largest subnet, three kinds of data.

`python -m tests.benchmarks.shrinking [images clips points]`: for every kind of data and seed a supernet is shrunk as by
`kind: shrink` (its stages, spaces, draws, sorted channels and recalibration, one rank, no Ray). Compared on the same
test samples are: the smallest subnet after shrinking with the same subnet cut from the teacher, and with the same
network trained alone for as many steps (the best of three learning rates with the first seed, chosen on the test
samples, in its favour); the largest subnet with the teacher trained further for the steps of shrinking. Two seeds run
at once, one thread each, on a GPU where there is one. Results are lines of JSON and weights in `SLIMRAY_BENCH_DIR`:
what is there is not computed again.
"""

import functools
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from slimray import models
from slimray.arch import Arch, Space
from slimray.data.images.pictures import ImageRecipe, make_image
from slimray.data.modalities import input_shape
from slimray.data.plan import Phase, epoch_order, microbatches
from slimray.data.points import shapes
from slimray.data.points.clouds import Cloud
from slimray.data.points.recipe import PointRecipe, make_points
from slimray.data.video import moving_shapes
from slimray.data.video.clips import ClipRecipe, frame_indices, generators, make_clip
from slimray.edge import cost
from slimray.models.supernets.elastic import sort_channels
from slimray.models.supernets.supernet import Subnet, initialise
from slimray.tasks.classify import ClassScore
from slimray.tasks.network import Input, to_input
from slimray.train import batchnorm, learn, optimizers
from slimray.train.methods.method import Piece, Replica, Setup
from slimray.train.methods.plain import PlainReplica
from slimray.train.methods.supernet import Supernet, SupernetReplica
from slimray.train.spec import OptimSpec
from slimray.verbs import networks
from slimray.verbs.shrink import ShrinkJob, sample_archs, spaces, stage_job
from slimray.verbs.specs import TrainJob
from slimray.verbs.subnets import hold_out, metric_of

SEEDS = (0, 1, 2)
AT_ONCE = 2
DEVICE, PIXELS = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Input()
Key = tuple[int, int, int]
Sample = tuple[np.ndarray, Any]  # one view `[1, ...]`, and its label or labels


@dataclass(frozen=True, eq=False)
class Data:
    """Samples in memory: `train(i, key)` varied at random, `held(i)` kept out of training, `test(i)`."""

    recipe: dict[str, Any]
    num_classes: int
    num_train: int
    num_held: int
    num_test: int
    train: Callable[[int, Key], Sample]
    held: Callable[[int], Sample]
    test: Callable[[int], Sample]


@dataclass(frozen=True, eq=False)
class Setting:
    """A kind of data, the job that shrinks a supernet on it, and the learning rates of a training alone."""

    data: Callable[[ShrinkJob], Data]
    job: dict[str, Any]
    rates: tuple[float, ...]

    def of_seed(self, seed: int) -> ShrinkJob:
        """The job with that seed."""
        return ShrinkJob.model_validate({"kind": "shrink", "name": "bench", **self.job, "seed": seed})


# ------------------------------------------------------------------------------------------------------ the data


def _shared() -> Path:
    return Path(os.environ.get("SLIMRAY_SHARED", Path(__file__).resolve().parents[3] / "shared"))


@functools.cache
def _cifar(split: str) -> tuple[list[np.ndarray], list[int]]:
    root = _shared() / "data/images/cifar10_jpg" / split
    files = [(path, label) for label, folder in enumerate(sorted(root.iterdir())) for path in sorted(folder.iterdir())]
    return [np.asarray(Image.open(path).convert("RGB")) for path, _ in files], [label for _, label in files]


def images(job: ShrinkJob) -> Data:
    """CIFAR-10 as it is in the shared data: 3,000 pictures to train and to hold out, 600 to test."""
    (pictures, labels), (others, answers) = _cifar("train"), _cifar("test")
    varied = ImageRecipe(size=32, mode="train", scale=(0.5, 1), brightness=0, saturation=0, flip=True)
    plain = ImageRecipe(size=32, mode="val")
    kept, out = hold_out(pa.table({"number": range(len(pictures))}), job.hold_out, job.seed)
    numbers, left = kept["number"].to_pylist(), [] if out is None else out["number"].to_pylist()

    def varied_one(i: int, key: Key) -> Sample:
        return make_image(pictures[numbers[i]], varied, generators(key)[1])[0], labels[numbers[i]]

    def plain_one(picture: np.ndarray, label: int) -> Sample:
        return make_image(picture, plain, generators((0, 0, 0))[1])[0], label

    return Data(
        varied.to_dict(),
        10,
        len(numbers),
        len(left),
        len(others),
        varied_one,
        lambda i: plain_one(pictures[left[i]], labels[left[i]]),
        lambda i: plain_one(others[i], answers[i]),
    )


def clips(job: ShrinkJob, num_train: int = 240, num_test: int = 200, segments: int = 8) -> Data:
    """Generated clips whose motion is the class, 64 pixels."""
    recipe = ClipRecipe(num_segments=segments, size=64, resize=64, mode="train", scales=(1.0, 0.875))
    made = [moving_shapes.make_clip(i, 0) for i in range(num_train + num_test)]

    def one(i: int, recipe: ClipRecipe, key: Key) -> Sample:
        frames, label = made[i]
        order, crop = generators(key)
        return make_clip([frames[n] for n in frame_indices(recipe, len(frames), order)], recipe, crop)[0], label

    plain = ClipRecipe(num_segments=segments, size=64, resize=64, mode="val")

    def test(i: int) -> Sample:
        return one(num_train + i, plain, (0, 0, i))

    num_classes = len(moving_shapes.CLASSES)
    return Data(recipe.to_dict(), num_classes, num_train, 0, num_test, lambda i, k: one(i, recipe, k), test, test)


def points(job: ShrinkJob, num_train: int = 384, num_test: int = 192, num_held: int = 192) -> Data:
    """Generated shapes with labelled parts."""
    varied = PointRecipe(
        num_points=512, normalize="sphere", rotate_z=180, scale=(0.9, 1.1), jitter=0.005, per_point=True, mode="train"
    )
    plain = PointRecipe(num_points=512, normalize="sphere", per_point=True, mode="val")
    clouds = [Cloud(*_named(shapes.make_cloud(i, 0))) for i in range(num_train + num_test + num_held)]

    def one(i: int, recipe: PointRecipe, key: Key) -> Sample:
        sample = make_points(clouds[i], recipe, key)
        assert sample.labels is not None
        return sample.points, sample.labels[0]

    def test(i: int) -> Sample:
        return one(num_train + i, plain, (0, 0, i))

    def held(i: int) -> Sample:
        return test(num_test + i)

    counts = (num_train, num_held, num_test)
    return Data(varied.to_dict(), shapes.NUM_PARTS, *counts, lambda i, k: one(i, varied, k), held, test)


def _named(cloud: tuple[np.ndarray, np.ndarray, int]) -> tuple[np.ndarray, dict, np.ndarray]:
    return cloud[0], {}, cloud[1]


OPTIM = {"optimizer": "adamw", "schedule": "cosine", "groups": "no_norm_decay", "weight_decay": 0.01}
RATES = (0.004, 0.008, 0.016)


def _teacher(epochs: int, lr: float) -> dict[str, Any]:
    return {"name": "teacher", "epochs": epochs, "lr": lr, "warmup_epochs": 1}


def _stage(name: str, epochs: int, lr: float, **free: Sequence[float]) -> dict[str, Any]:
    """A stage of which every step trains the largest, the smallest and another subnet; channels are sorted first."""
    rest = {"subnets": 3, "sandwich": True, "sort_channels": True}
    return {"name": name, "epochs": epochs, "lr": lr, "free": {n: list(v) for n, v in free.items()}, **rest}


# The last stage is the long one, and as fast as the teacher's: only there the smallest of all subnets is trained.
SETTINGS = {
    "images": Setting(
        images,
        {
            "data": {"run": "bench", "size": 32},
            "model": {"name": "ofa_resnet50", "preset": "tiny"},
            "batch": {"total": 32, "per_worker": 32},
            "optim": {**OPTIM, "reference_batch": 32},
            "stages": [
                _teacher(6, 0.008),
                _stage("depth", 1, 0.002, depth=(0, 1, 2), expand=(0.2, 0.25, 0.35)),
                _stage("width", 11, 0.008, width=(0, 1, 2)),
            ],
            "hold_out": 500,
            "judge": {"calibrate": 500, "calibrate_batch": 100},
        },
        RATES,
    ),
    "clips": Setting(
        clips,
        {
            "data": {"run": "bench", "size": 64},
            "model": {"name": "ofa_tsm_resnet50", "preset": "tiny", "num_segments": 8},
            "batch": {"total": 16, "per_worker": 16},
            "optim": {**OPTIM, "reference_batch": 16},
            "stages": [
                _teacher(8, 0.004),
                # four frames cannot tell one round from three the other way: all subnets see eight
                _stage("depth", 1, 0.002, depth=(0, 1, 2), frames=(8,)),
                _stage("width", 9, 0.004, width=(0, 1, 2), expand=(0.2, 0.25, 0.35)),
            ],
            "judge": {"calibrate": 160, "calibrate_batch": 40},
        },
        RATES,
    ),
    "points": Setting(
        points,
        {
            "data": {"run": "bench"},
            "model": {"name": "ofa_pvcnn", "preset": "tiny", "in_channels": 3, "voxel": 0.5},
            "batch": {"total": 16, "per_worker": 16},
            "optim": {**OPTIM, "reference_batch": 16},
            "stages": [
                _teacher(80, 0.004),  # a teacher that could still learn much holds the largest subnet back
                _stage("depth", 4, 0.002, depth=(1, 2), voxel=(0.5, 0.75, 1.0)),
                _stage("width", 60, 0.004, width=(0.25, 0.5, 0.75, 1.0), head=(0.25, 0.5, 0.75, 1.0)),
            ],
            "judge": {"calibrate": 160, "calibrate_batch": 40},
        },
        RATES,
    ),
}

# ------------------------------------------------------------------------------------------------------ training


def fit(replica: Replica, data: Data, optim: OptimSpec, job: ShrinkJob | TrainJob, seed: int) -> None:
    """Train as loop.py does with one worker: the plan's order, augmentation by (seed, epoch, sample)."""
    batch, per_worker, step_number = job.batch.total, job.batch.per_worker, 0
    for epoch in range(optim.epochs):
        phase = Phase("train", "train", epoch, data.num_train, batch, True, data.recipe)
        order = epoch_order(data.num_train, seed, epoch)
        for step in range(phase.num_steps):
            pieces = []
            for lo, hi in microbatches(phase, step, 0, 1, per_worker):
                samples = [data.train(int(i), (seed, epoch, int(i))) for i in order[lo:hi]]
                pieces.append(Piece(np.stack([x for x, _ in samples]), np.stack([y for _, y in samples])))
            seen = epoch * data.num_train + step * batch
            lr = optimizers.learning_rate(optim, batch, data.num_train, seen)
            replica.step(pieces, sum(len(piece.data) for piece in pieces), lr, (seed, step_number))
            step_number += 1


class Judge:
    """What judge.py does with an arch, on samples in memory: re-calibrate, then score (percent)."""

    def __init__(self, data: Data, job: ShrinkJob, held: bool = False):
        self.data, self.job = data, job
        order = epoch_order(data.num_train, job.seed, 0)[: min(job.judge.calibrate, data.num_train)]
        calibrate = np.stack([data.train(int(i), (job.seed, 0, int(i)))[0] for i in order])
        size = job.judge.calibrate_batch
        self.inputs = [to_input(calibrate[i : i + size], PIXELS, DEVICE) for i in range(0, len(calibrate), size)]
        make, count = (data.held, data.num_held) if held else (data.test, data.num_test)
        samples = [make(i) for i in range(count)]
        self.x = to_input(np.stack([x for x, _ in samples]), PIXELS, DEVICE)
        self.labels = torch.from_numpy(np.stack([y for _, y in samples]))
        self.space = cost.build_on_meta(lambda: build(job, data)).space

    @torch.no_grad()
    def score(self, plain: nn.Module, arch: Arch) -> float:
        """The metric of an extracted net on the test (or held-out) samples."""
        net = batchnorm.recalibrate_norms(
            plain.to(DEVICE), (learn.fit_input(x, self.space, arch) for x in self.inputs)
        ).eval()
        score = ClassScore(self.data.num_classes)
        for start in range(0, len(self.x), self.job.judge.batch):
            rows = slice(start, start + self.job.judge.batch)
            score.add(net(learn.fit_input(self.x[rows], self.space, arch)).cpu(), self.labels[rows])  # type: ignore[call-arg]
        return float(score.result()[metric_of({"recipe": self.data.recipe})])


def build(job: ShrinkJob, data: Data) -> Any:
    """The supernet as its first stage begins."""
    torch.manual_seed(job.seed)
    options = networks.model_options(stage_job(job, 0, None), None) | {"num_classes": data.num_classes}
    return models.build(**options)


def fresh_subnet(job: ShrinkJob, data: Data, arch: Arch) -> nn.Module:
    """The network of `arch` with weights of its own, as they begin."""
    net = build(job, data).extract(arch)
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    if isinstance(net, Subnet):
        initialise(net)
    return net


Keep = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]


def shrink(job: ShrinkJob, data: Data, keep: Keep) -> Iterator[tuple[str, Any]]:
    """The stages in turn, as jobs/shrink.py runs them: their names and the supernet after each.

    `keep(name, make)` gives the weights of a stage: what is kept under that name, else what `make` returns.
    """
    net, teacher = build(job, data), None
    for number, (stage, space) in enumerate(zip(job.stages, spaces(job, net.space), strict=True)):
        train_it = functools.partial(_train_stage, job, data, number, space, net, teacher)
        weights = keep(f"{number:02d}-{stage.name}", train_it)
        net.load_state_dict(weights)
        if teacher is None:
            teacher = build(job, data)
            teacher.load_state_dict(weights)
        yield stage.name, net


def _train_stage(
    job: ShrinkJob, data: Data, number: int, space: Space, net: Any, teacher: nn.Module | None
) -> dict[str, Tensor]:
    """The weights after a stage that begins with those of `net`."""
    stage, as_training = job.stages[number], stage_job(job, number, None)
    if stage.sort_channels:
        sort_channels(net, {name: values for one in job.stages[:number] for name, values in one.free.items()})
    method = Supernet(space, stage.subnets, stage.sandwich, stage.distill_weight)
    replica = SupernetReplica(net, method, teacher, Setup(as_training.optim, PIXELS, input_shape(data.recipe), DEVICE))
    fit(replica, data, as_training.optim, job, as_training.seed)
    return dict(replica.averaged().state_dict())


def alone(net: nn.Module, job: ShrinkJob, data: Data, lr: float, epochs: int, warmup: float) -> Any:
    """`net` trained by itself."""
    changes = {"lr": lr, "epochs": epochs, "warmup_epochs": warmup}
    optim = stage_job(job, 0, None).optim.model_copy(update=changes)
    replica = PlainReplica(net, Setup(optim, PIXELS, input_shape(data.recipe), DEVICE))
    fit(replica, data, optim, job, job.seed)
    return replica.averaged()


# ------------------------------------------------------------------------------------------------------ one seed


def folder() -> Path:
    """Where results and weights are kept."""
    return Path(os.environ.get("SLIMRAY_BENCH_DIR", Path(tempfile.gettempdir()) / "slimray-bench"))


def place(name: str, end: str) -> Path:
    """The file of a kind of data whose name ends so; other settings have other files."""
    digest = hashlib.sha256(json.dumps(SETTINGS[name].job, sort_keys=True).encode()).hexdigest()[:8]
    return folder() / f"shrinking-{name}-{digest}{end}"


def keeper(name: str, seed: int) -> Keep:
    """Keeps weights as files of `folder()`."""

    def keep(stage: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        path = place(name, f"-{seed}-{stage}.safetensors")
        if not path.exists():
            tensors = {key: value.contiguous() for key, value in make().items()}
            part = path.with_suffix(".part")
            safetensors.torch.save_file(tensors, part)
            part.rename(path)
        return safetensors.torch.load_file(path)

    return keep


def read(name: str) -> list[dict[str, Any]]:
    """The results so far of a kind of data."""
    path = place(name, ".jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def one_seed(name: str, seed: int) -> None:
    """All that is measured with a seed; adds lines to the results, those that are there already excepted."""
    os.nice(10)
    torch.set_num_threads(1)
    folder().mkdir(parents=True, exist_ok=True)
    setting = SETTINGS[name]
    job = setting.of_seed(seed)
    data = setting.data(job)
    judge, known = Judge(data, job), {row["what"] for row in read(name) if row["seed"] == seed}

    def note(what: str, measure: Callable[[], float]) -> None:
        if what in known:
            return
        start = time.process_time()
        row = {"seed": seed, "what": what, "metric": measure(), "cpu_s": round(time.process_time() - start, 1)}
        with place(name, ".jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(name, json.dumps(row), flush=True)

    archs = sample_archs(build(job, data).space, job.judged, seed)
    largest, smallest = archs[:2]
    shrinking, first = sum(stage.epochs for stage in job.stages[1:]), job.stages[0]

    def of_smallest(lr: float) -> float:
        net = fresh_subnet(job, data, smallest)
        return judge.score(alone(net, job, data, lr, first.epochs + shrinking, first.warmup_epochs), smallest)

    def of_teacher(weights: dict[str, Tensor]) -> float:
        net = build(job, data)
        net.load_state_dict(weights)
        lr = max(stage.lr for stage in job.stages[1:])
        return judge.score(alone(net, job, data, lr, shrinking, 0).extract(largest), largest)

    def of_subnet(net: Any, arch: Arch) -> float:
        return judge.score(net.extract(arch), arch)

    for lr in setting.rates if seed == SEEDS[0] else ():
        note(f"smallest alone, lr {lr:g}", functools.partial(of_smallest, lr))
    for number, (stage, net) in enumerate(shrink(job, data, keeper(name, seed))):
        note(f"largest after {stage}", functools.partial(of_subnet, net, largest))
        note(f"smallest after {stage}", functools.partial(of_subnet, net, smallest))
        if not number:
            note("largest trained on", functools.partial(of_teacher, dict(net.state_dict())))
        if number + 1 == len(job.stages):
            for i, arch in enumerate(archs[2:]):
                note(f"sample {i}", functools.partial(of_subnet, net, arch))
    note(f"smallest alone, lr {best_rate(name):g}", functools.partial(of_smallest, best_rate(name)))


# ------------------------------------------------------------------------------------------------------ the table


def facts(name: str) -> str:
    """The space of a setting in a line."""
    job = SETTINGS[name].of_seed(0)
    data = SETTINGS[name].data(job)
    net = build(job, data)
    space, shape = spaces(job, net.space)[-1], (1, *input_shape(data.recipe))
    many = [n for n, genes in space.choices if any(len(values) > 1 for values in genes)]
    big, small = (cost.count_macs(net.extract(arch), shape) for arch in sample_archs(net.space, 2, 0))
    return (
        f"{job.model.name}: {space.num_archs():,} archs in {', '.join(many)}; MACs {big:,} / {small:,} = "
        f"{big / small:.1f}; {data.num_train} samples to train, {data.num_test} to test, epochs "
        f"{' + '.join(str(stage.epochs) for stage in job.stages)}"
    )


def best_rate(name: str) -> float:
    """The learning rate at which the smallest subnet alone is best with the first seed, so far."""
    tried = {lr: _of(read(name), f"smallest alone, lr {lr:g}").get(SEEDS[0], -1.0) for lr in SETTINGS[name].rates}
    return max(tried, key=lambda lr: tried[lr])


def _of(rows: Sequence[dict[str, Any]], what: str) -> dict[int, float]:
    return {row["seed"]: row["metric"] for row in rows if row["what"] == what}


def _shown(values: Sequence[float]) -> str:
    error = f" +- {stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{mean(values):6.1f}{error}" if values else "-"


def table(name: str) -> None:
    """Print means and paired differences with their standard errors over the seeds."""
    rows, job = read(name), SETTINGS[name].of_seed(0)
    last = job.stages[-1].name
    if not rows:
        return
    best = best_rate(name)
    columns = {
        "smallest after shrinking": _of(rows, f"smallest after {last}"),
        "(a) smallest cut from the teacher": _of(rows, f"smallest after {job.stages[0].name}"),
        f"(b) smallest trained alone, lr {best:g}": _of(rows, f"smallest alone, lr {best:g}"),
        "largest after shrinking": _of(rows, f"largest after {last}"),
        "teacher": _of(rows, f"largest after {job.stages[0].name}"),
        "(c) teacher trained on": _of(rows, "largest trained on"),
    }
    print(f"### {name}: {facts(name)}")
    for what, values in columns.items():
        print(f"{what:45} {_shown(list(values.values()))}  {', '.join(f'{v:.1f}' for v in values.values())}")
    names = list(columns)
    for first, second in ((0, 1), (0, 2), (3, 5)):
        a, b = columns[names[first]], columns[names[second]]
        paired = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
        print(f"{names[first]} - {names[second]}: {_shown(paired)}  {', '.join(f'{v:+.1f}' for v in paired)}")
    of_rates = {lr: _of(rows, f"smallest alone, lr {lr:g}").get(SEEDS[0]) for lr in SETTINGS[name].rates}
    tried = ", ".join(f"{lr:g} {metric:.1f}" for lr, metric in of_rates.items() if metric is not None)
    print(f"alone with the first seed, by learning rate: {tried}", flush=True)


def main() -> None:
    names = [name for name in sys.argv[1:] if name in SETTINGS] or list(SETTINGS)
    with ProcessPoolExecutor(AT_ONCE, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for waited in [pool.submit(one_seed, name, seed) for name in names for seed in SEEDS]:
            waited.result()
    for name in names:
        table(name)


if __name__ == "__main__":
    main()
