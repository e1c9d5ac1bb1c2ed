"""What `predict` says of a file, and what a task must know to say it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slimray.data.own_files import FileOptions, Readers
from slimray.spec import UserError


@dataclass(frozen=True)
class AnswerOptions:
    """What a user asked for: the `paths` of all files, how many classes (`top`), where to write (`out`: default beside
    each file); `rows` views are given to the network at once."""

    paths: Sequence[Path]
    top: int = 5
    file: FileOptions = field(default_factory=FileOptions)
    out: Path | None = None
    rows: int = 8


@dataclass(frozen=True)
class Answer:
    """What was found in a file: its `top` classes, best first, or the `reason` why it could not be read.

    The number of a class is its probability, or its share of the points where those have labels. `written` are the
    files that hold `what`, `notes` says which points of a cloud were left out.
    """

    path: Path
    top: list[tuple[str, float]] = field(default_factory=list)
    reason: str = ""
    written: tuple[Path, ...] = ()
    what: str = ""
    notes: str = ""


Answerer = Callable[[Path, Readers], Answer]


def require_apart(paths: Sequence[Path], targets: Callable[[Path], Sequence[Path]], what: str) -> None:
    """Raise UserError if what is written for one of the files would overwrite another of them, or what it gives."""
    given, owners = {path.resolve() for path in paths}, dict[Path, Path]()
    for path in paths:
        for target in targets(path):
            if target.resolve() in given:
                raise UserError(f"{target}: the {what} of {path} would overwrite it: leave it out, or give --out")
            other = owners.setdefault(target.resolve(), path)
            if other.resolve() != path.resolve():
                raise UserError(
                    f"{other}, {path}: their {what} would be one file, {target}: predict one by one, with --out"
                )
