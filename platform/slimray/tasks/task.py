"""Definition of a task: everything that depends on what a network predicts, as one value of plain functions.

A `Task` defines how outputs are scored (losses with their weights, scores, metrics), what the data path must know about
a target, what the report shows and how `predict` answers for a file. Each task is a file in this folder; the table
TASKS in `slimray.tasks` lists them all. Modalities (data/modalities.py) define how bytes become arrays; the two are
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
"""Outputs of a network: a tensor `[n, ...]`, or several by name."""


class LossOptions(Protocol):
    """The settings of a training that losses depend on; `OptimSpec` has them."""

    @property
    def label_smoothing(self) -> float: ...

    @property
    def class_weights(self) -> tuple[float, ...] | Literal["balanced"] | None: ...


class Score(Protocol):
    """Counts of an evaluation, summed over ranks."""

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
    """A number of a score: its name in `result()`, its label for people, its unit, and which direction is better.

    Numbers in "%" are 0-100. `main` ones appear in the headline and the charts of a report. A `share` is the share of
    correct samples, which has a confidence interval. A `ratio` (perplexity) is unbounded, so searches compare
    logarithms.
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
        """Factor, 1 or -1, by which values are multiplied so that higher is better."""
        return 1.0 if self.better == "higher" else -1.0

    def merit(self, value: float) -> float:
        """Return the merit of a value in a search, in points, higher is better; for a ratio, a point is one percent."""
        return self.sign * (100 * math.log(value) if self.ratio else value)

    def improves(self, value: float, best: float | None) -> bool:
        """Return True if `value` is better than `best` (None: there is none yet); NaN never is."""
        if math.isnan(value):
            return False
        return best is None or (value > best if self.better == "higher" else value < best)

    def to_plain(self) -> dict[str, Any]:
        """Return the metric as plain values for results.json and card.json, from which reports are made."""
        return dict(vars(self))


class NoOptions(Spec):
    """A task without options of its own."""


LOSS = Metric("loss", "loss", unit="", better="lower", main=False)


