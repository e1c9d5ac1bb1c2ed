"""What a task is: all that depends on what a network predicts, as one value of plain functions.

A `Task` says how an output is judged (losses with their weights, scores, metrics), what the data path must know of a
target, what the report shows and how `predict` answers for a file. Each file beside this one holds a task; the table
TASKS in `slimray.tasks` names them all. Modalities (data/modalities.py) say how bytes become arrays; the two are
independent of each other.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from slimray.data.modalities import Target
from slimray.spec import RunFailed, Spec, UserError, parse

if TYPE_CHECKING:
    from slimray.runtime.answers import Answerer, AnswerOptions
    from slimray.tasks.evaluation import Pass, Setting
    from slimray.tasks.network import Network

Outputs = Tensor | Mapping[str, Tensor]
"""What a network returns: a tensor `[n, ...]`, or several by name."""


class LossOptions(Protocol):
    """The settings of a training that losses depend on; `OptimSpec` has them."""

    @property
    def label_smoothing(self) -> float: ...

    @property
    def class_weights(self) -> tuple[float, ...] | Literal["balanced"] | None: ...


class Score(Protocol):
    """Counts of an evaluation, to be summed over ranks."""

    def add(self, outputs: Any, targets: Tensor, /) -> None:
        """Count the outputs of samples against their targets `[n, ...]`."""
        ...

    def tensors(self) -> Sequence[Tensor]:
        """Return what must be summed over ranks, in place."""
        ...

    def result(self) -> dict[str, Any]:
        """Return the metrics by name, and `num_samples`."""
        ...


@dataclass(frozen=True)
class Metric:
    """A number of a score: its name in `result()`, how people call it, its unit, and which way is better.

    Numbers in "%" are 0-100. `main` ones are in the headline of a report and in its charts. A `share` is that of
    samples that are right, which has an interval. A `ratio` (perplexity) has no upper end: searches compare logarithms.
    """

    name: str
    label: str
    unit: str = "%"
    better: Literal["higher", "lower"] = "higher"
    main: bool = True
    share: bool = False
    ratio: bool = False

    @property
    def sign(self) -> float:
        """What values are multiplied by so that higher is better: 1 or -1."""
        return 1.0 if self.better == "higher" else -1.0

    def merit(self, value: float) -> float:
        """Return what a value is worth in a search, in points of which more is better; of a ratio a percent is one."""
        return self.sign * (100 * math.log(value) if self.ratio else value)

    def improves(self, value: float, best: float | None) -> bool:
        """Return whether `value` is better than `best`, None if there is none yet; NaN never is."""
        if math.isnan(value):
            return False
        return best is None or (value > best if self.better == "higher" else value < best)

    def to_plain(self) -> dict[str, Any]:
        """Return the metric for results.json and card.json, from which reports are made."""
        return dict(vars(self))


class NoOptions(Spec):
    """A task without options of its own."""


LOSS = Metric("loss", "loss", unit="", better="lower", main=False)


@dataclass(frozen=True)
class Table:
    """A table of a report as plain values; columns named in `bars` hold percent (0-100).

    `fold` starts it closed, `chart` draws its bars long.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    bars: tuple[str, ...] = ()
    fold: bool = False
    chart: bool = False


@dataclass(frozen=True)
class PassResult:
    """A pass over a split on all ranks: what they `found`, the examples as plain values, and where the samples lie.

    `recipe` is the plain recipe of the samples, `root` that of their dataset.
    """

    found: list[Any]
    examples: list[dict[str, Any]]
    root: str
    split: str
    recipe: Mapping[str, Any]


