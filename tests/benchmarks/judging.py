"""Two subnet evaluators against one: the speed-up on two cores, by `judge_all` and as Tune trials.

A supernet with initial weights is written as a run; the same archs are evaluated on the same generated pictures by one
worker and by two, in turn. Only computation is compared: subnets per second from the moment when every worker has
finished its first one (processes are up, the network is loaded) to the last. Goal: 1.8 times as many with two.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import safetensors.torch
import torch
from tests.benchmarks.pairs import Ratio

from slimray import models, runs
from slimray.data.images import image_shapes
from slimray.data.images.pictures import ImageRecipe
from slimray.data.index import INDEX
from slimray.data.pipeline import Source
from slimray.edge import cost
from slimray.train import workers
from slimray.train.spec import ScaleSpec
from slimray.verbs import search, shrink
from slimray.verbs.specs import JudgeSpec
from slimray.verbs.subnets import Exhibits, decode, judge_all

NUM_ARCHS, NUM_PICTURES, PAIRS, TUNE_PAIRS = 24, 400, 9, 9
MODEL = {"name": "ofa_mobilenetv3", "num_classes": len(image_shapes.CLASSES), "preset": "tiny"}
SPEC = JudgeSpec.model_validate({"calibrate": NUM_PICTURES, "calibrate_batch": 100})


def supernet(work: Path) -> runs.Run:
    """A run that holds a supernet."""
    torch.manual_seed(0)
    net = models.build(**MODEL)
    weights = safetensors.torch.save({name: value.contiguous() for name, value in net.state_dict().items()})
    taken = {
        "recipe": ImageRecipe(size=32, mode="val").to_dict(),
        "pixels": {},
        "classes": list(image_shapes.CLASSES),
    }
    run = runs.open_run(str(work), "supernet")
    runs.write_model(run, weights, MODEL, taken)
    return run


def exhibits(work: Path) -> Exhibits:
    """Pictures on disk, decoded as `shrink` and `search` have it."""
    rows = []
    for number in range(NUM_PICTURES):
        picture, label = image_shapes.make_image(number, 0, 32)
        (work / f"{number}.png").write_bytes(image_shapes.encode_png(picture))
        places = {"frames": 0, "fps": 0.0, "width": 32, "height": 32, "shard": "", "row": -1}
        rows.append({"path": f"{number}.png", "label": label, **places})
    source = Source(str(work), ray.put(pa.Table.from_pylist(rows, INDEX)), NUM_PICTURES)
    recipe = ImageRecipe(size=32).to_dict()
    calibrate = decode(source, recipe | {"mode": "train"}, NUM_PICTURES, 0, True, 30)
    return Exhibits(calibrate, decode(source, recipe | {"mode": "val"}, NUM_PICTURES, 0, False, 30))


def rate(ends: list[float], num_workers: int) -> float:
    """Subnets per second behind the first of each worker."""
    ends = sorted(ends)
    return (len(ends) - num_workers) / (ends[-1] - ends[num_workers - 1])


def by_judges(run: runs.Run, shown: Exhibits, num_workers: int) -> float:
    """Subnets per second of `judge_all`."""
    net: Any = cost.build_on_meta(lambda: models.build(**MODEL))
    archs = shrink.sample_archs(net.space, NUM_ARCHS, 0)
    scale = ScaleSpec(workers=num_workers)
    return rate([time.time() for _ in judge_all(run.uri, shown, SPEC, archs, scale)], num_workers)


def by_tune(run: runs.Run, shown: Exhibits, num_workers: int, name: str) -> float:
    """Subnets per second of the trials of a random search, by the times of their files."""
    document: dict[str, Any] = {
        "kind": "search",
        "name": name,
        "supernet": run.uri,
        "strategy": {"name": "random", "evaluations": NUM_ARCHS},
        "targets": [{"name": "any"}],
        "judge": SPEC,
        "scale": {"workers": num_workers},
    }
    job = search.SearchJob.model_validate(document)
    target, net = job.targets[0], cost.build_on_meta(lambda: models.build(**MODEL))
    prices = search._prices(net, ImageRecipe(size=32).to_dict())
    problem = search._problem(prices, target, job.strategy)
    found = runs.open_run(str(Path(run.uri).parent), name)
    search._tune(job, run, search._Progress(job, found, target, prices, problem, {}, "top1"), shown)
    return rate([path.stat().st_mtime for path in (Path(found.uri) / "trials/any").iterdir()], num_workers)


def main() -> None:
    workers.connect(4)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run, shown = supernet(work), exhibits(work)
        ways = {
            "judge_all": (PAIRS, lambda count, turn: by_judges(run, shown, count)),
            "Tune": (TUNE_PAIRS, lambda count, turn: by_tune(run, shown, count, f"bench-{count}-{turn}")),
        }
        for name, (pairs, measure) in ways.items():
            measure(1, "first")
            two, one = [], []
            for turn in range(pairs):
                for count in (1, 2) if turn % 2 else (2, 1):
                    (two if count == 2 else one).append(measure(count, turn))
            print(Ratio(f"{name}: subnets/s, two workers / one", tuple(two), tuple(one)), flush=True)


if __name__ == "__main__":
    main()