@dataclass(frozen=True)
class Table:
    """A table of a report as plain values; columns named in `bars` hold percent (0-100).

    With `fold` it is initially collapsed, with `chart` its bars are long.
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
    """Result of a pass over a split on all ranks: what they `found`, the examples as plain values, and the samples.

    `recipe` is the plain recipe of the samples, `root` the folder of their dataset.
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
    """A row of TASKS. All functions are plain: a task stores nothing between their calls."""

    name: str
    metrics: tuple[Metric, ...]
    """The numbers of its score, in order; the first one decides which checkpoint is the best."""
    target: Callable[[Mapping[str, Any]], Target]
    """Plain recipe -> target of a sample: its shape, its type, and the value for samples that cannot be decoded."""
    arguments: Callable[[Any, Mapping[str, Any]], dict[str, Any] | None]
    """Dataset card and options of the task -> what a network must know, such as {"num_classes": 10}; None if only a
    dataset that does not exist yet knows it. The options without default of a row of MODELS are what it needs."""
    losses: Callable[[Any, Tensor, LossOptions], Tensor]
    """Outputs and targets -> loss of each sample `[n]`, multiplied by its weight."""
    weights: Callable[[Tensor, LossOptions], Tensor]
    """Targets -> weight of each sample `[n]`, known before the forward pass. A step is the sum of the losses over the
    sum of the weights of all ranks."""
    score: Callable[[int, Mapping[str, Any]], Score]
    """Number of classes and plain recipe -> empty score."""
    start: Callable[["Setting"], "Pass"]
    """Setting -> pass over a split on one rank, for `evaluate`."""
    examples: Callable[["Network", Any, Any, Any, int], Iterable[dict[str, Any]]]
    """Network, first views `[n, ...]`, outputs and targets of a few samples, and the number shown before -> plain
    values with a `type`, which the report draws (runs/examples.py)."""
    answer: Callable[[Any, "AnswerOptions"], "Answerer"]
    """Network (`runtime.answers.Model`: arrays in and out, torch's or an export's) and options -> function that answers
    for a file; UserError for options that do not apply."""
    lines: Callable[["Network"], Callable[[str], str]] | None = None
    """Network -> function that answers for a line of text, and raises BadSample if it cannot; None for tasks that
    answer for files."""
    spec: type[Spec] = NoOptions
    """The task's own options, which a user writes as `data.task`."""
    finish: Callable[[dict[str, Any], PassResult], list[dict[str, Any]]] | None = None
    """Adds to a row of results what only all ranks together know, and returns the examples."""
    compare: Callable[[Sequence[dict[str, Any]]], None] | None = None
    """Adds to the finished rows of an evaluation what only several of them together show."""
    extra: str = ""
    modules: tuple[str, ...] = ()
    """Modules that an evaluation needs, from the extra of that name."""
    options: frozenset[str] = frozenset()
    """Fields of an evaluation that apply only to some tasks; those about views belong to the modality."""
    tables: Callable[[Sequence[Mapping[str, Any]], Sequence[str]], list[Table]] = _no_tables
    """Rows of an evaluation and classes -> tables of a report, in addition to the comparison of the rows."""
    in_tables: frozenset[str] = frozenset()
    """Fields of rows that only `tables` uses."""
    chance: Callable[[int], float] | None = None
    """Number of classes -> value of the first metric for guessing."""
    taught: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """Outputs of a teacher and of a network, and targets -> cross-entropy of each sample `[n]` against the teacher's
    answers, multiplied by its weight; None if classes are dimension 1 (`logits`), or teaching is not supported."""
    in_full: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments with which networks return the outputs that `taught` compares, if their loss needs less."""
    hits: Callable[[Any, Tensor], Tensor] | None = None
    """Outputs and targets -> correctness of each sample, 0-1 `[n]`; None if that has no meaning."""
    logits: bool = False
    """True if outputs are logits over dimension 1, which can be distilled, smoothed and weighted by class."""
    index_labels: bool = False
    """True if the label in an index is the target, so that classes can be counted without reading samples."""
    searched: bool = False
    """True if `spec` holds options of the search for an answer, which may be changed after training."""
    stepwise: bool = False
    """True if networks answer token by token, so that they are exported as an encoder and a step."""
    writes: bool = False
    """True if `predict` writes files: labels of points, pictures."""

    def metric(self, name: str) -> Metric:
        """Return the metric of that name, with or without phase (`val/top1`); of unknown ones, higher is better."""
        plain = name.rpartition("/")[2]
        return next((metric for metric in self.metrics if metric.name == plain), Metric(plain, plain, unit=""))

    @property
    def best(self) -> Metric:
        """The metric that decides which network is the best."""
        return self.metrics[0]


def search_options(task: Task, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the search options in `given`, which replace those of the training.

    Raises UserError, with `where`, for options that the task does not have.
    """
    if given and not task.searched:
        raise UserError(
            f"{where}: applies only to networks that search their answers, not to the task {task.name}: remove it"
        )
    return parse(task.spec, given, where).model_dump(include=set(given))


def chance_of_classes(num_classes: int) -> float:
    """Return the percent of correct guesses."""
    return 100 / num_classes


def class_arguments(card: Any, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a network with a classification head; None until the number of classes is known."""
    return {"num_classes": card.num_classes} if card.num_classes else None


def task_before(sample: str, per_point: bool, parts: bool = False) -> str:
    """Return the task of a card or run written before tasks had names, inferred from its samples.

    `sample` is the modality, `per_point` is True if labels belong to points, `parts` if they are parts of shapes.
    """
    if sample == "frustum":
        return "frustum_boxes"
    if per_point:
        return "parts" if parts else "segment"
    return "classify"


def require_finite(counted: Mapping[str, Any], run: str) -> None:
    """Raise RunFailed if the outputs of a network are not finite for all samples of an evaluation."""
    lost, total = counted.get("num_not_finite", 0), counted["num_samples"]
    if total and lost == total:
        raise RunFailed(f"{run}: the network's outputs are not finite for all {total} samples, train it again")
