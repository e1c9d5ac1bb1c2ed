"""Everything the golden values call in the package. Code that moves or gets another name is followed here, in this
file alone; `names.json` maps renamed tensors to their recorded names, and `golden.json` stays as it was recorded."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# ------------------------------------------------------------------ imports that follow the package when files move
from slimray import models
from slimray.data import cards, index, lists, modalities, plan
from slimray.models.points.frustum import FrustumNet
from slimray.tasks import TASKS
from slimray.tasks.network import Input, to_input
from slimray.train import learn, optimizers
from slimray.train.methods.method import Piece, Setup
from slimray.train.methods.mutual import Mutual
from slimray.train.methods.paths import Goal, PathSampling
from slimray.train.methods.plain import Plain
from slimray.train.methods.supernet import Supernet, SupernetReplica
from slimray.train.spec import OptimSpec

# -------------------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
LATER = index.FOUND_LATER  # columns of an index


def read_index(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a split of a prepared dataset."""
    return lists.read_split(cards.load_card(str(folder / "card.yaml"), []), split, str(folder)).to_pylist()


def load_sample(folder: Path, row: dict[str, Any], recipe: dict[str, Any], key: tuple[int, int, int]) -> Any:
    """One sample `[V, ...]` of a prepared dataset and its label."""
    modality = modalities.modality_of(recipe)
    return modality.load(row, str(folder), modalities.read_recipe(recipe), key, 30.0)


def input_shape(recipe: dict[str, Any]) -> tuple[int, ...]:
    """One input of a network, without the batch."""
    return modalities.input_shape(recipe)


def make_phase(num_samples: int, batch: int, epoch: int, held: int = 0, every: int = 0) -> Any:
    """A training pass over a split."""
    return plan.Phase("train", "train", epoch, num_samples, batch, True, {}, 0, held, every)


def order(phase: Any, seed: int) -> list[int]:
    """The samples of a pass in order."""
    return plan.pass_order(phase, seed).tolist()


def cuts(phase: Any, step: int, rank: int, world: int, per_worker: int) -> list[tuple[int, int]]:
    """The microbatches of a rank: positions [lo, hi) of the pass."""
    return plan.microbatches(phase, step, rank, world, per_worker)


def make_net(model: dict[str, Any]) -> nn.Module:
    """A network of the table of models."""
    return models.build(**model)


def spaces() -> Iterator[tuple[str, Any]]:
    """Every space of subnets: name of the model and its space, in the smallest form the model has."""
    for name in sorted(models.MODELS):
        if name.startswith("ofa_"):
            yield name, models.build(name, num_classes=4, preset="tiny").space


def genes(arch: Any) -> dict[str, Any]:
    """The genes of an arch by dimension."""
    return {name: value for name, value in arch.to_dict().items() if name not in ("stages", "skips")}


class Training:
    """One rank of a training by `method` (plain, mutual, supernet, or how paths learn: two, full_v2, reinforce)."""

    def __init__(
        self, method: str, net: nn.Module, teacher: nn.Module | None, optim: dict[str, Any], shape: Sequence[int],
        rank: int, world: int,
    ):  # fmt: skip
        self.method, self.optim = method, OptimSpec(**optim)
        task = "classify" if len(shape) > 2 else "frustum_boxes" if isinstance(net, FrustumNet) else "segment"
        setup = Setup(self.optim, Input(), tuple(shape), CPU, rank, world, task=TASKS[task])

        def second() -> nn.Module:
            assert teacher is not None
            return teacher

        if method == "plain":
            self.replica = Plain().replica(net, second, setup)
        elif method == "mutual":
            self.replica = Mutual(self.optim.mutual).replica(net, second, setup)
        elif method == "supernet":
            self.replica = SupernetReplica(net, Supernet(net.space, 3, sandwich=True), teacher, setup)
        else:
            paths = PathSampling(goal=_goal(net), gradient=method, nets=3, lr=0.05)
            self.replica = paths.replica(net, second, setup)

    def rate(self, batch: int, num_samples: int, samples_seen: int) -> float:
        """The learning rate of the step that begins after `samples_seen` samples."""
        return optimizers.learning_rate(self.optim, batch, num_samples, samples_seen)

    def step(self, pieces: Sequence[tuple[np.ndarray, np.ndarray]], num_valid: int, lr: float, number: int) -> float:
        """Take a step, with paths one on their worth too; the loss summed over the samples of this rank."""
        cut = [Piece(data, labels) for data, labels in pieces]
        report = self.replica.step(cut, num_valid, lr, (5, 2 * number))
        assert report.finite
        if self.method not in ("plain", "mutual", "supernet"):
            assert self.replica.step(cut, num_valid, lr, (5, 2 * number + 1), held=True).finite
        return report.loss_sum

    def tensors(self) -> dict[str, Tensor]:
        """The whole training state by name, as it goes into a checkpoint. A collective."""
        return self.replica.tensors()

    @torch.no_grad()
    def scores(self, data: np.ndarray) -> dict[str, Tensor]:
        """What the network to ship gives for samples `[n, V, ...]`, by name. A collective."""
        net, x = self.replica.averaged(), to_input(data, Input(), CPU)
        if self.method == "supernet":
            space = net.space  # type: ignore[union-attr]
            archs = {"largest": space.largest(), "smallest": space.smallest(), "drawn": space.sample(random.Random(3))}
            return {name: net(learn.fit_input(x, space, arch), arch) for name, arch in archs.items()}  # type: ignore[arg-type]
        if self.method not in ("plain", "mutual"):
            return {"path": net(x, tuple(0 for _ in net.mixed))}  # type: ignore[union-attr]
        out = net(x)
        return {"net": out} if isinstance(out, Tensor) else dict(out)


def _goal(net: Any) -> Goal:
    rng = random.Random(0)
    sizes = [len(block.alphas) for block in net.mixed]
    edges = tuple(tuple(rng.uniform(1, 9) for _ in range(6)) + (0.0,) * (size - 6) for size in sizes)
    return Goal("add_linear", 0.1, 80.0, 20.0, edges)
