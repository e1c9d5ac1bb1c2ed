"""A task that exists only in tests: the number of bright squares in a picture, scored by the error of the count."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimray.data.modalities import Target, modality_of, read_recipe
from slimray.data.own_files import Readers
from slimray.runs.examples import Pair
from slimray.runtime.answers import Answer, Answerer, AnswerOptions
from slimray.tasks import TASKS
from slimray.tasks.evaluation import Pass
from slimray.tasks.network import Network, predict_outputs
from slimray.tasks.task import LossOptions, Metric, Table, Task


class CountScore:
    """Sum of the errors of counts."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        miss = (outputs[:, 0] - targets).abs().double().cpu()
        self.sums += torch.tensor([miss.sum(), len(miss)])

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.sums,)

    def result(self) -> dict[str, Any]:
        return {"miss": float(self.sums[0] / self.sums[1]), "num_samples": int(self.sums[1])}


def losses(outputs: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    return (outputs[:, 0].float() - targets).square() * weights(targets, options)


def weights(targets: Tensor, options: LossOptions) -> Tensor:
    return 1 + targets.float()


def examples(network: Network, views: np.ndarray, outputs: Tensor, targets: Any, shown: int) -> Iterable[dict]:
    for view, output, target in zip(views, outputs, targets, strict=True):
        yield Pair.of({"seen": view}, {"seen": f"told {float(output[0]):.1f} of {int(target)}"}).to_plain()


def tables(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[Table]:
    return [Table("How far off", ("run", "miss"), [(row["run"], row["miss"]) for row in rows if "miss" in row])]


def answer(network: Network, options: AnswerOptions) -> Answerer:
    modality = modality_of(network.recipe)
    assert modality.open_file is not None
    read = modality.open_file(read_recipe(network.recipe), options.file)

    def one(path: Path, readers: Readers) -> Answer:
        views, _ = read(str(path), path.read_bytes(), readers)
        count = predict_outputs(network.net, views[None], network.pixels, network.device, 1)
        assert isinstance(count, Tensor)
        return Answer(path, [("squares", float(count[0, 0]))])

    return one


COUNT = Task(
    name="count_squares",
    metrics=(Metric("miss", "squares missed", unit="squares", better="lower"),),
    target=lambda recipe: Target(),
    arguments=lambda card, options: {"num_classes": 1},
    losses=losses,
    weights=weights,
    score=lambda num_classes, recipe: CountScore(),
    start=lambda setting: Pass(setting, CountScore()),
    examples=examples,
    answer=answer,
    tables=tables,
)


def register() -> None:
    """Put the task into the table of this process."""
    TASKS[COUNT.name] = COUNT
