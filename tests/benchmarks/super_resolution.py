"""Gain of a small CARN over bicubic interpolation on unseen pictures, enlarged twofold, three seeds.

Run `python tests/benchmarks/super_resolution.py ROOT`, with `ROOT/t91/*.png` to train on and `ROOT/set5/*.png` to
score. One thread, no Ray: replica, recipe, loss and score are those of `slimray run jobs/super_resolution.yaml`.
"""

import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from PIL import Image

from slimray import job, models
from slimray.data.images.pairs import PairRecipe, as_pixels, crop, resize
from slimray.tasks import TASKS
from slimray.tasks.network import Input, predict_outputs
from slimray.train import optimizers
from slimray.train.methods.method import Piece, Setup
from slimray.train.methods.plain import Plain

SEEDS, SCALE = (0, 1, 2), 2


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]


def train(seed: int, root: Path, training: job.Loaded) -> dict[str, float]:
    """One training as the job says; its scores on whole pictures of Set5, each cut to a multiple of the scale."""
    import random

    spec, task, start = training.job, TASKS["super_resolve"], time.perf_counter()
    recipe, images = PairRecipe(SCALE, spec.data.size, "train", True), pictures(root / "t91")
    torch.manual_seed(seed)
    build = lambda: models.build(spec.model.name, scale=SCALE, **spec.model.options())  # noqa: E731
    setup = Setup(spec.optim, Input(), (3, recipe.size, recipe.size), torch.device("cpu"), task=task)
    replica = Plain().replica(build(), build, setup)
    rng, seen, batch = random.Random(seed), 0, spec.batch.total
    for step in range(spec.optim.epochs * -(-len(images) // batch)):
        large = np.stack([crop(rng.choice(images), recipe, rng) for _ in range(batch)])
        small = np.stack([as_pixels(resize(one, recipe.size, recipe.size))[None] for one in large])
        lr = optimizers.learning_rate(spec.optim, batch, len(images), min(seen, len(images) * spec.optim.epochs))
        assert replica.step([Piece(small, large)], batch, lr, (seed, step)).finite
        seen += len(images) / -(-len(images) // batch)
    minutes, score, net = (time.perf_counter() - start) / 60, task.score(0, {"scale": SCALE}), replica.averaged()
    for picture in pictures(root / "set5"):
        height, width = (side - side % SCALE for side in picture.shape[:2])
        large = picture[:height, :width]
        small = as_pixels(resize(large, height // SCALE, width // SCALE))
        outputs = predict_outputs(net, small[None, None], Input(), torch.device("cpu"), 1)
        score.add(outputs, torch.from_numpy(large[None].copy()))
    return score.result() | {"minutes": minutes}


def main() -> None:
    torch.set_num_threads(1)
    training = job.load(["jobs/super_resolution.yaml"], [f"super-resolution:data.root={sys.argv[1]}"])[0]
    rows = []
    for seed in SEEDS:
        rows.append(train(seed, Path(sys.argv[1]), training))
        print(json.dumps({"seed": seed} | rows[-1]), flush=True)
    for name in ("psnr", "psnr_bicubic", "psnr_gain", "ssim", "ssim_bicubic", "minutes"):
        values = [row[name] for row in rows]
        print(f"{name}: {mean(values):.4f} +- {stdev(values) / len(values) ** 0.5:.4f} (standard error)")


if __name__ == "__main__":
    main()
