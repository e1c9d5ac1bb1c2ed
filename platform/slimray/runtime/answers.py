"""Answers of `predict` for a file, the options of a task, and the interface of a network: `Model`.

numpy only: a run's network (`slimray.tasks.network`, torch) and an export (`slimray.runtime.load`) are both a `Model`,
so that the same code answers for a file with either of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slimray.data.own_files import FileOptions, Readers
from slimray.spec import UserError

Arrays = np.ndarray | Mapping[str, np.ndarray]
"""Outputs of a network: an array `[n, ...]`, or several by name."""


class Model(Protocol):
    """A network as a function of arrays, with the recipe of its samples and its classes."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The plain recipe of its samples."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """Its classes, in the order of its scores."""
        ...

    @property
    def reach(self) -> int:
        """Largest distance in pixels at which an input still affects an output."""
        ...

    @property
    def frame_shape(self) -> tuple[int | None, ...]:
        """Shape of its input without the batch, None for any size; () if unknown."""
        ...

    def outputs(self, data: np.ndarray, rows: int) -> Arrays:
        """Return float32 outputs `[n, ...]` of samples `[n, V, ...]`, views averaged, at most `rows` at once."""
        ...


@dataclass(frozen=True)
class AnswerOptions:
    """Options of a user: the `paths` of all files, the number of classes (`top`), the output folder (`out`, default:
    beside each file), and the number of views given to the network at once (`rows`)."""

    paths: Sequence[Path]
    top: int = 5
    file: FileOptions = field(default_factory=FileOptions)
    out: Path | None = None
    rows: int = 8


@dataclass(frozen=True)
class Answer:
    """Answer for a file: its `top` classes, best first, or the `reason` why it could not be read.

    The number of a class is its probability, or its share of the points if points are labelled. `written` are the files
    that hold `what`; `notes` says which points of a cloud were left out.
    """

    path: Path
    top: list[tuple[str, float]] = field(default_factory=list)
    reason: str = ""
    written: tuple[Path, ...] = ()
    what: str = ""
    notes: str = ""


Answerer = Callable[[Path, Readers], Answer]


@dataclass(frozen=True)
class Answers:
    """A task's answers for files: `answer` returns a function of a file; `writes` is True if that writes files."""

    name: str
    answer: Callable[[Model, AnswerOptions], Answerer]
    writes: bool = False


def only_array(outputs: Arrays) -> np.ndarray:
    """Return the single output of a network; UserError if it has several."""
    if isinstance(outputs, Mapping):
        raise UserError(f"the network has several outputs ({', '.join(outputs)}), but this task reads one")
    return outputs


def softmax(scores: np.ndarray, axis: int) -> np.ndarray:
    """Return probabilities of logits along `axis`, in the type of `scores`."""
    powers = np.exp(scores - scores.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def top_classes(scores: np.ndarray, classes: Sequence[str], k: int) -> list[tuple[str, float]]:
    """Return the `k` best (class, probability) of logits `[C]`, best first."""
    scores = scores.astype(np.float32)
    probabilities = softmax(scores, 0)
    order = np.argsort(-scores, kind="stable")[: min(k, len(classes))]
    return [(classes[int(number)], float(probabilities[number])) for number in order]


def require_apart(paths: Sequence[Path], targets: Callable[[Path], Sequence[Path]], what: str) -> None:
    """Raise UserError if an output file (of `targets`) would overwrite one of `paths` or another output."""
    given, owners = {path.resolve() for path in paths}, dict[Path, Path]()
    for path in paths:
        for target in targets(path):
            if target.resolve() in given:
                raise UserError(f"{target}: the {what} of {path} would overwrite it: omit it, or give --out")
            other = owners.setdefault(target.resolve(), path)
            if other.resolve() != path.resolve():
                raise UserError(
                    f"{other}, {path}: their {what} would be the same file, {target}: predict one by one, with --out"
                )
