"""`slimray predict` for text networks: the answer to each line is printed as soon as the line is read."""

import contextlib
import gzip
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from slimray.cli.terminal import emit
from slimray.data.paths import GZIP
from slimray.data.samples import BadSample
from slimray.data.text.lines import EMPTY, Line, lines_of
from slimray.spec import RunFailed, UserError, shown

STDIN = "-"


def answer_lines(answer: Callable[[str], str], files: list[Path], as_json: bool) -> None:
    """Print the answer to each line of the files, or an empty line where there is none, with the reason on stderr.

    `-` is standard input. Raises UserError at the end if a line or file could not be answered.
    """
    rows: list[dict[str, Any]] = []
    num_bad = 0
    for path in files:
        try:
            with _opened(path) as stream:
                for line in lines_of(str(path), stream):
                    said, reason = _answered(answer, line)
                    num_bad += bool(reason)
                    if reason:
                        typer.echo(f"{path} line {line.number}: {shown(reason)}", err=True)
                    if as_json:
                        rows.append({"file": str(path), "line": line.number, "answer": said, "reason": reason})
                    else:
                        typer.echo(shown(said))
        except (OSError, RunFailed) as error:
            reason = (error.strerror or "cannot be read").lower() if isinstance(error, OSError) else str(error)
            num_bad += 1
            rows.append({"file": str(path), "line": 0, "answer": "", "reason": reason})
            typer.echo(f"{path}: {shown(reason)}", err=True)
    if as_json:
        emit(rows)
    if num_bad:
        raise UserError(f"{num_bad} lines or files could not be answered; the reasons are above")


def _answered(answer: Callable[[str], str], line: Line) -> tuple[str, str]:
    """Return the answer to a line, and the reason if there is none."""
    if line.reason:
        return "", "" if line.reason == EMPTY else line.reason
    try:
        return answer(line.texts[0]), ""
    except BadSample as error:
        return "", str(error)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if str(path) == STDIN:
        yield sys.stdin.buffer
        return
    with open(path, "rb") as file:
        yield gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == GZIP else file