def _no_tables(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[Table]:
    return []


@dataclass(frozen=True)
class Task:
    """A row of TASKS. All functions are plain: nothing of a task is stored between their calls."""

    name: str
    metrics: tuple[Metric, ...]
    """The numbers of its score in order; the first one says which checkpoint is the best."""
    target: Callable[[Mapping[str, Any]], Target]
    """The target of a sample of a plain recipe: shape, type, and the value of a sample that does not decode."""
    arguments: Callable[[Any, Mapping[str, Any]], dict[str, Any] | None]
    """What a network must know, of a dataset card and the task's own options: {"num_classes": 10}; None where only the
    dataset, which is not there, says it. A row of MODELS says by its options without default what it needs."""
    losses: Callable[[Any, Tensor, LossOptions], Tensor]
    """Outputs and targets to the loss of each sample `[n]`, multiplied by its weight."""
    weights: Callable[[Tensor, LossOptions], Tensor]
    """Targets to the weight of each sample `[n]`, known before the forward pass. A step is the sum of the losses over
    the sum of the weights of all ranks."""
    score: Callable[[int, Mapping[str, Any]], Score]
    """Number of classes and plain recipe to an empty score."""
    start: Callable[["Setting"], "Pass"]
    """A pass over a split on one rank, for `evaluate`."""
    examples: Callable[["Network", Any, Any, Any, int], Iterable[dict[str, Any]]]
    """Network, first views `[n, ...]`, outputs and targets of a few samples, and how many were shown before, to plain
    values with a `type`, which the report draws (runs/examples.py)."""
    answer: Callable[[Any, "AnswerOptions"], "Answerer"]
    """A network (`runtime.answers.Model`: arrays in and out, torch's or an export's) and options to the function that
    answers for a file; UserError for options that mean nothing here."""
    lines: Callable[["Network"], Callable[[str], str]] | None = None
    """A network to the function that answers for a line of text, BadSample for one that it cannot answer; None where
    files are answered."""
    spec: type[Spec] = NoOptions
    """Options of the task's own, which a user writes as `data.task`."""
    finish: Callable[[dict[str, Any], PassResult], list[dict[str, Any]]] | None = None
    """Called with a row of results: it adds to the row what only all ranks together know, and returns the examples."""
    compare: Callable[[Sequence[dict[str, Any]]], None] | None = None
    """Called with the rows of an evaluation once they are finished: it adds to them what only several together tell."""
    extra: str = ""
    modules: tuple[str, ...] = ()
    """Modules that an evaluation needs, of the extra of that name."""
    options: frozenset[str] = frozenset()
    """Fields of an evaluation that only some tasks know; those about views belong to the modality."""
    tables: Callable[[Sequence[Mapping[str, Any]], Sequence[str]], list[Table]] = _no_tables
    """Rows of an evaluation and classes to the tables of a report beside the comparison of its rows."""
    in_tables: frozenset[str] = frozenset()
    """What rows hold for `tables` only."""
    chance: Callable[[int], float] | None = None
    """Number of classes to what guessing would get in the first metric."""
    taught: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """Outputs of a teacher and of a network, and targets, to the cross-entropy of each sample `[n]` against the
    teacher's answers, multiplied by its weight; None where classes are dimension 1 (`logits`), or nothing is taught."""
    in_full: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments with which networks give the outputs that `taught` compares, where their loss needs less."""
    hits: Callable[[Any, Tensor], Tensor] | None = None
    """Outputs and targets to how right each sample is, 0-1 `[n]`; None if that has no meaning."""
    logits: bool = False
    """Whether outputs are logits over dimension 1, which may be distilled, smoothed and weighted by class."""
    index_labels: bool = False
    """Whether the label in an index is the target, so that classes can be counted without reading a sample."""
    searched: bool = False
    """Whether `spec` says how an answer is searched, so that it may be changed after training."""
    stepwise: bool = False
    """Whether networks answer token by token, so that they leave torch as an encoder and a step."""
    writes: bool = False
    """Whether `predict` writes files: labels of points, pictures."""

    def metric(self, name: str) -> Metric:
        """Return the metric of that name, with or without its phase (`val/top1`); one not listed is better higher."""
        plain = name.rpartition("/")[2]
        return next((metric for metric in self.metrics if metric.name == plain), Metric(plain, plain, unit=""))

    @property
    def best(self) -> Metric:
        """The metric that says which network is the best."""
        return self.metrics[0]


def search_options(task: Task, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return options of how an answer is searched, in place of those of the training.

    UserError, with `where`, for what the task does not have.
    """
    if given and not task.searched:
        raise UserError(
            f"{where}: is for networks that search their answers, not for the task {task.name}: leave it out"
        )
    return parse(task.spec, given, where).model_dump(include=set(given))


def chance_of_classes(num_classes: int) -> float:
    """Return the percent that guessing gets right."""
    return 100 / num_classes


def class_arguments(card: Any, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a network with a head of classes must know; None until the dataset says how many there are."""
    return {"num_classes": card.num_classes} if card.num_classes else None


def task_before(sample: str, per_point: bool, parts: bool = False) -> str:
    """Return the task of a card or a run that was written before tasks had names, by what it says of its samples.

    `sample` is the modality, `per_point` whether labels belong to points, `parts` whether they are parts of shapes.
    """
    if sample == "frustum":
        return "frustum_boxes"
    if per_point:
        return "parts" if parts else "segment"
    return "classify"


def require_finite(counted: Mapping[str, Any], run: str) -> None:
    """Raise RunFailed if the outputs of a network are not finite for any sample of an evaluation."""
    lost, total = counted.get("num_not_finite", 0), counted["num_samples"]
    if total and lost == total:
        raise RunFailed(f"{run}: the network gives no finite number for any of {total} samples: train it again")
